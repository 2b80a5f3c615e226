"""Decode one image file, or say in a few words why it cannot be."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from cocoop_fast.data.dataset import Sample

# Beyond this Pillow suspects a decompression bomb and warns. We refuse before decoding: 268 MB as RGB is
# more than any photograph needs to become 224 pixels wide.
MAX_PIXELS = 89_478_485


class ImageError(ValueError):
    """An image that cannot be used; the text is the reason in a few words."""


@dataclass(frozen=True)
class FileReader:
    """Decodes the image files of samples.

    Args:
        root: what ``Sample.source`` is relative to. It may itself be a link.
        confined: refuse files that links lead out of ``root``, because the list of samples came from somebody
            else. Lists made by reading directories need no such care.
    """

    root: Path
    confined: bool = False

    def __call__(self, sample: Sample) -> Image.Image:
        """Raises ``ImageError``."""
        path = self.root / str(sample.source)
        if self.confined and not path.resolve().is_relative_to(self.root.resolve()):
            raise ImageError(f"a link that leads out of {self.root}")
        return open_rgb(path)


def open_rgb(path: Path) -> Image.Image:
    """Decode a file in full to an RGB image, as the reference does (``Image.open(path).convert("RGB")``).

    Raises:
        ImageError: missing, not an image, truncated, damaged, or of more than :data:`MAX_PIXELS` pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
            return image.convert("RGB")
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image") from error
    except FileNotFoundError as error:
        raise ImageError("missing") from error
    except PermissionError as error:
        raise ImageError("no permission to read it") from error
    except IsADirectoryError as error:
        raise ImageError("a directory") from error
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        TypeError,
        struct.error,
        zlib.error,
    ) as error:
        # What Pillow's decoders raise on damaged data depends on the format.
        raise ImageError("truncated" if "truncated" in str(error).lower() else "damaged") from error
