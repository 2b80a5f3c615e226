"""What the page says is what the runs recorded, and the page stands alone."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import platform
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_runs import StopAfter, loaded_tiny_clip, tiny_config, use_tiny_clip

import cocoop_fast
from cocoop_fast import cli
from cocoop_fast.clip.tokenizer import encode
from cocoop_fast.config import DataConfig
from cocoop_fast.experiments import experiment, shared
from cocoop_fast.protocols.cells import Experiment, make_cells
from cocoop_fast.protocols.outputs import latex, write_outputs
from cocoop_fast.protocols.protocol import PROTOCOLS
from cocoop_fast.protocols.published import published_results
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import Entry, entries_of, told_apart
from cocoop_fast.report import sources
from cocoop_fast.report.page import answer, best_of, short_of_images
from cocoop_fast.report.sources import Source
from cocoop_fast.report.words import method_name


def test_every_number_of_the_table_is_on_the_page(page, results):
    assert len(results["table"]) == 9
    for entry in results["table"]:
        assert shown(entry) in page.text


def shown(entry):
    """Zero-shot CLIP learns nothing, so that it has no seeds and no deviation."""
    assert (entry["std"] is None) == (entry["method"] == "zeroshot")
    return f"{entry['mean']:.2f}" + ("" if entry["std"] is None else f"±{entry['std']:.2f}")


def test_the_table_says_which_is_which(page, results):
    table = re.search(r'<table class="results">.*?</table>', page.html, re.DOTALL)[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>\s*(.*?)</tr>', table, re.DOTALL)
    names = {"CoCoOp": "cocoop", "CoOp": "coop", "Zero-shot CLIP": "zeroshot"}
    assert [name for name, _ in rows] == [*names, "Chance"]
    assert re.findall(r"<td.*?>(.*?)</td>", rows[-1][1]) == ["20.00"] * 3  # five classes and five
    best = {}
    for name, cells in rows[:-1]:
        found = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", cells)]
        own = {e["metric"]: e for e in results["table"] if e["method"] == names[name]}
        assert found == [shown(own[m]) for m in ("base", "new", "h")]
        best |= {m: max(best.get(m, 0), own[m]["mean"]) for m in own}
    bold = re.findall(r"<strong>([\d.]+)", table)
    assert {float(text) for text in bold} >= {round(value, 2) for value in best.values()}


def test_the_answer_comes_first_and_is_the_best_h(page, results):
    best, *others = sorted(
        (Entry.from_mapping(e) for e in results["table"] if e["metric"] == "h"), key=lambda one: -one.mean
    )
    answer = re.search(r'<p class="answer">(.*?)</p>', page.html)[1]
    assert f"{best.mean:.2f}" in answer
    for one in others:
        claimed = f"{best.mean - one.mean:.2f} points above {method_name(one.method)}" in answer
        assert claimed == told_apart(best, one), one
    assert page.html.index(answer) < page.html.index("<table")


def test_the_accuracy_of_each_class_is_the_run_s(page, tiny_experiment):
    for method in ("cocoop", "coop", "zeroshot"):
        recorded = json.loads((tiny_experiment / "digits" / method / "seed1" / "results.json").read_text())
        for subset, names in (("base", ("zero", "one", "two", "three", "four")),
                              ("new", ("five", "six", "seven", "eight", "nine"))):  # fmt: skip
            values = recorded["evaluations"][subset]["per_class_accuracy"]
            trained = '<td class="number">2</td>' if subset == "base" and method != "zeroshot" else ""
            rows = [
                rf'<th scope="row">digit {name}</th>{trained}<td class="number">\d+</td><td class="number">{value:.2f}</td>'
                for name, value in zip(names, values, strict=True)
            ]
            assert re.search(r"\s*</tr>\s*<tr>".join(rows), page.html), (method, subset)
    assert "the run recorded" not in page.text  # what the model says now is what was recorded


def entry(method, *values):
    """The accuracy of a method with seeds 1, 2 ..."""
    [made] = entries_of("digits", method, {"all": dict(enumerate(values, 1))}, None)
    return made


def answer_to(*entries):
    return answer(Source("", entries, (), (), "", ""))


def test_no_difference_within_its_deviation_is_claimed():
    assert "It cannot be told apart from CoOp (79.00±5.00): seeds differ by as much." in answer_to(
        entry("cocoop", 78.0, 82.0), entry("coop", 84.0, 74.0)
    )
    # Seed by seed one is better by a point or by two, however much the seeds differ.
    assert answer_to(entry("cocoop", 81.0, 72.0), entry("coop", 80.0, 70.0)).endswith(
        ": 1.50 points above CoOp."
    )
    assert answer_to(entry("cocoop", 81.0), entry("zeroshot", 70.0)).endswith(
        "11.00 points above Zero-shot CLIP. How much another seed would change is not known."
    )
    alike = {"cocoop": {"all": entry("cocoop", 78.0, 82.0)}, "coop": {"all": entry("coop", 84.0, 74.0)}}
    assert [one.method for one in best_of(alike)] == ["cocoop", "coop"]
    alike["zeroshot"] = {"all": entry("zeroshot", 60.0, 60.0)}
    assert [one.method for one in best_of(alike)] == ["cocoop", "coop"]


def test_classes_with_fewer_images_than_asked_for_are_counted(tiny_experiment):
    [source] = sources.read_sources([tiny_experiment])
    assert short_of_images(source) == []
    run = source.runs[0]
    few = replace(
        run, history=replace(run.history, start={**run.history.start, "class_images": [2, 1, 1, 2, 2]})
    )
    assert short_of_images(replace(source, runs=(few,))) == [
        "In digits 2 classes have fewer training images than that, as few as 1."
    ]


def test_the_contents_lead_to_every_chapter(page):
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert len(links) == 5 and all(link.removeprefix("#") in ids for link in links)


def test_when_with_what_and_by_which_command_it_was_made(page, results, tiny_experiment):
    runs = [tiny_experiment / "digits" / method / "seed1" for method in ("cocoop", "coop", "zeroshot")]
    for run in runs:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        start = next(record for record in map(json.loads, lines) if record["event"] == "run")["provenance"]
        end = json.loads((run / "results.json").read_text())["provenance"]
        assert start["torch"] == torch.__version__ and start["host"] == platform.node()
        assert {**start, "date": ""} == {**end, "date": ""} and start["date"] <= end["date"]
        assert f"date {start['date']} command {start['command']}" in page.text
    assert results["provenance"]["date"] >= end["date"]
    assert page.text.count(f"cocoop_fast {cocoop_fast.__version__}") >= 4  # of three runs, and of the page


def test_the_table_in_latex_is_that_of_the_page(page, results):
    [table] = re.findall(r"<pre.*?>(.*?)</pre>", page.html, re.DOTALL)
    assert html.unescape(table) == latex([Entry.from_mapping(e) for e in results["table"]], method_name)


def test_words_that_the_model_never_saw_are_warned_of(tiny_experiment, make_page, monkeypatch):
    known = frozenset(encode("digit zero one two three four five six seven eight"))
    monkeypatch.setattr(
        shared, "load_clip", lambda config: replace(loaded_tiny_clip(config), known_tokens=known)
    )
    page = make_page(tiny_experiment / "digits" / "zeroshot" / "seed1", close_ups=1)
    assert page.text.count("The model never saw the words of 'digit nine'") == 1


def test_it_stands_alone(page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:,").startswith(("data:", "#")), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", page.html, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_every_picture_is_whole_and_described(page):
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) > 20
    for attributes in pictures:
        assert len(attributes["alt"]) > 10
        kind, data = attributes["src"].split(";base64,")
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/png":
            image = Image.open(io.BytesIO(content))
            image.load()
            assert max(image.size) <= 112
        else:
            assert kind == "data:image/svg+xml"
            svg = ET.fromstring(content)
            assert "prefers-color-scheme:dark" in "".join(svg.itertext())
            assert not re.search(rb"(href|src)=.https?:|@import|url\(http", content)


def test_its_structure_can_be_read_aloud(page):
    identifiers = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(identifiers.values()) == {1}
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert [attributes["lang"] for tag, attributes in page.tags if tag == "html"] == ["en"]
    for _, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in identifiers


def test_plots_lie_beside_it(page):
    names = {path.stem for path in page.path.parent.glob("*.svg")}
    assert names == {path.stem for path in page.path.parent.glob("*.png")}
    assert {
        "accuracy-digits",
        "curves-digits-cocoop",
        "confusion-digits-coop-new",
        "shifts-digits-cocoop",
    } <= names
    assert "shifts-digits-coop" not in names and "curves-digits-zeroshot" not in names
    for path in page.path.parent.glob("*.svg"):
        assert "var(--" not in path.read_text()  # programs other than browsers know no variables
        ET.parse(path)


def test_the_same_report_twice_is_the_same(page, tiny_experiment, make_page):
    again = make_page(tiny_experiment)
    texts = [re.sub(r"Made on \S+ by", "", one.text) for one in (page, again)]
    without_times = [re.sub(r"[\d.,]+ (m?s|min|h|days|×)\b|[\d.]+ ×", "", text) for text in texts]
    assert without_times[0] == without_times[1]
    for path in page.path.parent.glob("*.svg"):
        assert (again.path.parent / path.name).read_bytes() == path.read_bytes()


def test_published_numbers_stand_beside_ours(tmp_path, make_page):
    """A table made by hand: the paper's own data set, without run directories."""
    asked = Experiment(
        protocol=PROTOCOLS["base2new"],
        config=replace(tiny_config(tmp_path / "out"), output_dir=None),
        data={"eurosat": DataConfig(name="eurosat")},
        datasets=("eurosat",),
        methods=("cocoop",),
        seeds=(1, 2),
        root=tmp_path / "out",
    )
    outcomes = [
        Outcome(cell, "finished", {"base": 80.0 + cell.seed, "new": 60.0 + cell.seed})
        for cell in make_cells(asked)
    ]
    write_outputs(asked, outcomes)
    page = make_page(tmp_path / "out")
    for metric in ("base", "new", "h"):
        value = published_results()["base2new", "eurosat", "cocoop", metric].value
        assert f"published {value:.2f}" in page.text
    assert "81.50±0.50" in page.text and "the dark line across a bar is the published number" in page.text


def test_what_is_missing_is_said(tmp_path, make_page):
    asked = Experiment(
        protocol=PROTOCOLS["base2new"],
        config=replace(tiny_config(tmp_path / "out"), output_dir=None),
        data={"digits": DataConfig()},
        datasets=("digits",),
        methods=("cocoop",),
        seeds=(1, 2, 3),
        root=tmp_path / "out",
    )
    first, second, third = make_cells(asked)
    write_outputs(
        asked,
        [
            Outcome(first, "finished", {"base": 80.0, "new": 60.0}),
            Outcome(second, "failed", error="The disk <b>is</b> full."),
            Outcome(third),
        ],
    )
    page = make_page(tmp_path / "out")
    assert "2 results are missing" in page.text
    assert "digits, cocoop, seed 2: The disk <b>is</b> full." in page.text
    assert "digits, cocoop, seed 3: not begun." in page.text


def test_an_unfinished_run(tmp_path, monkeypatch, make_page):
    use_tiny_clip(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tiny_config(tmp_path / "run"), observer=StopAfter(13))
    page = make_page(tmp_path / "run")
    assert "1 of 2 epochs done" in page.text
    assert "What follows is what the newest checkpoint gives" in page.text
    assert "Results" in page.text and 'class="answer"' not in page.html
    assert (page.path.parent / "curves-digits-cocoop.svg").exists()


def test_a_run_before_its_first_step(tmp_path, make_page):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {subset: base}\n")
    page = make_page(folder)
    assert "training has not begun" in page.text


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt__method": "zeroshot"},
        {"prompt__method": "coop", "prompt__csc": True, "prompt__ctx_init": "", "optim__epochs": 1},
        {"prompt__method": "coop", "prompt__class_position": "middle", "optim__epochs": 1},
        {"prompt__method": "meta-nets", "optim__epochs": 1},
        {"prompt__method": "linear-probe"},
        {"data__subset": "all", "optim__epochs": 1},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_method_has_a_page(tmp_path, monkeypatch, make_page, fields):
    use_tiny_clip(monkeypatch)
    row = experiment.run(tiny_config(tmp_path / "run", **fields)).rows[0]
    page = make_page(tmp_path / "run")
    for value in (row.base, row.new, row.all):
        assert value is None or f"{value:.2f}" in page.text
    learns_words = row.method in ("coop", "cocoop", "meta-nets")
    assert ("What it learned" in page.text) == learns_words
    assert ("How far images move the context" in page.text) == (row.method in ("cocoop", "meta-nets"))
    assert "published" not in page.text.replace("published numbers", "")


def test_runs_that_differ_are_told_apart_and_seeds_averaged(tmp_path, monkeypatch, make_page):
    use_tiny_clip(monkeypatch)
    rows = {}
    for name, seed, lr in (("a", 1, 0.002), ("b", 2, 0.002), ("c", 1, 0.5)):
        config = tiny_config(tmp_path / name, seed=seed, optim__lr=lr, optim__epochs=1)
        rows[name] = experiment.run(config).rows[0]
    page = make_page(tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "c", close_ups=0)
    mean, half = (rows["a"].base + rows["b"].base) / 2, abs(rows["a"].base - rows["b"].base) / 2
    assert f"{mean:.2f}±{half:.2f}" in page.text
    assert "CoCoOp (lr 0.002)" in page.text and "CoCoOp (lr 0.5)" in page.text
    assert f"{rows['c'].base:.2f}" in page.text


def test_without_close_ups_no_model_is_loaded(tiny_experiment, make_page, monkeypatch):
    page = make_page(tiny_experiment, close_ups=0)  # before the trap, because it sets the tiny model up
    assert "3 more methods and data sets were not looked at" in page.text
    assert "Which classes it knows" not in page.text

    def trap(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("cocoop_fast.experiments.shared.load_clip", trap)
    now, before = (
        re.sub(r"\S+T[\d:]+Z", "today", text)
        for text in (make_page(tiny_experiment, close_ups=0).text, page.text)
    )
    assert now == before and "today" in now


def test_images_that_are_gone_cost_the_close_up_alone(tiny_experiment, make_page, monkeypatch):
    from cocoop_fast.errors import UserError

    def gone(config):
        raise UserError("The folder photos is not there.")

    monkeypatch.setattr("cocoop_fast.experiments.shared.load_dataset", gone)
    page = make_page(tiny_experiment)
    assert page.text.count("Not looked at closely. The folder photos is not there.") == 3
    assert "How training went" in page.text


def test_few_images_of_many(tiny_experiment, make_page):
    page = make_page(tiny_experiment, images=5)
    assert "5 images are looked at" in page.text and "the run recorded" not in page.text


def test_the_open_chapter_of_a_comparison_is_that_of_the_configured_method(make_page, tmp_path, monkeypatch):
    call = ["train", "-m", "coop", "--compare", "zeroshot,cocoop", "--epochs", "1", "--shots", "1", "-q"]
    assert cli.run([*call, "-o", str(tmp_path / "run")]) == 0
    titles = re.findall(
        r'<details class="close-up"( open)?>\s*<summary><h2[^>]*>(.*?) on ', make_page(tmp_path / "run").html
    )
    assert [title for opened, title in titles if opened] == ["CoOp"] and len(titles) == 3


def test_the_open_chapter_of_a_protocol_is_cocoop_s_or_the_last():
    assert sources._focus(["zeroshot", "coop", "cocoop"]) == "cocoop"
    assert sources._focus(["zeroshot", "coop"]) == "coop"
