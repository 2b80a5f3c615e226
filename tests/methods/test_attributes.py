"""ATPrompt's layout against the dense oracle: attributes between learned contexts, of which the image shifts the last."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close
from tiny_models import IMAGE_SIZE, tiny_clip

from cocoop_fast import CustomCLIP, UserError
from cocoop_fast.clip.tokenizer import encode, tokenizer
from cocoop_fast.methods import CoOp, MetaNetsCLIP
from cocoop_fast.methods.cocoop import reference_cfg
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.reference import DensePromptedCLIP

needs_extension = pytest.mark.skipif(
    CPP.why_unavailable() is not None, reason="the C++ extension is not built"
)
NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit_one", "old dog", "dog"]
WORDS = ("color", "playfulness")  # the second has two tokens
M = 2


def cfg(attributes=WORDS, **options):
    return reference_cfg(
        n_ctx=M, precision="fp32", image_size=IMAGE_SIZE, attributes=attributes, **{"ctx_init": "", **options}
    )


def learned(model):
    return dict(model.prompt_learner.named_parameters())


def models(kind=CustomCLIP, dtype=torch.float32, attributes=WORDS, **engine):
    """The fast model in ``dtype`` and its dense oracle in float64, with the same random parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        clip_model = tiny_clip().to(dtype)
        wide = copy.deepcopy(clip_model).double()
        fast = kind(cfg(attributes), NAMES, clip_model, **engine)
        for parameter in fast.prompt_learner.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    dense = DensePromptedCLIP(
        wide, NAMES, ctx_init="", n_ctx=M, attributes=attributes,
        conditional=kind is not CoOp, meta_nets=kind is MetaNetsCLIP,
    )  # fmt: skip
    dense.prompt_learner.load_state_dict({name: one.detach() for name, one in learned(fast).items()})
    return fast, dense


def compare(fast, dense, tolerance, batch=3):
    random = torch.Generator().manual_seed(7)
    wide = torch.randn(batch, fast.embed_dim, generator=random, dtype=torch.float64)
    label = torch.arange(batch) % len(NAMES)
    loss, logits = fast.loss_and_logits(wide.to(fast.dtype), label)
    expected, wanted = dense.loss_and_logits(wide.to(fast.dtype).double(), label)
    assert_close(logits, wanted, tolerance, "logits")
    assert_close(loss, expected, tolerance, "loss")
    gradients = torch.autograd.grad(loss, list(learned(fast).values()))
    for name, gradient in zip(learned(fast), gradients, strict=True):
        [one] = torch.autograd.grad(expected, [learned(dense)[name]], retain_graph=True)
        assert one.abs().max() > 0
        assert_close(gradient, one, tolerance, f"gradient of {name}")


class TestEquality:
    @pytest.mark.parametrize("kind", [CustomCLIP, CoOp, MetaNetsCLIP])
    def test_in_float64(self, kind):
        compare(*models(kind, torch.float64, backend="torch"), 1e-10)

    @pytest.mark.parametrize("attributes", [("luxury",), ("pattern", "color", "design")])
    def test_of_one_attribute_and_of_three(self, attributes):
        compare(*models(dtype=torch.float64, attributes=attributes, backend="torch"), 1e-10)

    @pytest.mark.parametrize("kind", [CustomCLIP, CoOp])
    @pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_extension)])
    def test_in_float32(self, kind, backend):
        fast, dense = models(kind, backend=backend)
        assert fast.tree_encoder.backend.name == backend  # the tree has the shape that all of them compute
        compare(fast, dense, 2e-5)

    def test_streamed(self):
        fast, dense = models()
        fast.tree_encoder.lower_memory(3)
        compare(fast, dense, 2e-5)

    @pytest.mark.soak
    @pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter computes on the CPU")
    def test_on_triton(self):
        pytest.importorskip("triton.runtime.interpreter")
        compare(*models(backend="triton"), 2e-5, batch=1)

    def test_with_other_classes(self):
        fast, dense = models(dtype=torch.float64, backend="torch")
        fast.set_classnames(NAMES[:3])
        x = torch.randn(2, fast.embed_dim, dtype=torch.float64)
        with torch.no_grad():
            assert_close(fast.logits(x), dense.logits(x)[:, :3], 1e-10, "logits")


class TestLayout:
    def test_every_token_has_its_published_place(self):
        learner = models()[0].prompt_learner
        prompts = learner.tokenized_prompts
        x, start, end = encode("X")[0], tokenizer().sot_token_id, tokenizer().eot_token_id
        words = [x, x, *encode("color"), x, x, *encode("playfulness"), x, x]
        for row, name in zip(prompts.tolist(), NAMES, strict=True):
            own = encode(name.replace("_", " "))
            assert row[: len(words) + len(own) + 3] == [start, *words, *own, *encode("."), end]
        assert len(encode("playfulness")) == 2
        assert learner.layout.n_slots == len(words) == 9

    def test_words_are_embeddings_and_the_image_shifts_the_last_context_alone(self):
        fast, _ = models()
        learner, table = fast.prompt_learner, fast._whole_clip[0].token_embedding.weight
        contexts = learner.contexts(torch.randn(4, fast.embed_dim))
        first, second = (table[list(encode(word))] for word in WORDS)
        expected = [learner.ctx_att1, first, learner.ctx_att2, second, learner.ctx]
        assert torch.equal(contexts.vectors, torch.cat(expected))
        assert not contexts.shift[:, :-M].any()
        assert contexts.shift[:, -M:].abs().amin(dim=(1, 2)).min() > 0
        assert torch.equal(contexts.shift[:, -1], contexts.shift[:, -M])

    def test_of_one_context_for_all_images_a_batch_needs_one_pass(self):
        assert models(CoOp)[0].text_features(torch.randn(4, 32)).shape[0] == 1

    def test_deviations_of_the_random_start_are_the_published_ones(self):
        wide = reference_cfg(
            n_ctx=60, ctx_init="", precision="fp32", image_size=IMAGE_SIZE, attributes=["color"]
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            learner = CoOp(wide, ["cat"], tiny_clip(context_length=160)).prompt_learner
        assert float(learner.ctx_att1.std()) == pytest.approx(0.01, rel=0.1)
        assert float(learner.ctx.std()) == pytest.approx(0.02, rel=0.1)

    def test_the_last_context_may_begin_from_words(self):
        learner = CoOp(cfg(ctx_init="a photo of a"), NAMES, tiny_clip()).prompt_learner
        table = tiny_clip().token_embedding.weight
        assert torch.equal(learner.ctx.detach(), table[list(encode("a photo of a"))].detach())
        assert learner.ctx_att2.shape == learner.ctx.shape

    def test_dense_prompts_have_the_attributes(self):
        fast, dense = models(dtype=torch.float64)
        x = torch.randn(2, fast.embed_dim, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True)
        prompts = fast.prompt_learner(x)
        for image, own in zip(x, prompts, strict=True):
            ctx = dense.prompt_learner.context(image)
            assert torch.allclose(own[:, 1:10], ctx.expand(len(NAMES), -1, -1))
        assert torch.equal(prompts[0, :, 10:], dense.embedding[:, 10:])

    def test_a_moved_or_converted_model_has_the_words_of_its_own(self):
        fast, _ = models()
        copied = copy.deepcopy(fast).double()
        vectors = copied.prompt_learner.vectors()
        assert vectors.dtype == torch.float64
        with torch.no_grad():
            copied._whole_clip[0].token_embedding.weight.add_(1)
        after = copied.prompt_learner.vectors()
        assert torch.equal(after[M], vectors[M] + 1)
        assert torch.equal(fast.prompt_learner.vectors()[M].double(), vectors[M])

    def test_a_state_dict_has_the_contexts_by_the_names_of_their_authors(self):
        fast, _ = models()
        state = fast.prompt_learner.state_dict()
        assert {"ctx", "ctx_att1", "ctx_att2", "token_prefix", "token_suffix"} < set(state)
        other = CustomCLIP(cfg(), NAMES, tiny_clip())
        other.prompt_learner.load_state_dict(state)
        assert torch.equal(other.prompt_learner.ctx_att2, fast.prompt_learner.ctx_att2)


class TestRefusals:
    @pytest.mark.parametrize(
        "options, what",
        [
            ({"csc": True}, "leave out csc"),
            ({"class_position": "middle"}, "leave out the class position middle"),
            ({"attributes": ["color", " "]}, "got ' '"),
            ({"attributes": ["color", "color"]}, "listed twice"),
            ({"attributes": [f"color {n}" for n in range(40)]}, "shorten the name or the context"),
        ],
    )
    def test_says_what_to_do(self, options, what):
        with pytest.raises(UserError, match=what):
            CoOp(cfg(**options), NAMES, tiny_clip())
