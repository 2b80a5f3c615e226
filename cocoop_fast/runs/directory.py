"""The directory of a run: what is in it, whether it may be used, and that one process uses it.

config.yaml       the resolved configuration; written first, so a directory with it is a run
log.txt           in the reference's wording; test_<subset>/log.txt for classes not trained on
metrics.jsonl     the same and more, at full precision, one JSON object a line
few_shot/         which images were drawn, of all classes
views/            features of the fixed views, with data.cache_views
checkpoints/      what is learned, and all that a resumed run needs
prompt_learner/   the final model in the reference's format
tensorboard/      event files, with --tensorboard
results.json      written last, so a directory with it is finished
"""

from __future__ import annotations

import errno
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

import yaml
from filelock import Timeout

from cocoop_fast.config import ResolvedConfig, Subset, flatten, load_yaml, resolved_from_mapping, to_mapping
from cocoop_fast.data.registry import REGISTRY
from cocoop_fast.errors import UserError
from cocoop_fast.files.atomic import write_atomically, write_json
from cocoop_fast.files.lock import folder_locked, locked
from cocoop_fast.files.parsing import json_value
from cocoop_fast.files.provenance import provenance
from cocoop_fast.runs import checkpoint
from cocoop_fast.runs.checkpoint import Checkpoint

# Where a run is, and how its work is spread and reported, may change between two sessions of it. (The images that are
# trained on may not: checkpoints hold their fingerprint.)
_FREE = (
    "output_dir", "print_freq", "checkpoint_steps", "eval_batch_size", "data.root", "data.few_shot", "data.workers",
    "model.device", "model.backend", "model.image_backend", "model.memory_budget", "model.cuda_graph", "model.shard",
    "optim.on_nonfinite",
)  # fmt: skip
# What a run writes, by folder: a pattern of whole file names. --overwrite deletes this and nothing else.
_WRITTEN = {
    ".": r"results\.json|log\.txt|metrics\.jsonl",  # config.yaml stays to the last
    "few_shot": r"shot_\d+-seed_\d+-[0-9a-f]+\.json",
    "views": r".+-[0-9a-f]{24}\.(safetensors|lock)",
    "checkpoints": r"step-\d{10}\.pt(\.set-aside)?",
    "prompt_learner": r"checkpoint|model\.pth\.tar-\d+",
    "tensorboard": r"events\.out\.tfevents\..+",
    # Subsets of classes, and other data sets that a protocol tests on.
    **{f"test_{name}": r"results\.json|log\.txt" for name in (*get_args(Subset), *REGISTRY)},
}
_FILES = ("config.yaml", "log.txt", "metrics.jsonl", "results.json")
_FOLDERS = ("few_shot", "views", "checkpoints", "prompt_learner", "tensorboard")


DELETION_SECONDS = 0.5  # that somebody's deletion of a run directory may take


class RunDirectory:
    """The places in a run directory, as it is when this object is made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity = _identity(path)
        self.checkpoints = path / "checkpoints"
        self.few_shot = path / "few_shot"
        self.views = path / "views"
        self.prompt_learner = path / "prompt_learner"

    def refuse_gone(self, missing: BaseException | None = None) -> None:
        """To be called before anything is written while a run goes on, and after that failed.

        Args:
            missing: why it failed; if a file was not there, a deletion may be under way, which is waited for.

        Raises:
            UserError: the directory was deleted, emptied, or replaced by another one.
        """
        if isinstance(missing, FileNotFoundError):
            time.sleep(DELETION_SECONDS)
        same = self._identity == _identity(self.path)
        if not same or not (self.path / "config.yaml").exists():
            if same:
                self._delete_remains()
            raise UserError(
                f"The run directory {self.path} was deleted or replaced while the run went on, so nothing more is written; "
                "run the same command to begin again.",
                exit_status=1,
            )

    def _delete_remains(self) -> None:
        """While somebody deleted the directory, one more checkpoint may have been written, so that folders stayed."""
        left = [path for path in self.path.rglob("*") if not path.is_dir()]
        if all(path.parent == self.checkpoints for path in left) and len(left) <= 1:
            with suppress(OSError):
                for path in left:
                    path.unlink()
                self.checkpoints.rmdir()
                self.path.rmdir()

    def results(self) -> dict[str, Any] | None:
        """What ``results.json`` holds; ``None`` if the run is not finished (or the file is damaged)."""
        try:
            return json_value((self.path / "results.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_results(self, results: dict[str, Any]) -> None:
        """Atomically replace ``results.json``. What was made before keeps the provenance that it has.

        Raises:
            OSError: the directory is not there.
        """
        write_json(self.path / "results.json", {"provenance": provenance(), **results})


@contextmanager
def open_run(config: ResolvedConfig, *, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Create the directory of a configuration, or open it again, for this process alone.

    Args:
        config: of the run; its ``output_dir`` is the directory.
        overwrite: discard the run that is there.

    Raises:
        UserError: the directory holds another run or other files of these names, is in use, or cannot be
            written.
    """
    path = config.output_dir
    directory: RunDirectory | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_links(path)
        _refuse_foreign(path)
        with locked(path / ".lock", wait=False), folder_locked(path):
            if overwrite:
                _discard(path)
            _claim(path, to_mapping(config))
            directory = RunDirectory(path)
            yield directory
    except Timeout as error:
        raise UserError(
            f"Another process is running in {path}; wait for it, or choose another output directory.",
            exit_status=1,
        ) from error
    except OSError as error:
        if not isinstance(error.filename, str) or not Path(error.filename).is_relative_to(path):
            raise
        if directory is not None:
            directory.refuse_gone(error)
        advice = "; free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        raise UserError(
            f"The output directory {path} cannot be used: {error.strerror} ({error.filename}){advice}.",
            exit_status=1,
        ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a directory from another of the same name; ``None`` if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def read_run(path: Path | str) -> tuple[ResolvedConfig, Checkpoint]:
    """The configuration of a run and its newest checkpoint. A warning tells of newer ones that cannot be used.

    Raises:
        UserError: no run there, no checkpoint yet, or damaged files.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is not a run directory (it has no config.yaml); pass the output of a training run."
        )
    config = resolved_from_mapping(load_yaml(path / "config.yaml"), where=str(path / "config.yaml"))
    found = checkpoint.load_newest(path / "checkpoints", lambda text: warnings.warn(text, stacklevel=4))
    if found is None:
        raise UserError(
            f"The run in {path} has no checkpoint yet; let its first epoch finish.", exit_status=1
        )
    return config, found


def refuse_link(path: Path) -> None:
    """A run writes through no symbolic link, but for the output directory itself, which the user named.

    Raises:
        UserError: the path is one.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a symbolic link, and a run writes through none; replace it by what it leads to, or choose "
            "another output directory.",
            exit_status=1,
        )


def check_same_run(there: dict[str, Any], here: dict[str, Any], where: Path) -> None:
    """Compare two configurations, as plain values, in all that decides a result.

    Raises:
        UserError: naming the fields that differ.
    """
    old, new = dict(flatten(there)), dict(flatten(here))
    differing = [
        f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
        for name in {**old, **new}
        if name not in _FREE and old.get(name) != new.get(name)
    ]
    if differing:
        more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{where} holds a run with another configuration ({', '.join(differing[:3])}{more}); choose "
            "another output directory, or discard that run with --overwrite."
        )


def _refuse_links(path: Path) -> None:
    """What a run writes must not lead elsewhere: somebody else may have prepared the directory.

    Raises:
        UserError: a name of a run's is a symbolic link, a device, a pipe, or a folder in place of a file.
    """
    for name in (".lock", *_FILES, *_FOLDERS):
        entry = path / name
        refuse_link(entry)
        if entry.exists() and not (entry.is_dir() if name in _FOLDERS else entry.is_file()):
            raise UserError(
                f"{entry} is not a {'folder' if name in _FOLDERS else 'file'}, so {path} is not a run; choose "
                "another output directory.",
                exit_status=1,
            )


def _refuse_foreign(path: Path) -> None:
    """A run uses a directory that has nothing by the names of a run's files, or that a run began.

    Raises:
        UserError: neither.
    """
    config_file = path / "config.yaml"
    if config_file.exists():
        try:
            resolved_from_mapping(load_yaml(config_file), where=str(config_file))
        except UserError as error:
            raise UserError(
                f"{path} has a config.yaml that no run of this version of cocoop_fast wrote, or that was damaged "
                f"since, so nothing there is resumed or deleted ({str(error).rstrip('.')}); choose another output "
                "directory."
            ) from error
        return
    found = [name for name in (*_FILES, *_FOLDERS) if name != "tensorboard" and (path / name).exists()]
    if found:
        raise UserError(
            f"{path} already has {found[0]} but no config.yaml, so it is not a run that can be resumed; "
            "choose another output directory."
        )


def _claim(path: Path, mapping: dict[str, Any]) -> None:
    config_file = path / "config.yaml"
    if config_file.exists():
        check_same_run(load_yaml(config_file), mapping, path)
    text = yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)
    write_atomically(config_file, lambda file: file.write(text.encode()))


def _discard(path: Path) -> None:
    """Delete what a run wrote, and nothing else.

    ``results.json`` goes first and ``config.yaml`` last: what a killed attempt leaves is an unfinished run.
    """
    for name, pattern in _WRITTEN.items():
        folder = path / name
        if folder.is_symlink() or not folder.is_dir():
            continue
        written = re.compile(rf"{pattern}|\.({pattern})(\.\d+)*\.tmp")
        entries = [one for one in folder.iterdir() if written.fullmatch(one.name) and not one.is_dir()]
        for entry in sorted(entries, key=lambda one: one.name != "results.json"):
            entry.unlink(missing_ok=True)
        if entries and folder != path and not any(folder.iterdir()):
            folder.rmdir()
    (path / "config.yaml").unlink(missing_ok=True)
