"""CoOp's own ``train.py`` with the fast engine: ``import cocoop_fast.integrations.dassl``, or call :func:`patch_dassl`.

Or, without a change to any file, in the CoOp repository::

    python -m cocoop_fast.integrations.dassl train.py --trainer CoCoOp ...

The trainers CoCoOp and CoOp are replaced when Dassl looks them up, so it does not matter whether the repository has
registered them by then. Configuration, data, training loop, log, evaluation and checkpoints stay Dassl's and CoOp's.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cocoop_fast.errors import UserError
from cocoop_fast.integrations.dassl_repairs import repair_dassl
from cocoop_fast.integrations.dassl_trainer import FAST_TRAINERS, fast_trainer

_PATCHED = "_cocoop_fast"


def patch_dassl() -> tuple[str, ...]:
    """Let Dassl build fast trainers, and repair what keeps it from running right. Doing it twice changes nothing.

    Returns:
        What was replaced or repaired, one line each.

    Raises:
        UserError: Dassl cannot be imported.
    """
    try:
        from dassl.engine import TRAINER_REGISTRY
    except ImportError as error:
        raise UserError(
            f"Dassl cannot be imported ({error}); install it as the CoOp repository says, and use the same Python."
        ) from error
    if hasattr(TRAINER_REGISTRY, _PATCHED):
        return ()
    setattr(TRAINER_REGISTRY, _PATCHED, True)
    TRAINER_REGISTRY.get = _faster(TRAINER_REGISTRY.get)
    return (*(f"trainer {name}: computed by cocoop_fast" for name in FAST_TRAINERS), *repair_dassl())


def _faster(get: Callable[[str], Any]) -> Callable[[str], Any]:
    """A registry's lookup that finds our trainer where it would find one of those we replace."""
    made: dict[type, type] = {}

    def lookup(name: str) -> Any:
        found = get(name)
        if name not in FAST_TRAINERS:
            return found
        if found not in made:
            made[found] = fast_trainer(name, found)
        return made[found]

    return lookup


def main() -> None:
    """Run the script that the command line names, as ``python SCRIPT ARGUMENTS`` would."""
    if len(sys.argv) < 2:
        print("usage: python -m cocoop_fast.integrations.dassl SCRIPT [ARGUMENTS]", file=sys.stderr)
        raise SystemExit(2)
    script = Path(sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    for line in patch_dassl():
        print(f"cocoop_fast: {line}", file=sys.stderr)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
else:
    patch_dassl()
