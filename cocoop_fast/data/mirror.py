"""The published data sets other than ImageNet from one place, a public repository of the Hugging Face hub.

Each is an archive of the folder that the reference documents, split file included. The authors of PromptKD keep it; it is read at
one commit, so that what is there cannot change.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub import constants

from cocoop_fast.data.download import by_hand
from cocoop_fast.data.sets.record import PublishedSet, missing_parts
from cocoop_fast.errors import UserError
from cocoop_fast.readable import readable_bytes

REPOSITORY = "zhengli97/prompt_learning_dataset"
COMMIT = "ceb3112337fb6e1bf71534e355ca5569b63f19a6"
# Of archives whose sums are known here. The hub says those of all, and these are checked as well.
KNOWN_SHA256 = {"dtd": "5ba4d3000e60f5541ba15a082033ca0696eee68125e9c28edff3dbe22f04313b"}
_NOT_THERE = ("imagenet",)
_STAGING = ".mirror"  # in the set's own folder, so that moving out of it is renaming
_BLOCK = 1 << 20
# What the authors' own pages say; of the others, they have to be read.
_TERMS = {
    "caltech101": "CC BY 4.0",
    "oxford_pets": "CC BY-SA 4.0; the copyright of the images stays with their owners",
    "fgvc_aircraft": "for non-commercial research only; the photographers keep their copyright",
    "dtd": "made available to the computer vision community for research purposes, without a licence",
}
Tell = Callable[[str], None]


def terms(record: PublishedSet) -> str:
    """On what terms the images may be used, as far as this program knows."""
    known = _TERMS.get(record.name)
    what = f"its authors' terms are: {known}" if known else "its authors' terms are on their page"
    return f"{record.name}: {what} ({record.parts[0].source}). The mirror's own licence (MIT) does not change them."


def download_from_mirror(record: PublishedSet, root: Path, tell: Tell) -> Path:
    """Bring a published data set from the mirror. What is there already is left as it is.

    An interrupted download goes on where it stopped. The archive is compared with the SHA-256 sum that the hub names, and with
    that which is known here, before anything is unpacked.

    Args:
        root: the directory of all data sets; made if need be.
        tell: told of the terms and of the progress, a line each.

    Returns:
        The set's own folder.

    Raises:
        UserError: the mirror lacks the set or does not answer, what came is damaged, or its layout is another one; the message says
            what to get and where to put it.
    """
    folder = root / record.folder
    lacking = missing_parts(record, folder)
    if not lacking and (record.split is None or (folder / record.split.path).exists()):
        return folder
    if record.name in _NOT_THERE:
        raise UserError(f"The mirror does not have {record.name}; {by_hand(lacking, folder)}.", exit_status=1)
    tell(terms(record))
    staging = folder / _STAGING
    staging.mkdir(parents=True, exist_ok=True)
    archive = staging / ("food101.zip" if record.name == "food101" else f"{record.folder}.zip")
    try:
        _fetch(record.name, archive, tell)
        _unpack(archive, record, staging)
    except (urllib.error.URLError, http.client.HTTPException, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise UserError(
            f"{record.name} could not be had from {constants.ENDPOINT}/{REPOSITORY} ({reason}); the same command goes on "
            f"with it{'; or ' + by_hand(lacking, folder) if lacking else ''}.",
            exit_status=1,
        ) from error
    for entry in sorted((staging / record.folder).iterdir()):
        if not (folder / entry.name).exists():
            os.replace(entry, folder / entry.name)
    shutil.rmtree(staging)
    still = missing_parts(record, folder)
    if still:
        raise UserError(
            f"What the mirror has of {record.name} is not all of it; {by_hand(still, folder)}.", exit_status=1
        )
    return folder


def _fetch(name: str, archive: Path, tell: Tell) -> None:
    """To its whole length, from where an earlier attempt stopped, and compared with its sums."""
    address = f"{constants.ENDPOINT}/{REPOSITORY}/resolve/{COMMIT}/{archive.name}"
    try:
        found = huggingface_hub.get_hf_file_metadata(address, timeout=10)
    except Exception as error:  # of the hub's client, which has dozens
        raise OSError(str(error)) from error
    have = archive.stat().st_size if archive.exists() else 0
    if have != found.size:
        request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as answer:
            going_on = answer.status == 206
            size = (have if going_on else 0) + int(answer.headers.get("Content-Length") or 0)
            done, told = (have if going_on else 0), -1
            with open(archive, "ab" if going_on else "wb") as file:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    done += len(block)
                    if size and 10 * done // size > told:
                        told = 10 * done // size
                        tell(f"{archive.name}: {10 * told} % of {readable_bytes(size)}")
        if size and done < size:
            raise EOFError(f"it ended after {readable_bytes(done)} of {readable_bytes(size)}")
    digest = _sha256(archive)
    sums = [one for one in (KNOWN_SHA256.get(name), found.etag) if one and re.fullmatch(r"[0-9a-f]{64}", one)]
    if any(one != digest for one in sums):
        archive.unlink()
        raise EOFError(
            f"{archive.name} has the SHA-256 sum {digest[:12]}… and not {sums[0][:12]}…, so it was deleted"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive: Path, record: PublishedSet, staging: Path) -> None:
    """The set's folder and nothing else: no member may lead out of it."""
    with zipfile.ZipFile(archive) as opened:
        inside = [
            name
            for name in opened.namelist()
            if (parts := PurePosixPath(name).parts)[:1] == (record.folder,)
            and len(parts) > 1
            and ".." not in parts
        ]
        if not inside:
            raise zipfile.BadZipFile(
                f"{archive.name} has no folder {record.folder}/, which is expected in it"
            )
        opened.extractall(staging, inside)
