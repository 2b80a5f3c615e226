"""What a page predicts is what the planner counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny_runs import loaded_tiny_clip, tiny_config

from cocoop_fast.methods import build_model
from cocoop_fast.prompts.tree import ClassTree
from cocoop_fast.report import cost
from cocoop_fast.report.history import History
from cocoop_fast.report.page import cost_rows

NAMES = ("cat", "red fox", "red panda")


@pytest.fixture
def estimate(tmp_path):
    def estimate(**fields):
        clip, config = loaded_tiny_clip(), tiny_config(tmp_path, **fields)
        history = History({"epochs": 2, "steps_per_epoch": 10}, (), (), None, None)
        run = SimpleNamespace(config=config, history=history)
        model = build_model(config.prompt, NAMES, clip)
        inspection = SimpleNamespace(run=run, clip=clip, model=model)
        return cost.estimate(inspection, measure=lambda *_: None), model

    return estimate


def test_rows_are_those_of_the_tree_and_of_the_dense_prompts(estimate):
    found, model = estimate(optim__batch_size=3)
    tree = ClassTree.from_layout(model.prompt_learner.layout)
    assert found.tree.step.rows == 3 * (4 + len(tree))  # context, nodes
    assert found.dense.step.rows == 3 * 3 * 77
    assert found.steps == 20
    (_, ours, theirs, ratio), *_ = cost_rows(found)
    assert (ours, theirs) == (f"{3 * (4 + len(tree))}", "693")
    assert ratio == f"{693 / (12 + 3 * len(tree)):.3g} ×"


def test_a_context_for_all_images_costs_one_pass_a_step(estimate):
    found, model = estimate(prompt__method="coop", optim__batch_size=32)
    assert found.tree.step.rows == 4 + len(ClassTree.from_layout(model.prompt_learner.layout))


def test_no_time_without_a_machine_s_speed(estimate):
    found, _ = estimate()
    assert found.device is None
    assert not any("Time" in name or "nan" in "".join(row) for name, *row in cost_rows(found))


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt__method": "zeroshot"},
        {"prompt__method": "coop", "prompt__class_position": "front"},
        {"prompt__method": "coop", "prompt__csc": True, "prompt__ctx_init": ""},
    ],
)
def test_what_the_model_does_not_cover_is_not_predicted(estimate, fields):
    assert estimate(**fields)[0] is None
