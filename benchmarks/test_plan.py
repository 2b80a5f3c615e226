"""`cocoop-fast plan` on the machine it runs on: the predicted seconds of a pass against passes that are really run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names, random_text_tower
from cocoop_fast.ops.extensions import CPP

TOOL = Path(__file__).parents[1] / "tools" / "check_plan.py"


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize(("classes", "batch"), [(100, 1), (20, 6)])
def test_prediction(benchmark: Any, classes: int, batch: int) -> None:
    """Within 25 %, which needs a quiet machine: another program's load can fall on either side."""
    spec = importlib.util.spec_from_file_location("check_plan", TOOL)  # tools/ is no package
    check_plan = sys.modules["check_plan"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check_plan)
    problem = build_problem(ProblemSpec(imagenet_names(classes), batch=batch), random_text_tower(layers=4))
    found = benchmark.pedantic(check_plan.check_seconds, (problem,), rounds=1)
    for name, (predicted, measured) in found.items():
        benchmark.extra_info[f"{name}: predicted / measured"] = round(predicted / measured, 3)
        assert predicted == pytest.approx(measured, rel=0.25)
