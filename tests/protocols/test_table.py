"""The numbers of a table against sums done by hand."""

from __future__ import annotations

import csv
import json

import pytest
from tiny_protocols import finished, small_experiment

from cocoop_fast.config import DataConfig
from cocoop_fast.protocols import table
from cocoop_fast.protocols.cells import make_cells
from cocoop_fast.protocols.outputs import columns_and_rows, latex, markdown, write_outputs
from cocoop_fast.protocols.protocol import PROTOCOLS
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import make_table


def outcomes_of(experiment, accuracies):
    """``accuracies[data set][seed]`` are (base, new); the same for each method."""
    return [
        finished(
            cell, base=accuracies[cell.dataset][cell.seed][0], new=accuracies[cell.dataset][cell.seed][1]
        )
        for cell in make_cells(experiment)
    ]


def entries_of(experiment, outcomes):
    return {(e.dataset, e.method, e.metric): e for e in make_table(experiment, outcomes)}


@pytest.fixture
def two_sets(tmp_path):
    """Two data sets, one method, three seeds."""
    data = {"pets": DataConfig(), "cars": DataConfig()}
    experiment = small_experiment(tmp_path, data=data, methods=("cocoop",), seeds=(1, 2, 3))
    accuracies = {
        "pets": {1: (90.0, 60.0), 2: (93.0, 66.0), 3: (96.0, 54.0)},
        "cars": {1: (70.0, 80.0), 2: (70.0, 80.0), 3: (70.0, 80.0)},
    }
    return experiment, outcomes_of(experiment, accuracies)


def test_mean_and_deviation(two_sets):
    entries = entries_of(*two_sets)
    base = entries["pets", "cocoop", "base"]
    assert base.mean == 93.0 and base.seeds == {1: 90.0, 2: 93.0, 3: 96.0}
    assert base.std == pytest.approx(6**0.5, abs=1e-12)  # ((-3)² + 0² + 3²) / 3 = 6
    new = entries["pets", "cocoop", "new"]
    assert new.mean == 60.0 and new.std == pytest.approx(24**0.5, abs=1e-12)  # (0² + 6² + 6²) / 3 = 24
    assert entries["cars", "cocoop", "base"].std == 0.0


def test_harmonic_mean_is_that_of_the_means(two_sets):
    entries = entries_of(*two_sets)
    h = entries["pets", "cocoop", "h"]
    assert h.mean == pytest.approx(2 * 93 * 60 / 153, abs=1e-12)
    # Of each seed: 10800/150 = 72, 12276/159 = 77.2075..., 10368/150 = 69.12.
    assert h.seeds == pytest.approx({1: 72.0, 2: 77.20754716981132, 3: 69.12}, abs=1e-12)
    mean = (72.0 + 77.20754716981132 + 69.12) / 3
    variance = sum((x - mean) ** 2 for x in (72.0, 77.20754716981132, 69.12)) / 3
    assert h.std == pytest.approx(variance**0.5, abs=1e-12)
    assert h.mean != pytest.approx(mean, abs=0.01)  # the two definitions differ; the paper's is the former


def test_average_row(two_sets):
    entries = entries_of(*two_sets)
    base, new, h = (entries["average", "cocoop", metric] for metric in ("base", "new", "h"))
    assert (base.mean, new.mean) == (81.5, 70.0)  # (93 + 70) / 2, (60 + 80) / 2
    assert base.seeds == {1: 80.0, 2: 81.5, 3: 83.0}
    assert base.std == pytest.approx(1.5**0.5, abs=1e-12)  # (1.5² + 0 + 1.5²) / 3
    assert h.mean == pytest.approx(2 * 81.5 * 70 / 151.5, abs=1e-12)  # of the averages, not the mean of H


def test_an_average_over_what_is_missing_is_not_shown(two_sets):
    experiment, outcomes = two_sets
    lacking = [*outcomes[:-1], Outcome(outcomes[-1].cell, "failed", error="the disk is full")]
    entries = entries_of(experiment, lacking)
    assert entries["cars", "cocoop", "base"].seeds == {1: 70.0, 2: 70.0}
    assert not any(dataset == "average" for dataset, _, _ in entries)
    assert "1 of 6 cells are missing" in markdown(experiment, lacking)


def test_one_seed_has_no_deviation_and_one_set_no_average(tmp_path):
    experiment = small_experiment(tmp_path, methods=("coop",), seeds=(4,))
    outcomes = outcomes_of(experiment, {"digits": {4: (50.0, 50.0)}})
    entries = entries_of(experiment, outcomes)
    assert {dataset for dataset, _, _ in entries} == {"digits"}
    assert entries["digits", "coop", "h"].mean == 50.0 and entries["digits", "coop", "h"].std is None
    assert "±" not in markdown(experiment, outcomes)


def paper_experiment(tmp_path, protocol, **fields):
    known = PROTOCOLS[protocol]
    data = {name: DataConfig(name=name) for name in (known.source, *known.datasets) if name}
    return small_experiment(
        tmp_path, protocol, data=data, source=known.source, methods=("coop", "cocoop"), seeds=(1,), **fields
    )


def test_published_numbers_stand_beside_ours(tmp_path):
    experiment = paper_experiment(tmp_path, "base2new")
    outcomes = [finished(cell, base=80.0, new=70.0) for cell in make_cells(experiment)]
    entries = entries_of(experiment, outcomes)
    assert entries["dtd", "cocoop", "new"].published.value == 56.00
    assert entries["average", "cocoop", "h"].published.value == 75.83
    columns, rows = columns_and_rows(make_table(experiment, outcomes))
    assert columns == ["Data set", "Method", "Base", "New", "H"]
    at = rows.index(["average", "CoCoOp", "80.00", "70.00", "74.67"])
    assert rows[at + 1] == ["", "CoCoOp, paper", "80.47", "71.69", "75.83"]
    text = markdown(experiment, outcomes)
    assert "Zhou et al." in text and "†" not in text


def test_an_average_over_other_sets_has_no_published_number(tmp_path):
    experiment = paper_experiment(tmp_path, "base2new", datasets=("dtd", "eurosat"))
    outcomes = [finished(cell, base=80.0, new=70.0) for cell in make_cells(experiment)]
    entries = entries_of(experiment, outcomes)
    assert entries["average", "cocoop", "base"].published is None
    assert entries["dtd", "cocoop", "base"].published is not None


def test_numbers_without_a_check_are_marked(tmp_path):
    experiment = paper_experiment(tmp_path, "domain-generalization")
    names = ("imagenet", *PROTOCOLS["domain-generalization"].datasets)
    outcomes = [finished(cell, **dict.fromkeys(names, 60.0)) for cell in make_cells(experiment)]
    text = markdown(experiment, outcomes)
    assert "| imagenet_r | CoCoOp | 60.00 |" in text and "|  | CoCoOp, paper | 76.18† |" in text
    assert "† not checked" in text


def test_another_source_is_not_compared_with_the_paper(tmp_path):
    data = {name: DataConfig(name=name) for name in ("dtd", "eurosat", "ucf101")}
    experiment = small_experiment(
        tmp_path, "cross-dataset", data=data, source="dtd", methods=("coop",), seeds=(1,)
    )
    outcomes = [finished(cell, dtd=50.0, eurosat=40.0, ucf101=30.0) for cell in make_cells(experiment)]
    table = make_table(experiment, outcomes)
    assert not any(entry.published for entry in table)
    # The source comes first, and is no part of the average over targets.
    assert [(e.dataset, e.mean) for e in table] == [
        ("dtd", 50.0),
        ("eurosat", 40.0),
        ("ucf101", 30.0),
        ("average", 35.0),
    ]


def test_files(two_sets):
    experiment, outcomes = two_sets
    returned = write_outputs(experiment, outcomes)
    results = json.loads((experiment.root / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert (results["format"], results["version"]) == ("cocoop_fast protocol results", 1)
    assert results["cells"][0] == {
        "dataset": "pets",
        "method": "cocoop",
        "seed": 1,
        "shots": 16,
        "status": "finished",
        "accuracy": {"base": 90.0, "new": 60.0},
        "train_seconds": 1.5,
        "run_dir": "pets/cocoop/seed1",
        "error": None,
    }
    [h] = [e for e in results["table"] if (e["dataset"], e["metric"]) == ("average", "h")]
    assert h["mean"] == pytest.approx(75.31353135313532) and set(h["seeds"]) == {"1", "2", "3"}
    with open(experiment.root / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results["table"]) == 9
    assert float(rows[0]["mean"]) == 93.0 and rows[0]["published"] == ""
    assert "| pets | CoCoOp | 93.00±2.45 | 60.00±4.90 |" in (experiment.root / "table.md").read_text()
    tex = (experiment.root / "table.tex").read_text()
    assert r"\begin{tabular}{llrrr}" in tex and r"Data set & Method & Base & New & H \\" in tex
    assert r"pets & CoCoOp & 93.00$\pm$2.45 & 60.00$\pm$4.90 &" in tex


def test_latex_takes_names_as_they_are():
    entries = table.entries_of("50%_off & more", "a_b", {"all": {1: 50.0}}, None)
    assert r"50\% off \& more & a\_b & 50.00 \\" in latex(entries)


def test_what_learns_nothing_has_no_deviation():
    [same] = table.entries_of("digits", "zeroshot", {"all": {1: 50.0, 2: 50.0}}, None)
    assert (same.std, str(same), same.one_seed) == (None, "50.00", False)
