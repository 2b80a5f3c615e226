"""The few-shot protocol: a cell for each number of shots, a column of the table for each, and curves in the report."""

from __future__ import annotations

import json

import pytest
from tiny_protocols import finished, folders, small_experiment
from tiny_runs import use_tiny_clip

from cocoop_fast import cli
from cocoop_fast.protocols.cells import make_cells
from cocoop_fast.protocols.outputs import columns_and_rows, markdown
from cocoop_fast.protocols.table import make_table


def few_shot(tmp_path, **fields):
    return small_experiment(
        tmp_path, "few-shot", data=folders(tmp_path, "pets", "cars"), shots=(1, 2, 4), **fields
    )


def test_cells_differ_in_their_shots(tmp_path):
    cells = make_cells(few_shot(tmp_path, methods=("zeroshot", "cocoop"), seeds=(1, 2)))
    pets = [cell for cell in cells if cell.dataset == "pets"]
    assert [(cell.method, cell.shots, cell.seed) for cell in pets] == [
        ("zeroshot", 1, 1),  # learns from no image: once is enough
        ("zeroshot", 1, 2),
        *(("cocoop", shots, seed) for shots in (1, 2, 4) for seed in (1, 2)),
    ]
    assert all(cell.config.data.subset == "all" and not cell.tests for cell in cells)
    assert len({cell.run_dir for cell in cells}) == len(cells)
    assert pets[-1].run_dir == tmp_path / "out" / "pets" / "cocoop" / "shots_4" / "seed2"
    assert (
        str(pets[0]) == "pets, zeroshot, 1 shot, seed 1" and str(pets[-1]) == "pets, cocoop, 4 shots, seed 2"
    )


def test_a_column_for_each_number_of_shots(tmp_path):
    experiment = few_shot(tmp_path, methods=("zeroshot", "cocoop"), seeds=(1, 3))
    outcomes = [
        finished(cell, **{cell.dataset: 10.0 * cell.shots + cell.seed + 50 * (cell.dataset == "cars")})
        for cell in make_cells(experiment)
    ]
    entries = make_table(experiment, outcomes)
    columns, rows = columns_and_rows(entries)
    assert columns == ["Data set", "Method", "1 shot", "2 shots", "4 shots"]
    assert rows == [
        ["pets", "zero-shot CLIP", *["12.00"] * 3],
        ["pets", "CoCoOp", "12.00±1.00", "22.00±1.00", "42.00±1.00"],
        ["cars", "zero-shot CLIP", *["62.00"] * 3],
        ["cars", "CoCoOp", "62.00±1.00", "72.00±1.00", "92.00±1.00"],
        ["average", "zero-shot CLIP", *["37.00"] * 3],
        ["average", "CoCoOp", "37.00±1.00", "47.00±1.00", "67.00±1.00"],
    ]
    assert "1, 2, 4 shots." in markdown(experiment, outcomes)
    without = make_table(experiment, outcomes[:-1])  # one seed of cars with 4 shots
    averages = [e.metric for e in without if (e.dataset, e.method) == ("average", "cocoop")]
    assert averages == ["shots_1", "shots_2"]


@pytest.fixture
def tiny(monkeypatch):
    use_tiny_clip(monkeypatch)


def test_the_command_and_its_report(tmp_path, capsys, tiny):
    call = ["run", "few-shot", "--datasets", f"pets={folders(tmp_path, 'pets')['pets'].root}"]
    call += ["--shot-counts", "4", "1", "--seeds", "1", "--methods", "zeroshot", "coop", "linear-probe"]
    call += ["-o", str(tmp_path / "out"), "-q", "--json", "optim.epochs", "1"]
    assert cli.run(call) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shots"], "data.shots" in found["config"]) == ([1, 4], False)
    assert [(cell["method"], cell["shots"]) for cell in found["cells"]] == [
        ("zeroshot", 1), ("coop", 1), ("coop", 4), ("linear-probe", 1), ("linear-probe", 4),
    ]  # fmt: skip
    assert {cell["status"] for cell in found["cells"]} == {"finished"}
    by_cell = {(cell["method"], cell["shots"]): cell["accuracy"]["pets"] for cell in found["cells"]}
    for entry in found["table"]:
        shots = int(entry["metric"].removeprefix("shots_"))
        assert entry["mean"] == by_cell[entry["method"], 1 if entry["method"] == "zeroshot" else shots]
    trained_on = {
        shots: json.loads((tmp_path / "out/pets/coop" / f"shots_{shots}" / "seed1/results.json").read_text())
        for shots in (1, 4)
    }
    assert all(
        one["rows"][0]["base"] is None and one["rows"][0]["all"] is not None for one in trained_on.values()
    )

    pytest.importorskip("matplotlib")
    assert cli.run(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report"), "--close-ups", "0"]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "1, 4 training images a class" in page and "with 4 shots an accuracy of" in page
    assert "CoOp (4 shots) on pets" in (tmp_path / "report" / "curves-pets-coop-4-shots.svg").read_text()
    assert (tmp_path / "report" / "accuracy-pets.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["few-shot", "--shot-counts", "0"], "--shot-counts has '0', but shots are whole numbers from 1"),
        (["few-shot", "--shot-counts", "9" * 5000], "but shots are whole numbers from 1"),
        (["few-shot", "--shots", "4"], "give them as --shot-counts"),
        (["base2new", "--shot-counts", "4"], "--shot-counts is for few-shot"),
        (["few-shot", "--all-classes"], "--all-classes is for base2new"),
        (["few-shot", "--source", "digits"], "--source is not for few-shot"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments, sentence):
    assert cli.run(["run", *arguments, "-o", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
