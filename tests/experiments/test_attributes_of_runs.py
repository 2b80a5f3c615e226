"""Attributes in a run: which ones, what is recorded, and what results, reports and shared folders say of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import tiny_clip
from tiny_protocols import small_experiment
from tiny_runs import load_few_test_images, loaded_tiny_clip, tiny_config, use_tiny_clip

from cocoop_fast import CustomCLIP, UserError, cli, load_pretrained, reference_cfg
from cocoop_fast.cli import configuration
from cocoop_fast.config import DataConfig, from_mapping, load_yaml, resolved_from_mapping
from cocoop_fast.experiments import experiment
from cocoop_fast.experiments.onnx_export import COSINE_BOUND, _by_onnxruntime, export_onnx
from cocoop_fast.experiments.predict import Predictor
from cocoop_fast.methods import build_model
from cocoop_fast.methods.attributes import ATTRIBUTES
from cocoop_fast.protocols.cells import make_cells
from cocoop_fast.protocols.outputs import latex
from cocoop_fast.protocols.protocol import IMAGENET, TRANSFER_SETS
from cocoop_fast.protocols.run_cell import Outcome
from cocoop_fast.protocols.table import make_table
from cocoop_fast.report.contexts import learned_words, shifts_of
from cocoop_fast.report.sources import read_sources
from cocoop_fast.report.words import method_colour, method_name
from cocoop_fast.runs.recipe import in_words, resolve, with_method

WORDS = ("shape", "playfulness")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        fields = {"prompt__attributes": WORDS, "prompt__n_ctx": 2, "prompt__ctx_init": ""}
        experiment.run(tiny_config(path, optim__epochs=1, optim__batch_size=5, optim__lr=0.05, **fields))
    return path


def tiny(attributes, method="cocoop", ablate_image=False):
    values = {"prompt": {"method": method, "attributes": attributes, "ablate_image": ablate_image}}
    return from_mapping(values)


class TestChoice:
    def test_each_data_set_of_the_paper_has_published_ones(self):
        assert set(ATTRIBUTES) == {IMAGENET, *TRANSFER_SETS}
        digits = load_few_test_images(DataConfig())
        for name, words in ATTRIBUTES.items():
            resolved = resolve(tiny("published"), replace(digits, name=name))
            assert resolved.prompt.attributes == words
        assert ATTRIBUTES["dtd"] == ("pattern", "color", "design")

    @pytest.mark.parametrize(
        "config, sentence",
        [
            (tiny("published"), "No attributes are published for digits, only for imagenet"),
            (tiny("published,color"), "not both"),
            (tiny("color", "zeroshot"), "zeroshot has none"),
            (tiny("color", "linear-probe"), "linear-probe has none"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, config, sentence):
        with pytest.raises(UserError, match=sentence):
            resolve(config, load_few_test_images(DataConfig()))

    @pytest.mark.parametrize("given", ["color, shape", ["color", "shape"], ("color", "shape")])
    def test_text_and_lists_are_the_same(self, given):
        built = configuration.build(options={"prompt.attributes": ("--attributes", given)}).config.prompt
        assert built.attributes == ("color", "shape")
        assert built.ctx_init == ""  # random vectors, as published

    def test_there_are_none_by_default(self):
        assert configuration.build().config.prompt.attributes == ()

    @pytest.mark.parametrize("given", [0, False, {}, [1]])
    def test_other_values_are_refused(self, given):
        with pytest.raises(UserError, match=r"prompt\.attributes"):
            from_mapping({"prompt": {"attributes": given}})

    def test_compared_methods_are_plain(self, tmp_path):
        assert with_method(tiny("color"), "coop", tmp_path).prompt.attributes == ()

    def test_a_word_that_the_model_never_saw_is_told(self):
        clip = replace(loaded_tiny_clip(), known_tokens=frozenset(range(49408)) - {3140})
        with pytest.warns(UserWarning, match="never saw the attribute color"):
            build_model(tiny("color").prompt, ["cat"], clip)


class TestRun:
    def test_it_is_recorded(self, run_dir):
        config = load_yaml(run_dir / "config.yaml")
        assert config["prompt"]["attributes"] == list(WORDS)
        assert "attributes shape, playfulness (ATPrompt)" in (run_dir / "log.txt").read_text()
        assert "attributes shape, playfulness (ATPrompt)" in in_words(resolved_from_mapping(config))
        [row] = json.loads((run_dir / "results.json").read_text())["rows"]
        assert row["method"] == "cocoop+attributes"

    def test_finished_it_is_read(self, run_dir, monkeypatch):
        use_tiny_clip(monkeypatch)
        config = from_mapping(load_yaml(run_dir / "config.yaml"))
        results = experiment.run(config)
        assert "cocoop+attributes, seed 1" in results._repr_html_()
        with pytest.raises(UserError, match=r"prompt\.attributes is"):
            experiment.run(replace(config, prompt=replace(config.prompt, attributes=("color",))))

    def test_reports_name_it_and_show_no_published_number_beside_it(self, run_dir):
        [source] = read_sources([run_dir])
        assert source.focus == source.runs[0].label == "cocoop+attributes"
        assert {entry.method for entry in source.entries} == {"cocoop+attributes"}
        assert all(entry.published is None for entry in source.entries)
        assert method_name("cocoop+attributes") == "CoCoOp + ATPrompt"
        assert method_colour("cocoop+attributes") == method_colour("cocoop")

    def test_what_was_learned_is_loaded_and_shared(self, run_dir, tmp_path, monkeypatch):
        use_tiny_clip(monkeypatch)
        predictor = Predictor.from_run(run_dir)
        image = torch.rand(2, 3, 32, 32)
        folder = predictor.save_pretrained(tmp_path)
        assert "# CoCoOp + ATPrompt on demo" in (folder / "README.md").read_text()
        again = Predictor.from_pretrained(folder)
        assert torch.equal(again.model(image), predictor.model(image))
        other = CustomCLIP(
            reference_cfg(
                ctx_init="", n_ctx=2, precision="fp32", image_size=32, attributes=["shape", "color"]
            ),
            predictor.classnames,
            loaded_tiny_clip().model,
        )
        with pytest.raises(UserError, match="learned with attributes"):
            load_pretrained(other, folder)

    def test_a_report_has_the_words_near_each_context_and_what_the_image_adds_to_the_last(
        self, run_dir, monkeypatch
    ):
        use_tiny_clip(monkeypatch)
        model = Predictor.from_run(run_dir).model
        learner = model.prompt_learner
        places = [token.place for token in learned_words(learner, loaded_tiny_clip(), "digit zero")]
        assert places == [
            *("before shape, 1", "before shape, 2", "before playfulness, 1", "before playfulness, 2"),
            *("1", "2"),
        ]
        image = torch.randn(6, model.embed_dim)
        shifts = shifts_of(learner, image, torch.zeros(6).long(), ("a",), 1)
        unit = image / image.norm(dim=1, keepdim=True)
        with torch.no_grad():
            mean = learner.meta_net(unit).mean(dim=0).double()
        np.testing.assert_allclose(shifts.mean, mean.expand(2, -1), atol=1e-6)

    @pytest.mark.soak
    def test_onnxruntime_computes_the_same_without_the_vocabulary(self, run_dir, tmp_path, monkeypatch):
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="of the extra onnx")
        use_tiny_clip(monkeypatch)
        exported = export_onnx(run_dir, tmp_path / "x.onnx")
        model = Predictor.from_run(run_dir).model
        table = tiny_clip(layers=2).token_embedding.weight
        assert exported.text == "tree" and exported.nbytes < table.nbytes
        images = torch.randn(3, 3, 32, 32)
        found = _by_onnxruntime(exported.file.read_bytes(), images)
        bound = COSINE_BOUND * float(model.logit_scale.exp())
        torch.testing.assert_close(found, model(images).detach(), rtol=0, atol=bound)


class TestProtocol:
    def test_rows_that_are_named_so_have_them_and_tables_name_them(self, tmp_path):
        asked = small_experiment(
            tmp_path,
            config={"prompt__attributes": "color"},
            methods=("zeroshot", "cocoop+attributes"),
            seeds=(1,),
            data={"dtd": DataConfig(name="dtd")},
        )
        cells = make_cells(asked)
        assert [cell.config.prompt.attributes for cell in cells] == [(), ("color",)]
        outcomes = [Outcome(cell, "finished", {"base": 80.0, "new": 70.0}) for cell in cells]
        entries = make_table(asked, outcomes)
        by_method = {entry.method: entry.published for entry in entries if entry.metric == "base"}
        assert by_method["cocoop+attributes"] is None and by_method["zeroshot"] is not None
        assert "CoCoOp + ATPrompt" in latex(entries)


def test_verify_compares_with_the_dense_computation(capsys):
    command = "verify --model demo --k 2 --attributes shape digit --backend torch --precision fp64 --steps 1"
    assert cli.run([*command.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["within"] and found["attributes"] == ["shape", "digit"]
    assert cli.run(["verify", "--attributes"]) == 2
    assert "list them" in capsys.readouterr().err


def test_the_rows_of_a_table_without_attributes_begin_from_words_all_the_same(tmp_path):
    """Attributes imply random vectors, but only where they are."""
    built = configuration.build(pairs=["prompt.attributes=shape,color"], protocol=True).config
    rows = {
        name: with_method(built, name, tmp_path).prompt
        for name in ("cocoop", "cocoop+no-image", "cocoop+attributes")
    }
    assert rows["cocoop"].ctx_init == rows["cocoop+no-image"].ctx_init == "a photo of a"
    assert rows["cocoop+attributes"].ctx_init == ""
    assert rows["cocoop+attributes"].attributes == ("shape", "color")
    assert rows["cocoop"].attributes == ()
