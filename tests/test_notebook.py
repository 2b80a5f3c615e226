"""The notebook runs from top to bottom, as a reader would run it, and shows trees and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_promises(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="of the extra dev")
    nbclient = pytest.importorskip("nbclient", reason="of the extra dev")
    pytest.importorskip("ipykernel", reason="of the extra dev")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook, as_committed = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    committed = shown(as_committed)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    learner, loss, results, prediction = shown(notebook)
    assert "learned numbers" in learner["text/html"] and "<svg" in learner["text/html"]
    assert loss["text/plain"].startswith("loss ")
    assert ">cocoop, seed 1<" in results["text/html"] and ">zeroshot, seed 1<" in results["text/html"]
    assert prediction["text/plain"].startswith("[('digit three', ") and "image/png" in prediction
    # The committed outputs, which readers see without running anything, are of these cells.
    assert drawing(committed[0]) == drawing(learner) and "text/html" in committed[2]
    assert [len(one) > 0 for one in committed] == [True] * 4
    assert not any(
        output.get("name") == "stderr" for cell in as_committed.cells for output in cell.get("outputs", [])
    )


def drawing(output):
    return output["text/html"].partition("<svg")[2]


def shown(notebook):
    """What each cell of code shows, by kind; printed text is text/plain."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds = {}
            for output in cell.outputs:
                if output.output_type == "stream":
                    if output.name == "stdout":
                        kinds["text/plain"] = output.text
                else:
                    kinds = {**output.data, **kinds}
            found.append(kinds)
    return found
