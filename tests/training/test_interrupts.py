"""Ctrl-C completes the step under way, and a handler of the user's own is left alone."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fit_helpers import classes, network, same_weights, train
from mlpext.training.checkpoint import Checkpoint


class Interrupting(nn.Module):
    """Presses Ctrl-C while it computes its n-th training step."""

    def __init__(self, inner, step):
        super().__init__()
        self.inner, self.left = inner, step

    def forward(self, x):
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return self.inner(x)


@pytest.mark.parametrize(
    ("mode", "step", "updates"), [("stochastic", 63, 63), ("mini-batch", 20, 20), ("batch", 4, 4)]
)
def test_ctrl_c_completes_the_step(tmp_path, mode, step, updates):
    x, d = classes()
    model = Interrupting(network(), step)
    options = {"mode": mode, "batch_size": 4, "shuffle": False, "epochs": 9}
    with pytest.raises(KeyboardInterrupt):
        train(model, x, d, checkpoint=tmp_path, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    expected = network()
    sgd = torch.optim.SGD(expected.parameters(), 0.05)
    steps = torch.arange(50).split({"stochastic": 1, "mini-batch": 4, "batch": 50}[mode])
    for k in range(updates):
        rows = steps[k % len(steps)]
        sgd.zero_grad()
        (
            0.5 * F.mse_loss(expected(x[rows]), F.one_hot(d[rows], 3).float(), reduction="sum") / len(rows)
        ).backward()
        sgd.step()
    assert same_weights(model.inner, expected)
    whole = updates // len(steps) - (updates % len(steps) == 0)
    assert len(Checkpoint(tmp_path).load()["log"]) == whole
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ctrl_c_in_a_long_batch_step_drops_it():
    x, d = classes(3000)
    model = Interrupting(network(), 1)
    with pytest.raises(KeyboardInterrupt):
        train(model, x, d, mode="batch")
    assert model.left == 0 and same_weights(model.inner, network())


def test_a_handler_of_ones_own_is_respected():
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        history = train(Interrupting(network(), 2), *classes())
    finally:
        signal.signal(signal.SIGINT, previous)
    assert pressed == [1] and len(history) == 3
