"""Calls of the C++ operations, and torch's between them, recorded and repeated."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast import ClassTree
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.recording import record

pytestmark = pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")


def test_operations_of_torch_are_repeated_in_their_order():
    u, out = torch.zeros(2, 16), torch.zeros(2, 16)

    def work():
        u.add_(1)
        cpu.activation_fwd(u, "quick_gelu", out)
        u.view(-1).copy_(out.flatten())
        cpu.activation_fwd(u, "quick_gelu", out)

    again = record(work)
    assert again is not None
    expected = torch.full_like(u, u[0, 0].item())
    again()
    expected.add_(1)
    for _ in range(2):
        expected = expected * torch.sigmoid(1.702 * expected)
    torch.testing.assert_close(out, expected)


def test_what_makes_new_memory_is_not_recorded():
    rows = torch.ones(3, 16)
    assert record(lambda: rows.copy_(rows + 1)) is None
    assert torch.equal(rows, torch.full_like(rows, 2))


def test_an_error_ends_the_recording():
    rows = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="kind"):
        record(lambda: cpu.activation_fwd(rows, "relu", rows))
    before = CPP.load().Recording()
    cpu.activation_fwd(rows, "gelu", rows)
    assert len(before) == 0 and record(lambda: None) is not None


def test_an_operation_with_memory_of_one_call_is_refused():
    logits, labels, loss = torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(())
    with pytest.raises(RuntimeError, match="not recorded"):
        record(lambda: cpu.cross_entropy_fwd(logits, labels, loss))


def test_a_recording_within_a_recording_is_refused():
    with pytest.raises(RuntimeError, match="within a recording"):
        record(lambda: record(lambda: None))
    assert record(lambda: None) is not None


def test_a_view_that_became_a_copy_is_not_recorded():
    x, out = torch.arange(6.0).view(2, 3), torch.zeros(6)
    with torch.inference_mode():
        assert record(lambda: out.copy_(x.T.reshape(-1))) is None


def test_a_number_that_python_reads_is_not_recorded():
    x = torch.ones(1)
    assert record(lambda: x.mul_(x.item())) is None


def test_more_calls_than_a_run_has_are_all_repeated():
    x = torch.zeros(1, 16)
    one, row = torch.ones(1, 1, 16), torch.tensor([0])

    def add():
        for _ in range(40):
            cpu.add_rows(one, row, x[None])

    again = record(add)
    again()
    assert torch.equal(x, torch.full_like(x, 80))


def test_what_the_caller_lets_go_of_stays_for_the_repetition():
    """Arrays, indices, the plan of a tree and the scratch memory of a call."""
    tree = ClassTree(torch.tensor([[900, 7, 5, 999, 0], [900, 7, 6, 3, 999]]), 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    rows, o, dx, taken = tree.rows, torch.zeros(2, tree.rows, 16), torch.zeros(6, 16), torch.zeros(2, 2, 16)

    def recorded():
        q, k, v = drawn(2, rows, 16), drawn(2, rows, 16), drawn(2, rows, 16)
        inputs = (q, k, v, drawn(16), drawn(16), 2)
        attention, index = cpu.TreeAttention(tree), torch.tensor([1, 0])
        dy, weight = drawn(6, 8), drawn(8, 16)

        def work():
            attention.forward(inputs, o)
            cpu.linear_bwd(dy, weight, dx)
            cpu.gather_rows(o, index, taken)

        return record(work)

    again = recorded()
    expected = [one.clone() for one in (o, dx, taken)]
    for one in (o, dx, taken):
        one.zero_()
    fill = [torch.full((1000,), float("nan")) for _ in range(50)]  # over memory that was freed
    again()
    del fill
    for one, other in zip((o, dx, taken), expected, strict=True):
        assert torch.equal(one, other)
