"""Sets of pictures for few-shot tasks, labelled for what they are; nothing here downloads anything."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modmoe.errors import DataNotFoundError
from modmoe.hosts import import_host

DESCRIPTIONS = {
    "digits": "handwritten digits, 8x8 (scikit-learn's load_digits); classes: the digits",
    "glyphs": "letters and digits rendered from Noto fonts, no handwriting; classes: the characters, pictures: fonts",
    "letters": "letters rendered from Noto fonts, no handwriting; classes: the characters, pictures: fonts",
    "emoji": "emoji as Google and Twitter draw them, in grey; classes: the emoji, pictures: the two styles",
    "emoji_kinds": "emoji as Google draws them, in grey; classes: Unicode's subcategories, pictures: their emoji",
}


@dataclass(frozen=True)
class ImageSet:
    """Pictures with labels.

    Args:
        images: (n, height, width) float32 in [0, 1]; 1 is ink.
        labels: (n,) int64, 0 to len(names) - 1.
        names: of the classes.
        description: what the pictures are, for tables and figures.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    description: str


def load_image_set(name: str, root: str | Path = "data") -> ImageSet:
    """A set of pictures: scikit-learn's digits, or one that ``scripts/fetch_data.py`` put below ``root``.

    Args:
        name: "digits", "glyphs", "letters", "emoji" or "emoji_kinds"; see ``DESCRIPTIONS``.
        root: the folder that holds glyphs/glyphs.npz and emoji/emoji.npz.
    Raises:
        ValueError: if the name is unknown or the file damaged.
        DataNotFoundError: if the file is missing.
        MissingExtraError: if scikit-learn is, which brings the digits.
    """
    if name not in DESCRIPTIONS:
        raise ValueError(f"unknown set of pictures {name!r}, choose from {', '.join(DESCRIPTIONS)}")
    if name == "digits":
        digits = import_host("sklearn.datasets").load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32)
        return ImageSet(images, torch.tensor(digits.target).long(), [str(i) for i in range(10)], DESCRIPTIONS[name])
    file = "emoji" if name.startswith("emoji") else "glyphs"
    path = Path(root) / file / f"{file}.npz"
    if not path.is_file():
        raise DataNotFoundError(file, root, path)
    try:
        with np.load(path) as archive:
            keys = ("images", "labels", "names", "categories", "styles")
            images, labels, names, categories, styles = (archive[key] for key in keys)
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kept = np.ones(len(labels), np.bool_)
    if name == "letters":
        kept = np.char.startswith(categories, "L")[labels]
    elif name == "emoji_kinds":
        kept = styles == 0  # one style: an emoji's twin in the other would give its class away
        names = categories
    if name in ("letters", "emoji_kinds"):
        names, labels = np.unique(names[labels[kept]], return_inverse=True)
        images = images[kept]
    greys = torch.from_numpy(images.astype(np.float32) / 255)
    return ImageSet(greys, torch.from_numpy(labels.astype(np.int64)), names.tolist(), DESCRIPTIONS[name])
