"""What a backend offers, each operation documented once, and the record of every backend.

Shapes: B images, K classes, N nodes of the class tree, M context vectors, R = M + N rows of an image, Q queries,
d width, w width of the MLP, H heads, E embedding. "Rows" are tensors of two or three dimensions whose last is
contiguous, the others with any strides; all else is contiguous. They have the dtype of the frozen weights, unless it
says float32. Operations take no part in autograd: they write into tensors of the caller, allocate nothing of activation
size, and check their arguments before a kernel runs: a wrong shape, dtype, device or index raises ValueError. The twins,
`<op>_ref` in the other files of this folder, are their definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from cocoop_fast.clip.frozen import Affine
from cocoop_fast.errors import UserError
from cocoop_fast.ops.extensions import CPP, why_no_cuda

if TYPE_CHECKING:
    from cocoop_fast.ops.linear import FrozenLinear
    from cocoop_fast.prompts.tree import ClassTree

# The rows of an image: one (B, R, d) tensor, or its context and node rows apart, (B, M, d) and (B, N, d). Either part
# may also be (1, rows, d) or (rows, d): the same for every image.
ImageRows: TypeAlias = "Tensor | tuple[Tensor, Tensor]"

# What attention reads: q, k, v, sos_k, sos_v, heads.
#   q: rows of the image; where some nodes alone have queries, their rows, (B, Q, d).
#   k, v: rows of the image.
#   sos_k, sos_v: (H, d / H): key and value of the start-of-text token.
#   heads: H, dividing d.
AttentionInputs: TypeAlias = "tuple[ImageRows, ImageRows, ImageRows, Tensor, Tensor, int]"


class TreeAttention(Protocol):
    """Attention over the rows of one class tree: every query reads SOS, the context before it, and the path above it."""

    def workspace_floats(self, batch: int, heads: int, head_size: int) -> int:
        """Float32 numbers that :meth:`backward` needs as scratch memory."""

    def forward(self, inputs: AttentionInputs, o: Tensor) -> None:
        """o = softmax(q k / sqrt(d / H)) v, over the keys that each query reads.

        Args:
            inputs: what it reads.
            o: (B, R, d) or (B, Q, d), written.
        """

    def backward(
        self,
        grad_o: Tensor,
        inputs: AttentionInputs,
        dq: Tensor | None,
        dk: Tensor,
        dv: Tensor,
        workspace: Tensor,
        *,
        context_only: bool = False,
    ) -> None:
        """dq, dk, dv = the gradients of q, k, v. The same bits every time, whatever the number of threads.

        Args:
            grad_o: as `o`.
            inputs: as in :meth:`forward`.
            dq: as `o`, written; (B, M, d) with `context_only`, and None if no context row has a query as well.
            dk, dv: (B, R, d), written; (B, M, d) with `context_only`.
            workspace: (n,) float32, n >= workspace_floats(B, H, d / H); its content does not matter.
            context_only: only the gradients of the context rows are wanted.
        """


class Ops(Protocol):
    """The operations of one backend. A module with functions of these names is one."""

    # How rows are best cut and stored: so many go together from one attention to the next (None: all of them), and
    # the rows that a linear layer reads lie so many numbers further apart than they are wide.
    PANEL_ROWS: int | None
    ROW_PADDING: int

    def known_arguments(self) -> AbstractContextManager[None]:
        """Calls inside, of this thread, repeat calls whose arguments passed the checks, in shape, strides, dtype and device: a
        backend may do without looking at them again."""

    @property
    def record(self) -> Callable[[Callable[[], None]], Callable[[], None] | None] | None:
        """Does some operations, and returns what does them again on the same memory, if that can be had; see
        :func:`cocoop_fast.ops.recording.record`. None: the backend does not record."""

    def frozen_linear(self, layer: Affine, *, packed: bool) -> FrozenLinear:
        """A linear layer with frozen weights, ready to be used.

        Args:
            layer: weight (out, in) and bias (out,).
            packed: whether a copy of the weight may be kept for speed, if the backend gains by one.
        """

    def packed_bytes(self, columns: int, inner: int) -> int:
        """Of the copy that :meth:`frozen_linear` may keep of a (columns, inner) weight."""

    def layer_norm_fwd(
        self,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        y: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        """x += bias + residual, y = LN(x), in one pass.

        Args:
            x: rows (n, d) or (B, n/B, d); changed in place if there is a bias.
            bias: (d,), or None.
            residual: rows; None where the bias is.
            gamma, beta: (d,).
            eps: of LayerNorm.
            y: rows, written.
            mean, rstd: (n,) float32, written: mean and reciprocal standard deviation.
        """

    def layer_norm_bwd(
        self,
        dy: Tensor,
        x: Tensor,
        gamma: Tensor,
        mean: Tensor,
        rstd: Tensor,
        dx: Tensor,
        *,
        accumulate: bool,
    ) -> None:
        """dx (+)= rstd (g - mean(g) - xhat mean(g xhat)), with g = dy gamma and xhat = (x - mean) rstd.

        Args:
            dy, x: rows (n, d) or (B, n/B, d); x as :meth:`layer_norm_fwd` left it.
            gamma: (d,).
            mean, rstd: (n,) float32, of the forward.
            dx: rows; added to if `accumulate`, else written.
        """

    def activation_fwd(self, u: Tensor, kind: str, out: Tensor) -> None:
        """out = act(u).

        Args:
            u: rows (n, w) or (B, n/B, w).
            kind: "quick_gelu" or "gelu".
            out: rows, written; may be `u`.
        """

    def activation_bwd(self, u: Tensor, kind: str, dg: Tensor) -> None:
        """dg *= act'(u): from the gradient of the output to that of `u`, in place.

        Args:
            u: rows (n, w) or (B, n/B, w).
            kind: "quick_gelu" or "gelu".
            dg: rows, changed.
        """

    def tree_attention(self, tree: ClassTree, queries: Tensor | None, device: torch.device) -> TreeAttention:
        """The attention of a tree, planned once.

        Args:
            tree: the class tree, of the standard shape.
            queries: (Q,) int64, strictly ascending: the nodes that alone have queries; None: all R rows have.
            device: of the tensors that it will be given.
        """

    def assemble_prompts_fwd(
        self,
        vectors: Tensor | None,
        shift: Tensor,
        position: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        x: Tensor,
        y: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> None:
        """x[b, m] = vectors[m] + shift[b, m] + position[m], y = LN(x): the context rows of layer 0, in one pass.

        Args:
            vectors: (M, d) float, what all images share; None: nothing.
            shift: (B, d), the same for all context vectors of an image, or (B, M, d).
            position: (M, d). These three may have any float dtype that the backend knows; sums are in float32.
            gamma, beta: (d,).
            eps: of LayerNorm.
            x, y: rows (B, M, d), written.
            mean, rstd: (B * M,) float32, written.
        """

    def assemble_prompts_bwd(self, dx: Tensor, d_vectors: Tensor | None, d_shift: Tensor) -> None:
        """d_vectors[m] = sum_b dx[b, m]; d_shift[b] = sum_m dx[b, m], or d_shift = dx. Sums in ascending order.

        Args:
            dx: rows (B, M, d).
            d_vectors: (M, d), written; or None.
            d_shift: (B, d) or (B, M, d), written.
        """

    def assemble_dense(self, context: Tensor, prefix: Tensor, suffix: Tensor, out: Tensor) -> None:
        """out[b, k] = prefix[k], context[b], suffix[k]: the dense prompts, L tokens each.

        Args:
            context: (B, M, d).
            prefix: (K, d).
            suffix: (K, L - 1 - M, d).
            out: (B, K, L, d), written. All four have one dtype.
        """

    def gather_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        """out[b, i] = x[b, index[i]].

        Args:
            x: rows (B, R, d).
            index: (n,) int64.
            out: rows (B, n, d), written.
        """

    def add_rows(self, x: Tensor, index: Tensor, out: Tensor) -> None:
        """out[b, index[i]] += x[b, i].

        Args:
            x: rows (B, n, d).
            index: (n,) int64, all different.
            out: rows (B, R, d), changed in the rows of `index` alone.
        """

    def head_fwd(
        self, features: Tensor, image: Tensor, log_scale: Tensor, logits: Tensor, inverse_norms: Tensor
    ) -> None:
        """inverse_norms = 1 / |features|, logits = scale (features . image) inverse_norms.

        Args:
            features: rows (B, K, E).
            image: (B, E), of unit length.
            log_scale: (1,) float32, the logarithm of the logit scale.
            logits, inverse_norms: (B, K) float32, written.
        """

    def head_bwd(
        self,
        features: Tensor,
        image: Tensor,
        log_scale: Tensor,
        logits: Tensor,
        inverse_norms: Tensor,
        d_logits: Tensor,
        d_features: Tensor,
    ) -> None:
        """With t = f / |f|: d_f = d_logit scale (image - t (t . image)) / |f|.

        Args:
            features, image, log_scale, logits, inverse_norms: of :meth:`head_fwd`.
            d_logits: (B, K) float32.
            d_features: rows (B, K, E), written.
        """

    def cross_entropy_fwd(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """loss = the mean over images of log(sum_k e^z_k) - z_label; NaN without images.

        Args:
            logits: (B, K) float32.
            labels: (B,) int64.
            loss: (1,) float32, written.
        """

    def cross_entropy_bwd(self, logits: Tensor, labels: Tensor, grad_loss: Tensor, d_logits: Tensor) -> None:
        """d_logits = (softmax(logits) - one_hot(labels)) grad_loss / B; a label's is computed as minus the sum of the others.

        Args:
            logits: (B, K) float32.
            labels: (B,) int64.
            grad_loss: (1,) float32, the gradient of the mean.
            d_logits: (B, K) float32, written.
        """


class SmallOps(Protocol):
    """What is small and would be many launches of torch's operations. Backends on which a launch costs little have none: there
    the twins serve."""

    WIDEST: int  # numbers of a row
    MOST_GRADIENTS: int

    def unit_rows(self, x: Tensor, out: Tensor) -> None:
        """out = x / |x|, row by row.

        Args:
            x: (n, d), d <= WIDEST.
            out: (n, d) in the dtype of `x`, written.
        """

    def meta_net_fwd(
        self, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, u: Tensor, out: Tensor
    ) -> None:
        """u = relu(W_1 x + b_1), out = W_2 u + b_2.

        Args:
            x: (B, E), E <= WIDEST.
            w1, b1: (H, E) and (H,), in the dtype of `x` or float32.
            w2, b2: (d, H) and (d,), in that of `w1`, d <= WIDEST.
            u: (B, H) float32, written.
            out: (B, d) in the dtype of `w1`, written.
        """

    def meta_net_bwd(
        self,
        x: Tensor,
        w2: Tensor,
        u: Tensor,
        d_out: Tensor,
        d_w1: Tensor,
        d_b1: Tensor,
        d_w2: Tensor,
        d_b2: Tensor,
    ) -> None:
        """With d_u = (W_2^T d_out) [u > 0]: d_W_1 = d_u x^T, d_b_1 = d_u, d_W_2 = d_out u^T, d_b_2 = d_out, summed over
        images in ascending order.

        Args:
            x, w2, u: of :meth:`meta_net_fwd`.
            d_out: (B, d) in the dtype of `w2`.
            d_w1, d_b1, d_w2, d_b2: as the weights, written.
        """

    def step_report(
        self,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        scale: Tensor,
        gradients: Sequence[Tensor],
        copies: Tensor,
        shared: Tensor,
        report: Tensor,
    ) -> None:
        """report = loss, images whose label has the first of the highest logits, scale, the gradients' largest absolute value
        (NaN if one is), and whether that is infinite or NaN (1 or 0); copies = the gradients one after the other.

        Args:
            loss, scale: () float32.
            logits: (B, K) float32.
            labels: (B,) int64.
            gradients: 1 to MOST_GRADIENTS, float32.
            copies: (n,) float32, written: their numbers.
            shared: (3,) int32, zeros before and after.
            report: (5,) float32, written.
        """


# Triton then runs its kernels on the CPU, slowly: for tests.
_TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

_GPU_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Args:
        name: what users call it.
        device_types, dtypes: what it computes on and in.
        load: its operations; None: it has the twins alone, and autograd differentiates what they are composed to.
        why_unavailable: why it cannot be used here; None: it can.
        on_request: device types that it serves only if it is named.
        load_small: its operations for what is small; None: the twins serve.
    """

    name: str
    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    load: Callable[[], Ops] | None = None
    why_unavailable: Callable[[], str | None] = lambda: None
    on_request: frozenset[str] = frozenset()
    load_small: Callable[[], SmallOps] | None = None

    def __reduce__(self) -> tuple[Callable[[str], Backend], tuple[str]]:
        """For copies and pickles: a backend is this process's own."""
        return _by_name, (self.name,)

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve the device and dtype here, or None if it can."""
        if device.type not in self.device_types | self.on_request:
            return f"it does not run on {device.type}"
        if dtype not in self.dtypes:
            return f"it does not compute in {dtype}"
        return self.why_unavailable()


def _cpu() -> Ops:
    from cocoop_fast.ops import cpu

    return cpu


def _triton() -> Ops:
    from cocoop_fast.ops import triton

    return triton


def _triton_small() -> SmallOps:
    from cocoop_fast.ops import triton_small

    return triton_small


def _cuda() -> Ops:
    from cocoop_fast.ops import cuda

    return cuda


def _why_no_triton() -> str | None:
    return (
        None if find_spec("triton") else "the package 'triton' is not installed, which torch for GPUs brings"
    )


def _why_no_cuda() -> str | None:
    return why_no_cuda() or _why_no_triton()  # attention and assembly: the rest is Triton's


BACKENDS: tuple[Backend, ...] = (  # in order of preference
    # Before "cuda": its attention multiplies on tensor cores, and in half precision it is two to six times as fast (H200).
    Backend(
        "triton",
        frozenset({"cuda"}),  # AMD's GPUs are torch's "cuda" as well
        _GPU_FLOATS,
        _triton,
        _why_no_triton,
        on_request=frozenset({"cpu"} if _TRITON_INTERPRETS else ()),
        load_small=_triton_small,
    ),
    Backend("cuda", frozenset({"cuda"}), _GPU_FLOATS, _cuda, _why_no_cuda, load_small=_triton_small),
    Backend("cpu", frozenset({"cpu"}), frozenset({torch.float32}), _cpu, CPP.why_unavailable),
    Backend("torch", frozenset({"cpu", "cuda"}), _FLOATS),
)


def _by_name(name: str) -> Backend:
    return next(one for one in BACKENDS if one.name == name)


def select_backend(device: torch.device, dtype: torch.dtype, explicit: str = "auto") -> Backend:
    """The backend for a device and a dtype.

    ``auto`` takes the first that can serve; an explicit choice that cannot be served is an error.

    Raises:
        UserError: unknown backend, or one that cannot serve this device and dtype.
    """
    usable = [b for b in BACKENDS if b.refusal(device, dtype) is None]
    if explicit == "auto":
        return next(b for b in usable if device.type in b.device_types)
    names = ", ".join(b.name for b in usable)
    for backend in BACKENDS:
        if backend.name == explicit:
            reason = backend.refusal(device, dtype)
            if reason is None:
                return backend
            raise UserError(f"The backend '{explicit}' cannot be used here: {reason}; use auto or {names}.")
    raise UserError(f"The backend '{explicit}' is not part of this version; use auto or {names}.")


def select_small_ops(device: torch.device, dtype: torch.dtype, explicit: str = "auto") -> SmallOps | None:
    """What is small, by the backend that :func:`select_backend` would choose; None: by the twins, also where it would
    refuse."""
    named = [
        b for b in BACKENDS if (device.type in b.device_types if explicit == "auto" else b.name == explicit)
    ]
    chosen = next((b for b in named if b.refusal(device, dtype) is None), None)
    return None if chosen is None or chosen.load_small is None else chosen.load_small()
