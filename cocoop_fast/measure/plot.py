"""Pictures of what was measured or predicted."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoop_fast.errors import UserError
from cocoop_fast.measure.machine import one_line
from cocoop_fast.readable import readable_images, readable_seconds

# Okabe and Ito's palette, told apart by people of any colour vision.
COLOURS = {"engine": "#D55E00", "floor": "#999999", "coop": "#CC79A7"}
OTHERS = "#0072B2"


def plot_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the step times of a comparison (:meth:`Comparison.to_mapping`) as horizontal bars, log scale.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    rows = list(comparison["contestants"])
    with _figure(path, (8.6, 1.3 + 0.42 * len(rows))) as (figure, axes):
        seconds = [row["step"]["best"] for row in rows]
        places = range(len(rows))
        axes.barh(places, seconds, color=[COLOURS.get(row["name"], OTHERS) for row in rows])
        axes.set_xscale("log")
        axes.set_xlim(min(seconds) / 2, max(seconds) * 12)  # room for the labels
        for place, row in zip(places, rows, strict=True):
            ratio = row["step_to_floor"]
            label = f" {readable_seconds(row['step']['best'])}" + (
                f"  ({ratio:.2f} × floor)" if ratio else ""
            )
            axes.text(row["step"]["best"], place, label, va="center", fontsize=9)
        axes.set_yticks(places, [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("seconds for a training step (forward and backward), log scale; shorter is better")
        images = readable_images(comparison["batch"])
        axes.set_title(
            f"{comparison['model']}: {comparison['classes']} classes, {images} a step", fontsize=11
        )
        figure.supxlabel(one_line(comparison["machine"]), fontsize=8, color="#555555")


def plot_growth(growth: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write step times over row counts, both on log scales, with a line of constant time a row.

    Args:
        growth: `classes`, `rows` and `seconds` of each size, ascending.
        path: where to.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    with _figure(path, (7.0, 4.2)) as (_, axes):
        rows, seconds = [one["rows"] for one in growth], [one["seconds"] for one in growth]
        axes.loglog(rows, [seconds[-1] * n / rows[-1] for n in rows], color=COLOURS["floor"], label="linear")
        axes.loglog(rows, seconds, "o", color=COLOURS["engine"], label="measured")
        for one in growth:
            axes.annotate(
                f"{one['classes']:,} classes",
                (one["rows"], one["seconds"]),
                (6, -12),
                textcoords="offset points",
            )
        axes.set_xlim(rows[0] / 1.5, rows[-1] * 4)
        axes.set_xlabel("rows of the class tree")
        axes.set_ylabel("seconds for a training step")
        axes.legend(frameon=False)


def plot_prediction(prediction: Mapping[str, Any], path: Path) -> None:
    """Write the time and the memory of a step over the number of classes, with the class tree and dense, on log scales.

    Args:
        prediction: as ``cocoop-fast plan --json`` prints it, with ``growth``: `classes`, `tree` and `dense`, each with
            `step_seconds` and `memory_bytes`, ascending.
        path: where to.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    growth = prediction["growth"]
    classes = [one["classes"] for one in growth]
    with _figure(path, (9.0, 4.2), columns=2) as (figure, (time, memory)):
        for axes, key, unit, label in (
            (time, "step_seconds", 1.0, "seconds for a text step"),
            (memory, "memory_bytes", 1e9, "memory in all, GB"),
        ):
            for way, name, colour in (
                ("dense", "dense", OTHERS),
                ("tree", "class tree", COLOURS["engine"]),
            ):
                axes.loglog(
                    classes, [one[way][key] / unit for one in growth], "o-", ms=4, color=colour, label=name
                )
            axes.set_xlabel("classes")
            axes.set_ylabel(label)
        memory.axhline(prediction["budget_bytes"] / 1e9, color=COLOURS["floor"], ls="--", label="there is")
        memory.legend(frameon=False)
        images = readable_images(prediction["batch"])
        figure.suptitle(
            f"Predicted: {prediction['model']}, {images} a step, {prediction['precision']}, {prediction['device']}",
            fontsize=11,
        )


def check_plot(path: Path | None) -> None:
    """Before minutes are spent on what a plot would show.

    Raises:
        UserError: matplotlib is not installed, or the file's name is not one that it writes.
    """
    if path is None:
        return
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot is {path}, but its name must end in .png, .svg or .pdf.")
    if not path.parent.is_dir():
        raise UserError(f"--plot is {path}, but there is no directory {path.parent}.")
    check_matplotlib()


def check_matplotlib() -> None:
    """Raises a UserError if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "A plot needs matplotlib, which is not installed; run `pip install matplotlib`.", exit_status=1
        )


@contextlib.contextmanager
def _figure(path: Path, size: tuple[float, float], columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, or an array of them, written to `path` at the end."""
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
    try:
        yield figure, axes
        for one in figure.axes:
            one.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The plot {path} could not be written ({reason}).", exit_status=1) from error
    finally:
        plt.close(figure)
