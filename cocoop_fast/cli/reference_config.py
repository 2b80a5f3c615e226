"""Configurations of the reference implementation (KaiyangZhou/CoOp on Dassl), read as ours.

Its keys are upper-case and dotted (``OPTIM.LR``), in YAML files and as trailing ``KEY VALUE`` pairs. Each key
has one row in ``RULES``, a function from its value to our fields:

* most keys become a field of :class:`cocoop_fast.config.RunConfig`;
* some name a choice that is built in, so another value would change the result and is an error;
* those that do not change what is learned are ``ignored``: left out, and the caller is told.

A key without a row is an error. The reference itself reads a key that no code looks at without a word.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cocoop_fast.config import flatten
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import meant

# OpenAI's CLIPs in open_clip. They were trained with QuickGELU, which in open_clip is part of the model's name.
BACKBONES = {
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
IMAGE_SIZES = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448, "ViT-L/14@336px": 336}  # all others: 224

TRAINERS = {"CoCoOp": "cocoop", "CoOp": "coop", "ZeroshotCLIP": "zeroshot", "ZeroshotCLIP2": "zeroshot"}
# fp16 there means "as CLIP's weights are on a GPU"; `auto` is that on a GPU, and float32 where halves are slow.
PRECISIONS = {"fp16": "auto", "fp32": "fp32", "amp": "amp", "bf16": "bf16"}
METHOD_SECTIONS = {"TRAINER.COCOOP": "cocoop", "TRAINER.COOP": "coop"}

CROP_SCALE = (0.08, 1.0)  # of the reference's random_resized_crop
FLIP = 0.5  # of its random_flip

Fields = dict[str, Any]  # dotted names of our fields and their values
# What becomes of one key: the fields that a value sets; ``ValueError`` with the reason if it is not offered.
Rule = Callable[[Any], Fields]


@dataclass(frozen=True)
class Translation:
    """Our fields by dotted name, and one line for each key that was left out."""

    fields: Fields
    warnings: tuple[str, ...]


def is_reference_key(key: str) -> bool:
    """Whether a top-level or dotted key is in the reference's upper-case spelling."""
    return key.partition(".")[0].isupper()


def translate(
    values: Mapping[str, Any], where: str, chosen: Mapping[str, str | None] | None = None
) -> Translation:
    """Translate the reference's keys.

    Args:
        values: nested mappings, dotted keys, or both; values as YAML or a command line gives them.
        where: what errors and warnings name as their place, e.g. the file.
        chosen: ``prompt.method``, for which the keys are read, and ``data.name`` as chosen elsewhere, which outranks
            DATASET.NAME.

    Raises:
        UserError: an unknown key, or a value that would change the result and is not offered; it names the key.
    """
    flat = dict(flatten(values))
    rules = {key: _rule(key, where) for key in flat}
    chosen = chosen or {}
    method = chosen.get("prompt.method")

    fields: Fields = {} if method is None else {"prompt.method": method}
    warnings = []
    for key, value in flat.items():
        if method and method_of_key(key) not in (None, method):
            warnings.append(f"{where}: {key} is ignored, because the method is {method}.")
        elif key == "DATASET.NAME" and chosen.get("data.name"):
            warnings.append(f"{where}: {key} is ignored, because the data set is {chosen['data.name']}.")
        elif rules[key] is ignored:
            warnings.append(f"{where}: {key} is ignored; it does not change what is learned.")
        else:
            try:
                fields.update(rules[key](_literal(value)))
            except ValueError as error:
                raise UserError(f"{where}: {key} is {_show(value)}, but {error}.") from error
    _check_image_size(flat, where)
    return Translation(fields, tuple(warnings))


def open_clip_name(name: str) -> tuple[str, str] | None:
    """(architecture, weights) of open_clip for OpenAI's own spelling, such as ``ViT-B/16``; ``None`` for others.

    Case does not matter. Names without a slash (``RN50``) are architectures in both worlds, and are taken as open_clip's.
    """
    found = meant(name, BACKBONES) if "/" in name else None
    return None if found is None else (BACKBONES[found], "openai")


def method_of_key(key: str) -> str | None:
    """The method whose section of the reference's configuration a dotted key is in."""
    return METHOD_SECTIONS.get(key.rpartition(".")[0])


# -- the rows ---------------------------------------------------------------------------------------------------


def ignored(value: Any) -> Fields:
    """Of keys that do not change what is learned."""
    return {}


def _field(name: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    return lambda value: {name: convert(value)}


def _only(*allowed: Any, otherwise: str = "") -> Rule:
    """What is built in: any other value is an error, which says ``otherwise``."""

    def check(value: Any) -> Fields:
        if not any(_same(value, one) for one in allowed):
            raise ValueError(otherwise or f"only {' or '.join(_show(one) for one in allowed)} is offered")
        return {}

    return check


def _same(one: Any, other: Any) -> bool:
    """Equal, but for the case of letters and the last digits of numbers."""
    if isinstance(one, str) and isinstance(other, str):
        return one.lower() == other.lower()
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6
    return bool(one == other)


def _choice(name: str, table: Mapping[str, str]) -> Rule:
    by_lower = {key.lower(): ours for key, ours in table.items()}

    def convert(value: Any) -> Fields:
        if str(value).lower() not in by_lower:
            raise ValueError(f"only {', '.join(table)} are offered")
        return {name: by_lower[str(value).lower()]}

    return convert


def _backbone(value: Any) -> Fields:
    if value not in BACKBONES:
        raise ValueError(f"only {', '.join(BACKBONES)} are offered")
    return {"model.name": BACKBONES[value], "model.pretrained": "openai"}


def _trainer(value: Any) -> Fields:
    method = _choice("prompt.method", TRAINERS)(value)
    ensemble = "select" if str(value).lower() == "zeroshotclip2" else "none"
    return {**method, "prompt.ensemble": ensemble} if method["prompt.method"] == "zeroshot" else method


def _dataset(value: Any) -> Fields:
    from cocoop_fast.data.registry import canonical_name  # here, so that a trainer's file needs no data code

    try:
        return {"data.name": canonical_name(str(value))}
    except UserError as error:
        raise ValueError(
            "that data set is not read by name; arrange its images as one folder a class and "
            "use `data.name folder` with `data.root`"
        ) from error


def _transforms(value: Any) -> Fields:
    names = {value} if isinstance(value, str) else set(value)
    always = {"random_resized_crop", "normalize"}
    if not always <= names <= always | {"random_flip"}:
        raise ValueError(
            "only random_resized_crop, random_flip (which may be left out) and normalize are offered"
        )
    return {"augment.crop_scale": CROP_SCALE, "augment.flip": FLIP if "random_flip" in names else 0.0}


def _not_below_zero(value: Any) -> int:
    return max(int(value), 0)


def _seed(value: Any) -> int:
    if int(value) < 0:
        raise ValueError("a run without a seed is not offered; choose a number from 0")
    return int(value)


def _ctx_init(value: Any) -> str:
    """Words. Forks keep a bool there: False is none, True a template that each of them has of its own."""
    if value is None or value is False:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            "the words that the context begins as are wanted, e.g. 'a photo of a' (forks that keep True there mean a "
            "template of their own)"
        )
    return value


def _use_cuda(value: Any) -> Fields:
    # True is the reference's default and means "if there is one", which is ours as well.
    return {} if value else {"model.device": "cpu"}


_NOTHING: tuple[Any, ...] = ("", None, (), [])
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)

RULES: dict[str, Rule] = {
    "VERSION": ignored,
    "VERBOSE": ignored,
    "OUTPUT_DIR": _field("output_dir"),
    "RESUME": _only(*_NOTHING, otherwise="a run is resumed by giving its output directory"),
    "SEED": _field("seed", _seed),
    "USE_CUDA": _use_cuda,
    "INPUT.SIZE": lambda value: {},  # compared with the backbone in _check_image_size
    "INPUT.INTERPOLATION": _only("bicubic"),
    "INPUT.PIXEL_MEAN": _only(_MEAN, otherwise=f"only CLIP's own mean, {list(_MEAN)}, is offered"),
    "INPUT.PIXEL_STD": _only(_STD, otherwise=f"only CLIP's own deviation, {list(_STD)}, is offered"),
    "INPUT.TRANSFORMS": _transforms,
    "INPUT.NO_TRANSFORM": _only(False),
    "INPUT.RRCROP_SCALE": _field("augment.crop_scale"),
    "DATASET.NAME": _dataset,
    "DATASET.ROOT": _field("data.root"),
    "DATASET.NUM_SHOTS": _field("data.shots", _not_below_zero),  # -1 is, as our 0, all images
    "DATASET.SUBSAMPLE_CLASSES": _choice("data.subset", {"all": "all", "base": "base", "new": "new"}),
    "DATALOADER.NUM_WORKERS": _field("data.workers"),
    "DATALOADER.K_TRANSFORMS": _only(1),
    "DATALOADER.RETURN_IMG0": ignored,
    "DATALOADER.TRAIN_X.SAMPLER": _only("RandomSampler"),
    "DATALOADER.TRAIN_X.BATCH_SIZE": _field("optim.batch_size"),
    "DATALOADER.TEST.SAMPLER": _only("SequentialSampler"),
    "DATALOADER.TEST.BATCH_SIZE": _field("eval_batch_size"),
    "TRAINER.NAME": _trainer,
    "MODEL.INIT_WEIGHTS": _only(
        *_NOTHING, otherwise="a run always begins from ctx_init or from random vectors"
    ),
    "MODEL.BACKBONE.NAME": _backbone,
    "MODEL.BACKBONE.PRETRAINED": _only(True),
    "OPTIM.NAME": _only("sgd"),
    "OPTIM.LR": _field("optim.lr"),
    "OPTIM.WEIGHT_DECAY": _field("optim.weight_decay"),
    "OPTIM.MOMENTUM": _field("optim.momentum"),
    "OPTIM.SGD_DAMPNING": _only(0),
    "OPTIM.SGD_NESTEROV": _only(False),
    "OPTIM.STAGED_LR": _only(False),
    "OPTIM.LR_SCHEDULER": _only("cosine"),
    "OPTIM.MAX_EPOCH": _field("optim.epochs"),
    "OPTIM.WARMUP_EPOCH": _field("optim.warmup_epochs", _not_below_zero),  # -1: none
    "OPTIM.WARMUP_TYPE": _only("constant"),
    "OPTIM.WARMUP_CONS_LR": _field("optim.warmup_lr"),
    "OPTIM.WARMUP_RECOUNT": _only(True),
    "TRAIN.PRINT_FREQ": _field("print_freq"),
    "TRAIN.CHECKPOINT_FREQ": ignored,  # every epoch's end is saved
    "TRAIN.COUNT_ITER": _only("train_x"),
    "TEST.EVALUATOR": _only("Classification"),
    "TEST.PER_CLASS_RESULT": ignored,
    "TEST.COMPUTE_CMAT": ignored,
    "TEST.NO_TEST": ignored,
    "TEST.SPLIT": _only("test"),
    "TEST.FINAL_MODEL": _only("last_step"),
}

# TRAINER.COCOOP.* and TRAINER.COOP.*
METHOD_RULES: dict[str, Rule] = {
    "N_CTX": _field("prompt.n_ctx"),
    "CTX_INIT": _field("prompt.ctx_init", _ctx_init),
    "PREC": _choice("model.precision", PRECISIONS),
    "CSC": _field("prompt.csc"),
    "CLASS_TOKEN_POSITION": _field("prompt.class_position"),
}
ALL_RULES = RULES | {
    f"{section}.{key}": rule for section in METHOD_SECTIONS for key, rule in METHOD_RULES.items()
}

# Sections and settings that only other algorithms or other transforms of that library read.
UNUSED_PREFIXES = (
    "INPUT.CROP_PADDING", "INPUT.CUTOUT_", "INPUT.GN_", "INPUT.RANDAUGMENT_", "INPUT.COLORJITTER_", "INPUT.RGS_",
    "INPUT.GB_", "DATASET.SOURCE_DOMAINS", "DATASET.TARGET_DOMAINS", "DATASET.NUM_LABELED", "DATASET.VAL_PERCENT",
    "DATASET.STL10_FOLD", "DATASET.CIFAR_C", "DATASET.ALL_AS_UNLABELED", "DATALOADER.TRAIN_U.",
    "DATALOADER.TRAIN_X.N_DOMAIN", "DATALOADER.TRAIN_X.N_INS", "MODEL.HEAD.", "OPTIM.RMSPROP_", "OPTIM.ADAM_",
    "OPTIM.NEW_LAYERS", "OPTIM.BASE_LR_MULT", "OPTIM.STEPSIZE", "OPTIM.GAMMA", "OPTIM.WARMUP_MIN_LR",
    "TEST.EVAL_FREQ", "TRAINER.MCD.", "TRAINER.MME.", "TRAINER.CDAC.", "TRAINER.SE.", "TRAINER.M3SDA.",
    "TRAINER.DAEL.", "TRAINER.DAELDG.", "TRAINER.CROSSGRAD.", "TRAINER.CG.", "TRAINER.DDAIG.", "TRAINER.ENTMIN.",
    "TRAINER.MEANTEA.", "TRAINER.MIXMATCH.", "TRAINER.FIXMATCH.", "TRAINER.DOMAINMIX.",
)  # fmt: skip


# -- how they are applied ---------------------------------------------------------------------------------------


def _rule(key: str, where: str) -> Rule:
    rule = ALL_RULES.get(key, ignored if key.startswith(UNUSED_PREFIXES) else None)
    if rule is None:
        near = difflib.get_close_matches(key, ALL_RULES, n=1)
        hint = f"did you mean {near[0]}?" if near else "check its spelling, or leave it out."
        raise UserError(f"{where}: {key} is not a key of the reference's configuration; {hint}")
    return rule


def _check_image_size(flat: Mapping[str, Any], where: str) -> None:
    """The reference asserts that INPUT.SIZE is the model's own; here it is always that one."""
    if "INPUT.SIZE" not in flat:
        return
    size = _literal(flat["INPUT.SIZE"])
    backbone = str(flat.get("MODEL.BACKBONE.NAME", "ViT-B/16"))
    expected = IMAGE_SIZES.get(backbone, 224)
    if size not in (expected, (expected, expected), [expected, expected], (expected,), [expected]):
        raise UserError(
            f"{where}: INPUT.SIZE is {_show(flat['INPUT.SIZE'])}, but {backbone} takes images of "
            f"{expected} x {expected} pixels."
        )


def _literal(value: Any) -> Any:
    """What the reference's reader makes of a text: a Python literal if it is one, else the text itself.

    YAML has no tuples and reads ``1e-5`` as text, so its files rely on this.
    """
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
