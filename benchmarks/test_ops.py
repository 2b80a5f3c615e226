"""Each C++ operation against its torch twin, at the shapes of 100 and 1000 classes and one image.

A twin's backward is autograd's, over a graph that was built beforehand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cocoop_fast.measure.problem import Problem
from cocoop_fast.ops import cpu
from cocoop_fast.ops.activation import activation_ref
from cocoop_fast.ops.assemble_prompts import assemble_context_ref, assemble_dense_ref
from cocoop_fast.ops.extensions import CPP
from cocoop_fast.ops.head import cosine_logits_ref
from cocoop_fast.ops.layer_norm import layer_norm_ref
from cocoop_fast.ops.linear import linear_ref
from cocoop_fast.ops.tree_attention import tree_attention_ref

pytestmark = pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")

# Two ways to compute the same: both return what is to be compared.
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def rows(problem: Problem, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(problem.tree.rows, width, generator=generator)


def gradient(output: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.cat(
        [g.flatten() for g in torch.autograd.grad(output, inputs, grad, retain_graph=True)]
    )


def layer_norm_forward(p: Problem) -> Pair:
    x, norm = rows(p, p.weights.width), p.weights.blocks[0].ln_2
    y, mean, rstd = torch.empty_like(x), torch.empty(len(x)), torch.empty(len(x))

    def fast() -> Tensor:
        cpu.layer_norm_fwd(x, None, None, norm.weight, norm.bias, norm.eps, y, mean, rstd)
        return y

    return fast, lambda: layer_norm_ref(x, norm)


def layer_norm_backward(p: Problem) -> Pair:
    x, norm = rows(p, p.weights.width), p.weights.blocks[0].ln_2
    dy, dx = torch.randn_like(x), torch.empty_like(x)
    y, mean, rstd = torch.empty_like(x), torch.empty(len(x)), torch.empty(len(x))
    cpu.layer_norm_fwd(x, None, None, norm.weight, norm.bias, norm.eps, y, mean, rstd)

    def fast() -> Tensor:
        cpu.layer_norm_bwd(dy, x, norm.weight, mean, rstd, dx, accumulate=False)
        return dx.flatten()

    leaf = x.clone().requires_grad_()
    return fast, gradient(layer_norm_ref(leaf, norm), (leaf,), dy)


def activation_forward(p: Problem) -> Pair:
    u = rows(p, len(p.weights.blocks[0].fc.bias))
    out = torch.empty_like(u)

    def fast() -> Tensor:
        cpu.activation_fwd(u, p.weights.activation, out)
        return out

    return fast, lambda: activation_ref(u, p.weights.activation)


def activation_backward(p: Problem) -> Pair:
    u = rows(p, len(p.weights.blocks[0].fc.bias))
    dg = torch.randn_like(u)
    changed = torch.empty_like(u)

    def fast() -> Tensor:
        changed.copy_(dg)  # the kernel works in place; the engine has no such copy
        cpu.activation_bwd(u, p.weights.activation, changed)
        return changed.flatten()

    leaf = u.clone().requires_grad_()
    return fast, gradient(activation_ref(leaf, p.weights.activation), (leaf,), dg)


def linear_forward(p: Problem) -> Pair:
    """The block's widest layer, with the activation that follows it."""
    fc, kind = p.weights.blocks[0].fc, p.weights.activation
    x, packed = rows(p, p.weights.width), cpu.pack_weight(fc.weight)
    u = rows(p, len(fc.bias))
    out = torch.empty_like(u)

    def fast() -> Tensor:
        cpu.linear_activation_fwd(x, packed, fc.bias, kind, u, out)
        return out

    return fast, lambda: activation_ref(linear_ref(x, fc), kind)


def linear_backward(p: Problem) -> Pair:
    """Through the layer that reads the activation, and the activation."""
    proj, kind = p.weights.blocks[0].proj, p.weights.activation
    dy, u = rows(p, p.weights.width), rows(p, proj.weight.shape[1])
    du = torch.empty_like(u)

    def fast() -> Tensor:
        cpu.linear_activation_bwd(dy, proj.weight, u, kind, du)
        return du.flatten()

    leaf = u.clone().requires_grad_()
    return fast, gradient(linear_ref(activation_ref(leaf, kind), proj), (leaf,), dy)


def attention(p: Problem, *, backward: bool, leaves: bool) -> Pair:
    """All rows, as in every layer but the last, or the EOT rows alone."""
    w, tree = p.weights, p.tree
    d, heads, head = w.width, w.heads, w.width // w.heads
    nodes = tree.leaves if leaves else None
    plan = cpu.TreeAttention(tree, queries=nodes)
    q, k, v = (t.contiguous().requires_grad_() for t in rows(p, 3 * d)[None].split(d, dim=-1))
    if leaves:
        q = q.detach()[:, tree.n_ctx + tree.leaves].contiguous().requires_grad_()
    sos_k, sos_v = torch.randn(2, d, generator=torch.Generator().manual_seed(1))
    inputs = (q, k, v, sos_k, sos_v, heads)
    o, do = torch.empty_like(q), torch.randn(q.shape, generator=torch.Generator().manual_seed(2))

    def by_head(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, head))

    def twin() -> Tensor:
        sos = sos_k.view(heads, head), sos_v.view(heads, head)
        return tree_attention_ref(by_head(q), by_head(k), by_head(v), *sos, tree, nodes).flatten(-2)

    if backward:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        workspace = torch.empty(plan.workspace_floats(1, heads, head))

        def fast_backward() -> Tensor:
            plan.backward(do, inputs, dq, dk, dv, workspace)
            return torch.cat([dq.flatten(), dk.flatten(), dv.flatten()])

        return fast_backward, gradient(twin(), (q, k, v), do)

    def fast() -> Tensor:
        plan.forward(inputs, o)
        return o

    def twin_forward() -> Tensor:
        with torch.no_grad():
            return twin()

    return fast, twin_forward


def assemble_contexts(p: Problem) -> Pair:
    """Context vectors and the shift of each image to layer-0 rows and their LayerNorm."""
    norm, d, batch, m = p.weights.blocks[0].ln_1, p.weights.width, 8, p.tree.n_ctx
    vectors, position = p.learned["ctx"], p.weights.positional_embedding[1 : 1 + m]
    shift = torch.randn(batch, d, generator=torch.Generator().manual_seed(3))
    x, y = torch.empty(batch, m, d), torch.empty(batch, m, d)
    mean, rstd = torch.empty(batch * m), torch.empty(batch * m)

    def fast() -> Tensor:
        cpu.assemble_prompts_fwd(vectors, shift, position, norm.weight, norm.bias, norm.eps, x, y, mean, rstd)
        return y

    return fast, lambda: layer_norm_ref(assemble_context_ref(vectors, shift) + position, norm)


def assemble_dense(p: Problem) -> Pair:
    learner = p.learner()
    context = torch.randn(1, *learner.ctx.shape, generator=torch.Generator().manual_seed(4))
    prefix, suffix = learner.token_prefix[:, 0].contiguous(), learner.token_suffix
    out = torch.empty(1, *p.tokens.shape, p.weights.width)

    def fast() -> Tensor:
        cpu.assemble_dense(context, prefix, suffix, out)
        return out

    return fast, lambda: assemble_dense_ref(context, prefix, suffix)


def head_case(p: Problem, *, backward: bool) -> Pair:
    k, e, scale = len(p.tokens), p.features.shape[1], torch.tensor(14.0)
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(1, k, e, generator=generator).requires_grad_()
    image = torch.nn.functional.normalize(torch.randn(1, e, generator=generator), dim=-1)
    logits, inverse = torch.empty(1, k), torch.empty(1, k)
    log_scale = scale.log()
    cpu.head_fwd(text, image, log_scale, logits, inverse)
    if backward:
        d_logits, d_text = torch.randn(1, k, generator=generator), torch.empty(1, k, e)

        def fast_backward() -> Tensor:
            cpu.head_bwd(text, image, log_scale, logits, inverse, d_logits, d_text)
            return d_text.flatten()

        return fast_backward, gradient(cosine_logits_ref(image, text, log_scale), (text,), d_logits)

    def fast() -> Tensor:
        cpu.head_fwd(text, image, log_scale, logits, inverse)
        return logits

    def twin() -> Tensor:
        with torch.no_grad():
            return cosine_logits_ref(image, text, log_scale)

    return fast, twin


OPS: dict[str, Callable[[Problem], Pair]] = {
    "assemble_contexts": assemble_contexts,
    "assemble_dense": assemble_dense,
    "layer_norm_fwd": layer_norm_forward,
    "layer_norm_bwd": layer_norm_backward,
    "linear_activation_fwd": linear_forward,
    "linear_activation_bwd": linear_backward,
    "attention_fwd": lambda p: attention(p, backward=False, leaves=False),
    "attention_bwd": lambda p: attention(p, backward=True, leaves=False),
    "attention_eot_fwd": lambda p: attention(p, backward=False, leaves=True),
    "attention_eot_bwd": lambda p: attention(p, backward=True, leaves=True),
    "activation_fwd": activation_forward,
    "activation_bwd": activation_backward,
    "head_fwd": lambda p: head_case(p, backward=False),
    "head_bwd": lambda p: head_case(p, backward=True),
}


@pytest.mark.parametrize("who", ["fast", "twin"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("k", [100, 1000])
def test_op(benchmark, problem_of, k, op, who):
    problem = problem_of(k, 1)
    fast, twin = OPS[op](problem)
    torch.testing.assert_close(fast(), twin().detach(), rtol=1e-4, atol=1e-4)
    run = fast if who == "fast" else twin
    benchmark.group = f"{op}, {k} classes"
    benchmark.extra_info |= {"op": op, "classes": k, "rows": problem.tree.rows, "who": who}
    benchmark.pedantic(run, rounds=20 if k == 100 else 8, warmup_rounds=2)
