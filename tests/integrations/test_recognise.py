"""By what the reference's trainers are recognised, and the tool that runs them beside ours."""

from __future__ import annotations

import importlib.util
import textwrap

import pytest
from dassl_stand_in import REPOSITORY, TESTS, forget

from cocoop_fast.integrations import recognise

CODE = """
class CustomCLIP(nn.Module):
    def forward(self, image, label=None):
        logits = self.scale * image
        return F.cross_entropy(logits, label)
"""
SAME = '''
class CustomCLIP(nn.Module):
    """Of a fork that says more."""

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        # and is laid out in another way
        logits = (self.scale
                  * image)
        print(f"logits of {len(image)}", logits.shape)
        return F.cross_entropy(logits, label)
'''


def test_what_is_said_does_not_count_and_what_is_computed_does():
    assert recognise.digest(CODE) == recognise.digest(SAME) == recognise.digest(textwrap.indent(CODE, "    "))
    for old, new in (("self.scale * image", "self.scale + image"), ("label=None", "label=0"), ("F.", "own.")):
        assert recognise.digest(CODE.replace(old, new)) != recognise.digest(CODE)
    written = CODE.replace("return F", "open('log', 'a').write('x')\n        return F")
    assert recognise.digest(written) != recognise.digest(CODE)


def test_a_trainer_is_the_references_only_in_all_its_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY))
    forget()
    import trainers.forks

    kind = trainers.forks.TCPT
    forms = {part: frozenset([form]) for part, form in recognise.parts(kind).items()}
    monkeypatch.setattr(recognise, "KNOWN", {"CoCoOp": forms})
    assert recognise.differences("CoCoOp", kind) == ()
    assert recognise.differences("CoOp", kind) == tuple(forms)
    # What forward_backward may call, and ours does not.
    own = type("CoCoOp", (kind,), {"model_update": lambda self: None, "__module__": "trainers.other"})
    assert recognise.differences("CoCoOp", own) == ("model_update",)
    other = type("CoCoOp", (kind,), {"forward_backward": lambda self, batch: {}})
    assert recognise.differences("CoCoOp", other) == ("forward_backward",)
    forget()


def test_every_part_of_the_references_trainers_is_known():
    parts = {"build_model", "forward_backward", "CustomCLIP", "PromptLearner", "TextEncoder"}
    assert {name: set(known) for name, known in recognise.KNOWN.items()} == {"CoCoOp": parts, "CoOp": parts}


def test_the_tool_reads_the_same_forms_from_files_as_the_import_from_classes(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "check_reference", TESTS.parent / "tools/check_reference.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert ("ProGrad", "trainers.forks") in tool.trainers_of(REPOSITORY)
    assert tool.main(["--digests", str(REPOSITORY)]) == 0
    printed = capsys.readouterr().out
    monkeypatch.syspath_prepend(str(REPOSITORY))
    forget()
    import trainers.cocoop

    forms = recognise.parts(trainers.cocoop.CoCoOp)
    line = next(line for line in printed.splitlines() if line.startswith("CoCoOp "))
    for part in recognise.METHODS:
        assert f"'{part}': '{forms[part]}'" in line
    forget()
    with pytest.raises(SystemExit):
        tool.main([str(REPOSITORY)])  # without a Dassl it cannot be run
