"""``cocoop-fast plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cocoop_fast.cli import options, output
from cocoop_fast.cli.options import Positive, Words
from cocoop_fast.cli.reference_config import open_clip_name
from cocoop_fast.errors import UserError
from cocoop_fast.readable import readable_bytes, readable_flops, readable_images, readable_time

if TYPE_CHECKING:
    from cocoop_fast.measure.predict import Model, Prediction, Setting
    from cocoop_fast.prompts.tokens import TokenizedPrompts
    from cocoop_fast.prompts.tree import ClassTree

_SIZES = (2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)  # classes that are drawn
PRECISIONS = ("fp32", "fp16", "bf16")
# Of a step, in the line of JSON; the figures of the whole prediction follow.
STEP = ("rows", "gemm_flops", "flops", "bytes", "launches", "saved_bytes", "activation_bytes")


@options.command()
def command(
    *,
    classes: list[str] | None = None,
    k: Positive | None = None,
    model: str = "ViT-B-16-quickgelu",
    batch_size: Positive = 1,
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto",
    device: str = "this",
    budget: str | None = None,
    ctx_init: Words = "a photo of a",
    shots: Positive = 16,
    train_images: Positive | None = None,
    epochs: Positive = 10,
    test_images: Positive = 10_000,
    threads: Positive | None = None,
    list_devices: bool = False,
    plot: Path | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Predict what training and evaluation will take: time, memory, and the largest batch that fits.

    The class tree is compared with the dense reference. Everything is counted from the shapes of the model and the
    names. This machine's speed is measured; a GPU's is assumed from its data sheet. No weights are loaded.

    Args:
        k: Only the first so many classes. Default: 100 of ImageNet's.
        model: As of train: an architecture, OpenAI's name, a folder, hf-hub:OWNER/NAME, or demo. No weights are read.
        precision: fp32, fp16 or bf16. auto: fp32 on a CPU, fp16 on a GPU.
        device: A GPU of the table, or this machine, which is measured: this, cpu or cuda.
        budget: Memory that everything together may take, such as 8GB. Default: what the device has.
        shots: Training images a class.
        train_images: Training images an epoch, instead of shots.
        epochs: Epochs.
        test_images: Test images.
        list_devices: Print the table of GPUs and stop.
        plot: Write a picture of time and memory by the number of classes (png, svg, pdf).

    Examples:
        1000 ImageNet classes on a 24 GB card: plan --k 1000 --device RTX-4090
        Your classes on this machine, which is measured: plan --classes names.txt
        All GPUs of the table: plan --list-devices
    """
    if list_devices:
        _print_devices(json)
        return
    with output.loading(silent=quiet):
        from cocoop_fast.engine.memory import parse_bytes
        from cocoop_fast.measure.plot import check_plot, plot_prediction
        from cocoop_fast.measure.predict import Schedule, predict_dense, predict_tree
        from cocoop_fast.prompts.tree import ClassTree
    check_plot(plot)
    limit = None if budget is None else parse_bytes(budget)
    names = options.class_names(classes, k, 100)
    place = _place(device)
    if place == "cpu" and precision not in ("auto", "fp32"):
        raise UserError(f"The engine computes in fp32 on a CPU, not in {precision}; leave --precision out.")
    if precision == "auto":
        precision = "fp32" if place == "cpu" else "fp16"
    with output.only_json(json):
        tell = output.teller("plan", silent=quiet or json)
        described, prompts = _read(model, names, ctx_init, precision)
        tree = ClassTree(prompts.tokens, prompts.n_ctx)
        setting, others = _setting(described, tree, batch_size, precision, place, threads, tell)
    limit = limit if limit is not None else setting.device.memory_bytes
    if limit is None:
        raise UserError("This system does not tell how much memory is available; give --budget.")
    schedule = Schedule(train_images or shots * tree.n_classes, epochs, test_images)
    found: dict[str, Any] = {
        "command": "plan",
        "prediction": True,
        "model": described.name,
        "device": setting.device.name,
        "device_rates": setting.device.rates(),
        "precision": precision,
        "batch": batch_size,
        "budget_bytes": limit,
        "tree": asdict(setting.counts),
        "schedule": asdict(schedule),
        "ways": {
            "tree": _figures(predict_tree(setting, schedule, limit)),
            "dense": _figures(predict_dense(setting, schedule, limit)),
        },
    }
    if others is not None:
        found["used_by_other_programs"] = others
    if plot is not None:
        found["growth"] = []
        for first in [*(size for size in _SIZES if size < tree.n_classes), tree.n_classes]:
            smaller = replace(setting, tree=ClassTree(prompts.tokens[:first], prompts.n_ctx))
            ways = {"tree": predict_tree, "dense": predict_dense}
            figures = {way: _figures(predict(smaller, schedule, limit)) for way, predict in ways.items()}
            found["growth"].append({"classes": first, **figures})
    if json:
        output.print_json(found)
    else:
        _print(found)
    if plot is not None:  # last: what was predicted is printed whatever becomes of the picture
        plot_prediction(found, plot)
        if not json:
            output.say(f"Plot: {plot}")


def _read(
    model: str, names: tuple[str, ...], ctx_init: str, precision: str
) -> tuple[Model, TokenizedPrompts]:
    from cocoop_fast.measure.architecture import describe_model
    from cocoop_fast.measure.devices import DTYPES
    from cocoop_fast.prompts.tokens import tokenize_prompts

    spelled = open_clip_name(model)
    described = describe_model(spelled[0] if spelled else model, DTYPES[precision])
    return described, tokenize_prompts(
        names,
        ctx_init=ctx_init,
        n_ctx=len(ctx_init.split()),
        context_length=described.context_length,
    )


def _place(device: str) -> str:
    """``cpu`` or ``cuda``, which is this machine, or a GPU of the table."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU in this machine; use --device cpu, or name one of the table.")
    if device == "this":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def _setting(
    model: Model,
    tree: ClassTree,
    batch: int,
    precision: str,
    place: str,
    threads: int | None,
    tell: Callable[[str], None],
) -> tuple[Setting, float | None]:
    """And the share of the processors that other programs used while they were measured, where that is told."""
    from cocoop_fast.measure.cost import layout_on
    from cocoop_fast.measure.devices import find_gpu
    from cocoop_fast.measure.predict import Setting

    if place == "cpu":
        from cocoop_fast.measure.machine import OtherPrograms
        from cocoop_fast.measure.this_machine import measure_cpu, measure_process_bytes, use_threads

        with use_threads(threads):
            tell("measuring this machine's products, kernels and copies")
            watch = OtherPrograms()
            machine = measure_cpu(model.weights, tree, batch)
            others = watch.share()
            tell("measuring what a step takes besides its buffers")
            return Setting(model, tree, batch, machine, layout_on("cpu"), measure_process_bytes()), others
    if place == "cuda":
        from cocoop_fast.measure.this_machine import measure_gpu

        tell("measuring this machine's GPU")
        return Setting(model, tree, batch, measure_gpu(precision), layout_on("cuda")), None
    return Setting(model, tree, batch, find_gpu(place).at(precision), layout_on("cuda")), None


def _figures(found: Prediction) -> dict[str, Any]:
    whole = dict(vars(found))
    step, memory = whole.pop("step"), whole.pop("memory")
    return {
        **{name: getattr(step, name) for name in STEP},
        "model_bytes": memory.model,
        "memory_bytes": memory.total,
        **whole,
    }


def _print(found: dict[str, Any]) -> None:
    counts, schedule, (tree, dense) = found["tree"], found["schedule"], found["ways"].values()
    images = readable_images(found["batch"])
    output.say(
        f"Predicted, not measured: {found['model']}, {counts['classes']} classes, {images} a step, "
        f"{found['precision']}, {found['device']}."
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
        (f"Epoch of {schedule['train_images']:,} images", "epoch_seconds", readable_time),
        (f"Training, {schedule['epochs']} epochs", "training_seconds", readable_time),
        (f"Testing {schedule['test_images']:,} images", "evaluation_seconds", readable_time),
    ]
    rows: list[list[str | None]] = [
        [name, form(tree[key]), form(dense[key]), f"{dense[key] / tree[key]:.3g}"]
        for name, key, form in lines
    ]
    largest = [f"{way['largest_batch']:,.0f}" if way["largest_batch"] else "none" for way in (tree, dense)]
    rows.append([f"Largest batch in {readable_bytes(found['budget_bytes'])}", *largest, None])
    output.print_table(["Prediction", "Class tree", "Dense", "Dense / tree"], rows)
    output.say(
        f"Tree: {counts['leaves']:,} distinct prompts of {counts['classes']:,}, {counts['nodes']:,} nodes for "
        f"{counts['tokens']:,} class tokens, {counts['context'] + counts['nodes']:,} rows an image; "
        f"the longest prompt has {counts['longest']} tokens."
    )
    output.say(
        "Dense: the reference's way, every prompt with all its tokens, in eager PyTorch. Text step: forward and "
        "backward from the image features on. Reading and augmenting images is not part of any figure."
    )
    if not tree["fits"]:
        output.say(
            f"This batch does not fit at once: that needs {readable_bytes(tree['memory_bytes'])}. "
            "In pieces it costs one more forward pass."
        )
    if (others := found.get("used_by_other_programs", 0.0)) > output.TOO_BUSY:
        output.say(
            f"Other programs used {others:.0%} of the processors while they were measured: ask again without them."
        )
    for name, value in found["device_rates"].items():
        output.say(f"{name.capitalize()}: {value}.")


def _print_devices(json: bool) -> None:
    from cocoop_fast.measure.devices import gpu_table

    if json:
        output.print_json({"command": "plan", "devices": [asdict(gpu) for gpu in gpu_table()]})
        return
    output.print_table(
        ["Device", "Source", "Memory", "Bandwidth", *PRECISIONS],
        [
            [
                gpu.name,
                gpu.source,
                f"{gpu.memory_gb:g} GB",
                f"{gpu.bandwidth_gbs:,g} GB/s",
                *(output.shown(gpu.tflops.get(p), "{:g}".format) for p in PRECISIONS),
            ]
            for gpu in gpu_table()
        ],
        left=2,
    )
    output.say("Precisions: dense peak in TFLOP/s, as the makers' data sheets have it.")
