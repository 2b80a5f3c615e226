"""A pass that is repeated from its recording gives the bits of one that is computed call by call."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import contextmanager

import pytest
import torch
from tiny_encoders import M, tree_of
from tiny_models import tiny_clip

from cocoop_fast import TreeTextEncoder
from cocoop_fast.engine.contexts import ShiftedContext
from cocoop_fast.ops import cpu
from cocoop_fast.ops.extensions import CPP

pytestmark = pytest.mark.skipif(CPP.why_unavailable() is not None, reason="the C++ extension is not built")

PATHS = [[5, 3], [1, 2], [1], [1, 2, 4], [5, 3], [8] * 15]
WIDTH = 48
ISAS = cpu.available_isas() if CPP.why_unavailable() is None else []
WITH_PRODUCTS = [isa for isa in ISAS if isa != "portable"]


def small_clip(**options):
    return tiny_clip(dtype=torch.float32, vocab_size=1000, **options)


def encoder(clip_model=None, **options):
    return TreeTextEncoder(clip_model or small_clip(**options), tree_of(PATHS), backend="cpu")


def drawn(*shape, seed):
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed, batch=2):
    return drawn(M, WIDTH, seed=seed), drawn(batch, WIDTH, seed=100 + seed)


def step(one, seed, batch=2, deep=()):
    """Features and the gradients of all that they depend on."""
    tensors = [tensor.requires_grad_() for tensor in (*inputs(seed, batch), *deep)]
    ctx = ShiftedContext(*tensors[:2]) if not deep else tensors[0] + tensors[1][:, None]
    features = one(ctx, tensors[2:])
    gradients = torch.autograd.grad(features, tensors, drawn(*features.shape, seed=200 + seed))
    return features.detach(), *gradients


@contextmanager
def counted_calls(monkeypatch):
    """How many of the extension's calls Python makes."""
    calls, plain = [], cpu._call

    def call(name, *arguments, **options):
        calls.append(name)
        plain(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_call", call)
        yield calls


@contextmanager
def call_by_call(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "record", None)
        yield


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_repeated_steps_have_the_bits_of_steps_call_by_call(layers, isa, monkeypatch):
    """Without a product of its own, "portable" records torch's."""
    before = cpu.isa()
    cpu.set_isa(isa)
    try:
        recorded, plain = encoder(layers=layers), encoder(layers=layers)
        for seed in range(5):
            found = step(recorded, seed)
            with call_by_call(monkeypatch):
                assert_same(found, step(plain, seed))
    finally:
        cpu.set_isa(before)


def test_the_third_step_makes_few_calls(monkeypatch):
    one = encoder(layers=4)
    counts = []
    for seed in range(4):
        with counted_calls(monkeypatch) as calls:
            step(one, seed)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 40  # the first is looked at, the second recorded
    assert counts[2] == counts[3] == len(calls)
    beside_the_layers = {"assemble_prompts_fwd", "assemble_prompts_bwd", "gather_rows", "add_rows"}
    assert set(calls) <= beside_the_layers


def test_passes_without_gradients_are_recorded_as_well(monkeypatch):
    recorded, plain = encoder(), encoder()
    for seed in range(4):
        contexts = ShiftedContext(*inputs(seed))
        with torch.no_grad(), counted_calls(monkeypatch) as calls:
            found = recorded(contexts)
        with torch.no_grad(), call_by_call(monkeypatch):
            assert torch.equal(found, plain(contexts))
    assert len(calls) <= 2


def test_batch_sizes_and_threads_change_between_steps(monkeypatch):
    recorded, plain, threads = encoder(), encoder(), torch.get_num_threads()
    try:
        for seed, (batch, count) in enumerate(itertools.product((2, 1, 2, 3), (threads, 1))):
            torch.set_num_threads(count)
            for _ in range(3):
                found = step(recorded, seed, batch)
            with call_by_call(monkeypatch):
                assert_same(found, step(plain, seed, batch))
    finally:
        torch.set_num_threads(threads)


def test_two_graphs_at_a_time(monkeypatch):
    """Each has memory of its own, and what was recorded with it."""
    one = encoder()
    for seed in range(4):
        shifts = [drawn(1, WIDTH, seed=10 * seed + i).requires_grad_() for i in range(2)]
        features = [one(ShiftedContext(inputs(seed)[0], shift)) for shift in shifts]
        found = [
            torch.autograd.grad(two.sum(), shift)[0] for two, shift in zip(features, shifts, strict=True)
        ]
        with call_by_call(monkeypatch):
            for i, shift in enumerate(shifts):
                alone = encoder()(ShiftedContext(inputs(seed)[0], shift))
                assert torch.equal(alone, features[i])
                assert torch.equal(torch.autograd.grad(alone.sum(), shift)[0], found[i])
        del features
    assert [len(acts.recorded) for acts in one.tower._layouts.values()] == [2, 2]


def test_deep_prompts_are_read_anew_every_time(monkeypatch):
    recorded, plain = encoder(layers=3), encoder(layers=3)
    for seed in range(4):
        deep = [drawn(2, M, WIDTH, seed=300 + seed)] if seed % 2 else []
        found = step(recorded, seed, deep=deep)
        with call_by_call(monkeypatch):
            assert_same(found, step(plain, seed, deep=deep))


def test_weights_that_change_after_the_recording_are_seen(monkeypatch):
    models = [small_clip(), small_clip()]
    recorded, plain = [encoder(clip_model=model) for model in models]
    for seed in range(3):
        step(recorded, seed)
    for model in models:
        with torch.no_grad():
            model.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.5)
    found = step(recorded, 3)
    with call_by_call(monkeypatch):
        assert_same(found, step(plain, 3))


@pytest.mark.skipif(len(WITH_PRODUCTS) < 2, reason="one instruction set with a product of its own")
def test_another_instruction_set_after_the_recording(monkeypatch):
    one, isa = encoder(), cpu.isa()
    for seed in range(3):
        step(one, seed)
    try:
        cpu.set_isa(next(other for other in WITH_PRODUCTS if other != isa))
        found = step(one, 3)
        with call_by_call(monkeypatch), counted_calls(monkeypatch) as calls:
            assert_same(found, step(one, 3))
        assert len(calls) > 20
    finally:
        cpu.set_isa(isa)


def test_a_part_that_is_encoded_once_is_not_recorded():
    one = encoder()
    part = one.part(torch.tensor([0, 1, 3]))
    part(ShiftedContext(*inputs(0)))
    assert not any(acts.recorded for acts in part._tower._layouts.values())


def test_the_end_of_an_encoder_is_the_end_of_its_recordings():
    model = small_clip()
    one = encoder(clip_model=model)
    for seed in range(3):
        step(one, seed)
    gone = [weakref.ref(one.tower), weakref.ref(model.transformer.resblocks[0].mlp.c_fc.weight)]
    del one, model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_released_memory_is_free_at_once():
    one = encoder()
    for seed in range(3):
        step(one, seed)
    gone = [weakref.ref(acts.scratch) for acts in one.tower._layouts.values()]
    one.tower.release()
    assert gone and [ref() for ref in gone] == [None] * len(gone)
