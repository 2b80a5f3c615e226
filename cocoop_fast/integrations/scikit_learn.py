"""Prompt learning in scikit-learn's shape: an estimator that fits, predicts and scores, in its pipelines and searches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn
from typing_extensions import Self

from cocoop_fast.clip.frozen import FrozenCLIP
from cocoop_fast.clip.load import LoadedClip, clip_in_memory
from cocoop_fast.config import ResolvedConfig, from_mapping
from cocoop_fast.data.batches import TrainBatches
from cocoop_fast.data.check import look_at_images
from cocoop_fast.data.dataset import Dataset
from cocoop_fast.data.transforms import Normalize, TrainTransform
from cocoop_fast.errors import UserError
from cocoop_fast.evaluation.evaluate import autocast, encode_test_images
from cocoop_fast.experiments.shared import Shared, model_on
from cocoop_fast.integrations.given_images import Given, Reader, called, images_of, samples_of
from cocoop_fast.methods import LinearProbe
from cocoop_fast.methods.base import PromptedCLIP, check_images
from cocoop_fast.runs.checkpoint import learned_parameters, load_parameters
from cocoop_fast.runs.recipe import resolve
from cocoop_fast.runs.sharing import learned_by, save_shared
from cocoop_fast.training import rng
from cocoop_fast.training.features import GivenFeatures, encode
from cocoop_fast.training.observer import EpochInfo, Observer
from cocoop_fast.training.trainer import Trainer

_SECTIONS = ("model", "prompt", "optim", "augment")  # of the configuration, that say something here
_MOST_SHOTS = (
    16  # the largest few-shot sample that the published recipes have; beyond, they are for all images
)


class PromptClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of images that learns the prompts of a frozen CLIP.

    X is n images or the features of n images: paths, PIL images, byte pixels (n, H, W, 3) or (n, H, W), float images
    (n, 3, S, S) that are preprocessed as the CLIP expects, or CLIP's own image features (n, E), of any length, as
    :meth:`encode` makes them. y is a label for each, of any kind.

    Args:
        classnames: what the classes are called. A sequence of K names: labels are 0 to K - 1, or the names themselves. A
            mapping from labels to names. ``None``: each label is its class's name.
        method: "cocoop", "coop", "meta-nets", "zeroshot" or "linear-probe"; or a variant, "cocoop+consistency".
        model: open_clip's name of a CLIP, OpenAI's such as "ViT-B/16", "hf-hub:OWNER/NAME", or "demo"; or an open_clip or
            OpenAI CLIP itself, which is frozen. Estimators with the same name share one.
        pretrained: open_clip's tag of the weights, or a file.
        ctx_init: words the context begins as. ``None``: "a photo of a", or random vectors if there is an ``n_ctx``.
        n_ctx: how many random vectors. ``None``: as many as there are words.
        epochs, batch_size: ``None``: the method's own.
        lr: learning rate.
        augment: train on random crops and flips of images, as the paper does. False: each image is encoded once.
        precision, device, backend: of the model, as on the command line.
        random_state: an integer trains as ``cocoop-fast train --seed`` of that number.
        options: further fields of the configuration in the sections model, prompt, optim and augment, such as
            ``{"optim.consistency": "l1", "prompt.csc": True}``.
        verbose: print a line after each epoch.

    Attributes:
        classes_: (K,) labels, sorted; the order of :meth:`predict_proba`'s columns.
        classnames_: (K,) their names.
        learned_: what was learned, tensors by name. Pickles and copies hold it, and no CLIP that ``model`` names.
        n_features_in_: E, if it was fitted on features.

    Raises:
        UserError: (a ValueError) X or y cannot be understood, or as the functions of the package do.
    """

    def __init__(
        self,
        classnames: Sequence[str] | Mapping[Any, str] | None = None,
        method: str = "cocoop",
        model: str | nn.Module = "demo",
        *,
        pretrained: str | None = None,
        ctx_init: str | None = None,
        n_ctx: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float = 0.002,
        augment: bool = True,
        precision: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        random_state: int | None = 1,
        options: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.classnames = classnames
        self.method = method
        self.model = model
        self.pretrained = pretrained
        self.ctx_init = ctx_init
        self.n_ctx = n_ctx
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.augment = augment
        self.precision = precision
        self.device = device
        self.backend = backend
        self.random_state = random_state
        self.options = options
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from n images or features and their labels (n,)."""
        given, y = self._given(X, y, reset=True)
        if not isinstance(given, np.ndarray):
            self.__dict__.pop("n_features_in_", None)  # of features, if it was fitted on some before
        classes, names = called(self.classnames, y)
        known = classes.tolist()
        missing = sorted(set(y.tolist()) - set(known))
        if missing:
            raise UserError(
                f"`y` has the label {missing[0]!r}, which is none of the classes {', '.join(map(repr, known[:5]))}"
                f"{', ...' if len(known) > 5 else ''}; `classnames` must have every class."
            )
        if self.classnames is None and y.dtype.kind in "iuf" and self.method != "linear-probe":
            warnings.warn(
                f"The classes are called by their numbers, {', '.join(names[:3])} and so on, which says little to CLIP; "
                "give `classnames`.",
                stacklevel=2,
            )
        labels = np.searchsorted(classes, y)
        samples = samples_of(given, labels, names)
        data = Dataset("images", names, samples, (), (), Reader(given), where="X")
        config, clip = self._configuration(data, np.bincount(labels)), self._clip()
        if isinstance(self.model, str):
            _shared().tell_of_model(config.model, lambda _: None, own_images=isinstance(given, list))
        kept = rng.capture()
        try:
            rng.seed_everything(config.seed)
            model = model_on(clip, config, names)
        finally:
            rng.restore(kept)
        self._train(model, config, clip, given, data)
        self._model, self._config, self.learned_ = model, config, learned_parameters(model)
        self.classes_, self.classnames_ = classes, names
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, K) probabilities, float64: the softmax of the logits, in the order of ``classes_``."""
        check_is_fitted(self, "learned_")
        given, _ = self._given(X, None, reset=False)
        model, clip = self._built()
        model.prompt_learner.eval()
        features, parts = self._encoded(given, model, clip), []
        with torch.no_grad(), autocast(clip.precision, clip.device):
            for part in features.split(self._config.eval_batch_size):
                parts.append(model.forward_features(part.to(clip.device)).double().softmax(dim=1).cpu())
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """(n,) labels of the likeliest classes."""
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]

    def encode(self, X: Any) -> np.ndarray:
        """(n, E) image features, which every method here takes in place of the images; nothing need be fitted."""
        given, _ = self._given(X, None, reset=False)
        if isinstance(given, np.ndarray):
            raise UserError("`X` has two dimensions, so it holds features already; give images.")
        clip = self._clip()
        return self._encoded(given, _Encoder(clip), clip).float().cpu().numpy()

    def set_classnames(self, classnames: Sequence[str] | Mapping[Any, str]) -> Self:
        """Classify into other classes from now on. What was learned stays, and so does the parameter ``classnames``.

        Args:
            classnames: as the parameter; names of a sequence are labels if those fitted on were text, else they have the
                labels 0 to K - 1.

        Raises:
            UserError: an unusable class list, or what was learned belongs to the classes that it was fitted on.
        """
        check_is_fitted(self, "learned_")
        classes, names = called(classnames, self.classes_)
        self._built()[0].set_classnames(list(names))
        self.classes_, self.classnames_ = classes, names
        return self

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write what was learned to a folder that :meth:`cocoop_fast.Predictor.from_pretrained` reads.

        Raises:
            UserError: nothing was learned, or it cannot be written.
        """
        check_is_fitted(self, "learned_")
        clip = self._config.model if isinstance(self.model, str) else None
        model, _ = self._built()
        return save_shared(
            learned_by(model, clip=clip, prompt=self._config.prompt, classnames=self.classnames_), folder
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        # scikit-learn's checks fit blobs of points, which are no image features, and ask for 83 %.
        tags.classifier_tags.poor_score = self.method != "linear-probe"
        return tags

    def __getstate__(self) -> dict[str, Any]:
        """Without the model, which is built again from what was learned when it is asked for."""
        return {name: value for name, value in super().__getstate__().items() if name != "_model"}

    def _given(self, X: Any, y: Any, *, reset: bool) -> tuple[Given, Any]:
        """X as what it holds, and y as an array of as many labels; only y's absence in `fit` is left to scikit-learn."""
        given = images_of(X)
        if given is None:
            both = {} if not reset else {"y": y}
            checked = validate_data(self, X, reset=reset, dtype=(np.float64, np.float32), **both)
            given, y = checked if reset else (checked, None)
        elif reset:
            if y is None:
                raise UserError("PromptClassifier requires y to be passed, but the target y is None.")
            check_consistent_length(given, y)
        if reset:
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
        return given, y

    def _configuration(self, data: Dataset, counts: np.ndarray) -> ResolvedConfig:
        """Of one run on these images, which nothing is written of."""
        seed = self.random_state
        if not isinstance(seed, (int, np.integer)):
            seed = check_random_state(seed).randint(2**31)
        if self.n_ctx is not None and self.ctx_init and len(self.ctx_init.split()) != self.n_ctx:
            raise UserError(
                f"`n_ctx` is {self.n_ctx}, but `ctx_init` {self.ctx_init!r} has another number of words; give one of them."
            )
        words = self.ctx_init if self.ctx_init is not None else "" if self.n_ctx is not None else None
        values: dict[str, dict[str, Any]] = {
            "model": {"precision": self.precision, "device": self.device, "backend": self.backend},
            "prompt": {"method": self.method, "ctx_init": words, "n_ctx": self.n_ctx},
            "optim": {"lr": self.lr, "epochs": self.epochs, "batch_size": self.batch_size},
            "data": {"shots": int(counts.max()) if counts.max() <= _MOST_SHOTS else 0, "subset": "all"},
            "augment": {},
        }
        if isinstance(self.model, str):
            values["model"] |= {"name": self.model, "pretrained": self.pretrained}
        else:
            values["model"] |= {"name": type(self.model).__name__, "device": str(self._clip().device)}
        for path, value in (self.options or {}).items():
            section, _, field = path.partition(".")
            if section not in _SECTIONS or not field:
                raise UserError(
                    f"`options` has {path!r}; what it may have begins with {', '.join(_SECTIONS)} and a dot."
                )
            values[section][field] = value
        kept = {
            name: {key: one for key, one in part.items() if one is not None} for name, part in values.items()
        }
        return resolve(from_mapping({**kept, "seed": int(seed)}, "PromptClassifier"), data)

    def _clip(self) -> LoadedClip:
        if not isinstance(self.model, str):
            precision = None if self.precision == "auto" else self.precision
            return clip_in_memory(self.model, precision=precision)
        wanted = {
            "name": self.model,
            "pretrained": self.pretrained,
            "precision": self.precision,
            "device": self.device,
        }
        return _shared().clip(from_mapping({"model": wanted}, "PromptClassifier").model)

    def _built(self) -> tuple[PromptedCLIP, LoadedClip]:
        """The fitted model and the CLIP in it; after unpickling it is built anew."""
        clip = self._clip()
        if not hasattr(self, "_model"):
            model = model_on(clip, self._config, self.classnames_)
            load_parameters(model, self.learned_, "This PromptClassifier")
            self._model = model
        return self._model, clip

    def _train(
        self, model: PromptedCLIP, config: ResolvedConfig, clip: LoadedClip, given: Given, data: Dataset
    ) -> None:
        if isinstance(model, LinearProbe):
            labels = torch.tensor([sample.label for sample in data.train])
            model.fit(self._encoded(given, model, clip), labels)
        if not config.optim.epochs:
            return
        features = None
        if self.augment and isinstance(given, list):
            _refuse_unreadable(data)
        else:
            features = self._encoded(given, model, clip)
        augment = config.augment
        transform = TrainTransform(
            clip.image_size,
            augment.crop_scale,
            augment.flip,
            Normalize(clip.mean, clip.std),
            clip.interpolation,
        )
        batches = TrainBatches(data, data.train, transform, config.optim.batch_size, config.seed)
        Trainer(
            model,
            batches,
            config.optim,
            precision=clip.precision,
            cuda_graph=config.model.cuda_graph,
            observer=_Told(self.verbose),
            features=None if features is None else GivenFeatures(batches, features, clip.device),
        ).fit()

    def _encoded(self, given: Given, model: Any, clip: LoadedClip) -> Tensor:
        """(n, E) features; of images, by the frozen image encoder."""
        if isinstance(given, np.ndarray):
            return self._in_clips_space(torch.from_numpy(np.ascontiguousarray(given)), clip)
        if isinstance(given, Tensor):
            check_images(given, clip.image_size)
            parts = given.split(100)
            return torch.cat([encode(model, part.to(clip.device), clip.precision) for part in parts])
        samples = samples_of(given, np.zeros(len(given), int), ("",))
        data = Dataset("images", ("",), (), (), samples, Reader(given), where="X")
        _refuse_unreadable(data)
        return encode_test_images(model, clip, data).image

    def _in_clips_space(self, features: Tensor, clip: LoadedClip) -> Tensor:
        """(n, E) as they are, where E is this CLIP's."""
        width = FrozenCLIP(clip.model).embed_dim
        if features.shape[1] != width:
            raise UserError(
                f"`X` is features of {features.shape[1]} dimensions, but those of this CLIP have {width}; make them with "
                "`encode`, or give images."
            )
        empty = (features == 0).all(dim=1).nonzero()
        if len(empty):
            raise UserError(f"`X` has only zeros in row {int(empty[0])}, which is no image's features.")
        return features


def _refuse_unreadable(data: Dataset) -> None:
    """Before hours of training."""
    bad = look_at_images(data).bad
    if bad:
        shown = ", ".join(f"{sample.source} ({fault})" for sample, fault in list(bad.items())[:3])
        raise UserError(
            f"{len(bad)} of the images in `X` cannot be read: {shown}{', ...' if len(bad) > 3 else ''}; leave them out of "
            "`X` and `y`.",
            exit_status=1,
        )


class _Encoder:
    """An image encoder without a method."""

    def __init__(self, clip: LoadedClip) -> None:
        self.image_encoder: Any = clip.model.visual
        self.dtype = FrozenCLIP(clip.model).dtype


class _Told(Observer):
    """What a user should know becomes a warning, since an estimator has no log."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose

    def on_message(self, text: str) -> None:
        warnings.warn(text, stacklevel=2)

    def on_epoch_end(self, info: EpochInfo) -> None:
        if self._verbose:
            print(
                f"epoch {info.epoch}/{info.epochs}: loss {info.loss:.4f}, accuracy {info.accuracy:.1f} %, "
                f"{info.seconds:.1f} s"
            )


@cache
def _shared() -> Shared:
    """CLIPs by name, for all estimators of the process: a search makes many."""
    return Shared()
