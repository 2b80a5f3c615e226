"""Which backend serves a device and a dtype. Dispatch is data: a frozen record a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cocoop_fast.errors import UserError
from cocoop_fast.extension import load_extension

_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Backend:
    """One implementation of the op table."""

    name: str
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    why_unavailable: Callable[[], str | None] = lambda: None  # None: it can be used here

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve the device and dtype here, or None if it can."""
        if device.type not in self.device_types:
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


BACKENDS: tuple[Backend, ...] = (  # in order of preference
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
        return usable[0]
    names = ", ".join(b.name for b in usable)
    for backend in BACKENDS:
        if backend.name == explicit:
            reason = backend.refusal(device, dtype)
            if reason is None:
                return backend
            raise UserError(f"The backend '{explicit}' cannot be used here: {reason}; use auto or {names}.")
    raise UserError(f"The backend '{explicit}' is not part of this version; use auto or {names}.")
