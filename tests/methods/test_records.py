"""The record of each method: what the configuration, the pages and the plots need is there."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from cocoop_fast.config import Method, PromptConfig
from cocoop_fast.methods.records import METHODS, knows_other_classes, method_title
from cocoop_fast.report.style import PALETTE
from cocoop_fast.report.words import method_colour


def test_every_name_of_the_configuration_has_a_record_and_a_line_in_the_docs():
    assert set(METHODS) == set(get_args(Method))
    table = (Path(__file__).parents[2] / "docs/methods.md").read_text()
    assert all(f"| `{name}` |" in table for name in METHODS)


def test_plots_tell_the_methods_apart():
    assert {record.colour for record in METHODS.values()} <= set(PALETTE)
    assert len({method_colour(f"{name} (lr 0.1)") for name in METHODS}) == len(METHODS)


def test_titles():
    assert method_title("meta-nets") == "M Meta-Nets" and method_title("another") == "another"


@pytest.mark.parametrize(
    ("method", "shared", "csc"),
    [
        ("zeroshot", True, True),
        ("coop", True, False),
        ("cocoop", True, False),
        ("meta-nets", True, False),
        ("linear-probe", False, False),
    ],
)
def test_what_can_be_used_on_other_classes(method, shared, csc):
    assert knows_other_classes(PromptConfig(method=method)) == shared
    assert knows_other_classes(PromptConfig(method=method, csc=True, ctx_init="")) == csc
