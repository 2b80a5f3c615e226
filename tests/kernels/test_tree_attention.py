"""Tree attention in Triton against its torch twin in float64, between guard regions; its plan against the tree."""

import dataclasses
import sys

import pytest
import torch
from attention_cases import MODES, AttentionCase, grouped, random_names, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoop_fast.kernels.tree_attention_plan import QUERIES, SLOTS, plan_attention

tree_attention = pytest.importorskip("cocoop_fast.kernels.tree_attention")

NAMES = {
    "one empty name": [[]],
    "a name is a prefix of another": [[3], [3, 4], [3, 4, 5], [2], [2]],
    "one shared beginning": [[1, 1, k] for k in range(1, 40)],  # a row that many tiles read
    "deep": [[1] * 40, [1] * 17 + [2], [2] * 15],  # more keys than a chunk has slots
    "branching": random_names(13, 3, 5, seed=2),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(
    names="branching",
    mode="middle layer",
    *,
    n_ctx=4,
    batch=1,
    heads=1,
    head_size=16,
    dtype=torch.float32,
    **options,
):
    tree = tree_of(NAMES[names] if isinstance(names, str) else names, n_ctx)
    options |= MODES[mode]
    return AttentionCase(tree_attention, tree, batch, heads, head_size, dtype, DEVICE, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", NAMES)
def test_trees(names, mode):
    make(names, mode, batch=2 if names == "branching" else 1).check()


@pytest.mark.parametrize(
    "n_ctx, heads, head_size",
    [
        (1, 2, 32),
        (2, 1, 64),
        (3, 1, 80),  # no power of two
        (2, 1, 128),
        (32, 1, 24),  # the context alone fills a chunk; a head smaller than any block
        (1, 3, 7),  # nothing is a multiple of anything
    ],
)
def test_shapes(dtype, n_ctx, heads, head_size):
    names = [[1, 2], [1, 2, 3], [2]]
    make(names, n_ctx=n_ctx, heads=heads, head_size=head_size, dtype=dtype).check()


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_in_every_layer(dtype, mode):
    make(mode=mode, dtype=dtype).check()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_buffers_of_their_own(mode):
    make(mode=mode, batch=2, apart=True).check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", ["branching", "deep"])
def test_rows_of_two_tensors_by_a_load_from_each(names, mode, monkeypatch):
    """As on AMD's GPUs; the same bits as by one load."""
    one_load = make(names, mode).results()
    monkeypatch.setattr(tree_attention, "ONE_LOAD", False)
    case = make(names, mode)
    case.check()
    for ours, theirs in zip(case.results(), one_load, strict=True):
        assert torch.equal(ours, theirs)


def test_a_row_with_more_partial_sums_than_are_added_at_a_time():
    names = random_names(400, 8, 5, seed=2)
    plan = plan_attention(tree_of(names, 1), None, DEVICE)
    assert int(plan.summed_start.diff().max()) > tree_attention.SUM_PARTIALS
    make(names, n_ctx=1, head_size=8).check()


@pytest.mark.parametrize("batch, strides", [(3, (2**30, 256)), (1, (2**32, 2**28))])
def test_rows_further_apart_than_32_bits_count(batch, strides):
    """Each stride fits in 32 bits; the offsets of the last image, and of the last rows, do not."""
    near = make([[1, 2], [2], [3]], n_ctx=9, batch=batch, head_size=8, dtype=torch.float16)
    shape = (batch, near.tree.rows, 8 * near.d)
    # Memory that is not touched is never there.
    far = torch.empty_strided(shape, (*strides, 1), dtype=torch.float16, device=DEVICE)
    q, k, v, o, grad_o, dq, dk, dv = far.split(near.d, -1)
    for there, here in ((q, near.q), (k, near.k), (v, near.v), (grad_o, near.grad_o)):
        there.copy_(here)
    inputs = (q, k, v, *near.inputs[3:])
    near.attention.forward(inputs, o)
    workspace = torch.empty(near.attention.workspace_floats(batch, 1, 8), device=DEVICE)
    near.attention.backward(grad_o, inputs, dq, dk, dv, workspace)
    for there, here in zip((o, dq, dk, dv), near.results(), strict=True):
        assert torch.equal(there, here)


@settings(max_examples=6)
@given(
    names=st.lists(st.lists(st.integers(1, 3), max_size=12), min_size=1, max_size=12),
    n_ctx=st.integers(1, 32),
    mode=st.sampled_from(list(MODES)),
    seed=st.integers(0, 2**16),
)
def test_any_tree(names, n_ctx, mode, seed):
    make(names, mode, n_ctx=n_ctx, head_size=8, seed=seed).check()


def test_same_bits_every_time():
    case = make("one shared beginning")
    first = case.results()
    for once, again in zip(first, case.results(), strict=True):
        assert torch.equal(once, again)


def test_results_do_not_depend_on_the_other_images():
    case = make(batch=2)
    among = case.results()
    case.q, case.k, case.v, case.grad_o = (x[1:2] for x in (case.q, case.k, case.v, case.grad_o))
    case.inputs, case.batch = (case.q, case.k, case.v, *case.inputs[3:]), 1
    for one, alone in zip(among, case.results(), strict=True):
        assert torch.equal(one[1:2], alone)


def test_nan_goes_where_it_is_read():
    case = make([[1, 2], [1, 3], [2]])
    node = 1  # the second node: [1, 2]
    case.k[0, case.m + node, 3] = torch.nan
    touched = case.forward().isnan().any(-1)[0]
    descendants = range(case.m + node, case.m + int(case.tree.subtree_end[node]))
    assert touched.nonzero().flatten().tolist() == list(descendants)


def test_large_scores_are_stable():
    case = make()
    case.q.mul_(300)
    error = (case.forward().cpu() - case.expected()[0].detach()).abs().max()
    assert float(error) < 1e-2  # scores of 1e4 have an error of 1e-3


def test_no_images():
    case = make(batch=0)
    assert case.forward().shape == (0, case.tree.rows, case.d)
    case.backward()


def test_launches(monkeypatch):
    """One forward; backward one for the tiles, and one for the rows that several tiles read."""
    launched = []
    for name in ("tree_attention_fwd_kernel", "tree_attention_bwd_kernel", "sum_partials_kernel"):
        monkeypatch.setattr(tree_attention, name, Recorder(getattr(tree_attention, name), launched))
    many, one_tile = make(), make([[1]])
    for call, names in (
        (many.forward, ["tree_attention_fwd"]),
        (many.backward, ["tree_attention_bwd", "sum_partials"]),
        (one_tile.backward, ["tree_attention_bwd"]),
    ):
        launched.clear()
        call()
        assert [kernel for kernel, *_ in launched] == names


@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
def test_every_launch_is_a_variant_that_is_compiled_for_every_target(monkeypatch, head_size):
    launched = []
    for name in ("tree_attention_fwd_kernel", "tree_attention_bwd_kernel", "sum_partials_kernel"):
        monkeypatch.setattr(
            tree_attention, name, Recorder(getattr(tree_attention, name), launched, run=False)
        )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for names in ("branching", "deep"):
            case = make(names, "last layer", head_size=head_size, dtype=dtype)
            o = torch.zeros_like(case.grad_o)
            case.attention.forward(case.inputs, o)
            workspace = torch.empty(case.attention.workspace_floats(1, 1, head_size), device=DEVICE)
            keys = torch.zeros_like(case.k), torch.zeros_like(case.k)
            case.attention.backward(case.grad_o, case.inputs, o, *keys, workspace)
    forms = {
        (v.kernel_name, next(iter(v.signature.values())), frozenset(v.constexprs.items()), v.num_warps)
        for v in tree_attention.VARIANTS
        if v.constexprs.get("HEAD_SIZE", head_size) == head_size and v.kernel_name != "sum_partials"
    }
    assert {form for form in launched if form[0] != "sum_partials"} == forms


class Recorder:
    """Notes a kernel's launches, as (name, type of its first pointer, constexprs, warps), and does them."""

    def __init__(self, kernel, launched, *, run=True):
        self.kernel, self.launched, self.run = kernel, launched, run

    def __getitem__(self, grid):
        def launch(first, *arguments, num_warps, num_stages, **constexprs):
            kinds = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
            name = self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
            self.launched.append((name, kinds[first.dtype], frozenset(constexprs.items()), num_warps))
            if self.run:
                self.kernel[grid](first, *arguments, num_warps=num_warps, num_stages=num_stages, **constexprs)

        return launch


# The plan


def visible_rows(plan):
    """For each query, the rows of the keys that it sees, SOS as -1; and all slots (row, partial) in order."""
    seen, slots = [], []
    bounds = zip(plan.tile_query.tolist(), plan.tile_query[1:].tolist(), strict=False)
    for tile, (begin, end) in enumerate(bounds):
        first, last = plan.tile_chunk[tile : tile + 2].tolist()
        rows = plan.slot_row[first:last].flatten().tolist()
        for query in range(QUERIES):
            words = plan.visible[first:last, query].tolist()
            bits = [word >> slot & 1 for word in words for slot in range(SLOTS)]
            keys = sorted(row for row, bit in zip(rows, bits, strict=True) if bit)
            if begin + query < end:
                seen.append(keys)
            else:
                assert keys == [-1]  # a query that is none sees something, so that its softmax is defined
        slots += zip(rows, plan.slot_partial[first:last].flatten().tolist(), strict=True)
    return seen, slots


@settings(max_examples=60)
@given(
    names=st.lists(st.lists(st.integers(1, 4), max_size=30), min_size=1, max_size=60),
    n_ctx=st.integers(1, 32),
    leaves=st.booleans(),
)
def test_plan(names, n_ctx, leaves):
    tree = tree_of(names, n_ctx)
    plan = plan_attention(tree, tree.leaves if leaves else None, "cpu")
    paths = [[n_ctx + node for node in path if node >= 0] for path in tree.path.tolist()]
    of_nodes = [[-1, *range(n_ctx), *path] for path in paths]
    of_context = [[-1, *range(m + 1)] for m in range(n_ctx)]
    expected = [of_nodes[leaf] for leaf in tree.leaves] if leaves else of_context + of_nodes
    seen, slots = visible_rows(plan)
    assert seen == expected
    assert plan.one_chunk == (plan.tiles == len(plan.slot_row))

    # Each slot of a row is its only one, or has a partial; a row's partials are a range, in the order of the tiles.
    of_rows = {row: [partial for key, partial in slots if key == row] for row in range(tree.rows)}
    starts = plan.summed_start.tolist()
    ranges = dict(zip(plan.summed_row.tolist(), map(range, starts[:-1], starts[1:]), strict=True))
    for row, partials in of_rows.items():
        assert partials == list(ranges[row]) if row in ranges else partials == [-1]
    assert plan.partials == starts[-1]
    assert plan.summed_context == sum(row < n_ctx for row in ranges)


def test_a_plan_is_made_without_python_for_each_row():
    """Pruning makes one at every step."""

    def calls(count):
        tree, seen = tree_of([[1 + k // 20, 1 + k % 20] for k in range(count)]), []
        sys.setprofile(lambda frame, event, argument: seen.append(event))
        try:
            plan_attention(tree, None, "cpu")
        finally:
            sys.setprofile(None)
        return len(tree), len(seen)

    (few, before), (many, after) = calls(20), calls(380)
    assert many - few == 738
    assert after - before < 738 / 2  # some for each tile


def test_a_plan_goes_to_the_device_at_once():
    plan = plan_attention(tree_of(NAMES["deep"]), None, "cpu")
    tensors = [one for one in vars(plan).values() if isinstance(one, torch.Tensor)]
    assert len(tensors) == 7 and len({one.untyped_storage().data_ptr() for one in tensors}) == 1
    assert all(one.is_contiguous() and one.storage_offset() * one.itemsize % 16 == 0 for one in tensors)


def test_tiles_are_full_and_mostly_closed():
    """Class names of three tokens: no tile cuts one of them, and most have their sixteen queries nearly full."""
    tree = tree_of([[k, 1, 2] for k in range(1, 90)])
    plan = plan_attention(tree, None, "cpu")
    assert plan.queries / plan.tiles > 0.7 * QUERIES
    assert plan.summed_row.tolist() == list(range(tree.n_ctx))


def test_rows_that_nobody_reads_have_no_gradient():
    tree = tree_of([[1, 2], [2], [3]])
    attention = tree_attention.TreeAttention(tree, tree.leaves[:1], DEVICE)
    rows = torch.randn(3, 1, tree.rows, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, dq = rows[0, :, :1].contiguous(), torch.empty(1, 1, 8, device=DEVICE)
    dk, dv = torch.full_like(rows[:2], torch.nan)
    sos = torch.ones(8, device=DEVICE)
    attention.backward(
        q,
        (q, rows[1], rows[2], sos, sos, 1),
        dq,
        dk,
        dv,
        torch.empty(attention.workspace_floats(1, 1, 8), device=DEVICE),
    )
    read = tree.n_ctx + int(tree.leaves[0]) + 1
    for gradient in (dk, dv):
        assert gradient[:, :read].any(-1).all()
        assert not gradient[:, read:].any()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: plan.visible[-1, 0].__ior__(1 << 8),  # one query sees a key too many
        lambda plan: plan.summed_start[1:].sub_(1),  # a partial is added to another row
        lambda plan: plan.slot_row[0, 2].sub_(1),  # a key is another row's
    ],
)
def test_a_wrong_plan_is_noticed(spoil):
    case = make([[1, 2, k] for k in range(1, 20)])
    case.check()
    case.attention.plan = dataclasses.replace(
        case.attention.plan,
        **{
            name: getattr(case.attention.plan, name).clone()
            for name in ("visible", "summed_start", "slot_row")
        },
    )
    spoil(case.attention.plan)
    with pytest.raises(AssertionError):
        case.check()


# What is refused, and how


@pytest.mark.parametrize(
    "queries, message",
    [
        ([0, 9], r"`queries` must be nodes 0 .. 4, got 0 .. 9"),
        ([-1], r"`queries` must be nodes 0 .. 4, got -1 .. -1"),
        ([1, 0], "`queries` must be strictly ascending"),
        ([1, 1], "`queries` must be strictly ascending"),
        ([[1]], r"`queries` must be \(Q,\) integers, got torch.int64 of shape \(1, 1\)"),
        ([1.0], r"`queries` must be \(Q,\) integers, got torch.float32"),
        ([], "`queries` must be strictly ascending nodes, at least one"),
    ],
)
def test_bad_queries(queries, message):
    kind = None if queries else torch.int64
    with pytest.raises(ValueError, match=message):
        tree_attention.TreeAttention(tree_of([[1, 2], [2]]), torch.tensor(queries, dtype=kind), DEVICE)


@pytest.mark.parametrize("parent", [[-1, 1], [-1, 0, -1, 0], [-1, -2]])
def test_bad_trees(parent):
    class Tree:
        n_ctx = 1

    Tree.parent = torch.tensor(parent)
    with pytest.raises(ValueError, match="`parent` must be a tree in depth-first order, got parent"):
        tree_attention.TreeAttention(Tree)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 9, 15)}, r"`q` must have shape \(2, 9, 16\), got \(2, 9, 15\)"),
        ({"k": torch.zeros(2, 8, 16)}, r"`k` must have shape \(2, 9, 16\)"),
        ({"v": (torch.zeros(3, 4, 16), torch.zeros(5, 16))}, r"`v_ctx` must have shape \(2, 4, 16\)"),
        ({"v": (torch.zeros(2, 4, 16), torch.zeros(4, 16))}, r"`v_node` must have shape \(1, 5, 16\)"),
        ({"q": torch.zeros(2, 16, 9).mT}, "`q` must be contiguous in its last dimension"),
        ({"q": torch.zeros(2, 9, 16).half()}, "`q` is torch.float16, other arguments torch.float32"),
        ({"sos_k": torch.zeros(15)}, r"`sos_k` must be contiguous of shape \(16,\)"),
        ({"heads": 3}, "`heads` must divide the width 16, got 3"),
        ({"heads": 0}, "`heads` must divide the width 16, got 0"),
        ({"o": torch.zeros(2, 8, 16)}, r"`o` must have shape \(2, 9, 16\)"),
        ({"o": torch.zeros(2, 9, 16).double()}, "`o` must be float16, bfloat16 or float32"),
        ({"o": torch.zeros(9, 16)}, r"`o` must have shape \(B, rows, d\)"),
        ({"k": torch.zeros(2, 9, 16, device="meta")}, "`k` is on meta, other arguments on"),
    ],
)  # fmt: skip
def test_bad_forward_arguments(change, message):
    attention = tree_attention.TreeAttention(tree_of([[1, 2], [2]]))
    rows, sos = torch.zeros(2, 9, 16), torch.zeros(16)
    good = {"q": rows, "k": rows, "v": rows, "sos_k": sos, "sos_v": sos, "heads": 2, "o": rows.clone()}
    with pytest.raises(ValueError, match=message):
        attention.forward(**grouped({**good, **change}))


def test_heads_that_no_block_takes():
    attention = tree_attention.TreeAttention(tree_of([[1]]))
    rows, sos = torch.zeros(1, 6, 129), torch.zeros(129)
    with pytest.raises(ValueError, match="heads of 129 numbers: the kernels take at most 128"):
        attention.forward((rows, rows, rows, sos, sos, 1), rows.clone())


def test_a_workspace_that_is_too_small():
    case = make("one shared beginning")
    needed = case.attention.workspace_floats(1, 1, case.d)
    short = torch.empty(needed - 1, device=DEVICE)
    keys = torch.zeros_like(case.k), torch.zeros_like(case.k)
    with pytest.raises(
        ValueError, match=rf"`workspace` must have at least {needed} numbers, got \({needed - 1},\)"
    ):
        case.attention.backward(case.grad_o, case.inputs, torch.zeros_like(case.grad_o), *keys, short)


@pytest.mark.parametrize(
    "queries, change, message",
    [
        (False, {"dq": None}, "`dq` must be a tensor, got None"),
        (False, {"dk": torch.zeros(2, 4, 16)}, r"`dk` must have shape \(2, 9, 16\)"),
        (False, {"grad_o": torch.zeros(2, 8, 16)}, r"`grad_o` must have shape \(2, 9, 16\)"),
        (False, {"workspace": torch.zeros(4096).half()}, "`workspace` must be torch.float32"),
        (True, {"context_only": True}, "`dq` must be None: no context row is among the queries"),
        (True, {"q": (torch.zeros(2, 4, 16),) * 2}, r"`q` must be one \(B, Q, d\) tensor"),
    ],
)
def test_bad_backward_arguments(queries, change, message):
    tree = tree_of([[1, 2], [2]])
    attention = tree_attention.TreeAttention(tree, tree.leaves if queries else None)
    rows, sos, asking = torch.zeros(2, 9, 16), torch.zeros(16), torch.zeros(2, 2 if queries else 9, 16)
    good = {
        "grad_o": asking, "q": asking, "k": rows, "v": rows, "sos_k": sos, "sos_v": sos, "heads": 2,
        "dq": asking.clone(), "dk": rows.clone(), "dv": rows.clone(), "workspace": torch.zeros(4096),
    }  # fmt: skip
    if change.get("context_only"):
        change = {**change, "dk": rows[:, :4].clone(), "dv": rows[:, :4].clone()}
    with pytest.raises(ValueError, match=message):
        attention.backward(**grouped({**good, **change}))
