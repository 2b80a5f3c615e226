"""Ten images of colour for each of six classes, the first three of which are "base"."""

from types import SimpleNamespace

import torch

NAMES = ["cat", "big_dog", "bullet train", "sky blue", "red", "dark green"]


class DataManager:
    def __init__(self, cfg):
        half = {"all": slice(None), "base": slice(0, 3), "new": slice(3, None)}[cfg.DATASET.SUBSAMPLE_CLASSES]
        names = NAMES[half]
        generator = torch.Generator().manual_seed(7)
        colours = torch.randn(len(names), 3, 1, 1, generator=generator)
        self.dataset = SimpleNamespace(classnames=names)
        self.lab2cname = dict(enumerate(names))
        self.num_classes, self.num_source_domains = len(names), 1
        self.train_loader_x = self._loader(colours, 3, cfg.DATALOADER.TRAIN_X.BATCH_SIZE, generator)
        self.train_loader_u = self.val_loader = None
        self.test_loader = self._loader(colours, 10, 100, generator)

    def _loader(self, colours, shots, batch_size, generator):
        labels = torch.arange(len(colours)).repeat(shots)
        images = colours[labels] + 0.3 * torch.randn(len(labels), 3, 32, 32, generator=generator)
        return [
            {"img": image, "label": label}
            for image, label in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        ]
