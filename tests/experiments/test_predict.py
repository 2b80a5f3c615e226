"""Prediction: from files and from memory, over the run's classes or new ones."""

from __future__ import annotations

import dataclasses
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from stub_cuda import GPU_1, FakeGraphs, stub_of, untouched
from tiny_runs import loaded_tiny_clip, tiny_config, use_tiny_clip, write_images

from cocoop_fast import UserError, cli
from cocoop_fast.config import ModelConfig, PromptConfig
from cocoop_fast.engine.graphs import WARM_UP_STEPS, CudaGraphs
from cocoop_fast.evaluation import recorded
from cocoop_fast.evaluation.evaluate import test_transform
from cocoop_fast.experiments import predict
from cocoop_fast.experiments.experiment import run
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.experiments.shared import recorder
from cocoop_fast.methods import build_model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        run(tiny_config(path, optim__lr=0.05))
    return path


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def test_files_and_images_give_the_same(run_dir, tmp_path):
    paths = write_images(tmp_path, 3)
    predictor = Predictor.from_run(run_dir)
    assert predictor.classnames == ("digit zero", "digit one", "digit two", "digit three", "digit four")
    answers = predictor.predict([paths[0], str(paths[1]), Image.open(paths[2])], topk=5)
    assert answers == predictor.predict([Image.open(path) for path in paths], topk=5)
    for answer in answers:
        probabilities = [probability for _, probability in answer]
        assert sorted(probabilities, reverse=True) == probabilities
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {name for name, _ in answer} == set(predictor.classnames)


def test_it_is_the_trained_model(run_dir, tmp_path):
    [path] = write_images(tmp_path, 1)
    predictor = Predictor.from_run(run_dir)
    view = test_transform(predictor.clip)(Image.open(path))[None]
    with torch.no_grad():
        expected = predictor.model(view).softmax(dim=1)[0]
    [answer] = predictor.predict([path])
    for name, probability in answer:
        assert probability == pytest.approx(float(expected[predictor.classnames.index(name)]), rel=1e-4)
    trained = torch.load(
        max((run_dir / "checkpoints").glob("*.pt")), weights_only=True
    )["parameters"]["ctx"]  # fmt: skip
    assert torch.equal(predictor.model.prompt_learner.ctx, trained)


def test_new_class_names(run_dir, tmp_path):
    [path] = write_images(tmp_path, 1)
    predictor = Predictor.from_run(run_dir, classnames=["red fox", "polar bear", "wolf"])
    [answer] = predictor.predict([path], topk=2)
    assert len(answer) == 2 and {name for name, _ in answer} < {"red fox", "polar bear", "wolf"}
    [answer] = predictor.predict([path], topk=50)
    assert len(answer) == 3
    assert predictor.predict([]) == []


def test_who_asks_a_base_run_hears_of_the_other_classes(run_dir, tmp_path, capsys):
    note = Predictor.from_run(run_dir).note
    assert note is not None
    assert "the 5 classes that the run was trained on" in note
    assert "5 more (digit five, digit six, digit seven, digit eight, digit nine), and --classes names" in note
    assert Predictor.from_run(run_dir, classnames=["red fox", "wolf"]).note is None

    [path] = write_images(tmp_path, 1)
    assert cli.run(["predict", str(path), "--run", str(run_dir), "--json"]) == 0
    assert note in capsys.readouterr().err
    run(tiny_config(tmp_path / "all", data__subset="all", optim__epochs=1))
    assert Predictor.from_run(tmp_path / "all").note is None


def test_more_images_than_a_batch(run_dir, tmp_path):
    paths = write_images(tmp_path, 5)
    whole = Predictor.from_run(run_dir)
    in_parts = Predictor(whole.model, whole.clip, whole.classnames, batch_size=2)
    for one, other in zip(in_parts.predict(paths), whole.predict(paths), strict=True):
        assert [name for name, _ in one] == [name for name, _ in other]


def test_bad_input(run_dir, tmp_path):
    predictor = Predictor.from_run(run_dir)
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x.png cannot be read: not an image"):
        predictor.predict([tmp_path / "x.png"])
    with pytest.raises(UserError, match=r"none.png cannot be read: missing"):
        predictor.predict([tmp_path / "none.png"])
    with pytest.raises(UserError, match=r"cannot be read: a directory"):
        predictor.predict([tmp_path])
    with pytest.raises(UserError, match=r"`topk` is 0"):
        predictor.predict([], topk=0)
    with pytest.raises(UserError, match=r"is not a run directory"):
        Predictor.from_run(tmp_path)
    with pytest.raises(UserError):
        Predictor.from_run(run_dir, classnames=[])


# Batches recorded as a CUDA graph, by a recorder that runs on a CPU


@pytest.fixture
def soon(monkeypatch):
    """Recorded is what has come four times."""
    monkeypatch.setattr(recorded, "WORTH_RECORDING", WARM_UP_STEPS)


def predictors(**how):
    """One that records, and one that does not, and images."""
    torch.manual_seed(0)
    clip, names = loaded_tiny_clip(), ["cat", "dog", "red fox"]
    model = build_model(PromptConfig(), names, clip)
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(9)]
    return Predictor(model, clip, names, 2, **how), Predictor(model, clip, names, 2), images


def test_replays_give_the_same(soon):
    """All batches of two but the first few, and none of the one that is smaller; in inference mode or out of it."""
    graphs = FakeGraphs()
    recording, plain, images = predictors(record=graphs, on_message=pytest.fail)
    with torch.inference_mode():
        answers = recording.predict(images)
    assert answers == plain.predict(images) and (graphs.recorded, graphs.replayed) == (1, 1)
    assert recording.predict(images[::-1]) == plain.predict(images[::-1])
    assert (graphs.recorded, graphs.replayed) == (1, 5)
    assert pickle.loads(pickle.dumps(recording)).predict(images) == answers


def test_nothing_learned_is_not_recorded_and_few_batches_are_not():
    few, plain, images = predictors(record=lambda work: pytest.fail("it was recorded"))
    assert few.predict(images) == plain.predict(images)
    model = build_model(PromptConfig(method="zeroshot"), list(plain.classnames), plain.clip)
    assert Predictor(model, plain.clip, plain.classnames, record=FakeGraphs())._recorded is None


@pytest.mark.parametrize("fault", ["begin_fails", "end_fails", "memory"])
def test_a_recording_that_fails_leaves_predictions_right_and_is_said_once(soon, monkeypatch, fault):
    stub, messages = stub_of(monkeypatch, **({} if fault == "memory" else {fault: True})), []
    recording, plain, images = predictors(record=CudaGraphs(GPU_1), on_message=messages.append)
    if fault == "memory":
        encode, of_plain = type(recording.model.tree_encoder).forward, plain.predict(images)

        def out_of_memory(self, *contexts):
            if stub.capturing:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return encode(self, *contexts)

        monkeypatch.setattr(type(recording.model.tree_encoder), "forward", out_of_memory)
        assert recording.predict(images) == of_plain
    for _ in range(2):
        assert recording.predict(images) == plain.predict(images)
    [message] = messages
    assert (
        message.startswith("Batches of a prediction are not recorded as CUDA graphs") and "CUDA " in message
    )
    assert untouched(stub)


def test_graphs_give_their_memory_back_where_the_rest_has_too_little(soon):
    graphs = FakeGraphs()
    recording, _, images = predictors(record=graphs)
    answers, replayed = recording.predict(images), graphs.replayed
    encoder, failures = recording.model.image_encoder, [torch.OutOfMemoryError("CUDA out of memory.")]
    encoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(failures.pop()) if failures else None)
    assert recording.predict(images) == answers and not failures
    assert graphs.replayed == replayed and graphs.recorded == 1
    failures.append(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing left to give back
        recording.predict(images)


def _other_classes(model):
    model.set_classnames(["wolf", "dog", "polar bear"])


def _other_parameter(model):
    model.prompt_learner.ctx = torch.nn.Parameter(-model.prompt_learner.ctx.detach())


def _other_weight(model):
    model.tree_encoder.frozen._text.ln_final.weight.data.mul_(1.5)


def _other_dtype(model):
    model.double()


def _averaged(model):
    model.average_with(lambda names: torch.randn(3, 64), ["cat", "dog", "red fox"])


@pytest.mark.parametrize("change", [_other_classes, _other_parameter, _other_weight, _other_dtype, _averaged])
def test_a_graph_of_the_model_as_it_was_is_not_replayed(soon, change):
    graphs = FakeGraphs()
    recording, plain, images = predictors(record=graphs)
    recording.predict(images)
    replayed = graphs.replayed
    change(recording.model)
    changed = recording.predict(images[:2])
    assert graphs.replayed == replayed and changed == plain.predict(images[:2])
    recording.predict(images[:8])
    assert graphs.recorded == 2
    with torch.no_grad():  # the same memory: it is read anew
        recording.model.prompt_learner.ctx.mul_(-2)
    replayed = graphs.replayed
    assert recording.predict(images[:2]) == plain.predict(images[:2]) and graphs.replayed == replayed + 1


def test_threads_wait_for_each_other(soon):
    """What a replay has written is read before the next one writes."""
    recording, plain, _ = predictors(record=FakeGraphs())
    features = torch.randn(12, 1, 64)
    with torch.no_grad():
        expected = [plain.model.forward_features(one) for one in features]

    def slowly(logits):
        time.sleep(0.003)
        return logits.clone()

    def ask(one):
        with torch.no_grad():
            return recording._recorded(one, slowly)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, features))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    features[-1, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite values in row 0"):
        ask(features[-1])


def test_runs_record_on_a_gpu_unless_told_otherwise(run_dir, monkeypatch):
    on_gpu = dataclasses.replace(loaded_tiny_clip(), device=torch.device("cuda"))
    assert isinstance(recorder(on_gpu, ModelConfig()), CudaGraphs)
    assert (
        recorder(on_gpu, ModelConfig(cuda_graph=False)) is recorder(loaded_tiny_clip(), ModelConfig()) is None
    )
    assert Predictor.from_run(run_dir)._recorded is None
    monkeypatch.setattr(predict, "recorder", lambda clip, config: FakeGraphs())
    assert Predictor.from_run(run_dir)._recorded is not None
