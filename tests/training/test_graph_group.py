"""fit_many in CUDA graphs: models of one shape go as stacks, each trained as it would be alone."""

import copy
import os
import signal
import threading

import pytest
import torch

from mlpext import nn
from mlpext.training import fit, fit_many
from mlpext.training.engines import _graph_group
from test_native import MODES

pytestmark = pytest.mark.native

EACH = {
    "rates": [{"lr": 0.02 * (k + 1), "seed": k} for k in range(5)],
    "kinds": [{"momentum": 0.5 * (k % 2), "seed": k, "batch_size": 16 if k < 3 else 20} for k in range(5)],
    "epochs": [{"epochs": 2 + k % 2, "seed": k} for k in range(5)],
}


def assert_many_are_as_each_alone(device, bound, make=None, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(67, 9, generator=generator)
    d = x[:, :4].sin()
    ensemble = (make or (lambda: [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(5)]))()
    alone = copy.deepcopy(ensemble)
    options = {"batch_size": 16, "epochs": 3, "engine": "native", **options}
    each = options.pop("each")
    histories = fit_many(ensemble, x, d, each=each, **options)
    for model, own, history in zip(alone, each, histories, strict=True):
        expected = fit(model, x, d, progress=False, **{**options, **own})
        for column in expected.columns:
            if "seconds" not in column and "second" not in column:
                assert history[column] == pytest.approx(expected[column], rel=bound)
    for ours, theirs in zip(ensemble, alone, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.fixture
def stacks(monkeypatch):
    """How many networks go together, of each stack that is made."""
    made, init = [], _graph_group.Stack.__init__

    def counted(self, engines, *rest):
        made.append(len(engines))
        init(self, engines, *rest)

    monkeypatch.setattr(_graph_group.Stack, "__init__", counted)
    return made


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("mode", MODES)
def test_many_are_as_each_alone(mode, each, device, stacks):
    assert_many_are_as_each_alone(device, 1e-5, mode=mode, each=EACH[each], validation=0.2)
    # Those with momentum have buffers; batch_size is of mini-batches; two go on for an epoch more.
    kinds = [2] if mode == "mini-batch" else [3, 2]
    assert stacks == {"rates": [5], "kinds": kinds, "epochs": [5, 2]}[each]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": lambda p: torch.optim.AdamW(p, 0.01), "lr": 0.0},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"early_stopping": 1, "validation": 0.3, "lr": 0.5, "epochs": 8},
    ],
    ids=["adamw", "momentum", "early stopping"],
)
def test_options_of_many(options, device, stacks, tmp_path):
    def ensemble():
        torch.manual_seed(3)
        return [nn.MLP([9, 8, 6, 4], ["maxout", "elu"], pieces=3, device=device) for _ in range(5)]

    assert_many_are_as_each_alone(device, 1e-4, ensemble, each=[{"seed": k} for k in range(5)], **options)
    assert stacks[0] == 5


def test_gated_networks_are_stacks_of_their_own(device, stacks):
    def ensemble():
        torch.manual_seed(3)
        kinds = [nn.LinearActivation, nn.GatedLinear, nn.GatedLinear, nn.LinearActivation, nn.GatedLinear]
        return [
            torch.nn.Sequential(kind(9, 7, "silu", device=device), nn.GatedMLP(7, 5, device=device), last)
            for kind in kinds
            for last in [nn.LinearActivation(7, 4, "identity", device=device)]
        ]

    assert_many_are_as_each_alone(device, 1e-5, ensemble, each=[{"seed": k} for k in range(5)])
    assert stacks == [2, 3]


def test_many_classes(device, stacks):
    models = [nn.MLP([9, 7, 4], "tanh", dtype=torch.float64, device=device) for _ in range(3)]
    alone = copy.deepcopy(models)
    for model in models, alone:
        model[1][0].weight.requires_grad_(False)
    x, d = torch.randn(67, 9, dtype=torch.float64), torch.randint(4, (67,))
    for loss in ("squared_error", "cross_entropy"):
        options = {"loss": loss, "seed": 1, "engine": "native", "batch_size": 16, "progress": False}
        histories = fit_many(models, x, d, **options)
        for ours, model, history in zip(models, alone, histories, strict=True):
            assert history["accuracy"] == fit(model, x, d, **options)["accuracy"]
            for a, b in zip(ours.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert stacks == [2, 2]  # one has a frozen weight


def test_one_of_many_breaks_down(device):
    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(3)]
    x = torch.randn(67, 9)
    each = [{"lr": 1e38, "epochs": 50}, {"epochs": 10**7}, {"epochs": 10**7}]
    with pytest.raises(FloatingPointError):
        fit_many(models, x, x[:, :4], each=each, engine="native")
    assert all(weight.isfinite().all() for model in models for weight in model.parameters())


def test_ctrl_c_stops_many(device):
    x = torch.randn(67, 9)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(3)]
        fit_many(models, x, x[:, :4], epochs=10**7, lr=1e-3, engine="native")
