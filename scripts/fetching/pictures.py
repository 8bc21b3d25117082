"""Few-shot pictures of 28x28 bytes in many classes, some per class: rendered glyphs, and emoji.

- Glyphs, letters and digits as Noto's fonts draw them: rendered with fonttools and pillow from Debian's
  fonts-noto-core, downloaded or installed. OFL 1.1, the Noto Project Authors.
- Emoji, each as Google and Twitter draw it: npm's emoji-datasource-google and -twitter, read with pillow. Apache-2.0
  (Google's drawings), CC BY 4.0 (Twitter's).
"""

import io
import json
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fetching.arrays import arrays_of
from fetching.packages import Files, NotGotError, apt_files, npm_package

GLYPHS_FILE, EMOJI_FILE = "glyphs/glyphs.npz", "emoji/emoji.npz"
SIDE = 28  # pixels of a few-shot image
EM = 20  # pixels of a font's em square in it
LEAST_PICTURES = 8  # distinct renderings that make a character a class
GLYPHS_LEAST, EMOJI_LEAST = 1_000, 1_500  # classes: the exact number depends on the font's and Pillow's version
MOST_PICTURES = 20  # as many as Omniglot has drawings of a character
NOTO_PACKAGE, NOTO_FOLDER = "fonts-noto-core", "/usr/share/fonts/truetype/noto"
EMOJI_STYLES = ("google", "twitter")
EMOJI_VERSION = "16.0.0"


def check_pictures(files: Files, classes: int, least: int, most: int, what: str) -> str:
    """Distinct pictures of 28x28 bytes, in at least so many classes of ``least`` to ``most`` pictures each."""
    ((file, content),) = files.items()
    keys = ("images", "labels", "names", "categories", "styles", "style_names")
    arrays = arrays_of(content, file, keys)
    images, labels, names, categories, styles, style_names = (arrays[key] for key in keys)
    if images.shape[1:] != (SIDE, SIDE) or images.dtype != np.uint8:
        raise ValueError(f"the images are {images.dtype} of shape {images.shape}, not uint8 of {(SIDE, SIDE)} each")
    if labels.shape != images.shape[:1] or styles.shape != labels.shape or len(categories) != len(names):
        raise ValueError(f"{file} holds {len(images)} images, {len(labels)} labels and {len(styles)} styles")
    counts = np.bincount(labels, minlength=len(names))
    if len(counts) != len(names) or len(names) < classes or not ((least <= counts) & (counts <= most)).all():
        low, high = (0, 0) if len(counts) == 0 else (counts.min(), counts.max())
        raise ValueError(
            f"{len(names)} classes with {low} to {high} images, not {classes} or more with {least} to {most}"
        )
    if styles.max(initial=0) >= len(style_names):
        raise ValueError(f"{file} names {len(style_names)} styles and uses number {styles.max()}")
    if len({image.tobytes() for image in images}) != len(images):
        raise ValueError("some images come twice")
    return f"{len(images):,} {what} of {len(names):,} classes"


def glyphs_from_apt(package: str, inside: str, work: Path) -> Files:
    """Rendered from a Debian package's fonts, unpacked without installing it."""
    return glyphs_of_folder(apt_files(package, work) / inside.lstrip("/"))


def glyphs_of_folder(folder: Path) -> Files:
    """Letters and digits (Unicode L and N) as the fonts below a folder draw them: rendered, not handwritten."""
    try:
        from fontTools.ttLib import TTFont
        from PIL import ImageFont
    except ImportError as error:
        raise NotGotError("fonttools and pillow are needed to render glyphs: pip install fonttools pillow") from error
    paths = sorted(folder.rglob("*.ttf"), key=lambda path: path.name)
    if not paths:
        raise NotGotError(f"there are no fonts below {folder}")
    having: dict[int, list[int]] = defaultdict(list)  # code point: fonts
    for i, path in enumerate(paths):
        for code in TTFont(path, lazy=True).getBestCmap() or ():
            if unicodedata.category(chr(code))[0] in "LN":
                having[code].append(i)
    wanted = {code: fonts for code, fonts in sorted(having.items()) if len(fonts) >= LEAST_PICTURES}
    # without complex layout, so that a machine with libraqm draws the same
    fonts = {
        i: ImageFont.truetype(str(paths[i]), EM, layout_engine=ImageFont.Layout.BASIC)
        for i in sorted({i for fonts in wanted.values() for i in fonts})
    }
    drawn = (
        (f"U+{code:04X}", unicodedata.category(chr(code)), [(i, draw_glyph(chr(code), fonts[i])) for i in having[code]])
        for code in wanted
    )
    return {GLYPHS_FILE: archive_of_classes(drawn, [path.stem for path in paths], LEAST_PICTURES, MOST_PICTURES)}


def draw_glyph(character: str, font: Any) -> "np.ndarray[Any, Any] | None":
    """Ink (255) on nothing (0), the middle of its box in the middle of 28x28; None if there is no ink."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    sheet = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(sheet).text((-left, -top), character, 255, font)
    box = sheet.getbbox()
    return None if box is None else centred(sheet.crop(box))


def centred(picture: Any) -> "np.ndarray[Any, Any]":
    """In the middle of 28x28 pixels, made smaller where it does not fit."""
    from PIL import Image

    scale = min(1.0, SIDE / max(picture.size))
    if scale < 1:
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    sheet = Image.new("L", (SIDE, SIDE))
    sheet.paste(picture, ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2))
    return np.asarray(sheet, np.uint8)


def emoji_from_npm(version: str, work: Path) -> Files:
    """Each emoji as every style draws it, in grey: darkness on white, so that paper is 0. Only pictures are read."""
    pictures: list[dict[str, Any]] = []
    book: list[dict[str, Any]] = []
    for style in EMOJI_STYLES:
        folder = work / style
        folder.mkdir()
        with tarfile.open(npm_package(f"emoji-datasource-{style}@{version}", folder)) as tar:
            found = {}
            for member in tar:
                path = Path(member.name)
                if path.parent == Path(f"package/img/{style}/64") and (content := tar.extractfile(member)):
                    found[path.name] = content.read()
                elif path == Path("package/emoji.json") and (content := tar.extractfile(member)):
                    book = json.loads(content.read())
        pictures.append(found)
    drawn = (
        (
            one["short_name"],
            one["subcategory"],
            [(i, draw_emoji(found[one["image"]])) for i, found in enumerate(pictures)],
        )
        for one in book
        if all(one["image"] in found for found in pictures)
    )
    try:
        book.sort(key=lambda one: one["sort_order"])
        return {EMOJI_FILE: archive_of_classes(drawn, list(EMOJI_STYLES), len(EMOJI_STYLES), len(EMOJI_STYLES))}
    except KeyError as error:
        raise NotGotError(f"emoji.json is not what it was: {error} is missing") from error


def draw_emoji(content: bytes) -> "np.ndarray[Any, Any]":
    """Grey, 28x28, upside down in brightness: ink is 255, and so is black."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise NotGotError("pillow is needed to read emoji: pip install pillow") from error
    with Image.open(io.BytesIO(content)) as picture:
        coloured = picture.convert("RGBA")
    grey = Image.alpha_composite(Image.new("RGBA", coloured.size, "white"), coloured).convert("L")
    return np.asarray(ImageOps.invert(grey).resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.uint8)


def archive_of_classes(
    classes: Iterable[tuple[str, str, list[tuple[int, "np.ndarray[Any, Any] | None"]]]],
    style_names: list[str],
    least: int,
    most: int,
) -> bytes:
    """The .npz of (name, category, [(style, picture)]) classes that have ``least`` distinct pictures.

    Of a class, equal pictures count once and the first ``most`` stay. A class that shares a picture with an earlier
    one is left out (Greek and Cyrillic A are drawn as the Latin one): no model could tell them apart.
    """
    seen: set[bytes] = set()
    images, labels, styles, names, categories = [], [], [], [], []
    for name, category, pictures in classes:
        distinct = {picture.tobytes(): (style, picture) for style, picture in reversed(pictures) if picture is not None}
        if len(distinct) < least or not seen.isdisjoint(distinct):
            continue
        seen |= distinct.keys()
        for style, picture in sorted(distinct.values(), key=lambda pair: pair[0])[:most]:
            images.append(picture)
            labels.append(len(names))
            styles.append(style)
        names.append(name)
        categories.append(category)
    content = io.BytesIO()
    np.savez_compressed(
        content,
        images=np.array(images, np.uint8).reshape(-1, SIDE, SIDE),
        labels=np.array(labels, np.int64),
        names=np.array(names, np.str_),
        categories=np.array(categories, np.str_),
        styles=np.array(styles, np.int64),
        style_names=np.array(style_names, np.str_),
    )
    return content.getvalue()
