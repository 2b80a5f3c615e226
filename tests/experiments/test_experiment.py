"""Whole experiments: results, files, resuming, comparing, and refusing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_runs import StopAfter, tiny_config, use_tiny_clip, write_images

from cocoop_fast import UserError
from cocoop_fast.data import load_dataset
from cocoop_fast.evaluation.metrics import harmonic_mean
from cocoop_fast.experiments.experiment import evaluate_reference, evaluate_run, run
from cocoop_fast.experiments.shared import Shared
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.training.observer import Observer


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


class Calls(Observer):
    """The names of the calls, and what was said."""

    def __init__(self):
        self.names, self.messages, self.evaluations, self.info = [], [], [], None

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.names.append(name)
        return super().__getattribute__(name)

    def on_run_start(self, info):
        self.info = info

    def on_message(self, text):
        self.messages.append(text)

    def on_evaluation_end(self, info):
        self.evaluations.append((info.method, info.subset))


def learned(path):
    return read_run(path)[1].parameters


def assert_same_learned(one, other):
    a, b = learned(one), learned(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_run_of_other_images_is_not_shown_as_that_of_these(tmp_path):
    for folder, names in (
        ("a", ["red fox", "cat", "dog"]),
        ("b", ["red fox", "cat", "dog"]),
        ("c", ["x", "y", "z"]),
    ):
        for i, name in enumerate(names):
            write_images(tmp_path / folder / name, 8, seed=10 * i)
    for image in (tmp_path / "b" / "cat").iterdir():
        image.rename(image.with_name(f"new{image.name}"))

    def config(folder):
        fields = {"data__name": "folder", "data__root": str(tmp_path / folder), "data__subset": "all"}
        return tiny_config(tmp_path / "run", optim__epochs=1, data__shots=0, **fields)

    first = run(config("a"))
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert run(config("a")) == first
    for other in ("b", "c"):
        with pytest.raises(UserError, match="are not those that the run in"):
            run(config(other))
        assert (tmp_path / "run" / "config.yaml").read_text() == kept
    (tmp_path / "a").rename(tmp_path / "moved")  # the same images elsewhere are the same
    assert run(config("moved")) == first


def test_base_to_new(tmp_path):
    calls = Calls()
    results = run(tiny_config(tmp_path), observer=calls)
    [row] = results.rows
    assert (row.method, row.seed, row.all) == ("cocoop", 1, None)
    assert row.h == harmonic_mean(row.base, row.new)
    assert calls.evaluations == [("cocoop", "base"), ("cocoop", "new")]
    assert calls.info.classnames == ("digit zero", "digit one", "digit two", "digit three", "digit four")
    assert (calls.info.train_images, calls.info.steps_per_epoch, calls.info.first_step) == (10, 10, 0)
    often = ("on_step", "on_checkpoint", "on_evaluation_progress", "on_message")
    order = [name for name in calls.names if name not in often]
    assert order == [
        "on_run_start", "on_epoch_start", "on_epoch_end", "on_epoch_start", "on_epoch_end", "on_training_end",
        "on_evaluation_start", "on_evaluation_end", "on_evaluation_start", "on_evaluation_end", "on_run_end",
    ]  # fmt: skip
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["rows"][0]["base"] == row.base and kept["evaluations"]["new"]["total"] == 26
    for name in (
        "config.yaml",
        "log.txt",
        "metrics.jsonl",
        "test_new/log.txt",
        "prompt_learner/model.pth.tar-2",
    ):
        assert (tmp_path / name).is_file(), name


@pytest.mark.parametrize("own", ["folder", "list"])
def test_own_images_are_trained_on_in_all_classes_unless_base_to_new_is_asked_for(tmp_path, own):
    names = ["ant", "bee", "cat", "dog", "eel"]
    rows = [
        path for i, name in enumerate(names) for path in write_images(tmp_path / "data" / name, 4, seed=i)
    ]
    root = tmp_path / "data"
    if own == "list":
        root = tmp_path / "list.csv"
        lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in rows]
        root.write_text("\n".join(["path,classname", *lines]))
    fields = {"data__name": own, "data__root": str(root), "optim__epochs": 1}
    calls = Calls()
    [row] = run(tiny_config(tmp_path / "all", **fields), observer=calls).rows
    assert calls.info.classnames == tuple(names) and calls.info.other_classes == ()
    assert row.all is not None and row.base is None
    told = (tmp_path / "all" / "log.txt").read_text().splitlines()[2]
    assert told == "Classes trained on: all 5 (ant, bee, cat, dog, eel)."
    run(tiny_config(tmp_path / "base", data__subset="base", **fields))
    told = (tmp_path / "base" / "log.txt").read_text().splitlines()[2]
    assert told == "Classes trained on: 3 of 5 (ant, bee, cat). Not trained on: 2 (dog, eel)."


def test_progress_reaches_the_end(tmp_path):
    class Progress(Observer):
        done = ()

        def on_evaluation_progress(self, images_done, images):
            assert self.done == () or images_done >= self.done[0] or images != self.done[1]
            self.done = images_done, images

        def on_evaluation_end(self, info):
            assert self.done == (info.metrics.total, info.metrics.total)

    run(tiny_config(tmp_path, prompt__method="zeroshot", eval_batch_size=50), observer=Progress())


@pytest.mark.parametrize(("subset", "field"), [("new", "new"), ("all", "all")])
def test_other_subsets_are_evaluated_on_themselves(tmp_path, subset, field):
    calls = Calls()
    [row] = run(tiny_config(tmp_path, data__subset=subset), observer=calls).rows
    assert calls.evaluations == [("cocoop", subset)]
    assert getattr(row, field) is not None and row.h is None and row.base is None


def test_seeds_and_repeats(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tiny_config(tmp_path / name, seed=seed))
    assert_same_learned(tmp_path / "a", tmp_path / "b")
    a, c = learned(tmp_path / "a"), learned(tmp_path / "c")
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("stop", [3, 10, 14, 20])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, stop):
    run(tiny_config(tmp_path / "whole"))
    config = tiny_config(tmp_path / "parts", checkpoint_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(stop))
    calls = Calls()
    run(config, observer=calls)
    assert calls.info.first_step == {3: 0, 10: 8, 14: 12, 20: 16}[stop]
    assert_same_learned(tmp_path / "whole", tmp_path / "parts")
    ours, theirs = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("parts", "whole"))
    assert ours["evaluations"] == theirs["evaluations"]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = run(tiny_config(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    calls = Calls()
    second = run(tiny_config(tmp_path), observer=calls)
    assert second == first and "on_run_start" not in calls.names
    model, finished = calls.messages
    assert model.startswith("Model: demo")
    assert finished == f"The cocoop run in {tmp_path} is finished; its results are shown."
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match=r"optim.lr is 0.002 there and 0.1 here"):
        run(tiny_config(tmp_path, optim__lr=0.1))
    run(tiny_config(tmp_path, optim__lr=0.1), overwrite=True)


def test_a_killed_evaluation_is_repeated_without_training(tmp_path):
    run(tiny_config(tmp_path))
    (tmp_path / "results.json").unlink()
    calls = Calls()
    run(tiny_config(tmp_path), observer=calls)
    assert calls.info.first_step == 20 and "on_step" not in calls.names
    assert calls.evaluations == [("cocoop", "base"), ("cocoop", "new")]


def test_comparing_methods(tmp_path):
    config = tiny_config(tmp_path, data__shots=1)
    encoded, shared = [], Shared()
    encoder = shared.clip(config.model).model.visual
    encoder.register_forward_hook(lambda module, images, features: encoded.append(len(images[0])))
    # CoOp's own recipe on one shot is 50 epochs of one batch: quick here.
    results = run(config, compare=("zeroshot", "coop", "cocoop"), shared=shared)
    assert [row.method for row in results.rows] == ["cocoop", "zeroshot", "coop"]
    epochs, test_images = 2 + 50, 54
    assert sum(encoded) == epochs * 5 + test_images  # those once for all methods
    assert [row.output_dir for row in results.rows] == [tmp_path, tmp_path / "zeroshot", tmp_path / "coop"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in kept["rows"]] == ["cocoop", "zeroshot", "coop"]
    assert "evaluations" in kept
    coop, _ = read_run(tmp_path / "coop")
    assert (coop.optim.epochs, coop.optim.batch_size) == (50, 32)
    alone = run(tiny_config(tmp_path / "alone", prompt__method="coop", optim__epochs=50, data__shots=1))
    assert alone.rows[0].base == results.rows[2].base
    assert_same_learned(tmp_path / "coop", tmp_path / "alone")
    # Asked for again, with fewer methods: nothing is trained, and the rows asked for come back.
    calls = Calls()
    assert run(config, compare=("coop",), observer=calls).rows == (results.rows[0], results.rows[2])
    assert "on_run_start" not in calls.names


def test_a_comparison_can_be_added_later(tmp_path):
    first = run(tiny_config(tmp_path))
    calls = Calls()
    both = run(tiny_config(tmp_path), compare=("zeroshot",), observer=calls)
    assert both.rows[0] == first.rows[0] and both.rows[1].method == "zeroshot"
    assert calls.evaluations == [("zeroshot", "base"), ("zeroshot", "new")]


def test_an_unusable_directory_is_noticed_before_training(tmp_path):
    (tmp_path / "coop").mkdir()
    (tmp_path / "coop" / "log.txt").write_text("mine")
    calls = Calls()
    with pytest.raises(UserError, match=r"coop already has log.txt"):
        run(tiny_config(tmp_path), compare=("coop",), observer=calls)
    assert "on_run_start" not in calls.names


def test_evaluating_again(tmp_path):
    [row] = run(tiny_config(tmp_path)).rows
    again = evaluate_run(tmp_path)
    assert (again["base"].accuracy, again["new"].accuracy) == (row.base, row.new)
    assert evaluate_run(tmp_path, subset="new")["new"] == again["new"]
    assert evaluate_run(tmp_path, subset="all")["all"].total == 54
    exported = evaluate_run(tmp_path, reference_checkpoint=tmp_path / "prompt_learner")
    assert exported == again
    config, _ = read_run(tmp_path)
    assert evaluate_reference(config, tmp_path, subset="base")["base"] == again["base"]


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    run(tiny_config(tmp_path / "cocoop"))
    run(tiny_config(tmp_path / "coop", prompt__method="coop"))
    with pytest.raises(UserError, match=r"lacks meta_net.linear1.bias.*trained with another method"):
        evaluate_run(tmp_path / "cocoop", reference_checkpoint=tmp_path / "coop")


def test_changed_images_are_noticed(tmp_path):
    for name in "abcd":
        write_images(tmp_path / "data" / name, 6)
    config = tiny_config(tmp_path / "run", data__name="folder", data__root=str(tmp_path / "data"))
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(5))
    moved = tmp_path / "data" / "a"
    write_images(moved, 9)
    with pytest.raises(UserError, match=r"not those that the run in .* began with"):
        run(config)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_finished_run_is_not_shown_for_other_images_of_the_same_names(tmp_path, split):
    for part, count in (("train", 4), ("test", 2)):
        for name in "abcd":
            write_images(tmp_path / "raw" / part / name, count)
    shutil.copytree(tmp_path / "raw", tmp_path / "cropped")
    for image in (tmp_path / "cropped" / split).glob("*/*.png"):
        Image.open(image).crop((4, 4, 18, 18)).save(image)
    config = tiny_config(tmp_path / "run", data__name="folder", data__root=str(tmp_path / "raw"))
    run(config)
    before = (tmp_path / "run/config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"cropped are not those that the run in .* began with"):
        run(replace(config, data=replace(config.data, root=tmp_path / "cropped")))
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    assert run(config).rows == run(config).rows  # its own are shown


def test_a_moved_data_set_is_the_same(tmp_path):
    for name in "abcd":
        write_images(tmp_path / "data" / name, 6)
    config = tiny_config(
        tmp_path / "run", data__name="folder", data__root=str(tmp_path / "data"), checkpoint_steps=1
    )
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(3))
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    calls = Calls()
    run(replace(config, data=replace(config.data, root=tmp_path / "elsewhere")), observer=calls)
    assert calls.info.first_step == 2


def test_bad_images_stop_the_run_before_training(tmp_path):
    for name in "abcd":
        write_images(tmp_path / "data" / name, 6)
    config = tiny_config(
        tmp_path / "run", data__name="folder", data__root=str(tmp_path / "data"), data__shots=0
    )
    bad = load_dataset(config.data).test[-1].source
    (tmp_path / "data" / str(bad)).write_text("no image")
    calls = Calls()
    with pytest.raises(UserError, match=rf"1 image in .*{bad} \(not an image\)"):
        run(config, observer=calls)
    assert "on_run_start" not in calls.names
    run(replace(config, data=replace(config.data, skip_bad_images=True)), overwrite=True, observer=calls)
    assert any("Left out 1 of" in text for text in calls.messages)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run(tiny_config(tmp_path / "whole"))
    config = tiny_config(tmp_path / "parts", checkpoint_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run(config, observer=StopAfter(14))
    newest = max((tmp_path / "parts" / "checkpoints").glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    calls = Calls()
    run(config, observer=calls)
    assert calls.info.first_step == 10 and "is damaged" in calls.messages[1]
    assert_same_learned(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_from_another_run_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(tmp_path / "a", checkpoint_steps=4), observer=StopAfter(5))
    run(tiny_config(tmp_path / "b", seed=2))
    foreign = max((tmp_path / "b" / "checkpoints").glob("*.pt"))
    foreign.rename(tmp_path / "a" / "checkpoints" / foreign.name)
    with pytest.raises(UserError, match=r"seed is 2 there and 1 here"):
        run(tiny_config(tmp_path / "a"))


def test_the_final_checkpoint_is_small(tmp_path):
    run(tiny_config(tmp_path))
    newest = max((tmp_path / "checkpoints").glob("*.pt"))
    assert newest.stat().st_size < 30_000
    assert checkpoint.load(newest).parameters.keys() == learned(tmp_path).keys()
    assert not any("token" in name for name in learned(tmp_path))


@pytest.mark.parametrize(
    ("fields", "compare", "message"),
    [
        ({"prompt__template": "a photo."}, ("zeroshot",), r"must contain \{\} once"),
        ({"prompt__ctx_init": "word " * 90}, (), "reads 77"),
        ({"model__backend": "cuda"}, (), "'cuda' cannot be used here: it does not run on cpu"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_written(tmp_path, fields, compare, message):
    output = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        run(tiny_config(output, **fields), compare=compare)
    assert not output.exists()


def test_a_name_of_the_new_classes_that_cannot_be_encoded_is_found_before_training(tmp_path):
    class WithALongName(Shared):
        def dataset(self, config):
            dataset = super().dataset(config)
            return replace(dataset, classnames=(*dataset.classnames[:9], "word " * 90))

    with pytest.raises(UserError, match="prompt of class 4, 'word word"):
        run(tiny_config(tmp_path / "run"), shared=WithALongName())
    assert not (tmp_path / "run").exists()


def test_overwriting_spares_a_run_until_its_successor_is_known_to_work(tmp_path):
    run(tiny_config(tmp_path))
    with pytest.raises(UserError, match="'cuda' cannot be used here"):
        run(tiny_config(tmp_path, model__backend="cuda"), overwrite=True)
    assert (tmp_path / "results.json").exists()
