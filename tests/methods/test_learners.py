"""Every method that learns a context, in all of its forms, against the dense oracle; other class names at run time."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, PromptLearner, UserError
from cocoop_fast.methods import CoOp, MetaNetsCLIP
from cocoop_fast.methods.base import LearnedPromptCLIP
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.methods.learner import Learner
from cocoop_fast.prompts.layout import CLASS_NAME, Context, layout_of_segments
from cocoop_fast.reference import DensePromptedCLIP

pytestmark = pytest.mark.filterwarnings("ignore:Classes with the same prompt")

NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit one", "cat"]
METHODS = {"coop": CoOp, "cocoop": CustomCLIP, "meta-nets": MetaNetsCLIP}
WORDS = "a photo of a"


def cfg(ctx_init="", **options):
    return reference_cfg(ctx_init=ctx_init, n_ctx=4, precision="fp32", image_size=IMAGE_SIZE, **options)


def randomise(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.prompt_learner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("csc", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_loss_logits_and_gradients(method, csc, position):
    clip_model = tiny_clip(dtype=torch.float64, layers=2)
    fast = METHODS[method](cfg(csc=csc, class_position=position), NAMES, clip_model)
    randomise(fast)
    dense = DensePromptedCLIP(
        clip_model,
        NAMES,
        ctx_init="",
        conditional=method != "coop",
        meta_nets=method == "meta-nets",
        class_specific=csc,
        class_position=position,
    )
    learned = dict(fast.prompt_learner.named_parameters())
    dense.prompt_learner.load_state_dict(learned)  # strict: the names are the oracle's
    features, label = torch.randn(3, 64, dtype=torch.float64), torch.tensor([1, 3, 5])
    loss, logits = fast.loss_and_logits(features, label)
    expected_loss, expected_logits = dense.loss_and_logits(features, label)
    assert_close(logits, expected_logits, 1e-10, "logits")
    gradients = torch.autograd.grad(loss, list(learned.values()))
    wanted = torch.autograd.grad(
        expected_loss, [dict(dense.prompt_learner.named_parameters())[n] for n in learned]
    )
    for name, *pair in zip(learned, gradients, wanted, strict=True):
        assert_close(*pair, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_words_begin_the_context_wherever_the_name_is(position):
    model = tiny_clip()
    fast = CoOp(cfg(WORDS, class_position=position), NAMES, model)
    dense = DensePromptedCLIP(model, NAMES, ctx_init=WORDS, conditional=False, class_position=position)
    assert fast.prompt_learner.ctx.equal(dense.prompt_learner.ctx)
    features = torch.randn(2, 64)
    assert_close(fast.eval().forward_features(features), dense.logits(features), 1e-5)


def test_random_contexts():
    torch.manual_seed(3)
    shared = CoOp(cfg(), NAMES, tiny_clip()).prompt_learner.ctx
    own = CoOp(cfg(csc=True), NAMES * 20, tiny_clip()).prompt_learner.ctx
    assert (shared.shape, own.shape) == ((4, 48), (120, 4, 48))
    assert abs(own.std().item() - 0.02) < 1e-3 and abs(own.mean().item()) < 1e-3
    torch.manual_seed(3)
    assert CoOp(cfg(), NAMES, tiny_clip(dtype=torch.float16)).prompt_learner.ctx.equal(shared)


def test_meta_nets_are_as_many_as_context_vectors():
    learner = MetaNetsCLIP(cfg(), NAMES, tiny_clip()).prompt_learner
    assert len(learner.meta_nets) == 4
    assert learner.contexts(torch.randn(2, 64)).shift.shape == (2, 4, 48)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("method", METHODS)
def test_other_class_names_at_run_time(method, position):
    """What was learned stays, and the model is the one that would have been built over the new names."""
    clip_model = tiny_clip()
    model = METHODS[method](cfg(class_position=position), NAMES, clip_model).eval()
    randomise(model)
    before = {name: p.clone() for name, p in model.prompt_learner.named_parameters()}
    features = torch.randn(2, 64)
    first = model.forward_features(features)
    others = ["digit nine", "blue whale", "x-ray"]
    model.set_classnames(others)
    anew = METHODS[method](cfg(class_position=position), others, clip_model).eval()
    anew.prompt_learner.load_state_dict(before, strict=False)
    assert model.n_classes == 3 and model.prompt_learner.n_cls == 3
    assert all(p.equal(before[name]) for name, p in model.prompt_learner.named_parameters())
    assert model.forward_features(features).equal(anew.forward_features(features))
    with pytest.raises(UserError, match=r"0\.\.2"):
        model.loss_and_logits(features, torch.tensor([0, 3]))
    with pytest.raises(UserError, match="empty name"):
        model.set_classnames(["cat", " "])
    model.set_classnames(NAMES)
    assert_close(model.forward_features(features), first, 1e-6)


def test_the_dense_prompts_follow_the_class_names():
    model = tiny_clip()
    learner = PromptLearner(cfg(WORDS), NAMES, model)
    learner.set_classnames(["blue whale"])
    assert learner(torch.randn(2, 64)).shape == (2, 1, 77, 48)
    fresh = PromptLearner(cfg(WORDS), ["blue whale"], model)
    assert learner.token_suffix.equal(fresh.token_suffix)
    assert list(learner.state_dict()) == list(fresh.state_dict())


def test_contexts_of_single_classes_stay_with_them():
    model = CoOp(cfg(csc=True), NAMES, tiny_clip())
    with pytest.raises(UserError, match="Each of the 6 classes has a context of its own"):
        model.set_classnames(NAMES[:3])
    model.set_classnames([f"{name} again" for name in NAMES])  # renamed, not replaced
    assert model.n_classes == 6


def test_unusable_options_are_refused():
    model = tiny_clip()
    with pytest.raises(UserError, match="begin from random vectors, not from 'a photo of a'"):
        CoOp(cfg(WORDS, csc=True), NAMES, model)
    with pytest.raises(UserError, match="'left'; choose end, middle or front"):
        CoOp(cfg(class_position="left"), NAMES, model)
    with pytest.raises(UserError, match="expects 32"):
        CoOp(reference_cfg(ctx_init="", n_ctx=2, precision="fp32", image_size=224), NAMES, model)
    learner = PromptLearner(cfg(class_position="front"), NAMES, model)
    with pytest.raises(UserError, match="shared context before the class name only"):
        learner(torch.randn(1, 64))


class AttributeLearner(Learner):
    """A method of somebody else: words between two contexts, and a shift by the image for each class."""

    def __init__(self, names):
        super().__init__()
        self.shift = torch.nn.Linear(64, 3 * 48)
        self.set_classnames(names)

    def contexts(self, image_features):
        own = self.shift(image_features).view(-1, 1, 3, 48)
        return own * torch.arange(1.0, 1 + len(self.layout.symbols))[:, None, None]

    def set_classnames(self, classnames):
        segments = [Context(1), " coloured ", Context(2), CLASS_NAME, "."]
        self.layout = layout_of_segments(classnames, segments, class_specific=True)


def test_a_learner_of_ones_own():
    model = LearnedPromptCLIP(tiny_clip(), AttributeLearner(NAMES))
    loss = model.forward_features(torch.randn(2, 64), torch.tensor([0, 5]))
    loss.backward()
    assert model.prompt_learner.shift.weight.grad.abs().sum() > 0
    model.set_classnames(NAMES[:3])
    assert model.eval().forward_features(torch.randn(2, 64)).shape == (2, 3)


def test_a_bool_in_ctx_init_is_random_vectors_or_refused():
    clip_model = tiny_clip()
    learner = PromptLearner(cfg(False), NAMES[:2], clip_model)
    assert learner.n_ctx == 4 and learner.ctx.std() < 0.1
    with pytest.raises(UserError, match="CTX_INIT is True, but the words"):
        PromptLearner(cfg(True), NAMES[:2], clip_model)
