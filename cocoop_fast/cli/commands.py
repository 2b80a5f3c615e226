"""Which commands there are; a command's own file is read when the command is used, so that ``--help`` answers at once."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

# Where each is, and the first sentence of its help.
COMMANDS = {
    "train": (
        "train.command",
        "Learn prompts, and evaluate them on the classes seen and not seen in training.",
    ),
    "eval": (
        "evaluate.command",
        "Evaluate a finished run again, on the same or on other classes; or what the reference has learned.",
    ),
    "predict": (
        "predict.command",
        "Name what images show, with probabilities: by what a run has learned, or by zero-shot CLIP.",
    ),
    "run": (
        "run_protocol.command",
        "Run one of the paper's experiments: every method on every data set with every seed, then the table.",
    ),
    "sweep": (
        "run_protocol.sweep",
        "Run the same cells as `run`, several at a time: the same as `run --devices all`.",
    ),
    "bench": (
        "bench.command",
        "Time a CoCoOp training step on this machine, against what others would write.",
    ),
    "report": (
        "report.command",
        "Make a page about runs: one HTML file that needs no other, and its plots as SVG and PNG beside it.",
    ),
    "export": (
        "export.command",
        "Write what a run has learned as one ONNX file, to be used without this package, and compare it with torch.",
    ),
    "plan": (
        "plan.command",
        "Predict what training and evaluation will take: time, memory, and the largest batch that fits.",
    ),
    "verify": (
        "verify.command",
        "Certify that the fast engine computes what the dense reference does, on this model, classes and device.",
    ),
    "datasets": (
        "datasets.app",
        "List the data sets that are known, where they are looked for, and what is missing there.",
    ),
    "checkpoint": (
        "checkpoint.app",
        "Import and export what the reference implementation calls prompt_learner/model.pth.tar-N; share what was "
        "learned.",
    ),
}


class Commands(typer.core.TyperGroup):
    """The commands of the table, each made when it is asked for."""

    def __init__(self, *, commands: Any = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Made()  # type: ignore[assignment]  # nothing adds to it
        self._listed = False

    def get_params(self, ctx: Any) -> Any:
        return _without_types(super().get_params, ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)  # typer's own goes through the commands, which would make them

    def get_command(self, ctx: Any, name: str) -> Any:
        if self._listed and name in COMMANDS:  # for a line of the help
            return typer.core.TyperCommand(name, help=COMMANDS[name][1], rich_markup_mode="rich")
        return super().get_command(ctx, name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listed = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listed = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in COMMANDS:
            from cocoop_fast.cli.options import join_lists  # here, so that --help reads no configuration

            args = join_lists(args)
        return super().parse_args(ctx, args)


def _without_types(parameters_of: Callable[[Any], list[Any]], ctx: Any) -> list[Any]:
    """Of flags and arguments the help would say which type Python has for them, ``<list[str]>``; what they are is said in words."""
    parameters = parameters_of(ctx)
    for one in parameters:
        one.display_type = lambda ctx: ""
    return parameters


class _Made(Mapping[str, Any]):
    """The commands by name; one is made when it is looked up."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, _, attribute = COMMANDS[name][0].partition(".")
            one = getattr(importlib.import_module(f"cocoop_fast.cli.{module}"), attribute)
            if not isinstance(one, typer.Typer):  # a function that `options.command` has made a command of
                function, one = one, typer.Typer(add_completion=False, rich_markup_mode="rich")
                one.command(name, epilog=function.epilog)(function)
            command = self._made[name] = typer.main.get_command(one)
            command.name = name
            for each in (command, *getattr(command, "commands", {}).values()):
                each.get_params = functools.partial(_without_types, each.get_params)  # type: ignore[method-assign]
        return self._made[name]
