"""The state dict of a CLIP in a weights file of any kind, read without running code that the file holds.

Trainers write more than a state dict: optimizers, settings, numbers of NumPy, the whole model as one object. They
put prefixes before the names, too. A CLIP is found by the one name that every kind of it has: the token embedding's.
"""

from __future__ import annotations

import codecs
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cocoop_fast.files.inert_pickle import InertObject
from cocoop_fast.files.parsing import json_value
from cocoop_fast.files.torch_archive import (
    NumbersNotRead,
    is_script_archive,
    read_archive,
    script_state_dict,
    weights_of,
)

State = dict[str, Tensor]


class WeightsError(Exception):
    """Weights that cannot be used. The text is why: a clause whose subject is the weights."""


SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_INDEX = ".index.json"  # lists the parts of weights that are kept in several files

# The token embedding's name in Apple's MobileCLIP, in a `CLIPModel` of Hugging Face, in an open_clip `CustomTextCLIP`, and
# in a `CLIP`.
_TOKENS = "token_embedding.weight"
_TOKEN_NAMES = (
    "text_encoder.embedding_layer.weight",
    f"text_model.embeddings.{_TOKENS}",
    f"text.{_TOKENS}",
    _TOKENS,
)
# What torch.compile, FSDP and activation checkpointing put before the names of each module that they wrap.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Where trainers keep the model, if there is more than one: what is trained before its running average.
_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network")


def listed_parts(index: Path) -> list[str]:
    """The files that an ``.index.json`` lists: those of weights in several files.

    Raises:
        WeightsError: it is damaged, or lists files elsewhere.
    """
    try:
        parts = sorted(set(json_value(index.read_text("utf-8"))["weight_map"].values()))
        elsewhere = [part for part in parts if part != Path(part).name or "\0" in part]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged ({error})") from error
    if elsewhere:
        raise WeightsError(f"{index} lists {elsewhere[0][:200]!r}, which is no file beside it")
    return parts


def read_state(path: Path) -> State:
    """The state dict of the CLIP in a file, under its own names: no prefixes of trainers.

    Args:
        path: ``.safetensors``, anything that ``torch.save`` or TorchScript wrote, or the ``.index.json`` of weights
            in several files.

    Raises:
        WeightsError: the file is damaged or is none of these, or holds no CLIP, or several.
    """
    if path.name.endswith(_INDEX):
        return _one_clip(
            {k: v for part in listed_parts(path) for k, v in _content(path.parent / part).items()}
        )
    try:
        return _one_clip(_content(path))
    except ValueError as error:
        raise WeightsError(f"the file is damaged ({error})") from error


def _content(path: Path) -> Any:
    """All that a file holds, with objects of classes as inert placeholders."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{" and not start.startswith(b"PK"):  # whatever the file is called: its header is JSON
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"they are damaged or not complete ({error}); download or copy it again"
            ) from error
    for beginning, what in (
        (
            b"version https://git-lfs",
            "the file is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`",
        ),
        (b"<", "the file is a web page, not weights; download the file itself"),
        (b"{", "the file is JSON, perhaps a server's answer, and not weights; download the file itself"),
    ):
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(beginning):
            raise WeightsError(what)
    if not start:
        raise WeightsError("the file is empty")
    if not start.strip(b"\0"):
        raise WeightsError("the file begins with zeros: it is not complete; download or copy it again")
    try:
        return script_state_dict(path) if is_script_archive(path) else read_archive(path)
    except NumbersNotRead as error:
        raise WeightsError(str(error)) from error
    except Exception as error:  # the reader's failure of whatever kind: the file is torn or hostile
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):
            raise WeightsError("the file is not complete; download or copy it again") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(
            f"the file is damaged, or PyTorch did not write it ({reason.rstrip('.')})"
        ) from error


def _one_clip(content: Any) -> State:
    """The only CLIP in a file's content, or the one that trainers mean by its name."""
    found = list(_clips(content, ()))
    if not found:
        raise WeightsError(f"the file holds no CLIP: no weight in it is called `{_TOKENS}`")
    if len(found) > 1:
        found = [min(found, key=_rank)] if len({_rank(one) for one in found}) == len(found) else found
    if len(found) > 1:
        names = ", ".join(".".join(where) or "the file itself" for where, _ in found)
        raise WeightsError(
            f"the file holds several CLIPs ({names}); save the state dict of one of them alone"
        )
    return _without_prefix(found[0][1])


def _rank(one: tuple[tuple[str, ...], State]) -> int:
    last = one[0][-1] if one[0] else ""
    return _KEYS.index(last) if last in _KEYS else len(_KEYS)


def _clips(value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], State]]:
    """State dicts of CLIPs, wherever they are, with the keys that lead there."""
    if isinstance(value, InertObject):
        state = weights_of(value)
        if any(_prefix(key) is not None for key in state):
            yield where, state
        return
    if not isinstance(value, Mapping) or len(where) > 3:
        return
    if any(isinstance(key, str) and _prefix(key) is not None for key in value):
        yield where, {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
        return
    for key, child in value.items():
        if "optim" not in str(key).lower():  # it has the weights' names, but not the weights
            yield from _clips(child, (*where, str(key)))


def _without_prefix(state: State) -> State:
    """Names as the model's own; what stands beside the model (metrics, losses) is left out."""
    for wrapper in _WRAPPERS:
        state = {key.replace(wrapper, ""): value for key, value in state.items()}
    prefixes = {_prefix(key) for key in state} - {None}
    if not prefixes:
        raise WeightsError(
            f"`{_TOKENS}` is no dense tensor with numbers (but sparse, quantized, on the device meta, or of NumPy); save the "
            "state dict of the model itself"
        )
    if len(prefixes) != 1:
        names = ", ".join(f"'{prefix}'" for prefix in sorted(map(str, prefixes)))
        raise WeightsError(
            f"the file holds several CLIPs (prefixes {names}); save the state dict of one of them alone"
        )
    prefix = str(*prefixes)
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _prefix(key: str) -> str | None:
    """What stands before the token embedding's own name; ``None`` for the names of other weights."""
    name = next((name for name in _TOKEN_NAMES if f".{key}".endswith(f".{name}")), None)
    return None if name is None else key.removesuffix(name)
