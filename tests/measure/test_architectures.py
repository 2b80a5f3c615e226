"""Every architecture of open_clip is planned for or refused in a sentence, as docs/architectures.md says."""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_architectures_page

    yield make_architectures_page
    sys.modules.pop("make_architectures_page")


@pytest.fixture
def written(tool):
    text = tool.PAGE.read_text(encoding="utf-8")
    if f"open_clip {open_clip.__version__}:" not in text:
        pytest.skip(f"the page is of another open_clip than {open_clip.__version__}")
    return text


def test_the_page_names_every_architecture(written):
    assert all(f"`{name}`" in written for name in open_clip.list_models())


@pytest.mark.parametrize(
    "name", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "coca_ViT-B-32", "mt5-base-ViT-B-32"]
)
def test_the_page_is_of_these_architectures(tool, written, name):
    table = tool.page([tool.look_at(name)])
    [line] = [line for line in table.splitlines() if f"`{name}`" in line]
    if line.startswith(f"| `{name}`"):
        assert line in written
    else:
        sentence = line.split(" | ")[0]
        assert any(row.startswith(sentence) and f"`{name}`" in row for row in written.splitlines())


@pytest.mark.soak
def test_the_page_is_that_of_all_architectures(tool, written):
    assert tool.page([tool.look_at(name) for name in open_clip.list_models()]) == written
