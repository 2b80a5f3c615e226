"""The cost model against what torch counts when the same things are really computed."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from tiny_models import tiny_clip
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cocoop_fast.engine.memory import PeakBytes
from cocoop_fast.measure import contestants as field
from cocoop_fast.measure.cost import DenseCost, GpuLayout, Product, RowCounts, TreeCost, layout_on
from cocoop_fast.measure.devices import find_gpu
from cocoop_fast.measure.problem import ProblemSpec, build_problem, imagenet_names
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP


def problem_of(*, layers=3, batch=2, classes=12):
    return build_problem(ProblemSpec(imagenet_names(classes), batch=batch), tiny_clip(layers=layers))


def cost_of(problem, layout=None):
    return TreeCost(problem.weights, problem.tree, layout or layout_on("cpu"))


def counted_products(action):
    """FLOPs of the matrix products with weights that torch ran, attention's batched ones left out."""
    with FlopCounterMode(display=False) as counter:
        action()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if "bmm" not in str(op) and "attention" not in str(op))


def learner_flops(problem, *, backward):
    """Forward products of the Meta-Net; backward has the weights' gradients and one input gradient."""
    e, d = problem.features.shape[1], problem.weights.width
    forward = 2 * len(problem.features) * (e // 16) * (e + d)
    inputs = 2 * len(problem.features) * (e // 16) * d
    return forward + (forward + inputs if backward else 0)


@pytest.mark.parametrize("layers", [2, 4])
# With a single image torch takes the cosines for a product with a weight.
@pytest.mark.parametrize("batch", [2, 3])
def test_the_products_of_the_tree_are_those_that_the_tower_computes(layers, batch):
    problem = problem_of(layers=layers, batch=batch)
    model = field.BY_NAME["tree+torch"].build(problem).model
    model.forward_features(problem.features, problem.labels)  # makes the constants
    with torch.no_grad():
        forward = counted_products(lambda: model.forward_features(problem.features, problem.labels))
    step = counted_products(lambda: model.forward_features(problem.features, problem.labels).backward())
    forward -= learner_flops(problem, backward=False)
    step -= learner_flops(problem, backward=True)
    for layout in (layout_on("cpu"), GpuLayout()):
        assert forward == cost_of(problem, layout).inference(batch).gemm_flops
        assert step == cost_of(problem, layout).step(batch).gemm_flops


def test_the_flops_of_the_dense_reference_are_those_that_it_computes():
    problem = problem_of(layers=2, batch=2)
    weights = problem.weights
    runner = field.BY_NAME["dense"].build(problem)
    # As plain products: not every torch counts its fused attention on a CPU. That one computes the scores again for
    # backward.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        runner.step()
    scores = 2 * problem.tokens.numel() * problem.tokens.shape[1] * weights.width * len(weights.blocks) * 2
    said = DenseCost(weights, problem.tree).step(2).flops
    assert said == pytest.approx(counter.get_total_flops() + scores, rel=1e-3)


def test_what_autograd_keeps_of_a_dense_block_is_what_is_listed():
    kept, said = {}, {}
    for layers in (2, 3):
        problem = problem_of(layers=layers, batch=1)
        model = field.BY_NAME["dense"].build(problem).model
        frozen = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        found = {}

        def note(tensor, frozen=frozen, found=found):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model.logits(problem.features)
        kept[layers] = sum(found.values())
        said[layers] = DenseCost(problem.weights, problem.tree).saved_bytes(1)
        del logits
    assert kept[3] - kept[2] == said[3] - said[2]


def test_rows_and_pairs_are_those_of_the_tree():
    tree = problem_of().tree
    counts = RowCounts.of(tree)
    assert counts.rows == tree.rows
    path_lengths = (tree.path >= 0).sum(dim=1)
    assert counts.pairs == int((path_lengths + tree.n_ctx + 1).sum()) + sum(range(2, tree.n_ctx + 2))
    assert counts.leaf_pairs == int((path_lengths[tree.leaves] + tree.n_ctx + 1).sum())
    assert counts.tokens == int(path_lengths[tree.eot].sum())


def test_a_step_launches_what_was_promised():
    by_layer = [cost_of(problem_of(layers=n), GpuLayout()).step(1).launches for n in (3, 4, 5)]
    assert by_layer[2] - by_layer[1] == by_layer[1] - by_layer[0] == 8 + 9  # forward and backward
    assert by_layer[0] < 3 * 17 + 25


def test_the_layout_of_a_gpu_is_that_of_the_triton_backend():
    pytest.importorskip("triton")
    from cocoop_fast.ops import triton

    said, tree = GpuLayout(), problem_of().tree
    assert (said.PANEL_ROWS, said.ROW_PADDING) == (triton.PANEL_ROWS, triton.ROW_PADDING)
    assert said.packed_bytes(512, 512) == triton.packed_bytes(512, 512)
    sizes = (
        one.tree_attention(tree, None, torch.device("cpu")).workspace_floats(3, 8, 64)
        for one in (said, triton)
    )
    assert len(set(sizes)) == 1


def test_costs_grow_with_the_batch_in_proportion():
    problem = problem_of()
    cost = cost_of(problem, GpuLayout())
    one, four = (cost.step(batch) for batch in (1, 4))
    assert four.gemm_flops == 4 * one.gemm_flops
    assert four.saved_bytes == 4 * one.saved_bytes
    assert four.launches == one.launches
    half = problem.weights.to(torch.device("meta"), torch.float16)
    assert TreeCost(half, problem.tree, GpuLayout()).step(1).bytes == one.bytes / 2


@pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("batch", [1, 5])
def test_the_bytes_of_a_step_are_those_that_it_allocates(batch):
    """From a model that is there to its second step, whatever is made once included."""
    problem = problem_of(layers=4, batch=batch, classes=100)
    cost = cost_of(problem)
    runner = field.BY_NAME["engine"].build(problem)
    with PeakBytes() as peak:
        for _ in range(2):
            runner.step()
    said = cost.activation_bytes(batch, keeps=True) + cost.class_list_bytes
    assert said == pytest.approx(peak.bytes, rel=0.05)


def test_a_product_counts_its_factors_and_results():
    product = Product(3, 5, 7)
    assert (product.flops, product.elements, product.launches) == (2 * 3 * 5 * 7, 15 + 35 + 21, 1)
    fused = Product(3, 5, 7, fused=True)
    assert (fused.elements, fused.launches) == (15 + 35 + 42, 2)


def test_on_a_gpu_the_activation_is_a_kernel_of_its_own_whose_traffic_hides_behind_no_product():
    """Forward reads u and writes the result, backward reads two and writes one: none of it runs beside the product."""
    layers, batch, width = 3, 2, 4 * 48
    problem = problem_of(layers=layers)
    on_gpu, fused = cost_of(problem, GpuLayout()).step(batch), cost_of(problem, cpu).step(batch)
    assert not any(isinstance(one, Product) and one.fused for one in on_gpu.operations)
    assert on_gpu.launches == fused.launches and on_gpu.gemm_flops == fused.gemm_flops
    rows = (layers - 1) * on_gpu.rows + batch * len(problem.tree.leaves)
    moved = {
        kind: sum(n * op.elements for op, n in on_gpu.operations.items() if getattr(op, "kind", "") == kind)
        for kind in ("activation_fwd", "activation_bwd")
    }
    assert moved == {"activation_fwd": 2 * rows * width, "activation_bwd": 3 * rows * width}
    device = find_gpu("A100").at("fp16")
    apart = sum(n * device.seconds(op, 2) for op, n in on_gpu.operations.items())
    together = sum(n * device.seconds(op, 2) for op, n in fused.operations.items())
    assert apart > together


def test_what_a_pass_over_many_images_needs_is_known_without_its_panels():
    """A report asks for millions of images of a small CLIP, to find out how many fit into memory."""
    cost = cost_of(problem_of())
    cost.activation_bytes(1, keeps=True)
    tracemalloc.start()
    try:
        cost.activation_bytes(100_000, keeps=True)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
