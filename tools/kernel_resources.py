"""What a compiled kernel uses of a GPU, whichever compiler made it, and whether that is acceptable."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of shared memory that one block may have: "Technical specifications per compute capability" of the CUDA C++
# programming guide; the local data share of a compute unit, AMD's instruction set architecture of each.
SHARED_LIMIT = {
    "sm_75": 64 * 1024,
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx1100": 64 * 1024,
}


UNSERVED = "this Triton does not compile anything for it"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Args:
        module: the file of the kernel, without its ending.
        kernel: the operation that it does, such as layer_norm_fwd.
        dtype: how its rows are stored.
        name: what tells it from the kernel's other variants of this dtype; may be "".
        target: one of SHARED_LIMIT.
        registers: of one thread; AMD's vector registers.
        shared_bytes: of one block, static and dynamic.
        local_bytes: memory of one thread, where spilled registers go.
        failure: why it was not compiled, or "".
    """

    module: str
    kernel: str
    dtype: str
    name: str
    target: str
    registers: int = 0
    shared_bytes: int = 0
    local_bytes: int = 0
    failure: str = ""

    def problem(self) -> str | None:
        """What is wrong with it, in one line, or None."""
        if self.failure:
            return f"does not compile: {self.failure}"
        if self.shared_bytes > SHARED_LIMIT[self.target]:
            return f"needs {self.shared_bytes} bytes of shared memory of {SHARED_LIMIT[self.target]}"
        if self.local_bytes:
            return f"spills: {self.local_bytes} bytes of local memory a thread"
        return None

    def __str__(self) -> str:
        return " ".join(filter(None, (self.module, self.kernel, self.dtype, self.name, "for", self.target)))
