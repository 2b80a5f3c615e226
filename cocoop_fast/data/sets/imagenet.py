"""ImageNet (Deng et al., 2009) and four sets of test images for its classes.

Differences from the reference: images are listed in sorted order, where it takes the directory's own order, so
that a seed draws the same 16 images a class on every machine; and a stray file beside the class folders is passed
over, where it stops with an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.images import image_files
from cocoop_fast.data.listing import text_lines, visible_folders
from cocoop_fast.data.sets.record import Part, PublishedSet
from cocoop_fast.errors import UserError

_NAMES = "classnames.txt"
_V2 = "imagenetv2-matched-frequency-format-val"


def read(folder: Path) -> Splits:
    """``images/{train,val}/<wnid>/``. The official validation images are the test set, and validate too."""
    names = read_classnames(folder / _NAMES)
    train = _by_wnid(folder / "images", "train", names)
    test = _by_wnid(folder / "images", "val", names)
    trained, tested = ({Path(str(sample.source)).parts[1] for sample in one} for one in (train, test))
    if trained != tested:
        odd = min(trained ^ tested)
        raise UserError(
            f"{folder / 'images'}: the class folder {odd} is in only one of train/ and val/, so labels would not "
            "agree.",
            exit_status=1,
        )
    return Splits(train, test, test)


def read_wnids(folder: Path, images: str) -> Splits:
    """A test set with one folder a WordNet id; labels count the folders that are there."""
    return Splits((), (), _by_wnid(folder, images, read_classnames(folder / _NAMES)))


def read_v2(folder: Path) -> Splits:
    """ImageNetV2: folders 0 to 999 are labels, and count the WordNet ids of ``classnames.txt`` in sorted order."""
    names = [name for _, name in sorted(read_classnames(folder / _NAMES).items())]
    samples = []
    for label, name in enumerate(names):
        class_folder = folder / _V2 / str(label)
        if not class_folder.is_dir():
            raise UserError(
                f"{class_folder} is missing, but {_NAMES} names {len(names)} classes.", exit_status=1
            )
        samples += [Sample(f"{label}/{file.name}", label, name) for file in image_files(class_folder)]
    return Splits((), (), tuple(samples))


def read_classnames(path: Path) -> dict[str, str]:
    """Lines "n01440764 tench": WordNet id -> name, in the order of the file.

    Raises:
        UserError: other lines, one id twice, or names that are numbered, as in other lists of ImageNet's classes.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(text_lines(path), start=1):
        wnid, _, name = line.partition(" ")
        if not name:
            raise UserError(f"{path}: line {number} is {line!r}, not a WordNet id and a name.", exit_status=1)
        if wnid in names:
            raise UserError(f"{path} names {wnid} twice, in line {number} again.", exit_status=1)
        names[wnid] = name
    if all(re.match(r"\d+\s", name) for name in names.values()):
        wnid, name = next(iter(names.items()))
        raise UserError(
            f"{path} numbers its classes: {f'{wnid} {name}'!r} would become a prompt with {name!r}; it should have lines "
            f"`{wnid} {name.split(maxsplit=1)[1]}`, and the published file is at {_CLASSNAMES.source}.",
            exit_status=1,
        )
    return names


def _by_wnid(folder: Path, images: str, names: dict[str, str]) -> tuple[Sample, ...]:
    """Images below ``folder/images/<wnid>/``; paths are relative to ``folder``."""
    class_folders = visible_folders(folder / images)
    if not class_folders:
        raise UserError(
            f"{folder / images} has no class folders; sort its images into one folder a WordNet id (n01440764, ...).",
            exit_status=1,
        )
    samples = []
    for label, class_folder in enumerate(class_folders):
        if class_folder.name not in names:
            raise UserError(f"{class_folder} is not one of the classes in {_NAMES}.", exit_status=1)
        name = names[class_folder.name]
        samples += [
            Sample(f"{images}/{class_folder.name}/{file.name}", label, name)
            for file in image_files(class_folder)
        ]
    return tuple(samples)


_CLASSNAMES = Part(_NAMES, "https://drive.google.com/file/d/1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF/view")
_COPY = Part(_NAMES, "a copy of imagenet/classnames.txt")


def _variant(
    name: str,
    reference_name: str,
    title: str,
    folder: str,
    images: str,
    classes: int,
    count: int,
    source: str,
) -> PublishedSet:
    return PublishedSet(
        name=name,
        reference_name=reference_name,
        title=f"{title}, {classes:,} classes, for testing only",
        folder=folder,
        images="",
        classes=classes,
        counts=(0, 0, count),
        parts=(Part(images, source), _COPY),
        read=lambda path: read_wnids(path, images),
        listed=False,
    )


IMAGENET = PublishedSet(
    name="imagenet",
    reference_name="ImageNet",
    title="1,000 classes; the official validation images are the test set",
    folder="imagenet",
    images="images",
    classes=1_000,
    counts=(1_281_167, 50_000, 50_000),
    parts=(
        Part(
            "images/train", "https://image-net.org (ILSVRC2012, after registration; one folder a WordNet id)"
        ),
        Part("images/val", "https://image-net.org (ILSVRC2012, sorted into one folder a WordNet id)"),
        _CLASSNAMES,
    ),
    read=read,
    listed=False,
)
IMAGENET_V2 = PublishedSet(
    name="imagenetv2",
    reference_name="ImageNetV2",
    title="new test images for ImageNet, 1,000 classes, for testing only",
    folder="imagenetv2",
    images=_V2,
    classes=1_000,
    counts=(0, 0, 10_000),
    parts=(
        Part(
            _V2,
            "https://s3-us-west-2.amazonaws.com/imagenetv2public/imagenetv2-matched-frequency.tar.gz "
            "(see https://github.com/modestyachts/ImageNetV2)",
        ),
        _COPY,
    ),
    read=read_v2,
    listed=False,
)
IMAGENET_SKETCH = _variant(
    "imagenet_sketch",
    "ImageNetSketch",
    "sketches of ImageNet's classes",
    "imagenet-sketch",
    "images",
    1_000,
    50_889,
    "https://github.com/HaohanWang/ImageNet-Sketch (its folder sketch/ is to be called images/)",
)
IMAGENET_A = _variant(
    "imagenet_a",
    "ImageNetA",
    "natural adversarial images",
    "imagenet-adversarial",
    "imagenet-a",
    200,
    7_500,
    "https://github.com/hendrycks/natural-adv-examples (imagenet-a.tar)",
)
IMAGENET_R = _variant(
    "imagenet_r",
    "ImageNetR",
    "renditions of ImageNet's classes",
    "imagenet-rendition",
    "imagenet-r",
    200,
    30_000,
    "https://github.com/hendrycks/imagenet-r (imagenet-r.tar)",
)
