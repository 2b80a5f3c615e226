"""``cocoop-fast predict``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cocoop_fast.cli import configuration, options, output
from cocoop_fast.cli.options import AtLeastOne, Given
from cocoop_fast.config import EMBEDDED_CLIPS
from cocoop_fast.errors import UserError

if TYPE_CHECKING:
    from cocoop_fast.experiments.predict import Predictor


@options.command(fields="model.name model.pretrained prompt.template")
def command(
    images: list[Path],
    *,
    run: Path | None = None,
    classes: list[str] | None = None,
    top_k: AtLeastOne = 5,
    given: Given,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Name what images show, with probabilities: by what a run has learned, or by zero-shot CLIP.

    Model, weights and template are for predictions without --run; a run has its own.

    Args:
        images: Image files, and folders, of which all images at any depth are taken.
        run: What `cocoop-fast train` or `checkpoint share` wrote, or hf-hub:OWNER/NAME. Default: none, and zero-shot CLIP
            answers.
        classes: Names separated by commas, or a file with one a line; may be repeated. Default: those the run was trained
            on, or the digits that the embedded CLIP knows.
        top_k: Classes to show of each image.
        device: auto, cpu, cuda or cuda:N. Default: as the run's, or auto.

    Examples:
        The classes of a run: predict photo.jpg --run output/digits/cocoop/seed1
        Classes of your own: predict *.jpg --run RUN_DIR --classes "tabby cat,red fox" --top-k 2
        Nothing learned: predict photo.jpg --model ViT-B/16 --classes cat --classes dog
    """
    names = options.class_list(classes)
    if run is not None and given:
        option, _ = next(iter(given.values()))
        raise UserError(f"{option} is for predictions without --run; a run has its own.")

    with output.loading():
        from cocoop_fast.experiments.predict import Predictor

    told: list[str] = []
    with output.only_json(json):
        if run is None:
            predictor = _zero_shot(given, names, device, told.append)
        else:
            predictor = Predictor.load(str(run), classnames=names, device=device, on_message=told.append)
        files = _files(images)
        unreadable: dict[Path, str] = {}
        found = predictor.predict(files, topk=top_k, on_unreadable=unreadable.__setitem__)
    answers = [(image, ranked) for image, ranked in zip(files, found, strict=True) if ranked]
    if answers:
        for line in told:
            output.note(line)
    if json:
        output.print_json(
            {
                "command": "predict",
                "run_dir": None if run is None else str(run),
                "predictions": [
                    {"image": str(image), "classes": [{"name": name, "probability": p} for name, p in ranked]}
                    for image, ranked in answers
                ],
                "unreadable": [{"image": str(image), "fault": fault} for image, fault in unreadable.items()],
            }
        )
    elif answers:
        rows = [
            [str(image) if place == 0 else "", name, f"{100 * p:.2f} %"]
            for image, ranked in answers
            for place, (name, p) in enumerate(ranked)
        ]
        output.print_table(["Image", "Class", "Probability"], rows, left=2)
    if predictor.note is not None:
        output.note(predictor.note)
    if unreadable:
        raise UserError(_fault(unreadable, len(files)), exit_status=1)


def _fault(unreadable: dict[Path, str], count: int) -> str:
    if count == 1:
        [(image, fault)] = unreadable.items()
        return f"The image {image} cannot be read: {fault}."
    shown = "; ".join(f"{image} ({fault})" for image, fault in unreadable.items())
    return f"{len(unreadable)} of {count} images cannot be read: {shown}."


def _files(images: list[Path]) -> list[Path]:
    """Images of folders in place of the folders.

    Raises:
        UserError: a folder without images, or an address.
    """
    from cocoop_fast.data.image_folder import images_below

    files: list[Path] = []
    for image in images:
        if str(image).startswith(("http:/", "https:/")) and not image.exists():
            address = str(image).replace(":/", "://", 1)  # of whose slashes a path keeps one
            raise UserError(f"{address} is an address; download the image, and name its file.")
        found = images_below(image) if image.is_dir() else [image]
        if not found:
            raise UserError(f"The folder {image} has no images.", exit_status=1)
        files += found
    return files


def _zero_shot(
    given: Given, names: list[str] | None, device: str | None, on_message: Callable[[str], None]
) -> Predictor:
    """Nothing learned. The classes of an embedded CLIP's own data set are taken if none are given."""
    from cocoop_fast.data import load_dataset
    from cocoop_fast.experiments.predict import Predictor
    from cocoop_fast.experiments.shared import Shared

    on = {} if device is None else {"model.device": ("--device", device)}
    config = configuration.build(options={**given, **on}, pairs=("prompt.method", "zeroshot")).config
    own_classes = names is not None
    if names is None:
        if config.model.name not in EMBEDDED_CLIPS:
            option, model = given["model.name"]
            raise UserError(f"The classes to choose from are missing; with {option} {model}, give --classes.")
        own = load_dataset(dataclasses.replace(config.data, name=EMBEDDED_CLIPS[config.model.name]))
        names = list(own.classnames)
        template = config.prompt.template or own.template
        config = dataclasses.replace(config, prompt=dataclasses.replace(config.prompt, template=template))
    shared = Shared()
    predictor = Predictor(shared.model(config, names), shared.clip(config.model), names)
    shared.tell_of_model(config.model, on_message, own_images=own_classes)
    return predictor
