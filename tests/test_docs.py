"""What the documentation says can be run, and names what there is."""

import re
from pathlib import Path

import pytest

from cocoop_fast.cli import configuration
from cocoop_fast.config import RunConfig
from cocoop_fast.reference_config import METHOD_RULES, RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_in_the_readme_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_table_of_fields_is_complete_and_true():
    documented = dict(re.findall(r"^\| `([a-z_.]+)` \| `?([^|`]*?)`? \|", CONFIGURATION, re.MULTILINE))
    assert set(documented) == set(configuration.field_names())
    for name, shown in documented.items():
        value = RunConfig()
        for part in name.split("."):
            value = getattr(value, part)
        if value is None:
            assert shown == "none", name
        elif isinstance(value, float):
            assert float(shown) == value, name
        else:
            assert shown == str(value).lower() or shown == str(value), name


def test_every_key_of_the_reference_is_documented():
    for key in RULES:
        assert f"`{key}`" in CONFIGURATION, key
    for key in METHOD_RULES:
        assert re.search(rf"`TRAINER\.(COCOOP|\*)\.{key}`", CONFIGURATION), key


def test_links_between_documents_lead_somewhere():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
