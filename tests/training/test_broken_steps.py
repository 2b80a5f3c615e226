"""Steps that cannot be done as they are: numbers that are not finite, images that cannot be read, too little memory."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_close
from tiny_training import (
    Recorder,
    broken,
    fast_model,
    large_model,
    make_batches,
    recipe,
    run_out_of_memory,
)

from cocoop_fast import UserError
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.training.features import EncodedBatch
from cocoop_fast.training.trainer import Trainer


def trainer_of(model=None, *, images=12, batch_size=1, observer=None, features=None, **optim):
    model, batches = model or fast_model(), make_batches(images, batch_size)
    return Trainer(model, batches, recipe(**optim), observer=observer, features=features)


# Numbers


@pytest.mark.parametrize(
    ("where", "what"),
    [("loss", "The loss became nan"), ("gradient", r"The gradient became nan, although the loss is [\d.]+,")],
)
def test_a_number_that_is_not_finite_names_step_sample_and_remedy(where, what):
    class Watching(Recorder):
        def on_step(self, info):
            before.append([p.detach().clone() for p in trainer.model.prompt_learner.parameters()])

    before, saved = [], []
    trainer = trainer_of(broken(fast_model(), {15}, where), epochs=2, observer=Watching())
    sample = list(trainer.batches.epoch(2))[2].sample.item()
    with pytest.raises(
        UserError,
        match=rf"{what} at step 15 \(epoch 2\), on {sample}; try a lower learning rate, or .*--on-nonfinite skip",
    ) as error:
        trainer.fit(save=lambda: saved.append(trainer.step))
    assert error.value.exit_status == 1 and saved == [12] and trainer.step == 14
    for ours, theirs in zip(trainer.model.prompt_learner.parameters(), before[-1], strict=True):
        assert torch.equal(ours, theirs)  # the broken step left no trace


class Without:
    """The batches of a source but some 1-based ones."""

    def __init__(self, source, left_out):
        self.source, self.left_out = source, left_out

    def epoch(self, *position):
        for number, encoded in enumerate(self.source.epoch(*position), 1):
            if number not in self.left_out:
                yield encoded


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_steps_change_nothing_and_are_counted(where):
    recorder, left_out = Recorder(), {2, 3, 12}
    model = broken(fast_model(), left_out, where, math.inf)
    trainer = trainer_of(model, epochs=1, on_nonfinite="skip", observer=recorder)
    trainer.fit()
    assert trainer.step == 12 and [info.step for info in recorder.steps] == [1, *range(4, 12)]
    assert recorder.epochs[0].skipped_steps == trainer.scaler.skipped == 3
    assert math.isfinite(recorder.epochs[0].loss)
    heard = recorder.messages
    assert len(heard) == 3 and "at step 2 (epoch 1), on " in heard[0]
    assert heard[0].endswith("the step is skipped.")
    # The same as a trainer that never meets those samples.
    other = trainer_of(images=9, epochs=1, features=Without(trainer.features, left_out))
    other.fit()
    for ours, theirs in zip(
        model.prompt_learner.parameters(), other.model.prompt_learner.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_run_without_finite_steps_gives_up():
    trainer = trainer_of(broken(fast_model(), range(5, 99)), epochs=2, on_nonfinite="skip")
    with pytest.raises(UserError, match=r"at step 14 .* and so it was in the 9 steps before; try a lower"):
        trainer.fit()


def test_an_image_without_finite_features_is_named():
    batches = make_batches(12, 4)
    bad = list(batches.epoch(1))[1].sample[2].item()

    class WithABadOne:
        def epoch(self, epoch, first_batch=0):
            for batch in batches.epoch(epoch, first_batch):
                features = torch.ones(4, 64)
                features[batch.sample == bad, 5] = math.nan
                yield EncodedBatch(batch, features, batch.label)

    trainer = trainer_of(batch_size=4, epochs=1, features=WithABadOne())
    with pytest.raises(
        UserError, match=rf"image features are NaN or infinite at step 2 \(epoch 1\), on {bad};"
    ):
        trainer.fit()


# Images


def test_what_was_learned_is_saved_before_an_unreadable_image_ends_the_run():
    class Batches(TrainBatches):
        def epoch(self, *position):
            for number, batch in enumerate(super().epoch(*position)):
                if number == 20:
                    raise UserError("gone")
                yield batch

    saved, batches = [], Batches(**vars(make_batches(40, 1)))
    trainer = Trainer(fast_model(), batches, recipe())
    with pytest.raises(UserError, match="gone"):
        trainer.fit(save=lambda: saved.append(trainer.step))
    assert saved == [trainer.step] and 0 < trainer.step <= 20


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=["host", "gpu", "torch on the host"],
)
def test_a_step_without_memory_is_repeated_in_smaller_pieces(monkeypatch, error):
    parameters = []
    for times in (0, 2):
        observer = Recorder()
        trainer = Trainer(large_model(), make_batches(24, 4), recipe(epochs=1), observer=observer)
        run_out_of_memory(monkeypatch, trainer.model, error, times)
        trainer.fit()
        monkeypatch.undo()
        assert [info.step for info in observer.steps] == list(range(1, 7))
        assert len(observer.messages) == (1 if times else 0)
        parameters.append([p.detach() for p in trainer.model.prompt_learner.parameters()])
    assert "used up at step 1. It is repeated" in observer.messages[0]
    encoder = trainer.model.tree_encoder
    pieces = encoder.memory.pieces(encoder.tower, 4, keeps=True)
    assert pieces.images == 1 and len(pieces.shards) > 1
    for ours, theirs in zip(*parameters, strict=True):
        assert_close(ours, theirs, 1e-6)


def test_a_step_that_never_fits_gives_up(monkeypatch):
    trainer = Trainer(fast_model(), make_batches(24, 4), recipe(epochs=1))
    run_out_of_memory(monkeypatch, trainer.model, MemoryError(), 10**6)
    with pytest.raises(
        UserError, match=r"used up at step 1, however small .*use a smaller batch size"
    ) as error:
        trainer.fit()
    assert error.value.exit_status == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    trainer = Trainer(fast_model(), make_batches(4, 1), recipe(epochs=1))
    run_out_of_memory(monkeypatch, trainer.model, RuntimeError("shapes do not match"), 1)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.fit()
