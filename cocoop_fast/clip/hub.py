"""Files of the Hugging Face hub. Where it cannot be reached, that is found out at once and said in a sentence."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from open_clip.pretrained import download_pretrained

from cocoop_fast.clip.checkpoints import WeightsError

PATIENCE = 5.0  # seconds that a server has to answer at all
_USUAL_FILES = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
_HELP = "docs/faq.md says how to work without a network"


def hub_file(repository: str, name: str) -> Path:
    """One file of a repository, downloaded if need be. Without a network, from the disk if it is there.

    Raises:
        WeightsError: the hub cannot be reached, and the file is not on the disk.
        Exception: of any kind, if the hub does not have it or does not give it.
    """
    reason = unreachable(constants.ENDPOINT)
    if reason is None:
        return Path(huggingface_hub.hf_hub_download(repository, name))
    found = _on_disk(repository, name)
    if found is not None:
        return found
    raise WeightsError(
        f"{constants.ENDPOINT} cannot be reached ({reason}), and {name} of {repository} is not on this machine; bring the "
        f"repository's files to a folder and name that in place of {repository} ({_HELP})"
    )


def tagged_file(tag: dict[str, Any]) -> Path:
    """The file of weights that a tag of open_clip stands for, downloaded if need be. Without a network, from the disk.

    Raises:
        Exception: of any kind, if it cannot be had.
    """
    return kept_file(tag) or Path(download_pretrained(tag))


def kept_file(tag: dict[str, Any]) -> Path | None:
    """That file on the disk, where the hub cannot be reached; ``None``: the hub is to be asked.

    Raises:
        WeightsError: neither the hub nor the file is there.
    """
    place = PurePosixPath(tag.get("hf_hub") or "")  # owner/repository/ or owner/repository/file
    if "file" in tag or not place.parts:
        return None
    reason = unreachable(constants.ENDPOINT)
    if reason is None:
        return None
    repository, named = "/".join(place.parts[:2]), "/".join(place.parts[2:])
    names = [named, str(PurePosixPath(named).with_suffix(".safetensors"))] if named else _USUAL_FILES
    found = _on_disk(repository, *names)
    if found is not None:
        return found
    raise WeightsError(
        f"{constants.ENDPOINT} cannot be reached ({reason}), and {names[0]} is not on this machine; bring "
        f"{constants.ENDPOINT}/{repository}/resolve/main/{names[0]} from one with a network and give it as --pretrained "
        f"FILE, or leave --model out for the demo ({_HELP})"
    )


def _on_disk(repository: str, *names: str) -> Path | None:
    """The first of these files that was downloaded before."""
    found = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    return next((Path(one) for one in found if isinstance(one, str)), None)


def unreachable(address: str) -> str | None:
    """Why a server does not answer; ``None``: it does, whatever it answers.

    The hub's own client asks again and again for over a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return _asked(address)


@lru_cache
def _asked(address: str) -> str | None:
    """Once a process. In a thread, since looking a name up knows no time limit."""
    answer = [f"no answer in {PATIENCE:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE).close()
            answer.append("")
        except urllib.error.HTTPError:
            answer.append("")
        except OSError as error:  # a URLError is one
            reason = getattr(error, "reason", error)
            answer.append(str(getattr(reason, "strerror", None) or reason))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return answer[-1] or None
