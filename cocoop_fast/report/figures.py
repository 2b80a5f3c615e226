"""The plots of a report. Each is readable at a phone's width, without colour, and says in words what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cocoop_fast.protocols.table import Entry, shown
from cocoop_fast.report import style
from cocoop_fast.report.contexts import Shifts
from cocoop_fast.report.inspection import Tested
from cocoop_fast.report.sources import Run
from cocoop_fast.report.style import Picture, picture, plotting
from cocoop_fast.report.words import METRICS, SUBSETS, data_name, method_name, shorten

MOST_BARS = 40  # classes; of more the worst and the best are shown
MOST_NUMBERS = 16  # classes whose counts are written into a confusion matrix
MOST_CELLS = 60  # classes of a confusion matrix that can be looked at
MOST_POINTS = 800
MOST_NAMED = 12  # classes named among points


def accuracy_bars(dataset: str, entries: Sequence[Entry], name: str) -> Picture:
    """A group of bars for each metric, a bar for each method, and a mark for the published number.

    Args:
        dataset: whose entries these are.
        entries: of one data set.
        name: of the picture.
    """
    metrics = [metric for metric in METRICS if any(entry.metric == metric for entry in entries)]
    methods = list(dict.fromkeys(entry.method for entry in entries))
    found = {(entry.method, entry.metric): entry for entry in entries}
    with plotting() as new_figure:
        rows = -(-len(methods) // 3)
        figure = new_figure(figsize=(style.WIDTH, 2.75 + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        width = 0.84 / len(methods)
        paper = False
        for i, method in enumerate(methods):
            for place, metric in enumerate(metrics):
                entry = found.get((method, metric))
                if entry is None:
                    continue
                x = place + (i - (len(methods) - 1) / 2) * width
                axes.bar(
                    x, entry.mean, width * 0.92, yerr=entry.std, color=style.method_colour(method),
                    hatch=style.HATCHES[i % len(style.HATCHES)], ecolor=style.INK, capsize=2,
                    label=method_name(shorten(method, 30)) if metric == metrics[0] else None,
                )  # fmt: skip
                top = entry.mean + (entry.std or 0.0)
                axes.text(x, top + 1, f"{entry.mean:.1f}", ha="center", va="bottom", fontsize=8)
                if entry.published is not None:
                    axes.plot(
                        [x - width / 2.2, x + width / 2.2], [entry.published.value] * 2, color=style.INK,
                        linewidth=1.6, label=None if paper else "published",
                    )  # fmt: skip
                    paper = True
        axes.set_xticks(range(len(metrics)), [METRICS[metric] for metric in metrics])
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("Accuracy (%)")
        axes.grid(visible=False, axis="x")
        axes.set_title(data_name(dataset), loc="left", fontweight="bold")
        figure.legend(loc="outside lower center", ncols=3)
        values = "; ".join(
            f"{method_name(entry.method)} {METRICS[entry.metric]} {shown(entry.mean, entry.std)}"
            for entry in entries
        )
        return picture(
            figure,
            name,
            alt=f"Bars of the accuracy on {data_name(dataset)}. {values}.",
            caption="Test accuracy in percent"
            + (", with the standard deviation over seeds" if any(entry.std for entry in entries) else "")
            + ("; the dark line across a bar is the published number." if paper else "."),
        )


def transfer_bars(entries: Sequence[Entry], name: str) -> Picture:
    """A group of horizontal bars for each data set, where a protocol measures one accuracy on each."""
    datasets = list(dict.fromkeys(entry.dataset for entry in entries))
    methods = list(dict.fromkeys(entry.method for entry in entries))
    with plotting() as new_figure:
        figure = new_figure(
            figsize=(style.WIDTH, 1.0 + 0.2 * len(datasets) * (len(methods) + 1)), layout="constrained"
        )
        axes = figure.subplots()
        height = 0.84 / len(methods)
        paper = False
        for i, method in enumerate(methods):
            for entry in entries:
                if entry.method != method:
                    continue
                y = datasets.index(entry.dataset) + (i - (len(methods) - 1) / 2) * height
                axes.barh(
                    y, entry.mean, height * 0.92, xerr=entry.std, color=style.method_colour(method),
                    hatch=style.HATCHES[i % len(style.HATCHES)], ecolor=style.INK, capsize=2,
                    label=method_name(shorten(method, 30)) if entry.dataset == datasets[0] else None,
                )  # fmt: skip
                axes.text(entry.mean + (entry.std or 0) + 1, y, f"{entry.mean:.1f}", va="center", fontsize=8)
                if entry.published is not None:
                    axes.plot(
                        [entry.published.value] * 2, [y - height / 2.2, y + height / 2.2], color=style.INK,
                        linewidth=1.6, label=None if paper else "published",
                    )  # fmt: skip
                    paper = True
        axes.set_yticks(range(len(datasets)), [data_name(dataset) for dataset in datasets])
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("Accuracy (%)")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=3)
        return picture(
            figure,
            name,
            alt="Bars of the accuracy on each data set: "
            + "; ".join(
                f"{data_name(e.dataset)}, {method_name(e.method)} {shown(e.mean, e.std)}" for e in entries
            )
            + ".",
            caption="Test accuracy in percent"
            + ("; the dark line across a bar is the published number." if paper else "."),
        )


def learning_curves(runs: Sequence[Run], name: str) -> Picture | None:
    """Loss, training accuracy and learning rate by epoch, a line for each seed; ``None`` if no epoch is done.

    Args:
        runs: of one method on one data set.
        name: of the picture.
    """
    runs = [run for run in runs if run.history.epochs]
    if not runs:
        return None
    one = runs[0]
    with plotting() as new_figure:
        figure = new_figure(figsize=(style.WIDTH, 4.6), layout="constrained")
        panels = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        for i, run in enumerate(runs):
            epochs = [record["epoch"] for record in run.history.epochs]
            for axes, field in zip(panels, ("loss", "accuracy", "lr"), strict=True):
                axes.plot(
                    epochs,
                    [record[field] for record in run.history.epochs],
                    color=style.method_colour(one.method),
                    linestyle=style.LINES[i % len(style.LINES)],
                    linewidth=1.4,
                    marker="o" if len(epochs) <= 20 else "",
                    markersize=3,
                    label=f"seed {run.config.seed}",
                    drawstyle="steps-mid" if field == "lr" and len(epochs) > 1 else "default",
                )
        for axes, label in zip(panels, ("Loss", "Accuracy (%)", "Learning rate"), strict=True):
            axes.set_ylabel(label)
            axes.margins(y=0.12)
        panels[0].set_ylim(bottom=0)
        panels[2].set_ylim(bottom=0)
        panels[2].ticklabel_format(axis="y", scilimits=(-2, 3))
        panels[2].set_xlabel("Epoch")
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_title(
            f"{method_name(shorten(one.label, 40))} on {data_name(one.dataset)}",
            loc="left",
            fontweight="bold",
        )
        if len(runs) > 1:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        ends = "; ".join(
            f"seed {run.config.seed}: loss {run.history.epochs[0]['loss']:.3f} in epoch {run.history.epochs[0]['epoch']} "
            f"and {run.history.epochs[-1]['loss']:.3f} in epoch {run.history.epochs[-1]['epoch']}, "
            f"accuracy {run.history.epochs[-1]['accuracy']:.1f} %"
            for run in runs
        )
        return picture(
            figure,
            name,
            alt=f"Curves of loss, accuracy and learning rate by epoch. {ends}.",
            caption="Means over each epoch's training images, augmented as they are in training, and its learning rate.",
        )


def class_bars(tested: Tested, accuracy: Sequence[float | None], method: str, name: str) -> Picture:
    """Accuracy of each class, worst first.

    Args:
        tested: for the class names.
        accuracy: (K,) percent; ``None`` where a class has no test image.
        method: for the colour.
        name: of the picture.
    """
    known = {k: value for k, value in enumerate(accuracy) if value is not None}
    order = sorted(known, key=lambda k: known[k])
    cut = len(order) > MOST_BARS
    rows = [*order[: MOST_BARS // 2], *order[-MOST_BARS // 2 :]] if cut else order
    values = [known[k] for k in rows]
    with plotting() as new_figure:
        figure = new_figure(figsize=(style.WIDTH, 0.9 + 0.21 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(rows)), values, 0.72, color=style.method_colour(method))
        for place, value in enumerate(values):
            axes.text(value + 1, place, f"{value:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [shorten(tested.classnames[k]) for k in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 114)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("Accuracy (%)")
        axes.grid(visible=False, axis="y")
        if cut:
            axes.axhline(MOST_BARS // 2 - 0.5, color=style.MUTED, linestyle=":", linewidth=1)
        axes.set_title(SUBSETS[tested.subset].capitalize(), loc="left", fontweight="bold")
        listed = ", ".join(
            f"{tested.classnames[k]} {value:.1f}" for k, value in zip(rows, values, strict=True)
        )
        return picture(
            figure,
            name,
            alt=f"Bars of the accuracy of {SUBSETS[tested.subset]}, worst first: {listed}.",
            caption=f"The {MOST_BARS // 2} worst and the {MOST_BARS // 2} best of {len(order)} classes."
            if cut
            else "Accuracy of each class, worst first.",
        )


def confusion_matrix(tested: Tested, name: str) -> Picture | None:
    """Which class is taken for which; ``None`` if there are too many classes to look at."""
    count = len(tested.classnames)
    if count > MOST_CELLS:
        return None
    matrix = np.array(tested.metrics.confusion, dtype=float)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    with plotting() as new_figure:
        figure = new_figure(figsize=(style.WIDTH, style.WIDTH + 0.1), layout="constrained")
        axes = figure.subplots()
        edges = np.arange(count + 1) - 0.5
        mesh = axes.pcolormesh(edges, edges, share, edgecolors=style.GRID, linewidth=0.4)
        mesh.set_array(None)
        mesh.set_facecolor([_cell(value) for value in share.ravel()])
        if count <= MOST_NUMBERS:
            for row, column in np.argwhere(matrix > 0):
                axes.text(
                    column, row, f"{int(matrix[row, column])}", ha="center", va="center", fontsize=8,
                    color=style.ON_FILL if share[row, column] > 0.55 else style.INK,
                )  # fmt: skip
        if count <= MOST_BARS:
            names = [shorten(class_name, 18) for class_name in tested.classnames]
            small = 8.5 if count <= MOST_NUMBERS else 5
            axes.set_xticks(range(count), names, rotation=90 if _long(names) else 0, fontsize=small)
            axes.set_yticks(range(count), names, fontsize=small)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("Predicted")
        axes.set_ylabel("True class")
        axes.set_title(SUBSETS[tested.subset].capitalize(), loc="left", fontweight="bold")
        pairs = "; ".join(
            f"{truth} taken for {guess} {times} times" for truth, guess, times in confusions(tested, 10)
        )
        return picture(
            figure,
            name,
            alt=f"Confusion matrix of {SUBSETS[tested.subset]}. {pairs or 'Nothing is confused'}.",
            caption="Images of each class (row) by what they were taken for (column); darker is a larger share of the row.",
        )


def confusions(tested: Tested, most: int) -> list[tuple[str, str, int]]:
    """The most frequent mistakes: true class, predicted class, how many times."""
    matrix = np.array(tested.metrics.confusion)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:most]
    found = [(*np.unravel_index(place, matrix.shape), int(matrix.flat[place])) for place in order]
    names = tested.classnames
    return [(names[row], names[column], times) for row, column, times in found if times]


def shift_plane(shifts: Shifts, name: str) -> Picture:
    """A point for each image: what it adds to the context, along the two directions of most variance."""
    chosen = np.linspace(0, len(shifts.label) - 1, min(MOST_POINTS, len(shifts.label))).astype(int)
    points, label = shifts.points.numpy()[chosen], shifts.label.numpy()[chosen]
    counts = np.bincount(label, minlength=len(shifts.classnames))
    named = sorted(int(k) for k in np.argsort(-counts, kind="stable")[:MOST_NAMED] if counts[k])
    with plotting() as new_figure:
        figure = new_figure(
            figsize=(style.WIDTH, style.WIDTH + 0.2 * -(-len(named) // 3)), layout="constrained"
        )
        axes = figure.subplots()
        others = ~np.isin(label, named)
        axes.scatter(*points[others].T, s=5, color=style.GRID, label=None)
        for i, k in enumerate(named):
            own = points[label == k]
            axes.scatter(
                *own.T, s=13, marker=style.MARKERS[i % len(style.MARKERS)], linewidth=0,
                color=style.CLASS_COLOURS[i % len(style.CLASS_COLOURS)], alpha=0.75,
                label=shorten(shifts.classnames[k], 18),
            )  # fmt: skip
        axes.set_xlabel(f"First component ({100 * shifts.explained[0]:.0f} % of the variance)")
        axes.set_ylabel(f"Second component ({100 * shifts.explained[1]:.0f} %)")
        figure.legend(loc="outside lower center", ncols=3, markerscale=1.6)
        rest = f" Grey: the other {len(shifts.classnames) - len(named)} classes." if others.any() else ""
        return picture(
            figure,
            name,
            alt=f"Scatter plot of the Meta-Net's output for {len(points)} test images of "
            f"{len(shifts.classnames)} classes, in two dimensions that hold "
            f"{100 * sum(shifts.explained):.0f} % of the variance.",
            caption=f"The Meta-Net's output for {len(points):,} test images, in the two directions in which it varies "
            f"most. Images near each other are given nearly the same context.{rest}",
        )


def _cell(share: float) -> tuple[float, float, float, float]:
    """The palette's blue, more of it for a larger share; on any ground."""
    from matplotlib.colors import to_rgb

    r, g, b = to_rgb(style.BLUE)
    return r, g, b, float(share) ** 0.7


def _long(names: Sequence[Any]) -> bool:
    return sum(len(name) for name in names) > 40
