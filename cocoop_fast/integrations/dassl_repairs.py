"""What keeps Dassl from running on a current PyTorch, or makes it go wrong there. Each is repaired only where it is found.

1. Its warm-up scheduler passes ``verbose`` to torch's, which no longer takes it: no trainer can be built.
2. That scheduler saves the one that follows it as an object, with a copy of the optimizer. After a resume the copy's
   learning rate moves and the run's own does not. (And what holds objects, a safe loader refuses.)
3. ``load_checkpoint`` lets ``torch.load`` run whatever code a file names, or fails where that is refused by default.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from cocoop_fast.files.inert_pickle import InertObject
from cocoop_fast.files.torch_archive import read_archive

# Where a scheduler stands. Everything else it has comes from the configuration.
_POSITION = ("last_epoch", "_step_count", "_last_lr")


def repair_dassl(package: str = "dassl") -> tuple[str, ...]:
    """Repair what needs it in the Dassl that is imported under a name; one line for each repair."""
    repairs = (repair_constructor, repair_resume, read_safely)
    return tuple(line for repair in repairs if (line := repair(package)) is not None)


# -- the warm-up scheduler ---------------------------------------------------------------------------------------


def _schedulers(package: str) -> Any:
    return importlib.import_module(f"{package}.optim.lr_scheduler")


def _warmup(package: str) -> Any:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return _schedulers(package).ConstantWarmupScheduler(optimizer, CosineAnnealingLR(optimizer, 1), 1, 0.1)


def repair_constructor(package: str = "dassl") -> str | None:
    """Repair 1 in this module's list, if it is needed.

    Returns:
        A line for the user; None if there was nothing to repair. So do the others.
    """
    try:
        _warmup(package)
    except TypeError:
        _schedulers(package)._BaseWarmupScheduler.__init__ = _init_warmup
        return "warm-up scheduler: built without `verbose`, which this PyTorch does not take"
    return None


def repair_resume(package: str = "dassl") -> str | None:
    """Repair 2, if it is needed. The scheduler has to be one that can be built."""
    if not any(isinstance(value, LRScheduler) for value in _warmup(package).state_dict().values()):
        return None
    base = _schedulers(package)._BaseWarmupScheduler
    base.state_dict, base.load_state_dict = _warmup_state, _load_warmup_state
    return "resume: the learning rate goes on along its schedule"


def _init_warmup(
    self: Any, optimizer: Any, successor: Any, warmup_epoch: int, last_epoch: int = -1, verbose: bool = False
) -> None:
    self.successor, self.warmup_epoch = successor, warmup_epoch
    LRScheduler.__init__(self, optimizer, last_epoch)


def _warmup_state(self: Any) -> dict[str, Any]:
    return {**LRScheduler.state_dict(self), "successor": self.successor.state_dict()}


def _load_warmup_state(self: Any, state: Mapping[str, Any]) -> None:
    """From a state of ours, or from one whose successor was an object.

    The run's learning rate is set, too: a file that was written after a resume has a frozen one in its optimizer.
    """
    _set_position(self, state)
    successor = state.get("successor", {})
    if isinstance(successor, InertObject):
        successor = successor.state
    elif not isinstance(successor, Mapping):
        successor = vars(successor)
    _set_position(self.successor, successor)
    for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
        group["lr"] = rate


def _set_position(scheduler: Any, state: Mapping[str, Any]) -> None:
    vars(scheduler).update({name: state[name] for name in _POSITION if name in state})


# -- reading files -----------------------------------------------------------------------------------------------


def read_safely(package: str = "dassl") -> str:
    """Repair 3, which is always needed."""
    dassls_own = importlib.import_module(f"{package}.utils.torchtools").load_checkpoint

    def load_checkpoint(fpath: Any) -> Any:
        """A checkpoint, on the CPU: whoever loads a state dict from it moves it."""
        if fpath is None or not Path(fpath).is_file():
            return dassls_own(fpath)  # for its own messages
        return read_archive(Path(fpath))

    _replace_everywhere(dassls_own, load_checkpoint)
    return "load_checkpoint: files are read without running code in them"


def _replace_everywhere(old: Any, new: Any) -> None:
    """In every module that has imported a function by name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
