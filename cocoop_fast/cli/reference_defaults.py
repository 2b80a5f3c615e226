"""What the reference takes where its files and keys are silent: its trainer, and its defaults.

Its ``train.py`` is told the trainer by ``--trainer``, which outranks all files; the files in
``configs/trainers/<trainer>/`` seldom name it. Here TRAINER.NAME (``--trainer``) or ``--method`` decides, else a section
TRAINER.COCOOP or TRAINER.COOP, else the name of that folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoop_fast.cli.reference_config import TRAINERS, is_reference_key, method_of_key
from cocoop_fast.config import flatten
from cocoop_fast.errors import UserError

Layers = Sequence[tuple[str, Mapping[str, Any]]]  # where a layer comes from, and its values by dotted name

_BY_LOWER = {name.lower(): method for name, method in TRAINERS.items()}
# Keys whose defaults the reference's train.py sets or inherits, by field of ours: what is said, and its value here.
EXPERIMENT = {
    "data.subset": ("DATASET.SUBSAMPLE_CLASSES all", "all"),
    "data.shots": ("DATASET.NUM_SHOTS -1 (all images)", 0),
}
CONTEXT = {
    "prompt.n_ctx": ("N_CTX 16", 16),
    "prompt.ctx_init": ("CTX_INIT '' (random vectors)", ""),
}
# Dassl's own defaults of how to train, which no published configuration uses: the method's recipe takes their place.
DASSLS = {
    "OPTIM.NAME": "adam",
    "OPTIM.LR": 0.0003,
    "OPTIM.LR_SCHEDULER": "single_step",
    "OPTIM.MAX_EPOCH": 10,
    "OPTIM.WARMUP_EPOCH": -1,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 32,
    "INPUT.TRANSFORMS": "none",
}
_FIELD_OF = {
    "OPTIM.LR": "optim.lr",
    "OPTIM.MAX_EPOCH": "optim.epochs",
    "OPTIM.WARMUP_EPOCH": "optim.warmup_epochs",
    "DATALOADER.TRAIN_X.BATCH_SIZE": "optim.batch_size",
}


def reference_keys(layers: Layers) -> set[str]:
    """Of all layers."""
    return {key for _, values in layers for key, _ in flatten(values) if is_reference_key(str(key))}


def method_said(layers: Layers, files: Sequence[Path]) -> str | None:
    """The method that files, options and pairs of the reference choose; None if they do not.

    Raises:
        UserError: what is said in its stead does not agree, or the files are of a trainer that is not offered.
    """
    said = None
    for _, values in layers:  # later ones win
        flat = dict(flatten(values))
        for key in ("TRAINER.NAME", "prompt.method"):
            if flat.get(key):
                said = _BY_LOWER.get(str(flat[key]).lower(), str(flat[key]))
    if said is not None:
        return said
    sections = {method for key in reference_keys(layers) if (method := method_of_key(key))}
    folders = {name for file in files if (name := _trainers_folder(file))}
    if len(sections) > 1:
        raise UserError("There are keys of both TRAINER.COCOOP and TRAINER.COOP; say which with --trainer.")
    unknown = sorted(name for name in folders if name.lower() not in _BY_LOWER)
    if unknown and not sections:
        raise UserError(
            f"The files in configs/trainers/{unknown[0]} are for a trainer that is not offered; give --trainer CoCoOp, "
            "CoOp, ZeroshotCLIP or ZeroshotCLIP2 to read them for one of those."
        )
    methods = sections | {_BY_LOWER[name.lower()] for name in folders if name.lower() in _BY_LOWER}
    if len(methods) > 1:
        raise UserError(
            f"The files are in configs/trainers/{', '.join(sorted(folders))}, but the keys are for "
            f"{', '.join(sorted(sections)) or 'no trainer'}; say which with --trainer."
        )
    return methods.pop() if methods else None


def ask_for_trainer(keys: set[str]) -> UserError:
    """Where nothing chooses the method."""
    named = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
    return UserError(
        f"It is not said which trainer of the reference these keys are for: {named}; give --trainer CoCoOp or --trainer CoOp "
        "(or --method), as train.py is told."
    )


def fill_in(merged: dict[str, Any], *, experiment: bool = True) -> list[str]:
    """The reference's defaults for the fields that nothing has set, and a line that says so.

    Args:
        merged: what all layers say, by field; it is added to.
        experiment: with classes and shots, which a protocol otherwise knows.
    """
    said = []
    defaults = {**(EXPERIMENT if experiment else {}), **_context_defaults(merged)}
    for field, (words, value) in defaults.items():
        if field not in merged:
            merged[field] = value
            said.append(words)
    return [f"Not said, and so as in the reference: {', '.join(said)}."] if said else []


def recipe_instead(merged: Mapping[str, Any], keys: set[str]) -> list[str]:
    """A line on the keys of how to train that files leave out, if the method has steps."""
    if merged.get("prompt.method") not in ("cocoop", "coop"):
        return []
    silent = [key for key in DASSLS if key not in keys and _FIELD_OF.get(key) not in merged]
    if not silent:
        return []
    theirs = ", ".join(f"{key} {DASSLS[key]}" for key in silent)
    return [
        f"Not said: {', '.join(silent)}. The published recipe of {merged['prompt.method']} is used, not Dassl's own "
        f"defaults ({theirs})."
    ]


def _context_defaults(merged: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    if merged.get("prompt.ctx_init") or merged.get("prompt.method") in ("zeroshot", "linear-probe"):
        return {}  # words have their own length; without a context there is none to speak of
    return CONTEXT


def _trainers_folder(file: Path) -> str | None:
    folder = file.absolute().parent
    return folder.name if folder.parent.name == "trainers" else None
