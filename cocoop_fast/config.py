"""Typed configuration of a run: what the command line, YAML files and the reference's files all become.

Defaults are the CoCoOp paper's recipe (``vit_b16_c4_ep10_batch1_ctxv1``). A field that is ``None`` means
"what the data set or the method says"; :func:`cocoop_fast.runs.recipe.resolve` fills it in, so that the
``config.yaml`` of a run directory never holds a ``None`` that decides something.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cocoop_fast.errors import UserError

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Method = Literal["cocoop", "coop", "meta-nets", "zeroshot", "linear-probe"]
ClassPosition = Literal["end", "middle", "front"]
Ensemble = Literal["none", "select", "imagenet"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "amp"]
Subset = Literal["base", "new", "all"]
ShardBy = Literal["auto", "images", "classes", "both"]
OnNonfinite = Literal["stop", "skip"]

Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(config=_STRICT, frozen=True)
class ModelConfig:
    """The frozen CLIP."""

    name: str = "demo"  # an open_clip architecture, or "demo": the CLIP that ships with the package
    pretrained: str | None = None  # an open_clip tag, a hub name or a local file
    precision: Precision = "auto"  # auto: fp32 on a CPU, fp16 on a GPU
    backend: Literal["auto", "torch", "cpu", "triton", "cuda"] = "auto"
    memory_budget: str | None = None  # for what a step allocates, e.g. "4GB"; None: most of what is free
    device: str = "auto"
    cuda_graph: bool = True  # on a GPU: record a training step once and replay it
    shard: ShardBy = "auto"  # what several processes share out; auto: images, or classes in batches of one


@dataclass(config=_STRICT, frozen=True)
class PromptConfig:
    """The learned context (paper, section 3.2)."""

    method: Method = "cocoop"
    ctx_init: str = "a photo of a"  # empty: random initialisation of n_ctx vectors
    n_ctx: AtLeastOne = 4  # used when ctx_init is empty
    csc: bool = False  # a context for each class; such a model knows no class but those trained on
    class_position: ClassPosition = "end"  # of the class name: after, amid or before the context
    template: str | None = None  # zero-shot prompt, e.g. "a photo of a {}."; None: the data set's own
    ensemble: Ensemble = "none"  # zero-shot: also the reference's seven templates, or OpenAI's 80


@dataclass(config=_STRICT, frozen=True)
class DataConfig:
    """Which images, and which of them are seen."""

    name: str = "digits"  # a name in cocoop_fast.data.registry
    root: Path | None = None
    shots: Count = 16  # images a class to train on; 0: all of them
    few_shot: Path | None = None  # a file, or a directory of files, that says which images
    subset: Subset = "base"  # classes that are trained on
    workers: Count = 0
    skip_bad_images: bool = False
    cache_views: Count = 0  # train on N fixed views of each image, encoded once; 0: new ones each epoch


@dataclass(config=_STRICT, frozen=True)
class AugmentConfig:
    """Training transform: random resized crop, horizontal flip (None: the data set's own choice)."""

    crop_scale: tuple[Share, Share] | None = None
    flip: Probability | None = None  # probability


@dataclass(config=_STRICT, frozen=True)
class OptimConfig:
    """Stochastic gradient descent as in the reference (None: the method's own recipe)."""

    lr: Positive = 0.002
    momentum: Probability = 0.9
    weight_decay: NotNegative = 5e-4
    master_weights: bool = True  # what is learned is kept in fp32, whatever the precision
    prune_mass: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # share of the wrong classes' probability left out of backward
    )
    on_nonfinite: OnNonfinite = "stop"  # at a step whose loss or gradient is not finite
    batch_size: AtLeastOne | None = None  # CoCoOp 1, CoOp 32
    epochs: Count | None = None  # CoCoOp 10, CoOp 200; 0 for zero-shot alone
    warmup_epochs: Count = 1
    warmup_lr: NotNegative = 1e-5


@dataclass(config=_STRICT, frozen=True)
class RunConfig:
    """Everything that decides what a run computes, and where it is kept."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: Count = 1
    output_dir: Path | None = None  # None: output/<data>/<method>/seed<seed>
    eval_batch_size: AtLeastOne = 100
    print_freq: AtLeastOne = 20  # steps between lines of log.txt
    checkpoint_steps: Count = 0  # also save every so many steps; 0: at each epoch's end only
    reference_compat: bool = False  # with those of the reference's defects that docs/migration.md lists


_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def from_mapping(values: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Build a :class:`RunConfig` from nested plain values.

    Raises:
        UserError: an unknown field or a value of the wrong type, named by its dotted path.
    """
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"]) or "(top level)"
        raise UserError(f"{where}: `{path}` {_explain(first)}.") from error


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The inverse of :func:`from_mapping`: nested values that YAML and JSON can hold."""
    return _ADAPTER.dump_python(config, mode="json")


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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"The configuration file {path} cannot be read: {reason}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise UserError(f"The configuration file {path} is not valid YAML{line}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"The configuration file {path} must hold `field: value` pairs at its top level.")
    return values


def _explain(error: Any) -> str:
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return "is not a known field"
    return f"is {error['input']!r}, but {error['msg'][:1].lower()}{error['msg'][1:]}"
