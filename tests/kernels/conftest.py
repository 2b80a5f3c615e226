"""What the tests of the Triton kernels share. They run on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from kernel_testing import Guarded, guarded_like


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    """How the rows are stored."""
    return request.param


@pytest.fixture
def tolerance(dtype):
    """The largest error relative to the largest magnitude, against float64; the rounding of the result included."""
    return 1e-5 if dtype == torch.float32 else 1e-2


@pytest.fixture
def buffers(device):
    """Makes arguments for a kernel; when the test is over, nothing outside them may have been written."""
    made = Buffers(device)
    yield made
    made.check()


class Buffers:
    """Tensors with poison around them, on the device."""

    def __init__(self, device):
        self.device = device
        self.generator = torch.Generator().manual_seed(0)
        self.arguments = []
        self.results = []

    def randn(self, *shape, dtype=torch.float32, contiguous=False):
        """Normal numbers; "rows" unless `contiguous`."""
        return self.copy(torch.randn(*shape, generator=self.generator).to(dtype), contiguous)

    def copy(self, values, contiguous=False):
        """A copy of these numbers, of which a kernel may change a part."""
        self.arguments.append(guarded_like(values.to(self.device), contiguous))
        return self.arguments[-1].tensor

    def result(self, *shape, dtype=torch.float32, contiguous=False):
        """Poison, all of which the kernel must overwrite."""
        self.results.append(Guarded(*shape, dtype=dtype, device=self.device, contiguous=contiguous))
        return self.results[-1].tensor

    def check(self):
        for guarded in self.arguments:
            guarded.check_outside()
        for guarded in self.results:
            guarded.check()
