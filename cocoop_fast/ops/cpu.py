"""Launchers of the C++ kernels: float32 CPU tensors in, results written into tensors of the caller.

No autograd here: tensors are taken as they are, whatever their `requires_grad`. "Rows" are tensors of two or three
dimensions whose last is contiguous, the others with any strides; all else is contiguous. Everything is checked before
a kernel runs: a wrong shape, dtype, device or index raises ValueError.

Shapes: B images, K classes, N tree nodes, M context tokens, R = M + N rows of an image, Q queries, d width, E embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoop_fast.extension import load_extension
from cocoop_fast.prompts.tree import ClassTree

# The rows of an image: one (B, R, d) tensor, or its context and node rows apart, (B, M, d) and (B, N, d). Either part
# may also be (1, rows, d) or (rows, d): the same for every image.
ImageRows = Tensor | tuple[Tensor, Tensor]


def available_isas() -> list[str]:
    """The instruction sets that :func:`set_isa` takes here, narrowest first."""
    isas: list[str] = load_extension().available_isas()
    return isas


def set_isa(isa: str) -> None:
    """Choose the kernels' instruction set; COCOOP_FAST_ISA does the same from outside.

    Raises:
        ValueError: not one of :func:`available_isas`.
    """
    load_extension().set_isa(isa)


def layer_norm_fwd(
    x: Tensor,
    add_bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x += add_bias, y = LN(x), in one pass over the rows.

    Args:
        x: rows (n, d) or (B, n/B, d); changed in place if `add_bias` is given.
        add_bias: (d,) or None.
        gamma, beta: (d,).
        eps: LayerNorm's epsilon.
        y: rows, written.
        mean, rstd: (n,), written.
    """
    load_extension().layer_norm_fwd(
        _array(x),
        _optional(add_bias),
        _array(gamma),
        _array(beta),
        eps,
        _array(y),
        _array(mean),
        _array(rstd),
    )


def layer_norm_bwd(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor,
    accumulate: bool = True,
) -> None:
    """dx += rstd (g - mean(g) - xhat mean(g xhat)), g = dy gamma, xhat = (x - mean) rstd.

    Args:
        dy, x: rows (n, d) or (B, n/B, d); x as :func:`layer_norm_fwd` left it.
        gamma: (d,).
        mean, rstd: (n,), of the forward.
        dx: rows, added to; written if not `accumulate`.
    """
    load_extension().layer_norm_bwd(
        _array(dy), _array(x), _array(gamma), _array(mean), _array(rstd), _array(dx), accumulate
    )


def activation_fwd(u: Tensor, bias: Tensor | None, kind: str, out: Tensor) -> None:
    """out = act(u + bias).

    Args:
        u: rows (n, w) or (B, n/B, w).
        bias: (w,) or None.
        kind: "quick_gelu" or "gelu".
        out: rows, written; may be `u`.
    """
    load_extension().activation_fwd(_array(u), _optional(bias), kind, _array(out))


def activation_bwd(u: Tensor, bias: Tensor | None, kind: str, dg: Tensor) -> None:
    """dg *= act'(u + bias): from the gradient of the output to that of `u`, in place.

    Args:
        u: rows (n, w) or (B, n/B, w).
        bias: (w,) or None.
        kind: "quick_gelu" or "gelu".
        dg: rows, changed.
    """
    load_extension().activation_bwd(_array(u), _optional(bias), kind, _array(dg))


def isa() -> str:
    """The instruction set whose kernels run: "portable" is what is left where no faster one is known."""
    name: str = load_extension().isa()
    return name


PANEL_COLUMNS = 32


def pack_weight(weight: Tensor) -> Tensor:
    """A frozen weight (width, k) as :func:`linear_fwd` reads it: (ceil(width / 32), k, 32), zeros beyond the width."""
    width, k = weight.shape
    packed = torch.empty(-(-width // PANEL_COLUMNS), k, PANEL_COLUMNS)
    load_extension().pack_weight(_array(weight), _array(packed))
    return packed


def linear_fwd(x: Tensor, packed: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor) -> None:
    """out = x W^T + bias + residual.

    Args:
        x: (n, k), its rows any stride apart; fastest where that is no large power of two.
        packed: W (width, k) from :func:`pack_weight`.
        bias: (width,) or None.
        residual: (n, width) or None; may be `out`.
        out: (n, width), written.
    """
    load_extension().linear_fwd(_array(x), _array(packed), _optional(bias), _optional(residual), _array(out))


def linear_bwd(dy: Tensor, weight: Tensor, dx: Tensor) -> None:
    """dx = dy W.

    Args:
        dy: (n, width).
        weight: W (width, k).
        dx: (n, k), written.
    """
    load_extension().linear_bwd(_array(dy), _array(weight), _array(dx))


def linear_activation_fwd(
    x: Tensor, packed: Tensor, bias: Tensor, kind: str, u: Tensor | None, out: Tensor
) -> None:
    """u = x W^T + bias, out = act(u).

    Args:
        x, packed, bias: as in :func:`linear_fwd`.
        kind: "quick_gelu" or "gelu".
        u: (n, width), written, or None.
        out: (n, width), written.
    """
    load_extension().linear_activation_fwd(
        _array(x), _array(packed), _array(bias), kind, _optional(u), _array(out)
    )


def linear_activation_bwd(dy: Tensor, weight: Tensor, u: Tensor, kind: str, du: Tensor) -> None:
    """du = (dy W) act'(u).

    Args:
        dy: (n, width).
        weight: W (width, k) of the layer that reads the activation.
        u: (n, k), of :func:`linear_activation_fwd`.
        kind: "quick_gelu" or "gelu".
        du: (n, k), written.
    """
    load_extension().linear_activation_bwd(_array(dy), _array(weight), _array(u), kind, _array(du))


class TreeAttention:
    """The attention of a class tree: which keys each row reads, checked once.

    Args:
        tree: the class tree.
        queries: None if all R rows ask; else the strictly ascending nodes that alone ask, (Q,).
    """

    def __init__(self, tree: ClassTree, queries: Tensor | None = None) -> None:
        ids = None if queries is None else _array(queries, torch.int64)
        self.n_ctx = tree.n_ctx
        self.all_rows = queries is None
        self.plan: Any = load_extension().AttentionPlan(tree.n_ctx, _array(tree.parent, torch.int64), ids)

    def workspace(self, batch: int, heads: int, head_size: int) -> Tensor:
        """A new workspace for :meth:`backward`; any larger one serves as well."""
        return torch.empty(self.workspace_floats(batch, heads, head_size))

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        return int(self.plan.workspace_floats(batch, heads, head_size))

    def forward(
        self,
        q: ImageRows,
        k: ImageRows,
        v: ImageRows,
        sos_k: Tensor,
        sos_v: Tensor,
        heads: int,
        o: Tensor,
    ) -> None:
        """o = softmax(q k / sqrt(d / heads)) v, over the keys that each row reads.

        Args:
            q: rows of the image; with queries their rows alone, (B, Q, d).
            k, v: rows of the image.
            sos_k, sos_v: (d,) key and value of the start-of-text token.
            heads: H, dividing d.
            o: (B, R, d) or (B, Q, d), written.
        """
        inputs = self._inputs(q, k, v, sos_k, sos_v)
        load_extension().tree_attention_fwd(self.plan, *inputs, heads, _array(o))

    def backward(
        self,
        grad_o: Tensor,
        q: ImageRows,
        k: ImageRows,
        v: ImageRows,
        sos_k: Tensor,
        sos_v: Tensor,
        heads: int,
        dq: Tensor | None,
        dk: Tensor,
        dv: Tensor,
        workspace: Tensor,
        context_only: bool = False,
    ) -> None:
        """dq, dk, dv = the gradients of q, k, v. The same bits for any number of threads.

        Args:
            grad_o: as `o`.
            q, k, v, sos_k, sos_v, heads: as in :meth:`forward`.
            dq: as `o`, written; (B, M, d) with `context_only`, and None with queries as well.
            dk, dv: (B, R, d), written; (B, M, d) with `context_only`.
            workspace: (n,) with n >= workspace_floats(B, heads, d / heads); its content does not matter.
            context_only: only the gradients of the context rows are wanted.
        """
        inputs = self._inputs(q, k, v, sos_k, sos_v)
        load_extension().tree_attention_bwd(
            self.plan,
            _array(grad_o),
            *inputs,
            heads,
            _optional(dq),
            _array(dk),
            _array(dv),
            _array(workspace),
            context_only,
        )

    def _inputs(
        self, q: ImageRows, k: ImageRows, v: ImageRows, sos_k: Tensor, sos_v: Tensor
    ) -> tuple[np.ndarray | None, ...]:
        """As the extension takes them: q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, sos_k, sos_v."""
        if self.all_rows:
            q_ctx, q_node = self._split(q)
        elif isinstance(q, Tensor):
            q_ctx, q_node = None, _array(q)
        else:
            raise ValueError("`q` must be one (B, Q, d) tensor: the context rows have no queries here")
        (k_ctx, k_node), (v_ctx, v_node) = self._split(k), self._split(v)
        return q_ctx, k_ctx, v_ctx, q_node, k_node, v_node, _array(sos_k).ravel(), _array(sos_v).ravel()

    def _split(self, rows: ImageRows) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(rows, Tensor):
            whole = _array(rows)
            return whole[..., : self.n_ctx, :], whole[..., self.n_ctx :, :]
        return _array(rows[0]), _array(rows[1])


def assemble_prompts_fwd(
    ctx: Tensor,
    bias: Tensor,
    position: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    """x[b, m] = ctx[m] + bias[b] + position[m], y = LN(x), in one pass.

    Args:
        ctx, position: (M, d).
        bias: (B, d).
        gamma, beta: (d,).
        x, y: rows (B, M, d), written.
        mean, rstd: (B * M,), written.
    """
    load_extension().assemble_prompts_fwd(
        _array(ctx),
        _array(bias),
        _array(position),
        _array(gamma),
        _array(beta),
        eps,
        _array(x),
        _array(y),
        _array(mean),
        _array(rstd),
    )


def assemble_prompts_bwd(dx: Tensor, d_ctx: Tensor, d_bias: Tensor) -> None:
    """d_ctx[m] = sum_b dx[b, m], d_bias[b] = sum_m dx[b, m], in ascending order.

    Args:
        dx: rows (B, M, d).
        d_ctx: (M, d), written.
        d_bias: (B, d), written.
    """
    load_extension().assemble_prompts_bwd(_array(dx), _array(d_ctx), _array(d_bias))


def assemble_dense(context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
    """out[b, k] = prefix[k], context[b], suffix[k].

    Args:
        context: (B, M, d).
        prefix: (K, d).
        suffix: (K, L - 1 - M, d).
        out: (B, K, L, d), written.
    """
    load_extension().assemble_dense(_array(context), _array(prefix), _array(suffix), _array(out))


def head_fwd(features: Tensor, image: Tensor, scale: float, logits: Tensor, inverse_norms: Tensor) -> None:
    """inverse_norms = 1 / |features|, logits = scale (features . image) inverse_norms.

    Args:
        features: rows (B, K, E).
        image: (B, E), of unit length.
        scale: the logit scale itself, not its logarithm.
        logits, inverse_norms: (B, K), written.
    """
    load_extension().head_fwd(_array(features), _array(image), scale, _array(logits), _array(inverse_norms))


def head_bwd(
    features: Tensor,
    image: Tensor,
    scale: float,
    logits: Tensor,
    inverse_norms: Tensor,
    d_logits: Tensor,
    d_features: Tensor,
) -> None:
    """With t = f / |f|: d_f = d_logit scale (image - t (t . image)) / |f|.

    Args:
        features, image, scale, logits, inverse_norms: of :func:`head_fwd`.
        d_logits: (B, K).
        d_features: rows (B, K, E), written.
    """
    load_extension().head_bwd(
        _array(features),
        _array(image),
        scale,
        _array(logits),
        _array(inverse_norms),
        _array(d_logits),
        _array(d_features),
    )


def cross_entropy_fwd(logits: Tensor, labels: Tensor) -> float:
    """The mean over images of log(sum_k e^z_k) - z_label; NaN without images.

    Args:
        logits: (B, K).
        labels: (B,) int64.
    """
    return float(load_extension().cross_entropy_fwd(_array(logits), _array(labels, torch.int64)))


def cross_entropy_bwd(logits: Tensor, labels: Tensor, grad_loss: float, d_logits: Tensor) -> None:
    """d_logits = (softmax(logits) - one_hot(labels)) grad_loss / B.

    Args:
        logits: (B, K).
        labels: (B,) int64.
        grad_loss: gradient of the mean.
        d_logits: (B, K), written; may be `logits`.
    """
    load_extension().cross_entropy_bwd(
        _array(logits), _array(labels, torch.int64), grad_loss, _array(d_logits)
    )


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """out[b, i] = x[b, index[i]].

    Args:
        x: rows (B, R, d).
        index: (n,) int64.
        out: rows (B, n, d), written.
    """
    load_extension().gather_rows(_array(x), _array(index, torch.int64), _array(out))


def scatter_rows(x: Tensor, index: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out[b, index[i]] = x[b, i], or += it.

    Args:
        x: rows (B, n, d).
        index: (n,) int64, all different.
        out: rows (B, R, d), changed in the rows of `index` alone.
    """
    load_extension().scatter_rows(_array(x), _array(index, torch.int64), _array(out), accumulate)


def _array(tensor: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """The tensor's memory as numpy sees it; its shape and strides are checked by the extension."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype:
        raise ValueError(
            f"The C++ kernels take {dtype} tensors on the CPU here, got {tensor.dtype} on {tensor.device}."
        )
    return tensor.detach().numpy()


def _optional(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else _array(tensor)
