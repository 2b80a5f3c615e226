"""Which backend serves a device and a dtype. Dispatch is data: a frozen record a backend."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from cocoop_fast.cuda_extension import why_no_cuda
from cocoop_fast.errors import UserError
from cocoop_fast.extension import load_extension

# Triton then runs its kernels on the CPU, slowly: for tests.
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

_GPU_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Backend:
    """One implementation of the op table."""

    name: str
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    why_unavailable: Callable[[], str | None] = lambda: None  # None: it can be used here
    on_request: frozenset[str] = frozenset()  # device types that it serves only if it is named

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve the device and dtype here, or None if it can."""
        if device.type not in self.device_types | self.on_request:
            return f"it does not run on {device.type}"
        if dtype not in self.dtypes:
            return f"it does not compute in {dtype}"
        return self.why_unavailable()


def _why_no_extension() -> str | None:
    try:
        load_extension()
    except RuntimeError as error:
        return str(error)
    return None


def _why_no_triton() -> str | None:
    return None if find_spec("triton") else "the package 'triton' is not installed"


def _why_no_cuda_kernels() -> str | None:
    return why_no_cuda() or _why_no_triton()  # they are two of the operations: the rest is Triton's


BACKENDS: tuple[Backend, ...] = (  # in order of preference
    Backend("cuda", frozenset({"cuda"}), _GPU_FLOATS, _why_no_cuda_kernels),
    Backend(
        "triton",
        frozenset({"cuda"}),  # AMD's GPUs are torch's "cuda" as well
        _GPU_FLOATS,
        _why_no_triton,
        on_request=frozenset({"cpu"} if _TRITON_INTERPRETS else ()),
    ),
    Backend("cpu", frozenset({"cpu"}), frozenset({torch.float32}), _why_no_extension),
    Backend("torch", frozenset({"cpu", "cuda"}), _FLOATS),
)


def select_backend(device: torch.device, dtype: torch.dtype, explicit: str = "auto") -> Backend:
    """The backend for a device and a dtype.

    ``auto`` takes the first that can serve; an explicit choice that cannot be served is an error.

    Raises:
        UserError: unknown backend, or one that cannot serve this device and dtype.
    """
    usable = [b for b in BACKENDS if b.refusal(device, dtype) is None]
    if explicit == "auto":
        return next(b for b in usable if device.type in b.device_types)
    names = ", ".join(b.name for b in usable)
    for backend in BACKENDS:
        if backend.name == explicit:
            reason = backend.refusal(device, dtype)
            if reason is None:
                return backend
            raise UserError(f"The backend '{explicit}' cannot be used here: {reason}; use auto or {names}.")
    raise UserError(f"The backend '{explicit}' is not part of this version; use auto or {names}.")


def kernel_table(backend: str) -> Any:
    """The launchers of "triton" or "cuda", with the interface of :mod:`cocoop_fast.ops.triton`."""
    triton_kernels = importlib.import_module("cocoop_fast.ops.triton")
    if backend == "triton":
        return triton_kernels
    cuda_kernels = importlib.import_module("cocoop_fast.ops.cuda")
    names = {*triton_kernels.__all__, *cuda_kernels.__all__}
    return SimpleNamespace(
        **{name: getattr(cuda_kernels, name, getattr(triton_kernels, name, None)) for name in names}
    )
