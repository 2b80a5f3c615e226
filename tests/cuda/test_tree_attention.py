"""The CUDA tree attention, emulated, against its torch twin in float64."""

import pytest
import torch
from attention_cases import MODES, AttentionCase, grouped, random_names, tree_of

NAMES = {
    "one empty name": [[]],
    "a name is a prefix of another": [[3], [3, 4], [3, 4, 5], [2], [2]],
    "one shared beginning": [[1, 1, k] for k in range(1, 75)],  # more readers than one task takes
    "deep": [[1] * 40, [1] * 17 + [2], [2] * 15],  # more slots than a warp has lanes
    "branching": random_names(13, 3, 5, seed=2),
}


def make(
    cuda,
    names="branching",
    mode="middle layer",
    *,
    n_ctx=4,
    batch=2,
    heads=2,
    head_size=8,
    dtype=torch.float32,
    **options,
):
    tree = tree_of(NAMES[names] if isinstance(names, str) else names, n_ctx)
    options |= MODES[mode]
    return AttentionCase(cuda, tree, batch, heads, head_size, dtype, "cpu", **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", NAMES)
def test_trees(cuda, names, mode):
    make(cuda, names, mode, batch=1 if names in ("deep", "one shared beginning") else 2).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "n_ctx, heads, head_size",
    [
        (1, 1, 32),  # four lanes a key
        (4, 2, 64),  # eight
        (2, 1, 80),  # sixteen, six of them idle
        (3, 1, 128),
        (25, 1, 24),  # the prefix does not fit in shared memory at once
    ],
)
def test_shapes(cuda, n_ctx, heads, head_size, dtype):
    names = [[1, 2], [1, 2, 3], [2]]
    make(cuda, names, n_ctx=n_ctx, batch=1, heads=heads, head_size=head_size, dtype=dtype).check()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_buffers_of_their_own(cuda, mode):
    make(cuda, mode=mode, apart=True).check()


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_same_bits_whatever_the_order_of_the_threads(built, cuda, schedule):
    case = make(cuda, "one shared beginning", batch=1, n_ctx=21, heads=1)
    expected = case.results()
    built.set_schedule(schedule)
    for once, again in zip(expected, case.results(), strict=True):
        assert torch.equal(once, again)


def test_results_do_not_depend_on_the_other_images(cuda):
    case = make(cuda, batch=3)
    among = case.results()
    case.q, case.k, case.v, case.grad_o = (x[1:2] for x in (case.q, case.k, case.v, case.grad_o))
    case.inputs, case.batch = (case.q, case.k, case.v, *case.inputs[3:]), 1
    for one, alone in zip(among, case.results(), strict=True):
        assert torch.equal(one[1:2], alone)


def test_nan_goes_where_it_is_read(cuda):
    case = make(cuda, [[1, 2], [1, 3], [2]], batch=1)
    node = 1  # the second node: [1, 2]
    case.k[0, case.m + node, 3] = torch.nan
    touched = case.forward().isnan().any(-1)[0]
    descendants = range(case.m + node, case.m + int(case.tree.subtree_end[node]))
    assert touched.nonzero().flatten().tolist() == list(descendants)


def test_large_scores_are_stable(cuda):
    case = make(cuda, batch=1)
    case.q.mul_(300)
    # Scores of 1e4: an error of 1e-3.
    assert float((case.forward() - case.expected()[0].detach()).abs().max()) < 1e-2


def test_launches(built, cuda):
    """One forward; backward one for the queries, one for the keys, one for the keys that many rows read."""
    case, few = make(cuda, "one shared beginning", batch=1), make(cuda, [[1]], batch=1)
    counts = []
    for call in (case.forward, case.backward, few.backward):
        before = built.launches()
        call()
        counts.append(built.launches() - before)
    assert counts == [1, 3, 2]


def test_no_images(cuda):
    case = make(cuda, batch=0)
    assert case.forward().shape == (0, case.tree.rows, case.d)
    case.backward()


# What is refused, and how


@pytest.mark.parametrize(
    "queries, message",
    [
        ([0, 9], r"`queries` must be nodes 0 .. 4, got \[9\]"),
        ([-1], r"`queries` must be nodes 0 .. 4, got \[-1\]"),
        ([1, 0], "`queries` must be strictly ascending"),
        ([1, 1], "`queries` must be strictly ascending"),
        ([[1]], r"`queries` must be \(Q,\) integers"),
        ([1.0], r"`queries` must be \(Q,\) integers, got torch.float32"),
    ],
)
def test_bad_queries(cuda, queries, message):
    with pytest.raises(ValueError, match=message):
        cuda.TreeAttention(tree_of([[1, 2], [2]]), torch.tensor(queries), "cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 9, 15)}, r"`q` must have shape \(2, 9, 16\), got \(2, 9, 15\)"),
        ({"k": torch.zeros(2, 8, 16)}, r"`k` must have shape \(2, 9, 16\)"),
        ({"v": (torch.zeros(3, 4, 16), torch.zeros(5, 16))}, r"`v_ctx` must have shape \(2, 4, 16\)"),
        ({"v": (torch.zeros(2, 4, 16), torch.zeros(4, 16))}, r"`v_node` must have shape \(1, 5, 16\)"),
        ({"q": torch.zeros(2, 16, 9).mT}, "`q` must be contiguous in its last dimension"),
        ({"q": torch.zeros(2, 9, 16).double()}, "`q` must be torch.float32 on cpu, got torch.float64"),
        ({"q": torch.zeros(2, 9, 18)[..., 1:17]}, "`q` must have rows at multiples of 16 bytes"),
        ({"k": torch.zeros(2, 9, 17)[..., :16]}, "`k` must have rows at multiples of 16 bytes"),
        ({"sos_k": torch.zeros(15)}, "`sos_k` must have 16 numbers"),
        ({"sos_v": torch.zeros(32)[::2]}, "`sos_v` must be contiguous"),
        ({"heads": 3}, "`heads` must divide the width 16, got 3"),
        ({"heads": 0}, "`heads` must divide the width 16, got 0"),
        ({"heads": 4}, "heads of 4 numbers: the CUDA kernels take multiples of 8 up to 128"),
        ({"o": torch.zeros(2, 8, 16)}, r"`o` must have shape \(2, 9, 16\)"),
        ({"o": torch.zeros(2, 9, 16).double()}, "take float16, bfloat16 and float32 tensors on a cpu device"),
        ({"o": torch.zeros(9, 16)}, r"`o` must have shape \(B, rows, d\)"),
        ({"o": torch.zeros(1, 9, 16).expand(2, -1, -1)}, "`o` must have rows that do not overlap"),
    ],
)  # fmt: skip
def test_bad_forward_arguments(cuda, change, message):
    case = make(cuda, [[1, 2], [2]])
    names = ("q", "k", "v", "sos_k", "sos_v", "heads", "o")
    arguments = dict(zip(names, (*case.inputs, torch.zeros(2, 9, 16)), strict=True))
    with pytest.raises(ValueError, match=message):
        case.attention.forward(**grouped({**arguments, **change}))


@pytest.mark.parametrize(
    "mode, change, message",
    [
        ("middle layer", {"dq": None}, "`dq` must be a tensor, got None"),
        ("middle layer", {"dk": torch.zeros(2, 4, 16)}, r"`dk` must have shape \(2, 9, 16\)"),
        ("middle layer", {"workspace": torch.zeros(10)}, r"`workspace` must have at least \d+ numbers"),
        ("middle layer", {"workspace": torch.zeros(999).half()}, "`workspace` must be torch.float32"),
        ("middle layer", {"workspace": torch.zeros(999)[1:]}, "`workspace` must have rows at multiples of 16"),
        ("middle layer", {"grad_o": torch.zeros(2, 8, 16)}, r"`grad_o` must have shape \(2, 9, 16\)"),
        ("first layer", {"dv": torch.zeros(2, 9, 16)}, r"`dv` must have shape \(2, 4, 16\)"),
        ("only layer", {"dq": torch.zeros(2, 2, 16)}, "`dq` must be None"),
        ("last layer", {"q": (torch.zeros(2, 4, 16),) * 2}, r"`q` must be one \(B, Q, d\) tensor"),
    ],
)  # fmt: skip
def test_bad_backward_arguments(cuda, mode, change, message):
    case = make(cuda, [[1, 2], [2]], mode)
    rows = 4 if case.layer_zero else 9
    dq = None if mode == "only layer" else torch.zeros(2, 2 if mode == "last layer" else rows, 16)
    names = (
        "grad_o",
        "q",
        "k",
        "v",
        "sos_k",
        "sos_v",
        "heads",
        "dq",
        "dk",
        "dv",
        "workspace",
        "context_only",
    )
    values = (case.grad_o, *case.inputs, dq, torch.zeros(2, rows, 16), torch.zeros(2, rows, 16),
              torch.empty(case.attention.workspace_floats(2, 2, 8)), case.layer_zero)  # fmt: skip
    arguments = dict(zip(names, values, strict=True))
    case.attention.backward(**grouped(arguments))  # nothing is wrong but the change
    with pytest.raises(ValueError, match=message):
        case.attention.backward(**grouped({**arguments, **change}))
