"""Cells: what they train and test, where they go on after an interruption, and what is never done twice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny_protocols import folders, run_all, small_experiment
from tiny_runs import StopAfter, use_tiny_clip, write_images

from cocoop_fast import UserError
from cocoop_fast.config import DataConfig
from cocoop_fast.data import load_dataset
from cocoop_fast.evaluation.metrics import harmonic_mean
from cocoop_fast.experiments import material, shared
from cocoop_fast.experiments.experiment import evaluate_run, run
from cocoop_fast.protocols.cells import changed_cells, make_cells, refuse_changed
from cocoop_fast.protocols.table import make_table
from cocoop_fast.runs.directory import read_run
from cocoop_fast.training.observer import Observer


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


@pytest.fixture
def encoded(monkeypatch):
    """How many test images each call of the encoder got."""
    counts = []
    original = material.encode_test_images

    def counted(model, clip, dataset, **options):
        counts.append(len(dataset.test))
        return original(model, clip, dataset, **options)

    monkeypatch.setattr(material, "encode_test_images", counted)
    return counts


class Watcher(Observer):
    """What was trained, evaluated and said."""

    def __init__(self):
        self.trained, self.evaluated, self.messages, self.first_steps = [], [], [], []

    def on_message(self, text):
        self.messages.append(text)

    def on_run_start(self, info):
        self.trained.append((info.config.data.name, info.config.prompt.method, info.config.seed))
        self.first_steps.append(info.first_step)

    def on_evaluation_end(self, info):
        self.evaluated.append((info.method, info.subset))


def learned(cell):
    return read_run(cell.run_dir)[1].parameters


def test_base_to_new_is_what_train_gives(tmp_path):
    experiment = small_experiment(tmp_path, all_classes=True)
    outcomes = run_all(experiment)
    assert [str(o.cell) for o in outcomes] == [
        "digits, zeroshot, seed 1",
        "digits, zeroshot, seed 2",
        "digits, cocoop, seed 1",
        "digits, cocoop, seed 2",
    ]
    last = outcomes[-1]
    alone = run(replace(last.cell.config, output_dir=tmp_path / "alone"))
    assert (last.accuracy["base"], last.accuracy["new"]) == (alone.rows[0].base, alone.rows[0].new)
    assert last.accuracy["all"] == evaluate_run(tmp_path / "alone", subset="all")["all"].accuracy
    mine, theirs = learned(last.cell), read_run(tmp_path / "alone")[1].parameters
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    [h] = [e for e in make_table(experiment, outcomes) if (e.method, e.metric) == ("cocoop", "h")]
    assert h.seeds[2] == harmonic_mean(last.accuracy["base"], last.accuracy["new"])


def test_logs_of_a_cell(tmp_path):
    experiment = small_experiment(tmp_path, all_classes=True, methods=("cocoop",), seeds=(1,))
    [outcome] = run_all(experiment)
    folder = outcome.cell.run_dir
    assert folder == tmp_path / "out" / "digits" / "cocoop" / "seed1"
    for name in ("log.txt", "test_new/log.txt", "test_all/log.txt"):
        assert f"* accuracy: {outcome.accuracy[{'l': 'base', 'test_new/l': 'new', 'test_all/l': 'all'}[name[:-6]]]:.1f}%" in (folder / name).read_text()  # fmt: skip
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = {e["subset"]: e["accuracy"] for e in events if e["event"] == "evaluation"}
    assert evaluations == outcome.accuracy


def test_test_images_are_encoded_once_for_all_methods_and_seeds(tmp_path, encoded):
    experiment = small_experiment(tmp_path, data=folders(tmp_path, "one", "two"), all_classes=True)
    outcomes = run_all(experiment)
    assert all(outcome.status == "finished" for outcome in outcomes) and len(outcomes) == 8
    sizes = [len(load_dataset(data).test) for data in experiment.data.values()]
    assert encoded == sizes
    run_all(replace(experiment, seeds=(3,)))
    assert encoded == sizes  # nor by a later process


def test_finished_cells_are_read(tmp_path, encoded):
    experiment = small_experiment(tmp_path, all_classes=True)
    first = run_all(experiment)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("checkpoints/*")}
    watcher = Watcher()
    second = run_all(experiment, watcher)
    assert [o.accuracy for o in second] == [o.accuracy for o in first]
    assert [o.train_seconds for o in second] == [o.train_seconds for o in first]
    assert watcher.trained == watcher.evaluated == [] and len(encoded) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_tests_are_added_without_training(tmp_path):
    experiment = small_experiment(tmp_path, methods=("cocoop",))
    run_all(experiment)
    watcher = Watcher()
    outcomes = run_all(replace(experiment, all_classes=True), watcher)
    assert watcher.trained == [] and watcher.evaluated == [("cocoop", "all")] * 2
    assert set(outcomes[0].accuracy) == {"base", "new", "all"}


@pytest.mark.parametrize("stop", [4, 10, 24, 40])
def test_an_interrupted_experiment_ends_as_an_uninterrupted_one(tmp_path, stop):
    """Four cells, of which two train 20 steps each: stopped inside the first, at its epoch's end, inside the second."""
    whole = small_experiment(tmp_path, root=tmp_path / "whole")
    expected = run_all(whole)
    parts = replace(whole, root=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        run_all(parts, StopAfter(stop))
    watcher = Watcher()
    outcomes = run_all(parts, watcher)
    trained = {4: [0, 0], 10: [0, 0], 24: [0], 40: [10]}[stop]
    assert watcher.first_steps == trained
    assert [o.accuracy for o in outcomes] == [o.accuracy for o in expected]
    for ours, theirs in zip(outcomes, expected, strict=True):
        mine, other = learned(ours.cell), learned(theirs.cell)
        assert all(torch.equal(mine[name], other[name]) for name in other)


def test_a_half_trained_cell_goes_on_from_its_checkpoint(tmp_path):
    experiment = small_experiment(tmp_path, methods=("cocoop",), seeds=(1,), config={"checkpoint_steps": 4})
    with pytest.raises(KeyboardInterrupt):
        run_all(experiment, StopAfter(15))
    watcher = Watcher()
    run_all(experiment, watcher)
    assert watcher.first_steps == [12]


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    data = folders(tmp_path, "one", "two")
    experiment = small_experiment(tmp_path, data=data, methods=("cocoop",))
    bad = load_dataset(data["one"]).test[0].source
    (tmp_path / "one" / str(bad)).write_text("no image")
    outcomes = run_all(experiment)
    assert [o.status for o in outcomes] == ["failed", "failed", "finished", "finished"]
    assert f"{bad} (not an image)" in outcomes[0].error
    write_images((tmp_path / "one" / str(bad)).parent, 9)
    assert [o.status for o in run_all(experiment)] == ["finished"] * 4


def test_an_unexpected_failure_is_one_cell_s_too(tmp_path, monkeypatch):
    original = shared.build_model

    def broken(prompt, *rest, **options):
        if prompt.method == "zeroshot":
            raise RuntimeError("out of luck")
        return original(prompt, *rest, **options)

    monkeypatch.setattr(shared, "build_model", broken)
    outcomes = run_all(small_experiment(tmp_path, seeds=(1,)))
    assert [(o.status, o.error) for o in outcomes] == [
        ("failed", "RuntimeError: out of luck"),
        ("finished", ""),
    ]


def test_bad_images_may_be_left_out(tmp_path, encoded):
    data = {name: replace(one, skip_bad_images=True) for name, one in folders(tmp_path, "one").items()}
    experiment = small_experiment(tmp_path, data=data, methods=("zeroshot",), all_classes=True)
    dataset = load_dataset(data["one"])
    bad = dataset.test[3].source
    (tmp_path / "one" / str(bad)).write_text("no image")
    watcher = Watcher()
    outcomes = run_all(experiment, watcher)
    assert encoded == [len(dataset.test) - 1]
    assert any("Left out 1 of" in text and str(bad) in text for text in watcher.messages)
    # What was left out is not forgotten by one who wants every image.
    strict = replace(experiment, data=folders(tmp_path, "one"), root=tmp_path / "strict")
    (tmp_path / "strict").mkdir()
    (tmp_path / "out" / "features").rename(tmp_path / "strict" / "features")
    failed = run_all(strict)
    assert [o.status for o in failed] == ["failed"] * 2 and "(not an image)" in failed[0].error
    assert [o.status for o in outcomes] == ["finished"] * 2


def test_a_damaged_feature_file_is_rebuilt(tmp_path, encoded):
    experiment = small_experiment(tmp_path, methods=("zeroshot",), seeds=(1,))
    [expected] = run_all(experiment)
    [file] = (tmp_path / "out" / "features").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    watcher = Watcher()
    outcomes = run_all(replace(experiment, seeds=(1, 2)), watcher)
    assert [o.accuracy for o in outcomes] == [expected.accuracy] * 2 and len(encoded) == 2
    assert len([text for text in watcher.messages if "is damaged" in text]) == 1


def test_a_damaged_test_result_is_measured_again(tmp_path):
    experiment = small_experiment(tmp_path, methods=("cocoop",), seeds=(1,), all_classes=True)
    [expected] = run_all(experiment)
    file = expected.cell.run_dir / "test_all" / "results.json"
    for content in ("", "{}", file.read_text()[:40], file.read_text().replace('"base"', '"other"')):
        file.write_text(content)
        [outcome] = run_all(experiment)
        assert outcome.accuracy == expected.accuracy


def changed(experiment):
    return changed_cells(make_cells(experiment), shared.load_dataset)


def test_a_changed_configuration_is_refused_or_redone(tmp_path):
    experiment = small_experiment(tmp_path, methods=("zeroshot", "cocoop"), seeds=(1,))
    run_all(experiment)
    assert changed(experiment) == {}
    faster = replace(experiment, config=replace(experiment.config, checkpoint_steps=3, print_freq=7))
    assert changed(faster) == {}  # nothing that decides a result
    other = replace(
        experiment,
        config=replace(experiment.config, optim=replace(experiment.config.optim, epochs=3)),
        seeds=(1, 2),
    )
    found = changed(other)
    assert [str(cell) for cell in found] == ["digits, cocoop, seed 1"]  # zero-shot CLIP has no epochs
    with pytest.raises(
        UserError, match=r"1 cell was trained .*digits, cocoop, seed 1.*optim.epochs is 2 there and 3"
    ):
        refuse_changed(found)
    # Not even without that check is one result taken for another.
    assert [o.status for o in run_all(other)] == ["finished", "finished", "failed", "finished"]
    watcher = Watcher()
    outcomes = run_all(other, watcher, overwrite=frozenset(found))
    assert [o.status for o in outcomes] == ["finished"] * 4
    assert watcher.trained == [("digits", "cocoop", 1)] and changed(other) == {}


def test_cross_dataset(tmp_path, encoded):
    data = folders(tmp_path, "one", "two", "six")
    experiment = small_experiment(
        tmp_path,
        "cross-dataset",
        data=data,
        source="one",
        datasets=("two", "six"),
        methods=("zeroshot", "cocoop"),
    )
    watcher = Watcher()
    outcomes = run_all(experiment, watcher)
    assert [str(o.cell) for o in outcomes][:2] == ["one, zeroshot, seed 1", "one, zeroshot, seed 2"]
    assert all(list(o.accuracy) == ["one", "two", "six"] for o in outcomes)
    assert watcher.evaluated[-3:] == [("cocoop", "all"), ("cocoop", "two"), ("cocoop", "six")]
    assert len(encoded) == 3
    # The number is that of the model on the target's own classes, all of them.
    cell = outcomes[-1].cell
    again = evaluate_run(cell.run_dir, data=replace(data["six"], subset="all"))["all"]
    assert again.accuracy == outcomes[-1].accuracy["six"] and again.total == len(
        load_dataset(data["six"]).test
    )
    assert f"* accuracy: {again.accuracy:.1f}%" in (cell.run_dir / "test_six" / "log.txt").read_text()
    assert "six" not in (cell.run_dir / "log.txt").read_text()
    table = make_table(experiment, outcomes)
    assert [e.dataset for e in table if e.method == "cocoop"] == ["one", "two", "six", "average"]
    # A target more: nothing is trained again.
    more = replace(
        experiment, data={**data, "digits": DataConfig(shots=2)}, datasets=("two", "six", "digits")
    )
    watcher = Watcher()
    outcomes = run_all(more, watcher)
    assert (
        watcher.trained == []
        and watcher.evaluated == [("zeroshot", "digits")] * 2 + [("cocoop", "digits")] * 2
    )


@pytest.mark.parametrize("method", ["linear-probe", "coop"])
def test_what_is_learned_a_class_is_tested_on_no_other_class(tmp_path, method):
    fields = {
        "methods": (method,),
        "seeds": (1,),
        "config": {"prompt__csc": method == "coop", "prompt__ctx_init": ""},
    }
    base2new = small_experiment(tmp_path, all_classes=True, **fields)
    [outcome] = run_all(base2new)
    assert (outcome.status, list(outcome.accuracy)) == ("finished", ["base"]), outcome.error
    assert [e.metric for e in make_table(base2new, [outcome])] == ["base"]
    transfer = small_experiment(
        tmp_path,
        "cross-dataset",
        data=folders(tmp_path, "one", "two"),
        source="one",
        root=tmp_path / "transfer",
        **fields,
    )
    [outcome] = run_all(transfer)
    assert (outcome.status, list(outcome.accuracy)) == ("finished", ["one"]), outcome.error


def test_zero_shot_takes_the_target_s_template_unless_one_was_given(tmp_path, monkeypatch):
    seen = []
    original = shared.build_model
    monkeypatch.setattr(
        shared,
        "build_model",
        lambda prompt, *a, **k: seen.append(prompt.template) or original(prompt, *a, **k),
    )
    own = "a photo of a {}, a type of test."
    few = shared.load_dataset

    def with_template(config):
        dataset = few(config)
        return replace(dataset, template=own) if config.root == tmp_path / "two" else dataset

    monkeypatch.setattr(shared, "load_dataset", with_template)
    data = folders(tmp_path, "one", "two")
    experiment = small_experiment(
        tmp_path,
        "domain-generalization",
        data=data,
        source="one",
        datasets=("two",),
        methods=("zeroshot",),
        seeds=(1,),
    )
    run_all(experiment)
    assert seen[0] == "a photo of a {}." and seen[-1] == own
    seen.clear()
    given = replace(
        experiment,
        config=replace(experiment.config, prompt=replace(experiment.config.prompt, template="the {}.")),
        root=tmp_path / "given",
    )
    run_all(given)
    assert set(seen) == {"the {}."}
