"""Where the real tables stand, and what is missing if they do not."""

import zipfile
from pathlib import Path

import numpy as np

from modmoe.errors import DataNotFoundError


def read_table(name: str, root: str | Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of ``<root>/<name>/<name>.npz``, which scripts/fetch_data.py wrote.

    Raises:
        DataNotFoundError: if the file is missing.
        ValueError: if it is damaged or lacks an array.
    """
    path = Path(root) / name / f"{name}.npz"
    if not path.exists():
        raise DataNotFoundError(name, root, path)
    try:
        with np.load(path) as archive:
            return {key: archive[key] for key in keys}
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
