"""`cocoop-fast plan` from end to end."""

from __future__ import annotations

import json

import huggingface_hub
import open_clip
import pytest

from cocoop_fast import cli
from cocoop_fast.cli import plan
from cocoop_fast.measure.devices import gpu_table
from cocoop_fast.ops.extensions import CPP

ON_A_GPU = ["plan", "--device", "A100", "--model", "demo"]


def planned(capsys, *options):
    assert cli.run([*ON_A_GPU, *options, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_the_table_says_that_it_is_a_prediction(capsys):
    assert cli.run([*ON_A_GPU, "--k", "7", "-b", "3"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Predicted, not measured: demo, 7 classes, 3 images a step, fp16, A100-80GB.")
    for line in ("Rows a step", "Text step", "Epoch of 112 images", "Training, 10 epochs", "Largest batch"):
        assert f"\n {line} " in out
    assert "are assumed" in out and "data sheet" in out
    assert all(len(line) <= 110 for line in out.splitlines() if line.startswith(" "))  # of the table


def test_json_is_one_line_and_complete(capsys, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("red fox\nred panda\n\ncat\n")
    found = planned(
        capsys, "--classes", str(names), "--train-images", "50", "--epochs", "2", "--budget", "8GB"
    )
    assert found["prediction"] is True and found["command"] == "plan"
    assert (found["device"], found["precision"], found["budget_bytes"]) == ("A100-80GB", "fp16", 8 * 10**9)
    tree, dense = found["ways"]["tree"], found["ways"]["dense"]
    assert set(tree) == set(dense)
    # Nodes: red, fox or panda with its end each, cat with its end; every name ends in a full stop.
    assert found["tree"]["nodes"] == 1 + 3 + 3 + 3 and found["tree"]["tokens"] == 4 + 4 + 3
    assert tree["rows"] == 4 + 10 and dense["rows"] == 3 * 77
    assert tree["epoch_seconds"] == pytest.approx(50 * (tree["step_seconds"] + tree["image_seconds"]))
    assert tree["training_seconds"] == pytest.approx(2 * tree["epoch_seconds"])
    assert tree["fits"] and tree["largest_batch"] > dense["largest_batch"] > 1


def test_a_budget_bounds_the_batch(capsys):
    small, large = (planned(capsys, "--budget", budget)["ways"]["tree"] for budget in ("200MB", "2GB"))
    assert small["largest_batch"] < large["largest_batch"]
    assert cli.run([*ON_A_GPU, "--budget", "1MB"]) == 0
    out = capsys.readouterr().out
    assert "none" in out and "This batch does not fit at once: that needs" in out


def test_a_longer_context_costs_more(capsys):
    short, long = (planned(capsys, "--ctx-init", words) for words in ("X X", "X X X X X X X X"))
    assert (short["tree"]["context"], long["tree"]["context"]) == (2, 8)
    assert short["ways"]["tree"]["rows"] == long["ways"]["tree"]["rows"] - 6


def test_the_picture_is_of_fewer_classes_as_well(capsys, tmp_path):
    picture = tmp_path / "plan.svg"
    found = planned(capsys, "--k", "7", "--plot", str(picture))
    assert [one["classes"] for one in found["growth"]] == [2, 5, 7]
    assert found["growth"][-1]["tree"] == found["ways"]["tree"]
    for way in ("tree", "dense"):
        steps = [one[way]["step_seconds"] for one in found["growth"]]
        assert steps == sorted(steps)
    assert "<svg" in picture.read_text()


def test_a_picture_of_another_kind_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("cocoop_fast.cli.plan._read", lambda *_: pytest.fail("it reads a model"))
    assert cli.run([*ON_A_GPU, "--plot", "plan.gif"]) == 2
    assert "must end in .png, .svg or .pdf" in capsys.readouterr().err


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")
def test_this_machine_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("cocoop_fast.measure.this_machine.measure_process_bytes", lambda: 12_345)
    monkeypatch.setattr("cocoop_fast.measure.machine.OtherPrograms.share", lambda _: 0.4)
    call = ["plan", "--device", "cpu", "--model", "demo", "--k", "5", "--threads", "1", "--json"]
    assert cli.run(call) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["precision"] == "fp32" and "measured products" in found["device_rates"]
    assert 0 < found["ways"]["tree"]["step_seconds"] < found["ways"]["dense"]["step_seconds"]
    assert found["device_rates"]["threads"] == "1"
    assert found["budget_bytes"] > 10**8
    busy = "Other programs used 40% of the processors while they were measured"
    plan._print(found)
    assert busy in capsys.readouterr().out
    plan._print({**found, "used_by_other_programs": 0.01})
    assert "Other programs" not in capsys.readouterr().out


def test_the_table_of_devices(capsys):
    assert cli.run(["plan", "--list-devices"]) == 0
    out = capsys.readouterr().out
    assert all(gpu.name in out for gpu in gpu_table())
    assert cli.run(["plan", "--list-devices", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["devices"]) == len(gpu_table())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--device", "H1000"], "There is no device 'H1000' in the table; did you mean H100"),
        (["--device", "T4", "--precision", "bf16"], "The T4 does not compute in bf16"),
        (
            ["--device", "A100", "--precision", "fp8"],
            "--precision is 'fp8', but it must be one of auto, fp32, fp16, bf16.",
        ),
        (["--device", "cpu", "--precision", "fp16"], "The engine computes in fp32 on a CPU, not in fp16"),
        (["--device", "A100", "--budget", "much"], "The memory budget 'much' is not an amount of memory"),
        (["--device", "A100", "--budget", "0GB"], "The memory budget '0GB' is not an amount of memory"),
        (["--k", "0"], "--k is 0, but it must be positive."),
        (["--k", "21842"], "There are 21841 ImageNet names, but 21842 were asked for."),
        (["--batch-size", "-1"], "--batch-size is -1, but it must be positive."),
        (["--epochs", "0"], "--epochs is 0, but it must be positive."),
        (["--test-images", "0"], "--test-images is 0, but it must be positive."),
        (["--model", "ViT-B-61"], "is not an open_clip architecture"),
        (["--ctx-init", " "], "--ctx-init is empty"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options, sentence):
    assert cli.run(["plan", "--model", "demo", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.run(["plan", "--device", "cuda", "--model", "demo"]) == 2
    assert "There is no GPU in this machine; use --device cpu" in capsys.readouterr().err


def test_models_are_named_as_in_train(capsys, tmp_path):
    """OpenAI's spelling, and a folder with a configuration; of a repository without a network, one sentence."""
    options = ("--k", "5", "--device", "RTX-4090")
    spelled, known = (
        planned(capsys, "--model", name, *options) for name in ("ViT-B/16", "ViT-B-16-quickgelu")
    )
    assert spelled == known
    config = {
        "model_cfg": {**open_clip.get_model_config("ViT-B-16"), "quick_gelu": True},
        "preprocess_cfg": {},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert planned(capsys, "--model", str(tmp_path), *options)["ways"] == known["ways"]


def test_a_repository_that_cannot_be_asked_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.run(["plan", "--model", "hf-hub:someone/something", "--device", "RTX-4090", "-q"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert (
        "The model 'hf-hub:someone/something' cannot be described" in err and "HF_HUB_OFFLINE is set" in err
    )
