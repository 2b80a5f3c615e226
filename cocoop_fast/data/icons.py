"""Icons: pictures of some hundred everyday things by independent designers, from the fonts that the package qtawesome carries.

A name that several designers have drawn is a class ("anchor", "bell slash", "magnifying glass plus"), each font or weight is a
style, and a drawing of a name in a style is printed in several ways: upright in black on white, and turned, moved, larger or
smaller, in other inks on other papers. So there are many classes with human names, few images of each, and styles to
generalise over: the settings of the paper in miniature, without a download. Drawings are rendered when they are read.
"""

from __future__ import annotations

import colorsys
import importlib.util
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cocoop_fast.config import DataConfig
from cocoop_fast.data.dataset import Dataset, Sample, Splits
from cocoop_fast.data.split import split_by_class
from cocoop_fast.errors import UserError

PACKAGE = "qtawesome"
IMAGE_SIZE = 96  # pixels
PRINTS = 4  # images of each drawing
_GLYPH_SIZE = 256  # of the font that a drawing is made from, before it is scaled down
_CONTRAST = 0.4  # between the luminance of ink and paper, at least

# -- who drew what -----------------------------------------------------------------------------------------------

# File of the font, less its version, and how its names end in this style.
STYLES: dict[str, tuple[str, str]] = {
    "phosphor-regular": ("phosphor", ""),
    "phosphor-light": ("phosphor", "-light"),
    "phosphor-bold": ("phosphor", "-bold"),
    "phosphor-thin": ("phosphor", "-thin"),
    "phosphor-fill": ("phosphor", "-fill"),
    "fontawesome5-solid": ("fontawesome5-solid-webfont", ""),
    "fontawesome5-regular": ("fontawesome5-regular-webfont", ""),
    "fontawesome6-solid": ("fontawesome6-solid-webfont", ""),
    "fontawesome6-regular": ("fontawesome6-regular-webfont", ""),
    "elusive": ("elusiveicons-webfont", ""),
}
_PHOSPHOR = tuple(style for style in STYLES if style.startswith("phosphor"))
_FONT_AWESOME = tuple(style for style in STYLES if style.startswith("fontawesome"))
_ELUSIVE = ("elusive",)


@lru_cache(maxsize=1)
def fonts() -> Path:
    """The folder of qtawesome's fonts; neither it nor Qt is imported.

    Raises:
        UserError: the package is not installed.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise UserError(
            f"The icons are drawn from the fonts of the package {PACKAGE}, which is not installed; run "
            "`pip install 'cocoop-fast[icons]'`.",
            exit_status=1,
        )
    return Path(package.submodule_search_locations[0]) / "fonts"


@lru_cache
def characters(style: str) -> dict[str, int]:
    """The code point of each name in a style.

    Raises:
        UserError: a version of qtawesome without that font.
    """
    stem, ending = STYLES[style]
    others = tuple(weight for same, weight in STYLES.values() if same == stem and weight)
    table = json.loads(font_file(f"{stem}-charmap", ".json").read_text(encoding="utf-8"))
    return {
        name.removesuffix(ending): int(point, 16)
        for name, point in table.items()
        if (name.endswith(ending) if ending else not name.endswith(others))
    }


def class_names() -> tuple[str, ...]:
    """Names that Phosphor shares with Font Awesome or Elusive, in the alphabet's order, as the fonts spell them."""
    others = {name for style in (*_FONT_AWESOME, *_ELUSIVE) for name in characters(style)}
    return tuple(sorted(others & set(characters("phosphor-regular"))))


def font_file(stem: str, ending: str) -> Path:
    """The newest file of qtawesome's fonts that is called ``stem``, less its version.

    Raises:
        UserError: there is none.
    """
    found = sorted(fonts().glob(f"{stem}-[0-9]*{ending}"))
    if not found:
        raise UserError(
            f"The package {PACKAGE} here has no font {stem}; run `pip install -U {PACKAGE}`.", exit_status=1
        )
    return found[-1]


# -- data sets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IconSet:
    """A choice of names and styles.

    Args:
        title: a line for a listing.
        styles: those that are drawn in.
        test_only: whether there is nothing to train on.
        names: the classes, of which those without a drawing in these styles are left out.
    """

    title: str
    styles: tuple[str, ...]
    test_only: bool = True
    names: Callable[[], Sequence[str]] = class_names


def _only_phosphor() -> Sequence[str]:
    return sorted(set(characters("phosphor-regular")) - set(class_names()))


ICON_SETS: dict[str, IconSet] = {
    "icons": IconSet("icons by three designers, in all their styles", tuple(STYLES), test_only=False),
    "icons_phosphor": IconSet(
        "the same classes in three of Phosphor's weights",
        ("phosphor-regular", "phosphor-light", "phosphor-bold"),
        test_only=False,
    ),
    "icons_thin": IconSet("the same classes in Phosphor's thin weight", ("phosphor-thin",)),
    "icons_fill": IconSet("the same classes, filled, by Phosphor", ("phosphor-fill",)),
    "icons_fontawesome": IconSet("those of these classes that Font Awesome drew", _FONT_AWESOME),
    "icons_elusive": IconSet("those of these classes that Elusive drew", _ELUSIVE),
    "icons_others": IconSet("other icons, which Phosphor alone drew", _PHOSPHOR[:3], names=_only_phosphor),
}


def load(name: str, config: DataConfig) -> Dataset:
    """The prints of an icon set. Drawings, not prints, are divided 50/20/30 into those for training and for testing.

    Args:
        name: in :data:`ICON_SETS`.
        config: ``data.root`` is not used.

    Raises:
        UserError: qtawesome is not installed, or has not these fonts.
    """
    icons = ICON_SETS[name]
    names = [one for one in icons.names() if any(one in characters(style) for style in icons.styles)]
    classnames = tuple(one.replace("-", " ") for one in names)
    drawings = [
        Sample(f"{style}/{one}", label, classnames[label])
        for label, one in enumerate(names)
        for style in icons.styles
        if one in characters(style)
    ]
    splits = Splits((), (), tuple(drawings)) if icons.test_only else split_by_class(drawings)
    train, val, test = map(_prints, splits)
    return Dataset(
        name=name,
        classnames=classnames,
        train=train,
        val=val,
        test=test,
        read=read,
        where=f"the fonts of the package {PACKAGE}",
        crop_scale=(0.8, 1.0),  # a smaller crop of an icon is often another icon
        flip=0.0,  # an arrow to the left is not one to the right
        template="an icon of a {}.",
    )


def missing(config: DataConfig) -> tuple[str, ...]:
    """What has to be installed; nothing if the fonts are there."""
    return () if importlib.util.find_spec(PACKAGE) else (f"the package {PACKAGE}",)


def _prints(drawings: Iterable[Sample]) -> tuple[Sample, ...]:
    return tuple(
        Sample(f"{one.source}/{number}", one.label, one.classname)
        for one in drawings
        for number in range(PRINTS)
    )


# -- prints ------------------------------------------------------------------------------------------------------


def read(sample: Sample) -> Image.Image:
    """Render ``style/name/number``, an RGB image of IMAGE_SIZE pixels; the same everywhere."""
    style, name, number = str(sample.source).split("/")
    return render(style, characters(style)[name], random.Random(sample.source) if number != "0" else None)


def render(style: str, character: int, rng: random.Random | None) -> Image.Image:
    """A drawing in print.

    Args:
        style: in :data:`STYLES`.
        character: its code point in the style's font.
        rng: for size, turn, place and colours; ``None``: large, upright, centred, in black on white.

    Returns:
        RGB, IMAGE_SIZE x IMAGE_SIZE.
    """
    glyph = _glyph(style, character)
    share, turn, shift = 0.8, 0.0, (0.5, 0.5)
    ink, paper = (0, 0, 0), (255, 255, 255)
    if rng is not None:
        share, turn, shift = rng.uniform(0.55, 0.85), rng.uniform(-12, 12), (rng.random(), rng.random())
        ink, paper = _colours(rng)
    scale = share * IMAGE_SIZE / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    mask = glyph.resize((width, height), Image.Resampling.BOX)
    mask = mask.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    mask.thumbnail((IMAGE_SIZE, IMAGE_SIZE))  # a long icon, turned, may be a pixel larger
    corner = tuple(round(place * (IMAGE_SIZE - side)) for place, side in zip(shift, mask.size, strict=True))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), paper)
    image.paste(ink, (corner[0], corner[1]), mask)
    return image


@lru_cache(maxsize=4096)
def _glyph(style: str, character: int) -> Image.Image:
    return glyph_of(_font(style), character)


def glyph_of(font: ImageFont.FreeTypeFont, character: int) -> Image.Image:
    """A drawing alone, white on black, cut to its box; "L"."""
    text = chr(character)
    left, top, right, bottom = font.getbbox(text)
    glyph = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(glyph).text((-left, -top), text, fill=255, font=font)
    box = glyph.getbbox()
    return glyph.crop(box) if box else glyph


@lru_cache
def _font(style: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file(STYLES[style][0], ".ttf")), _GLYPH_SIZE)


def _colours(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ink and paper that can be told apart without colour."""
    while True:
        pair = [colorsys.hsv_to_rgb(rng.random(), rng.random(), rng.random()) for _ in range(2)]
        light = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in pair]
        if abs(light[0] - light[1]) >= _CONTRAST:
            ink, paper = (tuple(round(255 * part) for part in colour) for colour in pair)
            return (ink[0], ink[1], ink[2]), (paper[0], paper[1], paper[2])
