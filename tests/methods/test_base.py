"""CustomCLIP against the dense oracle: logits, loss and gradients; modes and errors."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import statistics

import pytest
import torch
from comparison import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import IMAGE_SIZE, tiny_clip, tiny_openai_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.methods import CoOp, ZeroShot
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.reference import DensePromptedCLIP, zero_shot_logits

pytestmark = pytest.mark.filterwarnings("ignore:Classes with the same prompt")

NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit one", "cat"]


def cfg(ctx_init="a photo of a", n_ctx=4):
    return reference_cfg(ctx_init=ctx_init, n_ctx=n_ctx, precision="fp32", image_size=IMAGE_SIZE)


def learned(model):
    return dict(model.prompt_learner.named_parameters())


def pair(clip_model, names, *, ctx_init="", n_ctx=4, seed=0):
    """The fast model and its oracle, with the same random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fast = CustomCLIP(cfg(ctx_init, n_ctx), names, clip_model)
        for parameter in fast.prompt_learner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    dense = DensePromptedCLIP(clip_model, names, ctx_init=ctx_init, n_ctx=n_ctx)
    dense.prompt_learner.load_state_dict({k: v.detach() for k, v in learned(fast).items()})
    return fast, dense


def compare(fast, dense, features, label, tolerance):
    loss, logits = fast.loss_and_logits(features, label)
    expected_loss, expected_logits = dense.loss_and_logits(features.to(dense.dtype), label)
    assert_close(logits, expected_logits, tolerance, "logits")
    assert_close(loss, expected_loss, tolerance, "loss")
    gradients = torch.autograd.grad(loss, list(learned(fast).values()))
    expected = torch.autograd.grad(expected_loss, list(learned(dense).values()))
    assert list(learned(fast)) == list(learned(dense))
    for name, gradient, wanted in zip(learned(fast), gradients, expected, strict=True):
        assert_close(gradient, wanted, tolerance, f"gradient of {name}")


# E as in ViT-B/16, so that the Meta-Net has its 32 hidden units. With the 4 of a narrow model often a single one is
# active, and its gradient, one dot product, may cancel to nothing: then no two float32 computations agree.
E = 512
MODELS = {
    (quick_gelu, dtype): tiny_clip(quick_gelu=quick_gelu, dtype=dtype, layers=2, embed_dim=E)
    for quick_gelu in (True, False)
    for dtype in (torch.float32, torch.float64)
}
words = st.sampled_from(["cat", "tabby cat", "tabby", "dog", "digit zero", "digit", "blue whale", "x"])
class_lists = st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=2, max_size=60)


@settings(max_examples=40, derandomize=True)
@given(class_lists, st.integers(1, 16), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_logits_loss_and_gradients(names, n_ctx, batch, quick_gelu, seed):
    """Both precisions against the oracle in float64, all with the same float32 values."""
    assume(len(set(names)) > 1)  # without a choice, loss and gradients are 0: see the next test
    single, dense = pair(MODELS[quick_gelu, torch.float32], names, n_ctx=n_ctx, seed=seed)
    double, dense = pair(MODELS[quick_gelu, torch.float64], names, n_ctx=n_ctx, seed=seed)
    for model in (double, dense):
        model.prompt_learner.load_state_dict(
            {k: v.detach() for k, v in learned(single).items()}, strict=False
        )
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, E, generator=generator)
    label = torch.randint(len(names), (batch,), generator=generator)
    compare(single, dense, features, label, 2e-5)
    compare(double, dense, features.double(), label, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_class_leaves_nothing_to_learn(dtype):
    model = CustomCLIP(cfg(), ["cat"], MODELS[True, dtype])
    loss, logits = model.loss_and_logits(torch.randn(2, E, dtype=dtype), torch.tensor([0, 0]))
    assert logits.shape == (2, 1) and loss == 0
    for gradient in torch.autograd.grad(loss, list(learned(model).values())):
        assert not gradient.any()


def test_at_the_logit_scale_of_clip_float32_errs_no_more_than_the_dense_computation():
    """Sharp probabilities make p - y, and with it every gradient, ill-conditioned; for both alike."""
    ratios = []
    for seed in range(12):
        models = {
            dtype: tiny_clip(dtype=dtype, layers=2, seed=seed) for dtype in (torch.float32, torch.float64)
        }
        for model in models.values():
            model.logit_scale.fill_(math.log(100))
        fast, dense = pair(models[torch.float32], NAMES[:5], seed=seed)
        _, exact = pair(models[torch.float64], NAMES[:5], seed=seed)
        exact.prompt_learner.load_state_dict({k: v.detach() for k, v in learned(fast).items()})
        features, label = (
            torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)),
            torch.tensor([seed % 5]),
        )
        wanted = ctx_gradient(exact, features.double(), label)
        errors = [(ctx_gradient(m, features, label) - wanted).norm() / wanted.norm() for m in (fast, dense)]
        ratios.append((errors[0] / errors[1]).item())
    assert statistics.median(ratios) <= 1.5, ratios


def ctx_gradient(model, features, label):
    return torch.autograd.grad(model.loss_and_logits(features, label)[0], model.prompt_learner.ctx)[
        0
    ].double()


@pytest.mark.parametrize(
    "clip_model", [tiny_clip(resnet=True, dtype=torch.float64), tiny_openai_clip(dtype=torch.float64)]
)
def test_other_layouts(clip_model):
    fast, dense = pair(clip_model, NAMES, ctx_init="a photo of a")
    image, label = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 4])
    compare(fast, dense, fast.image_encoder(image), label, 1e-10)
    assert_close(fast(image, label), dense(image, label), 1e-10)


def test_mode_of_the_learner_decides_what_comes_back():
    model = CustomCLIP(cfg(), NAMES, tiny_clip())
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 4])
    assert model(image, label).shape == ()
    model.prompt_learner.eval()
    assert model(image).shape == (2, 6)
    assert model.forward_features(model.image_encoder(image)).equal(model(image))


def test_attributes_of_the_reference():
    clip_model = tiny_clip()
    model = CustomCLIP(cfg(), NAMES, clip_model)
    assert model.image_encoder is clip_model.visual
    assert model.logit_scale is clip_model.logit_scale
    assert model.dtype == torch.float32
    assert model.tokenized_prompts.equal(model.prompt_learner.tokenized_prompts)
    prompts = model.prompt_learner(torch.randn(1, 64))
    assert model.text_encoder(prompts[0], model.tokenized_prompts).shape == (6, 64)


def test_the_length_of_image_features_does_not_matter():
    model = CustomCLIP(cfg(), NAMES, tiny_clip()).eval()
    features = torch.randn(3, 64)
    assert_close(model.forward_features(5 * features), model.forward_features(features), 1e-5)


def test_duplicate_classes_keep_their_own_labels():
    model = CustomCLIP(cfg(), NAMES, tiny_clip()).eval()
    logits = model.forward_features(torch.randn(1, 64))
    assert_close(logits[0, 5], logits[0, 0], 1e-6)  # a vectorised dot product may round by position
    model.train()
    one = model.forward_features(torch.randn(1, 64), torch.tensor([5]))
    assert one.isfinite()


def test_coop_equals_its_oracle():
    clip_model = tiny_clip(dtype=torch.float64)
    fast = CoOp(cfg(), NAMES, clip_model)
    dense = DensePromptedCLIP(clip_model, NAMES, conditional=False)
    assert fast.prompt_learner.ctx.equal(dense.prompt_learner.ctx)
    compare(fast, dense, torch.randn(3, 64, dtype=torch.float64), torch.tensor([1, 2, 3]), 1e-10)


@pytest.mark.parametrize("template", ["a photo of a {}.", "{} texture.", "a {}, a type of pet."])
def test_zero_shot_equals_its_oracle(template):
    clip_model = tiny_clip(dtype=torch.float64)
    features = torch.randn(3, 64, dtype=torch.float64)
    fast = ZeroShot(template, NAMES, clip_model).eval()
    expected = zero_shot_logits(clip_model, features, NAMES, template)
    assert_close(fast.forward_features(features), expected, 1e-12)
    assert not list(fast.prompt_learner.parameters())


def test_untrained_prompts_of_words_equal_zero_shot():
    """With the Meta-Net silent, CoCoOp's prompts are those of the template its context spells."""
    clip_model = tiny_clip(dtype=torch.float64)
    model = CustomCLIP(cfg(), NAMES, clip_model).eval()
    torch.nn.init.zeros_(model.prompt_learner.meta_net.linear2.weight)
    torch.nn.init.zeros_(model.prompt_learner.meta_net.linear2.bias)
    features = torch.randn(2, 64, dtype=torch.float64)
    assert_close(model.forward_features(features), zero_shot_logits(clip_model, features, NAMES), 1e-12)


@pytest.mark.parametrize(
    ("features", "label", "message"),
    [
        (torch.zeros(2, 63), torch.tensor([0, 1]), r"E = 64, got \(2, 63\)"),
        (torch.zeros(64), torch.zeros(64, dtype=torch.int64), r"E = 64, got \(64,\)"),
        (
            torch.tensor([[1.0] * 64, [float("nan")] * 64]),
            torch.tensor([0, 1]),
            "NaN or infinite values in row 1",
        ),
        (torch.full((1, 64), float("inf")), torch.tensor([0]), "NaN or infinite values in row 0"),
        (torch.ones(2, 64), torch.tensor([0, 6]), r"must lie in 0\.\.5, got 0\.\.6"),
        (torch.ones(2, 64), torch.tensor([-1, 0]), r"must lie in 0\.\.5, got -1\.\.0"),
        (torch.ones(2, 64), torch.tensor([0]), r"`label` must be \(2,\) integers"),
        (torch.ones(2, 64), torch.tensor([0.0, 1.0]), r"`label` must be \(2,\) integers"),
        (torch.ones(2, 64), None, "label is needed in training mode"),
    ],
)
def test_errors(features, label, message):
    model = CustomCLIP(cfg(), NAMES, tiny_clip())
    with pytest.raises(UserError, match=message):
        model.forward_features(features, label)


def test_a_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(UserError, match=r"must contain \{\} once"):
        ZeroShot("a photo.", NAMES, tiny_clip())


def test_gradients_reach_image_features_and_logit_scale_where_they_are_wanted():
    clip_model = tiny_clip(dtype=torch.float32)
    exact, _ = pair(tiny_clip(dtype=torch.float64), NAMES)
    fast, _ = pair(clip_model, NAMES)
    for p, q in zip(fast.prompt_learner.parameters(), exact.prompt_learner.parameters(), strict=True):
        q.data.copy_(p.data)
    label, features = torch.tensor([1, 3]), torch.randn(2, 64)
    found = []
    for model in (fast, exact):
        model.logit_scale.requires_grad_()
        leaf = features.to(model.dtype).requires_grad_()
        loss = model.forward_features(leaf, label)
        found.append(torch.autograd.grad(loss, [leaf, model.logit_scale]))
    for gradient, wanted in zip(*found, strict=True):
        assert_close(gradient, wanted, 2e-5)


def saved_bytes(model, image, label):
    """Of the tensors that a step keeps for its backward pass, by storage; and the loss."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(image, label)
    return sum(storages.values()), loss


def test_a_model_as_it_was_loaded_keeps_nothing_of_the_image_tower_and_trains_the_learner_alone():
    """open_clip and OpenAI's package return weights that ask for gradients."""
    image, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 3, 4])
    loaded = tiny_clip().requires_grad_(True)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    model = CustomCLIP(cfg(), NAMES, loaded)
    kept, loss = saved_bytes(model, image, label)
    features = model.image_encoder(image)
    assert features.grad_fn is None
    assert kept == saved_bytes(model.forward_features, features, label)[0]

    loss.backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {
        "prompt_learner"
    }
    # As the reference's, the list is of all that there is, so an optimizer may be given it.
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {"prompt_learner", "image_encoder", "text_encoder", "logit_scale"}
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert all(value.equal(before[name]) for name, value in loaded.state_dict().items())


def test_what_is_unfrozen_afterwards_and_an_image_that_asks_get_gradients():
    image, label = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    model = CustomCLIP(cfg(), NAMES, tiny_clip().requires_grad_(True))
    model.image_encoder.ln_post.requires_grad_(True)
    model(image.requires_grad_(), label).backward()
    found = {name for name, p in model.image_encoder.named_parameters() if p.grad is not None}
    assert found == {"ln_post.weight", "ln_post.bias"}
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_inference_mode_leaves_a_model_that_trains(backend):
    """What a pass keeps for later ones is made outside of it, whichever comes first, also where buffers grow in it."""
    clip = tiny_clip(layers=2)
    features, label = torch.randn(4, 64), torch.tensor([0, 1, 2, 3])
    wanted = CustomCLIP(cfg(), NAMES, clip, backend="torch").eval()
    model = CustomCLIP(cfg(), NAMES, clip, backend=backend)
    model.prompt_learner.load_state_dict(wanted.prompt_learner.state_dict())
    for batch in (1, 4, 2):
        model.eval()
        with torch.inference_mode():
            logits = model.forward_features(features[:batch])
        assert_close(logits.clone(), wanted.forward_features(features[:batch]).detach(), 2e-5)
        with torch.no_grad():
            model.forward_features(features[:1])
        model.train().forward_features(features[:batch], label[:batch]).backward()


@pytest.mark.parametrize("used", [False, True])
def test_copies_and_pickles(used):
    model = CustomCLIP(cfg(), NAMES, tiny_clip(layers=2), memory_budget="100MB")
    features, label = torch.randn(2, 64), torch.tensor([0, 3])
    if used:
        model.forward_features(features, label).backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.forward_features(features, label), model.forward_features(features, label))
        with torch.no_grad():
            twin.prompt_learner.ctx.normal_()  # its own
        assert not torch.equal(
            twin.forward_features(features, label), model.forward_features(features, label)
        )


def test_labels_may_be_strided_and_of_any_integer_type():
    model = CustomCLIP(cfg(), NAMES, tiny_clip(layers=2))
    features, table = torch.randn(3, 64), torch.tensor([[0, 9], [3, 9], [4, 9]])
    expected = model.forward_features(features, table[:, 0].contiguous())
    for label in (table[:, 0], table[:, 0].int(), table[:, 0].to(torch.uint8)):
        assert torch.equal(model.forward_features(features, label), expected)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_around_the_model_the_image_tower_alone_is_compiled_once(backend, caplog):
    """The same loss and gradients, nothing ignored or warned of, and no step after the first compiles again."""
    model = CustomCLIP(cfg(), NAMES, MODELS[True, torch.float32], backend=backend)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 3])
    parameters = list(learned(model).values())
    loss = model(image, label)
    wanted = torch.autograd.grad(loss, parameters)
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counted)
    for step in range(3):
        assert_close(compiled(image, label), loss, 2e-5)
        gradients = torch.autograd.grad(compiled(image, label), parameters)
        for gradient, expected in zip(gradients, wanted, strict=True):
            assert_close(gradient, expected, 2e-5)
        if step == 0:
            count = len(graphs)
    assert len(graphs) == count >= 1
    text = "".join(str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert "conv2d" in text or "conv1" in text
    gc.collect()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
