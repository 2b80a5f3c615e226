"""What plots show, beside what the page's tests see of them."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.report import figures
from cocoop_fast.report.contexts import Shifts


def test_twelve_classes_are_told_apart_and_new_ones_are_hollow(monkeypatch):
    pytest.importorskip("matplotlib", reason="a report needs matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "picture", lambda figure, name, **words: drawn.append((figure, words)))
    names = tuple(f"class {k}" for k in range(12))
    figures.shift_plane(
        Shifts(torch.randn(36, 2).double(), (0.5, 0.2), torch.zeros(1), 1.0, torch.arange(36) % 12, names, 7),
        "shifts",
    )
    [(figure, words)] = drawn
    named = [one for one in figure.axes[0].collections if one.get_label() in names]
    assert [one.get_label() for one in named] == list(names)
    forms = {one.get_paths()[0].vertices.tobytes() for one in named}
    assert len(forms) == 12  # without colour as well
    assert [len(one.get_facecolor()) == 0 for one in named] == [k >= 7 for k in range(12)]
    assert "Filled: classes trained on; hollow: new ones." in words["caption"]
