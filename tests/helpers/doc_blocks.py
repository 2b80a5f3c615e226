"""What stands in the documentation to be run: code blocks, and command lines in blocks and in running text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(r"(?:^|\s)(?:cocoop-fast|-m cocoop_fast)(?=\s|$)(.*)")
_ENDS = {"|", ">", "<", "&&", ";", "||"}  # what follows is another program's
_LEFT_OUT = {"...", "…"}


@dataclass(frozen=True)
class Block:
    """A fenced block: ```` ```LANGUAGE NOTE ````. The note is empty, "no-run", or the name of a file to be written."""

    language: str
    note: str
    text: str


def blocks(page: Path) -> list[Block]:
    """In the order of the page."""
    return [Block(*found) for found in _FENCE.findall(page.read_text(encoding="utf-8"))]


def shell_lines(block: Block) -> list[str]:
    """Command lines of a shell block, with what a backslash continues; no comments, no empty lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def arguments(line: str) -> list[str] | None:
    """The arguments of `cocoop-fast` in a command line; None if it is another program's."""
    found = _PROGRAM.search(line)
    if found is None:
        return None
    lexer = shlex.shlex(found[1], posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word in _ENDS:
            break
        if word not in _LEFT_OUT:
            words.append(word)
    return words


def command_lines(page: Path) -> list[str]:
    """Whole command lines, of shell blocks and of indented ones."""
    shell = [block for block in blocks(page) if block.language in ("", "sh", "bash")]
    indented = re.findall(r"^ {4,}(cocoop-fast .*)$", _prose(page), re.MULTILINE)
    return [*(line for block in shell for line in shell_lines(block)), *indented]


def mentions(page: Path) -> list[str]:
    """What running text says of the program between backticks: a command, a part of one."""
    return [" ".join(span.split()) for span in re.findall(r"`(cocoop-fast [^`]*)`", _prose(page))]


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
