"""An encoder of many short class names over a tiny CLIP."""

from __future__ import annotations

import torch
from tiny_models import tiny_clip

from cocoop_fast import ClassTree, TreeTextEncoder

SOS, EOT, M = 900, 999, 4
NAMES = [[1 + i % 5, 10 + i // 5, *[3] * (i % 4)] for i in range(60)] + [[1, 10], [1, 10]]


def tree_of(names, n_ctx=M):
    ids = torch.zeros(len(names), 77, dtype=torch.int64)
    for k, name in enumerate(names):
        row = [SOS, *[7] * n_ctx, *name, EOT]
        ids[k, : len(row)] = torch.tensor(row)
    return ClassTree(ids, n_ctx)


def encoder(dtype=torch.float32, backend="auto", memory_budget=None):
    model = tiny_clip(dtype=dtype, vocab_size=1000)
    return TreeTextEncoder(model, tree_of(NAMES), backend=backend, memory_budget=memory_budget)
