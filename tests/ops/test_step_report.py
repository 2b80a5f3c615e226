"""A step's report by the best backend: which serves, and that all say the same."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.ops.step_report import StepReport, step_report_ref

pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPUs")


def told(*shapes, dtype=torch.float32):
    """Loss, logits, labels, scale and gradients."""
    generator = torch.Generator().manual_seed(0)
    loss, scale = torch.tensor(0.5, dtype=dtype), torch.tensor(256.0)
    logits = torch.randn(4, 7, generator=generator, dtype=dtype)
    label = logits.argmax(dim=1) % 5
    return loss, logits, label, scale, [torch.randn(*one, generator=generator, dtype=dtype) for one in shapes]


@pytest.mark.parametrize("shapes", [[(3, 5), (2,)], [(2,)] * 9], ids=["", "many"])
def test_one_launch_says_what_torch_says(shapes):
    arguments = told(*shapes)
    gradients = arguments[-1]
    gradients[0] = gradients[0].T if gradients[0].ndim == 2 else gradients[0].expand(3, 2)  # strided
    report, copies, overflow = StepReport("triton")(*arguments)
    expected, flat = step_report_ref(*arguments)
    assert report.equal(expected) and copies.equal(flat) and overflow == 0
    assert not {one.data_ptr() for one in gradients} & {copies.data_ptr()}


def test_each_launch_begins_anew():
    report = StepReport("triton")
    loss, logits, label, scale, gradients = told((3,))
    largest, right = gradients[0].abs().max(), (logits.argmax(dim=1) == label).sum()
    assert report(loss, logits, label, scale, [gradients[0] / torch.zeros(3)])[2] == 1
    for _ in range(2):
        found, _, overflow = report(loss, logits, label, scale, gradients)
        assert overflow == 0 and found[3] == largest and found[1] == right


@pytest.mark.parametrize(
    "backend, dtype", [("auto", torch.float32), ("torch", torch.float32), ("triton", torch.float64)]
)
def test_where_no_kernel_serves_nobody_looked_for_overflows(backend, dtype):
    arguments = told((3,), (2, 2), dtype=dtype)
    report, copies, overflow = StepReport(backend)(*arguments)
    expected, flat = step_report_ref(*arguments)
    assert overflow is None and report.equal(expected) and copies.equal(flat) and report.dtype == dtype
