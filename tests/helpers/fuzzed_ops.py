"""Calls of the extension's operations with arrays of every kind, good and bad, that other threads write to meanwhile.

A call ends, or raises what a caller's mistake raises. Whether it touched memory that is not its own is for the sanitizers
to see (tools/sanitize_ops.sh): every array lies in an allocation of just its size.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cocoop_fast.ops.extensions import CPP

REFUSALS = (ValueError, TypeError, MemoryError)
SIZES = [0, 1, 1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 64, 100]
NUMBERS = [0, 1, -1, 2, 3, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]
WIDE = {"float32": 4, "int64": 8}

Arguments = dict[str, Any]


class Fuzzer:
    """Random calls, the same for each seed but for what the other threads write."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.bits = np.random.default_rng(seed)
        self.made: list[np.ndarray] = []  # memory of the next call
        self.used: list[np.ndarray] = []  # memory of the call underway, which the other threads write to
        self.underway = threading.Event()
        self.counts: Counter[str] = Counter()  # "operation: done" or "operation: refused"

    def run(self, seconds: float = 0, calls: int = 0) -> Counter[str]:
        """How many calls of each operation were done and refused, in this time or more and with so many calls or more.

        Raises:
            Exception: whatever an operation raised that is no refusal.
        """
        operations: list[Callable[[], tuple[str, Arguments]]] = [
            self.layer_norm_fwd, self.layer_norm_bwd, self.activation, self.pack_weight, self.linear_fwd, self.linear_bwd,
            self.linear_activation_fwd, self.linear_activation_bwd, self.assemble_prompts_fwd, self.assemble_prompts_bwd,
            self.assemble_dense, self.head_fwd, self.head_bwd, self.cross_entropy, self.move_rows, self.attention,
            self.attention,
        ]  # fmt: skip
        ends = time.monotonic() + seconds
        with self.changed_meanwhile():
            while time.monotonic() < ends or self.counts.total() < calls:
                name, arguments = self.rng.choice(operations)()
                for at in self.rng.sample(list(arguments), self.rng.choice([0, 0, 0, 1, 1, 2])):
                    arguments[at] = self.hostile(arguments[at])
                self.call(name, **arguments)
        return self.counts

    def call(self, name: str, **arguments: Any) -> Any:
        """What the extension's function returns; None if it refuses."""
        self.used, self.made = self.made, []
        self.underway.set()
        try:
            result = getattr(CPP.load(), name)(**arguments)
        except REFUSALS:
            self.counts[f"{name}: refused"] += 1
            return None
        finally:
            self.underway.clear()
        self.counts[f"{name}: done"] += 1
        return result

    # ---- what other threads do

    @contextmanager
    def changed_meanwhile(self) -> Iterator[None]:
        done, before = threading.Event(), sys.getswitchinterval()
        changers = [threading.Thread(target=self.change, args=(done, seed)) for seed in (1, 2)]
        sys.setswitchinterval(1e-4)  # or a call waits 5 ms for each of them
        for changer in changers:
            changer.start()
        try:
            yield
        finally:
            done.set()
            self.underway.set()
            for changer in changers:
                changer.join()
            sys.setswitchinterval(before)

    def change(self, done: threading.Event, seed: int) -> None:
        rng, bits = random.Random(seed), np.random.default_rng(seed)
        while self.underway.wait() and not done.is_set():
            for memory in self.used:
                if memory.dtype == np.int64 and rng.random() < 0.7:
                    memory[rng.randrange(len(memory)) if len(memory) else ...] = rng.choice(NUMBERS)
                elif memory.dtype == np.float32 and len(memory):
                    at = rng.randrange(len(memory))
                    memory.view(np.int32)[at : at + 40] = bits.integers(-(2**31), 2**31, dtype=np.int64)

    # ---- arrays

    def size(self) -> int:
        return self.rng.choice(SIZES)

    def memory(self, count: int, dtype: str) -> np.ndarray:
        """An allocation of its own, of this many numbers and no byte more."""
        memory = self.bits.standard_normal(count).astype(dtype)
        self.made.append(memory)
        return memory

    def array(self, *shape: int, dtype: str = "float32") -> np.ndarray:
        return self.memory(int(np.prod(shape)), dtype).reshape(shape)

    def rows(self, *shape: int) -> np.ndarray:
        """Contiguous, or rows further apart, forwards or backwards."""
        if self.rng.random() < 0.4 or not all(shape):
            return self.array(*shape)
        strides, extent = [1], shape[-1]
        for size in reversed(shape[:-1]):
            strides.append(extent + self.rng.choice([0, 0, 1, 7]))
            extent += strides[-1] * (size - 1)
        strides.reverse()
        view = np.lib.stride_tricks.as_strided(
            self.memory(extent, "float32"), shape, [4 * s for s in strides]
        )
        return view[::-1] if self.rng.random() < 0.2 else view

    def integers(self, count: int, below: int) -> np.ndarray:
        found = self.memory(count, "int64")
        found[:] = self.bits.integers(0, max(below, 1), count)
        return found

    def hostile(self, argument: Any) -> Any:
        """In place of an argument, another."""
        if isinstance(argument, bool | str):
            return self.rng.choice(["gelu", "relu", "\ud800", "\0" * 9, None, 3])
        if isinstance(argument, int | float):
            return self.rng.choice([*NUMBERS, 2**70, 0.5, float("nan"), float("inf"), -1e300, None, "1"])
        if not isinstance(argument, np.ndarray):
            return self.array(self.size(), self.size())
        shape, dtype = list(argument.shape), str(argument.dtype)
        kind = self.rng.randrange(12)
        if kind == 0:
            return self.rng.choice([None, [[1.0]], 3, object(), np.float32(1), np.array(1.0, np.float32)])
        if kind == 1:
            return argument.astype(
                self.rng.choice(["f8", ">f4", "f2", "i4", "u8", ">i8", "?", "c8", "O", "U3", "M8[s]"])
            )
        if kind == 2:  # at an odd address, in bytes of its own
            count = int(np.prod(shape))
            raw = np.zeros(count * WIDE[dtype] + 1, np.int8)
            return raw[1:].view(dtype).reshape(shape)
        if kind == 3:
            read_only = argument[...]
            read_only.flags.writeable = False
            return read_only
        if kind == 4:
            return argument.T if argument.ndim > 1 else argument[::2]
        if kind == 5:
            return np.broadcast_to(np.zeros((), dtype), shape)
        if kind == 6:
            return np.broadcast_to(np.zeros(1, dtype), [2**44, *shape[1:-1], 1][-max(len(shape), 1) :])
        if kind == 7:
            return np.zeros([0, *(2**40 for _ in shape[1:2]), *shape[2:]], dtype)
        if kind == 8:
            return self.array(*(self.size() for _ in range(self.rng.randrange(5) % 4)), dtype=dtype)
        if kind == 9 and dtype == "int64" and argument.size:
            changed = argument.copy()
            changed[self.rng.randrange(len(changed))] = self.rng.choice(NUMBERS)
            return changed
        if kind == 10 and shape:
            memory = self.memory((int(np.prod(shape)) + 1) * 2, dtype)
            strides = [self.rng.choice([0, 1, 2, 3, 6])] * len(shape)  # bytes
            return np.lib.stride_tricks.as_strided(memory, shape, strides) if argument.size else memory
        at = self.rng.randrange(len(shape)) if shape else 0
        shape[at : at + 1] = [
            self.rng.choice([*SIZES, *(n + d for n in shape[at : at + 1] for d in (-1, 1) if n + d >= 0)])
        ]
        return self.array(*shape, dtype=dtype)

    # ---- calls as they should be

    def some_rows(self) -> tuple[int, ...]:
        d = max(self.size(), 1) if self.rng.random() < 0.9 else 512
        few = (self.size(),) if self.rng.random() < 0.5 else (self.rng.choice([0, 1, 2, 3]), self.size())
        return (*few, d)

    def layer_norm_fwd(self) -> tuple[str, Arguments]:
        shape = self.some_rows()
        n, d = int(np.prod(shape[:-1])), shape[-1]
        adds = self.rng.random() < 0.5
        return "layer_norm_fwd", {
            "x": self.rows(*shape), "bias": self.array(d) if adds else None, "residual": self.rows(*shape) if adds else None,
            "gamma": self.array(d), "beta": self.array(d), "eps": 1e-5, "y": self.rows(*shape), "mean": self.array(n),
            "rstd": self.array(n),
        }  # fmt: skip

    def layer_norm_bwd(self) -> tuple[str, Arguments]:
        shape = self.some_rows()
        n, d = int(np.prod(shape[:-1])), shape[-1]
        return "layer_norm_bwd", {
            "dy": self.rows(*shape), "x": self.rows(*shape), "gamma": self.array(d), "mean": self.array(n),
            "rstd": self.array(n), "dx": self.rows(*shape), "accumulate": self.rng.random() < 0.5,
        }  # fmt: skip

    def kind(self) -> str:
        return self.rng.choice(["gelu", "quick_gelu"])

    def activation(self) -> tuple[str, Arguments]:
        shape = self.some_rows()
        name, result = self.rng.choice([("activation_fwd", "out"), ("activation_bwd", "dg")])
        arguments = {"u": self.rows(*shape), "kind": self.kind(), result: self.rows(*shape)}
        return name, arguments

    def linear_sizes(self) -> tuple[int, int, int]:
        n, k, width = self.size(), self.size(), self.size()
        return (
            (n, k, width) if self.rng.random() < 0.9 else (n, 600, width)
        )  # more than one block of products

    def packed(self, width: int, k: int) -> np.ndarray:
        return self.array(-(-width // 32), k, 32)

    def pack_weight(self) -> tuple[str, Arguments]:
        _, k, width = self.linear_sizes()
        arguments = {"weight": self.rows(width, k), "packed": self.packed(width, k)}
        return "pack_weight", arguments

    def linear_fwd(self) -> tuple[str, Arguments]:
        n, k, width = self.linear_sizes()
        return "linear_fwd", {
            "x": self.rows(n, k), "packed": self.packed(width, k), "bias": self.rng.choice([None, self.array(width)]),
            "residual": self.rng.choice([None, self.rows(n, width)]), "out": self.rows(n, width),
        }  # fmt: skip

    def linear_bwd(self) -> tuple[str, Arguments]:
        n, k, width = self.linear_sizes()
        arguments = {"dy": self.rows(n, k), "weight": self.rows(k, width), "dx": self.rows(n, width)}
        return "linear_bwd", arguments

    def linear_activation_fwd(self) -> tuple[str, Arguments]:
        n, k, width = self.linear_sizes()
        return "linear_activation_fwd", {
            "x": self.rows(n, k), "packed": self.packed(width, k), "bias": self.array(width), "kind": self.kind(),
            "u": self.rng.choice([None, self.rows(n, width)]), "out": self.rows(n, width),
        }  # fmt: skip

    def linear_activation_bwd(self) -> tuple[str, Arguments]:
        n, k, width = self.linear_sizes()
        return "linear_activation_bwd", {
            "dy": self.rows(n, k), "weight": self.rows(k, width), "u": self.rows(n, width), "kind": self.kind(),
            "du": self.rows(n, width),
        }  # fmt: skip

    def shift(self, batch: int, m: int, d: int) -> np.ndarray:
        return self.array(batch, m, d) if self.rng.random() < 0.5 else self.array(batch, d)

    def assemble_prompts_fwd(self) -> tuple[str, Arguments]:
        batch, m, d = self.size(), self.rng.choice([1, 2, 4]), max(self.size(), 1)
        return "assemble_prompts_fwd", {
            "vectors": self.rng.choice([None, self.array(m, d)]), "shift": self.shift(batch, m, d),
            "position": self.array(m, d), "gamma": self.array(d), "beta": self.array(d), "eps": 1e-5,
            "x": self.rows(batch, m, d), "y": self.rows(batch, m, d), "mean": self.array(batch * m),
            "rstd": self.array(batch * m),
        }  # fmt: skip

    def assemble_prompts_bwd(self) -> tuple[str, Arguments]:
        batch, m, d = self.size(), self.rng.choice([1, 2, 4]), max(self.size(), 1)
        return "assemble_prompts_bwd", {
            "dx": self.rows(batch, m, d), "d_vectors": self.rng.choice([None, self.array(m, d)]),
            "d_shift": self.shift(batch, m, d),
        }  # fmt: skip

    def assemble_dense(self) -> tuple[str, Arguments]:
        batch, m, d, k, suffix = self.rng.choice([0, 1, 3]), self.rng.choice([1, 2, 4]), max(self.size(), 1), self.size(), self.rng.choice([0, 1, 9])  # fmt: skip
        return "assemble_dense", {
            "context": self.array(batch, m, d), "prefix": self.array(k, d), "suffix": self.array(k, suffix, d),
            "out": self.array(batch, k, 1 + m + suffix, d),
        }  # fmt: skip

    def head_fwd(self) -> tuple[str, Arguments]:
        batch, k, width = self.rng.choice([0, 1, 2, 5]), self.size(), max(self.size(), 1)
        return "head_fwd", {
            "features": self.rows(batch, k, width), "image": self.array(batch, width), "scale": 100.0,
            "logits": self.array(batch, k), "inverse_norms": self.array(batch, k),
        }  # fmt: skip

    def head_bwd(self) -> tuple[str, Arguments]:
        _, arguments = self.head_fwd()
        batch, k, width = arguments["features"].shape
        more = {"d_logits": self.array(batch, k), "d_features": self.rows(batch, k, width)}
        return "head_bwd", {**arguments, **more}

    def cross_entropy(self) -> tuple[str, Arguments]:
        batch, k = self.size(), self.rng.choice([1, 2, 33, 5000])
        arguments = {"logits": self.array(batch, k), "labels": self.integers(batch, k)}
        if self.rng.random() < 0.5:
            return "cross_entropy_fwd", arguments
        more = {"grad_loss": 1.0, "d_logits": self.array(batch, k)}
        return "cross_entropy_bwd", {**arguments, **more}

    def move_rows(self) -> tuple[str, Arguments]:
        batch, rows, d = self.rng.choice([0, 1, 2, 50]), max(self.size(), 1), max(self.size(), 1)
        if self.rng.random() < 0.5:
            n = self.size()
            arguments = {
                "x": self.rows(batch, rows, d),
                "index": self.integers(n, rows),
                "out": self.rows(batch, n, d),
            }
            return "gather_rows", arguments
        index = self.integers(self.rng.randint(0, rows), rows)
        index[:] = self.bits.permutation(rows)[: len(index)]
        arguments = {"x": self.rows(batch, len(index), d), "index": index, "out": self.rows(batch, rows, d)}
        return "add_rows", arguments

    def plan(self) -> tuple[Any, int, int, int | None]:
        """Of a random tree; its M and N, and the number of its queries if they were chosen."""
        m, n = self.rng.choice([1, 2, 4]), self.size()
        parent, path = self.integers(n, 1), [-1]
        for node in range(n):
            del path[self.rng.randint(1, len(path)) :]
            parent[node] = path[-1]
            path.append(node)
        queries = self.memory(self.rng.randint(0, n), "int64") if self.rng.random() < 0.5 else None
        if queries is not None:
            queries[:] = np.sort(self.bits.permutation(n)[: len(queries)])
        good = (m, parent.copy(), None if queries is None else queries.copy())
        if self.rng.random() < 0.1:
            parent = self.hostile(parent)
        elif self.rng.random() < 0.1:
            m = self.hostile(m)
        plan = self.call("AttentionPlan", n_ctx=m, parent=parent, queries=queries)
        if plan is None:
            plan = CPP.load().AttentionPlan(*good)
        chosen = None if plan.n_queries == plan.n_ctx + plan.n_nodes and queries is None else plan.n_queries
        return plan, plan.n_ctx, plan.n_nodes, chosen

    def attention(self) -> tuple[str, Arguments]:
        plan, m, n, chosen = self.plan()
        batch, heads = self.rng.choice([0, 1, 2, 4]), self.rng.choice([1, 2, 3, 8])
        d = heads * self.rng.choice([1, 3, 8, 16, 33])
        queries = m + n if chosen is None else chosen

        def part(rows: int) -> np.ndarray:
            shapes = [(batch, rows, d), (batch, rows, d), (1, rows, d), (rows, d)]
            return self.rows(*self.rng.choice(shapes))

        inputs = {
            "plan": plan, "q_ctx": part(m) if chosen is None else None, "k_ctx": part(m), "v_ctx": part(m),
            "q_node": part(n if chosen is None else queries), "k_node": part(n), "v_node": part(n),
            "sos_k": self.array(d), "sos_v": self.array(d), "heads": heads,
        }  # fmt: skip
        if self.rng.random() < 0.4:
            return "tree_attention_fwd", {**inputs, "o": self.rows(batch, queries, d)}
        context_only = self.rng.random() < 0.5
        keys = m if context_only else m + n
        asks = (m if chosen is None else 0) if context_only else queries
        more = {
            "grad_o": self.rows(batch, queries, d), "dq": self.rows(batch, asks, d) if asks or not context_only else None,
            "dk": self.rows(batch, keys, d), "dv": self.rows(batch, keys, d),
            "workspace": self.array(plan.workspace_floats(batch, heads, d // heads)), "context_only": context_only,
        }  # fmt: skip
        return "tree_attention_bwd", {**inputs, **more}
