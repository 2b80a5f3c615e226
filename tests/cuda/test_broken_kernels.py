"""Faults that the other tests here must find: copies of the kernels, each with a change that a tired author might make.

What such a kernel does on a GPU depends on chance; in the emulator it fails, or gives another result, every time.
"""

import pytest
import torch
from attention_cases import AttentionCase, tree_of
from emulated_cuda import Edit, build

ATTENTION, ASSEMBLY = "tree_attention.cu", "assemble_prompts.cu"

# One instance of each attention kernel: the copies compile in a moment.
FEWER = (
    Edit("device.cuh", "case Dtype::float16: return f(__half());", ""),
    Edit("device.cuh", "case Dtype::bfloat16: return f(__nv_bfloat16());", ""),
    Edit(ATTENTION, "if (head_size <= 8 * kVector) return f(std::integral_constant<int, 8>());", ""),
    Edit(ATTENTION, "return f(std::integral_constant<int, 16>());", "return cudaErrorInvalidValue;"),
)

IN_ATTENTION = {
    "nothing": ("namespace", "namespace", None),
    "no barrier after staging keys": ("__syncthreads();  // all keys are there", "", "race in shared memory"),
    "no barrier before staging others": (
        "__syncthreads();  // no warp reads what was there before",
        "",
        "race in shared memory",
    ),
    "no barrier between scores and softmax": ("__syncwarp();  // (score, dp) are there", "", "race in global memory"),
    "no barrier between softmax and dq": ("__syncwarp();  // (p, ds) are there", "", "race in global memory"),
    "a reader too many": ("row < task.end;", "row <= task.end;", "race in global memory"),
    "a reader too few": ("row = task.begin + p.group;", "row = task.begin + 1 + p.group;", "wrong"),
    "a partial sum too many": ("partial < task.end;", "partial <= task.end;", "wrong"),
    "a staged key too few": ("i < stage.count * words;", "i < (stage.count - 1) * words;", "wrong"),
    "a staged key too many": ("i < stage.count * words;", "i < (stage.count + 1) * words;", "race in shared memory"),
    "a node left out": ("seen = s < row.n_path;", "seen = s < row.n_path - 1;", "wrong"),
    "all groups write": ("if (!p.active || p.group != 0) return;", "if (!p.active) return;", "race in global memory"),
    "lanes that leave before a shuffle": (
        "const float score = scale * sum_in_group<kGroup>(dot(q, k));\n        if (!seen) return;",
        "if (!seen) return;\n        const float score = scale * sum_in_group<kGroup>(dot(q, k));",
        "have parted",
    ),
    "warps that leave before a barrier": (
        "    const float scale = score_scale(a);\n",
        "    const float scale = score_scale(a);\n    if (!row.exists) return;\n",
        "never come",
    ),
}  # fmt: skip

IN_ASSEMBLY = {
    "no barrier before a sum": ("__syncthreads();  // no thread reads what was there before", "", "race in shared"),
    "no barrier after a sum": ("__syncthreads();  // the sums of all warps are there", "", "race in shared"),
    "shared memory too small": (
        "(size_t(a->d) + kThreads / kWarp) * sizeof(float)", "size_t(a->d) * sizeof(float)", "beyond the 160 bytes"
    ),
}  # fmt: skip


def found(run):
    """What is wrong, in a few words; None if all is well."""
    try:
        run()
    except RuntimeError as error:
        return str(error)
    except AssertionError:
        return "wrong"
    return None


def check_found(fault, expected):
    if expected is None:
        assert fault is None
    else:
        assert fault is not None and expected in fault, fault


@pytest.mark.parametrize("name", IN_ATTENTION)
def test_broken_attention_is_found(built, use, tmp_path, name):
    old, new, expected = IN_ATTENTION[name]
    edits = [*FEWER, Edit(ATTENTION, old, new)]
    kernels = use(build(tmp_path / "broken", edits=edits, unchanged=built))

    def run():
        # The last block has warps without a row, and many keys have readers of more than one task.
        names = [[1, 1, k] for k in range(1, 70)]
        for n_ctx in (4, 21):  # the prefix is staged at once, and in two parts
            AttentionCase(kernels, tree_of(names, n_ctx), 1, 1, 32, torch.float32, "cpu").check()

    check_found(found(run), expected)


@pytest.mark.parametrize("name", IN_ASSEMBLY)
def test_broken_assembly_is_found(built, use, tmp_path, name):
    old, new, expected = IN_ASSEMBLY[name]
    kernels = use(build(tmp_path / "broken", edits=[*FEWER[:2], Edit(ASSEMBLY, old, new)], unchanged=built))
    ctx, x, stats, one = torch.randn(1, 40), torch.empty(1, 1, 40), torch.empty(1), torch.ones(40)
    arguments = (ctx, ctx, ctx, one, one, 1e-5, x, x.clone(), stats, stats.clone())
    check_found(found(lambda: kernels.assemble_prompts_fwd(*arguments)), expected)
