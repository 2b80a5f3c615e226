"""What tests of the kernels share: an error bound, and results with a guarded surrounding."""

import math

import torch

POISON = -7.0e33


def assert_close(actual, expected, terms, what="result", scale=None):
    """`actual`, float32, is the float64 `expected` up to rounding.

    Every number is a sum of `terms` products, whose rounding errors grow like the square root of their number; the
    few operations before and after each add a unit of rounding of their own. `scale`: the magnitude of what is summed,
    where it is not that of the result.
    """
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if not actual.numel():
        return
    expected = expected.detach()
    error = (actual.double() - expected).abs()
    magnitude = max(float(expected.abs().max()), 1e-30) if scale is None else float(scale)
    bound = torch.finfo(torch.float32).eps * (8 + terms**0.5) * magnitude
    worst = (
        int(error.argmax()) if error.isfinite().all() else int((~error.isfinite()).flatten().int().argmax())
    )
    assert bool((error <= bound).all()), (
        f"{what}: {float(actual.flatten()[worst])} is not {float(expected.flatten()[worst])} at {worst} "
        f"of {tuple(actual.shape)}: bound {bound:.3g}"
    )


class Guarded:
    """A tensor of this shape inside a larger one full of poison.

    Its rows are contiguous and its strides odd; with `contiguous` all of it is, and the poison before and behind it.
    """

    def __init__(self, *shape, dtype=torch.float32, device="cpu", contiguous=False):
        whole = shape
        shape = (math.prod(whole),) if contiguous else whole
        size = [extent + 2 for extent in shape[:-1]] + [shape[-1] + 5]
        self.poison = torch.tensor(POISON, device=device).to(dtype)  # minus infinity in float16
        self.buffer = self.poison.repeat(size)
        self.inside = (*[slice(1, size + 1) for size in shape[:-1]], slice(1, shape[-1] + 1))
        self.tensor = self.buffer[self.inside].view(whole)

    def check(self):
        """Nothing outside was written, and everything inside was."""
        assert not bool((self.tensor == self.poison).any()), "a part of the result was not written"
        self.check_outside()
        return self.tensor

    def check_outside(self):
        """Nothing outside was written."""
        outside = self.buffer.clone()
        outside[self.inside] = self.poison
        assert bool((outside == self.poison).all()), "memory outside the result was written"


def guarded_like(values, contiguous=False):
    """A guarded copy."""
    guarded = Guarded(*values.shape, dtype=values.dtype, device=values.device, contiguous=contiguous)
    guarded.tensor.copy_(values)
    return guarded
