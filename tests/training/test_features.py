"""Image features ahead of the steps: the same bits at any distance, and reading spread over the steps."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from tiny_training import fast_model, make_batches
from torch import nn

from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.training.features import ImageFeatures

CPU = torch.device("cpu")


def features_of(batch_size, groups_ahead, *, images=23, first_batch=0, precision="fp32", thread=True):
    torch.manual_seed(0)
    model = fast_model()
    batches = make_batches(images, batch_size)
    source = ImageFeatures(model, batches, precision, CPU, groups_ahead=groups_ahead, thread=thread)
    return list(source.epoch(1, first_batch)), batches, model


@pytest.mark.parametrize("batch_size", [1, 3, 16, 40])
@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("thread", [True, False])
def test_looking_ahead_changes_no_bit(batch_size, precision, thread):
    direct, batches, _ = features_of(batch_size, 0, precision=precision)
    assert len(direct) == len(batches)
    for groups_ahead in (1, 2, 5):
        ahead, _, _ = features_of(batch_size, groups_ahead, precision=precision, thread=thread)
        for (batch, features, label), (wanted, expected, _) in zip(ahead, direct, strict=True):
            assert batch.sample.equal(wanted.sample) and label.equal(wanted.label)
            assert features.equal(expected)


@pytest.mark.parametrize("groups_ahead", [0, 2])
@pytest.mark.parametrize("first_batch", [1, 15, 16, 22])
def test_from_any_batch_on(groups_ahead, first_batch):
    whole, _, _ = features_of(1, groups_ahead)
    rest, _, _ = features_of(1, groups_ahead, first_batch=first_batch)
    assert len(rest) == 23 - first_batch
    for one, other in zip(rest, whole[first_batch:], strict=True):
        assert one.features.equal(other.features) and one.batch.sample.equal(other.batch.sample)


class Diary(nn.Module):
    """An image encoder that writes down when it runs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, image):
        DIARY.append(f"encode {len(image)}")
        return self.encoder(image)


class DiaryBatches(TrainBatches):
    def epoch(self, *position):
        for batch in super().epoch(*position):
            DIARY.append("read")
            yield batch


DIARY = []  # what is read and encoded, in the order in which it happens


def source_of_128_images(**ahead):
    """Two by two, in groups of 8 batches."""
    DIARY.clear()
    model = fast_model()
    model.image_encoder = Diary(model.image_encoder)
    batches = DiaryBatches(**vars(make_batches(128, 2)))
    return ImageFeatures(model, batches, "fp32", CPU, groups_ahead=2, **ahead)


def test_on_a_gpu_the_encoder_is_a_group_ahead_and_images_are_read_between_the_steps():
    """In the caller's thread; there a stream of its own lets the encoder overlap with the steps."""
    for number, _ in enumerate(source_of_128_images(thread=False).epoch(1)):
        DIARY.append(f"step {number}")
    encoded_before = {
        number: DIARY[: DIARY.index(f"step {number}")].count("encode 16") for number in range(64)
    }
    assert [encoded_before[number] for number in (0, 7, 8, 15, 16, 63)] == [2, 3, 3, 4, 4, 8]
    steps = [entry for entry in DIARY if entry != "encode 16"]
    assert steps[:17] == ["read"] * 17 and steps[17:21] == ["step 0", "read", "step 1", "read"]


def test_on_a_cpu_a_thread_reads_while_a_step_runs():
    epoch = source_of_128_images().epoch(1)
    next(epoch)
    # The first step is not over, and two more groups are read.
    wait_for(lambda: DIARY.count("read") >= 8 + 16)
    time.sleep(0.05)
    assert DIARY.count("read") <= 8 + 16 + 1  # but not the whole epoch
    assert DIARY.count("encode 16") == 1
    epoch.close()
    assert not [thread for thread in threading.enumerate() if "look-ahead" in thread.name]


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
