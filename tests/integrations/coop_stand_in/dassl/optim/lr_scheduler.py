import torch
from torch.optim.lr_scheduler import LRScheduler


class _BaseWarmupScheduler(LRScheduler):
    """Hands over to another scheduler. Saved with it, and that one with its optimizer; `verbose` is long gone."""

    def __init__(self, optimizer, successor, warmup_epoch, last_epoch=-1, verbose=False):
        self.successor = successor
        self.warmup_epoch = warmup_epoch
        super().__init__(optimizer, last_epoch, verbose)

    def step(self, epoch=None):
        if self.last_epoch < self.warmup_epoch:
            super().step(epoch)
            return
        self.successor.step(epoch)
        self._last_lr = self.successor.get_last_lr()


class ConstantWarmupScheduler(_BaseWarmupScheduler):
    def __init__(self, optimizer, successor, warmup_epoch, cons_lr, last_epoch=-1, verbose=False):
        self.cons_lr = cons_lr
        super().__init__(optimizer, successor, warmup_epoch, last_epoch, verbose)

    def get_lr(self):
        if self.last_epoch < self.warmup_epoch:
            return [self.cons_lr] * len(self.base_lrs)
        return self.successor.get_last_lr()


def build_lr_scheduler(optimizer, optim_cfg):
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, float(optim_cfg.MAX_EPOCH))
    if optim_cfg.WARMUP_EPOCH <= 0:
        return cosine
    return ConstantWarmupScheduler(optimizer, cosine, optim_cfg.WARMUP_EPOCH, optim_cfg.WARMUP_CONS_LR)
