"""What a training step tells its host and its optimizer, in one launch: how many images it classified right, the copies of
the gradients, the largest of them and whether one is infinite or not a number.

`step_report`: of B + n / 1024 programs the first B own the logits of an image each, the others 1024 numbers of the copy,
which they find in one of at most eight gradients. What they count goes to four bytes each that all share, by atomic
operations whose result does not depend on their order; the program that comes last writes the report and leaves zeros for the
next launch. 4 K bytes an image and 8 bytes a number: at ViT-B/16's 35,000 numbers, 0.3 MB, the time of a launch; as torch's
operations it was six launches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import check_array
from .variants import Variant

MOST_GRADIENTS = 8
BLOCK, WARPS = 1024, 4

_SIZES = [f"n{i}" for i in range(MOST_GRADIENTS)]


@triton.jit
def _part(gradient, first, n, columns, value):
    """`value`, with the numbers of a gradient in its place among all."""
    local = columns - first
    inside = (local >= 0) & (local < n)
    return tl.where(inside, tl.load(gradient + local, mask=inside, other=0.0), value)


@triton.jit(do_not_specialize=["batch", "classes", *_SIZES])
def _step_report_kernel(
    loss, logits, labels, scale, copies, shared, report,
    g0, g1, g2, g3, g4, g5, g6, g7,
    batch, classes, n0, n1, n2, n3, n4, n5, n6, n7,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < batch:
        # Right is an image if its label's logit is the first of the highest. NaN is never lower.
        row = logits + program.to(tl.int64) * classes
        label = tl.load(labels + program)
        known = (label >= 0) & (label < classes)
        own = tl.load(row + label, mask=known, other=float("nan"))
        not_lower = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, classes, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            other = tl.load(row + columns, mask=columns < classes, other=float("-inf"))
            lower = (other < own) | ((other == own) & (columns >= label)) | (columns >= classes)
            not_lower += 1 - lower.to(tl.int32)
        tl.atomic_add(shared + 1, (tl.sum(not_lower, axis=0) == 0).to(tl.int32))
    else:
        columns = (program - batch) * BLOCK + tl.arange(0, BLOCK)
        value = tl.zeros((BLOCK,), dtype=tl.float32)
        end = 0
        value = _part(g0, end, n0, columns, value)
        end += n0
        value = _part(g1, end, n1, columns, value)
        end += n1
        value = _part(g2, end, n2, columns, value)
        end += n2
        value = _part(g3, end, n3, columns, value)
        end += n3
        value = _part(g4, end, n4, columns, value)
        end += n4
        value = _part(g5, end, n5, columns, value)
        end += n5
        value = _part(g6, end, n6, columns, value)
        end += n6
        value = _part(g7, end, n7, columns, value)
        end += n7
        tl.store(copies + columns, value, mask=columns < end)
        # Without their sign, floats are in the order of their bits; what is not a number comes after infinity.
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(shared, tl.max(bits, axis=0))
    arrived = tl.atomic_add(shared + 2, 1)
    if arrived == tl.num_programs(0) - 1:
        largest = tl.atomic_xchg(shared, 0)
        right = tl.atomic_xchg(shared + 1, 0)
        tl.atomic_xchg(shared + 2, 0)
        tl.store(report, tl.load(loss))
        tl.store(report + 1, right.to(tl.float32))
        tl.store(report + 2, tl.load(scale))
        tl.store(report + 3, largest.to(tl.float32, bitcast=True))
        tl.store(report + 4, (largest >= 0x7F800000).to(tl.float32))


def step_report(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    gradients: Sequence[Tensor],
    copies: Tensor,
    shared: Tensor,
    report: Tensor,
) -> None:
    """report = loss, images whose label has the first of the highest logits, scale, the largest absolute value among the
    gradients (NaN if one is), and whether that is infinite or NaN (1 or 0); copies = the gradients one after the other.

    Args:
        loss, scale: () fp32.
        logits: (B, K) fp32.
        labels: (B,) int64.
        gradients: 1 to MOST_GRADIENTS, contiguous, fp32, n < 2^31 numbers in all.
        copies: (n,) fp32, written.
        shared: (3,) int32, zeros before and after.
        report: (5,) fp32, written.
    """
    if not 1 <= len(gradients) <= MOST_GRADIENTS:
        raise ValueError(f"1 to {MOST_GRADIENTS} gradients are reported on together, got {len(gradients)}")
    if logits.ndim != 2:
        raise ValueError(f"`logits` must have shape (B, K), got {tuple(logits.shape)}")
    batch, classes = logits.shape
    fp32 = torch.float32
    for name, one, shape in (
        ("loss", loss, ()),
        ("logits", logits, (batch, classes)),
        ("scale", scale, ()),
        ("copies", copies, (sum(one.numel() for one in gradients),)),
        ("report", report, (5,)),
    ):
        check_array(name, one, shape, logits, fp32)
    check_array("labels", labels, (batch,), logits, torch.int64)
    check_array("shared", shared, (3,), logits, torch.int32)
    for one in gradients:
        check_array("gradients", one, tuple(one.shape), logits, fp32)
    absent = MOST_GRADIENTS - len(gradients)
    sizes = [one.numel() for one in gradients] + [0] * absent
    with torch.cuda.device_of(logits):
        _step_report_kernel[(batch + triton.cdiv(sum(sizes), BLOCK),)](
            loss, logits, labels, scale, copies, shared, report,
            *gradients, *[gradients[0]] * absent, batch, classes, *sizes,
            BLOCK=BLOCK, num_warps=WARPS, num_stages=1,
        )  # fmt: skip


def _variants() -> tuple[Variant, ...]:
    pointers = ("loss", "logits", "labels", "scale", "copies", "shared", "report")
    signature = dict.fromkeys(pointers, "*fp32") | {"labels": "*i64", "shared": "*i32"}
    signature |= {f"g{i}": "*fp32" for i in range(MOST_GRADIENTS)}
    signature |= dict.fromkeys(("batch", "classes", *_SIZES), "i32")
    return (Variant(_step_report_kernel, "", "fp32", signature, {"BLOCK": BLOCK}, WARPS),)


VARIANTS = _variants()
