"""``cocoop-fast datasets``: list, check, download, and draw few-shot samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cocoop_fast.cli import failures, options, output
from cocoop_fast.cli.options import NotNegative, Positive
from cocoop_fast.config import DataConfig, PromptConfig
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.data.inventory import ClassCounts

_SHOWN = 5  # images that are not there, by name
_CLASSES_SHOWN = 100

app = options.group(
    """List the data sets that are known, where they are looked for, and what is missing there.

    Examples:
        What is known, and what of it is there: datasets --root data
        What one of them needs, and where to get it: datasets check oxford_pets --root data
        Bring it: datasets download oxford_pets --root data
        Bring it from the mirror: datasets download stanford_cars --root data --mirror
        Write down who is in a few-shot sample: datasets sample oxford_pets --root data --shots 16 --seed 1
    """
)


@app.callback(invoke_without_command=True)
@options.command()
def listing(context: typer.Context, *, root: Path | None = None, json: bool = False) -> None:
    if context.invoked_subcommand is not None:
        return
    from cocoop_fast.data.registry import REGISTRY

    missing = {
        name: list(entry.missing(DataConfig(name=name, root=root))) for name, entry in REGISTRY.items()
    }
    if json:
        known = [
            {"name": name, "title": entry.title, "layout": entry.layout, "missing": missing[name]}
            for name, entry in REGISTRY.items()
        ]
        where = None if root is None else str(root)
        output.print_json({"command": "datasets", "root": where, "datasets": known})
        return
    output.print_table(
        ["Name", "What", "Looked for in", "Missing"],
        [
            [name, entry.title, entry.layout or "the package itself", ", ".join(missing[name]) or "nothing"]
            for name, entry in REGISTRY.items()
        ],
        left=4,
    )


@app.command()
@options.command()
def check(
    name: str, *, root: Path | None = None, class_names: Path | None = None, json: bool = False
) -> None:
    """Say what of one data set is there, where to get the rest, and how it is understood: classes, what is left out.

    Images are opened, as in training. The exit status is 1 if something is missing or cannot be read, or a published
    set has other numbers of classes or images.

    Args:
        class_names: Of images in folders: a file of lines `folder name`.
    """
    from cocoop_fast.data.inventory import take_inventory

    found = take_inventory(DataConfig(name=name, root=root, class_names=class_names))
    if found.classes:
        from cocoop_fast.prompts.tokens import tokenize_prompts  # slow to import

        tokenize_prompts([one.name for one in found.classes], ctx_init=PromptConfig.ctx_init)
    if json:
        output.print_json(
            {
                "command": "datasets check",
                "name": name,
                "complete": found.whole,
                "parts": [
                    {"path": part.path, "there": there, "source": part.source} for part, there in found.parts
                ],
                "counts": None if found.counts is None else found.counts._asdict(),
                "published": None if found.published is None else found.published._asdict(),
                "classes": [one._asdict() for one in found.classes],
                "absent": list(found.absent),
                "unreadable": [{"image": image, "fault": fault} for image, fault in found.unreadable.items()],
                "notes": list(found.notes),
            }
        )
    else:
        if found.parts:
            output.print_table(
                ["Part", "There", "Where to get it"],
                [[part.path, "yes" if there else "no", part.source] for part, there in found.parts],
                left=3,
            )
        if found.counts is not None:
            rows = [["here", *(f"{count:,}" for count in found.counts)]]
            if found.published is not None:
                rows.append(["published", *(f"{count:,}" for count in found.published)])
            output.print_table(["", "Classes", "Train", "Val", "Test"], rows)
            _print_classes(found.classes)
        if found.absent:
            output.say(_named("listed image", "not there", list(found.absent)))
        if found.unreadable:
            faults = [f"{image} ({fault})" for image, fault in found.unreadable.items()]
            output.say(_named("image", "not readable", faults))
        for note in found.notes:
            output.say(note)
    if not found.whole:
        raise typer.Exit(failures.FAILED)


def _print_classes(classes: Sequence[ClassCounts]) -> None:
    shown = classes[:_CLASSES_SHOWN]
    output.print_table(
        ["Class", "Train", "Val", "Test"],
        [[one.name, *(f"{count:,}" for count in (one.train, one.val, one.test))] for one in shown],
    )
    if len(classes) > len(shown):
        output.say(f"These are the first {len(shown)} of {len(classes):,} classes; --json has all.")


def _named(what: str, fault: str, names: list[str]) -> str:
    count = f"1 {what} is" if len(names) == 1 else f"{len(names):,} {what}s are"
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{count} {fault}: {', '.join(names[:_SHOWN])}{more}."


@app.command()
@options.command()
def download(name: str, *, root: Path | None = None, mirror: bool = False, json: bool = False) -> None:
    """Download one data set into the layout that is looked for, with progress and checksums.

    Args:
        mirror: From a public repository of the Hugging Face hub that has all but ImageNet, with their splits. Default: from
            their authors, as far as torchvision can.
    """
    from cocoop_fast.data import download as downloads
    from cocoop_fast.data import mirror as mirrors
    from cocoop_fast.data.registry import canonical_name
    from cocoop_fast.data.sets import SETS
    from cocoop_fast.data.sets.record import missing_parts

    published = SETS.get(canonical_name(name))
    if published is None:
        raise UserError(f"There is nothing to download for {name!r}.")
    if root is None:
        raise UserError("Say where to put the data set with --root DIR.")
    with output.only_json(True):  # whatever a downloader prints is progress
        if mirror:
            folder = mirrors.download_from_mirror(published, root, print)
        else:
            folder = downloads.download(published, root)
    split = published.split
    if split is not None and not (folder / split.path).exists():
        advice = f"For results that compare with published ones, {downloads.by_hand((split,), folder)}."
        output.warn([advice])
    if json:
        missing = [part.path for part in missing_parts(published, folder)]
        output.print_json({"command": "datasets download", "path": str(folder), "missing": missing})
    else:
        output.say(f"{published.name} is in {folder}.")


@app.command()
@options.command()
def sample(
    name: str,
    *,
    root: Path | None = None,
    shots: Positive = 16,
    seed: NotNegative = 1,
    from_: Path | None = None,
    output_: Path | None = None,
    json: bool = False,
) -> None:
    """Write a few-shot sample down, as a file that gives the same images on another machine.

    Args:
        shots: Training images a class.
        seed: Of the draw.
        from_: Convert this cache of the reference instead of drawing.
        output_: Where to write. Default: split_fewshot/ beside the images.
    """
    from cocoop_fast.data import few_shot_files, load_dataset
    from cocoop_fast.data.few_shot import sample_shots

    dataset = load_dataset(DataConfig(name=name, root=root))
    if dataset.test_only:
        raise UserError(f"{dataset.name} has test images only, so there is nothing to draw from.")
    folder = output_ or dataset.few_shot_dir
    if folder is None:
        raise UserError("Say where to write the sample with --output DIR.")
    if from_ is None:
        drawn = sample_shots(dataset, shots, seed)
    else:
        drawn = few_shot_files.read_few_shot(from_, dataset, shots)
    path = few_shot_files.write_few_shot(folder, drawn, shots, seed)
    if json:
        output.print_json({"command": "datasets sample", "path": str(path), "images": len(drawn.train)})
    else:
        output.say(f"{len(drawn.train):,} training images of {len(dataset.classnames):,} classes: {path}")
