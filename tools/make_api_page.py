"""docs/api.md: the public names, with the signatures and docstrings that the code has.

    python tools/make_api_page.py           # write the page
    python tools/make_api_page.py --check   # exit status 1 if it is not what the code says

What is public, and in which order it is read, is `CHAPTERS`. Everything else on the page comes from the code.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

PAGE = Path(__file__).parents[1] / "docs" / "api.md"

INTRODUCTION = """\
# API reference

Made by `python tools/make_api_page.py` from the docstrings; edit those. B images, K classes, M context vectors of width d,
E embedding, N nodes of the class tree. Names that are not here may change without notice.

Whatever a user can get wrong raises [`UserError`](#usererror) with one sentence, before anything is computed.
"""

CHAPTERS: dict[str, tuple[str, list[str]]] = {
    "Drop-ins and the engine": (
        "`from cocoop_fast import ...`",
        [
            "cocoop_fast.ClassTree",
            "cocoop_fast.CustomCLIP",
            "cocoop_fast.PromptLearner",
            "cocoop_fast.TextEncoder",
            "cocoop_fast.TreeTextEncoder",
            "cocoop_fast.UserError",
        ],
    ),
    "Methods": (
        "Each is a frozen CLIP with a learner; `build_model` makes one from a configuration.",
        [
            "cocoop_fast.methods.learner.Learner",
            "cocoop_fast.methods.learner.ContextLearner",
            "cocoop_fast.methods.base.PromptedCLIP",
            "cocoop_fast.methods.base.LearnedPromptCLIP",
            "cocoop_fast.methods.base.EngineOptions",
            "cocoop_fast.methods.CoOp",
            "cocoop_fast.methods.MetaNetsCLIP",
            "cocoop_fast.methods.ZeroShot",
            "cocoop_fast.methods.LinearProbe",
            "cocoop_fast.methods.build_model",
            "cocoop_fast.methods.cocoop.MetaNet",
            "cocoop_fast.methods.cocoop.reference_cfg",
        ],
    ),
    "Prompts of any layout": (
        "Where in a prompt the context, the class name and words stand.",
        [
            "cocoop_fast.prompts.layout.Context",
            "cocoop_fast.prompts.layout.ClassName",
            "cocoop_fast.prompts.layout.PromptLayout",
            "cocoop_fast.prompts.layout.layout_at",
            "cocoop_fast.prompts.layout.layout_of_segments",
        ],
    ),
    "CLIP models": (
        "From a name, a file or a hub to a frozen model.",
        [
            "cocoop_fast.clip.load.load_clip",
            "cocoop_fast.clip.load.LoadedClip",
            "cocoop_fast.clip.weights.create_clip",
            "cocoop_fast.clip.demo.load_demo_clip",
            "cocoop_fast.clip.frozen.FrozenCLIP",
        ],
    ),
    "Memory and pruning": (
        "`memory_budget` and `prune_mass` of the models; these are what they are made of.",
        [
            "cocoop_fast.engine.pieces.parse_bytes",
            "cocoop_fast.engine.pieces.MemoryBudget",
            "cocoop_fast.engine.pruning.Pruned",
            "cocoop_fast.engine.pruning.classes_to_keep",
            "cocoop_fast.engine.pruning.pruned_cross_entropy",
            "cocoop_fast.ops.table.select_backend",
        ],
    ),
    "Runs": (
        "What `cocoop-fast train`, `eval` and `predict` call. Fields are explained in [configuration](configuration.md).",
        [
            "cocoop_fast.config.RunConfig",
            "cocoop_fast.config.ModelConfig",
            "cocoop_fast.config.PromptConfig",
            "cocoop_fast.config.DataConfig",
            "cocoop_fast.config.AugmentConfig",
            "cocoop_fast.config.OptimConfig",
            "cocoop_fast.config.from_mapping",
            "cocoop_fast.config.load_yaml",
            "cocoop_fast.experiments.experiment.run",
            "cocoop_fast.experiments.experiment.evaluate_run",
            "cocoop_fast.experiments.experiment.evaluate_reference",
            "cocoop_fast.experiments.experiment.Results",
            "cocoop_fast.experiments.experiment.Row",
            "cocoop_fast.training.observer.Observer",
            "cocoop_fast.experiments.predict.Predictor",
            "cocoop_fast.evaluation.metrics.Metrics",
            "cocoop_fast.evaluation.metrics.harmonic_mean",
            "cocoop_fast.evaluation.evaluate.evaluate",
            "cocoop_fast.evaluation.evaluate.encode_test_images",
        ],
    ),
    "Data": (
        "What `cocoop-fast datasets` calls.",
        [
            "cocoop_fast.data.load_dataset",
            "cocoop_fast.data.Dataset",
            "cocoop_fast.data.Sample",
            "cocoop_fast.data.few_shot.sample_shots",
            "cocoop_fast.data.few_shot.select_classes",
            "cocoop_fast.data.few_shot_files.read_few_shot",
            "cocoop_fast.data.few_shot_files.write_few_shot",
        ],
    ),
    "The paper's experiments": (
        "What `cocoop-fast run` and `sweep` call.",
        [
            "cocoop_fast.protocols.protocol.find_protocol",
            "cocoop_fast.protocols.cells.Experiment",
            "cocoop_fast.protocols.cells.Cell",
            "cocoop_fast.protocols.cells.make_cells",
            "cocoop_fast.protocols.run_cell.run_cells",
            "cocoop_fast.protocols.table.make_table",
        ],
    ),
    "Several devices": (
        "What `torchrun ... -m cocoop_fast train` adds.",
        [
            "cocoop_fast.distributed.launch.join",
            "cocoop_fast.distributed.ranks.Ranks",
        ],
    ),
    "Reports and the reference's files": (
        "What `cocoop-fast report` and `checkpoint` call. `integrations.dassl` is on [the migration page](migration.md).",
        [
            "cocoop_fast.report.make_report.make_report",
            "cocoop_fast.experiments.reference_import.import_checkpoint",
            "cocoop_fast.experiments.reference_import.export_checkpoint",
        ],
    ),
    "Planning, measuring, certifying": (
        "What `cocoop-fast plan`, `bench` and `verify` call.",
        [
            "cocoop_fast.measure.architecture.describe_model",
            "cocoop_fast.measure.devices.find_gpu",
            "cocoop_fast.measure.predict.Setting",
            "cocoop_fast.measure.predict.Schedule",
            "cocoop_fast.measure.predict.predict_tree",
            "cocoop_fast.measure.predict.predict_dense",
            "cocoop_fast.measure.predict.Prediction",
            "cocoop_fast.measure.problem.ProblemSpec",
            "cocoop_fast.measure.problem.build_problem",
            "cocoop_fast.measure.contestants.choose",
            "cocoop_fast.measure.compare.compare",
            "cocoop_fast.measure.peak_memory.peak_memory",
            "cocoop_fast.measure.verify.verify",
            "cocoop_fast.measure.verify.Verdict",
        ],
    ),
    "The oracle": (
        "Dense, slow and obvious: what everything above is tested against.",
        [
            "cocoop_fast.reference.DensePromptedCLIP",
            "cocoop_fast.reference.DenseLearner",
            "cocoop_fast.reference.encode_prompts",
        ],
    ),
}

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises)( \(.*\))?:$")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
_WIDTH = 100  # of a signature on one line


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if the page is not up to date"
    )
    made = page()
    if not parser.parse_args().check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print(
            "docs/api.md is not what the docstrings say: run python tools/make_api_page.py", file=sys.stderr
        )
        return 1
    return 0


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_contents(), *(line for title in CHAPTERS for line in _chapter(title))])


def _contents() -> Iterator[str]:
    for title, (_, names) in CHAPTERS.items():
        links = ", ".join(f"[`{_short(name)}`](#{_anchor(_short(name))})" for name in names)
        yield f"- [{title}](#{_anchor(title)}): {links}"
    yield ""


def _chapter(title: str) -> Iterator[str]:
    introduction, names = CHAPTERS[title]
    yield from (f"## {title}", "", introduction, "")
    for name in names:
        yield from _entry(name)


def _entry(name: str) -> Iterator[str]:
    home, _, short = name.rpartition(".")
    thing = getattr(importlib.import_module(home), short)
    yield from (
        f"### {short}",
        "",
        "```py",
        f"from {home} import {short}",
        "",
        _signature(short, thing),
        "```",
        "",
    )
    yield from _markdown(thing)
    if (is_dataclass(thing) or typing.is_typeddict(thing)) and "Args:" not in (thing.__doc__ or ""):
        yield from _fields(thing)
    if inspect.isclass(thing):
        for method, function in _methods(thing):
            yield from (f"#### `{_signature(f'{short}.{method}', function)}`", "", *_markdown(function))


def _fields(thing: Any) -> Iterator[str]:
    """What the descriptions of its fields or the comments beside them say, where the docstring does not."""
    described = getattr(thing, "__pydantic_fields__", {}).items()
    said = [(name, field.description) for name, field in described if field.description]
    said += re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(thing), re.MULTILINE)
    if said:
        yield from ("**Fields**", "", *(f"- `{name}`: {comment}" for name, comment in said), "")


def _methods(thing: type) -> Iterator[tuple[str, Any]]:
    """Documented public methods and properties that a class itself defines, as they stand in the file."""
    for name, member in vars(thing).items():
        member = getattr(member, "__func__", member)  # of a class method
        of_interest = inspect.isfunction(member) or isinstance(member, property)
        if of_interest and member.__doc__ and not name.startswith("_"):
            yield name, member


def _signature(name: str, thing: Any) -> str:
    """As one would write it: annotations as in the source, and defaults where they are plain values."""
    if isinstance(thing, property):
        return f"{name} -> {_annotation(inspect.signature(thing.fget).return_annotation)}"  # type: ignore[arg-type]
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return name
    if typing.is_typeddict(thing):
        return "\n".join(
            [f"{name}:", *(f"    {key}: {_annotation(kind)}" for key, kind in thing.__annotations__.items())]
        )
    if inspect.isclass(thing) and thing.__init__ is nn.Module.__init__:
        return f"{name}()"
    signature = inspect.signature(thing)
    parameters = [one for one in signature.parameters.values() if one.name not in ("self", "cls")]
    words = list(_parameters(parameters))
    returned = ""
    if not inspect.isclass(thing) and signature.return_annotation is not inspect.Signature.empty:
        returned = f" -> {_annotation(signature.return_annotation)}"
    line = f"{name}({', '.join(words)}){returned}"
    if len(line) <= _WIDTH or "." in name:
        return line
    return "\n".join([f"{name}(", *(f"    {word}," for word in words), f"){returned}"])


def _parameters(parameters: list[inspect.Parameter]) -> Iterator[str]:
    keyword_only = False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        stars = "*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else ""
        text = stars + one.name
        if one.annotation is not one.empty:
            text += f": {_annotation(one.annotation)}"
        yield text + ("" if one.default is one.empty else f" = {_default(one.default)}")


def _annotation(annotation: Any) -> str:
    annotation = getattr(annotation, "__forward_arg__", annotation)
    if isinstance(annotation, str):
        return " ".join(annotation.split()).strip("'\"")
    return getattr(annotation, "__name__", str(annotation)) if annotation is not None else "None"


def _default(value: Any) -> str:
    """Plain values only: others are long, or name a place on this machine."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    plain |= isinstance(value, tuple) and all(isinstance(one, (int, float, str)) for one in value)
    return repr(value) if plain else "..."


def _markdown(thing: Any) -> Iterator[str]:
    """A docstring: text as it stands, sections as lists."""
    lines = inspect.cleandoc(thing.__doc__ or "").splitlines()
    section = ""
    for line in lines:
        found = _SECTION.match(line)
        if found:
            section = found[1]
            yield from (f"**{section}**{found[2] or ''}", "")
        elif not line.startswith("    ") and line:
            section = ""
            yield _text(line)
        elif section and section != "Returns" and re.match(r"    [\w*][\w*., ]*: ", line):
            names, _, text = line.strip().partition(": ")
            yield f"- `{names}`: {_text(text)}"
        else:
            yield _text(line[4:] if section in ("Returns", "Yields") else line[2:] if section else line)
    yield ""


def _text(line: str) -> str:
    """Sphinx's roles and double backticks, in Markdown."""
    return _ROLE.sub(lambda role: _link(role[1]), line).replace("``", "`")


def _link(target: str) -> str:
    short = _short(target)
    known = {_short(name) for _, names in CHAPTERS.values() for name in names}
    return f"[`{short}`](#{_anchor(short)})" if short in known else f"`{target}`"


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
