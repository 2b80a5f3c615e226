"""Calls of the command line that must fail, and what must be seen of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cocoop_fast import cli

WRONG_USAGE, FAILED = 2, 1


def a_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Bad:
    """One bad call: what is on the disk, the command line, and what must be said."""

    name: str
    arguments: str | list[str]
    says: str
    status: int = WRONG_USAGE
    disk: Callable[[Path], None] = nothing


def expect(
    bad: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the call in ``folder`` and compare all that can be seen of it."""
    monkeypatch.chdir(folder)
    before = contents(folder)
    arguments = bad.arguments.split() if isinstance(bad.arguments, str) else bad.arguments
    status = cli.run(arguments)
    out, err = capsys.readouterr()

    assert bad.says in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n")), err
    assert "Traceback" not in err
    assert out == "", out
    assert status == bad.status, f"exit status {status}"
    assert contents(folder) == before, "something was written"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file and directory below ``folder``; lock files, which are left behind on purpose, apart."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(directory)"
        for path in folder.rglob("*")
        if path.name != ".lock"
    }
