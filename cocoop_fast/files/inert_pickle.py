"""Read a pickle without running anything in it, within bounds.

Python's own unpickler imports and calls what a file names, reserves as much memory as a file asks for, and ends the
process where a key of a dictionary is nested deeply: ``hash`` recurses in C. Here each opcode is carried out by hand.
Names lead to what the caller allows and otherwise to inert placeholders; nothing is imported.
"""

from __future__ import annotations

import os
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any, BinaryIO, cast

MAX_OPERATIONS = 2_000_000  # a checkpoint has thousands; each costs a few hundred bytes at most
_MAX_DEPTH = 100  # of tuples in each other
_MAX_INTEGER_BITS = 64

# What pushes its own argument, once decoded.
_LITERALS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
    ]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_MARK = object()


class InertObject:
    """Stands for an object of any class that a file names. ``state`` is what its attributes would have come from."""

    state: Any = None


class InertClass:
    """Stands for a class or function that a file names. Called, it gives an inert object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> InertObject:
        return InertObject()


class _UpToTheEnd:
    """A file of which no more is asked than there is left: for what is asked, memory is taken before it is read."""

    def __init__(self, file: BinaryIO) -> None:
        position = file.tell()
        self._size = file.seek(0, os.SEEK_END)
        file.seek(position)
        self._file = file
        self.tell, self.readline = file.tell, file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._size - self._file.tell())))


class InertUnpickler:
    """Carries out the opcodes of one pickle.

    Args:
        file: from where it is; afterwards it is at the pickle's end.
        known: what a name ``(module, name)`` means where it means more than a placeholder: a value, or a function, which
            is called with the arguments in the file. It may raise, to refuse the file.
        persistent: from a persistent id to a value.

    Raises:
        UnpicklingError, or any other exception: a damaged or hostile file.
    """

    def __init__(
        self,
        file: BinaryIO,
        known: Callable[[str, str], Any] = lambda module, name: None,
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self._file = _UpToTheEnd(file)
        self._known = known
        self._persistent = persistent
        self._names: dict[tuple[str, str], Any] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._depths: dict[int, int] = {}  # of tuples, by their identity
        self._tuples: list[tuple[Any, ...]] = []  # which keeps their identities
        self._operations = 0

    def load(self) -> Any:
        """The value: containers, numbers, text, what ``known`` and ``persistent`` gave, and inert objects."""
        for opcode, argument, _ in pickletools.genops(cast("BinaryIO", self._file)):
            self._count(1)
            self._carry_out(opcode.name, argument)
        value = self._pop()
        if self._stack:
            raise UnpicklingError("values left over")
        return value

    def _carry_out(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > _MAX_INTEGER_BITS:
                raise UnpicklingError("an integer of too many digits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME", "STOP"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("POP", "POP_MARK"):
            stack.pop() if name == "POP" else self._since_mark()
        elif name == "DUP":
            stack.append(self._top())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self._tuple(reversed([self._pop() for _ in range(int(name[-1]))])))
        elif name == "TUPLE":
            stack.append(self._tuple(self._since_mark()))
        elif name in ("EMPTY_LIST", "LIST"):
            stack.append([] if name == "EMPTY_LIST" else self._since_mark())
        elif name in ("APPEND", "APPENDS"):
            items = [self._pop()] if name == "APPEND" else self._since_mark()
            self._add(self._top(), items)
        elif name in ("EMPTY_DICT", "DICT"):
            items = self._since_mark() if name == "DICT" else []
            stack.append({})
            self._set(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self._pop(), self._pop()][::-1] if name == "SETITEM" else self._since_mark()
            self._set(self._top(), items)
        elif name in (
            "EMPTY_SET",
            "FROZENSET",
        ):  # in which nothing is looked for here: a frozen one is not told apart
            stack.append(set() if name == "EMPTY_SET" else set(self._since_mark()))
        elif name == "ADDITEMS":
            items = self._since_mark()
            self._add(self._top(), items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, value = argument.split(" ", 1) if name == "GLOBAL" else (self._pop(), self._pop())[::-1]
            stack.append(self._named(module, value))
        elif name in ("INST", "OBJ"):
            items = self._since_mark()
            known = self._named(*argument.split(" ", 1)) if name == "INST" else items.pop(0)
            stack.append(self._called(known, tuple(items)))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, known = self._pop(), self._pop()
            stack.append(self._called(known, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, known = self._pop(), self._pop(), self._pop()
            stack.append(self._called(known, arguments))
        elif name == "BUILD":
            state = self._pop()
            if isinstance(self._top(), InertObject):
                self._top().state = state
        elif name in ("PERSID", "BINPERSID"):
            if self._persistent is None:
                raise UnpicklingError("a persistent id")
            stack.append(self._persistent(argument if name == "PERSID" else self._pop()))
        else:
            raise UnpicklingError(f"{name}, which no such file has")

    def _count(self, operations: int) -> None:
        self._operations += operations
        if self._operations > MAX_OPERATIONS:
            raise UnpicklingError("too many values")

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise UnpicklingError("no value where one is needed")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            value = self._stack.pop()
            if value is _MARK:
                return items[::-1]
            items.append(value)
        raise UnpicklingError("no mark")

    def _tuple(self, items: Iterable[Any]) -> tuple[Any, ...]:
        made = tuple(items)
        depth = 1 + max((self._depths.get(id(item), 0) for item in made if type(item) is tuple), default=0)
        if depth > _MAX_DEPTH:
            raise UnpicklingError("nested too deeply")
        if made:
            self._depths[id(made)] = depth
            self._tuples.append(made)
        return made

    def _set(self, target: Any, items: list[Any]) -> None:
        if len(items) % 2:
            raise UnpicklingError("a key without a value")
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif not isinstance(target, InertObject):
            raise UnpicklingError("items of something that is no dictionary")

    def _add(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif not isinstance(target, InertObject):
            raise UnpicklingError("items of something that is no list")

    def _named(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("a name that is no text")
        if (module, name) not in self._names:
            known = self._known(module, name)
            if known is None:
                known = OrderedDict if (module, name) == ("collections", "OrderedDict") else InertClass(name)
            self._names[module, name] = known
        return self._names[module, name]

    def _called(self, function: Any, arguments: Any) -> Any:
        if not callable(function) or type(arguments) is not tuple:  # what is callable came from _named
            raise UnpicklingError("a call of something that is no function")
        if function is OrderedDict:
            pairs = arguments[0] if arguments else []  # Python 2 wrote [key, value], ...
            self._count(len(pairs))
            made: OrderedDict[Any, Any] = OrderedDict()
            for key, value in pairs:
                made[key] = value
            return made
        return function(*arguments)
