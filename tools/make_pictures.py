"""The pictures of the README, as SVG: what the tree saves, and what a step costs.

    python tools/make_pictures.py    # writes docs/images/tree.svg and docs/images/step.svg

The times are those of docs/performance.md's table for 100 classes, which names the machine; nothing is measured here.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from cocoop_fast.prompts.drawing import CONSTANT, CONTEXT, KINDS, LEAF, NODE, draw_tree
from cocoop_fast.prompts.layout import layout_at
from cocoop_fast.prompts.tokens import tokenize_prompts
from cocoop_fast.prompts.tree import ClassTree

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("grey fox", "grey whale", "grey wolf", "great white heron", "great white shark", "fox squirrel")
PADDING = "#ffffff"
WIDTH = 820
# The table's name of a contestant, how a reader knows it, and the colour of its bar.
BARS = {
    "dense": ("Dense: 77 tokens a prompt, as in the reference", "#bdbdbd"),
    "truncated": ("Prompts cut to the longest", "#bdbdbd"),
    "truncated+compile": ("The same under torch.compile", "#bdbdbd"),
    "padding-free": ("Padding-free batch of the prompts", "#bdbdbd"),
    "tree+torch": ("Class tree, torch operations", "#6baed6"),
    "engine": ("Class tree, C++ engine", "#2171b5"),
}


def main() -> None:
    for name, made in pictures().items():
        (DOCS / "images" / name).write_text(made, encoding="utf-8")


def pictures() -> dict[str, str]:
    """Each picture by its file's name."""
    return {"tree.svg": tree_picture(), "step.svg": step_picture()}


def tree_picture() -> str:
    """Above, every token of the dense prompts; below, the tree that has each distinct row once."""
    prompts = tokenize_prompts(NAMES, n_ctx=4)
    tree = ClassTree.from_layout(layout_at(prompts))
    length = prompts.tokens.shape[1]
    cell, left, parts, y = 8.0, 140, [], 34.0
    parts.append(_text(10, 18, f"As the reference computes it: {len(NAMES)} prompts of {length} tokens,"
                               f" {len(NAMES) * length} rows for each image", bold=True))  # fmt: skip
    for name, row in zip(NAMES, prompts.tokens, strict=True):
        end = int(row.argmax())
        parts.append(_text(left - 8, y + 10, name, anchor="end"))
        for place in range(length):
            colour = (
                CONSTANT
                if place == 0
                else CONTEXT
                if place <= 4
                else LEAF
                if place == end
                else NODE
                if place < end
                else PADDING
            )
            parts.append(
                f'<rect x="{left + place * cell:.0f}" y="{y:.0f}" width="{cell - 1:.0f}" height="13" fill="{colour}" '
                'stroke="#ccc" stroke-width="0.5"/>'
            )
        y += 17
    y += 26
    saved = len(NAMES) * length / tree.rows
    parts.append(_text(10, y, f"As a class tree: {tree.rows} rows for each image, {saved:.0f} times fewer, and the same"
                              " numbers come out", bold=True))  # fmt: skip
    inner = draw_tree(tree)
    height = int(re.search(r'height="(\d+)"', inner)[1])  # type: ignore[index]  # draw_tree's own
    parts.append(inner.replace("<svg ", f'<svg x="10" y="{y + 10:.0f}" ', 1))
    y += height + 34
    x = 10.0
    for colour, what in {**KINDS, PADDING: "padding, never read"}.items():
        parts.append(
            f'<rect x="{x:.0f}" y="{y - 10:.0f}" width="12" height="12" fill="{colour}" stroke="#ccc"/>'
        )
        parts.append(_text(x + 16, y, what.partition(",")[0] if colour in (CONTEXT, NODE, LEAF) else what))
        x += 30 + 6.2 * len(what.partition(",")[0] if colour in (CONTEXT, NODE, LEAF) else what)
    return _svg(parts, int(y) + 14, "Dense prompts and the class tree of the same class names")


def step_picture() -> str:
    """The table of docs/performance.md for 100 classes as bars from zero."""
    page = (DOCS / "performance.md").read_text(encoding="utf-8")
    machine = re.search(r"<!-- begin machine -->\n(.*?)\n<!-- end -->", page, re.DOTALL)
    table = re.search(r"<!-- begin step-k100 -->(.*?)<!-- end -->", page, re.DOTALL)
    if machine is None or table is None:
        raise SystemExit("docs/performance.md has no machine or no table for 100 classes")
    steps = {
        name: (float(number) * {"s": 1.0, "ms": 1e-3}[unit], speedup)
        for name, number, unit, speedup in re.findall(
            r"^\| ([\w+-]+):[^|]*\|[^|]*\| ([\d.]+) (m?s) \|[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \|",
            table[1],
            re.MULTILINE,
        )
    }
    left, most, y = 300, WIDTH - 300 - 70, 60
    parts = [
        _text(
            10,
            18,
            "One training step of CoCoOp: 100 classes, one image, text tower of ViT-B/16, float32",
            bold=True,
        ),
        _text(10, 36, " ".join(machine[1].split()), colour="#666"),
    ]
    for name, (words, colour) in BARS.items():
        seconds, speedup = steps[name]
        length = most * seconds / steps["dense"][0]
        parts.append(_text(left - 8, y + 14, words, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="20" fill="{colour}"/>')
        times = "" if name == "dense" else f" ({speedup} times faster)"
        parts.append(_text(left + length + 6, y + 14, f"{seconds:.2f} s{times}"))
        y += 26
    return _svg(parts, y + 6, "Time of a training step by how the prompts are computed")


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False, colour: str = "#000"
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(text)}</text>'
    )


def _svg(parts: list[str], height: int, title: str) -> str:
    """On white, which is read in dark pages too."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" role="img"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
