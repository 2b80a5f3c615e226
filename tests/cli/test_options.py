"""From signatures and docstrings to commands: what is an argument, an option, a choice, a check, a help text."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from cocoop_fast import cli
from cocoop_fast.cli import configuration, options
from cocoop_fast.cli.commands import COMMANDS
from cocoop_fast.cli.options import Given, Positive, join_lists
from cocoop_fast.config import Subset
from cocoop_fast.errors import UserError


@pytest.fixture
def seen() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(seen):
    """Runs a command of every kind of parameter, which notes what it was called with."""

    @options.command(fields="optim.lr model.name data.name prompt.csc")
    def command(
        file: Path,
        pairs: list[str] | None = None,
        *,
        subset: Subset | None = None,
        only: list[Subset] | None = None,
        given: Given,
        batch_size: Positive = 3,
        from_: Path | None = None,
        json: bool = False,
    ) -> None:
        """What it does.

        In more words.

        Args:
            file: A file
                of two lines.
            subset: Which classes.
            only: Each of them.
            from_: Begin there.

        Examples:
            Once: x a.txt
            Twice, in a long line: x a.txt
                --batch-size 2
        """
        seen.update(locals())

    app = typer.Typer(rich_markup_mode="rich")
    app.command("x", epilog=command.epilog)(command)
    return lambda *arguments: app(args=arguments, standalone_mode=False)


def test_arguments_and_options_reach_the_function(run, seen):
    run(*shlex.split("a.txt seed 1 --subset new -b 2 --from b --only new --only base --json"))
    assert seen == {
        "seen": seen,
        "file": Path("a.txt"),
        "pairs": ["seed", "1"],
        "subset": "new",
        "only": ["new", "base"],
        "given": {},
        "batch_size": 2,
        "from_": Path("b"),
        "json": True,
    }


def test_what_is_not_said_has_its_default(run, seen):
    run("a.txt")
    assert seen["pairs"] is seen["subset"] is seen["only"] is None
    assert (seen["batch_size"], seen["json"]) == (3, False)


def test_options_of_fields_are_given_by_field(run, seen):
    run("a.txt", "--lr", "0.5", "--model", "demo", "-d", "digits", "--csc")
    assert seen["given"] == {
        "optim.lr": ("--lr", 0.5),
        "model.name": ("--model", "demo"),
        "data.name": ("--dataset", "digits"),
        "prompt.csc": ("--csc", True),
    }
    config = configuration.build(options=seen["given"]).config
    assert (config.optim.lr, config.prompt.csc) == (0.5, True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--subset", "old"], "--subset is 'old', but it must be one of base, new, all."),
        (["--only", "base", "--only", "old"], "--only is 'old', but it must be one of base, new, all."),
        (["--batch-size", "0"], "--batch-size is 0, but it must be positive."),
    ],
)
def test_values_are_checked(run, arguments, sentence):
    with pytest.raises(UserError) as caught:
        run("a.txt", *arguments)
    assert str(caught.value) == sentence


def test_the_help_says_what_signature_docstring_and_field_say(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    run("--help")
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "FILE <path> A file of two lines. [required]",
        "KEY=VALUE <list[str]> Any other field",
        "What it does. In more words.",
        "--subset base|new|all Which classes.",
        "--batch-size -b N Images a step. Default: 3.",
        "--lr NUMBER Learning rate. Default: 0.002.",
        "--dataset -d NAME One of `cocoop-fast datasets`",
        "Examples Once: cocoop-fast x a.txt Twice, in a long line: cocoop-fast x a.txt --batch-size 2",
    ):
        assert words in out
    assert "Args" not in out


def _commands(of: Any) -> Iterator[Any]:
    for command in getattr(of, "commands", {}).values():
        yield command
        yield from _commands(command)


def test_the_list_of_commands_says_what_they_say():
    for name, command in typer.main.get_command(cli.app).commands.items():
        sentence = COMMANDS[name][1]
        assert command.help.startswith(sentence), name


def test_the_help_reads_no_configuration():
    """Which is most of what it would cost."""
    tried = "import sys; from cocoop_fast import cli; cli.run(['--help']); print('pydantic' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True, check=True).stdout
    assert out.endswith("False False\n")


def test_every_option_of_every_command_has_a_help_text():
    for command in _commands(typer.main.get_command(cli.app)):
        assert command.help, command.name
        for parameter in command.params:
            assert parameter.help and parameter.help.endswith("."), f"{command.name} {parameter.name}"


def test_every_field_has_a_description():
    """Which is the help of its option, and its entry in the documentation of the API."""
    for field in configuration.field_names():
        assert options.describe(field)[0], field


def test_sweep_is_run_but_for_its_devices():
    run, sweep = (typer.main.get_command(cli.app).commands[name] for name in ("run", "sweep"))
    by_name = [{one.name: one for one in command.params} for command in (run, sweep)]
    assert set(by_name[0]) - set(by_name[1]) == {"device"}
    for name, one in by_name[1].items():
        assert one.default == (by_name[0][name].default if name != "devices" else "all"), name


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("run base2new --seeds 1 2 3", "run base2new --seeds 1,2,3"),
        ("run base2new --seeds 1,2 3 -q", "run base2new --seeds 1,2,3 -q"),
        ("run base2new --datasets a b --methods coop", "run base2new --datasets a,b --methods coop"),
        ("run base2new --seeds 1 2 optim.epochs 5", "run base2new --seeds 1,2 optim.epochs 5"),
        ("run base2new --seeds 1 2 OPTIM.MAX_EPOCH 5", "run base2new --seeds 1,2 OPTIM.MAX_EPOCH 5"),
        ("run base2new --datasets digits print_freq 5", "run base2new --datasets digits print_freq 5"),
        ("sweep base2new --devices cuda:0 cuda:1 -q", "sweep base2new --devices cuda:0,cuda:1 -q"),
        ("run base2new --devices -q", "run base2new --devices all -q"),
        ("run base2new --datasets mine=a.b/c other=d", "run base2new --datasets mine=a.b/c,other=d"),
        ("run base2new --seeds", "run base2new --seeds"),
        ("train --seed 1", "train --seed 1"),
        ("train --compare", "train --compare all"),
        ("train --compare --seed 2", "train --compare all --seed 2"),
        ("train --compare optim.lr 1", "train --compare all optim.lr 1"),
        ("train --compare seed 1", "train --compare all seed 1"),
        ("train --compare coop", "train --compare coop"),
        ("train --compare coop zeroshot -q", "train --compare coop,zeroshot -q"),
        ("train --compare=coop", "train --compare=coop"),
    ],
)
def test_lists(given, parsed):
    assert join_lists(given.split()) == parsed.split()
