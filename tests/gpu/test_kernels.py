"""The operations that both GPU backends have, on a GPU, against their torch twins in float64.

The Triton kernels' own tests, tests/kernels, run on a GPU as well where there is one.
"""

import pytest
import torch
from attention_cases import MODES, TOLERANCES, AttentionCase, random_names, tree_of
from comparison import assert_close

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_dense_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.table import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda")
EPS = 1e-5
NAMES = {
    "one empty name": [[]],
    "one shared beginning": [[1, 1, 1, k] for k in range(1, 200)],
    "deep": [[1] * 40, [1] * 17 + [2], [2] * 15],
    "branching": random_names(300, 4, 6, seed=2),
}


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    (backend,) = (one for one in BACKENDS if one.name == request.param)
    if reason := backend.refusal(GPU, torch.float32):
        pytest.skip(reason)
    return backend.load()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("names", NAMES)
def test_attention_of_trees(kernels, names, mode, dtype):
    AttentionCase(kernels, tree_of(NAMES[names]), 3, 8, 64, dtype, GPU, **MODES[mode]).check()


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_buffers_of_their_own(kernels, mode, dtype):
    AttentionCase(
        kernels, tree_of(NAMES["branching"]), 2, 8, 64, dtype, GPU, apart=True, **MODES[mode]
    ).check()


@pytest.mark.parametrize("n_ctx, heads, head_size", [(1, 12, 32), (16, 8, 64), (4, 3, 80), (25, 2, 128)])
def test_attention_of_shapes(kernels, n_ctx, heads, head_size, dtype):
    tree = tree_of(NAMES["branching"], n_ctx)
    AttentionCase(kernels, tree, 2, heads, head_size, dtype, GPU).check()


@pytest.mark.parametrize("mode", MODES)
def test_attention_gives_the_same_bits_every_time(kernels, mode, dtype):
    case = AttentionCase(kernels, tree_of(NAMES["branching"]), 2, 8, 64, dtype, GPU, **MODES[mode])
    first = case.results()
    for _ in range(20):
        for once, again in zip(first, case.results(), strict=True):
            assert torch.equal(once, again)


def test_attention_in_a_graph(kernels, dtype):
    """A recorded call reads new inputs and writes what a plain one does."""
    case = AttentionCase(kernels, tree_of(NAMES["branching"]), 2, 8, 64, dtype, GPU)
    o = torch.zeros(2, case.n_queries, case.d, dtype=dtype, device=GPU)
    dq, dk, dv = (torch.zeros_like(o) for _ in range(3))
    workspace = torch.empty(case.attention.workspace_floats(2, 8, 64), device="cuda")

    def call():
        case.attention.forward(case.inputs, o)
        case.attention.backward(case.grad_o, case.inputs, dq, dk, dv, workspace)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()  # what is compiled at first use is compiled before the recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for part in (case.q, case.k, case.v):
        part.copy_(torch.randn_like(part))
    for result in (o, dq, dk, dv):
        result.fill_(torch.nan)
    graph.replay()
    recorded = [one.clone() for one in (o, dq, dk, dv)]
    call()
    for plain, replayed in zip((o, dq, dk, dv), recorded, strict=True):
        assert torch.equal(plain, replayed)


def test_attention_on_another_stream_and_device(kernels):
    """The launch goes to the tensors' device and to torch's current stream there."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    stream = torch.cuda.Stream(device)
    case = AttentionCase(kernels, tree_of(NAMES["branching"]), 2, 8, 64, torch.float32, device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        o = torch.zeros(2, case.n_queries, case.d, device=device)
        case.attention.forward(case.inputs, o)
    stream.synchronize()
    assert_close(o.cpu(), case.expected()[0], TOLERANCES[torch.float32])


@pytest.mark.parametrize("masters", [False, True], ids=["", "fp32-masters"])
@pytest.mark.parametrize("form", ["image", "row", "row alone"])
@pytest.mark.parametrize("batch, m, d", [(1, 4, 512), (64, 4, 768), (3, 1, 33)])
def test_assemble_prompts(kernels, batch, m, d, form, dtype, masters):
    """A shift of each image, of each of its rows, and whole contexts that share no vectors."""
    torch.manual_seed(0)
    own = torch.float32 if masters else dtype

    def randn(*shape, dtype=own):
        return torch.randn(*shape, device=GPU).to(dtype)

    vectors, shift = randn(m, d), randn(batch, d) if form == "image" else randn(batch, m, d)
    position, gamma, beta = randn(m, d), randn(d), randn(d)
    if form == "row alone":
        vectors = None
    x, y = torch.full((2, batch, m, d), torch.nan, device=GPU, dtype=dtype)
    mean, rstd = torch.full((2, batch * m), torch.nan, device=GPU)
    kernels.assemble_prompts_fwd(vectors, shift, position, gamma, beta, EPS, x, y, mean, rstd)
    shared = torch.zeros_like(position) if vectors is None else vectors
    rows = assemble_context_ref(shared.double(), shift.double()) + position
    assert_close(x, rows, TOLERANCES[dtype], "x")
    expected = layer_norm_ref(x.double(), Affine(gamma.double(), beta.double(), EPS))
    assert_close(y, expected, TOLERANCES[dtype], "y")
    assert_close(mean, x.double().mean(-1).flatten(), 1e-5, "mean")
    assert_close(rstd, (x.double().var(-1, correction=0).flatten() + EPS).rsqrt(), 1e-5, "rstd")

    dx, d_shift = randn(batch, m, d, dtype=dtype), torch.empty_like(shift)
    d_vectors = None if vectors is None else torch.empty_like(vectors)
    kernels.assemble_prompts_bwd(dx, d_vectors, d_shift)
    if d_vectors is not None:
        assert_close(d_vectors, dx.double().sum(0), TOLERANCES[own], "d_vectors")
    if form == "image":
        assert_close(d_shift, dx.double().sum(1), TOLERANCES[own], "d_shift")
    else:
        assert torch.equal(d_shift, dx.to(own))


@pytest.mark.parametrize("batch, k, m, length, d", [(2, 100, 4, 77, 512), (2, 3, 1, 5, 33), (1, 1, 2, 3, 8)])
def test_assemble_dense(kernels, batch, k, m, length, d, dtype):
    context, prefix = torch.randn(batch, m, d, device=GPU).to(dtype), torch.randn(k, d, device=GPU).to(dtype)
    suffix = torch.randn(k, length - 1 - m, d, device=GPU).to(dtype)
    out = torch.full((batch, k, length, d), torch.nan, dtype=dtype, device=GPU)
    kernels.assemble_dense(context, prefix, suffix, out)
    assert torch.equal(out, assemble_dense_ref(context, prefix, suffix))
