"""From costs to epochs, memory and the largest batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.engine.pieces import ROWS_PER_INFERENCE_PASS
from cocoop_fast.measure.cost import GpuLayout, TreeCost
from cocoop_fast.measure.devices import EAGER_LAUNCH_SECONDS, find_gpu
from cocoop_fast.measure.predict import (
    MOST_IMAGES,
    Model,
    Schedule,
    Setting,
    largest_batch,
    predict_dense,
    predict_tree,
    seconds_of_pass,
)
from cocoop_fast.measure.problem import imagenet_names, random_text_tower
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree

PROMPTS = tokenize_prompts(imagenet_names(100), ctx_init="a photo of a")
WEIGHTS = FrozenCLIP(random_text_tower()).text_weights().to(torch.device("meta"), torch.float16)
SETTING = Setting(
    model=Model("ViT-B-16", WEIGHTS, parameters=150_000_000, image_flops=35e9, image_launches=100),
    tree=ClassTree(PROMPTS.tokens, PROMPTS.n_ctx),
    batch=1,
    device=find_gpu("A100").at("fp16"),
    layout=GpuLayout(),
)
SCHEDULE = Schedule(train_images=1600, epochs=10, test_images=10_000)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 1000, 1023, 1024, 1025])
def test_the_largest_batch_is_the_largest(limit):
    assert largest_batch(lambda batch: batch <= limit) == limit


def test_a_batch_without_bounds_is_not_looked_for_for_ever():
    assert largest_batch(lambda batch: True) >= MOST_IMAGES // 2


@pytest.mark.parametrize("predict", [predict_tree, predict_dense])
@pytest.mark.parametrize("budget", [10**9, 8 * 10**9, 80 * 10**9])
def test_the_largest_batch_fits_and_one_more_does_not(predict, budget):
    largest = predict(SETTING, SCHEDULE, budget).largest_batch
    for batch, fits in ((largest, True), (largest + 1, False)):
        if batch:
            found = predict(replace(SETTING, batch=batch), SCHEDULE, budget)
            assert (found.memory.total <= budget) == found.fits == fits


def test_the_sums_add_up():
    found = predict_tree(replace(SETTING, batch=32, process_bytes=7), SCHEDULE, 10**10)
    step = TreeCost(WEIGHTS, SETTING.tree, GpuLayout()).step(32)
    assert found.step == step
    assert found.step_seconds == seconds_of_pass(step, SETTING.device)
    assert found.epoch_seconds == pytest.approx(50 * (found.step_seconds + found.image_seconds))
    assert found.training_seconds == pytest.approx(10 * found.epoch_seconds)
    memory = found.memory
    assert memory.model == 2 * 150_000_000
    assert memory.total == memory.model + memory.beyond_model
    assert memory.beyond_model == memory.class_list + step.activation_bytes + 7


def test_what_no_graph_replays_costs_the_host_its_launches():
    """Evaluation, and the image encoder in training."""
    found = predict_tree(SETTING, SCHEDULE, 10**10)
    cost = TreeCost(WEIGHTS, SETTING.tree, GpuLayout())
    group = ROWS_PER_INFERENCE_PASS["cuda"] // SETTING.tree.rows
    launches = cost.inference(group).launches + SETTING.model.image_launches
    passes = SCHEDULE.test_images / group
    assert found.evaluation_seconds > passes * launches * EAGER_LAUNCH_SECONDS
    assert found.image_seconds > SETTING.model.image_launches * EAGER_LAUNCH_SECONDS
    assert found.step_seconds < found.step.launches * EAGER_LAUNCH_SECONDS  # replayed


def test_an_incomplete_batch_is_dropped_as_in_the_reference():
    setting = replace(SETTING, batch=1000)
    one, few = (predict_tree(setting, Schedule(n, 1, 1), 10**12) for n in (1600, 10))
    assert one.epoch_seconds == few.epoch_seconds == pytest.approx(one.step_seconds + one.image_seconds)


def test_packed_weights_are_counted_where_there_are_any():
    class Packing(GpuLayout):
        def packed_bytes(self, columns, inner):
            return 4 * columns * inner

    plain, packed = (
        predict_tree(replace(SETTING, layout=layout), SCHEDULE, 10**10).memory.class_list
        for layout in (GpuLayout(), Packing())
    )
    linear = 11 * 12 * 512 * 512 - 3 * 512 * 512  # all but the last layer, and layer 0's query, key and value
    assert packed - plain == 4 * linear


def test_the_tree_is_cheaper_than_the_reference_in_every_respect():
    tree, dense = predict_tree(SETTING, SCHEDULE, 10**10), predict_dense(SETTING, SCHEDULE, 10**10)
    assert tree.step_seconds < dense.step_seconds
    assert tree.evaluation_seconds < dense.evaluation_seconds
    assert tree.memory.total < dense.memory.total
    assert tree.largest_batch > dense.largest_batch
    assert tree.step.bytes < dense.step.bytes and tree.step.launches < dense.step.launches
