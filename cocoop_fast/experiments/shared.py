"""What many experiments in one process share: CLIP models, lists of samples, features of test images."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from cocoop_fast.clip.load import LoadedClip, load_clip
from cocoop_fast.config import DataConfig, ModelConfig
from cocoop_fast.data import Dataset, load_dataset
from cocoop_fast.evaluation.feature_cache import FeatureCache

_DATASETS_KEPT = 2  # ImageNet's training list alone takes a few hundred megabytes


class Shared:
    """Loads each thing when it is first asked for, and hands out the same one afterwards.

    A CLIP can be shared because it is frozen, and image features because they do not depend on what is learned.

    Args:
        features: where features of test images are kept.
    """

    def __init__(self, features: FeatureCache) -> None:
        self.features = features
        self._clips: dict[ModelConfig, LoadedClip] = {}
        self._datasets: OrderedDict[DataConfig, Dataset] = OrderedDict()
        self._test_sets: dict[DataConfig, Dataset] = {}

    def clip(self, config: ModelConfig) -> LoadedClip:
        """As :func:`cocoop_fast.clip.load.load_clip`."""
        if config not in self._clips:
            self._clips[config] = load_clip(config)
        return self._clips[config]

    def dataset(self, config: DataConfig) -> Dataset:
        """As :func:`cocoop_fast.data.load_dataset`; the last two are kept."""
        key = _identity(config)
        if key not in self._datasets:
            while len(self._datasets) >= _DATASETS_KEPT:
                self._datasets.popitem(last=False)
            self._datasets[key] = load_dataset(config)
        self._datasets.move_to_end(key)
        return self._datasets[key]

    def test_set(self, config: DataConfig) -> Dataset:
        """The same without training and validation images; all of them are kept."""
        key = _identity(config)
        if key not in self._test_sets:
            self._test_sets[key] = self.dataset(config).with_splits(train=(), val=())
        return self._test_sets[key]


def _identity(config: DataConfig) -> DataConfig:
    """Equal for configurations that list the same images."""
    return replace(config, shots=0, few_shot=None, subset="all", workers=0)
