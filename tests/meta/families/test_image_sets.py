"""Sets of pictures: digits as they come, files that the test writes as scripts/fetch_data.py does."""

import numpy as np
import pytest
import torch

from modmoe.errors import DataNotFoundError
from modmoe.meta.families import load_image_set


def write(root, name, **changes):
    """Three classes with two pictures each, of styles 0 and 1; the second class is no letter."""
    content = {
        "images": (np.arange(6, dtype=np.uint8) * 51)[:, None, None] * np.ones((6, 28, 28), np.uint8),
        "labels": np.array([0, 0, 1, 1, 2, 2]),
        "names": np.array(["one", "two", "three"]),
        "categories": np.array(["Lu", "Nd", "Lu"]),
        "styles": np.array([0, 1] * 3),
        "style_names": np.array(["plain", "bold"]),
    }
    (root / name).mkdir()
    np.savez_compressed(root / name / f"{name}.npz", **{**content, **changes})


def test_digits_are_the_real_ones():
    digits = load_image_set("digits")
    assert digits.images.shape == (1797, 8, 8)
    assert digits.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.images.max() == 1
    assert digits.names[3] == "3"
    assert "handwritten" in digits.description


@pytest.mark.parametrize(
    ("name", "file", "labels", "names", "greys"),
    [
        ("glyphs", "glyphs", [0, 0, 1, 1, 2, 2], ["one", "two", "three"], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        # "one" and "three", in the order of their names
        ("letters", "glyphs", [0, 0, 1, 1], ["one", "three"], [0, 0.2, 0.8, 1]),
        ("emoji", "emoji", [0, 0, 1, 1, 2, 2], ["one", "two", "three"], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        # one style; "one" and "three" are of the same kind
        ("emoji_kinds", "emoji", [0, 1, 0], ["Lu", "Nd"], [0, 0.4, 0.8]),
    ],
)
def test_classes_of_a_set(tmp_path, name, file, labels, names, greys):
    write(tmp_path, file)
    found = load_image_set(name, tmp_path)
    assert found.labels.tolist() == labels
    assert found.names == names
    assert found.images.dtype == torch.float32
    torch.testing.assert_close(found.images[:, 3, 4], torch.tensor(greys, dtype=torch.float32))
    assert ("rendered" if file == "glyphs" else "emoji as Google") in found.description


def test_missing_sets_name_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"glyphs.npz is missing. .*python scripts/fetch_data\.py glyphs$"):
        load_image_set("letters")
    with pytest.raises(FileNotFoundError, match=r"fetch_data\.py emoji --root elsewhere$"):
        load_image_set("emoji_kinds", "elsewhere")


def test_bad_names_and_damaged_files(tmp_path):
    with pytest.raises(ValueError, match="unknown set of pictures 'omniglot', choose from digits, glyphs"):
        load_image_set("omniglot", tmp_path)
    write(tmp_path, "emoji")
    path = tmp_path / "emoji/emoji.npz"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"emoji\.npz is damaged"):
        load_image_set("emoji", tmp_path)
