"""The head in Triton against its torch twin in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_close

from cocoop_fast.ops.head import cosine_logits_ref

head = pytest.importorskip("cocoop_fast.kernels.head")

SCALE = 100.0


@pytest.mark.parametrize("fp32_image", [False, True], ids=["", "fp32-image"])
@pytest.mark.parametrize("batch, k, width", [(1, 5, 512), (3, 1, 33), (2, 7, 20), (1, 3, 640), (2, 2, 1280)])
def test_cosine_logits(buffers, dtype, tolerance, batch, k, width, fp32_image):
    features = buffers.randn(batch, k, width, dtype=dtype)
    unit = F.normalize(buffers.randn(batch, width), dim=-1)
    image = buffers.copy(unit.to(torch.float32 if fp32_image else dtype), contiguous=True)
    log_scale = buffers.copy(torch.tensor([SCALE]).log())
    exact = features.double().requires_grad_()
    expected = cosine_logits_ref(image.double(), exact, torch.tensor(SCALE, dtype=torch.float64).log())
    d_logits = buffers.randn(batch, k, contiguous=True)
    expected.backward(d_logits.double())

    logits, inverse_norms = (buffers.result(batch, k, contiguous=True) for _ in range(2))
    head.head_fwd(features, image, log_scale, logits, inverse_norms)
    assert_close(logits, expected, 1e-5, "logits")
    assert_close(inverse_norms, 1 / exact.norm(dim=-1), 1e-5, "inverse norms")
    d_features = buffers.result(batch, k, width, dtype=dtype)
    head.head_bwd(features, image, log_scale, logits, inverse_norms, d_logits, d_features)
    assert_close(d_features, exact.grad, tolerance, "d_features")
    head.head_bwd(features, image, log_scale, logits, inverse_norms, d_logits, features)
    assert torch.equal(features, d_features)


# One block of classes, one more than a block, several, a single class; one image, more, and more than a block.
@pytest.mark.parametrize(
    "batch, k, block", [(1, 100, 1024), (3, 1025, 1024), (2, 2500, 1024), (5, 1, 1024), (20, 3, 16)]
)
def test_cross_entropy(monkeypatch, buffers, batch, k, block):
    monkeypatch.setattr(head, "CLASS_BLOCK", block)
    logits = buffers.copy(buffers.randn(batch, k, contiguous=True) * 30, contiguous=True)
    labels = buffers.copy(torch.arange(batch) * 7 % k)
    grad_loss = buffers.copy(torch.tensor([0.7]))
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels)
    (expected * 0.7).backward()

    loss = buffers.result(1)
    head.cross_entropy_fwd(logits, labels, loss)
    assert abs(float(loss) - expected.item()) <= 1e-5 * float(logits.abs().max())
    d_logits = buffers.result(batch, k, contiguous=True)
    head.cross_entropy_bwd(logits, labels, grad_loss, d_logits)
    if k == 1:
        assert not d_logits.any()
    else:
        assert_close(d_logits, exact.grad, 1e-5, "d_logits")
    head.cross_entropy_bwd(logits, labels, grad_loss, logits)
    assert torch.equal(logits, d_logits)


def test_cross_entropy_is_stable(device):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-1e30, 1e30, 1e30]], device=device)
    labels, loss = torch.tensor([1, 2], device=device), torch.empty(1, device=device)
    head.cross_entropy_fwd(logits, labels, loss)
    assert float(loss) == pytest.approx((6e4 + math.log(2)) / 2, rel=1e-6)
    d_logits = torch.empty_like(logits)
    head.cross_entropy_bwd(logits, labels, loss.new_tensor([2.0]), d_logits)
    assert_close(d_logits, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.5, -0.5]], device=device), 1e-6)


@pytest.mark.parametrize("label", [0, 40, 1030])
@pytest.mark.parametrize("lead", [10.0, 17.0, 40.0])
def test_the_gradient_of_a_label_that_is_nearly_certain(device, label, lead):
    """1 - p is all of its gradient, and next to 1 single precision has nothing of it."""
    logits = torch.randn(1, 1100, device=device)
    logits[0, label] = lead
    labels = torch.tensor([label], device=device)
    expected = logits.double().softmax(dim=-1)
    expected[0, label] = 0
    expected[0, label] = -expected.sum()
    d_logits = torch.empty_like(logits)
    head.cross_entropy_bwd(logits, labels, torch.ones(1, device=device), d_logits)
    assert float((d_logits / expected - 1).abs().max()) < 2e-5


def test_cross_entropy_that_is_not_a_number(device):
    """A NaN among the logits, a label that is no class (never read there), no images."""
    loss = torch.empty(1, device=device)
    logits, labels = torch.zeros(2, 1500, device=device), torch.tensor([0, 3], device=device)
    head.cross_entropy_fwd(logits, labels, loss)
    assert float(loss) == pytest.approx(math.log(1500))
    for label in (-1, 1500):
        head.cross_entropy_fwd(logits, labels.new_tensor([0, label]), loss)
        assert loss.isnan().all()
    d_logits = torch.empty_like(logits)
    for column in (2, 3, 1400):  # the second is the label's
        with_nan = logits.clone()
        with_nan[1, column] = torch.nan
        head.cross_entropy_fwd(with_nan, labels, loss)
        assert loss.isnan().all()
        head.cross_entropy_bwd(with_nan, labels, torch.ones_like(loss), d_logits)
        assert d_logits[1].isnan().all() and not d_logits[0].isnan().any()
    loss.zero_()
    head.cross_entropy_fwd(logits[:0], labels[:0], loss)
    assert loss.isnan().all()


def test_no_prompts(device):
    for batch, k in ((0, 3), (2, 0)):
        features, image = torch.zeros(batch, k, 16, device=device), torch.zeros(batch, 16, device=device)
        pairs, scale = torch.zeros(batch, k, device=device), torch.ones(1, device=device)
        labels = torch.zeros(batch, dtype=torch.int64, device=device)
        head.head_fwd(features, image, scale, pairs, pairs)
        head.head_bwd(features, image, scale, pairs, pairs, pairs, features)
        head.cross_entropy_bwd(pairs, labels, scale, pairs)


def test_bad_arguments(device):
    def z(*shape):
        return torch.zeros(*shape, device=device)

    one, labels = z(1), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"`features` must have shape \(B, K, E\), got \(3, 8\)"):
        head.head_fwd(z(3, 8), z(3, 8), one, z(3, 1), z(3, 1))
    with pytest.raises(ValueError, match=r"`image` must be contiguous of shape \(2, 8\), got \(1, 8\)"):
        head.head_fwd(z(2, 3, 8), z(1, 8), one, z(2, 3), z(2, 3))
    with pytest.raises(ValueError, match=r"`logits` must be torch.float32, got torch.float16"):
        head.head_fwd(z(2, 3, 8), z(2, 8), one, z(2, 3).half(), z(2, 3))
    with pytest.raises(ValueError, match="must have the same number and width of rows"):
        head.head_bwd(z(2, 3, 8), z(2, 8), one, z(2, 3), z(2, 3), z(2, 3), z(2, 3, 7))
    with pytest.raises(ValueError, match=r"`labels` must be torch.int64, got torch.int32"):
        head.cross_entropy_fwd(z(2, 3), labels.int(), one)
    with pytest.raises(ValueError, match=r"`loss` must be contiguous of shape \(1,\), got \(\)"):
        head.cross_entropy_fwd(z(2, 3), labels, z(1)[0])
