"""The learning rate of each epoch: the reference's table, and the scheduler it came from."""

from __future__ import annotations

import pytest
import torch

from cocoop_fast.config import OptimConfig
from cocoop_fast.training.schedule import learning_rate

# Measured from the reference's running scheduler for the paper's recipe.
TABLE = (
    1e-5,
    0.002,
    0.00195106,
    0.00180902,
    0.00158779,
    0.00130902,
    0.001,
    0.00069098,
    0.00041221,
    0.00019098,
)


def test_the_papers_ten_epochs():
    rates = [learning_rate(OptimConfig(epochs=10), epoch) for epoch in range(1, 11)]
    assert [round(rate, 8) for rate in rates] == list(TABLE)


@pytest.mark.parametrize(("epochs", "warmup"), [(10, 1), (200, 1), (50, 3), (10, 0), (1, 1)])
def test_against_a_running_cosine_scheduler(epochs, warmup):
    """After the warm-up the reference steps torch's own cosine scheduler of period `epochs` once per epoch."""
    optim = OptimConfig(epochs=epochs, warmup_epochs=warmup, lr=0.0035, warmup_lr=2e-5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=optim.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(1, epochs + 1):
        expected = 2e-5 if epoch <= warmup else optimizer.param_groups[0]["lr"]
        assert learning_rate(optim, epoch) == pytest.approx(expected, abs=1e-12, rel=0)
        optimizer.step()
        if epoch > warmup:
            cosine.step()


def test_it_never_reaches_zero():
    assert learning_rate(OptimConfig(epochs=10), 10) > 1.9e-4
