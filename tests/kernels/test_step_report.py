"""A step's report in Triton against its torch twin."""

import math

import pytest
import torch

from cocoop_fast.ops.step_report import step_report_ref

step_report = pytest.importorskip("cocoop_fast.kernels.step_report")


def reported(buffers, logits, labels, gradients, scale=2.0**15):
    """The launch's report, after a comparison of the copies and of what it leaves for the next one."""
    loss, scale = (buffers.copy(torch.tensor([value]))[0] for value in (0.75, scale))
    numbers = torch.cat([one.flatten() for one in gradients])
    copies = buffers.result(len(numbers), contiguous=True)
    shared = torch.zeros(3, dtype=torch.int32, device=buffers.device)
    report = buffers.result(5, contiguous=True)
    step_report.step_report(loss, logits, labels, scale, gradients, copies, shared, report)
    assert copies.equal(numbers) or torch.isnan(numbers).any()
    assert not shared.any()
    expected, _ = step_report_ref(loss, logits, labels, scale, gradients)
    torch.testing.assert_close(report[:4], expected, rtol=0, atol=0, equal_nan=True)
    assert report[4] == (not math.isfinite(report[3]))
    return report


# More numbers than a program copies, no gradient but one, as many as there can be; a single class, more than a pass has.
@pytest.mark.parametrize(
    "batch, k, shapes", [(3, 1025, [(4, 512), (32,), (5, 1)]), (1, 1, [(1,)]), (2, 40, [(3, 2)] * 8)]
)
def test_report(buffers, batch, k, shapes):
    logits = buffers.randn(batch, k, contiguous=True)
    labels = buffers.copy(torch.cat([logits[:1].argmax(dim=1).cpu(), torch.full((batch - 1,), k - 1)]))
    gradients = [buffers.randn(*shape, contiguous=True) for shape in shapes]
    assert reported(buffers, logits, labels, gradients)[3] > 0


def test_the_first_of_the_highest_logits_counts(buffers):
    logits = torch.tensor([[1.0, 3.0, 3.0], [3.0, 1.0, 3.0], [0.0, math.nan, 1.0], [-math.inf] * 3])
    logits = buffers.copy(logits, contiguous=True)
    gradients = [buffers.randn(3, contiguous=True)]
    for label, right in ((0, 2), (1, 1), (2, 0)):
        labels = buffers.copy(
            torch.tensor([label, label, 2, label])
        )  # a loss that is not a number is refused anyway
        assert reported(buffers, logits, labels, gradients)[1] == right
    for label in (-1, 3):
        labels = buffers.copy(torch.full((4,), label))
        loss = logits.new_ones(())
        copies, report = torch.empty(3, device=logits.device), torch.empty(5, device=logits.device)
        shared = torch.zeros(3, dtype=torch.int32, device=logits.device)
        step_report.step_report(loss, logits, labels, loss, gradients, copies, shared, report)
        assert report[1] == 0


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2000])
def test_gradients_that_are_not_finite(buffers, bad, place):
    gradients = [torch.full((2048,), -3.5), torch.tensor([1.0])]
    gradients[0][place] = bad
    gradients = [buffers.copy(one, contiguous=True) for one in gradients]
    logits, labels = buffers.randn(1, 3, contiguous=True), buffers.copy(torch.tensor([0]))
    report = reported(buffers, logits, labels, gradients)
    assert report[4] == 1 and bool(report[3].isnan()) == math.isnan(bad)


def test_bad_arguments(device):
    def z(*shape):
        return torch.zeros(shape, device=device)

    labels, shared = (
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int32, device=device),
    )
    with pytest.raises(ValueError, match="1 to 8 gradients are reported on together, got 9"):
        step_report.step_report(z(), z(2, 3), labels, z(), [z(1)] * 9, z(9), shared, z(5))
    with pytest.raises(ValueError, match=r"`copies` must be contiguous of shape \(4,\), got \(5,\)"):
        step_report.step_report(z(), z(2, 3), labels, z(), [z(4)], z(5), shared, z(5))
    with pytest.raises(ValueError, match=r"`gradients` must be torch.float32, got torch.float16"):
        step_report.step_report(z(), z(2, 3), labels, z(), [z(4).half()], z(4), shared, z(5))
    with pytest.raises(ValueError, match=r"`logits` must have shape \(B, K\), got \(3,\)"):
        step_report.step_report(z(), z(3), labels, z(), [z(4)], z(4), shared, z(5))
