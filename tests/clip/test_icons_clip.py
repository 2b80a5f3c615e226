"""The icons CLIP, and the script that trains it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cocoop_fast.cli import run
from cocoop_fast.clip.demo import DEMO_CLIPS

TOOLS = Path(__file__).parents[2] / "tools"


def stop_after(times, step):
    """``step``, which is interrupted when it is called once more."""
    done = []

    def interrupted(*args, **kwargs):
        if len(done) == times:
            raise KeyboardInterrupt
        done.append(step(*args, **kwargs))

    return interrupted


@pytest.fixture
def script(monkeypatch):
    if importlib.util.find_spec("qtawesome") is None:
        pytest.skip("needs qtawesome")
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("pretrain_icons_clip", TOOLS / "pretrain_icons_clip.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_script_draws_in_no_font_of_the_data_set_and_goes_on_where_it_was(
    script, tmp_path, monkeypatch, capsys
):
    """Interrupted after a step, it ends with the bits of a run that was not."""
    drawn_in = set()
    truetype = script.ImageFont.truetype
    monkeypatch.setattr(
        script.ImageFont, "truetype", lambda path, size: drawn_in.add(Path(path).stem) or truetype(path, size)
    )
    few = ["--every", "60", "--batch", "8", "--threads", str(torch.get_num_threads())]
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    script.main([*few, "--steps", "2", "--out", str(whole)])
    assert {name.rsplit("-", 1)[0] for name in drawn_in} == set(script.FONTS)
    assert not set(script.FONTS) & {stem for stem, _ in script.icons.STYLES.values()}

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop_after(1, torch.optim.AdamW.step))
        with pytest.raises(KeyboardInterrupt):
            script.main([*few, "--steps", "2", "--log-every", "1", "--out", str(parts)])
    script.main([*few, "--steps", "2", "--log-every", "1", "--out", str(parts)])
    assert "goes on after step 1" in capsys.readouterr().out
    first, second = load_file(whole), load_file(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    script.main(["--evaluate", "--every", "60", "--out", str(parts)])
    assert "held-out names" in capsys.readouterr().out


def test_it_is_small_and_knows_drawings_that_it_never_saw(tmp_path, capsys):
    """Base and new classes, zero-shot: between a third and seven tenths, so that there is something to learn."""
    if importlib.util.find_spec("qtawesome") is None:
        pytest.skip("needs qtawesome")
    assert DEMO_CLIPS["icons"].path.stat().st_size <= 6e6
    call = ["run", "base2new", "--datasets", "icons", "--methods", "zeroshot", "--seeds", "1"]
    assert run([*call, "-q", "--json", "-o", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["model.name"] == "icons"  # chosen by the data set
    accuracy = found["cells"][0]["accuracy"]
    assert all(35 < accuracy[subset] < 70 for subset in ("base", "new"))
