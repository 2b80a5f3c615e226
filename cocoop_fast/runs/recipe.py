"""What a configuration leaves open, filled in from the method's published recipe and the data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cocoop_fast.clip.load import resolve_device, resolve_precision
from cocoop_fast.config import (
    DataConfig,
    OptimConfig,
    PromptConfig,
    ResolvedAugment,
    ResolvedConfig,
    ResolvedData,
    ResolvedOptim,
    ResolvedPrompt,
    RunConfig,
)
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.errors import UserError
from cocoop_fast.methods.attributes import LAYOUT, attributes_for
from cocoop_fast.methods.consistency import WEIGHTS
from cocoop_fast.methods.records import METHODS, has_context
from cocoop_fast.variants import name_of, with_variant

T = TypeVar("T")


def resolve(config: RunConfig, dataset: Dataset) -> ResolvedConfig:
    """A configuration in which no ``None`` and no "auto" decides what is computed.

    CoCoOp: batches of 1, 10 epochs. CoOp: batches of 32, and 200 epochs for 8 and 16 shots, 100 for 2 and 4,
    50 for 1, for all images, and for ImageNet whatever the shots (the reference's configurations). The M
    Meta-Nets train as CoCoOp's one does.
    Consistency has the weights of PromptSRC (l1) or KgCoOp (cosine), and with l1 its average over epochs.
    Zero-shot CLIP learns nothing, and a linear probe is fitted without steps: 0 epochs.
    Both learners keep the configuration's ``ctx_init``, as the reference does in the base-to-new setting.

    Attributes that are "published" become those of the data set (ATPrompt).

    Args:
        config: as written by a user.
        dataset: its defaults for the classes trained on, the transform and the zero-shot template are used.

    Raises:
        UserError: bounds of the crop in the wrong order, a device that is not there, or attributes for what has no learned
            context or of a data set for which none are published.
    """
    name, model, augment, optim = config.prompt.method, config.model, config.augment, config.optim
    method, scale = METHODS[name], augment.crop_scale
    epochs = method.epochs if method.epochs is not None else _epochs(config.data.shots, dataset.name)
    near = optim.consistency
    text_weight, logit_weight = WEIGHTS["cosine" if near == "none" else near]
    if epochs and optim.epochs is not None:  # what has no steps has no epochs
        epochs = optim.epochs
    if scale is not None and scale[0] > scale[1]:
        raise UserError(f"augment.crop_scale is {scale[0]:g} to {scale[1]:g}; give the smaller share first.")
    if config.prompt.attributes and not has_context(name):
        raise UserError(
            f"Attributes stand between learned contexts, and {name} has none; leave them out, or use --method cocoop or coop."
        )
    # Seeds lie side by side, as the reference's result parser expects them.
    own_place = Path("output") / _data_name(config.data) / name_of(config) / f"seed{config.seed}"
    return _as(
        ResolvedConfig,
        config,
        model=replace(model, precision=resolve_precision(model.precision, resolve_device(model.device))),
        prompt=_as(
            ResolvedPrompt,
            config.prompt,
            template=_given(config.prompt.template, _template(config.prompt, dataset)),
            attributes=attributes_for(config.prompt.attributes, dataset.name),
        ),
        data=_as(ResolvedData, config.data, subset=_given(config.data.subset, dataset.subset)),
        augment=_as(
            ResolvedAugment,
            augment,
            crop_scale=_given(scale, dataset.crop_scale),
            flip=_given(augment.flip, dataset.flip),
        ),
        optim=_as(
            ResolvedOptim,
            optim,
            epochs=epochs,
            batch_size=_given(optim.batch_size, method.batch_size),
            text_weight=_given(optim.text_weight, text_weight),
            logit_weight=_given(optim.logit_weight, logit_weight),
            average=_given(optim.average, near == "l1"),
            master_weights=optim.master_weights and not config.reference_compat,
        ),
        output_dir=_given(config.output_dir, own_place),
    )


def in_words(config: ResolvedConfig) -> str:
    """What is learned, from what: the line that a log begins with."""
    prompt, data, optim = config.prompt, config.data, config.optim
    parts: list[str] = [name_of(config)]
    if has_context(prompt.method):
        own = " for each class" if prompt.csc else ""
        start = f"from '{prompt.ctx_init}'" if prompt.ctx_init else f"of {prompt.n_ctx} random vectors"
        place = "" if prompt.class_position == "end" else f", class name in {prompt.class_position}"
        parts.append(f"context{own} {start}{place}")
        if prompt.attributes:
            parts.append(f"attributes {', '.join(prompt.attributes)} ({LAYOUT})")
    else:
        parts.append(
            f"prompt '{prompt.template}'" if prompt.ensemble == "none" else f"ensemble {prompt.ensemble}"
        )
    parts += [
        f"{data.subset} classes of {data.name}",
        f"{data.shots} images a class" if data.shots else "all images of a class",
        f"{config.model.name} {config.model.pretrained or ''}".strip(),
    ]
    if optim.epochs:
        parts.append(f"{optim.epochs} epochs in batches of {optim.batch_size} from lr {optim.lr:g}")
    return "; ".join(parts)


def _data_name(data: DataConfig) -> str:
    """Of the default directory: one's own images are told apart by the name of their folder or list."""
    own = data.name in ("folder", "list") and data.root is not None
    place = data.root.resolve().name if own and data.root is not None else ""
    return f"{data.name}-{place}" if place else data.name


def with_method(config: RunConfig, method: str, output_dir: Path) -> RunConfig:
    """The same experiment by another method or variant: its own recipe, in a directory of its own."""
    varied = with_variant(config, method)
    optim = _as(OptimConfig, varied.optim, batch_size=None, epochs=None, average=None)
    return _as(RunConfig, varied, optim=optim, output_dir=output_dir)


def with_data(config: RunConfig, data: DataConfig, template: str | None) -> RunConfig:
    """The same on another data set; ``template`` is the prompt of zero-shot CLIP there (``None``: the data set's own)."""
    return _as(RunConfig, config, data=data, prompt=_as(PromptConfig, config.prompt, template=template))


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _as(kind: type[T], config: object, **values: Any) -> T:
    """A configuration, or a part of one, as another kind of the same fields, some of them replaced."""
    return kind(**{**vars(config), **values})


def _template(prompt: PromptConfig, dataset: Dataset) -> str:
    """The data set's own; with an ensemble none on ImageNet, for which the ensemble is made."""
    return "" if prompt.ensemble != "none" and dataset.name == "imagenet" else dataset.template


def _epochs(shots: int, dataset: str) -> int:
    """CoOp's."""
    if dataset == "imagenet":
        return 50
    if shots >= 8:
        return 200
    return 100 if shots >= 2 else 50
