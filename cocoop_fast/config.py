"""Typed configuration of a run: what the command line, YAML files and the reference's files all become.

Defaults are the CoCoOp paper's recipe (``vit_b16_c4_ep10_batch1_ctxv1``). A field that is ``None`` means
"what the data set or the method says"; :func:`cocoop_fast.runs.recipe.resolve` fills it in and gives a
:class:`ResolvedConfig`, which is what the ``config.yaml`` of a run directory holds.

The text below a field is its description, and the help of its option on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import ParseError, yaml_value
from cocoop_fast.variants import PLUS, additions, plain, spelled

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

Method = Literal["cocoop", "coop", "meta-nets", "zeroshot", "linear-probe"]
ClassPosition = Literal["end", "middle", "front"]
Ensemble = Literal["none", "select", "imagenet"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "amp"]
Subset = Literal["base", "new", "all"]
ShardBy = Literal["auto", "images", "classes", "both"]
OnNonfinite = Literal["stop", "skip"]
ConsistencyKind = Literal["none", "l1", "cosine"]

# The CLIPs inside the package, and how the names of the data sets begin that each was made for.
EMBEDDED_CLIPS = {"demo": "digits", "icons": "icons"}


def as_words(value: Any) -> Any:
    """``color, shape`` as the words that it lists, and nothing as none; a list as it is."""
    if value is None or value == "":
        return ()
    return tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else value


Attributes = Annotated[tuple[str, ...], BeforeValidator(as_words)]


def _no_bool(value: Any) -> Any:
    """``seed: yes`` is no 1."""
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


# Bounds that no use reaches, and beyond which arithmetic overflows in one library or another.
_Number = BeforeValidator(_no_bool)
Count = Annotated[int, Field(ge=0, le=10**9), _Number]
AtLeastOne = Annotated[int, Field(ge=1, le=10**9), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**63), _Number]
NotNegative = Annotated[float, Field(ge=0, le=1e9), _Number]
Positive = Annotated[float, Field(gt=0, le=1e9), _Number]
Probability = Annotated[float, Field(ge=0, le=1), _Number]
Share = Annotated[float, Field(gt=0, le=1), _Number]


def embedded_clip(data_name: str) -> str | None:
    """The CLIP inside the package that was made for this data set, if one was."""
    return next((clip for clip, data in EMBEDDED_CLIPS.items() if data_name.startswith(data)), None)


@dataclass(config=_STRICT, frozen=True)
class ModelConfig:
    """The frozen CLIP."""

    name: str = "demo"
    """open_clip architecture, OpenAI's name such as ViT-B/16, hf-hub:OWNER/NAME, or an embedded CLIP: demo, icons."""
    pretrained: str | None = None
    """open_clip tag of the weights, hf-hub:OWNER/NAME, or a file of open_clip or OpenAI."""
    precision: Precision = "auto"
    """Number format of CLIP's arithmetic; auto is fp32 on a CPU and fp16 on a GPU."""
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    """Implementation of the text tower; auto takes the first that is available of triton, cuda, cpu and torch."""
    image_backend: Literal["torch", "cpu"] = "torch"
    """Implementation of the image tower; cpu: C++ kernels, for a ViT in fp32 on a CPU."""
    memory_budget: str | None = None
    """For all that a step allocates, e.g. 4GB; the result is the same. Default: most of what is free."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cuda_graph: bool = True
    """On a GPU: record a training step, or a batch of a long evaluation or of many predictions, once and replay it."""
    shard: ShardBy = "auto"
    """What the processes of torchrun share out; auto is images, or classes in batches of one."""


@dataclass(config=_STRICT, frozen=True)
class PromptConfig:
    """The learned context (paper, section 3.2)."""

    method: Method = "cocoop"
    """What to train; a plus adds to it, as in cocoop+consistency+no-image."""
    ctx_init: str = "a photo of a"
    """Words the context begins from; empty: random vectors."""
    n_ctx: AtLeastOne = 4
    """Length of a random context; given alone, it implies an empty --ctx-init."""
    csc: bool = False
    """A context for each class, from random vectors; it knows no class but those trained on."""
    class_position: ClassPosition = "end"
    """Of the class name: after, amid or before the context."""
    attributes: Attributes = ()
    """Words between learned contexts (ATPrompt), e.g. color,shape, or published, the data set's; implies an empty --ctx-init."""
    ablate_image: bool = False
    """Show the Meta-Net the same random vector for every image: what is left is not due to the image."""
    average_zero_shot: bool = False
    """Classify by the mean of the logits and zero-shot CLIP's, on all classes alike; training is as without."""
    template: str | None = None
    """Zero-shot prompt, e.g. 'a photo of a {}.'. Default: the data set's own."""
    ensemble: Ensemble = "none"
    """Zero-shot: also the reference's seven templates, or OpenAI's 80."""


@dataclass(config=_STRICT, frozen=True)
class DataConfig:
    """Which images, and which of them are seen."""

    name: str = "digits"
    """One of `cocoop-fast datasets`; --root alone implies folder."""
    root: Path | None = None
    """Folder or list of the images; of published data sets, the folder that holds them."""
    class_names: Path | None = None
    """Of images in folders: a file of lines `folder name`. Default: classes are called like their folders."""
    shots: Count = 16
    """Training images a class; 0 is all."""
    few_shot: Path | None = None
    """A file, or a folder of files, that says which images. Default: beside the images, else drawn."""
    subset: Subset | None = None
    """Classes to train on: a half (base, new), or all. Default: all of one's own images; base of published sets."""
    workers: Count | None = None
    """Processes that read images. Default: on a GPU one for each core but one, at most 8; on a CPU none."""
    skip_bad_images: bool = False
    """Leave images out that cannot be read, and say so."""
    cache_views: Count = 0
    """Train on so many fixed augmented views of each image, encoded once and kept on disk; 0: new ones each epoch."""


@dataclass(config=_STRICT, frozen=True)
class AugmentConfig:
    """Training transform: random resized crop, horizontal flip."""

    crop_scale: tuple[Share, Share] | None = None
    """Smallest and largest area of the crop. Default: the data set's own."""
    flip: Probability | None = None
    """Probability of a flip. Default: the data set's own."""


@dataclass(config=_STRICT, frozen=True)
class OptimConfig:
    """Stochastic gradient descent as in the reference."""

    lr: Positive = 0.002
    """Learning rate."""
    momentum: Probability = 0.9
    """Of SGD."""
    weight_decay: NotNegative = 5e-4
    """Of SGD."""
    master_weights: bool = True
    """What is learned is kept in fp32, whatever the precision."""
    prune_mass: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Leave the unlikeliest classes out of backward, up to this share of the wrong classes' probability; 0 is exact."""
    on_nonfinite: OnNonfinite = "stop"
    """At a step whose loss or gradient is NaN or infinite."""
    consistency: ConsistencyKind = "none"
    """Keep learned text features near those of hand-written prompts: by their l1 distance as PromptSRC, or cosine as KgCoOp."""
    text_weight: NotNegative | None = None
    """Of that distance. Default: l1 25, cosine 8."""
    logit_weight: NotNegative | None = None
    """Of the divergence from zero-shot CLIP's probabilities, with consistency. Default: l1 1, cosine 0."""
    average: bool | None = None
    """Keep the Gaussian-weighted mean of all epochs, as PromptSRC, not the last. Default: with consistency l1."""
    batch_size: AtLeastOne | None = None
    """Images a step. Default: CoCoOp 1, CoOp 32."""
    epochs: Count | None = None
    """Passes over the training images; 0 for zero-shot alone. Default: CoCoOp 10, CoOp 200."""
    warmup_epochs: Count = 1
    """First epochs, whose learning rate is warmup_lr."""
    warmup_lr: NotNegative = 1e-5
    """Learning rate of the first epochs."""


@dataclass(config=_STRICT, frozen=True)
class RunConfig:
    """Everything that decides what a run computes, and where it is kept."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: Seed = 1
    """Draws the shots, their order and crops."""
    output_dir: Path | None = None
    """Run directory. Default: output/DATASET/METHOD/seedSEED."""
    eval_batch_size: AtLeastOne = 100
    """Images at once in evaluation."""
    print_freq: AtLeastOne = 20
    """Steps between lines of log.txt."""
    checkpoint_steps: Count = 0
    """Save every so many steps too; 0 is at each epoch's end only."""
    reference_compat: bool = False
    """With those of the reference's defects that docs/migration.md lists."""


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ResolvedPrompt(PromptConfig):
    """With the data set's own template where none was given."""

    template: str


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ResolvedData(DataConfig):
    """With the data set's own choice of classes where none was made."""

    subset: Subset


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ResolvedAugment(AugmentConfig):
    """With the data set's own transform where none was given."""

    crop_scale: tuple[Share, Share]
    flip: Probability


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ResolvedOptim(OptimConfig):
    """With the method's own recipe where none was given."""

    batch_size: AtLeastOne
    epochs: Count
    text_weight: NotNegative
    logit_weight: NotNegative
    average: bool


@dataclass(config=_STRICT, frozen=True, kw_only=True)
class ResolvedConfig(RunConfig):
    """A configuration in which no ``None`` decides what is computed."""

    prompt: ResolvedPrompt
    data: ResolvedData
    augment: ResolvedAugment
    optim: ResolvedOptim
    output_dir: Path


_Config = TypeVar("_Config", bound=RunConfig)


def from_mapping(values: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Build a :class:`RunConfig` from nested plain values; the method's name may be that of a variant.

    Raises:
        UserError: an unknown field or a value of the wrong type, named by its dotted path.
    """
    return _validated(RunConfig, values, where)


def resolved_from_mapping(values: dict[str, Any], where: str = "the configuration") -> ResolvedConfig:
    """The same of a configuration that leaves nothing open."""
    return _validated(ResolvedConfig, values, where)


def _validated(kind: type[_Config], values: dict[str, Any], where: str) -> _Config:
    variant = None
    match values:
        case {"prompt": {"method": str(name)}} if PLUS in name and (
            variant := spelled(name, where, get_args(Method))
        ):
            values = _with_additions(values, variant, where)
    try:
        config = TypeAdapter(kind).validate_python(values)
    except (RecursionError, OverflowError) as error:
        raise UserError(f"{where} is nested too deeply or has a number that is too large.") from error
    except ValidationError as error:
        # What is there and wrong says more than what is not there.
        first = min(error.errors(), key=lambda one: one["type"] == "missing")
        path = ".".join(str(part) for part in first["loc"]) or "(top level)"
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise UserError(f"{where}: {unknown_field(path)}") from error
        raise UserError(f"{where}: `{path}` {explain_value(first)}.") from error
    for one in additions(variant or "", where):
        if not one.is_in(config):
            raise UserError(
                f"{where}: {variant} has `{one.field}` {one.value}, but that is said to be otherwise; say one of the two."
            )
    return config


def _with_additions(values: dict[str, Any], variant: str, where: str) -> dict[str, Any]:
    """The same with the plain method, and the fields that a variant adds where nothing else is said of them."""
    filled = {**values, "prompt": {**values["prompt"], "method": plain(variant)}}
    for one in additions(variant, where):
        for field_name, value in ((one.field, one.value), *one.also):
            section, _, leaf = field_name.partition(".")
            own = filled.get(section, {})
            if isinstance(own, dict):
                filled[section] = {leaf: value, **own}
    return filled


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The inverse of :func:`from_mapping`: nested values that YAML and JSON can hold."""
    return TypeAdapter(RunConfig).dump_python(config, mode="json")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as pairs of a dotted path and a leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested fields.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml_value(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The configuration file {path} cannot be read: {reason}.") from error
    except ParseError as error:
        raise UserError(f"The configuration file {path} cannot be used: {error}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"The configuration file {path} must hold `field: value` pairs at its top level.")
    return values


@cache
def field_names() -> tuple[str, ...]:
    """Dotted names of all fields of :class:`RunConfig`."""
    return tuple(name for name, _ in flatten(dataclasses.asdict(RunConfig())))


@cache
def sections() -> frozenset[str]:
    """Names of those fields that hold others."""
    return frozenset(name.partition(".")[0] for name in field_names() if "." in name)


def unknown_field(name: str) -> str:
    """The sentence that there is no such field, with the one that may be meant."""
    names = field_names()
    by_leaf = [one for one in names if one.rpartition(".")[2] == name.rpartition(".")[2]]
    near = by_leaf or difflib.get_close_matches(name, [*names, *sections()], n=1)
    hint = f"did you mean {near[0]}?" if near else "docs/configuration.md lists them all."
    return f"`{name}` is not a known field; {hint}"


# Of pydantic's kinds of errors those whose own words speak of Python.
_MUST_BE = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_parsing": "a number, with a point for its fraction", "float_type": "a number",
    "bool_parsing": "true or false", "bool_type": "true or false", "string_type": "text",
    "dataclass_type": "fields and their values, which docs/configuration.md lists",
}  # fmt: skip


def explain_value(error: Any) -> str:
    """What is wrong with a value, from one of pydantic's ``errors()``: "is 'five', but it must be a whole number"."""
    if error["type"] == "missing":
        return "is missing"
    try:
        value = repr(error["input"])
    except (ValueError, RecursionError):
        # An integer of more digits than Python writes, or lists in lists in lists.
        value = "beyond all bounds"
    value = value if len(value) < 200 else f"{value[:200]}..."
    if error["type"] in _MUST_BE:
        return f"is {value}, but it must be {_MUST_BE[error['type']]}"
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return f"is {value}, but {said[:1].lower()}{said[1:]}"
