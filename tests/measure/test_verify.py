"""The certificate: it passes what is equivalent, fails what is not, and says how far all of it is from float64."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from clip_sources import NAME, add_architectures
from tiny_models import tiny_clip

from cocoop_fast import CustomCLIP, cli
from cocoop_fast.measure import problem as problems
from cocoop_fast.measure import verify
from cocoop_fast.measure.problem import ProblemSpec, build_problem
from cocoop_fast.measure.verify import Contestant, Errors, Verdict, build_dense, contestants
from cocoop_fast.reference import DensePromptedCLIP

NAMES = ("cat", "big dog", "bullet train", "bullet", "sky blue")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem():
    return build_problem(ProblemSpec(classes=NAMES, batch=2), tiny_clip(layers=2))


def test_every_backend_is_equivalent(problem):
    asked = list(contestants(CPU, ("fp64", "fp32")))
    verdicts = {
        (v.contestant.name, v.contestant.precision): v for v in verify.verify(problem, asked, device=CPU)
    }
    assert {("torch", "fp64"), ("dense", "fp32"), ("torch", "fp32"), ("cpu", "fp32")} <= verdicts.keys()
    assert ("dense", "fp64") not in verdicts and ("cpu", "fp64") not in verdicts
    assert all(verdict.within for verdict in verdicts.values())
    assert max(asdict(verdicts["torch", "fp64"].errors).values()) < 1e-11
    for name in ("dense", "torch", "cpu"):
        *errors, moved = asdict(verdicts[name, "fp32"].errors).values()
        assert 0 < max(errors) < 1e-4
        assert 0 < moved < 1e-2  # three steps of 0.002 are not far above what float32 resolves
    assert verdicts["dense", "fp32"].allowed is None
    bound, own = verdicts["cpu", "fp32"].allowed, verdicts["dense", "fp32"].errors
    assert bound.gradients == max(1e-4, 4 * own.gradients)


def test_bfloat16_is_compared_with_the_dense_path_in_bfloat16(problem):
    asked = list(contestants(CPU, ("bf16",), ("torch",)))
    dense, fast = verify.verify(problem, asked, device=CPU)
    assert dense.contestant.dense and fast.contestant.name == "torch"
    assert 1e-3 < dense.errors.logits < 0.1  # it does compute in bfloat16
    assert fast.errors.logits < 0.1 and fast.allowed.logits == 4 * dense.errors.logits
    assert fast.within
    # Its parameters are bfloat16, which hardly see a step; ours are float32.
    assert fast.errors.parameters < dense.errors.parameters


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_that_overflows_is_made_again_with_a_smaller_scale(problem, monkeypatch, broken):
    """As training does; where gradients are not finite at a scale of 1 either, it is not the scale's fault."""
    step_of, tried = verify._step_of, []

    def with_a_large_scale(model, *rest):
        step, scaler = step_of(model, *rest)
        if scaler.enabled:
            scaler.current().fill_(2.0**40)
            if broken:
                model.prompt_learner.ctx.register_hook(lambda gradient: gradient * math.nan)

        def noted(*batch):
            tried.append(scaler.enabled)
            return step(*batch)

        return noted, scaler

    monkeypatch.setattr(verify, "_step_of", with_a_large_scale)
    asked = list(contestants(CPU, ("fp16",), ("torch",)))
    *_, fast = verify.verify(problem, asked, device=CPU, steps=2)
    assert fast.contestant.name == "torch" and tried.count(True) > 2 + 10
    assert fast.within != broken and math.isnan(fast.errors.gradients) == broken


def test_the_loss_is_one_number_more_of_those_of_the_steps():
    own = Errors(logits=0.0, loss=1e-6, gradients=0.0, losses=1e-2, parameters=0.0)
    allowed = verify._allowed("fp16", own)
    assert allowed.loss == allowed.losses == 4e-2 and allowed.logits == 1e-4


def test_the_oracle_by_parts_is_the_oracle(problem):
    by_parts = build_dense(problem, prompts_at_once=2)
    whole = DensePromptedCLIP(problem.clip_model, NAMES)
    whole.prompt_learner.load_state_dict(problem.learned)
    results = []
    for model in (by_parts, whole):
        model.prompt_learner.train()
        loss, logits = model.loss_and_logits(problem.features, problem.labels)
        results.append([logits, *torch.autograd.grad(loss, list(model.prompt_learner.parameters()))])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("distance", ["l1", "cosine"])
def test_consistency_is_verified(problem, distance):
    """And an engine without it, or with another weight, is not equivalent."""
    near = replace(problem, spec=replace(problem.spec, consistency=distance))
    asked = list(contestants(CPU, ("fp64", "fp32"), ("torch", "cpu")))
    verdicts = verify.verify(near, asked, device=CPU, steps=1)
    assert len(verdicts) == 4 and all(verdict.within for verdict in verdicts)
    assert max(asdict(verdicts[0].errors).values()) < 1e-10
    [plain] = contestants(CPU, ("fp64",), ("torch",))
    without = replace(plain, build=lambda given: plain.build(replace(given, spec=problem.spec)))
    [verdict] = verify.verify(near, [without], device=CPU, steps=1)
    assert {"loss", "gradients"} <= {name for name, _, _ in verdict.outside()}


class _Wrong:
    """A contestant that is wrong in one way."""

    def __init__(self, how):
        self.how = how

    def __call__(self, problem):
        if self.how == "a weight":
            problem.clip_model.transformer.resblocks[1].mlp.c_fc.weight[0] *= 1.01
        model = build_dense(problem)
        if self.how == "a class":
            model.tokens[3] = model.tokens[0]
            model.embedding[3] = model.embedding[0]
        if self.how == "a gradient":
            model.prompt_learner.ctx.register_hook(lambda gradient: gradient * 1.001)
        if self.how == "not finite":
            model.logit_scale.data.fill_(math.inf)
        if self.how == "the start":
            model.prompt_learner.meta_net.linear1.weight.data *= 1.01
        return model


@pytest.mark.parametrize("how", ["a weight", "a class", "a gradient", "not finite", "the start"])
def test_what_is_not_equivalent_is_outside(problem, how):
    wrong = Contestant("wrong", "fp32", _Wrong(how))
    dense, verdict = verify.verify(
        problem, [Contestant("dense", "fp32", build_dense, dense=True), wrong], device=CPU, steps=2
    )
    assert dense.within and not verdict.within
    if how == "a gradient":  # which leaves the logits alone
        assert verdict.errors.logits <= verdict.allowed.logits
        assert verdict.errors.gradients > verdict.allowed.gradients


def test_a_contestant_that_learns_something_else_is_an_error(problem):
    def without_meta_net(problem):
        return DensePromptedCLIP(problem.clip_model, NAMES, conditional=False)

    with pytest.raises(ValueError, match="expected of"):
        verify.verify(problem, [Contestant("coop", "fp32", without_meta_net)], device=CPU, steps=1)


def test_not_a_number_is_outside():
    bound = Errors(1.0, 1.0, 1.0, 1.0, 1.0)
    contestant = Contestant("one", "fp32", build_dense)
    assert Verdict(contestant, bound, bound).within
    assert Verdict(contestant, replace(bound, losses=1.1), None).within
    [(name, error, most)] = Verdict(contestant, replace(bound, losses=math.nan), bound).outside()
    assert name == "losses" and math.isnan(error) and most == 1.0
    assert not Verdict(contestant, replace(bound, losses=1.1), bound).within


def test_what_pruning_leaves_out_is_measured(problem):
    """Against gradients that are taken here, for each engine; a pruned mass of next to nothing is no error."""
    peaked = replace(problem, clip_model=copy.deepcopy(problem.clip_model))
    peaked.clip_model.logit_scale.data.fill_(math.log(100))
    asked = list(contestants(CPU, ("fp64", "fp32")))
    found = verify.measure_pruning(peaked, asked, 0.4, device=CPU, batches=1)
    assert [one.contestant.name for one in found] == [one.name for one in asked if not one.dense]
    gradients = []
    for tau in (0.0, 0.4):
        model = CustomCLIP(peaked.cfg, NAMES, peaked.clip_model, backend="torch", prune_mass=tau)
        model.prompt_learner.load_state_dict(peaked.learned, strict=False)
        loss, _ = model.loss_and_logits(peaked.features, peaked.labels)
        parts = torch.autograd.grad(loss, list(model.prompt_learner.parameters()))
        gradients.append(torch.cat([one.flatten() for one in parts]))
    expected = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert expected > 1e-3 and model.pruned.classes_kept < len(NAMES)
    for one in found:
        assert one.gradients == pytest.approx(float(expected), rel=1e-2)
        assert one.classes_kept == model.pruned.classes_kept
        assert one.share_left_out == pytest.approx(model.pruned.share_left_out, rel=1e-3)
    for one in verify.measure_pruning(peaked, asked, 1e-12, device=CPU, batches=1):
        assert one.gradients < 1e-4 and one.classes_kept == len(NAMES)


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(problems, "load_model", lambda spec: (tiny_clip(layers=2), False))


def test_the_command(tiny_model, capsys):
    assert cli.run(["verify", "--k", "5", "--steps", "2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "Equivalent" in out and "OUTSIDE" not in out
    for word in ("dense", "torch", "fp64", "fp32", "Gradient"):
        assert word in out
    assert "verify: the dense oracle in fp64" in err

    assert (
        cli.run(["verify", "--k", "5", "--steps", "2", "--device", "cpu", "--json", "--backend", "torch"])
        == 0
    )
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["consistency"] == "none"
    assert err == "" and found["within"] is True and found["classes"] == 5 and found["steps"] == 2
    assert [(row["name"], row["precision"]) for row in found["rows"]] == [
        ("torch", "fp64"),
        ("dense", "fp32"),
        ("torch", "fp32"),
    ]
    assert set(found["rows"][0]["errors"]) == {"logits", "loss", "gradients", "losses", "parameters"}


def test_weights_that_do_not_say_their_activation_are_verified_with_both(tmp_path, capsys):
    add_architectures(tmp_path)
    clip = tiny_clip(quick_gelu=False)
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    arguments = ["--classes", ",".join(NAMES), "--steps", "1", "--device", "cpu", "--backend", "torch"]
    arguments = ["verify", *arguments, "--model", NAME, "--pretrained", str(tmp_path / "weights.pt"), "-q"]
    assert cli.run(arguments) == 0
    out, err = capsys.readouterr()
    assert f"{NAME}: GELU, which is assumed; 5 classes" in out and "The same with QuickGELU:" in out
    assert "the wrong one changes every result" in out and "GELU is assumed" in err
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["activation"] == "gelu" and found["activation_assumed"]
    other = found["other_activation"]
    assert other["activation"] == "quick_gelu" and len(other["rows"]) == len(found["rows"])
    logits = []
    for quick_gelu in (False, True):
        model = tiny_clip(quick_gelu=quick_gelu)  # the same seed
        problem = build_problem(ProblemSpec(classes=NAMES, ctx_init="a photo of a"), model)
        with torch.no_grad():
            logits.append(build_dense(problem).logits(problem.features))
    expected = float((logits[1] - logits[0]).abs().max() / logits[0].abs().max())
    assert expected > 1e-3 and other["logits_differ"] == pytest.approx(expected, rel=1e-2)
    assert cli.run([*arguments[:-5], "--model", f"{NAME}-quickgelu", *arguments[-3:], "--json"]) == 0
    assert "other_activation" not in json.loads(capsys.readouterr().out)


def test_the_command_measures_pruning(tiny_model, capsys):
    arguments = ["verify", "--k", "5", "--steps", "1", "--device", "cpu", "--quiet", "--prune-mass", "0.3"]
    assert cli.run(arguments) == 0
    assert "Pruning with prune_mass 0.3, which is not exact" in capsys.readouterr().out
    assert cli.run([*arguments, "--json", "--backend", "torch", "--precision", "fp64"]) == 0
    found = json.loads(capsys.readouterr().out)["pruning"]
    assert found["prune_mass"] == 0.3
    assert [(row["name"], row["precision"]) for row in found["rows"]] == [("torch", "fp64")]
    assert 0 <= found["rows"][0]["share_left_out"] <= 0.15


def test_the_command_fails_when_it_should(tiny_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(verify, "_fast", lambda backend: _Wrong("a weight"))
    names = tmp_path / "names.txt"
    names.write_text("cat\nbig dog\n")
    arguments = ["verify", "--classes", str(names), "--steps", "1", "--device", "cpu", "--quiet"]
    assert cli.run(arguments) == 1
    out, err = capsys.readouterr()
    assert "NOT equivalent" in out and "OUTSIDE" in out and err == ""
    assert "torch in fp64: logits is off by" in out
    assert cli.run([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["within"] is False


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prune-mass", "1"], "--prune-mass is 1, but it must be at least 0 and below 1"),
        (["--steps", "0"], "--steps is 0, but it must be positive"),
        (["--pretrained", "openai"], "--pretrained needs the --model"),
        (["--backend", "fast"], "--backend is 'fast', but it must be one of"),
        (["--precision", "fp16"], "--precision is 'fp16', but on cpu it must be one of fp64, fp32"),
        (["--backend", "cuda"], "No backend asked for computes in these precisions on cpu"),
        (["--prune-mass", "0.1", "--consistency", "l1"], "exclude each other, as in training"),
        (["--consistency", "l2"], "--consistency is 'l2', but it must be one of none, l1, cosine"),
        (["--ctx-init", " "], "--ctx-init is empty"),
        (["--ctx-init", "uncharacteristically a"], "some word has several tokens"),
    ],
)
def test_bad_input(tiny_model, capsys, arguments, sentence):
    assert cli.run(["verify", "--k", "3", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
