"""Take every architecture of open_clip through a plan, or to its refusal, and write docs/architectures.md.

    python tools/make_architectures_page.py              # some minutes; no weights are needed

Each is built without weights, as `cocoop-fast plan --model` does; what is refused there is refused by every command before
its weights are downloaded. Any failure but a sentence of ours ends the tool, and nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch

from cocoop_fast.errors import UserError
from cocoop_fast.measure.architecture import describe_model

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
INTRODUCTION = """# Architectures

What becomes of each architecture of open_clip {version}: its text tower is one that prompts can be learned for, or it is refused
in a sentence, before any weights are downloaded. [Models and weights](weights.md) says how to name weights for them.

This page is generated: `python tools/make_architectures_page.py`. `make soak` makes it anew and compares.
"""


@dataclass(frozen=True)
class Found:
    """An architecture that works, or (then the numbers are zero) why it does not."""

    name: str
    refusal: str = ""
    layers: int = 0
    width: int = 0
    positions: int = 0
    activation: str = ""
    parameters: int = 0
    image_flops: float = 0.0


def look_at(name: str) -> Found:
    """One architecture. Raises whatever is not a refusal."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = describe_model(name, torch.float32)
    except UserError as error:
        return Found(name, str(error).replace(f"'{name}'", "the model"))
    text = model.weights
    return Found(
        name,
        layers=len(text.blocks),
        width=text.width,
        positions=len(text.positional_embedding),
        activation={"gelu": "GELU", "quick_gelu": "QuickGELU"}[text.activation],
        parameters=model.parameters,
        image_flops=model.image_flops,
    )


def page(found: Sequence[Found]) -> str:
    """The page's text."""
    works = [one for one in found if not one.refusal]
    refused: dict[str, list[str]] = {}
    for one in found:
        if one.refusal:
            refused.setdefault(one.refusal, []).append(f"`{one.name}`")
    lines = [
        INTRODUCTION.format(version=open_clip.__version__),
        f"## What works: {len(works)}",
        "",
        "| architecture | text layers | width | positions | activation | parameters, millions | GFLOPs of an image |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{one.name}` | {one.layers} | {one.width} | {one.positions} | {one.activation} | {one.parameters / 1e6:,.0f} "
        f"| {one.image_flops / 1e9:,.1f} |"
        for one in works
    ]
    lines += [
        "",
        f"## What is refused: {sum(map(len, refused.values()))}",
        "",
        "| the sentence | architectures |",
        "|---|---|",
    ]
    lines += [f"| {sentence} | {', '.join(names)} |" for sentence, names in refused.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(arguments)
    found = []
    for name in open_clip.list_models():
        found.append(look_at(name))
        print(f"{name}: {found[-1].refusal or 'works'}", flush=True)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
