"""Variant: one form of a kernel that a launcher can ask for, as the ahead-of-time compiler needs it.

Every module of kernels ends with `VARIANTS`, a tuple made from the same tables that its launchers choose from, so that
what is compiled and checked for every target before a release is what runs there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Storage types of rows and weights, by the names that Triton's signatures use.
STORAGE = ("fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Variant:
    """A kernel with everything fixed that its compiled form depends on, except the target.

    Pointers are aligned to 16 bytes, and the integers named `width`, `inner` and `stride_*` multiples of 16: so it is for CLIP's
    widths, and these are the forms with the widest loads and the most registers.

    Args:
        kernel: the `@triton.jit` function.
        name: what tells this variant from the kernel's others of the same dtype, for people; may be "".
        dtype: how the rows are stored, one of STORAGE.
        signature: the type of every argument that is not a constexpr: "*fp16", "*i32", "i32", "fp32".
        constexprs: the value of every constexpr argument.
        num_warps, num_stages: as launched.
        constexprs_on_amd: what replaces some of the constexprs on a GPU of AMD.
    """

    kernel: Any
    name: str
    dtype: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    constexprs_on_amd: Mapping[str, Any] = field(default_factory=dict)

    def constexprs_for(self, backend: str) -> dict[str, Any]:
        """The constexprs where Triton's backend is "cuda" or "hip"."""
        return {**self.constexprs, **(self.constexprs_on_amd if backend == "hip" else {})}

    @property
    def kernel_name(self) -> str:
        """The device function's name without the underscore and the `_kernel` around it."""
        name: str = self.kernel.fn.__name__
        return name.removeprefix("_").removesuffix("_kernel")

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kernel_name, self.dtype, self.name)))
