"""``cocoop-fast plan``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cocoop_fast.cli import output
from cocoop_fast.cli.bench import check_positive, class_names
from cocoop_fast.errors import UserError
from cocoop_fast.readable import readable_bytes, readable_flops, readable_time

if TYPE_CHECKING:
    from cocoop_fast.measure.predict import Model, Prediction, Schedule, Setting
    from cocoop_fast.prompts.tree import ClassTree

EPILOG = """
[bold]Examples[/bold]

1000 ImageNet classes on a 24 GB card: [cyan]cocoop-fast plan --k 1000 --device RTX-4090[/cyan]

Your classes on this machine, which is measured: [cyan]cocoop-fast plan --classes names.txt[/cyan]

All GPUs of the table: [cyan]cocoop-fast plan --list-devices[/cyan]
"""

WORKLOAD, SHOWN = "How much there is to do", "What is shown"
THIS_MACHINE = ("this", "cpu", "cuda")


def command(
    classes: Annotated[
        Path | None, typer.Option(help="Class names, one a line. Default: ImageNet's.", show_default=False)
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Only the first so many classes. Default: 100 of ImageNet's.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="open_clip architecture, or demo. No weights are needed.")
    ] = "ViT-B-16-quickgelu",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images a step.")] = 1,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16. auto: fp32 on a CPU, fp16 on a GPU.")
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(help="A GPU of the table, or this machine, which is measured: this, cpu or cuda."),
    ] = "this",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory that everything together may take, such as 8GB. Default: what the device has.",
            show_default=False,
        ),
    ] = None,
    ctx_init: Annotated[
        str, typer.Option(help="Words that the context begins as; they fix its length.")
    ] = "a photo of a",
    shots: Annotated[int, typer.Option(help="Training images a class.", rich_help_panel=WORKLOAD)] = 16,
    train_images: Annotated[
        int | None,
        typer.Option(
            help="Training images an epoch, instead of shots.", show_default=False, rich_help_panel=WORKLOAD
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs.", rich_help_panel=WORKLOAD)] = 10,
    test_images: Annotated[int, typer.Option(help="Test images.", rich_help_panel=WORKLOAD)] = 10_000,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch and the engine here. Default: torch's choice.")
    ] = None,
    list_devices: Annotated[
        bool,
        typer.Option("--list-devices", help="Print the table of GPUs and stop.", rich_help_panel=SHOWN),
    ] = False,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one line of JSON on stdout, and nothing else.", rich_help_panel=SHOWN
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; only the result.", rich_help_panel=SHOWN)
    ] = False,
) -> None:
    """Predict what training and evaluation will take: time, memory, and the largest batch that fits.

    The class tree is compared with the dense reference. Everything is counted from the shapes of the model and the
    names. This machine's speed is measured; a GPU's is assumed from its data sheet. No weights are loaded.
    """
    if list_devices:
        _print_devices(json)
        return
    check_positive(k=k, batch_size=batch_size, shots=shots, train_images=train_images)
    check_positive(epochs=epochs, test_images=test_images, threads=threads)
    from cocoop_fast.engine.memory import parse_bytes
    from cocoop_fast.measure.predict import Schedule, predict_dense, predict_tree

    limit = None if budget is None else parse_bytes(budget)
    names = class_names(classes, k)
    with output.only_json(json):
        tell = (lambda line: None) if quiet or json else _tell
        chosen = _choose_precision(precision, device)
        described, tree = _read(model, names, ctx_init, chosen)
        setting = _setting(described, tree, batch_size, chosen, device, threads, tell)
    limit = limit if limit is not None else setting.device.memory_bytes
    if limit is None:
        raise UserError("This system does not tell how much memory is available; give --budget.")
    schedule = Schedule(train_images or shots * tree.n_classes, epochs, test_images)
    predictions = {
        "tree": predict_tree(setting, schedule, limit),
        "dense": predict_dense(setting, schedule, limit),
    }
    if json:
        output.print_json(_to_mapping(setting, chosen, schedule, limit, predictions))
    else:
        _print(setting, chosen, schedule, limit, predictions)


def _read(model: str, names: tuple[str, ...], ctx_init: str, precision: str) -> tuple[Model, ClassTree]:
    from cocoop_fast.measure.architecture import describe_model
    from cocoop_fast.measure.devices import DTYPES
    from cocoop_fast.prompts.tokens import tokenize_prompts
    from cocoop_fast.prompts.tree import ClassTree

    described = describe_model(model, DTYPES[precision])
    if not ctx_init.split():
        raise UserError(
            "--ctx-init is empty, but its words fix the length of the context; give, say, 'X X X X'."
        )
    prompts = tokenize_prompts(
        names,
        ctx_init=ctx_init,
        n_ctx=len(ctx_init.split()),
        context_length=described.sizes.context_length,
    )
    return described, ClassTree(prompts.tokens, prompts.n_ctx)


def _choose_precision(precision: str, device: str) -> str:
    from cocoop_fast.measure.devices import DTYPES

    if precision not in ("auto", *DTYPES):
        raise UserError(f"--precision is '{precision}', but it must be auto, {', '.join(DTYPES)}.")
    on_cpu = _is_cpu(device)
    if on_cpu and precision not in ("auto", "fp32"):
        raise UserError(f"The engine computes in fp32 on a CPU, not in {precision}; leave --precision out.")
    if precision != "auto":
        return precision
    return "fp32" if on_cpu else "fp16"


def _is_cpu(device: str) -> bool:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU in this machine; use --device cpu, or name one of the table.")
    return device == "cpu" or (device == "this" and not torch.cuda.is_available())


def _setting(
    model: Model,
    tree: ClassTree,
    batch: int,
    precision: str,
    device: str,
    threads: int | None,
    tell: Callable[[str], None],
) -> Setting:
    from cocoop_fast.measure.cost import layout_on
    from cocoop_fast.measure.devices import find_gpu
    from cocoop_fast.measure.predict import Setting

    if device not in THIS_MACHINE:
        return Setting(model, tree, batch, find_gpu(device).at(precision), layout_on("cuda"))
    if not _is_cpu(device):
        from cocoop_fast.measure.this_gpu import measure_gpu

        tell("measuring this machine's GPU")
        return Setting(model, tree, batch, measure_gpu(precision), layout_on("cuda"))
    from cocoop_fast.measure.this_machine import measure_cpu, measure_process_bytes, use_threads

    with use_threads(threads):
        tell("measuring this machine's products, kernels and copies")
        machine = measure_cpu(model.weights, tree, batch)
        tell("measuring what a step takes besides its buffers")
        return Setting(model, tree, batch, machine, layout_on("cpu"), measure_process_bytes())


def _tell(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)


def _to_mapping(
    setting: Setting, precision: str, schedule: Schedule, budget: int, predictions: dict[str, Prediction]
) -> dict[str, Any]:
    return {
        "command": "plan",
        "prediction": True,
        "model": setting.model.name,
        "device": setting.device.name,
        "device_rates": setting.device.rates(),
        "precision": precision,
        "batch": setting.batch,
        "budget_bytes": budget,
        "tree": asdict(setting.counts),
        "schedule": asdict(schedule),
        "ways": {name: _row(found) for name, found in predictions.items()},
    }


def _row(found: Prediction) -> dict[str, Any]:
    step = found.step
    return {
        "rows": step.rows,
        "gemm_flops": step.gemm_flops,
        "flops": step.flops,
        "bytes": step.bytes,
        "launches": step.launches,
        "saved_bytes": step.saved_bytes,
        "activation_bytes": step.activation_bytes,
        "model_bytes": found.memory.model,
        "memory_bytes": found.memory.total,
        "step_seconds": found.step_seconds,
        "image_seconds": found.image_seconds,
        "epoch_seconds": found.epoch_seconds,
        "training_seconds": found.training_seconds,
        "evaluation_seconds": found.evaluation_seconds,
        "largest_batch": found.largest_batch,
        "fits": found.fits,
    }


def _print(
    setting: Setting, precision: str, schedule: Schedule, budget: int, predictions: dict[str, Prediction]
) -> None:
    counts, model = setting.counts, setting.model
    tree, dense = (_row(predictions[name]) for name in ("tree", "dense"))
    images = "1 image" if setting.batch == 1 else f"{setting.batch} images"
    print(
        f"Predicted, not measured: {model.name}, {counts.classes} classes, {images} a step, {precision}, "
        f"{setting.device.name}."
    )
    lines = [
        ("Rows a step", "rows", "{:,.0f}".format),
        ("FLOPs of a step", "flops", readable_flops),
        ("Bytes read and written", "bytes", readable_bytes),
        ("Kernels launched", "launches", "{:,.0f}".format),
        ("Activations at the peak", "activation_bytes", readable_bytes),
        ("Memory in all", "memory_bytes", readable_bytes),
        ("Text step", "step_seconds", readable_time),
        (f"Encoding {images}", "image_seconds", readable_time),
        (f"Epoch of {schedule.train_images:,} images", "epoch_seconds", readable_time),
        (f"Training, {schedule.epochs} epochs", "training_seconds", readable_time),
        (f"Testing {schedule.test_images:,} images", "evaluation_seconds", readable_time),
    ]
    rows = [
        [name, form(tree[key]), form(dense[key]), f"{dense[key] / tree[key]:.3g}"]
        for name, key, form in lines
    ]
    largest = [_batch(way["largest_batch"]) for way in (tree, dense)]
    rows.append([f"Largest batch in {readable_bytes(budget)}", *largest, output.NOTHING])
    output.print_table(["Prediction", "Class tree", "Dense", "Dense / tree"], rows)
    print(
        f"Tree: {counts.leaves:,} distinct prompts of {counts.classes:,}, {counts.nodes:,} nodes for "
        f"{counts.tokens:,} class tokens, {counts.rows:,} rows an image;\n"
        f"the longest prompt has {counts.longest} tokens."
    )
    print(
        "Dense: the reference's way, every prompt with all its tokens, in eager PyTorch. Text step: forward and\n"
        "backward from the image features on. Reading and augmenting images is not part of any figure."
    )
    if not tree["fits"]:
        print(
            f"This batch does not fit at once: that needs {readable_bytes(tree['memory_bytes'])}. "
            "In pieces it costs one more forward pass."
        )
    for name, value in setting.device.rates().items():
        print(f"{name.capitalize()}: {value}.")


def _print_devices(json: bool) -> None:
    from cocoop_fast.measure.devices import gpu_table

    if json:
        output.print_json({"command": "plan", "devices": [asdict(gpu) for gpu in gpu_table()]})
        return
    output.print_table(
        ["Device", "Source", "Memory", "Bandwidth", "fp32", "fp16", "bf16"],
        [
            [
                gpu.name,
                gpu.source,
                f"{gpu.memory_gb:g} GB",
                f"{gpu.bandwidth_gbs:,g} GB/s",
                *(
                    f"{gpu.tflops[p]:g}" if p in gpu.tflops else output.NOTHING
                    for p in ("fp32", "fp16", "bf16")
                ),
            ]
            for gpu in gpu_table()
        ],
        left=2,
    )
    print("Precisions: dense peak in TFLOP/s, as the makers' data sheets have it.")


def _batch(count: int) -> str:
    return f"{count:,.0f}" if count else "none"
