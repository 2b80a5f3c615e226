"""CoOp's own ``train.py`` with the fast engine: ``import cocoop_fast.integrations.dassl``, or call :func:`patch_dassl`.

Or, without a change to any file, in the CoOp repository::

    python -m cocoop_fast.integrations.dassl train.py --trainer CoCoOp ...

Trainers are replaced when Dassl looks them up, so it does not matter whether the repository has registered them by then:
those that compute what the reference's CoCoOp and CoOp compute by ours, others in their text features alone. Each says so
in the log. Configuration, data, training loop, log, evaluation and checkpoints stay Dassl's and the repository's.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cocoop_fast.errors import UserError
from cocoop_fast.integrations.dassl_repairs import repair_dassl
from cocoop_fast.integrations.dassl_trainer import fast_trainer

_PATCHED = "_cocoop_fast"


def patch_dassl() -> tuple[str, ...]:
    """Let Dassl build fast trainers, and repair what keeps it from running right. Doing it twice changes nothing.

    Returns:
        What was repaired, one line each. What is replaced, a trainer says itself when it is built.

    Raises:
        UserError: Dassl cannot be imported.
    """
    lines: list[str] = []
    for package in _packages():
        try:
            registry = importlib.import_module(f"{package}.engine").TRAINER_REGISTRY
        except ImportError as error:
            raise UserError(
                f"Dassl cannot be imported ({error}); install it as the CoOp repository says, and use the same Python."
            ) from error
        if not hasattr(registry, _PATCHED):
            setattr(registry, _PATCHED, True)
            registry.get = _looking_at(registry.get)
            lines += repair_dassl(package)
    return tuple(dict.fromkeys(lines))


def _looking_at(get: Callable[[str], type]) -> Callable[[str], type]:
    return lambda name: fast_trainer(name, get(name))


def _packages() -> list[str]:
    """The names under which Dassl is imported, or lies beside the script: forks bring it along under names of their own."""
    registries = [
        vars(module).get("TRAINER_REGISTRY") for module in list(sys.modules.values()) if module is not None
    ]
    imported = [
        type(registry).__module__.partition(".")[0] for registry in registries if registry is not None
    ]
    schedulers = Path(sys.path[0] or ".").glob("*/optim/lr_scheduler.py")
    beside = sorted(path.parents[1].name for path in schedulers if list(path.parents[1].glob("engine*")))
    return list(dict.fromkeys([*imported, *beside])) or ["dassl"]


def main(arguments: Sequence[str]) -> None:
    """Run a script, as ``python SCRIPT ARGUMENTS`` would."""
    if not arguments:
        print("usage: python -m cocoop_fast.integrations.dassl SCRIPT [ARGUMENTS]", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [*arguments]
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    for line in patch_dassl():
        print(f"cocoop_fast: {line}", file=sys.stderr)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
else:
    patch_dassl()
