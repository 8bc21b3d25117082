"""Glyphs and emoji drawn from made-up fonts and drawings: the package managers are replaced."""

import io
import json
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest


def picture(number: int) -> np.ndarray:
    return np.full((28, 28), number, np.uint8)


def contents(archive: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(archive)) as arrays:
        return dict(arrays)


def test_classes_keep_distinct_pictures_that_no_other_class_has(script):
    classes = [
        ("a", "Lu", [(0, picture(1)), (1, picture(1)), (2, picture(2)), (3, None), (4, picture(3))]),
        ("alpha", "Lu", [(0, picture(4)), (1, picture(5)), (2, picture(3))]),  # shares 3 with a
        ("few", "Lu", [(0, picture(6)), (1, picture(6))]),
        ("b", "Ll", [(2, picture(7)), (3, picture(4))]),  # 4 is free: alpha was left out
        ("many", "Nd", [(i, picture(10 + i)) for i in range(5)]),
    ]
    found = contents(script.pictures.archive_of_classes(classes, list("vwxyz"), least=2, most=3))
    assert found["names"].tolist() == ["a", "b", "many"]
    assert found["categories"].tolist() == ["Lu", "Ll", "Nd"]
    assert found["images"][:, 0, 0].tolist() == [1, 2, 3, 7, 4, 10, 11, 12]
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert found["styles"].tolist() == [0, 2, 4, 2, 3, 0, 1, 2]  # of equal pictures the first style's stays
    assert found["style_names"].tolist() == list("vwxyz")


def archive(script, changes=None, count=3):
    """Two classes with so many pictures each."""
    classes = [(name, "Lu", [(i, picture(10 * k + i)) for i in range(count)]) for k, name in enumerate("ab")]
    plain = contents(script.pictures.archive_of_classes(classes, ["x"] * count, 1, 9))
    content = io.BytesIO()
    np.savez(content, **{**plain, **(changes or {})})
    return {"some/file.npz": content.getvalue()}


def test_pictures_are_counted(script):
    assert script.pictures.check_pictures(archive(script), 2, 3, 3, "dots") == "6 dots of 2 classes"


@pytest.mark.parametrize(
    ("changes", "bounds", "message"),
    [
        ({}, (3, 3, 3), "2 classes with 3 to 3 images, not 3 or more with 3 to 3"),
        ({}, (2, 4, 5), "2 classes with 3 to 3 images, not 2 or more with 4 to 5"),
        ({}, (2, 1, 2), "2 classes with 3 to 3 images, not 2 or more with 1 to 2"),
        ({"labels": np.array([0, 0, 0, 1, 1, 2])}, (2, 1, 9), "2 classes with"),
        ({"labels": np.zeros(5, np.int64)}, (2, 1, 9), "holds 6 images, 5 labels and 6 styles"),
        ({"images": np.zeros((6, 28, 28), np.uint8)}, (2, 1, 9), "some images come twice"),
        ({"images": np.zeros((6, 27, 28), np.uint8)}, (2, 1, 9), r"not uint8 of \(28, 28\) each"),
        ({"style_names": np.array(["x"])}, (2, 1, 9), "names 1 styles and uses number 2"),
    ],
)
def test_wrong_pictures_are_refused(script, changes, bounds, message):
    with pytest.raises(ValueError, match=message):
        script.pictures.check_pictures(archive(script, changes), *bounds, "dots")


def test_damaged_pictures_are_refused(script):
    ((file, content),) = archive(script).items()
    for broken in (content[:100], b"", b"no archive"):
        with pytest.raises(ValueError, match=r"some/file\.npz is damaged"):
            script.pictures.check_pictures({file: broken}, 2, 3, 3, "dots")


@pytest.fixture
def fonts(tmp_path):
    """Ten fonts that draw A as a box of a height of its own, B as A, C as nothing, ( not as a letter, and 1 wide."""
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")
    folder = tmp_path / "fonts/deep"
    folder.mkdir(parents=True)
    for i in range(10):

        def box(width, height):
            pen = pens.TTGlyphPen(None)
            pen.moveTo((0, 0))
            for corner in ((0, height), (width, height), (width, 0)):
                pen.lineTo(corner)
            pen.closePath()
            return pen.glyph()

        shapes = {".notdef": box(10, 10), "C": pens.TTGlyphPen(None).glyph()}  # the first stands for what is missing
        shapes |= {"A": box(300, 200 + 70 * i), "B": box(300, 200 + 70 * i)}
        shapes |= {"one": box(5000, 250 + 300 * i), "parenleft": box(100, 100 + 50 * i)}
        font = builder.FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(list(shapes))
        font.setupCharacterMap({65: "A", 66: "B", 67: "C", 40: "parenleft", 49: "one"})
        font.setupGlyf(shapes)
        font.setupHorizontalMetrics(dict.fromkeys(shapes, (600, 0)))
        font.setupHorizontalHeader(ascent=1000, descent=-200)
        font.setupNameTable({"familyName": "Test", "styleName": f"S{i}"})
        font.setupPost()
        font.save(folder / f"Font{i}.ttf")
    return tmp_path / "fonts"


def test_glyphs_are_rendered_from_fonts(script, fonts):
    pytest.importorskip("PIL")
    files = script.pictures.glyphs_of_folder(fonts)
    assert script.pictures.check_pictures(files, 2, 8, 20, "rendered glyphs").endswith("of 2 classes")
    found = contents(files[script.pictures.GLYPHS_FILE])
    assert found["names"].tolist() == ["U+0031", "U+0041"]  # B is drawn as A, C is empty, ( is no letter
    assert found["categories"].tolist() == ["Nd", "Lu"]
    assert found["style_names"].tolist() == [f"Font{i}" for i in range(10)]
    tall = found["images"][found["labels"] == 1][-1] > 127
    # 300 x 830 of 1000 units at 20 pixels: 6 x 16.6, in the middle
    assert (tall.any(0).sum(), tall.any(1).sum()) in {(6, 16), (6, 17)}
    assert abs(np.flatnonzero(tall.any(0)).mean() - 13.5) <= 1
    assert abs(np.flatnonzero(tall.any(1)).mean() - 13.5) <= 1
    wide = found["images"][found["labels"] == 0][0] > 0  # 100 pixels, made to fit
    assert wide.any(0).sum() == 28


def test_glyphs_come_from_the_debian_package_or_the_installed_folder(
    script, fonts, tmp_path, monkeypatch, capsys, failing
):
    small = replace(
        script.SETS["glyphs"], check=lambda files: script.pictures.check_pictures(files, 2, 8, 20, "glyphs")
    )
    monkeypatch.setitem(script.SETS, "glyphs", small)

    def run(command, folder):
        if command[0] == "apt-get":
            assert command == ["apt-get", "download", "fonts-noto-core"]
            (folder / "fonts-noto-core_1_all.deb").write_bytes(b"deb")
        else:
            assert command == ["dpkg-deb", "-x", "fonts-noto-core_1_all.deb", "unpacked"]
            target = folder / "unpacked/usr/share/fonts/truetype"
            target.mkdir(parents=True)
            (target / "noto").symlink_to(fonts / "deep")

    monkeypatch.setattr(script.packages, "run", run)
    assert script.main(["glyphs", "--root", str(tmp_path / "one")]) == 0
    assert "got it from apt's fonts-noto-core" in capsys.readouterr().out
    monkeypatch.setattr(script.packages, "run", failing("apt-get is not installed"))
    monkeypatch.setattr(script.pictures, "NOTO_FOLDER", str(fonts))
    assert script.main(["glyphs", "--root", str(tmp_path / "two")]) == 0
    assert "got it from /usr/share/fonts/truetype/noto, " in capsys.readouterr().out
    one, two = ((tmp_path / name / "glyphs/glyphs.npz").read_bytes() for name in ("one", "two"))
    assert np.array_equal(contents(one)["images"], contents(two)["images"])
    monkeypatch.setattr(script.pictures, "NOTO_FOLDER", str(tmp_path / "nothing"))
    assert script.main(["glyphs", "--root", str(tmp_path / "three")]) == 1
    assert "could not get it. apt's fonts-noto-core: apt-get is not installed;" in capsys.readouterr().out


def emoji_png(color: tuple[int, int, int, int]) -> bytes:
    image = pytest.importorskip("PIL.Image")
    content = io.BytesIO()
    image.new("RGBA", (64, 64), color).save(content, "png")
    return content.getvalue()


def fake_emoji(book, drawings):
    """What `npm pack emoji-datasource-...` leaves behind."""

    def run(command, folder):
        style = command[-1].removeprefix("emoji-datasource-").removesuffix("@16.0.0")
        files = {"emoji.json": json.dumps(book).encode(), "img/other/64/a.png": b"not read"}
        files |= {f"img/{style}/64/{name}": content for name, content in drawings[style].items()}
        with tarfile.open(folder / f"emoji-datasource-{style}-16.0.0.tgz", "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    return run


def test_emoji_are_darkness_on_white_in_both_styles(script, tmp_path, monkeypatch):
    keys = ("short_name", "subcategory", "image", "sort_order")
    book = [
        dict(zip(keys, row, strict=True))
        for row in [("late", "kind", "b.png", 9), ("early", "sort", "a.png", 1), ("one-style", "kind", "c.png", 2)]
    ]
    grey = {name: emoji_png((value, value, value, 255)) for name, value in (("a.png", 0), ("b.png", 200))}
    clear = {"a.png": emoji_png((0, 0, 0, 0)), "b.png": emoji_png((155, 155, 155, 255)), "c.png": emoji_png((9,) * 4)}
    monkeypatch.setattr(script.packages, "run", fake_emoji(book, {"google": grey, "twitter": clear}))
    small = replace(script.SETS["emoji"], check=lambda files: script.pictures.check_pictures(files, 2, 2, 2, "emoji"))
    monkeypatch.setitem(script.SETS, "emoji", small)
    assert script.main(["emoji", "--root", str(tmp_path)]) == 0
    found = contents((tmp_path / "emoji/emoji.npz").read_bytes())
    assert found["names"].tolist() == ["early", "late"]  # in the order of the book; one has a single style
    assert found["categories"].tolist() == ["sort", "kind"]
    assert found["images"][:, 5, 5].tolist() == [255, 0, 55, 100]  # black, paper, 255 - 200, 255 - 155
    assert found["styles"].tolist() == [0, 1, 0, 1]


def test_emoji_that_changed_are_refused(script, tmp_path, monkeypatch, capsys):
    drawn = {"a.png": emoji_png((0, 0, 0, 255))}
    monkeypatch.setattr(script.packages, "run", fake_emoji([{"image": "a.png"}], {"google": drawn, "twitter": drawn}))
    assert script.main(["emoji", "--root", str(tmp_path)]) == 1
    assert "emoji.json is not what it was: 'sort_order' is missing" in capsys.readouterr().out


def test_what_to_install_is_said_when_it_is_missing(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fontTools.ttLib", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(script.packages.NotGotError, match="needed to render glyphs: pip install fonttools pillow"):
        script.pictures.glyphs_of_folder(tmp_path)
    with pytest.raises(script.packages.NotGotError, match="needed to read emoji: pip install pillow"):
        script.pictures.draw_emoji(b"")
