"""The comparison: contestants agree, figures are complete, `cocoop-fast bench` and the profiling tool work."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cocoop_fast import UserError, cli
from cocoop_fast.measure import compare as comparing
from cocoop_fast.measure import contestants as field
from cocoop_fast.measure import plot
from cocoop_fast.measure.baselines import GemmFloor
from cocoop_fast.measure.compare import Disagreement, assert_same, check_against_oracle
from cocoop_fast.measure.contestants import linear_flops
from cocoop_fast.measure.cost import TreeCost, layout_on
from cocoop_fast.measure.peak_memory import peak_memory
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names
from cocoop_fast.measure.shared_rows import sees
from cocoop_fast.measure.timing import Timing, interleave
from cocoop_fast.ops.extensions import CPP

ROOT = Path(__file__).parents[2]
COMPILED = [c.name for c in field.CONTESTANTS if c.compiled]
QUICK = [f"--skip={name}" for name in COMPILED]
TINY = ["bench", "--model", "demo", "--k", "5", "--rounds", "1"]

needs_extension = pytest.mark.skipif(
    CPP.why_unavailable() is not None, reason="the C++ extension is not built"
)


@pytest.fixture(scope="module")
def problem():
    return build_problem(ProblemSpec(imagenet_names(9), batch=2, model="demo"))


def tool(name):
    """A script of tools/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up here
    spec.loader.exec_module(module)
    return module


# -- contestants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [c.name for c in field.CONTESTANTS if c.oracle and not c.compiled])
def test_a_contestant_computes_what_the_oracle_computes(problem, name):
    if field.BY_NAME[name].why_not(problem) is not None:
        pytest.skip(field.BY_NAME[name].why_not(problem))
    check_against_oracle(problem, [field.BY_NAME[name]])


@pytest.mark.slow
def test_the_compiled_contestant_computes_the_same(problem):
    if field.BY_NAME["truncated+compile"].why_not(problem) is not None:
        pytest.skip(field.BY_NAME["truncated+compile"].why_not(problem))
    compiled, plain = (field.BY_NAME[n].build(problem).results() for n in ("truncated+compile", "truncated"))
    assert_same("truncated+compile", compiled, plain)


def test_a_wrong_contestant_is_caught(problem):
    class Wrong(field.ModelRunner):
        def results(self):
            found = super().results()
            found["ctx"] = 1.001 * found["ctx"]
            return found

    right = field.BY_NAME["truncated"]
    wrong = field.Contestant(
        "wrong", "", 1, lambda p: Wrong(right.build(p).model, p.features, p.labels), right.work
    )
    with pytest.raises(Disagreement, match="wrong: ctx is off by"):
        check_against_oracle(problem, [wrong])


def test_results_without_a_gradient_are_caught(problem):
    expected = field.BY_NAME["truncated"].build(problem).results()
    with pytest.raises(Disagreement, match="gradients of"):
        assert_same("half", {"logits": expected["logits"]}, expected)


def test_the_padding_free_baseline_computes_real_tokens_only(problem):
    work = field.BY_NAME["padding-free"].work(problem)
    assert work.rows == 2 * int(problem.lengths.sum())
    model = field.BY_NAME["padding-free"].build(problem).model
    assert len(model.embedded) == int(problem.lengths.sum())


def test_flex_attention_reads_what_the_tree_says(problem, monkeypatch):
    """torch has no backward of it on a CPU: its forward there, and the gradients by the same mask written out."""
    create_mask = pytest.importorskip("torch.nn.attention.flex_attention").create_mask
    expected = field.BY_NAME["dense"].build(problem).results()
    flex = field.BY_NAME["tree+flex"].build(problem)
    assert_same("tree+flex", {"logits": flex.forward()}, {"logits": expected["logits"]})
    rows, device = 1 + problem.tree.rows, torch.device("cpu")
    mask = create_mask(sees(problem.tree, device), None, None, rows, rows, device="cpu")[0, 0]
    assert mask.sum(dim=1).tolist()[-1] < rows, "all rows lie on one path"
    monkeypatch.setattr(
        flex.model, "flex", lambda q, k, v, block_mask: scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )
    assert_same("tree+flex", flex.results(), expected)


@pytest.mark.filterwarnings("ignore:.*duplicate")
def test_contestants_follow_the_type_of_the_model(problem):
    """A report on a GPU runs them in half precision."""
    model = copy.deepcopy(problem.clip_model).bfloat16()
    half = build_problem(replace(problem.spec, classes=imagenet_names(3)), model)
    half = replace(half, features=half.features.bfloat16())
    for contestant in field.CONTESTANTS:
        if not (contestant.compiled or contestant.why_not(half) or contestant.name == "engine"):
            runner = contestant.build(half)
            runner.step()
            runner.forward()


def test_who_shares_rows_computes_each_once(problem):
    rows = 2 * (1 + problem.tree.rows)
    assert field.BY_NAME["radix"].work(problem).rows == field.BY_NAME["tree+flex"].work(problem).rows == rows
    model = field.BY_NAME["radix"].build(problem).model
    assert len(model.kept) == 1 + problem.tree.rows and model.copies.shape == (9, problem.longest)


def test_the_floor_computes_every_product_of_every_layer(problem, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "mm", lambda x, w, out: seen.append(2 * x.numel() * w.shape[1]))
    GemmFloor(problem.weights, problem.tree.rows).step()
    assert len(seen) == 8 * len(problem.weights.blocks)
    assert sum(seen) == 2 * linear_flops(problem.weights, problem.tree.rows)


# -- the accounting ---------------------------------------------------------------------------------------------


@needs_extension
def test_the_flops_of_the_tree_are_those_that_the_engine_computes(problem):
    profiler = tool("profile_step")
    found, _ = profiler.profile(field.BY_NAME["engine"].build(problem), steps=2)
    # The heads' products are autograd's and torch's own; the profile sees the one of the logits, if any.
    counted = (
        sum(op.flops for name, op in found.ops.items() if f"×{len(problem.tokens)}" not in name[-4:]) / 2
    )
    assert counted == pytest.approx(
        TreeCost(problem.weights, problem.tree, layout_on("cpu")).step(2).gemm_flops, rel=0.01
    )


def test_percentiles():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.best, timing.median) == (1.0, 3.0)
    assert timing.percentile(20) == pytest.approx(1.8)
    assert timing.percentile(100) == 5.0
    assert Timing((7.0,)).percentile(80) == 7.0


def test_rounds_are_interleaved_and_end_in_time():
    order = []
    actions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = interleave(actions, rounds=4, max_seconds=60)
    assert order == list("abbaabba")
    assert len(timings["a"].seconds) == 4
    order.clear()
    interleave(actions, rounds=4, max_seconds=1, spent={"a": 5})
    assert order.count("a") == 1 and order.count("b") == 4


def test_what_takes_too_long_is_left_out(problem):
    result = comparing.compare(problem, field.choose(["dense", "floor"]), rounds=1, max_seconds=1e-6)
    assert "would take about" in result.notes["dense"]
    assert result.results == {}


def test_peak_memory_is_that_of_another_process(problem):
    peak = peak_memory(problem.spec, "truncated")
    assert 1e5 < peak < 2e9


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"memory of dense: .*no-such-model"):
        peak_memory(ProblemSpec(("cat",), model="no-such-model", pretrained="random"), "dense")


# -- the command ------------------------------------------------------------------------------------------------


def test_the_table(capsys):
    assert cli.run([*TINY, *QUICK]) == 0
    out, err = capsys.readouterr()
    for name in ("dense", "truncated", "padding-free", "radix", "tree+torch", "floor", "coop"):
        assert f"\n {name} " in out
    assert "5 classes, 1 image a step" in out
    assert "Left out: tree+flex (torch's FlexAttention has no backward on a CPU)." in out
    assert "torch " in out
    assert all(len(line) <= 110 for line in out.splitlines() if line.startswith(" "))  # of the table
    assert "bench: measuring" in err


def test_json_and_plot(capsys, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\n\ndog \nsea lion\n")
    picture = tmp_path / "plot.png"
    call = f"bench --model demo --classes {names} --rounds 2 -b 3 --json --plot {picture}".split()
    assert cli.run([*call, "--only", "dense", "--only", "tree+torch", "--only", "floor"]) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    found = json.loads(line)
    assert err == ""
    assert (found["command"], found["classes"], found["batch"]) == ("bench", 3, 3)
    rows = {row["name"]: row for row in found["contestants"]}
    assert list(rows) == ["dense", "tree+torch", "floor"]
    assert rows["dense"]["step_speedup"] == 1 and rows["floor"]["step_to_floor"] == 1
    assert rows["dense"]["rows"] == 3 * 3 * 77
    if found["peak_flops"] is not None:
        flops, best = rows["floor"]["step_gemm_flops"], rows["floor"]["step"]["best"]
        assert rows["floor"]["step_of_peak"] == pytest.approx(flops / best / found["peak_flops"])
    assert rows["tree+torch"]["step"]["rounds"] == 2
    assert rows["tree+torch"]["step"]["best"] <= rows["tree+torch"]["step"]["median"]
    assert found["used_by_other_programs"] is None or found["used_by_other_programs"] >= 0
    assert found["machine"]["torch"] == torch.__version__
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(comparing, "compare", lambda *a, **k: pytest.fail("it measured"))
    assert cli.run(["bench", "--model", "demo", "--plot", str(tmp_path / "plot.png")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: A plot needs matplotlib") and err.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_told_in_words(tmp_path):
    pytest.importorskip("matplotlib")
    said = r"p.png could not be written \(No such file or directory\)."
    with pytest.raises(UserError, match=said), plot._figure(tmp_path / "nowhere" / "p.png", (1, 1)):
        pass


def test_what_was_measured_is_printed_also_if_the_picture_cannot_be_written(capsys, monkeypatch, tmp_path):
    def no_room(*_):
        raise UserError("The plot could not be written (No space left on device).", exit_status=1)

    monkeypatch.setattr(plot, "plot_comparison", no_room)
    picture = str(tmp_path / "plot.png")
    assert (
        cli.run(
            ["bench", "--model", "demo", "--k", "5", "--only", "floor", "--rounds", "2", "--plot", picture]
        )
        == 1
    )
    out, err = capsys.readouterr()
    assert "floor" in out and "No space left" in err


def test_threads_are_set_for_the_measurement_only(capsys):
    before = torch.get_num_threads()
    assert cli.run([*TINY, "--only", "floor", "--threads", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "nobody"], "There is no contestant 'nobody'; choose from dense,"),
        (["--only", "dense", "--skip", "dense"], "No contestant is left to measure"),
        (["--k", "21842"], "There are 21841 ImageNet names, but 21842 were asked for."),
        (["--k", "0"], "--k is 0, but it must be positive."),
        (["--rounds", "0"], "--rounds is 0, but it must be positive."),
        (["--threads", "-1"], "--threads is -1, but it must be positive."),
        (["--max-seconds", "0"], "--max-seconds is 0.0, but it must be positive."),
        (["--batch-size", "0"], "--batch-size is 0, but it must be positive."),
        (["--pretrained", "openai"], "--pretrained needs the --model that it belongs to."),
        (
            ["--model", "ViT-B-61", "--pretrained", "random"],
            "The model 'ViT-B-61' is not an open_clip architecture",
        ),
        (["--plot", "plot.txt"], "must end in .png, .svg or .pdf"),
        (["--plot", "no/such/plot.png"], "there is no directory no/such"),
        (
            ["--model", "demo", "--only", "dense", "--max-seconds", "1e-6", "-q"],
            "No contestant could be measured: dense",
        ),
        (["--classes", "no-such-file"], "one class, 'no-such-file', and there is no file of that name"),
        (["--classes", "@no-such-file"], "no-such-file"),
    ],
)
def test_bad_input_is_one_sentence(capsys, options, sentence):
    assert cli.run(["bench", *options]) != 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\n  \n", "is empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"cat\n", "gives one class, 'cat'"),
    ],
)
def test_a_bad_class_list_is_one_sentence(capsys, tmp_path, content, sentence):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    assert cli.run(["bench", "--classes", str(path), "--k", "2"]) != 0
    assert sentence in capsys.readouterr().err


# -- tools ------------------------------------------------------------------------------------------------------


@needs_extension
def test_the_profile_accounts_for_a_step(capsys):
    profiler = tool("profile_step")
    mm = torch.mm
    profiler.main(["--model", "demo", "--k", "5", "--steps", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    rows = {row["op"]: row for row in found["ops"]}
    assert {"layer_norm_fwd", "TreeAttention.forward", "TreeAttention.backward", "unaccounted"} <= set(rows)
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(1e3 * found["seconds"])
    assert rows["TreeAttention.forward"]["calls"] == 3
    assert torch.mm is mm and "__matmul__" not in vars(torch.Tensor)
    profiler.main(["--model", "demo", "--k", "5", "--steps", "1", "--forward"])
    out = capsys.readouterr().out
    assert "TreeAttention.forward" in out and "TreeAttention.backward" not in out


@pytest.mark.slow
def test_the_comparison_of_products(capsys, tmp_path):
    path = tmp_path / "gemms.json"
    tool("compare_gemms").main(["--rows", "9", "--rounds", "1", "--threads", "2", "--out", str(path)])
    torch.set_num_threads(1)
    found = json.loads(path.read_text())
    assert {row["schedule"] for row in found["schedules"]} == {"whole layers", "2 panels", "panels of 128"}
    assert {row["variant"] for row in found["products"]} >= {"mm", "transposed copy"}
    assert "GFLOP/s of one" in capsys.readouterr().out
