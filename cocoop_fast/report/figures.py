"""The plots of a report. Each is readable at a phone's width, without colour, and says in words what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from cocoop_fast.protocols.table import Entry, metrics_of, shots_of
from cocoop_fast.report import style
from cocoop_fast.report.contexts import Shifts
from cocoop_fast.report.inspection import Tested
from cocoop_fast.report.sources import Run
from cocoop_fast.report.style import Picture, drawing, picture
from cocoop_fast.report.words import SUBSETS, data_name, method_colour, method_name, shorten

MOST_BARS = 40  # classes; of more the worst and the best are shown
MOST_NUMBERS = 16  # classes whose counts are written into a confusion matrix
MOST_CELLS = 60  # classes of a confusion matrix that can be looked at
MOST_POINTS = 800
MOST_NAMED = len(style.MARKERS)  # classes named among points
_BAR = 0.2  # inches
_NARROW, _WIDE = 20, 31  # characters of a name of which three, or two, stand beside each other
_END = 114  # percent: there is room for a number beside a bar


def accuracy_bars(entries: Sequence[Entry], by: str, name: str) -> Picture:
    """A group of bars for each metric or data set, a bar for each method, and a mark for the published number.

    Args:
        entries: of one data set, or of one metric.
        by: "metric" or "dataset", which then differ.
        name: of the picture.
    """
    titles = (
        metrics_of(entries) if by == "metric" else {one.dataset: data_name(one.dataset) for one in entries}
    )
    groups = list(titles)
    methods = list(dict.fromkeys(entry.method for entry in entries))
    height, published = 0.84 / len(methods), False
    with drawing(
        1.1 + _BAR * (len(groups) * (len(methods) + 1) + len(methods) // _legend_columns(methods))
    ) as (figure, axes):
        for i, method in enumerate(methods):
            own = [entry for entry in entries if entry.method == method]
            for entry in own:
                y = groups.index(getattr(entry, by)) + (i - (len(methods) - 1) / 2) * height
                axes.barh(
                    y, entry.mean, height * 0.92, xerr=entry.std, color=method_colour(method),
                    hatch=style.HATCHES[i % len(style.HATCHES)], ecolor=style.INK, capsize=2,
                    label=shorten(method_name(method), 40) if entry is own[0] else None,
                )  # fmt: skip
                if entry.published is not None:
                    mark = entry.published.value
                    axes.plot(
                        [mark, mark], [y - height / 2.2, y + height / 2.2], color=style.INK, linewidth=1.6,
                        label=None if published else "published",
                    )  # fmt: skip
                    published = True
                # In a column of their own, where no mark goes through them.
                axes.text(_END, y, f"{entry.mean:.1f}", ha="right", va="center", fontsize=8)
        _horizontal(axes, [titles[group] for group in groups])
        figure.legend(loc="outside lower center", ncols=_legend_columns(methods))
        if by == "metric":
            axes.set_title(data_name(entries[0].dataset))
        where = "each data set" if by == "dataset" else data_name(entries[0].dataset)
        values = "; ".join(
            f"{titles[getattr(entry, by)]}, {method_name(entry.method)} {entry}" for entry in entries
        )
        return picture(
            figure,
            name,
            alt=f"Bars of the accuracy on {where}: {values}.",
            caption="Test accuracy in percent"
            + (", with the standard deviation over seeds" if any(entry.std for entry in entries) else "")
            + ("; the dark line across a bar is the published number." if published else "."),
        )


def shot_curves(entries: Sequence[Entry], name: str) -> Picture:
    """Accuracy by the number of training images a class, a line for each method, with its deviation over seeds.

    Args:
        entries: of one data set, their metrics "shots_N".
        name: of the picture.
    """
    methods = list(dict.fromkeys(entry.method for entry in entries))
    numbers = sorted({shots_of(entry.metric) for entry in entries})
    with drawing(3.6) as (figure, axes):
        for method, line, marker in zip(methods, cycle(style.LINES), cycle(style.MARKERS), strict=False):
            own = sorted(
                (entry for entry in entries if entry.method == method), key=lambda e: shots_of(e.metric)
            )
            axes.errorbar(
                [numbers.index(shots_of(entry.metric)) for entry in own], [entry.mean for entry in own],
                yerr=[entry.std or 0 for entry in own] if any(entry.std for entry in own) else None,
                color=method_colour(method), linestyle=line, marker=marker, markersize=4, linewidth=1.4, capsize=2,
                label=shorten(method_name(method), 40),
            )  # fmt: skip
        axes.set_xticks(range(len(numbers)), list(map(str, numbers)))
        axes.set_xlabel("Training images a class")
        axes.set_ylabel("Accuracy (%)")
        axes.set_title(data_name(entries[0].dataset))
        figure.legend(loc="outside lower center", ncols=_legend_columns(methods))
        titles = metrics_of(entries)
        values = "; ".join(f"{method_name(one.method)}, {titles[one.metric]} {one}" for one in entries)
        return picture(
            figure,
            name,
            alt=f"Curves of the accuracy on {data_name(entries[0].dataset)} by training images a class: {values}.",
            caption="Test accuracy in percent by the number of training images of each class"
            + (", with the standard deviation over seeds." if any(entry.std for entry in entries) else "."),
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
    panels = {"loss": "Loss", "accuracy": "Accuracy (%)", "lr": "Learning rate"}
    ends = []
    with drawing(4.6, nrows=3, sharex=True, height_ratios=(3, 3, 2)) as (figure, rows):
        for run, line in zip(runs, cycle(style.LINES), strict=False):
            epochs = [record["epoch"] for record in run.history.epochs]
            for axes, field in zip(rows, panels, strict=True):
                axes.plot(
                    epochs, [record[field] for record in run.history.epochs], color=method_colour(run.method),
                    linestyle=line, linewidth=1.4, marker="o" if len(epochs) <= 20 else "", markersize=3,
                    label=f"seed {run.config.seed}",
                    drawstyle="steps-mid" if field == "lr" and len(epochs) > 1 else "default",
                )  # fmt: skip
            first, last = run.history.epochs[0], run.history.epochs[-1]
            ends.append(
                f"seed {run.config.seed}: loss {first['loss']:.3f} in epoch {first['epoch']} and {last['loss']:.3f} in "
                f"epoch {last['epoch']}, accuracy {last['accuracy']:.1f} %"
            )
        for axes, (field, label) in zip(rows, panels.items(), strict=True):
            axes.set_ylabel(label)
            axes.margins(y=0.12)
            if field != "accuracy":
                axes.update_datalim([(1, 0)], updatex=False)
                axes.set_ylim(bottom=0)
        rows[2].ticklabel_format(axis="y", scilimits=(-2, 3))
        rows[2].set_xlabel("Epoch")
        rows[2].xaxis.get_major_locator().set_params(integer=True)
        rows[0].set_title(f"{method_name(shorten(runs[0].label, 40))} on {data_name(runs[0].dataset)}")
        if len(runs) > 1:
            figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return picture(
            figure,
            name,
            alt=f"Curves of loss, accuracy and learning rate by epoch. {'; '.join(ends)}.",
            caption="Means over each epoch's training images, augmented as they are in training, and its learning rate.",
        )


def _legend_columns(methods: Sequence[str]) -> int:
    """As many as are readable beside each other in a plot as wide as a phone."""
    longest = max(len(shorten(method_name(method), 40)) for method in methods)
    return 3 if longest <= _NARROW else 2 if longest <= _WIDE else 1


def class_bars(tested: Tested, method: str, name: str) -> Picture:
    """Accuracy of each class, worst first.

    Args:
        tested: classes with their accuracies.
        method: for the colour.
        name: of the picture.
    """
    known = sorted((value, k) for k, value in enumerate(tested.class_accuracy) if value is not None)
    cut = len(known) > MOST_BARS
    shown = [*known[: MOST_BARS // 2], *known[-MOST_BARS // 2 :]] if cut else known
    values = [value for value, _ in shown]
    names = [tested.classnames[k] for _, k in shown]
    with drawing(0.9 + 0.21 * len(shown)) as (figure, axes):
        bars = axes.barh(range(len(shown)), values, 0.72, color=method_colour(method))
        axes.axvline(tested.chance, color=style.INK, linestyle=":", linewidth=1.2)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        _horizontal(axes, [shorten(class_name) for class_name in names])
        if cut:
            axes.axhline(MOST_BARS // 2 - 0.5, color=style.MUTED, linestyle=":", linewidth=1)
        axes.set_title(SUBSETS[tested.subset].capitalize())
        listed = ", ".join(f"{name} {value:.1f}" for name, value in zip(names, values, strict=True))
        return picture(
            figure,
            name,
            alt=f"Bars of the accuracy of {SUBSETS[tested.subset]}, worst first: {listed}.",
            caption=(
                f"The {MOST_BARS // 2} worst and the {MOST_BARS // 2} best of {len(known)} classes."
                if cut
                else "Accuracy of each class, worst first."
            )
            + f" Dotted: chance, {tested.chance:.3g} %.",
        )


def confusion_matrix(tested: Tested, name: str) -> Picture | None:
    """Which class is taken for which; ``None`` if there are too many classes to look at."""
    count = len(tested.classnames)
    if count > MOST_CELLS:
        return None
    matrix = np.array(tested.metrics.confusion)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    with drawing(style.WIDTH + 0.1) as (figure, axes):
        from matplotlib.colors import LinearSegmentedColormap

        edges = np.arange(count + 1) - 0.5
        # More of the palette's blue for a larger share, on any ground.
        blues = LinearSegmentedColormap.from_list("share", [f"{style.BLUE}00", style.BLUE])
        axes.pcolormesh(
            edges, edges, share**0.7, cmap=blues, vmin=0, vmax=1, edgecolors=style.GRID, linewidth=0.4
        )
        if count <= MOST_NUMBERS:
            for row, column in np.argwhere(matrix):
                axes.text(
                    column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8,
                    color=style.ON_FILL if share[row, column] > 0.55 else style.INK,
                )  # fmt: skip
        if count <= MOST_BARS:
            names = [shorten(class_name, 18) for class_name in tested.classnames]
            size = 8.5 if count <= MOST_NUMBERS else 5
            axes.set_xticks(
                range(count), names, rotation=90 if len("".join(names)) > 40 else 0, fontsize=size
            )
            axes.set_yticks(range(count), names, fontsize=size)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xlabel("Predicted")
        axes.set_ylabel("True class")
        axes.set_title(SUBSETS[tested.subset].capitalize())
        pairs = [f"{truth} taken for {guess} {times} times" for truth, guess, times in tested.confused(10)]
        return picture(
            figure,
            name,
            alt=f"Confusion matrix of {SUBSETS[tested.subset]}. {'; '.join(pairs) or 'Nothing is confused'}.",
            caption="Images of each class (row) by what they were taken for (column); darker is a larger share of the row.",
        )


def shift_plane(shifts: Shifts, name: str) -> Picture:
    """A point for each image: what it adds to the context, along the two directions of most variance."""
    chosen = np.linspace(0, len(shifts.label) - 1, min(MOST_POINTS, len(shifts.label))).astype(int)
    points, label = shifts.points.numpy()[chosen], shifts.label.numpy()[chosen]
    counts = np.bincount(label, minlength=len(shifts.classnames))
    named = sorted(int(k) for k in np.argsort(-counts, kind="stable")[:MOST_NAMED] if counts[k])
    others = ~np.isin(label, named)
    with drawing(style.WIDTH + 0.2 * -(-len(named) // 3)) as (figure, axes):
        axes.scatter(*points[others].T, s=5, color=style.GRID)
        for k, marker, colour in zip(named, cycle(style.MARKERS), cycle(style.CLASS_COLOURS), strict=False):
            new = k >= shifts.trained_on
            axes.scatter(
                *points[label == k].T, s=13, marker=marker, linewidth=0.8 if new else 0, alpha=0.75,
                facecolor="none" if new else colour, edgecolor=colour,
                label=shorten(shifts.classnames[k], 18),
            )  # fmt: skip
        axes.set_xlabel(f"First component ({100 * shifts.explained[0]:.0f} % of the variance)")
        axes.set_ylabel(f"Second component ({100 * shifts.explained[1]:.0f} %)")
        figure.legend(loc="outside lower center", ncols=3, markerscale=1.6)
        rest = f" Grey: the other {len(shifts.classnames) - len(named)} classes." if others.any() else ""
        if shifts.trained_on < len(shifts.classnames):
            rest = f" Filled: classes trained on; hollow: new ones.{rest}"
        return picture(
            figure,
            name,
            alt=f"Scatter plot of the Meta-Net's output for {len(points)} test images of "
            f"{len(shifts.classnames)} classes, in two dimensions that hold "
            f"{100 * sum(shifts.explained):.0f} % of the variance.",
            caption=f"The Meta-Net's output for {len(points):,} test images, in the two directions in which it varies "
            f"most. Images near each other are given nearly the same context.{rest}",
        )


def _horizontal(axes: Any, names: Sequence[str]) -> None:
    """Axes of bars from left to right: percent, and a name for each place, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, _END)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("Accuracy (%)")
    axes.grid(visible=False, axis="y")
