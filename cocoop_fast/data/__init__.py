"""Data sets: lists of samples, few-shot and base/new selection, transforms and batches.

May import ``config`` and ``errors`` only; ``training`` and ``evaluation`` import it.
Read in this order: dataset, registry, (digits, image_folder, images), split, few_shot, check, transforms, batches.
"""

from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.registry import REGISTRY, DatasetEntry, load_dataset

__all__ = ["REGISTRY", "Dataset", "DatasetEntry", "Sample", "load_dataset"]
