"""`fit_many`: each model is trained as it would be alone, and all stop together."""

import os
import signal
import threading

import pytest
import torch

from mlpext import nn
from mlpext.training import fit, fit_many
from test_native import MODES


def ensemble(count=5, **options):
    torch.manual_seed(3)
    return [nn.MLP([9, 7, 4], "tanh", **options) for _ in range(count)]


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("mode", MODES)
def test_many_are_trained_as_each_alone(mode, engine, tmp_path):
    x = torch.randn(67, 9, generator=torch.Generator().manual_seed(1))
    d = x[:, :4].sin()
    each = [{"lr": 0.02 * (k + 1), "seed": k} for k in range(5)]
    together, alone = ensemble(), ensemble()
    for models in (together, alone):
        torch.manual_seed(5)
        models[1] = torch.nn.Sequential(nn.GatedMLP(9, 5), nn.GatedLinear(9, 4))
    options = {"mode": mode, "batch_size": 16, "epochs": 3, "validation": 0.2, "engine": engine}
    histories = fit_many(together, x, d, each=each, threads=3, log_dir=tmp_path, **options)
    for model, own, history in zip(alone, each, histories, strict=True):
        expected = fit(model, x, d, **options, **own, progress=False)
        assert history["val_loss"] == expected["val_loss"] and history.config["lr"] == own["lr"]
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3", "4"]


def test_what_many_are_refused():
    x, models = torch.randn(67, 9), ensemble(2)
    with pytest.raises(ValueError, match="given twice"):
        fit_many([models[0], models[0]], x, x[:, :4])
    with pytest.raises(ValueError, match="each has 1 entries"):
        fit_many(models, x, x[:, :4], each=[{}])
    with pytest.raises(FloatingPointError):  # one breaks down: the others stop
        fit_many(models, x, x[:, :4], each=[{"lr": 1e9, "epochs": 50}, {"epochs": 10**7}])
    with pytest.raises(TypeError, match="unexpected keyword"):
        fit_many(models, x, x[:, :4], rate=0.1)


def test_ctrl_c_stops_many():
    x = torch.randn(67, 9)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fit_many(ensemble(3), x, x[:, :4], epochs=10**7, lr=1e-3, threads=2)
    for thread in threading.enumerate():
        if thread.name == "mlpext-fit":  # at its last instruction
            thread.join(10)
            assert not thread.is_alive()
