"""What many experiments in one process share: CLIP models, lists of samples, features of test images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from cocoop_fast.clip.demo import DEMO_CLIPS
from cocoop_fast.clip.load import LoadedClip, describe, load_clip, resolve_device, resolve_precision
from cocoop_fast.config import DataConfig, Ensemble, ModelConfig, RunConfig, embedded_clip
from cocoop_fast.data import Dataset, load_dataset
from cocoop_fast.engine.graphs import CudaGraphs, Record
from cocoop_fast.engine.image_tower import FrozenViT
from cocoop_fast.evaluation.feature_cache import FeatureCache
from cocoop_fast.methods import build_model
from cocoop_fast.methods.base import PromptedCLIP
from cocoop_fast.methods.consistency import Consistency
from cocoop_fast.methods.zeroshot import ensemble_templates

_DATASETS_KEPT = 2  # ImageNet's training list alone takes a few hundred megabytes


class Shared:
    """Loads each thing when it is first asked for, and hands out the same one afterwards.

    A CLIP can be shared because it is frozen, and image features because they do not depend on what is learned.

    Args:
        features: where features of test images are kept, of all classes together; ``None``: nowhere.
    """

    def __init__(self, features: FeatureCache | None = None) -> None:
        self.features = features
        self._told: set[str] = set()
        self._load_clip = cache(load_clip)
        self._pack_image_tower = cache(FrozenViT)
        self._load_dataset = lru_cache(_DATASETS_KEPT)(load_dataset)
        self._load_test_set = cache(lambda data: self._load_dataset(data).with_splits(train=(), val=()))

    def clip(self, config: ModelConfig) -> LoadedClip:
        """As :func:`cocoop_fast.clip.load.load_clip`."""
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        return self._load_clip(ModelConfig(config.name, config.pretrained, precision, device=str(device)))

    def tell_of_model(self, config: ModelConfig, tell: Callable[[str], None], *, own_images: bool) -> None:
        """Say once which CLIP is used, and warn if it is an embedded one and the images are not those it was made for."""
        line = describe(config)
        if line in self._told:
            return
        self._told.add(line)
        tell(line)
        if config.name in DEMO_CLIPS and own_images:
            warnings.warn(
                f"The {config.name} CLIP knows {DEMO_CLIPS[config.name].knows} alone, and what it makes of other images means nothing; name "
                "another with --model, for example --model ViT-B/16.",
                stacklevel=2,
            )

    def model(self, config: RunConfig, classnames: Sequence[str]) -> PromptedCLIP:
        """The model of a configuration over K class names, ready to train. Its CLIP is shared, and so is what is made of it.

        Raises:
            UserError: as :func:`cocoop_fast.methods.build_model` and :meth:`clip`.
        """
        model = model_on(self.clip(config.model), config, classnames)
        if config.model.image_backend == "cpu":
            model.image_encoder = self._pack_image_tower(model.image_encoder)
        return model

    def dataset(self, config: DataConfig) -> Dataset:
        """As :func:`cocoop_fast.data.load_dataset`; the last two are kept."""
        return self._load_dataset(_list_of(config))

    def test_set(self, config: DataConfig) -> Dataset:
        """The same without training and validation images; all of them are kept."""
        return self._load_test_set(_list_of(config))


def has_own_images(config: RunConfig) -> bool:
    """Whether the images are others than those that a CLIP inside the package was made for, if it is one."""
    return embedded_clip(config.data.name) != config.model.name


def model_on(clip: LoadedClip, config: RunConfig, classnames: Sequence[str]) -> PromptedCLIP:
    """The model of a configuration over K class names on a CLIP, whatever CLIP the configuration names.

    Raises:
        UserError: as :func:`cocoop_fast.methods.build_model`.
    """
    return build_model(
        config.prompt,
        list(classnames),
        clip,
        backend=config.model.backend,
        memory_budget=config.model.memory_budget,
        prune_mass=config.optim.prune_mass,
        consistency=consistency_of(config),
    )


def recorder(clip: LoadedClip, config: ModelConfig) -> Record | None:
    """What records batches as CUDA graphs; ``None``: nothing does."""
    return CudaGraphs(clip.device) if clip.device.type == "cuda" and config.cuda_graph else None


def consistency_of(config: RunConfig) -> Consistency | None:
    """What training keeps prompts near: the ensemble of the configuration, or else the reference's seven templates."""
    optim, prompt = config.optim, config.prompt
    if optim.consistency == "none":
        return None
    ensemble: Ensemble = "select" if prompt.ensemble == "none" else prompt.ensemble
    templates = ensemble_templates(ensemble, prompt.template or "")
    return Consistency(optim.consistency, optim.text_weight or 0.0, optim.logit_weight or 0.0, templates)


def _list_of(config: DataConfig) -> DataConfig:
    """What decides which images a data set has; equal for configurations that have the same ones."""
    return DataConfig(name=config.name, root=config.root, class_names=config.class_names)
