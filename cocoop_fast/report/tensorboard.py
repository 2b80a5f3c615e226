"""TensorBoard event files of a training run."""

from __future__ import annotations

from typing import Any

from cocoop_fast.errors import UserError
from cocoop_fast.training.observer import EpochInfo, EvaluationInfo, Observer, RunInfo, StepInfo

FOLDER = "tensorboard"  # in the run directory


class TensorBoardLog(Observer):
    """Writes loss, accuracy, learning rate and speed of each step, means of each epoch, and test accuracies.

    A run that goes on after an interruption adds a file to the same folder, and TensorBoard shows one curve: what the
    interrupted session had logged beyond its last checkpoint is purged.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "TensorBoard files need the package tensorboard, which is not installed; run "
                "`pip install tensorboard`.",
                exit_status=1,
            ) from error
        self._new_writer = SummaryWriter
        self._writer: Any = None
        self._step = 0

    def on_run_start(self, info: RunInfo) -> None:
        self._step = info.first_step
        purge = info.first_step + 1 if info.first_step else None
        self._writer = self._new_writer(str(info.output_dir / FOLDER), purge_step=purge)

    def on_step(self, info: StepInfo) -> None:
        self._step = info.step
        self._add("step", info, "loss", "accuracy", "lr", "images_per_second")

    def on_epoch_end(self, info: EpochInfo) -> None:
        self._add("epoch", info, "loss", "accuracy")
        self._writer.flush()

    def on_evaluation_end(self, info: EvaluationInfo) -> None:
        if self._writer is not None:  # a finished run is evaluated again without being started
            self._add(f"test/{info.subset}", info.metrics, "accuracy", "macro_f1")

    def on_run_end(self, output_dir: object) -> None:
        self._writer.close()
        self._writer = None

    def _add(self, group: str, values: object, *names: str) -> None:
        for name in names:
            self._writer.add_scalar(f"{group}/{name}", getattr(values, name), self._step)
