"""Variants of methods: one spelling, from command lines to tables."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tiny_protocols import finished, small_experiment
from tiny_runs import tiny_config, use_tiny_clip

from cocoop_fast import UserError, cli
from cocoop_fast.cli import configuration, options
from cocoop_fast.config import DataConfig, RunConfig, from_mapping, to_mapping
from cocoop_fast.methods.records import METHODS, method_title
from cocoop_fast.protocols.cells import changed_cells, make_cells
from cocoop_fast.protocols.outputs import columns_and_rows, latex
from cocoop_fast.protocols.protocol import PROTOCOLS
from cocoop_fast.protocols.table import make_table
from cocoop_fast.report.sources import read_sources
from cocoop_fast.report.words import method_colour, method_name
from cocoop_fast.runs.recipe import resolve, with_method
from cocoop_fast.variants import ADDITIONS, FIELDS, name_of, refuse_common, with_variant

BOTH = "cocoop+consistency+no-image"


@pytest.mark.parametrize(
    "typed, known, title",
    [
        ("cocoop+consistency+attributes", "cocoop+attributes+consistency", "CoCoOp + ATPrompt + consistency"),
        ("zeroshot", "zeroshot", "Zero-shot CLIP"),
        ("CoCoOp+Consistency", "cocoop+consistency", "CoCoOp + consistency"),
        ("CoCoOp + no_image + consistency", BOTH, "CoCoOp + consistency, without the image"),
        ("coop+cosineconsistency", "coop+cosine-consistency", "CoOp + cosine consistency"),
        ("meta-nets+no-image", "meta-nets+no-image", "M Meta-Nets, without the image"),
    ],
)
def test_spelling_and_title(typed, known, title):
    assert options.methods_of(typed, "--methods") == (known,)
    assert method_name(known) == title and method_name(f"{known} (lr 0.1)") == f"{title} (lr 0.1)"
    config = configuration.build(options={"prompt.method": ("--method", typed)}).config
    assert name_of(config) == known and config.prompt.method == known.partition("+")[0]
    assert (
        from_mapping({"prompt": {"method": typed}} if "+" in typed else {"prompt": {"method": known}})
        == config
    )
    assert name_of(from_mapping(to_mapping(config))) == known


@pytest.mark.parametrize(
    "typed, message",
    [
        ("cocoop+consistensy", "did you mean consistency"),
        ("cocoop+", "adds '', which does not exist"),
        ("zeroshot+consistency", "consistency means nothing to zeroshot; it is for coop, cocoop, meta-nets"),
        ("coop+no-image", "no-image means nothing to coop"),
        ("cocoop+consistency+cosine-consistency", "exclude each other"),
        ("cocop+consistency", "there is no method 'cocop.consistency'; did you mean cocoop"),
    ],
)
def test_what_cannot_be_added_is_refused(typed, message):
    with pytest.raises(UserError, match=message):
        options.methods_of(typed, "--methods")
    with pytest.raises(
        UserError, match=message.partition(";")[0] if "cocop+" not in typed else "prompt.method"
    ):
        configuration.build(options={"prompt.method": ("--method", typed)})


class TestLayers:
    def test_a_later_method_takes_the_place_of_a_variant(self, tmp_path):
        file = tmp_path / "one.yaml"
        file.write_text("prompt:\n  method: cocoop+consistency\n")
        assert name_of(configuration.build([file]).config) == "cocoop+consistency"
        later = configuration.build([file], {"prompt.method": ("--method", "coop")})
        assert name_of(later.config) == "coop"

    def test_what_else_is_said_must_agree(self, tmp_path):
        given = {"prompt.method": ("--method", BOTH)}
        agreeing = {**given, "optim.consistency": ("--consistency", "l1")}
        assert name_of(configuration.build(options=agreeing).config) == BOTH
        for otherwise in (
            {"optim.consistency": ("--consistency", "cosine")},
            {"prompt.ablate_image": ("", False)},
        ):
            with pytest.raises(UserError, match="that is said to be otherwise"):
                configuration.build(options={**given, **otherwise})
        with pytest.raises(UserError, match=r"has `optim\.consistency` l1"):
            from_mapping({"prompt": {"method": "coop+consistency"}, "optim": {"consistency": "none"}})

    def test_options_alone_have_the_same_name(self):
        config = configuration.build(options={"optim.consistency": ("--consistency", "l1")}).config
        assert name_of(config) == "cocoop+consistency"

    def test_what_means_nothing_to_a_method_is_not_in_its_name_and_is_refused(self):
        config = from_mapping({"prompt": {"method": "zeroshot"}, "optim": {"consistency": "l1"}})
        assert name_of(config) == "zeroshot"
        with pytest.raises(UserError, match="ablate_image` means nothing to coop; leave it out"):
            configuration.build(pairs=["prompt.method", "coop", "prompt.ablate_image", "true"])


def test_a_variant_of_a_configuration_has_what_its_name_says_alone(tmp_path):
    start = tiny_config(tmp_path, prompt__ablate_image=True, optim__consistency="cosine")
    refuse_common(RunConfig(), [BOTH])
    with pytest.raises(UserError, match="makes a row of its own"):
        refuse_common(start, [BOTH])
    for name in ("coop", "cocoop+consistency", BOTH):
        made = with_variant(start, name)
        assert name_of(made) == name and made.data == start.data
        assert name_of(with_method(start, name, tmp_path)) == name
    digits = resolve(start, make_dataset())
    assert resolve(replace(start, output_dir=None), make_dataset()).output_dir.parent.name == name_of(start)
    assert name_of(with_variant(digits, "cocoop")) == "cocoop"


def test_attributes_are_those_published_or_those_that_are_given(tmp_path):
    def attributes_of(config):
        return config.prompt.attributes, config.prompt.ctx_init

    named = configuration.build(options={"prompt.method": ("--method", "coop+attributes")}).config
    assert attributes_of(named) == (("published",), "")
    given = configuration.build(
        options={
            "prompt.method": ("--method", "cocoop+attributes"),
            "prompt.attributes": ("--attributes", "color,shape"),
        }
    ).config
    assert attributes_of(given) == (("color", "shape"), "") and name_of(given) == "cocoop+attributes"
    plain = tiny_config(tmp_path)
    assert attributes_of(with_variant(plain, "cocoop+attributes")) == (("published",), "")
    assert attributes_of(with_variant(given, "coop+attributes")) == (("color", "shape"), "")
    assert with_variant(given, "coop").prompt.attributes == ()
    refuse_common(given, ["cocoop", "cocoop+attributes"])
    with pytest.raises(UserError, match=r"as in cocoop\+attributes"):
        refuse_common(given, ["cocoop"])


def make_dataset():
    from cocoop_fast.data import load_dataset

    return load_dataset(DataConfig())


def test_every_addition_is_for_methods_that_there_are():
    for one in ADDITIONS.values():
        assert set(one.methods) <= set(METHODS) and one.field in FIELDS
        assert configuration.field_names().count(one.field) == 1


class TestTable:
    METHODS = ("cocoop", "cocoop+consistency", BOTH)

    def experiment(self, tmp_path):
        known = PROTOCOLS["base2new"]
        data = {name: DataConfig(name=name) for name in known.datasets}
        return small_experiment(tmp_path, data=data, methods=self.METHODS, seeds=(1,))

    def test_cells_and_rows_are_told_apart_and_published_numbers_are_of_the_plain_method(self, tmp_path):
        experiment = self.experiment(tmp_path)
        cells = make_cells(experiment)
        assert len({cell.run_dir for cell in cells}) == len(cells)
        assert {name_of(cell.config) for cell in cells} == set(self.METHODS)
        assert {cell.run_dir.parent.name for cell in cells} == set(self.METHODS)
        base = {"cocoop": 70.0, "cocoop+consistency": 80.0, BOTH: 75.0}
        outcomes = [finished(cell, base=base[cell.method], new=60.0) for cell in cells]
        entries = make_table(experiment, outcomes)
        assert {entry.method for entry in entries if entry.published} == {"cocoop"}
        found = {
            entry.method: entry.mean for entry in entries if (entry.dataset, entry.metric) == ("dtd", "base")
        }
        assert found == base
        _, rows = columns_and_rows(entries)
        titles = [row[1] for row in rows if row[0] == "dtd"]
        assert titles == ["CoCoOp", "CoCoOp + consistency", "CoCoOp + consistency, without the image"]
        assert [row[1] for row in rows if not row[0]] == ["CoCoOp, paper"] * 12
        assert "CoCoOp + consistency, without the image" in latex(entries)

    def test_a_variant_has_its_method_s_colour(self):
        assert method_colour(BOTH) == method_colour("cocoop") != method_colour("coop")
        assert method_title("nobody's+consistency") == "nobody's+consistency"


class TestProtocol:
    CALL = ("run", "base2new", "--seeds", "1", "-q", "--shots", "1", "optim.epochs", "1")

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        use_tiny_clip(monkeypatch)

    def test_variants_are_rows_that_go_on_and_are_reported(self, tmp_path, capsys):
        call = [*self.CALL[:4], "--methods", "cocoop", BOTH, *self.CALL[4:], "-o", str(tmp_path)]
        assert cli.run(call) == 0
        assert "CoCoOp + consistency, without the image" in capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["methods"] == ["cocoop", BOTH]
        cells = {cell["method"]: cell for cell in results["cells"]}
        assert cells[BOTH]["run_dir"] == f"digits/{BOTH}/seed1"
        row = json.loads((tmp_path / "digits" / BOTH / "seed1" / "results.json").read_text())["rows"][0]
        assert row["method"] == BOTH
        [source] = read_sources([tmp_path])
        assert [run.label for run in source.runs] == ["cocoop", BOTH] and source.focus == "cocoop"
        [loose] = read_sources([tmp_path / "digits"])
        assert {entry.method for entry in loose.entries} == {"cocoop", BOTH}
        before = (tmp_path / "digits" / BOTH / "seed1" / "log.txt").read_text()
        assert cli.run(call) == 0  # finished cells are read
        assert (tmp_path / "digits" / BOTH / "seed1" / "log.txt").read_text() == before
        assert json.loads((tmp_path / "results.json").read_text())["table"] == results["table"]
        experiment = small_experiment(tmp_path, methods=(BOTH,), seeds=(1,), root=tmp_path)
        [cell] = make_cells(experiment)
        other = replace(cell, config=replace(with_variant(cell.config, "cocoop"), output_dir=cell.run_dir))
        assert "consistency" in changed_cells([other], lambda data: make_dataset())[other]

    def test_what_makes_a_row_is_not_for_all_cells(self, tmp_path, capsys):
        assert cli.run([*self.CALL, "optim.consistency", "l1", "-o", str(tmp_path)]) == 2
        assert "name that in --methods, as in cocoop+consistency" in capsys.readouterr().err

    def test_train_and_its_comparison(self, tmp_path, capsys):
        call = ["train", "--method", "CoCoOp+consistency", "--compare", "cocoop", "-q", "--shots", "1"]
        assert cli.run([*call, "optim.epochs", "1", "-o", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert out.index("CoCoOp  ") < out.index("CoCoOp + consistency")
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        assert [row["method"] for row in rows] == ["cocoop+consistency", "cocoop"]
        assert rows[0]["base"] is not None
        assert "method: cocoop\n" in (tmp_path / "cocoop" / "config.yaml").read_text()
