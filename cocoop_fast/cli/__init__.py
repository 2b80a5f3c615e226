"""The command ``cocoop-fast``: one small file a command.

``commands`` lists them, ``options`` makes commands of functions, ``configuration`` merges files and options, ``output`` prints, ``failures``
turns exceptions into sentences.
May import everything; nothing imports it. Nothing heavy is imported before a command needs it, so that
``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import cocoop_fast
from cocoop_fast.cli import failures, output
from cocoop_fast.cli.commands import Commands
from cocoop_fast.errors import UserError

_SILENT = logging.NullHandler()  # without a handler, logging prints warnings as they are
SEVERAL_PROCESSES = ("train", "eval")  # the commands that torchrun may start

app = typer.Typer(
    cls=Commands,
    name="cocoop-fast",
    help="Prompt learning for CLIP (CoCoOp, CoOp, zero-shot), with every distinct row computed once.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted. `cocoop-fast COMMAND --help` has examples.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"cocoop-fast {cocoop_fast.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(failures.WRONG_USAGE)
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand not in SEVERAL_PROCESSES:
        raise UserError(
            f"torchrun can share out {' and '.join(SEVERAL_PROCESSES)}; run {context.invoked_subcommand} without it."
        )


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: what follows the program's name.

    Returns:
        The exit status. Every failure has been told as one line on stderr.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warnings_once()  # type: ignore[assignment]  # it has no use for the place
            _silence_libraries()
            status = app(args=list(arguments), prog_name="cocoop-fast", standalone_mode=False)
        sys.stdout.flush()
        if status == failures.INTERRUPTED:  # the parser's way of reporting control-C
            raise KeyboardInterrupt
        return status if isinstance(status, int) else failures.DONE
    except SystemExit as stopped:  # by SIGTERM, with a checkpoint
        return stopped.code if isinstance(stopped.code, int) else failures.DONE
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain once more when it closes stdout.
        _discard_stdout()
        return failures.FAILED
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("COCOOP_FAST_DEBUG"):
            traceback.print_exc()
        sentence, status = failures.explain(error)
        output.note(f"error: {' '.join(sentence.split())}")
        return status


def _silence_libraries() -> None:
    """What libraries say of images and weights: we say it ourselves, by name, or it changes nothing that is read."""
    if not os.environ.get("COCOOP_FAST_DEBUG"):
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger().addHandler(_SILENT)


def _warnings_once() -> Callable[..., None]:
    """Warnings of libraries and our own: what is wrong, not the line of code that noticed it, and each one once."""
    told: set[str] = set()

    def show(message: Warning | str, *place: object) -> None:
        text = " ".join(str(message).split())
        if text not in told:
            told.add(text)
            output.warn([text])

    return show


def _discard_stdout() -> None:
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # not a real file
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def main() -> None:
    """Entry point: runs ``sys.argv`` and exits."""
    # Threads that wait for each other sleep instead of spinning: on a shared machine spinning costs several times
    # the work itself, on an idle one sleeping costs nothing measurable. Read when torch loads its OpenMP.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))
