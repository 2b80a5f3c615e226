"""The Meta-Net and the unit length of features in Triton against their torch twins in float64."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close

from cocoop_fast.ops.meta_net import meta_net_ref

meta_net = pytest.importorskip("cocoop_fast.kernels.meta_net")


@pytest.mark.parametrize("rows, width", [(1, 512), (3, 33), (2, 1), (2, 1280)])
def test_unit_rows(buffers, dtype, tolerance, rows, width):
    x = buffers.randn(rows, width, dtype=dtype, contiguous=True)
    out = buffers.result(rows, width, dtype=dtype, contiguous=True)
    meta_net.unit_rows(x, out)
    assert_close(out, F.normalize(x.double(), dim=-1), tolerance)


def test_zeros_have_no_direction(device):
    out = torch.zeros(1, 8, device=device)
    meta_net.unit_rows(out, out)
    assert out.isnan().all()


# One image, as many as a pass has and one more; units that are no multiple of a pass's; E wider than d, and d than E.
@pytest.mark.parametrize(
    "batch, e, hidden, d", [(1, 33, 2, 20), (4, 640, 40, 512), (5, 20, 9, 1030), (2, 16, 1, 1)]
)
@pytest.mark.parametrize("fp32_weights", [False, True], ids=["", "fp32-weights"])
def test_meta_net(buffers, dtype, tolerance, batch, e, hidden, d, fp32_weights):
    own = torch.float32 if fp32_weights else dtype
    x = buffers.randn(batch, e, dtype=dtype, contiguous=True)
    weights = [
        buffers.randn(*shape, dtype=own, contiguous=True)
        for shape in ((hidden, e), (hidden,), (d, hidden), (d,))
    ]
    exact = [one.double().requires_grad_() for one in weights]
    expected = meta_net_ref(x.double(), *exact)
    u = buffers.result(batch, hidden, contiguous=True)
    out = buffers.result(batch, d, dtype=own, contiguous=True)
    meta_net.meta_net_fwd(x, *weights, u, out)
    active = F.linear(x.double(), *exact[:2]).relu()
    assert_close(u, active, 1e-5, "u")
    assert_close(out, expected, tolerance if own == dtype else 1e-5, "out")

    d_out = buffers.randn(batch, d, dtype=own, contiguous=True)
    expected.backward(d_out.double())
    found = [buffers.result(*one.shape, dtype=own, contiguous=True) for one in weights]
    meta_net.meta_net_bwd(x, weights[2], u, d_out, *found)
    for name, one, like in zip(("d_w1", "d_b1", "d_w2", "d_b2"), found, exact, strict=True):
        assert_close(one, like.grad, tolerance if own == dtype else 1e-5, name)


def test_what_is_not_a_number_stays_so(device):
    x = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]], device=device)
    w1, b1, w2, b2 = (torch.ones(*shape, device=device) for shape in ((1, 2), (1,), (3, 1), (3,)))
    u, out = torch.empty(2, 1, device=device), torch.empty(2, 3, device=device)
    meta_net.meta_net_fwd(x, w1, b1, w2, b2, u, out)
    assert out[0].isnan().all() and out[1].tolist() == [4.0] * 3
    gradients = [torch.empty_like(one) for one in (w1, b1, w2, b2)]
    meta_net.meta_net_bwd(x, w2, u, torch.ones_like(out), *gradients)
    assert gradients[0][0, 0].isnan() and gradients[2].isnan().all() and gradients[3].tolist() == [2.0] * 3


def test_no_images(device):
    def z(*shape):
        return torch.zeros(*shape, device=device)

    meta_net.unit_rows(z(0, 8), z(0, 8))
    meta_net.meta_net_fwd(z(0, 8), z(2, 8), z(2), z(4, 2), z(4), z(0, 2), z(0, 4))
    gradients = [torch.full(shape, 7.0, device=device) for shape in ((2, 8), (2,), (4, 2), (4,))]
    meta_net.meta_net_bwd(z(0, 8), z(4, 2), z(0, 2), z(0, 4), *gradients)
    assert not any(one.any() for one in gradients)


def test_bad_arguments(device):
    def z(*shape):
        return torch.zeros(*shape, device=device)

    weights = z(2, 8), z(2), z(4, 2), z(4)
    with pytest.raises(ValueError, match=r"`w1` must be contiguous of shape \(2, 9\), got \(2, 8\)"):
        meta_net.meta_net_fwd(z(3, 9), *weights, z(3, 2), z(3, 4))
    with pytest.raises(ValueError, match=r"`out` must be torch.float32, got torch.float16"):
        meta_net.meta_net_fwd(z(3, 8), *weights, z(3, 2), z(3, 4).half())
    with pytest.raises(ValueError, match=r"`d_b2` must be contiguous of shape \(4,\), got \(5,\)"):
        meta_net.meta_net_bwd(z(3, 8), weights[2], z(3, 2), z(3, 4), *weights[:3], z(5))
    with pytest.raises(ValueError, match="rows of 2049 numbers: the kernels take at most 2048"):
        meta_net.meta_net_fwd(z(1, 2049), z(2, 2049), *weights[1:], z(1, 2), z(1, 4))
    with pytest.raises(ValueError, match=r"`x` must have shape \(n, d\), got \(8,\)"):
        meta_net.unit_rows(z(8), z(8))
