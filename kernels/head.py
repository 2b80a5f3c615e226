"""From text features to logits and loss: the scaled cosine, the cross-entropy, and their gradients.

`head`: one program owns the feature of one prompt, held in registers: forward takes its norm and its product with the
image feature from one read, E s bytes a row of E numbers of s bytes and 8 bytes out; backward 2 E s bytes. The image
feature stays in the caches. Predicted: 80 to 90 % of the memory's bandwidth from some ten thousand prompts on, and the
time of a launch below a thousand.

`cross_entropy`: one program owns the K logits of one image and goes over them 1024 at a time, once with a running
maximum and the sum over the classes that are not the label, in backward once more to write: 4 K bytes an image forward,
12 K backward, of which a third come from the cache. A batch has few images, so few multiprocessors work: predicted 2 to
5 us at K = 1000, under 2 % of the bandwidth, and not worth more kernels. A second, tiny program takes the mean over the
images, in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import ROW_BLOCKS, check_array, row_block, row_layout
from .variants import STORAGE, Variant

CLASS_BLOCK, CLASS_WARPS = 1024, 4


@triton.jit(do_not_specialize=["classes"])
def _head_fwd_kernel(
    features,
    image,
    log_scale,
    logits,
    inverse_norms,
    classes,
    width,
    stride_fb,
    stride_fk,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b, k = (row // classes).to(tl.int64), (row % classes).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(features + b * stride_fb + k * stride_fk + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(image + b * width + columns, mask=inside, other=0.0).to(tl.float32)
    inverse_norm = tl.rsqrt(tl.sum(f * f, axis=0))
    tl.store(logits + row, tl.exp(tl.load(log_scale)) * tl.sum(f * v, axis=0) * inverse_norm)
    tl.store(inverse_norms + row, inverse_norm)


def head_fwd(
    features: Tensor, image: Tensor, log_scale: Tensor, logits: Tensor, inverse_norms: Tensor
) -> None:
    """inverse_norms = 1 / |features|, logits = scale (features . image) inverse_norms.

    Args:
        features: rows (B, K, E), E <= 2048.
        image: (B, E), of unit length.
        log_scale: (1,) fp32: the logarithm of the logit scale.
        logits, inverse_norms: (B, K) fp32, written.
    """
    batch, classes = _batch_and_classes(features, logits)
    rows = row_layout(features=features)
    check_array("image", image, (batch, rows.width), features)
    check_array("log_scale", log_scale, (1,), features, torch.float32)
    check_array("inverse_norms", inverse_norms, (batch, classes), features, torch.float32)
    if not rows.count:
        return
    block, warps = row_block(rows.width)
    with torch.cuda.device_of(features):
        _head_fwd_kernel[(rows.count,)](
            features, image, log_scale, logits, inverse_norms, classes, rows.width, *rows.strides,
            BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["classes"])
def _head_bwd_kernel(
    features,
    image,
    log_scale,
    logits,
    inverse_norms,
    d_logits,
    d_features,
    classes,
    width,
    stride_fb,
    stride_fk,
    stride_dfb,
    stride_dfk,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    b, k = (row // classes).to(tl.int64), (row % classes).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    f = tl.load(features + b * stride_fb + k * stride_fk + columns, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(image + b * width + columns, mask=inside, other=0.0).to(tl.float32)
    inverse_norm = tl.load(inverse_norms + row)
    # The image's part along t = f / |f|, times the scale, is the logit: no division by the scale.
    across = tl.exp(tl.load(log_scale)) * v - f * (inverse_norm * tl.load(logits + row))
    gradient = tl.load(d_logits + row) * inverse_norm * across
    tl.store(d_features + b * stride_dfb + k * stride_dfk + columns, gradient, mask=inside)


def head_bwd(
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
        features, image, log_scale, logits, inverse_norms: of :func:`head_fwd`.
        d_logits: (B, K) fp32.
        d_features: rows (B, K, E), written; may be `features`.
    """
    batch, classes = _batch_and_classes(features, logits)
    rows = row_layout(features=features, d_features=d_features)
    check_array("image", image, (batch, rows.width), features)
    check_array("log_scale", log_scale, (1,), features, torch.float32)
    check_array("inverse_norms", inverse_norms, (batch, classes), features, torch.float32)
    check_array("d_logits", d_logits, (batch, classes), features, torch.float32)
    if not rows.count:
        return
    block, warps = row_block(rows.width)
    with torch.cuda.device_of(features):
        _head_bwd_kernel[(rows.count,)](
            features, image, log_scale, logits, inverse_norms, d_logits, d_features, classes, rows.width,
            *rows.strides, BLOCK=block, num_warps=warps, num_stages=1,
        )  # fmt: skip


def _batch_and_classes(features: Tensor, logits: Tensor) -> tuple[int, int]:
    if features.ndim != 3:
        raise ValueError(f"`features` must have shape (B, K, E), got {tuple(features.shape)}")
    batch, classes = features.shape[:2]
    check_array("logits", logits, (batch, classes), features, torch.float32)
    return batch, classes


@triton.jit
def _max_and_sum_of_others(logits, label, classes, BLOCK: tl.constexpr):
    """The maximum z of the logits, and the sum of e^(logit - z) over all but the label's."""
    top = tl.full((), float("-inf"), tl.float32)
    others = tl.zeros((), tl.float32)
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        block = tl.load(logits + columns, mask=columns < classes, other=float("-inf"))
        higher = tl.maximum(top, tl.max(block, axis=0))
        terms = tl.where(columns == label, 0.0, tl.exp(block - higher))
        others = others * tl.exp(top - higher) + tl.sum(terms, axis=0)
        top = higher
    return top, others


@triton.jit(do_not_specialize=["classes"])
def _cross_entropy_fwd_kernel(logits, labels, losses, classes, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    logits += image.to(tl.int64) * classes
    label = tl.load(labels + image)
    top, others = _max_and_sum_of_others(logits, label, classes, BLOCK)
    known = (label >= 0) & (label < classes)
    own = tl.load(logits + label, mask=known, other=float("nan"))
    tl.store(losses + image, tl.log(others + tl.exp(own - top)) + (top - own))


@triton.jit(do_not_specialize=["batch"])
def _mean_kernel(losses, loss, batch, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, batch, BLOCK):
        images = start + tl.arange(0, BLOCK)
        total += tl.load(losses + images, mask=images < batch, other=0.0)
    tl.store(loss, tl.sum(total, axis=0) / batch)


def cross_entropy_fwd(logits: Tensor, labels: Tensor, loss: Tensor) -> None:
    """loss = the mean over images of log(sum_k e^z_k) - z_label; NaN without images, or with a label that is no class.

    Args:
        logits: (B, K) fp32.
        labels: (B,) int64.
        loss: (1,) fp32, written.
    """
    batch, classes = _check_labels(logits, labels)
    check_array("loss", loss, (1,), logits, torch.float32)
    with torch.cuda.device_of(logits):
        if not batch * classes:
            loss.fill_(torch.nan)
            return
        losses = loss if batch == 1 else torch.empty_like(labels, dtype=torch.float32)
        _cross_entropy_fwd_kernel[(batch,)](
            logits, labels, losses, classes, BLOCK=CLASS_BLOCK, num_warps=CLASS_WARPS, num_stages=1
        )
        if batch > 1:
            _mean_kernel[(1,)](losses, loss, batch, BLOCK=CLASS_BLOCK, num_warps=CLASS_WARPS, num_stages=1)


@triton.jit(do_not_specialize=["batch", "classes"])
def _cross_entropy_bwd_kernel(logits, labels, grad_loss, d_logits, batch, classes, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    logits += image.to(tl.int64) * classes
    d_logits += image.to(tl.int64) * classes
    label = tl.load(labels + image)
    # Read before the reductions, behind which no thread is: where results are written over the logits, another one's would
    # be this.
    own = tl.load(logits + label, mask=(label >= 0) & (label < classes), other=float("-inf"))
    top, others = _max_and_sum_of_others(logits, label, classes, BLOCK)
    total = others + tl.exp(own - top)
    weight = tl.load(grad_loss) / batch
    for start in range(0, classes, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < classes
        terms = tl.exp(tl.load(logits + columns, mask=inside, other=0.0) - top)
        # Of a label with nearly all of the probability p, p - 1 would be nothing but rounding.
        terms = tl.where(columns == label, -others, terms)
        tl.store(d_logits + columns, terms / total * weight, mask=inside)


def cross_entropy_bwd(logits: Tensor, labels: Tensor, grad_loss: Tensor, d_logits: Tensor) -> None:
    """d_logits = (softmax(logits) - one_hot(labels)) grad_loss / B; a label's is computed as minus the sum of the others.

    Args:
        logits: (B, K) fp32.
        labels: (B,) int64.
        grad_loss: (1,) fp32: gradient of the mean.
        d_logits: (B, K) fp32, written; may be `logits`.
    """
    batch, classes = _check_labels(logits, labels)
    check_array("grad_loss", grad_loss, (1,), logits, torch.float32)
    check_array("d_logits", d_logits, (batch, classes), logits, torch.float32)
    if not batch * classes:
        return
    with torch.cuda.device_of(logits):
        _cross_entropy_bwd_kernel[(batch,)](
            logits, labels, grad_loss, d_logits, batch, classes,
            BLOCK=CLASS_BLOCK, num_warps=CLASS_WARPS, num_stages=1,
        )  # fmt: skip


def _check_labels(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    if logits.ndim != 2:
        raise ValueError(f"`logits` must have shape (B, K), got {tuple(logits.shape)}")
    batch, classes = logits.shape
    check_array("logits", logits, (batch, classes), logits, torch.float32)
    check_array("labels", labels, (batch,), logits, torch.int64)
    return batch, classes


def _variants() -> tuple[Variant, ...]:
    """Features of each type with an image feature of the same, and half-precision ones with an fp32 image feature."""
    found = []
    s = "*fp32"
    for dtype in STORAGE:
        for image in dict.fromkeys((dtype, "fp32")):
            forward = {
                "features": f"*{dtype}",
                "image": f"*{image}",
                "log_scale": s,
                "logits": s,
                "inverse_norms": s,
            }
            backward = forward | {"d_logits": s, "d_features": f"*{dtype}"}
            sizes = dict.fromkeys(("classes", "width", "stride_fb", "stride_fk"), "i32")
            for block, warps in ROW_BLOCKS.items():
                name, constexprs = f"E<={block}", {"BLOCK": block}
                name += ", fp32 image" if image != dtype else ""
                found.append(Variant(_head_fwd_kernel, name, dtype, forward | sizes, constexprs, warps))
                strides = dict.fromkeys(("stride_dfb", "stride_dfk"), "i32")
                found.append(
                    Variant(_head_bwd_kernel, name, dtype, backward | sizes | strides, constexprs, warps)
                )
    constexprs = {"BLOCK": CLASS_BLOCK}
    for kernel, signature in (
        (_cross_entropy_fwd_kernel, {"logits": s, "labels": "*i64", "losses": s, "classes": "i32"}),
        (_mean_kernel, {"losses": s, "loss": s, "batch": "i32"}),
        (
            _cross_entropy_bwd_kernel,
            {"logits": s, "labels": "*i64", "grad_loss": s, "d_logits": s, "batch": "i32", "classes": "i32"},
        ),
    ):
        found.append(Variant(kernel, "", "fp32", signature, constexprs, CLASS_WARPS))
    return tuple(found)


VARIANTS = _variants()
