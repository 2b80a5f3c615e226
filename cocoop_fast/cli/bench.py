"""``cocoop-fast bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cocoop_fast.cli import options, output
from cocoop_fast.cli.options import Positive, Seconds
from cocoop_fast.errors import UserError
from cocoop_fast.readable import readable_images, readable_seconds

if TYPE_CHECKING:
    from cocoop_fast.measure.compare import Comparison


@options.command()
def command(
    *,
    classes: list[str] | None = None,
    k: Positive | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    batch_size: Positive = 1,
    rounds: Positive = 5,
    max_seconds: Seconds = 60.0,
    only: list[str] | None = None,
    skip: list[str] | None = None,
    threads: Positive | None = None,
    memory: bool = False,
    plot: Path | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Time a CoCoOp training step on this machine, against what others would write.

    Every contestant's logits and gradients are first compared with the dense oracle's. All are then measured in
    turn, and the best time of each counts.

    Args:
        k: Only the first so many classes. Default: 100 of ImageNet's.
        model: open_clip architecture, OpenAI's name, or demo. Default: ViT-B/16's text tower with random weights.
        rounds: How often each contestant is measured.
        max_seconds: Time for each contestant; one that needs more for two runs is left out.
        only: Measure this contestant; may be repeated.
        skip: Leave this contestant out; may be repeated.
        memory: Measure peak memory too, each in a process of its own.
        plot: Write a picture (png, svg, pdf).

    Examples:
        100 ImageNet names, a text tower of ViT-B/16's size: bench
        Your classes and model, with a picture: bench --classes names.txt --model ViT-B-32-quickgelu --pretrained openai
            --plot bench.png
        The engine against its matrix multiplications: bench --k 1000 --only engine --only floor
    """
    with output.loading(silent=quiet):
        from cocoop_fast.measure.compare import compare
        from cocoop_fast.measure.contestants import choose
        from cocoop_fast.measure.plot import check_plot, plot_comparison
        from cocoop_fast.measure.problem import build_problem
        from cocoop_fast.measure.this_machine import use_threads
    check_plot(plot)
    names = options.class_names(classes, k, 100)
    spec = options.problem_spec(names, batch_size, model, pretrained)

    contestants = choose(only, skip)
    with use_threads(threads), output.only_json(json):
        problem = build_problem(spec)
        tell = output.teller("bench", silent=quiet or json)
        comparison = compare(
            problem, contestants, rounds=rounds, max_seconds=max_seconds, memory=memory, tell=tell
        )
        if not comparison.results:
            reasons = "; ".join(f"{name} {reason}" for name, reason in comparison.notes.items())
            raise UserError(f"No contestant could be measured: {reasons}.", exit_status=1)
        mapping = comparison.to_mapping()
    if json:
        output.print_json({"command": "bench", **mapping})
    else:
        _print(comparison)
    if plot is not None:  # last: what was measured is printed whatever becomes of the picture
        plot_comparison(mapping, plot)
        if not json:
            output.say(f"Plot: {plot}")


def _print(comparison: Comparison) -> None:
    from cocoop_fast.measure.machine import describe_machine, one_line

    spec, results = comparison.problem.spec, comparison.results
    output.say(f"{spec.model_name}: {len(spec.classes)} classes, {readable_images(spec.batch)} a step.")
    output.print_table(
        ["Contestant", "Rows", "Step", "Median", "× floor", "Peak", "Speed-up", "Forward", "Memory"],
        [
            [
                name,
                f"{result.work.rows:,}",
                readable_seconds(result.step.best),
                readable_seconds(result.step.median),
                output.shown(comparison.ratio_to_floor(name)),
                output.shown(comparison.of_peak(name), "{:.0%}".format),
                output.shown(comparison.speedup(name), "{:.1f}".format),
                output.shown(result.forward and result.forward.best, readable_seconds),
                output.shown(result.peak_bytes, lambda count: f"{count / 1e6:,.0f} MB"),
            ]
            for name, result in results.items()
        ],
    )
    for name, result in results.items():
        output.say(f"{name}: {result.contestant.title}.")
    output.say(
        "Step: forward and backward, the best of all rounds, and the median. Speed-up: over the dense oracle."
    )
    if comparison.peak is not None:
        output.say(
            f"Peak: the products' share of the multiply-adds that the processor does in registers, "
            f"{comparison.peak.flops / 1e9:.0f} GFLOP/s in the best of the same rounds; it reads "
            f"{comparison.peak.read_bandwidth / 1e9:.1f} GB/s."
        )
    if comparison.others is not None and comparison.others > output.TOO_BUSY:
        output.say(
            f"Other programs used {comparison.others:.0%} of the processors: measure again without them."
        )
    for name, reason in comparison.notes.items():
        output.say(f"Left out: {name} ({reason}).")
    output.say(one_line(describe_machine()))
