"""Classify single images with a trained run, over its own classes or new ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image


class Predictor:
    """A trained model with its transform.

    ``Predictor.from_run(run_dir)`` reads a run directory; ``predict`` takes images.
    """

    classnames: tuple[str, ...]

    @classmethod
    def from_run(
        cls, run_dir: Path, *, classnames: Sequence[str] | None = None, device: str | None = None
    ) -> Predictor:
        """Load the learned context of a run.

        Args:
            run_dir: what ``experiment.run`` wrote.
            classnames: classes to choose from; ``None``: those the run was trained on.
            device: where to compute; ``None``: as the run's configuration says.

        Raises:
            UserError: no run there, an unfinished run, a damaged file, or class names that cannot be used.
        """
        raise NotImplementedError

    def predict(self, images: Sequence[Path | Image], topk: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each image with their probabilities, best first.

        Raises:
            UserError: a file that cannot be read as an image.
        """
        raise NotImplementedError
