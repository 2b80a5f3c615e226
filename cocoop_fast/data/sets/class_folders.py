"""Sets that come as one folder a class and without a split: shuffled and cut 50/20/30 a class."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from cocoop_fast.data.dataset import Sample, Splits
from cocoop_fast.data.images import image_files
from cocoop_fast.data.listing import visible_folders
from cocoop_fast.data.sets.record import SPLIT_SEED
from cocoop_fast.data.split import split_by_class
from cocoop_fast.errors import UserError


def split_class_folders(
    images: Path, *, ignored: Collection[str] = (), renamed: Mapping[str, str] | None = None
) -> Splits:
    """Label the folders in sorted order and split each (the reference's ``read_and_split_data``).

    The reference shuffles files in the order in which the directory lists them, which differs between
    machines; here they are sorted first, and files that are not images by their ending are left out.

    Args:
        images: the directory of class folders.
        ignored: folders that are no classes; they get no label.
        renamed: class names of folders that are not called like their class.

    Raises:
        UserError: no image in any of them, or one alone.
    """
    folders = [folder for folder in visible_folders(images) if folder.name not in ignored]
    samples = [
        Sample(f"{folder.name}/{file.name}", label, (renamed or {}).get(folder.name, folder.name))
        for label, folder in enumerate(folders)
        for file in image_files(folder)
    ]
    if not samples:
        within = f"{images.name}/{folders[0].name}/" if len(folders) == 1 else ""
        hint = f"; they may lie one level too deep, in {within}" if within else ""
        raise UserError(f"{images} has no images in class folders{hint}.", exit_status=1)
    return split_by_class(samples, SPLIT_SEED)
