"""``cocoop-fast verify``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoop_fast.cli import failures, output
from cocoop_fast.cli.bench import check_positive, class_names
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.measure.problem import ProblemSpec
    from cocoop_fast.measure.verify import PruningError, Verdict

EPILOG = """
[bold]Examples[/bold]

A text tower of ViT-B/16's size, 20 ImageNet names: [cyan]cocoop-fast verify[/cyan]

Your model and classes, on your GPU: [cyan]cocoop-fast verify --model ViT-B/16 --classes names.txt --device cuda[/cyan]

What pruning would cost: [cyan]cocoop-fast verify --model demo --k 10 --prune-mass 0.01[/cyan]

One backend, for a program to read: [cyan]cocoop-fast verify --model demo --k 10 --backend torch --json[/cyan]
"""

PRECISIONS = {"cpu": ("fp64", "fp32"), "cuda": ("fp64", "fp32", "fp16", "bf16")}
COLUMNS = {
    "logits": "Logits",
    "loss": "Loss",
    "gradients": "Gradient",
    "losses": "Losses",
    "parameters": "Moved",
}


def command(
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names, one a line. Default: 20 of ImageNet's.", show_default=False),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Only the first so many classes.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="open_clip architecture, OpenAI's name, or demo. Default: ViT-B/16's text tower with random weights.",
            show_default=False,
        ),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(help="open_clip tag of the weights, a local file, or random.", show_default=False),
    ] = None,
    ctx_init: Annotated[str, typer.Option(help="Words that the context begins as.")] = "a photo of a",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a step.")] = 1,
    steps: Annotated[int, typer.Option(help="Training steps to compare.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="fp64|fp32|fp16|bf16",
            help="May be repeated. Default: all that the device is used in.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            metavar="torch|cpu|triton|cuda",
            help="May be repeated. Default: all that can be used.",
            show_default=False,
        ),
    ] = None,
    prune_mass: Annotated[
        float,
        typer.Option(
            "--prune-mass", help="Also measure the error of the gradient that tail pruning makes. 0: do not."
        ),
    ] = 0.0,
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON on stdout, and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")] = False,
) -> None:
    """Certify that the fast engine computes what the dense reference does, on this model, classes and device.

    Logits, loss, gradients and training steps are compared with the dense oracle in float64, beside the errors
    that the dense oracle itself makes in lower precision. The exit status is 1 if one is too large.
    """
    check_positive(k=k, batch_size=batch_size, steps=steps)
    if not 0 <= prune_mass < 1:
        raise UserError(f"--prune-mass is {prune_mass:g}, but it must be at least 0 and below 1.")
    names = class_names(classes, 20 if classes is None and k is None else k)
    spec = _spec(names, batch_size, model, pretrained, ctx_init)

    from cocoop_fast.clip.load import resolve_device
    from cocoop_fast.measure.problem import build_problem
    from cocoop_fast.measure.verify import contestants, measure_pruning, verify

    where = resolve_device(device)
    for name in precision or ():
        if name not in PRECISIONS[where.type]:
            raise UserError(
                f"--precision is '{name}', but on {where.type} it must be one of {', '.join(PRECISIONS[where.type])}."
            )
    _check_backends(backend or [])
    with output.only_json(json):
        problem = build_problem(spec)
        if len(problem.learned["ctx"]) != len(ctx_init.split()):
            raise UserError(
                f"The oracle reads --ctx-init '{ctx_init}' word by word, but some word has several tokens; choose others."
            )
        asked = list(contestants(where, precision or PRECISIONS[where.type], backend or ()))
        verdicts = verify(
            problem,
            asked,
            device=where,
            steps=steps,
            tell=(lambda line: None) if quiet or json else _tell,
        )
        pruned = (
            measure_pruning(problem, asked, prune_mass, device=where, batches=steps) if prune_mass else []
        )
    compared = [verdict for verdict in verdicts if verdict.allowed is not None]
    if not compared:
        raise UserError(
            f"No backend asked for computes in these precisions on {where.type}; leave --backend out."
        )
    within = all(verdict.within for verdict in compared)
    if json:
        found = _to_mapping(spec, str(where), steps, verdicts, within)
        if prune_mass:
            found["pruning"] = {"prune_mass": prune_mass, "rows": [_pruning_row(one) for one in pruned]}
        output.print_json(found)
    else:
        _print(spec, str(where), steps, verdicts, within)
        if prune_mass:
            _print_pruning(prune_mass, len(names), pruned)
    if not within:
        raise typer.Exit(failures.FAILED)


def _spec(
    names: tuple[str, ...], batch_size: int, model: str | None, pretrained: str | None, ctx_init: str
) -> ProblemSpec:
    from cocoop_fast.cli.reference_config import open_clip_name
    from cocoop_fast.measure.problem import ProblemSpec

    if pretrained is not None and model is None:
        raise UserError("--pretrained needs the --model that it belongs to.")
    if not ctx_init.split():
        raise UserError("--ctx-init is empty; give the words that the context begins as, say 'X X X X'.")
    spelled = open_clip_name(model or "")
    if spelled is not None:
        model, pretrained = spelled[0], pretrained or spelled[1]
    return ProblemSpec(classes=names, batch=batch_size, model=model, pretrained=pretrained, ctx_init=ctx_init)


def _check_backends(chosen: list[str]) -> None:
    from cocoop_fast.ops.table import BACKENDS

    known = [backend.name for backend in BACKENDS]
    for name in chosen:
        if name not in known:
            raise UserError(f"--backend is '{name}', but it must be one of {', '.join(known)}.")


def _tell(line: str) -> None:
    print(f"verify: {line}", file=sys.stderr, flush=True)


def _to_mapping(
    spec: ProblemSpec, device: str, steps: int, verdicts: list[Verdict], within: bool
) -> dict[str, Any]:
    import torch

    return {
        "command": "verify",
        "within": within,
        "model": spec.model_name,
        "pretrained": spec.pretrained,
        "classes": len(spec.classes),
        "batch": spec.batch,
        "steps": steps,
        "device": device,
        "torch": torch.__version__,
        "rows": [
            {
                "name": verdict.contestant.name,
                "precision": verdict.contestant.precision,
                "dense": verdict.contestant.dense,
                "errors": asdict(verdict.errors),
                "allowed": None if verdict.allowed is None else asdict(verdict.allowed),
                "within": verdict.within,
            }
            for verdict in verdicts
        ],
    }


def _print(spec: ProblemSpec, device: str, steps: int, verdicts: list[Verdict], within: bool) -> None:
    images = "1 image" if spec.batch == 1 else f"{spec.batch} images"
    print(f"{spec.model_name}: {len(spec.classes)} classes, {images} a step, {device}.")
    output.print_table(
        ["Path", "In", *COLUMNS.values(), "Verdict"],
        [
            [
                verdict.contestant.name,
                verdict.contestant.precision,
                *(f"{error:.1e}" for error in asdict(verdict.errors).values()),
                _word(verdict),
            ]
            for verdict in verdicts
        ],
        left=2,
    )
    print(
        "Largest errors against the dense oracle in fp64, relative to the largest element. Losses: those of "
        f"{steps} training steps.\nMoved: how far these moved what is learned. A dense row is the dense path's own error."
    )
    for verdict in verdicts:
        for name, error, most in verdict.outside():
            path = f"{verdict.contestant.name} in {verdict.contestant.precision}"
            print(f"{path}: {COLUMNS[name].lower()} is off by {error:.1e}, but {most:.1e} is allowed.")
    print("Equivalent: every error is within its bound." if within else "NOT equivalent.")


def _pruning_row(one: PruningError) -> dict[str, Any]:
    return {
        "name": one.contestant.name,
        "precision": one.contestant.precision,
        "gradients": one.gradients,
        "share_left_out": one.share_left_out,
        "classes_kept": one.classes_kept,
    }


def _print_pruning(prune_mass: float, classes: int, found: list[PruningError]) -> None:
    print(f"\nPruning with prune_mass {prune_mass:g}, which is not exact, against the same path without it:")
    output.print_table(
        ["Path", "In", "Gradient", "Weights left out", "Classes in backward"],
        [
            [
                one.contestant.name,
                one.contestant.precision,
                f"{one.gradients:.1e}",
                f"{one.share_left_out:.2%}",
                f"{one.classes_kept} of {classes}",
            ]
            for one in found
        ],
        left=2,
    )
    print("The worst of the batches. Gradient: its error in the Euclidean norm, relative.")


def _word(verdict: Verdict) -> str:
    if verdict.allowed is None:
        return output.NOTHING
    return "within" if verdict.within else "OUTSIDE"
