"""The miniature of CoOp's repository and of Dassl (tests/integrations/coop_stand_in), run in this process."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS / "integrations/coop_stand_in"
FOREIGN = ("dassl", "trainers", "cocoop_fast.integrations.dassl")


def forget():
    for name in list(sys.modules):
        if name in FOREIGN or name.startswith(("dassl.", "trainers.")):
            del sys.modules[name]


def run(output, *pairs, trainer="CoCoOp", options=(), printed=None):
    """train.py in this process, with whatever has been patched. Returns what it printed."""
    printed = printed or io.StringIO()
    arguments = ["--trainer", trainer, "--seed", "1", "--config-file", str(REPOSITORY / "config.yaml")]
    argv = sys.argv
    sys.argv = ["train.py", *arguments, "--output-dir", str(output), *options, *pairs]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
    finally:
        sys.argv = argv
    return printed.getvalue()


def patch():
    import cocoop_fast.integrations.dassl  # noqa: F401


def steps(log):
    """(learning rate, loss) of each step, at full precision."""
    return [(float(rate), float(loss)) for rate, loss in re.findall(r"^step lr (\S+) loss (\S+)$", log, re.M)]
