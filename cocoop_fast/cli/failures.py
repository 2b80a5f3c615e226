"""From any exception to one sentence and an exit status."""

from __future__ import annotations

import errno
import os

import typer

from cocoop_fast.errors import UserError, is_out_of_memory

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130

# Typer's public face of the exceptions that its parser raises: an unknown option, a missing argument.
PARSER_ERROR: type[Exception] = typer.BadParameter.__mro__[1].__mro__[1]  # ClickException, above UsageError


def explain(error: BaseException) -> tuple[str, int]:
    """The sentence (without "error:") and the exit status for an exception."""
    if isinstance(error, UserError):
        return str(error), error.exit_status
    if isinstance(error, PARSER_ERROR):
        if type(error).__name__ == "NoArgsIsHelpError":  # its help has been printed
            return "name one of the commands.", WRONG_USAGE
        context = getattr(error, "ctx", None)
        from pydantic import ValidationError  # here, so that --help need not load it

        from cocoop_fast.config import explain_value

        wrong = error.__cause__
        if isinstance(wrong, ValidationError):  # which the parser tells without the value
            options = getattr(getattr(error, "param", None), "opts", ["A value"])
            return f"{options[0]} {explain_value(wrong.errors()[0])}.", WRONG_USAGE
        see = f" See `{context.command_path} --help`." if context is not None else ""
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return f"{message}{'' if message.endswith('?') else '.'}{see}", WRONG_USAGE
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return (
            "interrupted; of a run what was saved is kept, and the same command goes on from there.",
            INTERRUPTED,
        )
    if isinstance(error, OSError):
        return _explain_os(error), FAILED
    if is_out_of_memory(error):
        return "the memory is used up; use a smaller batch size.", FAILED
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            "a process that reads images ended unexpectedly, perhaps for lack of memory; use fewer --workers, and run "
            "the same command again.",
            FAILED,
        )
    detail = f": {error}" if str(error).strip() else ""
    return (
        f"unexpected {type(error).__name__}{detail} (this is a mistake in the program; "
        "COCOOP_FAST_DEBUG=1 shows where).",
        FAILED,
    )


def _explain_os(error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    where = f"{error.filename}: " if error.filename else ""
    advice = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
    return f"{where}{reason}{advice}."
