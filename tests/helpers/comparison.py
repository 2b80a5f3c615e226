"""How far two tensors are apart, with a message that says where."""

from __future__ import annotations

from torch import Tensor


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "tensor") -> None:
    """Largest difference relative to the largest expected magnitude; names the worst element when too large."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{what}: not finite"
    difference = (actual - expected).abs()
    scale = max(expected.abs().max().item(), 1e-30)
    worst = int(difference.argmax())
    error = difference.max().item() / scale
    assert error <= tolerance, (
        f"{what}: relative error {error:.2e} > {tolerance:.0e} at flat index {worst}: "
        f"{actual.flatten()[worst].item():.9g} instead of {expected.flatten()[worst].item():.9g}"
    )
