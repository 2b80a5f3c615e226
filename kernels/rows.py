"""What the kernels on rows share: how a launcher reads the layout of its tensors, and how a program finds its row.

"Rows" are tensors (n, d) or (B, n / B, d) whose last dimension is contiguous, the others with any strides. Rows that
are written do not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

STORAGE_TYPES = (torch.float16, torch.bfloat16, torch.float32)

# Columns that a program holds at once -> its warps: the narrowest block that takes a whole row is chosen. Sixteen
# numbers a thread keep two to four 16-byte loads in flight, and a row of 512 needs no exchange between warps.
ROW_BLOCKS = {512: 1, 1024: 2, 2048: 4}


_known: ContextVar[bool] = ContextVar("arguments are known", default=False)


@contextmanager
def known_arguments() -> Iterator[None]:
    """Launches inside, of this thread, repeat some whose arguments passed the checks, in shape, strides, dtype and device:
    launchers do without looking again."""
    token = _known.set(True)
    try:
        yield
    finally:
        _known.reset(token)


def arguments_are_known() -> bool:
    """Whether this is inside of :func:`known_arguments`."""
    return _known.get()


@dataclass(frozen=True)
class RowLayout:
    """Where the rows of some tensors lie that are worked on together.

    Attributes:
        count: n.
        per_image: n / B.
        width: d.
        strides: of an image and of a row, for each tensor in turn.
    """

    count: int
    per_image: int
    width: int
    strides: tuple[int, ...]


def row_layout(**tensors: Tensor) -> RowLayout:
    """The common layout of rows; a tensor (n, d) is read as (B, n / B, d) where another has that form.

    Raises:
        ValueError: they are no rows of floats, or differ in number, width or device.
    """
    if not arguments_are_known():
        _check_alike(tensors)
    first = next(iter(tensors.values()))
    count, width = first.shape[:-1].numel(), first.shape[-1]
    per_image = next((rows.shape[1] for rows in tensors.values() if rows.ndim == 3), count)
    strides: list[int] = []
    for rows in tensors.values():
        if rows.ndim == 3:
            strides += [rows.stride(0), rows.stride(1)]
        else:
            strides += [rows.stride(0) * per_image, rows.stride(0)]
    return RowLayout(count, per_image, width, tuple(strides))


def _check_alike(tensors: dict[str, Tensor]) -> None:
    (first_name, first), *_ = tensors.items()
    for name, rows in tensors.items():
        check_rows(name, rows, first)
        same_count = rows.shape[:-1].numel() == first.shape[:-1].numel()
        if not same_count or rows.shape[-1] != first.shape[-1]:
            raise ValueError(
                f"`{name}` and `{first_name}` must have the same number and width of rows, "
                f"got {tuple(rows.shape)} and {tuple(first.shape)}"
            )
    if len({rows.shape[1] for rows in tensors.values() if rows.ndim == 3}) > 1:
        shapes = ", ".join(f"`{name}` {tuple(rows.shape)}" for name, rows in tensors.items())
        raise ValueError(f"the numbers of rows an image differ: {shapes}")


def check_rows(name: str, rows: Tensor, like: Tensor) -> None:
    """Raise ValueError unless `rows` are rows of floats, on the device of `like`."""
    if arguments_are_known():
        return
    if rows.ndim not in (2, 3):
        raise ValueError(f"`{name}` must have shape (n, d) or (B, n, d), got {tuple(rows.shape)}")
    if rows.dtype not in STORAGE_TYPES:
        raise ValueError(f"`{name}` must be float16, bfloat16 or float32, got {rows.dtype}")
    if not rows.shape[-1]:
        raise ValueError(f"`{name}` must have rows of at least one number, got {tuple(rows.shape)}")
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        raise ValueError(f"`{name}` must be contiguous in its last dimension, got strides {rows.stride()}")
    _check_device(name, rows, like)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"`{name}` is on {tensor.device}, other arguments on {like.device}")


def check_array(name: str, array: Tensor, shape: tuple[int, ...], like: Tensor, *types: torch.dtype) -> None:
    """Raise ValueError unless `array` is contiguous, of this shape and these types, on the device of `like`."""
    if arguments_are_known():
        return
    if tuple(array.shape) != shape or not array.is_contiguous():
        raise ValueError(
            f"`{name}` must be contiguous of shape {shape}, got {tuple(array.shape)} with strides {array.stride()}"
        )
    if array.dtype not in (types or STORAGE_TYPES):
        expected = " or ".join(str(dtype) for dtype in types or STORAGE_TYPES)
        raise ValueError(f"`{name}` must be {expected}, got {array.dtype}")
    _check_device(name, array, like)


def row_block(width: int) -> tuple[int, int]:
    """The block of columns and the number of warps for rows of this width.

    Raises:
        ValueError: the rows are wider than any block.
    """
    for block, warps in ROW_BLOCKS.items():
        if width <= block:
            return block, warps
    raise ValueError(f"rows of {width} numbers: the kernels take at most {max(ROW_BLOCKS)}")


@triton.jit
def row_offset(row, per_image, stride_image, stride_row):
    """Where row `row` of all images begins; 64 bits, as B R d may exceed 32."""
    image, within = row // per_image, row % per_image
    return image.to(tl.int64) * stride_image + within.to(tl.int64) * stride_row
