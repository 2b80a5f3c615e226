"""The reference's few-shot caches, ``split_fewshot/shot_{k}-seed_{s}.pkl``, read without running code in them.

A pickle is a program that may call any importable function. The reader here resolves one name only: the class
``Datum``, for which it puts a placeholder. Whatever else a file asks for ends the reading.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cocoop_fast.errors import UserError
from cocoop_fast.files.inert_pickle import InertClass, InertObject, InertUnpickler

# 16 shots of ImageNet's 1,000 classes take about 2 MB.
_MAX_BYTES = 64 * 2**20
_ADVICE = "delete it, and the images are drawn again"


class CachedImage(NamedTuple):
    """One row of a cache; ``path`` is absolute, on the machine that wrote it."""

    path: str
    label: int


class CachedSample(NamedTuple):
    """What a cache holds. ImageNet's have no validation images."""

    train: list[CachedImage]
    val: list[CachedImage]


def read_reference_cache(path: Path) -> CachedSample:
    """The training and validation images of a cache.

    Raises:
        UserError: too large, not a pickle, one that asks for more than ``Datum``, or one with other contents.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(
                f"{path} has {size:,} bytes, too many for a few-shot cache; {_ADVICE}.", exit_status=1
            )
        with open(path, "rb") as file:
            values = InertUnpickler(file, _known).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.", exit_status=1) from error
    except _Refused as error:
        raise UserError(
            f"{path} asks for {error}, which a few-shot cache has no need of, so it was not read; {_ADVICE}.",
            exit_status=1,
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path} is not a readable few-shot cache; {_ADVICE}.", exit_status=1) from error
    if not isinstance(values, dict) or not isinstance(values.get("train"), list):
        raise UserError(f"{path} holds no few-shot sample; {_ADVICE}.", exit_status=1)
    return CachedSample(_images(values["train"], path), _images(values.get("val", []), path))


class _Refused(Exception):
    """The name that a pickle asked for."""


def _known(module: str, name: str) -> InertClass:
    if name == "Datum":  # in whatever module of Dassl or of a fork; nothing is imported
        return InertClass(name)
    raise _Refused(f"{module}.{name}")


def _images(rows: Any, path: Path) -> list[CachedImage]:
    images = []
    for row in rows if isinstance(rows, list) else [rows]:
        state = row.state if isinstance(row, InertObject) and isinstance(row.state, dict) else {}
        source, label = state.get("_impath"), state.get("_label")
        if not isinstance(source, str) or type(label) is not int:
            raise UserError(f"{path} holds something that is not an image; {_ADVICE}.", exit_status=1)
        images.append(CachedImage(source, label))
    return images
