"""Prompts of every layout: their tokens, the rows that they need, and their features against the dense oracle."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_clip, tiny_openai_clip
from torch.utils._python_dispatch import TorchDispatchMode

from cocoop_fast import ClassTree, TreeTextEncoder, UserError, reference
from cocoop_fast.clip.tokenizer import tokenizer
from cocoop_fast.engine.pieces import ROWS_PER_INFERENCE_PASS
from cocoop_fast.ops.path_attention import path_attention_ref
from cocoop_fast.ops.tree_attention import tree_attention_ref
from cocoop_fast.prompts.layout import CLASS_NAME, Context, PromptLayout, layout_at, layout_of_segments
from cocoop_fast.prompts.tokens import tokenize_prompts

pytestmark = pytest.mark.filterwarnings("ignore:Classes with the same prompt")

NAMES = ["cat", "tabby cat", "tabby", "digit zero", "digit one", "digit zero zero", "cat"]
LENGTHS = [1, 2, 1, 2, 2, 3, 1]  # tokens
DISTINCT = 6  # names
NAME_NODES = 7  # of their prefix tree: cat, tabby, tabby cat, digit, digit zero, digit one, digit zero zero
POSITIONS = ["end", "middle", "front"]
SHAPES = ["(M,d)", "(B,M,d)", "(K,M,d)", "(B,K,M,d)"]
B, D = 3, 48


def least_rows(position: str, class_specific: bool, m: int) -> int:
    """Rows of one context, derived by hand: those with a context vector at or before them, once each.

    The full stop and EOT follow the name and the context; what follows a context vector after the name, or one
    of the class's own, belongs to that class alone.
    """
    if position == "middle" and m == 1:
        position = "front"  # no vector goes before the name
    if class_specific:
        names = 0 if position == "front" else sum(LENGTHS)
        return len(NAMES) * (m + 2) + names
    if position == "end":
        return m + NAME_NODES + DISTINCT * 2
    if position == "middle":
        return m // 2 + NAME_NODES + DISTINCT * (m - m // 2 + 2)
    return DISTINCT * (m + 2)


def contexts(shape: str, m: int, seed: int = 0) -> torch.Tensor:
    sizes = {"(M,d)": (), "(B,M,d)": (B,), "(K,M,d)": (len(NAMES),), "(B,K,M,d)": (B, len(NAMES))}[shape]
    generator = torch.Generator().manual_seed(seed)
    ctx = torch.randn(*sizes, m, D, generator=generator, dtype=torch.float64)
    return (0.5 * ctx).requires_grad_()


def dense(model, prompts, shape, ctx, position, deep=()):
    """Features in the shape that the encoder gives them, one image after the other, by reference.py."""
    embedding = model.token_embedding(prompts.tokens).to(ctx.dtype)
    places = reference.context_places(prompts.n_ctx, prompts.name_lens, position)

    def encode(one, *deep_of_one):
        own = [x.expand(len(embedding), -1, -1) for x in (one, *deep_of_one)]
        placed = reference.place_contexts(embedding, own[0], prompts.name_lens, position)
        return reference.encode_prompts(model, placed, prompts.tokens, own[1:], places)

    if not shape.startswith("(B"):
        return encode(ctx, *deep)
    return torch.stack([encode(*one) for one in zip(ctx, *deep, strict=True)])


class RowsOfMLPs(TorchDispatchMode):
    """Counts the rows that enter each layer's MLP, which is four times as wide as the tower."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.addmm.default and out.shape[1] == 4 * args[1].shape[1]:
            # On the meta device the tower asks itself how much memory it needs.
            self.rows += [len(out)] if out.device.type == "cpu" else []
        return out


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [1, 4, 5])
def test_features_gradients_and_rows(shape, position, m):
    model = tiny_clip(dtype=torch.float64)
    prompts = tokenize_prompts(NAMES, n_ctx=m)
    class_specific = "K" in shape
    tree = ClassTree.from_layout(layout_at(prompts, position, class_specific=class_specific))
    ctx = contexts(shape, m)
    encoder = TreeTextEncoder(model, tree, backend="torch")
    encoder(ctx)  # the constants are computed once
    with RowsOfMLPs() as counted:
        features = encoder(ctx)
    expected = dense(model, prompts, shape, ctx, position)
    assert_close(features, expected, 1e-10, "features")
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((features * probe).sum(), ctx)
    (wanted,) = torch.autograd.grad((expected * probe).sum(), ctx)
    assert_close(gradient, wanted, 1e-10, "gradient of ctx")

    passes = B if shape.startswith("(B") else 1  # a context that is the same for all images is encoded once
    rows = passes * least_rows(position, class_specific, m)
    leaves = passes * (len(NAMES) if class_specific else DISTINCT)  # all that is read of the last layer
    print(f"{shape} {position}, M = {m}: {rows} rows a step; dense: {passes * len(NAMES) * 77}")
    assert counted.rows == [rows, rows, leaves]


words = st.sampled_from(["cat", "dog", "tabby", "blue whale", "digit", "zero", "of", "(x)", "photo", "42"])
class_lists = st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=1, max_size=30)


@settings(max_examples=60)
@given(class_lists, st.integers(1, 6), st.sampled_from(POSITIONS), st.booleans())
def test_no_row_is_there_twice_or_for_nothing(names, m, position, class_specific):
    layout = layout_at(tokenize_prompts(names, n_ctx=m), position, class_specific=class_specific)
    tree = ClassTree.from_layout(layout)
    prefixes, constants = set(), set()
    for k, row in enumerate(layout.symbols.tolist()):
        row = row[: row.index(max(row)) + 1]
        own = [(s, k) if s < 0 and class_specific else s for s in row]
        for end in range(2, len(row) + 1):
            (prefixes if min(row[:end]) < 0 else constants).add(tuple(own[:end]))
    assert (tree.rows, len(tree.constants)) == (len(prefixes), len(constants))
    n = torch.arange(len(tree))
    for node in range(len(tree)):
        readers = (tree.path == node).any(dim=1)
        assert readers.equal((n >= node) & (n < tree.subtree_end[node]))


def test_positions_are_those_of_the_reference():
    """The name's tokens as they are with the full stop behind them: ")." is one token, and moves with the name."""
    prompts = tokenize_prompts(["crane (bird)", "cat"], n_ctx=3)
    ids = tokenizer().encode("crane (bird).")
    sos, eot = tokenizer().sot_token_id, tokenizer().eot_token_id
    assert prompts.name_lens[0] == len(ids) == 4
    middle, front = (layout_at(prompts, p).symbols for p in ("middle", "front"))
    assert middle[0, :9].tolist() == [sos, -1, *ids, -2, -3, eot]
    assert front[0, :9].tolist() == [sos, *ids, -1, -2, -3, eot]
    cat, stop = tokenizer().encode("cat.")
    assert middle[1, :8].tolist() == [sos, -1, cat, -2, -3, stop, eot, 0]
    end = ClassTree.from_layout(layout_at(prompts))
    standard = ClassTree(prompts.tokens, 3)
    assert end.is_standard and standard.is_standard
    for name in ("token", "parent", "depth", "subtree_end", "eot"):
        assert getattr(end, name).equal(getattr(standard, name)), name


SEGMENTS = [
    [Context(2), " of ", Context(2), CLASS_NAME, "."],
    ["a photo of ", Context(3), CLASS_NAME, "."],
    ["the ", CLASS_NAME, ", ", Context(2), " or ", CLASS_NAME, Context(1)],
]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("class_specific", [False, True])
def test_segments(segments, class_specific):
    """Each prompt written out symbol by symbol, and its embeddings encoded densely."""
    model = tiny_clip(dtype=torch.float64)
    layout = layout_of_segments(NAMES, segments, class_specific=class_specific)
    ctx = contexts("(B,K,M,d)" if class_specific else "(B,M,d)", layout.n_slots)
    features = TreeTextEncoder(model, ClassTree.from_layout(layout))(ctx)
    per_image = []
    for one in ctx:
        own = one.expand(len(NAMES), -1, -1)
        prompts = []
        for row, vectors in zip(layout.symbols, own, strict=True):
            words = model.token_embedding(row.clamp(min=0))
            prompts.append(torch.where(row[:, None] < 0, vectors[(-1 - row).clamp(min=0)], words))
        tokens = layout.symbols.clamp(min=0)
        per_image.append(reference.encode_prompts(model, torch.stack(prompts), tokens))
    expected = torch.stack(per_image)
    assert_close(features, expected, 1e-10, "features")
    (gradient,) = torch.autograd.grad(features.square().sum(), ctx)
    (wanted,) = torch.autograd.grad(expected.square().sum(), ctx)
    assert_close(gradient, wanted, 1e-10, "gradient of ctx")


def test_segments_are_tokenized_as_they_are_joined():
    layout = layout_of_segments(["blue_whale"], [Context(4), CLASS_NAME, "."])
    expected = tokenize_prompts(["blue whale"], n_ctx=4).tokens
    expected[:, 1:5] = torch.tensor([-1, -2, -3, -4])
    assert layout.symbols.equal(expected)
    assert len(ClassTree.from_layout(layout_of_segments(NAMES, SEGMENTS[1])).constants) == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("model", [tiny_clip(dtype=torch.float64), tiny_openai_clip(dtype=torch.float64)])
def test_deep_prompts(shape, position, model):
    prompts = tokenize_prompts(NAMES, n_ctx=3)
    tree = ClassTree.from_layout(layout_at(prompts, position, class_specific="K" in shape))
    rows = [contexts(shape, 3, seed) for seed in range(3)]
    ctx, *deep = rows
    features = TreeTextEncoder(model, tree)(ctx, deep)
    expected = dense(model, prompts, shape, ctx, position, deep)
    assert_close(features, expected, 1e-10, "features")
    gradients = torch.autograd.grad(features.square().sum(), rows)
    wanted = torch.autograd.grad(expected.square().sum(), rows)
    for layer, pair in enumerate(zip(gradients, wanted, strict=True)):
        assert_close(*pair, 1e-10, f"gradient of the prompt of layer {layer}")


def test_deep_prompts_go_through_the_tower_of_plain_contexts(monkeypatch):
    model = tiny_clip()
    tree = ClassTree(tokenize_prompts(NAMES, n_ctx=3).tokens, 3)
    encoder = TreeTextEncoder(model, tree)
    ctx, deep = (contexts("(B,M,d)", 3, seed).float().detach() for seed in range(2))
    slow = TreeTextEncoder(model, tree, backend="torch")
    expected, deeper = slow(ctx), slow(ctx, [deep])
    assert (deeper - expected).abs().max() > 1e-2
    if encoder.backend.name != "torch":
        monkeypatch.delattr("cocoop_fast.engine.torch_tower.TorchTower.encode")
    assert_close(encoder(ctx), expected, 1e-5)
    assert_close(encoder(ctx, [deep]), deeper, 1e-5)


@settings(max_examples=25)
@given(class_lists, st.integers(1, 5), st.integers(0, 99))
def test_both_attentions_agree(names, m, seed):
    """Where both serve: the attention along paths is the attention of the tree."""
    tree = ClassTree(tokenize_prompts(names, n_ctx=m).tokens, m)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, tree.rows, 3, 4, generator=generator, dtype=torch.float64)
    sos_k, sos_v = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    o = path_attention_ref(q, k, v, sos_k[None], sos_v[None], tree.row_paths)
    assert_close(o, tree_attention_ref(q, k, v, sos_k, sos_v, tree), 1e-13, "all rows")
    q = q[:, m + tree.leaves]
    o = path_attention_ref(q, k, v, sos_k[None], sos_v[None], tree.row_paths, leaves=True)
    assert_close(o, tree_attention_ref(q, k, v, sos_k, sos_v, tree, tree.leaves), 1e-13, "leaves")


def test_groups_without_gradients():
    model = tiny_clip(dtype=torch.float64)
    tree = ClassTree.from_layout(layout_at(tokenize_prompts(NAMES, n_ctx=3), "middle"))
    encoder = TreeTextEncoder(model, tree)
    ctx, deep = (contexts("(B,M,d)", 3, seed).detach() for seed in range(2))
    expected = encoder(ctx, [deep])
    times = 2 * ROWS_PER_INFERENCE_PASS["cpu"] // (len(ctx) * tree.rows)  # two groups
    features = encoder(ctx.repeat(times, 1, 1), [deep.repeat(times, 1, 1)])
    assert_close(features, expected.repeat(times, 1, 1), 1e-13)


def test_a_fast_backend_that_cannot_serve_a_layout_says_so():
    model = tiny_clip()
    tree = ClassTree.from_layout(layout_at(tokenize_prompts(NAMES, n_ctx=3), "front"))
    assert TreeTextEncoder(model, tree).backend.name == "torch"
    with pytest.warns(UserWarning, match="this layout is computed by 'torch'"):
        encoder = TreeTextEncoder(model, tree, backend="cpu")
    assert encoder(contexts("(M,d)", 3).float()).shape == (len(NAMES), 64)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (["a photo of ", CLASS_NAME], "needs a learnable context"),
        ([Context(0), CLASS_NAME], "needs a learnable context"),
        ([Context(2), "."], "needs the class name"),
        ([Context(80), CLASS_NAME], "has 83 tokens .* but the model reads 77"),
    ],
)
def test_unusable_layouts_are_refused(segments, message):
    with pytest.raises(UserError, match=message):
        layout_of_segments(["cat"], segments)


@pytest.mark.parametrize("names", [[], "cat", ["cat", "_"]])
def test_unusable_class_lists_are_refused(names):
    with pytest.raises(UserError, match=r"class list|empty name"):
        layout_of_segments(names, [Context(1), CLASS_NAME])


def test_wrong_shapes_are_refused():
    model = tiny_clip()
    prompts = tokenize_prompts(NAMES, n_ctx=3)
    encoder = TreeTextEncoder(model, ClassTree.from_layout(layout_at(prompts, class_specific=True)))
    with pytest.raises(
        UserError, match=r"\(K, M, d\) or \(B, K, M, d\) tensor with \(K, M, d\) = \(7, 3, 48\)"
    ):
        encoder(torch.zeros(3, 48))
    with pytest.raises(
        UserError, match=r"`deep` has 3 prompts, but a text tower of 3 layers takes at most 2"
    ):
        encoder(torch.zeros(7, 3, 48), [torch.zeros(7, 3, 48)] * 3)
    with pytest.raises(UserError, match="deep prompt of layer 2 must be floating-point and of the shape"):
        encoder(torch.zeros(7, 3, 48), [torch.zeros(7, 3, 48), torch.zeros(3, 48)])
    long = PromptLayout(layout_at(prompts).symbols, 3)
    with pytest.raises(UserError, match="reads 6"):
        TreeTextEncoder(tiny_clip(context_length=6), ClassTree.from_layout(long))
