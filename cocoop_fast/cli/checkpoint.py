"""``cocoop-fast checkpoint``: from and to the reference's files."""

from __future__ import annotations

import shlex
from pathlib import Path

from cocoop_fast.cli import configuration, options, output
from cocoop_fast.cli.options import Given
from cocoop_fast.errors import UserError

app = options.group(
    """Import and export what the reference implementation calls prompt_learner/model.pth.tar-N; share what was learned.

    Examples:
        Go on with a run that the reference began: checkpoint import output/seed1 -c eurosat.yaml
            -c vit_b16_c4_ep10_batch1_ctxv1.yaml --root DATA -o runs/eurosat
        Give a run to somebody who uses the reference: checkpoint export runs/eurosat -o output/seed1
        Give what a run learned to anybody: checkpoint share runs/eurosat -o eurosat-prompt
        Put it on the Hugging Face hub: checkpoint share runs/eurosat --push OWNER/NAME
    """,
    no_args_is_help=True,
)


@app.command("import")
@options.command(fields="data.name data.root model.name model.pretrained seed output_dir")
def import_(
    file: Path,
    pairs: list[str] | None = None,
    *,
    config: list[Path] | None = None,
    given: Given,
    trainer: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Make a run directory that `train` goes on with, from a checkpoint of the reference.

    The options and files say how it was trained. What was learned, the momentum and the place in the schedule are
    taken over. No code in the file is run.

    Args:
        file: A model.pth.tar-N, or the folder that holds it.
        trainer: The reference's name of the method: CoCoOp or CoOp. Default: the file's.
        overwrite: Discard a run that is there.
    """
    built = configuration.build(config, given, pairs)
    output.warn(built.warnings)

    from cocoop_fast.experiments.reference_import import import_checkpoint

    with output.only_json(json):
        folder, epochs = import_checkpoint(built.config, file, overwrite=overwrite)
    if json:
        output.print_json({"command": "checkpoint import", "run_dir": str(folder), "epochs": epochs})
    else:
        written = shlex.quote(f"{folder}/config.yaml")
        output.say(f"Epoch {epochs} is done in {folder}. To go on: cocoop-fast train -c {written}")


@app.command()
@options.command()
def export(run_dir: Path, *, output_: Path | None = None, json: bool = False) -> None:
    """Write a run's newest checkpoint so that the reference reads it.

    Args:
        output_: Folder for prompt_learner/. Default: RUN_DIR.
    """
    from cocoop_fast.experiments.reference_import import export_checkpoint

    with output.only_json(json):
        path = export_checkpoint(run_dir, output_)
    if json:
        output.print_json({"command": "checkpoint export", "path": str(path)})
    else:
        output.say(f"{path}")


@app.command()
@options.command()
def share(run_dir: Path, *, output_: Path | None = None, push: str | None = None, json: bool = False) -> None:
    """Write what a run learned to a folder of a few kilobytes, with a model card, or put it on the Hugging Face hub.

    `predict --run` takes the folder, or hf-hub:OWNER/NAME, as it takes a run.

    Args:
        output_: Folder to write.
        push: OWNER/NAME of a repository of the hub, made if need be.
    """
    if output_ is None and push is None:
        raise UserError(
            "Say where to put what was learned: --output FOLDER, or --push OWNER/NAME for the hub."
        )

    from cocoop_fast.experiments.predict import Predictor

    with output.only_json(json):
        predictor = Predictor.from_run(run_dir, device="cpu")
        folder = None if output_ is None else predictor.save_pretrained(output_)
        address = None if push is None else predictor.push_to_hub(push)
    if json:
        where = None if folder is None else str(folder)
        output.print_json({"command": "checkpoint share", "path": where, "address": address})
    else:
        output.say("\n".join(str(one) for one in (folder, address) if one is not None))
