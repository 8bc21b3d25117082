"""The errors that modmoe raises beyond Python's own, and the suggestion that their messages end with."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class NonFiniteError(ValueError):
    """An input or a router's score holds NaN or infinity."""


class TableError(ValueError):
    """A file is no table of measured times."""


class MissingExtraError(ImportError):
    """A host library is not installed; the message holds the command that installs it."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the message names the file."""


class DataNotFoundError(FileNotFoundError):
    """A data set is not below the root; the message holds the command that fetches it.

    Args:
        name: of the data set, as scripts/fetch_data.py has it.
        root: the folder where data are looked for.
        missing: the file that is not there.
    """

    def __init__(self, name: str, root: str | Path, missing: Path):
        where = "" if str(root) == "data" else f" --root {root}"
        super().__init__(f"{missing} is missing. Fetch it with: python scripts/fetch_data.py {name}{where}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is most like a mistyped one.

    Args:
        word: what was written.
        known: what could have been meant.
    Returns:
        ``"; did you mean 'x'?"``, or an empty string if nothing is close.
    """
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
