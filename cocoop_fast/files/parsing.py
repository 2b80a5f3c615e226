"""From a file's text to plain values: the one place that turns what parsers raise into a sentence.

JSON and YAML of others may be nested until a parser's stack ends, refer to themselves, name a date that does not exist,
or hold integers of thousands of digits, which Python refuses to write into a message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cocoop_fast.errors import UserError, is_out_of_memory

_MOST_YAML_NODES = 50_000  # of a configuration, with what aliases refer to counted each time
_DEEPEST = 60
_INTEGER_BITS = 64


class ParseError(ValueError):
    """A text that is not in its format, or beyond all bounds. The error's text is a clause about the file: "it is ..."."""


@contextmanager
def refusing_damage(path: Path, advice: str = "run the command that wrote it again") -> Iterator[None]:
    """Within it, whatever a file's content makes the code raise means that the file is damaged.

    Raises:
        UserError: instead of all but ``UserError`` itself, ``OSError`` and a lack of memory.
    """
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged ({repr(error)[:200]}); {advice}.") from error


def json_value(text: str) -> Any:
    """The value of a JSON text, with integers of 64 bits at most.

    Raises:
        ParseError: it is none.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except ParseError:
        raise
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ParseError(f"it is not JSON (line {error.lineno})") from error


def yaml_value(text: str) -> Any:
    """The value of a YAML text: plain values and dates, with integers of 64 bits at most.

    Raises:
        ParseError: it is none, nested too deeply, or refers to itself.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except ParseError:
        raise
    except yaml.YAMLError as error:
        raise ParseError(f"it is not valid YAML{_line(getattr(error, 'problem_mark', None))}") from error
    except RecursionError as error:
        raise ParseError("it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """Of what a value's text makes Python raise, tells the line."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
                raise ValueError
            return value
        except (yaml.YAMLError, ParseError, RecursionError):
            raise
        except Exception as error:  # of whatever kind: no such date, no such number, a key that is a list
            text = f"`{node.value[:40]}` " if isinstance(node.value, str) else "something "
            raise ParseError(f"it has {text}where that is no value{_line(node.start_mark)}") from error


def _check_size(root: Any) -> None:
    """Before anything is made of the nodes: aliases of aliases would be billions of values."""
    left, count = [(root, 0)], 0
    while left:
        node, depth = left.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_YAML_NODES:
            raise ParseError(
                f"it is nested too deeply, refers to itself or has too many values{_line(node.start_mark)}"
            )
        if isinstance(node, yaml.SequenceNode):
            left += ((one, depth + 1) for one in node.value)
        elif isinstance(node, yaml.MappingNode):
            left += ((one, depth + 1) for pair in node.value for one in pair)


def _integer(digits: str) -> int:
    value = int(digits) if len(digits) < 30 else None
    if value is None or value.bit_length() > _INTEGER_BITS:
        raise ParseError("it has an integer of too many digits")
    return value


def _line(mark: Any) -> str:
    return f" (line {mark.line + 1})" if mark is not None else ""
