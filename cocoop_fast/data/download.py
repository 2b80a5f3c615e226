"""Downloads of published data sets by torchvision, which knows addresses and checksums, put into our layout."""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.error
from pathlib import Path

from cocoop_fast.data.sets.record import Part, PublishedSet, TorchvisionDownload
from cocoop_fast.errors import UserError

_STAGING = ".download"  # in the set's own folder, so that moving out of it is renaming


def download(record: PublishedSet, root: Path) -> Path:
    """Bring the images of a published data set, and what else its archives hold.

    Archives are checked against their MD5 sums. An interrupted download keeps the archives that are whole. What is
    there already is left as it is.

    Args:
        root: the directory of all data sets; made if need be.

    Returns:
        The set's own folder. The split file may still be missing: torchvision does not have it.

    Raises:
        UserError: the set cannot be downloaded by a program, the address does not answer, or what came is damaged;
            the message says what to get and where to put it.
    """
    folder = root / record.folder
    lacking = tuple(
        part for part in _wanted(record, folder) if not (folder / part.path).exists() and _comes(record, part)
    )
    if not lacking:
        return folder
    if record.download is None:
        mirror = "" if record.name == "imagenet" else "; or use --mirror"
        raise UserError(
            f"{record.name} cannot be downloaded by a program; {by_hand(lacking, folder)}{mirror}.",
            exit_status=1,
        )
    staging = folder / _STAGING
    staging.mkdir(parents=True, exist_ok=True)
    try:
        _fetch(record.download, staging)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        RuntimeError,
    ) as error:
        raise UserError(
            f"{record.name} could not be downloaded ({error}); try again, or {by_hand(lacking, folder)}.",
            exit_status=1,
        ) from error
    for source, target in record.download.moves:
        if not (staging / source).exists():
            raise UserError(
                f"What was downloaded for {record.name} has no {source}; {by_hand(lacking, folder)}.",
                exit_status=1,
            )
        if not (folder / target).exists():
            os.replace(staging / source, folder / target)
    shutil.rmtree(staging)
    return folder


def _wanted(record: PublishedSet, folder: Path) -> tuple[Part, ...]:
    """What is always needed, and what a missing split would be made from."""
    has_split = record.split is not None and (folder / record.split.path).exists()
    return record.parts if has_split else (*record.parts, *record.raw)


def _comes(record: PublishedSet, part: Part) -> bool:
    """Whether a download would bring a part (or would have to, if there were one)."""
    if record.download is None:
        return part in record.parts
    return any(f"{part.path}/".startswith(f"{target}/") for _, target in record.download.moves)


def by_hand(parts: tuple[Part, ...], folder: Path) -> str:
    """What to get and where to put it, as the end of a sentence."""
    return "; ".join(
        f"get {part.path} from {part.source} and put it at {folder / part.path}" for part in parts
    )


def _fetch(how: TorchvisionDownload, staging: Path) -> None:
    # Here, because torchvision takes seconds to import. Its progress bars go to stderr.
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    for address, md5 in how.archives:
        download_url(address, str(staging), md5=md5)
    getattr(datasets, how.classname)(str(staging), download=True)
