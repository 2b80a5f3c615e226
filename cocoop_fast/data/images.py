"""Decode one image file as it is meant, or say in a few words why it cannot be.

The images of published sets are read as the reference reads them, ``Image.open(path).convert("RGB")``. One's own are
turned as their EXIF orientation says, greys of more than 8 bits are scaled, and transparency is laid over white.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from cocoop_fast.data.dataset import Sample
from cocoop_fast.data.listing import visible_files

# Beyond this Pillow suspects a decompression bomb and warns. We refuse before decoding: 268 MB as RGB is
# more than any photograph needs to become 224 pixels wide.
MAX_PIXELS = 89_478_485

# What is opened, whatever a file's name ends in. Of the other formats some are handed to another program (EPS to
# Ghostscript), some hold no picture, and the rest nobody photographs in.
_FORMATS = (
    "JPEG",
    "PNG",
    "TIFF",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "PPM",
    "JPEG2000",
    "AVIF",
    "MPO",
    "TGA",
    "QOI",
)

# What is done to one's own images, and the sentence that counts it.
CORRECTIONS = {
    "turned": "turned as their EXIF orientation says",
    "scaled": "of more than 8 bits a grey value scaled to 8",
    "white": "with transparency laid over white",
    "first": "of several frames or pages, of which the first is read",
    "dark": "of 16 bits hold no value above 4,095 and come out nearly black; if they hold 8 or 12 bits, scale them to 16",
}

# Of each EXIF orientation. ``ImageOps.exif_transpose`` writes the tags anew as well, and fails at those it cannot write.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


MISSING = "missing"  # the reason of an ImageError for a file that is not there


class ImageError(ValueError):
    """An image that cannot be used; the text is the reason in a few words."""


@dataclass(frozen=True)
class FileReader:
    """Decodes the image files of samples.

    Args:
        root: what ``Sample.source`` is relative to. It may itself be a link.
        confined: refuse files that links lead out of ``root``, because the list of samples came from somebody
            else. Lists made by reading directories need no such care.
        as_stored: correct nothing, as the reference: for published sets.
    """

    root: Path
    confined: bool = False
    as_stored: bool = False

    def __call__(self, sample: Sample) -> Image.Image:
        """Raises ``ImageError``."""
        return self.corrected(sample)[0]

    def corrected(self, sample: Sample) -> tuple[Image.Image, tuple[str, ...]]:
        """The image, and what was done to it: keys of :data:`CORRECTIONS`. Raises ``ImageError``."""
        path = self.root / str(sample.source)
        if self.confined and not path.resolve().is_relative_to(self.root.resolve()):
            raise ImageError(f"a link that leads out of {self.root}")
        return _decode(path, _as_reference if self.as_stored else as_meant)


def endings() -> frozenset[str]:
    """Of the names of files that are taken for images: small letters, with the dot."""
    Image.init()
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in _FORMATS)


def image_files(folder: Path) -> list[Path]:
    """The images in a folder, by name; hidden files, and others such as Thumbs.db, are none."""
    return [path for path in visible_files(folder) if path.suffix.lower() in endings()]


def open_rgb(path: Path) -> Image.Image:
    """Decode one of a user's own files in full to an RGB image, as it is meant.

    Raises:
        ImageError: missing, not an image, truncated, damaged, of more than :data:`MAX_PIXELS` pixels, or with grey
            values whose black and white are unknown.
    """
    return _decode(path, as_meant)[0]


def any_rgb(image: Path | str | Image.Image | np.ndarray) -> Image.Image:
    """A file, an image in memory or its pixels, (H, W, 3) or (H, W) bytes, as an RGB image as it is meant.

    Raises:
        ImageError: it cannot be read as an image.
    """
    if isinstance(image, (str, Path)):
        return open_rgb(Path(image))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
            raise ImageError(f"{image.dtype} of {image.shape}, and not bytes of (H, W, 3) or (H, W)")
        image = Image.fromarray(np.ascontiguousarray(image))
    return as_meant(image)[0]


def _as_reference(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    return image.convert("RGB"), ()


def as_meant(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """An RGB image as it is meant, and what was done to it: keys of :data:`CORRECTIONS`.

    Raises:
        ImageError: grey values whose black and white are unknown. What Pillow raises on damaged data is passed on.
    """
    done: list[str] = []
    # An MPO is a phone's, which keeps a depth map, say, as a second one.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        done.append("first")
    image.load()  # which turns a TIFF, and takes its orientation away
    turn = _TURNS.get(_orientation(image))
    if image.mode == "L" and getattr(image, "tag_v2", {}).get(TiffImagePlugin.SAMPLEFORMAT) == (2,):
        raise ImageError("grey values with a sign; write them without")
    if image.mode == "F" or image.mode.startswith("I"):
        image, scaled = _eight_bits(image)
        done += scaled
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            done.append("white")
    image = image.convert("RGB")
    if turn is not None:
        image = image.transpose(turn)
        done.append("turned")
    return image, tuple(done)


def _orientation(image: Image.Image) -> int:
    """1 (upright) to 8; tags that cannot be read say nothing, and the pixels are good without them."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of whatever kind, as in _decode
        return 1


def _eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Greys of 16 bits: 65,535 becomes 255, in every image alike. Floats: of 0 to 1, or of 0 to 255.

    Pillow leaves to us which way round a TIFF of these has black and white, and which grey of a PNG is transparent.
    """
    greys = np.asarray(image)
    low, high = greys.min(), greys.max()
    tags = getattr(image, "tag_v2", {})
    signed = tags.get(TiffImagePlugin.SAMPLEFORMAT) == (2,) and tags.get(TiffImagePlugin.BITSPERSAMPLE) == (
        16,
    )
    white = 32767 if signed else 65535 if image.mode != "F" else 1 if high <= 1 else 255
    # Small numbers that were saved as large ones.
    if image.mode == "I" and high <= 255 and image.format == "TIFF":
        white = 255
    if not (low >= 0 and high <= white):  # or not numbers at all
        raise ImageError(f"grey values from {low:g} to {high:g}; scale them to 8 or 16 bits")
    eight = np.round(greys * (255 / white)).astype(np.uint8)
    scaled = Image.fromarray(
        255 - eight if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else eight
    )
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        scaled.putalpha(Image.fromarray(np.where(greys == clear, 0, 255).astype(np.uint8)))
    return scaled, ["scaled", "dark"] if white == 65535 and high < 4096 else ["scaled"]


@cache
def _formats() -> tuple[str, ...]:
    """Those of them that this Pillow has. Before the first image is read, libtiff is told to be silent: it writes what it
    thinks of a damaged file to the terminal itself, and here that becomes an :class:`ImageError`."""
    Image.init()
    with contextlib.suppress(OSError, AttributeError):  # a Pillow whose libtiff is not to be had
        pillow = ctypes.CDLL(Image.core.__file__)  # looks in the libraries that it links as well
        for setter in (pillow.TIFFSetErrorHandler, pillow.TIFFSetWarningHandler):
            setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
            setter(None)
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode(
    path: Path, convert: Callable[[Image.Image], tuple[Image.Image, tuple[str, ...]]]
) -> tuple[Image.Image, tuple[str, ...]]:
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            return convert(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image") from error
    except FileNotFoundError as error:
        raise ImageError(MISSING) from error
    except PermissionError as error:
        raise ImageError("no permission to read it") from error
    except IsADirectoryError as error:
        raise ImageError("a directory") from error
    except Exception as error:
        # Of whatever kind: what Pillow's decoders raise on damaged data depends on the format.
        raise ImageError("truncated" if "truncated" in str(error).lower() else "damaged") from error
