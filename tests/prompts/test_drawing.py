"""The drawing of a tree: every row once, each joined to its parent, and what is left out is counted."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from tiny_models import tiny_clip

from cocoop_fast import PromptLearner, reference_cfg
from cocoop_fast.experiments.experiment import Results, Row
from cocoop_fast.prompts.drawing import CONSTANT, CONTEXT, LEAF, NODE, describe_tree, draw_tree
from cocoop_fast.prompts.layout import layout_at
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree

NAMES = ["grey fox", "grey whale", "red <wolf>"]


def tree_of(names, position="end", **options):
    return ClassTree.from_layout(
        layout_at(tokenize_prompts(names, ctx_init="a photo of a"), position, **options)
    )


def parts(svg):
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    colours = [one.get("fill") for one in root.iter(f"{space}rect")]
    return colours, [one.text for one in root.iter(f"{space}text")], len(list(root.iter(f"{space}path")))


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_every_row_is_drawn_once_and_joined_to_its_parent(position, class_specific):
    tree = tree_of(NAMES, position, class_specific=class_specific)
    colours, texts, lines = parts(draw_tree(tree))
    assert len(colours) == len(texts) == 1 + len(tree.constants) + tree.rows and lines == len(colours) - 1
    slots = tree.n_ctx + int((tree.slot >= 0).sum())
    assert [colours.count(kind) for kind in (CONSTANT, CONTEXT, LEAF)] == [1 + len(tree.constants), slots, 3]
    assert colours.count(NODE) == len(tree) - 3 - (slots - tree.n_ctx)


def test_shared_words_stand_once_and_parents_in_the_middle_of_their_children():
    svg = draw_tree(tree_of(NAMES))
    assert svg.count(">grey<") == 1 and svg.count(">fox<") == 1 and "&lt;" in svg
    place = {
        text: float(y)
        for y, text in re.findall(r'y="([\d.]+)" text-anchor="middle" fill="#000">([^<]*)<', svg)
    }
    assert place["fox"] < place["grey"] < place["whale"]


def test_of_many_leaves_some_are_drawn_and_the_others_counted():
    tree = tree_of([f"animal {i}" for i in range(40)])
    colours, texts, _ = parts(draw_tree(tree, leaves=10))
    assert colours.count(LEAF) == 10 and texts[-1] == "and 30 more prompts"
    assert describe_tree(tree).startswith(
        f"40 classes: {tree.rows} rows an image (4 of context, {len(tree)} nodes) in"
    )
    assert f"in place of {40 * 77:,}" in describe_tree(tree)


def test_what_a_notebook_shows_of_trees_learners_and_results(tmp_path):
    tree = tree_of(NAMES)
    assert draw_tree(tree) in tree._repr_html_() and describe_tree(tree) in tree._repr_html_()
    clip = tiny_clip(layers=1)
    learner = PromptLearner(
        reference_cfg(ctx_init="a photo of a", n_ctx=4, precision="fp32", image_size=32), NAMES, clip
    )
    with torch.no_grad():
        learner.ctx.zero_()
    shown = learner._repr_html_()
    total = sum(one.numel() for one in learner.parameters())
    assert f"PromptLearner: {total:,} learned numbers." in shown and "meta_net.linear1.weight" in shown
    assert ">0.000<" in shown and draw_tree(tree) in shown
    row = Row("cocoop <1>", 1, 97.5, 0.0, 0.0, None, 12.34, tmp_path)
    html = Results((row,), tmp_path)._repr_html_()
    assert "cocoop &lt;1&gt;, seed 1" in html and ">97.50<" in html and ">0.00<" in html and ">H<" in html
    assert ">All<" not in html
