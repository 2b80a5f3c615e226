"""Variants of a method: its name with what is added to it, ``cocoop+consistency+no-image``.

The one spelling of command lines, directories, results and reports. What may be added is a line of :data:`ADDITIONS`; each
sets one field of the configuration, which is what a run records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cocoop_fast.errors import UserError
from cocoop_fast.spelling import choice, meant

if TYPE_CHECKING:
    from cocoop_fast.config import RunConfig

    Config = TypeVar("Config", bound=RunConfig)

PLUS = "+"
_CONDITIONAL = ("cocoop", "meta-nets")
_PROMPTS = ("coop", *_CONDITIONAL)


@dataclass(frozen=True)
class Addition:
    """Something that a method can have beside its own.

    Args:
        name: after a plus.
        title: as people read it, after the method's name.
        field: of the configuration, dotted; its default stands for the method without it.
        value: that the field has with it.
        methods: to which it means something.
        any_value: whether the field says more than that it is there: any value but the default is it.
        also: other fields with the values that go with it, unless something else is said.
    """

    name: str
    title: str
    field: str
    value: Any
    methods: tuple[str, ...]
    any_value: bool = False
    also: tuple[tuple[str, Any], ...] = ()

    def is_in(self, config: RunConfig) -> bool:
        """Whether what a configuration trains has it."""
        return self.is_asked_of(config) and config.prompt.method in self.methods

    def is_asked_of(self, config: RunConfig) -> bool:
        """Whether its field is set, which means nothing to some methods."""
        section, _, leaf = self.field.partition(".")
        value = getattr(getattr(config, section), leaf)
        return bool(value) if self.any_value else bool(value == self.value)


# In the order of a name's parts.
ADDITIONS: dict[str, Addition] = {
    addition.name: addition
    for addition in (
        Addition(
            "attributes",
            " + ATPrompt",
            "prompt.attributes",
            ("published",),
            _PROMPTS,
            any_value=True,
            also=(("prompt.ctx_init", ""),),  # random vectors, as published
        ),
        Addition("consistency", " + consistency", "optim.consistency", "l1", _PROMPTS),
        Addition("cosine-consistency", " + cosine consistency", "optim.consistency", "cosine", _PROMPTS),
        Addition("zero-shot", " + zero-shot CLIP", "prompt.average_zero_shot", True, _PROMPTS),
        Addition("no-image", ", without the image", "prompt.ablate_image", True, _CONDITIONAL),
    )
}
FIELDS = tuple(dict.fromkeys(addition.field for addition in ADDITIONS.values()))


def plain(name: str) -> str:
    """The method of a variant's name, without what is added."""
    return name.partition(PLUS)[0].strip()


def additions(name: str, where: str) -> tuple[Addition, ...]:
    """What a variant's name adds to its method, in any spelling and order; nothing to the name of a method alone.

    Args:
        name: of a method that exists, with additions.
        where: it stands, for messages.

    Raises:
        UserError: an addition that does not exist, that means nothing to the method, or two that exclude each other.
    """
    method = plain(name)
    found: dict[str, Addition] = {}  # by field
    for part in name.split(PLUS)[1:]:
        known = meant(part, ADDITIONS)
        if known is None:
            choices = choice(part, ADDITIONS, "Known are")
            raise UserError(f"{where}: {name} adds {part.strip()!r}, which does not exist; {choices}.")
        one = ADDITIONS[known]
        if meant(method, one.methods) is None:
            raise UserError(
                f"{where}: {one.name} means nothing to {method}; it is for {', '.join(one.methods)}."
            )
        if found.setdefault(one.field, one) != one:
            raise UserError(f"{where}: {found[one.field].name} and {one.name} exclude each other.")
    return tuple(one for one in ADDITIONS.values() if one in found.values())


def spelled(name: str, where: str, methods: tuple[str, ...]) -> str | None:
    """A variant's name as it is spelled here; ``None``: there is no such method.

    Raises:
        UserError: as :func:`additions`.
    """
    method = meant(plain(name), methods)
    if method is None:
        return None
    return PLUS.join([method, *(one.name for one in additions(name, where))])


def name_of(config: RunConfig) -> str:
    """The name of what a configuration trains."""
    return PLUS.join([config.prompt.method, *(one.name for one in ADDITIONS.values() if one.is_in(config))])


def refuse_idle(config: RunConfig) -> None:
    """Raises a UserError if a field of an addition is set that means nothing to the method."""
    for one in ADDITIONS.values():
        if one.is_asked_of(config) and not one.is_in(config):
            raise UserError(
                f"`{one.field}` means nothing to {config.prompt.method}; leave it out, or take one of {', '.join(one.methods)}."
            )


def title_of(name: str) -> str:
    """Of all that is added, to be put after the method's own title."""
    return "".join(ADDITIONS[part].title for part in name.split(PLUS)[1:] if part in ADDITIONS)


def with_variant(config: Config, name: str) -> Config:
    """The same experiment by a variant, whatever was added before; of an addition with values of its own, with that which is
    there."""
    values: dict[str, dict[str, Any]] = {"prompt": {"method": plain(name)}}
    added = {one.field: one for one in additions(name, "the method")}
    for field, section, leaf in _places():
        there, one = getattr(getattr(config, section), leaf), added.get(field)
        if one is None:
            there = getattr(type(getattr(config, section)), leaf)
        else:
            given = one.any_value and there
            there = there if given else one.value
            for other, value in one.also:
                section_of, _, leaf_of = other.partition(".")
                part = getattr(config, section_of)
                if not given or getattr(part, leaf_of) == getattr(type(part), leaf_of):
                    values.setdefault(section_of, {})[leaf_of] = value
        values.setdefault(section, {})[leaf] = there
    sections = {section: replace(getattr(config, section), **own) for section, own in values.items()}
    return replace(config, **sections)


def refuse_common(config: RunConfig, names: Sequence[str]) -> None:
    """Raises a UserError if what all rows of a table have in common would make variants of methods that are not named so.

    Args:
        config: of all rows; with attributes, say, for those that are named as having some.
        names: of the rows.
    """
    for one in ADDITIONS.values():
        named = one.any_value and any(one in additions(name, "the methods") for name in names)
        if one.is_asked_of(config) and not named:
            raise UserError(
                f"`{one.field}` makes a row of its own of the table; name that in --methods, as in {_CONDITIONAL[0]}{PLUS}"
                f"{one.name}."
            )


def _places() -> Iterator[tuple[str, str, str]]:
    """Each field with its section and its own name."""
    return ((field, *field.split(".", 1)) for field in FIELDS)  # type: ignore[misc]
