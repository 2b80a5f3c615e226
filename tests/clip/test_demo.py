"""The demo CLIP: its asset, its loader, its accuracy on real scans, and the script that trains it."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torchvision import transforms

from cocoop_fast.clip.demo import (
    DEMO_CLIPS,
    known_token_ids,
    load_demo_clip,
)
from cocoop_fast.config import EMBEDDED_CLIPS

DEMO = DEMO_CLIPS["demo"]
SIZE = DEMO.vision["image_size"]
ROOT = Path(__file__).parents[2]
NAMES = [f"digit {word}" for word in "zero one two three four five six seven eight nine".split()]  # noqa: SIM905


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return load_demo_clip()


def test_asset_is_small() -> None:
    assert DEMO.path.stat().st_size <= 3e6


def test_shapes_and_settings(model: open_clip.CLIP) -> None:
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.token_embedding.weight.shape == (49408, 128)
    assert model.visual.image_mean == (DEMO.image_mean,) * 3
    assert model.visual.image_std == (DEMO.image_std,) * 3
    with torch.no_grad():
        assert model.encode_image(torch.zeros(3, 3, SIZE, SIZE)).shape == (3, 128)
        assert model.encode_text(open_clip.tokenize(NAMES)).shape == (10, 128)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_context_can_move(model: open_clip.CLIP) -> None:
    """Learning rates tuned on CLIP need CLIP's scales: sharp logits and small token rows."""
    assert 49.9 <= model.logit_scale.exp() <= 100.1
    rows = model.token_embedding.weight[sorted(known_token_ids())]
    assert rows.std() < 0.05


def test_two_loads_are_equal_and_leave_the_random_state_alone(model: open_clip.CLIP) -> None:
    torch.manual_seed(1)
    again = load_demo_clip()
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    for (name, first), second in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_known_tokens() -> None:
    known = known_token_ids()
    sentences = [f"a photo of a {name}." for name in NAMES] + [
        "a photo of a letter a.",
        "a handwritten capital letter b.",
    ]
    ids = open_clip.tokenize(sentences)
    assert set(ids.flatten().tolist()) <= known
    assert not set(open_clip.tokenize(["zebra"])[0, 1:2].tolist()) <= known


def test_zero_shot_on_real_scans(model: open_clip.CLIP) -> None:
    """The test split, through the transform that the package uses; chance is 0.2."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    transform = transforms.Compose(
        [
            transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(model.visual.image_mean, model.visual.image_std),
        ]
    )
    scans = [
        Image.fromarray((scan * 255 / 16).astype("uint8")).convert("RGB") for scan in digits.images[800:]
    ]
    labels = torch.from_numpy(digits.target[800:]).long()
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(scan) for scan in scans]), normalize=True)
        texts = model.encode_text(
            open_clip.tokenize([f"a photo of a {name}." for name in NAMES]), normalize=True
        )
    for first in (0, 5):
        mine = (labels >= first) & (labels < first + 5)
        predicted = first + (images[mine] @ texts[first : first + 5].T).argmax(1)
        accuracy = (predicted == labels[mine]).float().mean().item()
        assert accuracy > 0.85, f"digits {first} to {first + 4}: {accuracy:.3f}"


def test_missing_asset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing: reinstall"):
        load_demo_clip(path=tmp_path / "none.safetensors")


def test_damaged_asset(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    shutil.copyfile(DEMO.path, damaged)
    with damaged.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_demo_clip(path=damaged)
    with pytest.raises(ValueError, match="cannot be loaded"):
        known_token_ids(path=damaged)


def test_asset_of_another_architecture(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(DEMO.path)
    weights.pop("text_projection")
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another architecture"):
        load_demo_clip(path=tmp_path / "other.safetensors")
    save_file({"text_projection": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="token rows"):
        load_demo_clip(path=tmp_path / "other.safetensors")


def test_a_configuration_knows_the_clips_that_there_are() -> None:
    assert set(EMBEDDED_CLIPS) == set(DEMO_CLIPS)


@pytest.mark.slow
def test_pretraining_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))  # as for a script that is run
    spec = importlib.util.spec_from_file_location(
        "pretrain_demo_clip", ROOT / "tools" / "pretrain_demo_clip.py"
    )
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    out = tmp_path / "tiny.safetensors"
    threads = str(torch.get_num_threads())
    arguments = [
        "--steps",
        "2",
        "--batch",
        "16",
        "--strokes-per-class",
        "4",
        "--threads",
        threads,
        "--out",
        str(out),
    ]
    with torch.random.fork_rng(devices=[]):
        script.main(arguments)
    assert "step 2/2" in capsys.readouterr().out
    assert known_token_ids(path=out) == known_token_ids()
    load_demo_clip(path=out)
    script.main(["--evaluate", "--out", str(out), "--threads", threads])
    assert "test digits (the other 997)" in capsys.readouterr().out
