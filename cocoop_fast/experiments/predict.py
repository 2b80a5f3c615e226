"""Classify single images with a trained run, over its own classes or new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from cocoop_fast.clip.checkpoints import SUFFIXES
from cocoop_fast.clip.load import LoadedClip, clip_in_memory, describe
from cocoop_fast.clip.weights import HUB
from cocoop_fast.config import ModelConfig, ResolvedConfig, RunConfig
from cocoop_fast.data.images import ImageError, any_rgb
from cocoop_fast.engine.graphs import Record
from cocoop_fast.errors import UserError, is_out_of_memory
from cocoop_fast.evaluation.evaluate import autocast, test_transform
from cocoop_fast.evaluation.recorded import RecordedLogits
from cocoop_fast.experiments.shared import Shared, has_own_images, model_on, recorder
from cocoop_fast.methods import knows_other_classes
from cocoop_fast.methods.base import ImageClassifier, LearnedPromptCLIP
from cocoop_fast.readable import listed
from cocoop_fast.runs.checkpoint import load_parameters
from cocoop_fast.runs.directory import read_run
from cocoop_fast.runs.model_card import about_run
from cocoop_fast.runs.sharing import (
    CONFIG,
    SharedLearner,
    check_classes,
    check_clip,
    learned_by,
    load_shared,
    push_shared,
    save_shared,
)


class Predictor:
    """A trained model with its image transform.

    Args:
        model: ``image_encoder``, ``dtype`` and ``forward_features``, as the methods of this package have.
        clip: what the model was built on.
        classnames: (K,) names of the model's classes.
        batch_size: images at once.
        note: a sentence for who reads its answers; ``None``: there is nothing to say.
        record: by it the batches of a size that comes often are recorded as a CUDA graph, and replayed; ``None``: each is launched anew.
        on_message: told why they are not recorded, if they cannot be.
    """

    def __init__(
        self,
        model: ImageClassifier,
        clip: LoadedClip,
        classnames: Sequence[str],
        batch_size: int = 100,
        note: str | None = None,
        record: Record | None = None,
        on_message: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = model
        self.clip = clip
        self.classnames = tuple(classnames)
        self.note = note
        self._batch_size = batch_size
        # For who shares it: what names the CLIP and the method, the classes trained on, and what is known of the run.
        self._named: RunConfig | None = None
        self._trained: tuple[str, ...] | None = None
        self._about = ""
        model.prompt_learner.eval()
        self._recorded: RecordedLogits | None = None
        if record is not None and isinstance(model, LearnedPromptCLIP):
            self._recorded = RecordedLogits(model, record, on_message)

    @classmethod
    def from_run(
        cls,
        run_dir: Path | str,
        *,
        classnames: Sequence[str] | None = None,
        device: str | None = None,
        config: ResolvedConfig | None = None,
        on_message: Callable[[str], None] = lambda line: None,
    ) -> Predictor:
        """Load the learned context of a run.

        Args:
            run_dir: what ``experiment.run`` wrote; the newest checkpoint is used.
            classnames: classes to choose from, which need not be those trained on; ``None``: those.
            device: where to compute; ``None``: as the run's configuration says.
            config: the run's, with another precision or backend; ``None``: as it is.
            on_message: told which model it is.

        Raises:
            UserError: no run there, damaged files, or class names that cannot be used.
        """
        own, newest = read_run(run_dir)
        config = own if config is None else config
        config = replace(config, model=replace(config.model, device=device or config.model.device))
        names, shared = newest.classnames if classnames is None else classnames, Shared()
        model = shared.model(config, names)
        load_parameters(model, newest.parameters, str(run_dir))
        shared.tell_of_model(config.model, on_message, own_images=has_own_images(config))
        others = newest.other_classes if classnames is None else []
        note = _note(names, others, knows_other_classes(config.prompt)) if others else None
        clip, size = shared.clip(config.model), config.eval_batch_size
        predictor = cls(model, clip, names, size, note, recorder(clip, config.model), on_message)
        predictor._named, predictor._trained = config, tuple(newest.classnames)
        predictor._about = about_run(Path(run_dir), config, newest)
        return predictor

    @classmethod
    def load(
        cls,
        place: Path | str,
        *,
        classnames: Sequence[str] | None = None,
        device: str | None = None,
        on_message: Callable[[str], None] = lambda line: None,
    ) -> Predictor:
        """A run as :meth:`from_run`, or what was shared, as :meth:`from_pretrained`; of the hub by ``hf-hub:OWNER/NAME``."""
        if str(place).startswith(HUB) or (Path(place) / CONFIG).is_file():
            return cls.from_pretrained(
                place, classnames=classnames, device=device or "auto", on_message=on_message
            )
        return cls.from_run(place, classnames=classnames, device=device, on_message=on_message)

    @classmethod
    def from_pretrained(
        cls,
        place: Path | str,
        *,
        classnames: Sequence[str] | None = None,
        clip_model: Any = None,
        device: str = "auto",
        on_message: Callable[[str], None] = lambda line: None,
    ) -> Predictor:
        """Load what was shared by :meth:`save_pretrained` or :meth:`push_to_hub`.

        Args:
            place: a folder, or a repository of the hub, OWNER/NAME.
            classnames: classes to choose from, which need not be those trained on; ``None``: those.
            clip_model: the CLIP that it was learned on; ``None``: it is loaded by its name.
            device: where to compute.
            on_message: told which model it is.

        Raises:
            UserError: as :func:`cocoop_fast.runs.sharing.load_shared`, another CLIP, or class names that cannot be used.
        """
        kept = load_shared(place)
        if kept.prompt is None:
            raise UserError(
                f"{place} was learned by a learner of somebody's own; build it, and use cocoop_fast.load_pretrained."
            )
        named = ModelConfig(kept.clip or "", kept.pretrained, device=device)
        config, shared = RunConfig(model=named, prompt=kept.prompt), Shared()
        if clip_model is not None:
            clip = clip_in_memory(clip_model, name=kept.clip or "")
        elif kept.clip is None or (kept.pretrained or "").endswith(SUFFIXES):
            raise UserError(
                f"{place} was learned on {kept.clip_title}, which has to be loaded first; give `clip_model`."
            )
        else:
            clip = shared.clip(named)
            on_message(describe(named))
        names = kept.classnames if classnames is None else tuple(classnames)
        if names is None:
            raise UserError(f"{place} does not say which classes it was trained on; give `classnames`.")
        check_classes(kept, names, str(place))
        check_clip(kept, clip.model, str(place))
        model = model_on(clip, config, names)
        load_parameters(model, kept.parameters, str(place))
        predictor = cls(model, clip, names, record=recorder(clip, named), on_message=on_message)
        predictor._named, predictor._trained = config, kept.classnames
        return predictor

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write what was learned to a folder that can be given away: tensors, configuration, class names and a card.

        Raises:
            UserError: nothing was learned, or it cannot be written.
        """
        return save_shared(self._learned(), folder, self._about)

    def push_to_hub(self, repository: str, *, private: bool | None = None, token: str | None = None) -> str:
        """The same to the Hugging Face hub; returns the address.

        Args:
            repository: OWNER/NAME, made if need be.
            private, token: as in huggingface_hub; by default public, with the token that ``hf auth login`` keeps.

        Raises:
            UserError: nothing was learned, or the hub cannot be reached or refuses.
        """
        return push_shared(self._learned(), repository, self._about, private=private, token=token)

    def _learned(self) -> SharedLearner:
        named = self._named
        prompt, clip = (None, None) if named is None else (named.prompt, named.model)
        return learned_by(self.model, clip=clip, prompt=prompt, classnames=self._trained)  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(
        self,
        images: Sequence[Path | str | Image],
        topk: int = 5,
        *,
        on_unreadable: Callable[[Any, str], None] | None = None,
    ) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each image with their probabilities (softmax of the logits), best first.

        Args:
            images: files, or images in memory.
            topk: classes to return; fewer if there are fewer.
            on_unreadable: told of each image that cannot be read, and why; it has no classes in the result. ``None``: such
                an image is an error.

        Raises:
            UserError: a file that cannot be read as an image, one image where a list is meant, or ``topk`` below 1.
        """
        if isinstance(images, (str, Path, Image)):
            raise UserError("`images` is a single image; give a list of images, which may have one.")
        if topk < 1:
            raise UserError(f"`topk` is {topk}; ask for at least one class.")
        transform = test_transform(self.clip)
        best: list[list[tuple[str, float]]] = [[] for _ in images]
        for start in range(0, len(images), self._batch_size):
            views: dict[int, Tensor] = {}
            for place, image in enumerate(images[start : start + self._batch_size], start):
                try:
                    views[place] = transform(any_rgb(image))
                except ImageError as error:
                    if on_unreadable is None:
                        raise UserError(
                            f"The image {image} cannot be read: {error}.", exit_status=1
                        ) from error
                    on_unreadable(image, str(error))
            if views:
                for place, ranked in zip(
                    views, self._ranked(torch.stack([*views.values()]), topk), strict=True
                ):
                    best[place] = ranked
        return best

    def _ranked(self, views: Tensor, topk: int) -> list[list[tuple[str, float]]]:
        # What a graph keeps is made here, and serves calls outside of an inference mode that this one may be in.
        with torch.inference_mode(False), torch.no_grad():
            best = None
            try:
                best = self._best(views, topk)
            except (MemoryError, RuntimeError) as error:
                if self._recorded is None or not is_out_of_memory(error) or not self._recorded.release():
                    raise
            if best is None:  # not while the error is there, which holds what was allocated
                best = self._best(views, topk)
        return [
            [(self.classnames[label], probability) for label, probability in zip(*pair, strict=True)]
            for pair in zip(*best, strict=True)
        ]

    def _best(self, views: Tensor, topk: int) -> tuple[list[list[int]], list[list[float]]]:
        """The likeliest classes of each image, and their probabilities."""

        def read(logits: Tensor) -> tuple[list[list[int]], list[list[float]]]:
            probabilities, labels = logits.float().softmax(dim=1).topk(min(topk, len(self.classnames)))
            return labels.tolist(), probabilities.tolist()

        batch = views.to(self.clip.device, self.model.dtype)
        with autocast(self.clip.precision, self.clip.device):
            features = self.model.image_encoder(batch)
            if self._recorded is not None:
                return self._recorded(features, read)
            return read(self.model.forward_features(features))


def _note(trained_on: Sequence[str], others: Sequence[str], nameable: bool) -> str:
    """For who may not know that the run was trained on a part of the classes."""
    remedy = "--classes names those to choose from" if nameable else "what it learned cannot choose them"
    return (
        f"These are the {len(trained_on):,} classes that the run was trained on; its data set has {len(others):,} more "
        f"({listed(others)}), and {remedy}."
    )
