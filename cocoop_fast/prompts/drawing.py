"""A class tree as a picture, for notebooks and pages: what is computed once an image, and what all images share."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from cocoop_fast.clip.tokenizer import word_of
from cocoop_fast.prompts.tree import ClassTree

CONSTANT, CONTEXT, NODE, LEAF = "#d9d9d9", "#fdae6b", "#9ecae1", "#a1d99b"
KINDS = {
    CONSTANT: "a constant of the model",
    CONTEXT: "a context vector, learned",
    NODE: "a token of class names, a row an image",
    LEAF: "an end of text, where a class is read",
}
_ROW, _GAP, _HEIGHT, _LETTER = 24, 26, 18, 6.6  # pixels: of a leaf, between columns, of a box, of a letter


@dataclass
class _Box:
    text: str
    colour: str
    parent: int  # its index; -1: none
    column: int
    y: float = -1.0


def draw_tree(tree: ClassTree, *, leaves: int = 24) -> str:
    """The tree as SVG, from left to right: start of text, context, tokens of class names, ends of text.

    Args:
        tree: of any layout.
        leaves: to draw, at most, the first in the tree's order; a line below says how many more there are.

    Returns:
        An ``<svg>`` element.
    """
    drawn = tree.leaves[:leaves]
    part = tree if len(drawn) == len(tree.leaves) else tree.subtree(tree.ancestors(drawn))
    boxes = _boxes(part)
    _place(boxes)
    widths: dict[int, float] = {}
    for box in boxes:
        widths[box.column] = max(widths.get(box.column, 0.0), len(box.text) * _LETTER + 10)
    left, x = {}, 4.0
    for column in sorted(widths):
        left[column] = x
        x += widths[column] + _GAP
    height = max(box.y for box in boxes) + _ROW / 2 + 6
    lines, shapes = [], []
    for box in boxes:
        start, middle = left[box.column], box.y
        own = len(box.text) * _LETTER + 10
        if box.parent >= 0:
            above = boxes[box.parent]
            end = left[above.column] + len(above.text) * _LETTER + 10
            bend = start - _GAP / 2
            lines.append(
                f'<path d="M{end:.1f} {above.y:.1f} H{bend:.1f} V{middle:.1f} H{start:.1f}" fill="none" stroke="#888"/>'
            )
        shapes.append(
            f'<rect x="{start:.1f}" y="{middle - _HEIGHT / 2:.1f}" width="{own:.1f}" height="{_HEIGHT}" rx="4" '
            f'fill="{box.colour}"><title>{KINDS[box.colour]}</title></rect>'
            f'<text x="{start + own / 2:.1f}" y="{middle + 4:.1f}" text-anchor="middle" fill="#000">{escape(box.text)}</text>'
        )
    more = len(tree.leaves) - len(drawn)
    if more:
        shapes.append(f'<text x="4" y="{height + 10:.0f}" fill="#888">and {more:,} more prompts</text>')
        height += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x:.0f}" height="{height:.0f}" viewBox="0 0 {x:.0f} {height:.0f}" '
        f'font-family="sans-serif" font-size="11" role="img">{"".join(lines)}{"".join(shapes)}</svg>'
    )


def describe_tree(tree: ClassTree, tokens: int = 77) -> str:
    """In a sentence: its rows against those of dense prompts of ``tokens`` tokens."""
    dense = tree.n_classes * tokens
    return (
        f"{tree.n_classes:,} classes: {tree.rows:,} rows an image ({tree.rows - len(tree):,} of context, {len(tree):,} nodes) "
        f"in place of {dense:,} ({tree.n_classes:,} prompts of {tokens} tokens), {dense / tree.rows:.1f} times fewer."
    )


def _boxes(tree: ClassTree) -> list[_Box]:
    """Parents before their children: start of text, constants, leading context, nodes."""
    boxes = [_Box("SOS", CONSTANT, -1, 0)]
    for token, parent, depth in zip(
        tree.constants.token.tolist(),
        tree.constants.parent.tolist(),
        tree.constants.depth.tolist(),
        strict=True,
    ):
        boxes.append(_Box(word_of(token), CONSTANT, 1 + parent, 1 + depth))
    for m in range(tree.n_ctx):
        boxes.append(_Box(f"v{m + 1}", CONTEXT, len(boxes) - 1 if m else 0, 1 + m))
    first, last = len(boxes), len(boxes) - 1 if tree.n_ctx else 0
    ends = set(tree.leaves.tolist())
    for node, (token, slot, parent, above) in enumerate(
        zip(tree.token.tolist(), tree.slot.tolist(), tree.parent.tolist(), tree.above.tolist(), strict=True)
    ):
        under = first + parent if parent >= 0 else 1 + above if above >= 0 else last
        colour = LEAF if node in ends else CONTEXT if slot >= 0 else NODE
        text = "EOT" if node in ends else f"v{slot % tree.n_slots + 1}" if slot >= 0 else word_of(token)
        boxes.append(_Box(text, colour, under, boxes[under].column + 1))
    return boxes


def _place(boxes: list[_Box]) -> None:
    """Leaves below each other, every other box in the middle of its children."""
    children: dict[int, list[int]] = {}
    for index, box in enumerate(boxes):
        children.setdefault(box.parent, []).append(index)
    row, open_boxes = 0, [0]
    order = []  # depth first: a box after the leaves that are drawn above it
    while open_boxes:
        index = open_boxes.pop()
        order.append(index)
        open_boxes += reversed(children.get(index, []))
    for index in order:
        if index not in children:
            boxes[index].y = 6 + _ROW * (row + 0.5)
            row += 1
    for index in reversed(order):
        if index in children:
            inner = [boxes[child].y for child in children[index]]
            boxes[index].y = (min(inner) + max(inner)) / 2
