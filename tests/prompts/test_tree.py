"""ClassTree: structure, order, sharing, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cocoop_fast import ClassTree, UserError
from cocoop_fast.prompts.tokens import tokenize_prompts

SOS, EOT = 900, 999


def prompts(*paths: list[int], n_ctx: int = 2, length: int = 12) -> torch.Tensor:
    ids = torch.zeros(len(paths), length, dtype=torch.int64)
    for k, path in enumerate(paths):
        row = [SOS, *[7] * n_ctx, *path, EOT]
        ids[k, : len(row)] = torch.tensor(row)
    return ids


def test_structure_of_a_small_tree():
    tree = ClassTree(prompts([5, 3], [1, 2], [1], [1, 2, 4]), n_ctx=2)
    # Depth first, classes in the order of their tokens: [1 2 4 EOT], [1 2 EOT], [1 EOT], [5 3 EOT].
    assert tree.token.tolist() == [1, 2, 4, EOT, EOT, EOT, 5, 3, EOT]
    assert tree.parent.tolist() == [-1, 0, 1, 2, 1, 0, -1, 6, 7]
    assert tree.depth.tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert tree.subtree_end.tolist() == [6, 5, 4, 4, 5, 6, 9, 9, 9]
    assert tree.eot.tolist() == [8, 4, 5, 3]
    assert (len(tree), tree.rows, tree.max_depth, tree.sos) == (9, 11, 4, SOS)
    assert tree.path[3].tolist() == [0, 1, 2, 3]
    assert tree.path[5].tolist() == [0, 5, -1, -1]


def test_duplicate_classes_share_a_leaf():
    tree = ClassTree(prompts([4, 2], [3], [4, 2]), n_ctx=2)
    assert tree.eot[0] == tree.eot[2] != tree.eot[1]
    assert len(tree.leaves) == 2
    assert tree.leaves[tree.leaf_of_class].equal(tree.eot)


def test_one_class():
    tree = ClassTree(prompts([8]), n_ctx=2)
    assert tree.token.tolist() == [8, EOT]
    assert tree.eot.tolist() == [1]


def test_imagenet_names_have_the_published_size():
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    with pytest.warns(UserWarning, match="same prompt"):  # the list has pairs of equal names
        tokens = tokenize_prompts(IMAGENET_CLASSNAMES, ctx_init="a photo of a").tokens
    tree = ClassTree(tokens, n_ctx=4)
    assert (tree.n_classes, len(tree), len(tree.leaves)) == (1000, 4003, 998)


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=8), min_size=1, max_size=40), st.integers(1, 4)
)
def test_every_class_reads_its_own_tokens(paths, n_ctx):
    tree = ClassTree(prompts(*paths, n_ctx=n_ctx, length=16), n_ctx)
    assert len(tree) == len({(*p, EOT)[: i + 1] for p in paths for i in range(len(p) + 1)})
    for k, path in enumerate(paths):
        nodes = tree.path[tree.eot[k]]
        nodes = nodes[nodes >= 0]
        assert tree.token[nodes].tolist() == [*path, EOT]
        assert nodes.tolist() == sorted(nodes.tolist())
    n = torch.arange(len(tree))
    for j in range(len(tree)):  # the readers of a key are a contiguous range
        readers = (tree.path == j).any(dim=1)
        assert readers.equal((n >= j) & (n < tree.subtree_end[j]))
    assert (tree.parent < n).all()


@pytest.mark.parametrize(
    ("tokens", "n_ctx", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 1, r"\(K, L\)"),
        (torch.zeros(0, 5, dtype=torch.int64), 1, "K >= 1"),
        (torch.zeros(2, 5), 1, "integer token ids"),
        (prompts([1]), 0, "n_ctx"),
        (prompts([1]), 2.0, "n_ctx"),
        (prompts([1], [2, 3]), 4, "Prompt 0 ends at position 4, inside its 4 context tokens"),
        (torch.tensor([[1, 2, 9], [3, 2, 9]]), 1, "same start-of-text"),
    ],
)
def test_errors(tokens, n_ctx, message):
    with pytest.raises(UserError, match=message):
        ClassTree(tokens, n_ctx)


def test_numpy_input():
    ids = prompts([5, 3], [1, 2])
    assert ClassTree(np.asarray(ids, dtype=np.int32), 2).token.equal(ClassTree(ids, 2).token)
