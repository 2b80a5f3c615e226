"""The trainer's steps against SGD with momentum and weight decay written by hand."""

from __future__ import annotations

import pytest
import torch
from comparison import assert_close
from tiny_training import fast_model, make_batches, recipe

from cocoop_fast.training.features import ImageFeatures
from cocoop_fast.training.trainer import Launching, Trainer

RATES = (0.01, 0.05, 0.0375)  # of the epochs: the warm-up's, the full one, (1 + cos(pi / 3)) / 2 of it


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.8, 0.5), (0.0, 0.5), (0.8, 0.0)])
def test_steps_are_those_of_the_formulas(fused, momentum, weight_decay):
    """v <- m v + (gradient + w p), p <- p - rate v, in float64."""
    optim = recipe(epochs=3, lr=0.05, warmup_lr=0.01, momentum=momentum, weight_decay=weight_decay)
    batches = make_batches(12, 2)
    trainer = Trainer(fast_model(dtype=torch.float64), batches, optim, launching=Launching(fused=fused))
    trainer.fit()
    model = fast_model(dtype=torch.float64)
    features = ImageFeatures(model, batches, "fp32", torch.device("cpu"), groups_ahead=0)
    parameters = list(model.prompt_learner.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    for epoch, rate in enumerate(RATES, 1):
        for encoded in features.epoch(epoch):
            loss, _ = model.loss_and_logits(encoded.features, encoded.label)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for p, v, gradient in zip(parameters, velocities, gradients, strict=True):
                    v.copy_(momentum * v + gradient + weight_decay * p)
                    p.copy_(p - rate * v)
    assert trainer.step == 18
    for ours, by_hand in zip(trainer.model.prompt_learner.parameters(), parameters, strict=True):
        assert_close(ours, by_hand, 1e-9)
