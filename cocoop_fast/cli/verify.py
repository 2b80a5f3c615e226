"""``cocoop-fast verify``."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import typer

from cocoop_fast.cli import failures, options, output
from cocoop_fast.cli.options import Positive, Words
from cocoop_fast.errors import UserError
from cocoop_fast.readable import readable_images

if TYPE_CHECKING:
    from cocoop_fast.measure.verify import PruningError, Verdict

PRECISIONS = {"cpu": ("fp64", "fp32"), "cuda": ("fp64", "fp32", "fp16", "bf16")}
ACTIVATIONS = {"gelu": "GELU", "quick_gelu": "QuickGELU"}
COLUMNS = {
    "logits": "Logits",
    "loss": "Loss",
    "gradients": "Gradient",
    "losses": "Losses",
    "parameters": "Moved",
}


@options.command()
def command(
    *,
    classes: list[str] | None = None,
    k: Positive | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    ctx_init: Words = "a photo of a",
    attributes: str | None = None,
    batch_size: Positive = 1,
    steps: Positive = 3,
    device: str = "auto",
    precision: list[Literal["fp64", "fp32", "fp16", "bf16"]] | None = None,
    backend: list[Literal["torch", "cpu", "triton", "cuda"]] | None = None,
    consistency: Literal["none", "l1", "cosine"] = "none",
    prune_mass: float = 0.0,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Certify that the fast engine computes what the dense reference does, on this model, classes and device.

    Logits, loss, gradients and training steps are compared with the dense oracle in float64, beside the errors
    that the dense oracle itself makes in lower precision. The exit status is 1 if one is too large.

    Args:
        k: Only the first so many classes. Default: 20 of ImageNet's.
        attributes: Between learned contexts (ATPrompt), as in color,shape.
        model: open_clip architecture, OpenAI's name, or demo. Default: ViT-B/16's text tower with random weights.
        steps: Training steps to compare.
        precision: May be repeated. Default: all that the device is used in.
        backend: May be repeated. Default: all that can be used.
        consistency: Of the loss, too: what keeps text features near those of hand-written prompts, by their l1 distance as
            PromptSRC, or cosine as KgCoOp, with their weights.
        prune_mass: Also measure the error of the gradient that tail pruning makes; 0: do not.

    Examples:
        A text tower of ViT-B/16's size, 20 ImageNet names: verify
        Your model and classes, on your GPU: verify --model ViT-B/16 --classes names.txt --device cuda
        The loss of --method cocoop+consistency: verify --model demo --k 10 --consistency l1
        What pruning would cost: verify --model demo --k 10 --prune-mass 0.01
        One backend, for a program to read: verify --model demo --k 10 --backend torch --json
    """
    with output.loading(silent=quiet):
        import torch

        from cocoop_fast.clip.load import resolve_device
        from cocoop_fast.measure.problem import build_problem, with_other_activation
        from cocoop_fast.measure.verify import contestants, distance, measure_pruning, verify
    if not 0 <= prune_mass < 1:
        raise UserError(f"--prune-mass is {prune_mass:g}, but it must be at least 0 and below 1.")
    if prune_mass and consistency != "none":
        raise UserError(
            "--prune-mass and --consistency exclude each other, as in training; give one of them."
        )
    names = options.class_names(classes, k, 20)
    words = () if attributes is None else tuple(options.list_of(attributes, "--attributes"))
    if "published" in words:
        raise UserError(
            "verify knows no data set whose attributes are published; list them: --attributes color,shape."
        )
    spec = options.problem_spec(names, batch_size, model, pretrained, ctx_init, words)
    spec = replace(spec, consistency=consistency)

    where = resolve_device(device)
    for name in precision or ():
        if name not in PRECISIONS[where.type]:
            raise UserError(
                f"--precision is '{name}', but on {where.type} it must be one of {', '.join(PRECISIONS[where.type])}."
            )
    with output.only_json(json):
        problem = build_problem(spec)
        if len(problem.learned["ctx"]) != len(ctx_init.split()):
            raise UserError(
                f"The oracle reads --ctx-init '{ctx_init}' word by word, but some word has several tokens; choose others."
            )
        asked = list(contestants(where, precision or PRECISIONS[where.type], backend or ()))
        tell = output.teller("verify", silent=quiet or json)
        verdicts = verify(problem, asked, device=where, steps=steps, tell=tell)
        # If the weights do not say which activation they were trained with, either may be the one.
        other = with_other_activation(problem) if problem.activation_assumed else None
        others = [] if other is None else verify(other, asked, device=where, steps=steps, tell=tell)
        apart = None if other is None else distance(problem, other, where)
        pruned = (
            measure_pruning(problem, asked, prune_mass, device=where, batches=steps) if prune_mass else []
        )
    compared = [verdict for verdict in (*verdicts, *others) if verdict.allowed is not None]
    if not compared:
        raise UserError(
            f"No backend asked for computes in these precisions on {where.type}; leave --backend out."
        )
    within = all(verdict.within for verdict in compared)
    found: dict[str, Any] = {
        "command": "verify",
        "within": within,
        "model": spec.model_name,
        "pretrained": spec.pretrained,
        "classes": len(names),
        "attributes": list(words),
        "batch": batch_size,
        "steps": steps,
        "consistency": consistency,
        "device": str(where),
        "torch": torch.__version__,
        "activation": problem.weights.activation,
        "activation_assumed": problem.activation_assumed,
        "rows": [_row(verdict) for verdict in verdicts],
    }
    if other is not None:
        found["other_activation"] = {
            "activation": other.weights.activation,
            "logits_differ": apart,
            "rows": [_row(verdict) for verdict in others],
        }
    if prune_mass:
        found["pruning"] = {"prune_mass": prune_mass, "rows": [_pruning_row(one) for one in pruned]}
    if json:
        output.print_json(found)
    else:
        _print(found, verdicts, others)
        if prune_mass:
            _print_pruning(found["pruning"], len(names))
    if not within:
        raise typer.Exit(failures.FAILED)


def _row(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.contestant.name,
        "precision": verdict.contestant.precision,
        "dense": verdict.contestant.dense,
        "errors": asdict(verdict.errors),
        "allowed": None if verdict.allowed is None else asdict(verdict.allowed),
        "within": verdict.within,
    }


def _print(found: dict[str, Any], verdicts: list[Verdict], others: list[Verdict]) -> None:
    images = readable_images(found["batch"])
    activation = ACTIVATIONS[found["activation"]]
    said = f"{activation}, which is assumed" if found["activation_assumed"] else activation
    prompts = f"attributes {', '.join(found['attributes'])}, " if found["attributes"] else ""
    near = "" if found["consistency"] == "none" else f", with consistency {found['consistency']} in the loss"
    output.say(
        f"{found['model']}: {said}; {found['classes']} classes, {prompts}{images} a step{near}, {found['device']}."
    )
    _print_verdicts(verdicts)
    if others:
        other = found["other_activation"]
        title = ACTIVATIONS[other["activation"]]
        output.say(f"The same with {title}:")
        _print_verdicts(others)
        output.say(
            f"The weights do not say which activation they were trained with. Logits with {title} differ from those with "
            f"{activation} by {other['logits_differ']:.1e} of the largest: the wrong one changes every result."
        )
    output.say(
        "Largest errors against the dense oracle in fp64, relative to the largest element. Losses: those of "
        f"{found['steps']} training steps.\nMoved: how far these moved what is learned. A dense row is the dense path's own error."
    )
    for verdict in (*verdicts, *others):
        for name, error, most in verdict.outside():
            path = f"{verdict.contestant.name} in {verdict.contestant.precision}"
            output.say(f"{path}: {COLUMNS[name].lower()} is off by {error:.1e}, but {most:.1e} is allowed.")
    output.say("Equivalent: every error is within its bound." if found["within"] else "NOT equivalent.")


def _print_verdicts(verdicts: list[Verdict]) -> None:
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
        ]
        + [
            [
                "bound",
                verdict.contestant.precision,
                *(f"{most:.1e}" for most in asdict(verdict.allowed).values()),
                None,
            ]
            for verdict in {one.contestant.precision: one for one in verdicts if one.allowed}.values()
            if verdict.allowed is not None
        ],
        left=2,
    )


def _pruning_row(one: PruningError) -> dict[str, Any]:
    figures = dict(vars(one))
    contestant = figures.pop("contestant")
    return {"name": contestant.name, "precision": contestant.precision, **figures}


def _print_pruning(found: dict[str, Any], classes: int) -> None:
    output.say(
        f"\nPruning with prune_mass {found['prune_mass']:g}, which is not exact, against the same path without it:"
    )
    output.print_table(
        ["Path", "In", "Gradient", "Weights left out", "Classes in backward"],
        [
            [
                row["name"],
                row["precision"],
                f"{row['gradients']:.1e}",
                f"{row['share_left_out']:.2%}",
                f"{row['classes_kept']} of {classes}",
            ]
            for row in found["rows"]
        ],
        left=2,
    )
    output.say("The worst of the batches. Gradient: its error in the Euclidean norm, relative.")


def _word(verdict: Verdict) -> str | None:
    if verdict.allowed is None:
        return None
    return "within" if verdict.within else "OUTSIDE"
