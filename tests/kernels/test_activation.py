"""The activation in Triton against its torch twin in float64."""

import pytest
import torch
from comparison import assert_close

from cocoop_fast.ops.activation import activation_ref

activation = pytest.importorskip("cocoop_fast.kernels.activation")

# One block, two of them with the second partly filled, widths that are a multiple of nothing.
SHAPES = [(1, 2048), (4, 33), (3, 1), (2, 3, 20), (2, 1100)]


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(buffers, dtype, tolerance, shape, kind):
    u, dg = buffers.randn(*shape, dtype=dtype), buffers.randn(*shape, dtype=dtype)
    exact = u.double().requires_grad_()
    value = activation_ref(exact, kind)
    value.backward(dg.double())

    out = buffers.result(*shape, dtype=dtype)
    activation.activation_fwd(u, kind, out)
    assert_close(out, value, tolerance, "value")
    changed = buffers.copy(u)
    activation.activation_fwd(changed, kind, changed)
    assert torch.equal(changed, out)
    activation.activation_bwd(u, kind, dg)
    assert_close(dg, exact.grad, tolerance, "gradient")


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter: infinity is meant
@pytest.mark.parametrize("kind", ["quick_gelu", "gelu"])
def test_the_whole_line(device, kind):
    """No point of it is special, and what is not a number stays so."""
    special = torch.tensor([-1e30, -200, -60, 60, 200, 1e30, 0.0, -0.0])
    u = torch.cat([torch.linspace(-12, 12, 3000), special])[None].to(device)
    exact = u.double().requires_grad_()
    value = activation_ref(exact, kind)
    value.backward(torch.ones_like(value))
    out, dg = torch.empty_like(u), torch.ones_like(u)
    activation.activation_fwd(u, kind, out)
    activation.activation_bwd(u, kind, dg)
    size = exact.detach().abs().clamp(min=1)
    assert_close(out / size, value.detach() / size, 1e-6, "value")
    assert_close(dg, exact.grad, 2e-6, "slope")
    u[0, 17] = torch.nan
    activation.activation_fwd(u, kind, out)
    assert out.isnan().nonzero().tolist() == [[0, 17]]


def test_no_rows(device):
    for shape in ((0, 16), (2, 0, 16), (0, 2, 16)):
        rows = torch.zeros(*shape, device=device)
        activation.activation_fwd(rows, "gelu", rows)
        activation.activation_bwd(rows, "gelu", rows)


def test_bad_arguments(device):
    u = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="`kind` must be quick_gelu or gelu, got 'relu'"):
        activation.activation_fwd(u, "relu", u)
    with pytest.raises(
        ValueError, match=r"must have the same number and width of rows, got \(3, 8\) and \(2, 8\)"
    ):
        activation.activation_bwd(u, "gelu", u.new_zeros(3, 8))
