"""What comes after an epoch: validation, early stopping, callbacks, progress, and numbers beyond float."""

import io
import math
import sys

import numpy as np
import pytest
import torch

from fit_helpers import classes, network, numbers, same_weights, train
from mlpext.training.checkpoint import Checkpoint


def test_a_fraction_is_held_out_of_training():
    x = torch.zeros(40, 6)
    d = torch.arange(40.0)[:, None].expand(40, 3)
    trained = set()

    def loss(output, target):
        if torch.is_grad_enabled():
            trained.update(target[:, 0].tolist())
        return (output - target).square().sum(1)

    history = train(network(), x, d, loss=loss, validation=0.25, lr=1e-5)
    assert (
        len(trained) == 30 and history.config["samples"] == 30 and history.config["validation_samples"] == 10
    )
    assert trained != set(range(30))


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_restores_the_best_weights(patience):
    x, d = numbers(20)
    model = network()
    kept = []
    history = train(
        model,
        x,
        d,
        lr=0.5,
        epochs=100,
        validation=numbers(20, seed=1),
        early_stopping=patience,
        callbacks=[lambda epoch: kept.append([W.detach().clone() for W in model.parameters()])],
    )
    best = int(np.argmin(history["val_loss"]))
    assert len(history) == best + 1 + patience < 100
    assert all(torch.equal(W, kept_W) for W, kept_W in zip(model.parameters(), kept[best], strict=True))


@pytest.mark.parametrize("answer", [True, "stop"])
def test_a_callback_can_stop(answer):
    epochs = []

    def callback(epoch):
        epochs.append(epoch)
        return answer if epoch.epoch == 2 else None

    after = []
    history = train(network(), *classes(), callbacks=[callback, after.append], epochs=9)
    assert [epoch.epoch for epoch in epochs] == [1, 2] and after == epochs == history.epochs
    assert epochs[1].row() == {name: history[name][1] for name in history.columns}
    assert epochs[1].samples_per_second == pytest.approx(50 / epochs[1].seconds)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_alone(monkeypatch):
    for stream, progress, shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        train(network(), *classes(), progress=progress)
        text = stream.getvalue()
        assert bool(text) == shown
        if shown:
            assert "loss=" in text and "accuracy=" in text and "samples/s" in text and "epoch 3" in text


@pytest.mark.parametrize(("mode", "step"), [("stochastic", 8), ("mini-batch", 2), ("batch", 1)])
def test_a_loss_beyond_float32_names_epoch_and_step(tmp_path, mode, step):
    x, d = numbers(20)
    model = network()
    d[7] = 1e25  # whose square overflows, once the second epoch has switched it on
    on = torch.tensor(False)

    def strike(epoch):
        on.fill_(epoch.epoch == 2)

    def loss(output, target):
        return (target.clamp(max=math.inf if on else 1) - output).square().sum(1)

    with pytest.raises(FloatingPointError, match=f"loss became inf at step {step} of epoch 3"):
        train(
            model,
            x,
            d,
            mode=mode,
            loss=loss,
            epochs=5,
            batch_size=4,
            shuffle=False,
            checkpoint=tmp_path,
            callbacks=[strike],
        )
    kept = Checkpoint(tmp_path).load()
    assert len(kept["log"]) == 2
    assert all(torch.equal(kept["model"][name], weight) for name, weight in model.state_dict().items())
    assert all(bool(W.isfinite().all()) for W in model.parameters())
    assert all(W.grad is None for W in model.parameters())


def test_a_last_update_beyond_float_is_noticed():
    model = network(dtype=torch.float64)
    start = network(dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="a weight became NaN or infinite at step 1 .* of epoch 1"):
        train(model, *(data.double() * 1e150 for data in numbers()), lr=1e200, epochs=1, mode="batch")
    assert same_weights(model, start)


def test_an_infinite_validation_loss_is_noticed(tmp_path):
    x, d = numbers()
    with pytest.raises(FloatingPointError, match="the validation loss became inf after step 2 of epoch 1"):
        train(network(), x, d, validation=(x, d * 1e25), checkpoint=tmp_path)
    assert Checkpoint(tmp_path).load()["log"] == []
