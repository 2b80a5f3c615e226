"""Whatever stands in a configuration, a result, a metric or a checkpoint: a value, or a sentence with status 1 or 2."""

from __future__ import annotations

import datetime
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import loaded_tiny_clip, tiny_config, use_tiny_clip

from cocoop_fast.cli.configuration import build, field_names
from cocoop_fast.config import DataConfig, from_mapping, load_yaml
from cocoop_fast.data import load_dataset
from cocoop_fast.data.listing import read_json
from cocoop_fast.errors import UserError
from cocoop_fast.experiments import experiment
from cocoop_fast.methods import build_model
from cocoop_fast.report.sources import read_sources
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.recipe import resolve

SELF: list = []
SELF.append(SELF)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**300, 2**63, 2**64, -1, 0, 10**18]),
    st.floats(),
    st.sampled_from([1e308, 5e-324, math.inf, math.nan]),
    st.text(max_size=20),
    st.sampled_from(["٣", "३GB", "1e999GB", "\ud800", "\x1b]0;x\x07", "a\0b", "9" * 5000, "cuda:99999999999", "~", "{0}", "{}{"]),
    st.binary(max_size=8),
    st.dates(),
    st.datetimes(),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.sampled_from([SELF, {1: 2}, object(), datetime.date(1, 1, 1)]),
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "2020-99-99",
            "0001-01-01T00:00:00+23:59",
            "9" * 5000,
            "0x" + "f" * 5000,
            "1:" * 3000 + "1",
            "&a [*a]",
            "&a {<<: *a}",
            "[" * 3000,
            "{a: " * 500,
            "&a [x, x]\nb: [*a, *a]",
            "!!int abc",
            "!!float abc",
            "!!bool abc",
            "!!python/object/apply:os.system [true]",
            "? [a]\n: b",
            "=",
            "!!binary a",
            "!!timestamp x",
            "1e999",
            ".nan",
            "\x1b[2J",
        ]
    ),
)
LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
)
DIGITS = load_dataset(DataConfig())
quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ends_well(call, *arguments):
    """What a call returns, or a sentence."""
    try:
        return call(*arguments)
    except UserError as error:
        assert error.exit_status in (1, 2) and len(str(error)) < 2000
        return None


@quick
@given(field=st.sampled_from(field_names()), value=VALUES)
def test_every_field_of_the_configuration(field, value):
    section, _, name = field.rpartition(".")
    nested = {section: {name: value}} if section else {name: value}
    config = ends_well(from_mapping, nested)
    ends_well(build, None, {field: ("--option", value)})
    if config is not None and config.data.name == "digits":
        ends_well(resolve, config, DIGITS)


@pytest.mark.parametrize("field", ["root", "shots", "name", "skip_bad_images"])
def test_values_that_python_itself_does_not_write(field):
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(UserError, match=field):
        from_mapping({"data": {field: deep}})
    with pytest.raises(UserError, match=field):
        from_mapping({"data": {field: [10**5000]}})


@quick
@given(field=st.sampled_from(field_names()), text=TEXTS)
def test_every_text_in_a_file_and_on_the_command_line(tmp_path, field, text):
    section, _, name = field.rpartition(".")
    for content in (text, f"{name}: {text}\n", f"{section}: {{{name}: {text}}}\n" if section else text):
        (tmp_path / "x.yaml").write_text(content, encoding="utf-8", errors="surrogatepass")
        ends_well(build, [tmp_path / "x.yaml"])
    ends_well(build, None, None, [field, text])


@pytest.mark.parametrize(
    "text", [LAUGHS, "seed: " + "9" * 5000, "seed: 2020-99-99", "[" * 5000, "a: &a [*a]", "seed: !!int x"]
)
def test_a_file_is_named_in_the_sentence(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml cannot be used: it "):
        load_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": ' * 2000, "[1,", "\ufeff"])
def test_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json cannot be used: it "):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "names", [None, 5, "cat", [], [None], ["a", 3], [["a"]], iter("ab"), {"a": 1, "b": 2}, ["a", "b"]]
)
def test_class_names_that_are_none(names):
    """Names that are refused in the sentence; a mapping or a generator is none either."""
    model = ends_well(build_model, from_mapping({}).prompt, names, loaded_tiny_clip())
    assert model is None or model.prompt_learner.n_cls == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_clip(patch)
        experiment.run(tiny_config(folder, optim__epochs=1))
    return folder


PLAIN = VALUES.filter(lambda value: ends_json(value) is not None)


def ends_json(value):
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None


def places(value, where=()):
    """Every place in nested values."""
    yield where
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield from places(child, (*where, key))


def altered(value, where, new):
    if not where:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[where[0]] = altered(value[where[0]], where[1:], new)
    return copy


@quick
@given(data=st.data())
def test_results_and_metrics_with_other_types(finished, data):
    for name in ("results.json", "metrics.jsonl"):
        file = finished / name
        text = file.read_text()
        rows = [json.loads(line) for line in text.splitlines()] if name[-1] == "l" else json.loads(text)
        where = data.draw(st.sampled_from(list(places(rows))))
        new = altered(rows, where, data.draw(PLAIN))
        lines = new if name[-1] == "l" and isinstance(new, list) else [new]
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")
        try:
            ends_well(read_sources, [finished])
        finally:
            file.write_text(text)


@settings(quick, max_examples=8)
@given(data=st.data())
def test_checkpoints_with_other_types(finished, monkeypatch, data):
    path = max((finished / "checkpoints").iterdir())
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    where = data.draw(st.sampled_from(list(places(content))))
    new = data.draw(PLAIN)
    torch.save(altered(content, where, new), path)
    try:
        ends_well(checkpoint.load, path)
        ends_well(read_run, finished)
        if where[:1] in (("optimizer",), ("rng",), ("scaler",), ("epoch",), ("batch",), ("parameters",)):
            use_tiny_clip(monkeypatch)
            ends_well(experiment.run, tiny_config(finished, optim__epochs=1))
    finally:
        path.write_bytes(whole)
