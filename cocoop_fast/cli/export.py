"""``cocoop-fast export``."""

from __future__ import annotations

from pathlib import Path

from cocoop_fast.cli import options, output
from cocoop_fast.errors import UserError


@options.command()
def command(
    run_dir: Path,
    *,
    onnx: Path | None = None,
    classes: list[str] | None = None,
    json: bool = False,
) -> None:
    """Write what a run has learned as one ONNX file, to be used without this package, and compare it with torch.

    Image tower and text side are in it: of CoCoOp the Meta-Net and the class tree, of CoOp and zero-shot CLIP the text
    features, which are the same for all images. The classes are fixed. Class names, image size, mean and standard deviation
    are in the file's metadata; the softmax of its logits are the probabilities.

    Args:
        onnx: The file to write.
        classes: Names separated by commas, or a file with one a line; may be repeated. Default: those the run was trained
            on.

    Examples:
        The classes of a run: export output/digits/cocoop/seed1 --onnx digits.onnx
        Classes of your own: export RUN_DIR --onnx pets.onnx --classes "tabby cat,red fox"
    """
    if onnx is None:
        raise UserError("Name the file to write: --onnx FILE.")
    names = options.class_list(classes)

    with output.loading():
        from cocoop_fast.experiments.onnx_export import export_onnx

    with output.only_json(json):
        done = export_onnx(run_dir, onnx, classnames=names)
    if json:
        values = {
            "file": str(done.file),
            "text": done.text,
            "nbytes": done.nbytes,
            "difference": done.difference,
        }
        output.print_json({"command": "export", "run_dir": str(run_dir), **values})
        return
    text = "the class tree is computed for each image" if done.text == "tree" else "text features are fixed"
    output.say(f"Written: {done.file}, {done.nbytes / 1e6:.1f} MB; {text}")
    output.say(
        f"Logits by onnxruntime and by torch differ by at most {done.difference:.1g} on random images."
    )
