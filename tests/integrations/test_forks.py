"""Descendants of CoOp with the engine at the seam of their text encoder: each as by itself, or told why not."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from comparison import assert_close
from dassl_stand_in import REPOSITORY, forget, patch, run, steps
from tiny_models import tiny_openai_clip

from cocoop_fast.integrations import dassl_repairs
from cocoop_fast.integrations.text_seam import accelerate

STEPS = 54  # six epochs of nine batches
WORDS = ["TRAINER.COOP.CTX_INIT", "a photo of a"]
RANDOM = ["TRAINER.COOP.CTX_INIT", ""]


@pytest.fixture(autouse=True)
def fresh_repository(monkeypatch):
    """Each test imports Dassl, the forks and the integration anew."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    forget()
    yield
    forget()


def train(output, trainer, *pairs, name=None):
    """What a fork prints in 54 steps, and its state in the end."""
    import trainers.cocoop  # whose name a fork's trainer may have
    import trainers.forks
    from dassl.engine import TRAINER_REGISTRY

    assert trainers.cocoop.CoCoOp
    if name is not None:
        TRAINER_REGISTRY._do_register(name, getattr(trainers.forks, trainer), force=True)
    recipe = ["OPTIM.MAX_EPOCH", "6", "OPTIM.LR", "0.02"]
    printed = run(output, *recipe, *pairs, trainer=name or trainer)
    content = torch.load(output / "prompt_learner/model.pth.tar-6", weights_only=True)
    return printed, content["state_dict"]


def alone_and_with_the_seam(folder, trainer, *pairs, name=None):
    """A fork by itself, and with the engine; and how many forms of prompts the tree has computed, by kind."""
    dassl_repairs.repair_dassl()
    alone = train(folder / "alone", trainer, *pairs, name=name)
    forget()
    patch()
    from cocoop_fast.integrations import text_seam

    forms, read = [], text_seam.Seam._read

    def counted(self, prompts, tokens):
        forms.append(read(self, prompts, tokens))
        return forms[-1]

    text_seam.Seam._read = counted
    try:
        return alone, train(folder / "seam", trainer, *pairs, name=name), forms
    finally:
        text_seam.Seam._read = read


def assert_the_same(alone, seam):
    assert len(steps(alone[0])) == len(steps(seam[0])) == STEPS
    for (rate, loss), (expected_rate, expected) in zip(steps(seam[0]), steps(alone[0]), strict=True):
        assert rate == expected_rate and loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert seam[1].keys() == alone[1].keys()
    for name, value in seam[1].items():
        torch.testing.assert_close(value, alone[1][name], rtol=1e-5, atol=1e-5, msg=name)
    learned = {name for name in alone[1] if not name.startswith("token_")}
    assert learned and all(torch.isfinite(alone[1][name]).all() for name in learned)


@pytest.mark.parametrize(
    ("trainer", "pairs", "shared"),
    [
        ("TCPT", WORDS, True),
        ("TCPT", RANDOM, True),
        ("KgCoOp", ["TRAINER.COOP.CTX_INIT", "True"], True),
        ("ProGrad", ["TRAINER.COOP.CTX_INIT", "False"], True),
        ("DePT", RANDOM, True),
        ("CAPT", WORDS, False),  # all classes begin alike, and only their gradients tell them apart
        ("ClassSpecific", RANDOM, False),
        ("NameInTheMiddle", WORDS, True),
        ("NameInFront", RANDOM, True),
        ("MaPLe", RANDOM, True),
        ("PromptSRC", WORDS, True),
    ],
)
def test_a_fork_with_the_seam_is_the_fork_by_itself(tmp_path, trainer, pairs, shared):
    alone, seam, forms = alone_and_with_the_seam(tmp_path, trainer, *pairs)
    assert_the_same(alone, seam)
    assert f"trainer {trainer} keeps its own model and loss, with text features by the tree" in seam[0]
    assert "own forward is used" not in seam[0] and "cocoop_fast" not in alone[0]
    assert [form.shared for form in forms] == [shared]
    assert forms[0].encoder.tree.rows < 3 * 25  # of three prompts of 77
    hooked = [tmp_path / name / "losses.jsonl" for name in ("alone", "seam")]
    if trainer == "CAPT":  # its hook writes a file at every step
        written = [[json.loads(line) for line in path.read_text().splitlines()] for path in hooked]
        assert len(written[0]) == STEPS and written[1] == pytest.approx(written[0], rel=1e-5)


def test_a_fork_under_the_references_name_keeps_its_loss(tmp_path):
    alone, seam, forms = alone_and_with_the_seam(tmp_path, "TCPT", *WORDS, name="CoCoOp")
    assert_the_same(alone, seam)
    assert (
        "text features by the tree; not the reference's: build_model, forward_backward, CustomCLIP" in seam[0]
    )
    assert len(forms) == 1


@pytest.mark.parametrize(
    ("trainer", "why"),
    [
        (
            "TCP",
            r"text encoder's own forward is used where it is called with more than prompts, tokens and deep prompts",
        ),
        ("Tuned", r"is left alone, because its text encoder learns ln_final.weight \(1 tensors\)"),
        (
            "Adapted",
            r"text encoder's own forward is used where it does not compute what CLIP's text tower does",
        ),
    ],
)
def test_what_cannot_be_served_is_left_to_the_fork_and_said_once(tmp_path, trainer, why):
    alone, seam, _ = alone_and_with_the_seam(tmp_path, trainer, *RANDOM)
    assert_the_same(alone, seam)
    assert steps(alone[0]) == steps(seam[0])  # it is the fork's own computation
    assert len(re.findall(f"cocoop_fast: .*{why}", seam[0])) == 1


def test_deep_prompts_that_a_fork_rounds_are_rounded_and_their_gradients_are_not():
    """MaPLe's and PromptSRC's blocks read theirs in float16, whatever the rest is computed in."""
    from trainers.forks import DeepTextEncoder, DensePrompts

    class Rounding(DeepTextEncoder):
        def rounded(self, prompt):
            return prompt.half()

    clip_model, said = tiny_openai_clip(dtype=torch.float64).requires_grad_(False), []
    learner = DensePrompts(clip_model, ["cat", "blue whale"], "", 3).double()
    learned = [learner.ctx, *(torch.randn_like(learner.ctx).requires_grad_() for _ in range(2))]
    alone = Rounding(clip_model)
    model = SimpleNamespace(text_encoder=Rounding(clip_model))
    accelerate(model, clip_model, said.append)
    results = []
    for encoder in (alone, model.text_encoder):
        features = encoder(learner(), learner.tokenized_prompts, learned[1:])
        results.append([features, *torch.autograd.grad(features.square().sum(), learned)])
    for name, expected, actual in zip(("features", "ctx", "layer 1", "layer 2"), *results, strict=True):
        assert_close(actual, expected, 1e-3 if "layer" in name else 1e-10, name)
    assert not said
    tree, *_ = model.text_encoder._seam._forms
    assert tree.halved and tree.n_deep == 2
    model.text_encoder(learner(), learner.tokenized_prompts, [learned[1][:2]])
    assert said == [
        "cocoop_fast: the text encoder's own forward is used where its deep prompts are not of the shape of its context"
    ]
