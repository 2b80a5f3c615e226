"""Your own checkouts of CoOp, Dassl and any forks, with the engine and without: are the numbers the same?

    python tools/check_reference.py CoOp Dassl.pytorch [FORK ...]
    python tools/check_reference.py --double CoOp Dassl.pytorch      # the same where nothing rounds
    python tools/check_reference.py --digests CoOp      # what cocoop_fast.integrations.recognise knows the reference by

Each repository's own ``train.py`` is run on a small CLIP of its own ``clip`` package with random weights and on images made
for it, on the CPU. One epoch by itself gives a checkpoint; from there, both go on in lockstep:

* loss and learning rate of every step, and all that is learned in the end;
* checkpoints both ways: what each has written, the other one evaluates, with the same accuracy;
* the repository's ``parse_test_res.py`` on the directory that was written with the engine, if it reads its own.

With ``--double`` both compute in double precision: what is left of a difference there is no rounding.

What the repositories need (yacs, tabulate, gdown, ...) has to be installed; nothing is downloaded. The exit status is 1 if
anything differs.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EPOCHS, CLASSES, SHOTS = 6, 4, 16  # five epochs of 64 steps in lockstep, if nothing else is asked for
# Of losses and learned tensors, relative to the largest of each; in single and in double precision.
BOUND, BOUND_OF_DOUBLE = 2e-5, 1e-9
CHECKS = ("steps", "loss", "rate", "learned", "ours there", "theirs here", "parser")
NOT_READ = "does not read it"


def main(arguments: list[str]) -> int:
    """The comparison of all repositories. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("paths", nargs="+", type=Path, help="checkouts, in any order; one of them is Dassl's")
    parser.add_argument(
        "--digests", action="store_true", help="only print the digests of a repository's trainers"
    )
    parser.add_argument("--trainers", nargs="*", help="only those of these names")
    parser.add_argument("--double", action="store_true", help="in double precision, where nothing rounds")
    parser.add_argument(
        "--shots", type=int, default=SHOTS, help=f"images of each of the {CLASSES} classes, a step each"
    )
    parser.add_argument("--pairs", nargs="*", default=[], help="keys and values that a fork needs besides")
    given = parser.parse_args(arguments)
    paths = [path.resolve() for path in given.paths]
    dassls = [path for path in paths if (path / "dassl/engine").is_dir()]
    repositories = [path for path in paths if (path / "trainers").is_dir() and (path / "train.py").is_file()]
    if not repositories or not (dassls or given.digests):
        parser.error("give a folder with trainers/ and train.py, and one with dassl/engine")
    if given.digests:
        for repository in repositories:
            print_digests(repository)
        return 0
    rows = []
    for repository in repositories:
        for name, module in trainers_of(repository):
            if given.trainers and name not in given.trainers:
                continue
            row = {
                "trainer": f"{repository.name} {name}",
                **compare(
                    repository,
                    dassls[-1],
                    module,
                    name,
                    double=given.double,
                    shots=given.shots,
                    pairs=given.pairs,
                ),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    columns = ("trainer", "computed", *CHECKS)
    widths = [
        max(len(str(row.get(one, ""))) for row in [*rows, dict(zip(columns, columns, strict=True))])
        for one in columns
    ]
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print(
            "  ".join(str(row.get(one, "")).ljust(width) for one, width in zip(columns, widths, strict=True))
        )
    differing = any(not row["same"] for row in rows)
    if differing and not given.double:
        print("Where numbers alone differ: --double tells rounding, which training amplifies, from errors.")
    return int(differing)


def trainers_of(repository: Path) -> list[tuple[str, str]]:
    """(name, module) of the trainers that a repository registers and that have steps of their own."""
    found = []
    for path in sorted((repository / "trainers").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            registered = isinstance(node, ast.ClassDef) and any(
                "register" in ast.dump(one) for one in node.decorator_list
            )
            if registered and any(getattr(one, "name", "") == "forward_backward" for one in node.body):
                found.append((node.name, f"trainers.{path.stem}"))
    return found


def print_digests(repository: Path) -> None:
    """Of each part of a repository's trainers that decides what they compute."""
    sys.path.insert(0, str(ROOT))
    from cocoop_fast.integrations.recognise import METHODS, digest

    for name, module in trainers_of(repository):
        tree = ast.parse((repository / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        parts: dict[str, ast.AST | None] = {
            one: classes.get(one) for one in ("PromptLearner", "TextEncoder", "CustomCLIP")
        }
        parts |= {node.name: node for node in classes[name].body if getattr(node, "name", "") in METHODS}
        print(name, {part: digest(ast.unparse(node)) for part, node in parts.items() if node is not None})


def compare(repository: Path, dassl: Path, module: str, name: str, **common: Any) -> dict[str, Any]:
    """One trainer by itself and with the engine; `common` is what all runs are told."""
    with tempfile.TemporaryDirectory() as folder:

        def child(output: str, *, fast: bool, epochs: int = EPOCHS, **options: Any) -> dict[str, Any]:
            job = {
                "repository": str(repository), "dassl": str(dassl), "module": module, "trainer": name,
                "output": str(Path(folder, output)), "data": folder, "fast": fast, "epochs": epochs, **common, **options,
            }  # fmt: skip
            command = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(job)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
            result = Path(job["output"], "result.json")
            if done.returncode or not result.is_file():
                raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a result"])[-1])
            return {"printed": done.stdout, **json.loads(result.read_text())}

        try:
            child("start", fast=False, epochs=1)
            start = str(Path(folder, "start"))
            alone = child("alone/seed1", fast=False, resume=start)
            fast = child("fast/seed1", fast=True, resume=start)
            ours_there = child("ours-there", fast=False, evaluate=str(Path(folder, "fast/seed1")))
            theirs_here = child("theirs-here", fast=True, evaluate=str(Path(folder, "alone/seed1")))
        except RuntimeError as error:
            return {"computed": f"not compared: {str(error)[:100]}", "same": False}
        said = re.findall(r"^cocoop_fast: (trainer .*|the text encoder.*)$", fast["printed"], re.M)
        row: dict[str, Any] = {"computed": "; ".join(_short(line) for line in said), "said": said}
        row["steps"] = len(fast["losses"])
        row["loss"] = _difference([fast["losses"]], [alone["losses"]])
        row["rate"] = "equal" if fast["rates"] == alone["rates"] else "differs"
        row["learned"] = _learned_difference(Path(folder, "fast/seed1"), Path(folder, "alone/seed1"))
        row["ours there"] = "equal" if ours_there["accuracy"] == fast["accuracy"] else "differs"
        row["theirs here"] = "equal" if theirs_here["accuracy"] == alone["accuracy"] else "differs"
        row["parser"] = _parser(repository, dassl, Path(folder, "fast"), fast["accuracy"])
        if row["parser"] == _parser(repository, dassl, Path(folder, "alone"), alone["accuracy"]) == NOT_READ:
            row["parser"] = "reads neither"  # it waits for a line that its Dassl does not print
        row["same"] = (
            max(row["loss"], row["learned"]) <= (BOUND_OF_DOUBLE if common["double"] else BOUND)
            and len(fast["losses"]) == len(alone["losses"]) > 0
            and [row[one] for one in ("rate", "ours there", "theirs here")] == ["equal"] * 3
            and row["parser"] in ("reads it", "reads neither", "none")
        )
        row["loss"], row["learned"] = f"{row['loss']:.1e}", f"{row['learned']:.1e}"
        return row


def _short(line: str) -> str:
    kinds = {
        "computed whole": "whole",
        "by the tree": "at the seam",
        "left alone": "left alone",
        "own forward": "dense",
    }
    return next((short for words, short in kinds.items() if words in line), line)


def _difference(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=False)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def _learned_difference(one: Path, other: Path) -> float:
    from cocoop_fast.files.torch_archive import read_archive

    states = []
    for folder in (one, other):
        files = sorted(folder.glob(f"*/model.pth.tar-{EPOCHS}"))
        states.append(
            {
                (file.parent.name, name): value
                for file in files
                for name, value in read_archive(file)["state_dict"].items()
            }
        )
    mine, theirs = states
    if mine.keys() != theirs.keys() or not mine:
        return float("inf")
    return max(
        float((mine[key] - theirs[key]).abs().max() / theirs[key].abs().max().clamp(min=1e-30))
        for key in mine
    )


def _parser(repository: Path, dassl: Path, folder: Path, accuracy: float) -> str:
    """The repository's own result parser on a directory of ours."""
    if not (repository / "parse_test_res.py").is_file():
        return "none"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(dassl), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "parse_test_res.py", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=repository, env=environment, check=False
    )
    return "reads it" if f"accuracy: {round(accuracy, 1):.2f}%" in done.stdout else NOT_READ


# -- in a process of its own ------------------------------------------------------------------------------------------


def run_child(job: dict[str, Any]) -> None:
    """The repository's train.py, with what it cannot have here in its place: weights, images, a GPU."""
    sys.path[:0] = [job["repository"], job["dassl"], str(ROOT)]
    import importlib

    from cocoop_fast.integrations import dassl_repairs

    if job["fast"]:
        importlib.import_module("cocoop_fast.integrations.dassl")
    else:
        dassl_repairs.repair_dassl()
    importlib.import_module("dassl.data")
    _register_images(Path(job["data"], "images"), job["shots"])
    _one_precision(double=job["double"])
    importlib.import_module(job["module"])
    found = _record()

    trainer = job["trainer"]
    output = Path(job["output"])
    pairs = [
        "DATASET.NAME",
        "EuroSAT",
        "OPTIM.MAX_EPOCH",
        str(job["epochs"]),
        "TRAIN.CHECKPOINT_FREQ",
        "1",
    ]
    pairs += [
        "INPUT.SIZE",
        "(32, 32)",
        "DATALOADER.NUM_WORKERS",
        "0",
        "OPTIM.NAME",
        "sgd",
        "OPTIM.LR",
        "0.002",
    ]
    pairs += ["OPTIM.LR_SCHEDULER", "cosine", "OPTIM.WARMUP_EPOCH", "1", "OPTIM.WARMUP_TYPE", "constant"]
    pairs += ["DATALOADER.TRAIN_X.BATCH_SIZE", "1", "INPUT.TRANSFORMS", "('random_flip', 'normalize')"]
    sys.argv = [
        "train.py",
        "--trainer",
        trainer,
        "--seed",
        "1",
        "--output-dir",
        str(output),
        "--backbone",
        "ViT-B/16",
    ]
    if job.get("resume"):
        sys.argv += ["--resume", job["resume"]]
    if job.get("evaluate"):
        sys.argv += ["--eval-only", "--model-dir", job["evaluate"], "--load-epoch", str(EPOCHS)]
    sys.argv += pairs + job["pairs"]
    _single_precision()
    _without_gpu()
    _small_clip(Path(job["data"], "clip.pt"))
    runpy.run_path("train.py", run_name="__main__")
    sys.stdout.flush()
    (output / "result.json").write_text(json.dumps(found))


def _small_clip(path: Path) -> None:
    """What the repository's own CLIP is built from: few layers, with random weights from a seed."""
    import torch
    from clip import clip  # type: ignore[import-not-found]
    from clip.model import CLIP

    sizes: dict[str, Any] = {
        "embed_dim": 64, "image_resolution": 32, "vision_layers": 2, "vision_width": 64, "vision_patch_size": 8,
        "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1,
        "transformer_layers": 3,
    }  # fmt: skip
    # MaPLe and its descendants, whose learners know ViT-B/16's widths:
    if "design_details" in inspect.signature(CLIP).parameters:
        none = dict.fromkeys(("vision_depth", "language_depth", "vision_ctx", "language_ctx"), 0)
        sizes |= {"vision_width": 768, "transformer_width": 512, "transformer_heads": 8, "embed_dim": 512}
        sizes["design_details"] = {"trainer": "CoOp", **none}
    if not path.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = CLIP(**sizes)
            torch.nn.init.normal_(model.token_embedding.weight, std=0.3)
        torch.save(model.state_dict(), path)
    clip._download = lambda *_, **__: str(path)


def _register_images(folder: Path, shots: int) -> None:
    """A data set of Dassl's kind: images of one colour a class, and noise."""
    import numpy as np
    from dassl.data.datasets import DATASET_REGISTRY, DatasetBase, Datum  # type: ignore[import-not-found]
    from PIL import Image

    names = ["cat", "big_dog", "bullet train", "sky blue"][:CLASSES]
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)

    def images(split: str, count: int) -> list[Any]:
        items = []
        for label, name in enumerate(names):
            colour = rng.integers(40, 215, 3)
            for i in range(count):
                path = folder / f"{split}_{label}_{i}.png"
                pixels = np.clip(colour + rng.normal(0, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                if not path.exists():
                    Image.fromarray(pixels).save(path)
                items.append(Datum(impath=str(path), label=label, classname=name))
        return items

    class MadeForThis(DatasetBase):  # type: ignore[misc]
        def __init__(self, cfg: Any) -> None:
            train, test = images("train", shots), images("test", 10)
            super().__init__(train_x=train, val=test, test=test)

    DATASET_REGISTRY.registered_names = lambda: ["EuroSAT"]
    DATASET_REGISTRY.get = lambda name: MadeForThis  # under a name for which forks have their templates


def _record() -> dict[str, Any]:
    """Loss and rate of each step and the accuracy, of whatever trainer is built. Draws begin anew with each run, however it was built."""
    import torch
    from dassl.engine import TRAINER_REGISTRY  # type: ignore[import-not-found]

    found: dict[str, Any] = {"losses": [], "rates": []}
    get = TRAINER_REGISTRY.get

    def recorded(name: str) -> type:
        kind: Any = get(name)

        class Recorded(kind):  # type: ignore[misc]
            def before_train(self) -> None:
                super().before_train()
                torch.manual_seed(1)

            def forward_backward(self, batch: Any) -> Any:
                found["rates"].append(float(self.get_current_lr()))
                summary = super().forward_backward(batch)
                # of several losses the first
                found["losses"].append(next(float(one) for name, one in summary.items() if "loss" in name))
                return summary

            def test(self, *arguments: Any, **named: Any) -> Any:
                found["accuracy"] = super().test(*arguments, **named)
                return found["accuracy"]

        return Recorded

    TRAINER_REGISTRY.get = recorded
    return found


def _without_gpu() -> None:
    """``.cuda()`` in a fork's code, where there is none."""
    import torch

    if not torch.cuda.is_available():
        torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]


def _one_precision(*, double: bool) -> None:
    """Whoever asks for half precision gets single, which a CPU computes in, or double; so does who asks for single then."""
    import torch

    kind: Any
    for kind in (torch.Tensor, torch.nn.Module):
        if double:
            kind.float = kind.double
        kind.half = kind.float
    if double:
        from clip.model import LayerNorm

        torch.set_default_dtype(torch.float64)
        LayerNorm.forward = torch.nn.LayerNorm.forward  # whose own computes in single precision


def _single_precision() -> None:
    """Every trainer's PREC, whatever its section is called: a CPU computes in it."""
    from yacs.config import CfgNode  # type: ignore[import-not-found]

    freeze = CfgNode.freeze

    def freeze_in_fp32(cfg: Any) -> None:
        for section in cfg.TRAINER.values() if "TRAINER" in cfg else ():
            if isinstance(section, CfgNode) and "PREC" in section:
                section.PREC = "fp32"
        freeze(cfg)

    CfgNode.freeze = freeze_in_fp32


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(json.loads(sys.argv[2]))
    else:
        sys.path.insert(0, str(ROOT))
        raise SystemExit(main(sys.argv[1:]))
