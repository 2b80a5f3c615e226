import torch

from .lr_scheduler import build_lr_scheduler  # noqa: F401


def build_optimizer(model, optim_cfg, param_groups=None):
    return torch.optim.SGD(
        model.parameters() if param_groups is None else param_groups,
        lr=optim_cfg.LR,
        momentum=optim_cfg.MOMENTUM,
        weight_decay=optim_cfg.WEIGHT_DECAY,
    )
