"""From a function to a command: its signature and docstring say which options it has, and what its help says.

::

    @command(fields="model.name optim.lr")
    def evaluate(run_dir: Path, *, subset: Subset | None = None, batch_size: Positive = 1, given: Given) -> None:
        '''What the command does.

        Args:
            run_dir: A positional parameter is an argument.
            subset: A keyword is an option, ``--subset``; of a ``Literal`` with its choices.

        Examples:
            What one may want: the call that does it
        '''

``given`` stands for the options of fields of :class:`cocoop_fast.config.RunConfig`, which have their type, choices,
default and description from there. What is the same in several commands is in the tables below.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from cocoop_fast.cli.reference_config import is_reference_key, open_clip_name
from cocoop_fast.config import Method, RunConfig, field_names
from cocoop_fast.errors import UserError
from cocoop_fast.spelling import choice
from cocoop_fast.variants import plain, spelled

if TYPE_CHECKING:
    from cocoop_fast.measure.problem import ProblemSpec

METHODS: tuple[str, ...] = get_args(Method)
PAPER_METHODS: tuple[Method, ...] = ("zeroshot", "coop", "cocoop")  # of its tables

Given = Mapping[str, tuple[str, Any]]  # by field: the option that was given, and its value

# -- what is the same in every command ---------------------------------------------------------------------------

OPTION_OF_FIELD = {"model.name": "model", "data.name": "dataset"}  # others: the last part of the field's name
LETTERS = {
    "batch_size": "-b", "config": "-c", "dataset": "-d", "jobs": "-j", "top_k": "-k", "method": "-m", "output": "-o",
    "output_dir": "-o", "quiet": "-q", "run": "-r", "workers": "-w",
}  # fmt: skip
METAVARS = {
    "attributes": "WORD ...", "budget": "SIZE", "class_names": "FILE", "classes": "NAMES|FILE", "compare": "[METHOD,...]",
    "config": "FILE",
    "dataset": "NAME", "datasets": "NAME ...", "device": "DEVICE", "devices": "DEVICE ...", "images": "IMAGE",
    "memory_budget": "SIZE", "methods": "METHOD ...", "model": "NAME", "onnx": "FILE", "pairs": "KEY=VALUE", "plot": "FILE",
    "pretrained": "TAG|FILE", "resources": "NAME=VALUE ...", "runs": "RUN", "seeds": "N ...", "shot_counts": "N ...",
    "source": "NAME", "track": "NAME", "trainer": "NAME",
}  # fmt: skip
OF_TYPE: dict[Any, str] = {
    bool: "",
    float: "NUMBER",
    int: "N",
    Path: "PATH",
    str: "TEXT",
}  # where no name has its own
WIDEST = 20  # characters that choices may have to stand beside their option in 80 columns
# Options that take several values, `--seeds 1 2 3`, and what they are without one.
LISTS = {
    "--attributes": "published",
    "--compare": "all",
    "--datasets": "",
    "--devices": "all",
    "--methods": "",
    "--resources": "",
    "--seeds": "",
    "--shot-counts": "",
}
PANELS = {  # of the help; all others are in the first one
    "Recipe": "optim.epochs optim.batch_size optim.lr optim.consistency optim.average optim.prune_mass reference_compat",
    "Machine": "precision backend memory_budget device devices jobs launcher resources shard workers threads "
    "skip_bad_images cache_views on_nonfinite",
    "Output": "output_dir output overwrite redo_changed checkpoint_steps tensorboard track plot json quiet",
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
HELP = {
    "batch_size": "Images a step.",
    "classes": "Names separated by commas, or a file with one a line; may be repeated. Default: ImageNet's.",
    "config": "YAML file, ours or the reference's; may be repeated, later ones win.",
    "ctx_init": "Words that the context begins as; they fix its length.",
    "device": "auto, cpu, cuda or cuda:N.",
    "json": "Print one line of JSON on stdout, and nothing else.",
    "name": "A name that `cocoop-fast datasets` lists, or the reference's.",
    "pairs": "Any other field, e.g. optim.momentum 0.8, or a key of the reference, e.g. OPTIM.MOMENTUM 0.8.",
    "pretrained": "open_clip tag of the weights, a local file, or random.",
    "quiet": "No progress; only the result.",
    "root": "Directory of all published data sets; of your own, their folder or list.",
    "run_dir": "What `cocoop-fast train` wrote.",
    "threads": "Threads of torch and the engine. Default: torch's choice.",
}


def must_be(what: str, holds: Callable[[Any], bool]) -> Callable[..., Any]:
    """A check of an option's value, or values, for ``Annotated``: an error says that it must be ``what``."""

    def check(parameter: typer.CallbackParam, given: Any) -> Any:
        for value in given if isinstance(given, (list, tuple)) else [given]:
            if value is not None and not holds(value):
                raise UserError(f"{parameter.opts[0]} is {value!r}, but it must be {what}.")
        return given

    return check


def _some_words(parameter: typer.CallbackParam, given: str) -> str:
    if not given.split():
        raise UserError(
            f"{parameter.opts[0]} is empty; give the words that the context begins as, say 'X X X X'."
        )
    return given


Positive = Annotated[int, must_be("positive", lambda value: value > 0)]
AtLeastOne = Annotated[int, must_be("at least 1", lambda value: value >= 1)]
NotNegative = Annotated[int, must_be("at least 0", lambda value: value >= 0)]
Seconds = Annotated[float, must_be("positive", lambda value: value > 0)]
Words = Annotated[str, _some_words]

# -- from functions to commands ----------------------------------------------------------------------------------


def command(fields: str = "", about: str = "") -> Callable[[Callable[..., None]], Any]:
    """Make a function what typer takes as a command, with its help and ``epilog``.

    Args:
        fields: dotted names of the configuration's fields, separated by spaces. Their options take the place of the
            parameter ``given``, in which the function gets those that a user gave.
        about: a docstring in place of the function's own, of which only the descriptions of arguments are used.
    """

    def decorate(function: Callable[..., None]) -> Any:
        text, described, epilog = _parts(getattr(function, "func", function).__doc__ or "")
        if about:
            text, _, epilog = _parts(about)
        of_fields = {field: _of_field(field) for field in fields.split()}
        own = inspect.signature(function, eval_str=True).parameters
        parameters: list[inspect.Parameter] = []
        for one in own.values():
            parameters += of_fields.values() if one.name == "given" else [_own(one, {**HELP, **described})]

        @functools.wraps(function)
        def call(**values: Any) -> None:
            if "given" in own:
                said = {field: values.pop(parameter.name) for field, parameter in of_fields.items()}
                values["given"] = {
                    field: (option_of(field), value) for field, value in said.items() if value is not None
                }
            function(**values)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__doc__ = text
        call.epilog = epilog  # type: ignore[attr-defined]
        return call

    return decorate


def group(about: str, **settings: Any) -> typer.Typer:
    """A command that holds others. ``about`` is its help, written as a docstring; ``settings`` are typer's."""
    text, _, epilog = _parts(about)
    shown: dict[str, Any] = {
        "help": text,
        "epilog": epilog,
        "rich_markup_mode": "rich",
        "add_completion": False,
    }
    return typer.Typer(**{**shown, **settings}, context_settings={"help_option_names": ["-h", "--help"]})


def option_of(field: str) -> str:
    """The option of a field, e.g. ``--lr`` of ``optim.lr``."""
    return _flag(OPTION_OF_FIELD.get(field, field.rpartition(".")[2]))


def _flag(name: str) -> str:
    return "--" + name.rstrip("_").replace("_", "-")


def _parts(docstring: str) -> tuple[str, dict[str, str], str | None]:
    """A docstring's text, what it says of each argument, and its examples with the mark-up of typer's help."""
    text, _, examples = inspect.cleandoc(docstring).partition("\n\nExamples:\n")
    text, _, arguments = text.partition("\n\nArgs:\n")
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)  # the help breaks lines where the terminal ends
    entry = re.compile(r"^ {4}(\S.*?): (.*(?:\n {5,}.*)*)", re.MULTILINE)
    described = {name: " ".join(words.split()) for name, words in entry.findall(arguments)}
    lines = [
        f"{what}: [cyan]cocoop-fast {' '.join(call.split())}[/cyan]" for what, call in entry.findall(examples)
    ]
    return text, described, "\n\n".join(["[bold]Examples[/bold]", *lines]) if lines else None


_types_of = functools.cache(get_type_hints)  # evaluated once for all fields: --help is to answer at once


def describe(field: str) -> tuple[str, Any, Any]:
    """Description, type and default of a field of the configuration."""
    section, _, leaf = field.rpartition(".")
    owner: Any = _types_of(RunConfig)[section] if section else RunConfig
    described = owner.__pydantic_fields__[leaf]
    return described.description or "", _types_of(owner)[leaf], described.default


def _of_field(field: str) -> inspect.Parameter:
    text, kind, default = describe(field)
    name = OPTION_OF_FIELD.get(field, field.rpartition(".")[2])
    return _option(name, kind, None, _with_default(text, default), field)


def _own(parameter: inspect.Parameter, described: Mapping[str, str]) -> inspect.Parameter:
    """The argument or option that a parameter of a function becomes."""
    name, kind, default = parameter.name, parameter.annotation, parameter.default
    if kind is typer.Context:
        return parameter.replace(kind=parameter.KEYWORD_ONLY)
    text = described.get(name, "")  # nothing if Python was told to forget docstrings
    if parameter.kind is parameter.KEYWORD_ONLY:
        return _option(name, kind, default, _with_default(text, default))
    made = typer.Argument(metavar=METAVARS.get(name, name.upper()), help=text, show_default=False)
    return parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=Annotated[kind, made])


def _option(name: str, kind: Any, default: Any, text: str, field: str = "") -> inspect.Parameter:
    check = None
    if get_origin(kind) in (Union, UnionType):  # T | None
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        kind, check = get_args(kind)
    if get_origin(kind) is tuple:
        kind = str  # of words, see LISTS
    one = get_args(kind)[0] if get_origin(kind) is list else kind
    metavar = OF_TYPE[one] if one in (bool, float, int) else METAVARS.get(name, OF_TYPE.get(one))
    if get_origin(one) is Literal:
        choices = get_args(one)
        kind, metavar = list[str] if one is not kind else str, "|".join(choices)
        if len(metavar) > WIDEST:
            metavar, text = "NAME", f"{text} One of {', '.join(choices)}."
        if not field:  # whose values are checked when all layers of the configuration are merged
            check = must_be(f"one of {', '.join(choices)}", choices.__contains__)
    made = typer.Option(
        *filter(None, [_flag(name), LETTERS.get(name.rstrip("_"))]),
        help=text,
        metavar=metavar,
        callback=check,
        rich_help_panel=PANEL_OF.get(field) or PANEL_OF.get(name.rstrip("_")),
        show_default=False,
    )
    if default is None:
        kind = kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
    )


def _with_default(text: str, default: Any) -> str:
    if default in (None, ()) or isinstance(default, bool):
        return text
    return f"{text} Default: {default:g}." if isinstance(default, float) else f"{text} Default: {default}."


# -- options that take several values ----------------------------------------------------------------------------


def join_lists(arguments: Sequence[str]) -> list[str]:
    """``--seeds 1 2 3`` as the parser knows it, ``--seeds 1,2,3``.

    A list ends at the next option, and at the first key of trailing ``KEY VALUE`` or ``KEY=VALUE`` pairs.
    """
    fields = field_names()
    joined: list[str] = []
    values: list[str] | None = None  # of the list that is being read

    def end_list() -> None:
        if values is not None and (text := ",".join(values) or LISTS[joined[-1]]):
            joined.append(text)

    for argument in arguments:
        key = argument.partition("=")[0]
        is_key = key in fields or is_reference_key(key)
        if values is not None and not argument.startswith("-") and not is_key:
            values.append(argument)
            continue
        end_list()
        values = [] if argument in LISTS else None
        joined.append(argument)
    end_list()
    return joined


def list_of(text: str, option: str) -> list[str]:
    """The values of such an option, each once.

    Raises:
        UserError: an empty one.
    """
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise UserError(f"{option} has an empty name; separate names by spaces or single commas.")
    return list(dict.fromkeys(names))


def refuse_file(output_dir: Path) -> None:
    """Raises a UserError if the directory that ``--output-dir`` names is a file."""
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; name a directory.")


def methods_of(text: str, option: str) -> tuple[str, ...]:
    """The methods and variants of methods that it names, in any spelling.

    Raises:
        UserError: one that does not exist.
    """
    found = []
    for name in list_of(text, option):
        method = spelled(name, option, METHODS)
        if method is None:
            choices = choice(plain(name), METHODS, "The methods are")
            raise UserError(f"{option}: there is no method {name!r}; {choices}.")
        found.append(method)
    return tuple(dict.fromkeys(found))


def class_names(texts: list[str] | None, k: int | None, otherwise: int) -> tuple[str, ...]:
    """The names that ``--classes`` and ``--k`` ask for; of ImageNet, ``otherwise`` of them if nothing is said.

    Raises:
        UserError: no such list, or too few names.
    """
    from cocoop_fast.measure.problem import imagenet_names

    names = class_list(texts)
    if names is None:
        return imagenet_names(otherwise if k is None else k)
    if k is not None and k > len(names):
        raise UserError(f"--k is {k}, but --classes gives {len(names)} class names.")
    return tuple(names[:k])


def class_list(texts: list[str] | None) -> list[str] | None:
    """The names that ``--classes`` gives, in every command: a file's lines, or separated by commas.

    Args:
        texts: of each ``--classes``; ``None`` or none: not given.

    Raises:
        UserError: a file that cannot be read, an empty name, one name given twice, or one name alone.
    """
    if not texts:
        return None
    names: list[str] = []
    for text in texts:
        path = os.path.expanduser(text.removeprefix("@"))
        if text.startswith("@") or os.path.isfile(path):
            from cocoop_fast.data.listing import text_lines

            names += text_lines(Path(path))
        else:
            names += text.split(",")
    names = [" ".join(name.split()) for name in names]
    if "" in names:
        raise UserError(
            "--classes has an empty class name; separate names by single commas, as in 'cat,dog'."
        )
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"--classes names {name!r} twice.")
        seen.add(name)
    if len(names) == 1:
        no_file = "" if names[0] not in map(str.strip, texts) else ", and there is no file of that name"
        raise UserError(
            f"--classes gives one class, {names[0]!r}{no_file}; give two classes or more, or a file with one a line."
        )
    return names


def problem_spec(
    names: tuple[str, ...],
    batch: int,
    model: str | None,
    pretrained: str | None,
    ctx_init: str = "a photo of a",
    attributes: tuple[str, ...] = (),
) -> ProblemSpec:
    """The problem that the options of ``bench`` and ``verify`` ask for.

    Raises:
        UserError: weights without their model.
    """
    from cocoop_fast.measure.problem import ProblemSpec

    if pretrained is not None and model is None:
        raise UserError("--pretrained needs the --model that it belongs to.")
    spelled = open_clip_name(model or "")
    if spelled is not None:
        model, pretrained = spelled[0], pretrained or spelled[1]
    return ProblemSpec(
        classes=names,
        batch=batch,
        model=model,
        pretrained=pretrained,
        ctx_init=ctx_init,
        attributes=attributes,
    )
