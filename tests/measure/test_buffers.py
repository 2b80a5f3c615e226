"""The list of buffers against what the engine allocates, byte for byte."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_clip

from cocoop_fast.engine import cpu_tower
from cocoop_fast.engine.encoder import TreeTextEncoder
from cocoop_fast.extension import extension_available
from cocoop_fast.measure import buffers
from cocoop_fast.measure.sizes import RowCounts, TowerSizes
from cocoop_fast.ops import cpu as cpu_kernels
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree

pytestmark = pytest.mark.skipif(not extension_available(), reason="the C++ extension is not built")

NAMES = ["red fox", "red panda", "red", "great white shark", "cat", "tabby cat", "zebra", "red panda bear"]


@pytest.fixture(scope="module")
def tree():
    prompts = tokenize_prompts(NAMES, ctx_init="a photo of a", n_ctx=4, context_length=77)
    return ClassTree(prompts.tokens, prompts.n_ctx)


def tower_after(tree, *, layers, batch, backward):
    """The engine's tower after one pass, with its sizes."""
    encoder = TreeTextEncoder(tiny_clip(layers=layers), tree, backend="cpu")
    ctx = torch.randn(batch, tree.n_ctx, encoder.frozen.width, requires_grad=backward)
    features = encoder(ctx)
    if backward:
        features.sum().backward()
    return encoder._tower, TowerSizes.of(encoder.frozen.text_weights())


def storages(*holders):
    """Bytes by address of the distinct memory that the objects' tensors lie in, alone or in tuples."""
    memory = {}
    for holder in holders:
        for value in vars(holder).values():
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return memory


@pytest.fixture(params=[512, 16], ids=["one panel", "many panels"])
def panel_rows(request, monkeypatch):
    monkeypatch.setattr(cpu_tower, "PANEL_ROWS", request.param)
    monkeypatch.setattr(buffers, "PANEL_ROWS", request.param)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_training_step_keeps_and_uses_what_is_listed(tree, panel_rows, layers, batch):
    tower, sizes = tower_after(tree, layers=layers, batch=batch, backward=True)
    kept = cpu_tower.Activations(tower, batch, [cpu_tower.CpuBuffers() for _ in range(layers + 1)])
    constants = {tensor.untyped_storage().data_ptr() for tensor in tower.constants.node_qkv}
    held = {a: size for a, size in storages(kept, *kept.layers).items() if a not in constants}
    leaf_queries = tree.leaves.numel() * sizes.width * 4 if layers == 1 else 0  # constants of a single layer
    assert sum(held.values()) - leaf_queries == buffers.saved_bytes(sizes, RowCounts.of(tree), batch)
    assert scratch_of(tower) == buffers.scratch_bytes(sizes, RowCounts.of(tree), batch)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_inference_pass_uses_what_is_listed(tree, panel_rows, layers):
    tower, sizes = tower_after(tree, layers=layers, batch=3, backward=False)
    assert scratch_of(tower) == buffers.scratch_bytes(sizes, RowCounts.of(tree), 3, keeps=False)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_packed_weights_and_constants(tree, layers):
    if cpu_kernels.isa() == "portable":
        pytest.skip("the weights are not packed here")
    tower, sizes = tower_after(tree, layers=layers, batch=1, backward=False)
    packed = [
        linear.packed.nbytes
        for block in tower.linears
        for linear in vars(block).values()
        if hasattr(linear, "packed")
    ]
    assert sum(packed) == buffers.packed_bytes(sizes)
    constants = (tower.constants.node_rows, *tower.constants.node_qkv)
    assert sum(tensor.nbytes for tensor in constants) == buffers.constant_bytes(sizes, RowCounts.of(tree))


def test_the_attention_workspace(tree):
    plan = cpu_kernels.TreeAttention(tree)
    sizes = TowerSizes(layers=2, width=48, mlp_width=192, heads=3, embed_dim=64, context_length=77)
    assert buffers.attention_workspace(sizes, RowCounts.of(tree), 5) == plan.workspace_floats(5, 3, 16)


def scratch_of(tower):
    return sum(tensor.untyped_storage().nbytes() for tensor in tower.scratch._storage.values())
