"""Thousands of damaged and hostile files: each is read as what it is or refused in a sentence, and nothing else happens.

The whole runs with ``-m soak``; of it a hundredth, or a little more, in the ordinary tests.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import resource
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from damage import damaged, hostile_files, pictures
from safetensors.torch import save_file
from tiny_models import tiny_clip
from tiny_runs import write_images
from torch import nn

from cocoop_fast.cli.configuration import build
from cocoop_fast.cli.options import class_list
from cocoop_fast.clip.checkpoints import WeightsError, read_state
from cocoop_fast.clip.weights import create_clip
from cocoop_fast.config import DataConfig, from_mapping, load_yaml, to_mapping
from cocoop_fast.data import Sample, image_list, load_dataset
from cocoop_fast.data.class_names import read_class_names
from cocoop_fast.data.few_shot_files import read_few_shot
from cocoop_fast.data.images import FileReader, ImageError
from cocoop_fast.data.reference_cache import read_reference_cache
from cocoop_fast.data.sets.mat_files import read_mat
from cocoop_fast.data.split_file import read_split
from cocoop_fast.errors import UserError
from cocoop_fast.files import inert_pickle
from cocoop_fast.files.tensors import TensorFiles
from cocoop_fast.report.sources import read_sources
from cocoop_fast.runs import checkpoint, reference_checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.training import rng as random_states

REFUSALS = (UserError, WeightsError)
DIGITS = load_dataset(DataConfig())


def whole_or(share: float):
    """All of an attack, or this share of it."""
    return pytest.mark.parametrize(
        "share", [pytest.param(1.0, marks=pytest.mark.soak), share], ids=["all", "some"]
    )


def ends_well(call, *arguments):
    """What a call returns, or None and a sentence."""
    try:
        return call(*arguments)
    except REFUSALS as error:
        assert 0 < len(str(error)) < 6100 and getattr(error, "exit_status", 1) in (1, 2)
        return None


@pytest.mark.filterwarnings("ignore")  # Pillow's about damaged tags
@whole_or(0.01)
def test_damaged_images(tmp_path, capfd, share):
    """28,000: an image or the reason why there is none, without a word of the libraries."""
    chosen, seen = random.Random(2), Counter()
    whole = pictures()
    for name in itertools.islice(itertools.cycle(whole), round(28_000 * share)):
        path = tmp_path / name
        content = damaged(chosen, whole[name])
        path.write_bytes(content)
        read = FileReader(tmp_path, as_stored=chosen.random() < 0.3)
        try:
            image = read(Sample(name, 0, "a"))
        except ImageError as error:
            seen[f"{name}: {'; '.join(str(error).split('; ')[:1])[:12]}"] += 1
        else:
            seen[f"{name}: read"] += 1
            assert image.mode == "RGB" and image.getpixel((0, 0)) is not None
        assert path.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == set(itertools.islice(whole, round(28_000 * share)))
    assert capfd.readouterr() == ("", "")
    with capfd.disabled():
        print(
            f"\n{seen.total()} images, {sum(n for key, n in seen.items() if key.endswith('read'))} of them read"
        )


def sample(step: int) -> Checkpoint:
    parameter = nn.Parameter(torch.randn(3, 5))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return Checkpoint(
        config={"seed": 1}, classnames=["cat", "dog"], data_fingerprint="abc", parameters={"ctx": parameter.detach().clone()},
        optimizer=optimizer.state_dict(), scaler={}, rng=random_states.capture(), epoch=2, batch=3, step=step, seconds=1.5,
    )  # fmt: skip


@whole_or(0.02)
def test_damaged_checkpoints(tmp_path, share):
    """1,000 of runs: what was whole stays, what is damaged is set aside, and none is read as something else."""
    chosen, read, folder = random.Random(3), 0, tmp_path / "checkpoints"
    kept = [checkpoint.save(folder, sample(1)).read_bytes(), checkpoint.save(folder, sample(2)).read_bytes()]
    before = checkpoint.load(folder / "step-0000000002.pt")
    for _ in range(round(1000 * share)):
        for path in folder.iterdir():
            path.unlink()
        content = damaged(chosen, kept[1])
        (folder / "step-0000000001.pt").write_bytes(kept[0])
        (folder / "step-0000000002.pt").write_bytes(content)
        newest = checkpoint.load_newest(folder, lambda text: None)
        assert newest is not None and newest.step in (1, 2)
        if newest.step == 2:
            read += 1
            assert torch.equal(newest.parameters["ctx"], before.parameters["ctx"])
            momentum = [one.optimizer["state"][0]["momentum_buffer"] for one in (newest, before)]
            assert torch.equal(*momentum) and torch.equal(newest.rng["torch"], before.rng["torch"])
            assert (newest.epoch, newest.batch, newest.config) == (before.epoch, before.batch, before.config)
        else:
            checkpoint.save(folder, sample(3))
            assert (folder / "step-0000000001.pt").read_bytes() == kept[0]
            assert (folder / "step-0000000002.pt.set-aside").read_bytes() == content
    print(f"{round(1000 * share)} checkpoints, {read} of them whole")


@whole_or(0.02)
def test_damaged_weights(tmp_path, share):
    """300: the reference's checkpoints, and CLIPs as three formats have them. Altered numbers are numbers."""
    chosen, state = (
        random.Random(4),
        {"a." + key: value for key, value in tiny_clip(layers=1).state_dict().items()},
    )
    learned = {"state_dict": {"ctx": torch.ones(4, 8)}, "epoch": 3, "optimizer": {"state": {}}}
    makers = {
        "model.pth.tar-3": lambda path: torch.save(learned, path),
        "clip.pt": lambda path: torch.save(state, path),
        "old.pt": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "clip.safetensors": lambda path: save_file(state, path),
    }
    for name in itertools.islice(itertools.cycle(makers), round(300 * share)):
        path = tmp_path / name
        if not (tmp_path / f"{name}.whole").exists():
            makers[name](tmp_path / f"{name}.whole")
        path.write_bytes(damaged(chosen, (tmp_path / f"{name}.whole").read_bytes()))
        ends_well(reference_checkpoint.load, path)
        found = ends_well(read_state, path)
        assert found is None or all(isinstance(value, torch.Tensor) for value in found.values())


THEIRS = """
DATASET: {NAME: OxfordPets, NUM_SHOTS: 16}
MODEL: {BACKBONE: {NAME: ViT-B/16}}
OPTIM: {NAME: sgd, LR: 0.002, MAX_EPOCH: 10, WARMUP_TYPE: constant, WARMUP_EPOCH: 1}
TRAINER: {COCOOP: {N_CTX: 4, CTX_INIT: a photo of a, PREC: fp16}}
INPUT: {SIZE: '(224, 224)', INTERPOLATION: bicubic, TRANSFORMS: '["random_resized_crop", "random_flip", "normalize"]'}
"""
VALUES = [
    "9" * 3000,
    "2020-99-99",
    "[" * 200,
    "&a [*a]",
    "!!int x",
    "1e999",
    ".nan",
    "{a: {b: c}}",
    '"\\x1b"',
    "~",
    "0x" + "f" * 99,
]


@whole_or(0.02)
def test_damaged_configurations(tmp_path, share):
    """400, ours and the reference's."""
    chosen, path, taken = random.Random(5), tmp_path / "x.yaml", 0
    ours = yaml.safe_dump(
        to_mapping(from_mapping({"data": {"shots": 2}, "optim": {"epochs": 3}, "prompt": {"n_ctx": 4}}))
    )
    for number in range(round(400 * share)):
        text = (ours, THEIRS)[number % 2].encode()
        content = damaged(chosen, text)
        if number % 4 < 2:  # a good file but for one value
            lines = text.decode().splitlines()
            at = chosen.choice([i for i, line in enumerate(lines) if ":" in line])
            lines[at] = f"{lines[at].partition(':')[0]}: {chosen.choice(VALUES)}"
            content = "\n".join(lines).encode()
        path.write_bytes(content)
        configuration = ends_well(build, [path], {"prompt.method": ("--method", "cocoop")})
        if configuration is not None:
            taken += 1
            if configuration.config.data.name == "digits":
                ends_well(resolve, configuration.config, DIGITS)
        assert path.read_bytes() == content
    print(f"{round(400 * share)} configurations, {taken} of them taken")


@whole_or(0.06)
def test_damaged_lists(tmp_path, share):
    """200 of five forms: a data set of images below the folder, or a sentence."""
    chosen, names, taken = random.Random(6), ["cat", "dog"], 0
    for name in names:
        write_images(tmp_path / name, 5)
    rows = [[f"{name}/{i:03d}.png", name, str(label), split] for label, name in enumerate(names)
            for i, split in enumerate(["train", "train", "val", "test", "test"])]  # fmt: skip
    header = ["path", "classname", "label", "split"]

    def table(delimiter: str) -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([header, *rows])
        return text.getvalue()

    objects = [{**dict(zip(header, row, strict=True)), "label": int(row[2])} for row in rows]
    split = {
        part: [[row[0], int(row[2]), row[1]] for row in rows if row[3] == part]
        for part in ("train", "val", "test")
    }
    forms = {
        "a.csv": table(","), "b.tsv": table("\t"), "c.json": json.dumps(objects), "d.json": json.dumps(split),
        "e.jsonl": "\n".join(map(json.dumps, objects)),
    }  # fmt: skip
    for name in itertools.islice(itertools.cycle(forms), round(200 * share)):
        path = tmp_path / name
        content = damaged(chosen, forms[name].encode())
        path.write_bytes(content)
        found = ends_well(image_list.load, DataConfig(name="list", root=path))
        if found is not None:
            taken += 1
            for one in (*found.train, *found.val, *found.test):
                assert (tmp_path / str(one.source)).resolve().is_relative_to(tmp_path)
        assert path.read_bytes() == content
    print(f"{round(200 * share)} lists, {taken} of them taken")


def in_a_run(name):
    """Readers of a run's directory, of which one file is hostile."""

    def read(path: Path) -> None:
        run = path.parent / "run"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(to_mapping(from_mapping({}))))
        target = run / name
        target.write_bytes(path.read_bytes())
        try:
            ends_well(read_sources, [run])
            ends_well(read_run, run)
        finally:
            target.unlink()

    return read


def in_a_folder(name):
    def read(path: Path) -> None:
        folder = path.parent / "weights"
        folder.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
        target = folder / name
        target.write_bytes(path.read_bytes())
        try:
            create_clip(str(folder), None)
        finally:
            target.unlink()

    return read


def kept_tensors(path: Path) -> None:
    (path.parent / f"features-{'a' * 24}.safetensors").write_bytes(path.read_bytes())
    assert TensorFiles(path.parent).find("features", "a" * 24) is None


def image(path: Path) -> None:
    try:
        FileReader(path.parent)(Sample(path.name, 0, "a"))
    except ImageError as error:
        raise UserError(str(error)) from error


READERS = {
    "load_yaml": ("x.yaml", load_yaml),
    "configuration": ("x.yaml", lambda path: build([path])),
    "split": ("x.json", read_split),
    "few-shot sample": ("x.json", lambda path: read_few_shot(path, DIGITS, 1)),
    "few-shot cache": ("x.pkl", read_reference_cache),
    "folder names": ("x.json", lambda path: read_class_names(path, ["a", "b"])),
    "folder names in lines": ("x.txt", lambda path: read_class_names(path, ["a", "b"])),
    "class names": ("x.txt", lambda path: class_list([f"@{path}"])),
    **{
        f"list {ending}": (f"x{ending}", lambda path: image_list.load(DataConfig(name="list", root=path)))
        for ending in image_list.ENDINGS
    },
    "checkpoint": ("step-0000000001.pt", checkpoint.load),
    "checkpoint of the reference": ("model.pth.tar-1", reference_checkpoint.load),
    "weights": ("x.pt", read_state),
    "weights in safetensors": ("x.safetensors", read_state),
    "weights in parts": ("model.safetensors.index.json", read_state),
    "features": ("x.safetensors", kept_tensors),
    "image": ("x.png", image),
    "MATLAB file": ("x.mat", lambda path: read_mat(path, "labels", list)),
    **{f"{name} of a run": ("x", in_a_run(name)) for name in ("config.yaml", "results.json", "metrics.jsonl", "checkpoints/step-0000000001.pt")},
    **{f"{name} of weights": ("x", in_a_folder(name)) for name in ("open_clip_config.json", "config.json", "preprocessor_config.json")},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@whole_or(0.01)
def test_hostile_files(tmp_path, monkeypatch, share):
    """Every reader with every one of them."""
    monkeypatch.setattr(
        inert_pickle, "MAX_OPERATIONS", 50_000
    )  # for a test of minutes; 2,000,000 take 500 MB at most
    files = hostile_files()
    pairs = list(itertools.product(files, READERS))
    if share < 1:
        pairs = [(name, reader) for name, reader in pairs if "bomb" not in name and reader != "MATLAB file"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, contents, failed = (0.0, "", ""), {}, []
    for number, (name, reader) in enumerate(
        sorted(random.Random(7).sample(pairs, round(len(pairs) * share)))
    ):
        if name not in contents:
            contents = {name: files[name]()}
        folder = tmp_path / str(number)
        folder.mkdir()
        ending, read = READERS[reader]
        path = folder / ending
        path.write_bytes(contents[name])
        began = time.monotonic()
        try:
            ends_well(read, path)
        except Exception as error:
            failed.append(f"{reader} with {name!r}: {error!r:.300}")
        slowest = max(slowest, (time.monotonic() - began, reader, name))
        assert path.read_bytes() == contents[name]
        path.unlink()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) / 1e6
    print(f"{len(pairs)} pairs; the slowest {slowest}; {grown:.1f} GB more at most")
    assert not failed, "\n".join(failed)
    assert grown < 1.5


def test_what_was_found(tmp_path):
    """Sentences where there were tracebacks: a header of a megabyte, lists for objects, numbers and folders for names."""
    for name, content, says in [
        ("x.csv", "x" * 200_000, "x.csv is not a table: field larger than field limit"),
        ("w.safetensors.index.json", '{"weight_map": {"a": 1}}', "is damaged"),
        ("v.safetensors.index.json", '{"weight_map": {"a": "../x"}}', "'../x', which is no file beside it"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(REFUSALS, match=says):
            image_list.load(DataConfig(name="list", root=tmp_path / name)) if ".csv" in name else read_state(
                tmp_path / name
            )
    (tmp_path / "x").write_text('{"model_cfg": []}')
    with pytest.raises(WeightsError, match="has no `model_cfg` with embed_dim"):
        in_a_folder("open_clip_config.json")(tmp_path / "x")
    with pytest.raises(UserError) as error:
        class_list(["x" * 1_000_000])
    assert len(str(error.value)) < 6100 and str(error.value).endswith("a file with one a line.")
