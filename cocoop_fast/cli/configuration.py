"""From files, options and trailing ``KEY VALUE`` pairs to one :class:`RunConfig`.

Later layers win: defaults <- ``--config`` files in their order <- options <- trailing pairs. Each layer may use
our field names (``optim.lr``) or the reference's keys (``OPTIM.LR``). With any of those, the defaults of what is learned
(context, classes, shots) are the reference's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from cocoop_fast.cli import reference_config, reference_defaults
from cocoop_fast.config import (
    Method,
    RunConfig,
    embedded_clip,
    field_names,
    flatten,
    from_mapping,
    load_yaml,
    sections,
    unknown_field,
)
from cocoop_fast.errors import UserError
from cocoop_fast.files.parsing import ParseError, yaml_value
from cocoop_fast.variants import plain, refuse_idle, spelled

# Where and how a run computes: fields that leave its result alone, up to rounding.
NOT_THE_EXPERIMENT = frozenset([
    "output_dir", "model.device", "model.backend", "model.image_backend", "model.shard", "data.workers",
    "print_freq", "checkpoint_steps", "seed",
])  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """A configuration with what was noticed on the way to it.

    Args:
        config: the merged configuration.
        said: dotted names of the fields that some layer set.
        warnings: one line each.
    """

    config: RunConfig
    said: frozenset[str]
    warnings: tuple[str, ...]

    @property
    def is_default_experiment(self) -> bool:
        """Whether nothing was said about what to learn, from what and how (a seed apart)."""
        return self.said <= NOT_THE_EXPERIMENT


def build(
    files: Sequence[Path] | None = None,
    options: Mapping[str, tuple[str, Any]] | None = None,
    pairs: Sequence[str] | None = None,
    *,
    protocol: bool = False,
) -> Configuration:
    """Merge the layers.

    Args:
        files: YAML files, ours or the reference's.
        options: by field the option that was given and its value, e.g. ``{"optim.lr": ("--lr", 0.01)}``.
        pairs: keys and values in turn, or joined by ``=``.
        protocol: methods, classes and shots are said elsewhere; of the reference's defaults, files bring the context's.

    Raises:
        UserError: keys of the reference of which nobody says which trainer they are for, an unreadable file, an unknown
            key, a value of the wrong type or out of range.
    """
    given = options or {}
    pair_values = _pairs(pairs or ())
    for key in pair_values:
        if not reference_config.is_reference_key(key) and key not in field_names():
            raise UserError(unknown_field(key) + _a_place(key))
    layers: list[tuple[str, Mapping[str, Any]]] = [  # where it comes from, and what it says
        *((str(file), load_yaml(file)) for file in files or ()),
        *((option, {field: value}) for field, (option, value) in given.items()),
        ("the command line", pair_values),
    ]
    keys = reference_defaults.reference_keys(layers)
    method = reference_defaults.method_said(layers, files or ()) if keys else None
    # Choices made outside a file of the reference, which outrank what it says in its own way.
    chosen = {
        "prompt.method": method,
        "data.name": pair_values.get("data.name", given.get("data.name", (None, None))[1]),
    }
    _known_spellings(chosen)
    chosen["prompt.method"] = chosen["prompt.method"] and plain(chosen["prompt.method"])
    merged: dict[str, Any] = {}  # by dotted name
    variant = None  # the method with what is added to it, where it was said last
    warnings: list[str] = []
    for where, values in layers:
        theirs = {key: value for key, value in values.items() if reference_config.is_reference_key(str(key))}
        ours = {key: value for key, value in values.items() if key not in theirs}
        # A section all of whose lines are commented out holds nothing.
        fields = dict(
            flatten({key: value for key, value in ours.items() if value is not None or key not in sections()})
        )
        if theirs:
            translation = reference_config.translate(theirs, where, chosen)
            warnings += translation.warnings
            fields = {**translation.fields, **fields}
        _known_spellings(fields)
        from_mapping(_nest(fields, where), where)  # a mistake is reported with the place where it was made
        if fields.get("model.name", merged.get("model.name")) != merged.get("model.name"):
            merged.pop("model.pretrained", None)  # those were the weights of another architecture
        merged.update(fields)
        if "prompt.method" in fields:
            variant = merged["prompt.method"]
            merged["prompt.method"] = plain(str(variant))
    if keys and method is None and not protocol:
        raise reference_defaults.ask_for_trainer(keys)
    _expand_home(merged)
    _name_data(merged)
    if str(merged.get("prompt.csc", "")).lower() == "true":
        merged.setdefault("prompt.ctx_init", "")  # contexts of single classes begin from random vectors
    if merged.get("prompt.attributes") and not protocol:  # of a table's rows only some have attributes
        merged.setdefault("prompt.ctx_init", "")  # as do those beside attributes
    warnings.extend(_context_length(merged))
    files_keys = reference_defaults.reference_keys(layers[: len(files or ())])
    if files_keys if protocol else keys:
        warnings += reference_defaults.fill_in(merged, experiment=not protocol)
    if files_keys and not protocol:
        warnings += reference_defaults.recipe_instead(merged, keys)
    if variant is not None:
        merged["prompt.method"] = variant
    config = from_mapping(_nest(merged, "the configuration"))
    if not protocol:
        refuse_idle(config)
        if "model.name" not in merged:
            config = with_embedded_clip(config, config.data.name)
    if config.optim.epochs == 0:
        from cocoop_fast.methods.records import METHODS  # needs torch

        if METHODS[config.prompt.method].epochs != 0:
            raise UserError(
                f"`optim.epochs` is 0, but {config.prompt.method} has to learn; --method zeroshot does not."
            )
    return Configuration(config, frozenset(merged), tuple(dict.fromkeys(warnings)))


def with_embedded_clip(config: RunConfig, data_name: str) -> RunConfig:
    """With the CLIP inside the package that was made for this data set, if one was."""
    name = embedded_clip(data_name) or config.model.name
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))


def _pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY VALUE`` or ``KEY=VALUE``; a value may hold any ``=``."""
    found: dict[str, Any] = {}
    rest = iter(pairs)
    for word in rest:
        key, equals, text = word.partition("=")
        if not equals:
            given = next(rest, None)
            if given is None:
                raise UserError(
                    f"The trailing arguments are KEY VALUE or KEY=VALUE pairs, and `{key}` has no value.{_a_place(key)}"
                )
            text = given
        found[key] = _value(text)
    return found


def _a_place(word: str) -> str:
    """What may be meant by the name of a file or folder that stands for itself."""
    return (
        f" {word} is here: images are given as --root {word}, a configuration as --config."
        if Path(word).exists()
        else ""
    )


def _value(text: str) -> Any:
    """Lists and null as YAML writes them; all else stays text, and the field's type decides what it means."""
    try:
        value = yaml_value(text) if text else text
    except ParseError:
        return text
    return value if isinstance(value, list) or (value is None and text) else text


def _nest(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in fields.items():
        *parents, name = path.split(".")
        level = nested
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise UserError(f"{where}: `{path}` is below `{parent}`, which has a value of its own.")
        level[name] = value
    return nested


def _known_spellings(fields: dict[str, Any]) -> None:
    """``CoCoOp`` is a method; ``ViT-B/16`` is OpenAI's own name of an open_clip architecture, and of its weights."""
    method = fields.get("prompt.method")
    if isinstance(method, str):
        fields["prompt.method"] = spelled(method, "the method", get_args(Method)) or method
    found = reference_config.open_clip_name(str(fields.get("model.name", "")))
    if found is not None:
        fields["model.name"] = found[0]
        fields.setdefault("model.pretrained", found[1])


def _expand_home(merged: dict[str, Any]) -> None:
    """``~`` in paths, as a shell does where it sees one: not after ``--root=``, nor in a file."""
    for field in (
        "data.root",
        "data.few_shot",
        "data.class_names",
        "model.name",
        "model.pretrained",
        "output_dir",
    ):
        if str(merged.get(field, "")).startswith("~"):
            merged[field] = os.path.expanduser(str(merged[field]))


def _name_data(merged: dict[str, Any]) -> None:
    """Images without a name are the user's own; the reference's names become ours."""
    from cocoop_fast.data.registry import canonical_name, name_for  # here, so that --help reads no data code

    if merged.get("data.root") is not None:  # the embedded images have no root
        merged.setdefault("data.name", name_for(Path(merged["data.root"])))
    if "data.name" in merged:
        merged["data.name"] = canonical_name(str(merged["data.name"]))


def _context_length(merged: dict[str, Any]) -> list[str]:
    """A length without words asks for random vectors; a length that the words contradict is not used."""
    if "prompt.n_ctx" not in merged:
        return []
    words = str(merged.setdefault("prompt.ctx_init", "")).split()
    if words and str(merged["prompt.n_ctx"]) != str(len(words)):
        return [
            f"n_ctx {merged['prompt.n_ctx']} is not used, because ctx_init '{' '.join(words)}' decides the length; "
            "give an empty ctx_init to begin from random vectors."
        ]
    return []
