"""Whatever a launcher of a row kernel launches is among the VARIANTS that are compiled for every target."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from cocoop_fast.kernels import (
    activation,
    assemble_prompts,
    head,
    layer_norm,
    meta_net,
    move_rows,
    step_report,
)
from cocoop_fast.kernels.variants import STORAGE

MODULES = (layer_norm, activation, assemble_prompts, head, move_rows, meta_net, step_report)
WIDTHS = (1, 33, 512, 513, 640, 1024, 1025, 1280, 2048)


@pytest.fixture
def launched(monkeypatch, device):
    """What the kernels are launched with, instead of launching them: (kernel, pointer types, constexprs, warps, stages)."""
    seen = []
    for module in MODULES:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel, seen))
    return seen


class Recorder:
    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        def launch(*arguments, num_warps, num_stages, **constexprs):
            names = [name for name in self.kernel.arg_names if name not in constexprs]
            pointers = {
                name: type_name(value)
                for name, value in zip(names, arguments, strict=True)
                if isinstance(value, torch.Tensor)
            }
            self.seen.append(form(self.kernel, pointers, constexprs, num_warps, num_stages))

        return launch


def form(kernel, types, constexprs, num_warps, num_stages):
    pointers = {name: kind for name, kind in types.items() if kind.startswith("*")}
    return (
        kernel.fn.__name__, frozenset(pointers.items()), frozenset(constexprs.items()), num_warps, num_stages,
    )  # fmt: skip


def type_name(tensor):
    names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
    names |= {torch.int64: "*i64", torch.int32: "*i32"}
    return names[tensor.dtype]


def launch_all(device):
    """Every launcher with every choice that it offers."""
    dtypes = dict(zip(STORAGE, (torch.float16, torch.bfloat16, torch.float32), strict=True))
    for dtype, width in itertools.product(dtypes.values(), WIDTHS):

        def z(*shape, dtype=dtype):
            return torch.zeros(*shape, dtype=dtype, device=device)

        def f(*shape):
            return torch.zeros(*shape, device=device)

        x, per_row, index = z(2, 3, width), f(6), torch.arange(2, device=device)
        for own, flag in itertools.product(dict.fromkeys((dtype, torch.float32)), (False, True)):
            w = z(width, dtype=own)
            added = (z(width), x) if flag else (None, None)
            layer_norm.layer_norm_fwd(x, *added, w, w, 1e-5, x, per_row, per_row)
            layer_norm.layer_norm_bwd(x, x, w, per_row, per_row, x, accumulate=flag)
            for learned in dict.fromkeys((own, torch.float32)):
                table, images, rows = (z(*n, width, dtype=learned) for n in ((3,), (2,), (2, 3)))
                for vectors, shift in ((table, images), (table, rows), (None, rows)):
                    assemble_prompts.assemble_prompts_fwd(
                        vectors, shift, z(3, width, dtype=own), w, w, 1e-5, x, x, per_row, per_row
                    )
                    assemble_prompts.assemble_prompts_bwd(x, vectors, shift)
            pairs = f(2, 3)
            head.head_fwd(x, z(2, width, dtype=own), f(1), pairs, pairs)
            head.head_bwd(x, z(2, width, dtype=own), f(1), pairs, pairs, pairs, x)
            images, u = z(2, width), f(2, 3)
            meta_net.unit_rows(images, images)
            w1, b1, w2, b2 = (z(*n, dtype=own) for n in ((3, width), (3,), (width, 3), (width,)))
            out = z(2, width, dtype=own)
            meta_net.meta_net_fwd(images, w1, b1, w2, b2, u, out)
            meta_net.meta_net_bwd(images, w2, u, out, w1, b1, w2, b2)
            for kind in activation.KINDS:
                activation.activation_fwd(x, kind, x)
                activation.activation_bwd(x, kind, x)
            move_rows.add_rows(x[:, :2], index, x)
        assemble_prompts.assemble_dense(z(2, 1, width), z(3, width), z(3, 2, width), z(2, 3, 4, width))
        move_rows.gather_rows(x, index, x[:, :2])
    for classes in (1, 3000):
        pairs = f(2, classes)
        head.cross_entropy_fwd(pairs, index, f(1))
        head.cross_entropy_bwd(pairs, index, f(1), pairs)
        shared = torch.zeros(3, dtype=torch.int32, device=device)
        scalar = torch.zeros((), device=device)
        step_report.step_report(scalar, pairs, index, scalar, [f(3)], f(3), shared, f(5))


def test_every_launch_is_a_variant_and_every_variant_is_launched(launched, device):
    launch_all(device)
    listed = {
        form(v.kernel, v.signature, v.constexprs, v.num_warps, v.num_stages)
        for module in MODULES
        for v in module.VARIANTS
    }
    assert set(launched) == listed
