"""Data sets: lists of samples, few-shot and base/new selection, transforms and batches; ``sets``: one file a data set.

May import ``config``, ``files`` and below. Imported by training, evaluation and the experiments.
Read in this order: dataset, registry, (digits, image_folder, image_list, sets), images, split_names, class_names,
duplicates, split, split_file, few_shot, few_shot_files, reference_cache, check, transforms, batches; download and inventory serve the command line.
"""

from cocoop_fast.data.dataset import Dataset, Sample
from cocoop_fast.data.registry import REGISTRY, DatasetEntry, load_dataset

__all__ = ["REGISTRY", "Dataset", "DatasetEntry", "Sample", "load_dataset"]
