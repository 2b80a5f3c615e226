"""One small experiment with its report, which many tests look at."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_runs import use_tiny_clip

from cocoop_fast import cli
from cocoop_fast.measure import this_machine

pytest.importorskip("matplotlib", reason="a report needs matplotlib")


class Page(HTMLParser):
    """Tags with their attributes, and the text that people read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = 0
        self.feed(self.html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag in ("style", "script")
        self._apart(tag)

    def handle_endtag(self, tag):
        self._apart(tag)
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._hidden:
            self.text += data

    def _apart(self, tag):
        """Elements that begin a line, or a place of their own in one."""
        if tag not in ("wbr", "strong", "b", "span") and not self.text.endswith(" "):
            self.text += " "


@pytest.fixture(scope="session", autouse=True)
def measured_once():
    """A report measures the machine for each model that it shows; here the first measurement serves all."""
    measure, found = this_machine.measure_cpu, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            this_machine,
            "measure_cpu",
            lambda *a, **b: found[0] if found else (found.append(measure(*a, **b)), found[0])[1],
        )
        yield


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory):
    """base2new on a few digits with a tiny CLIP: three methods, two seeds. Its output directory."""
    folder = tmp_path_factory.mktemp("base2new")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        call = [
            "run",
            "base2new",
            "--methods",
            "cocoop",
            "coop",
            "zeroshot",
            "--seeds",
            "1",
            "2",
            "--shots",
            "2",
        ]
        assert cli.run([*call, "-o", str(folder), "-q", "optim.epochs", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def results(tiny_experiment):
    return json.loads((tiny_experiment / "results.json").read_text())


@pytest.fixture(scope="session")
def page(tiny_experiment, tmp_path_factory):
    """Its report."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        assert cli.run(["report", str(tiny_experiment), "-o", str(folder), "-q"]) == 0
    return Page(folder / "report.html")


@pytest.fixture
def make_page(tmp_path, monkeypatch):
    """Make a report of these directories with the tiny CLIP."""
    use_tiny_clip(monkeypatch)

    def make(*runs, **options):
        words = [
            text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        assert cli.run(["report", *map(str, runs), "-o", str(tmp_path / "page"), "-q", *words]) == 0
        return Page(tmp_path / "page" / "report.html")

    return make
