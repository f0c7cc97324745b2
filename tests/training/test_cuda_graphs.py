"""Captured steps against the PyTorch loop: the same weights after the same epochs.

Blocks run as calls, recorded operator by operator in the way of a CUDA graph, and, with `pytest -m cuda`, as
CUDA graphs on a GPU.
"""

import copy
import os
import signal

import numpy as np
import pytest
import torch

import mlpext
from graph_recorder import CUDA, graphs
from mlpext import nn
from mlpext.training import engines, fit, fit_many
from mlpext.training._progress import Progress
from mlpext.training.engines import cuda_graphs
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine
from test_native import DTYPES, MODES, TARGETS, assert_engines_agree, trained

pytestmark = pytest.mark.native

# Where the operators of a graph are those of a call: a recording has torch's.
SAME = pytest.mark.parametrize("device", ["calls", CUDA], indirect=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*mlpext.activations(), "maxout"])
@SAME
def test_every_activation(activation, dtype, mode, device):
    params = {"pieces": 3} if activation == "maxout" else {}
    model = nn.MLP([9, 7, 5, 4], activation, dtype=dtype, device=device, **params)
    assert_engines_agree(model, "numbers", mode=mode)


RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 1e-2},
    "sum": {"momentum": 0.5, "weight_decay": 1e-3, "reduction": "sum", "lr": 0.0005},
    "one step": {"shuffle": False, "batch_size": 67},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "sgd": {"optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True)},
    "adam": {"optimizer": lambda p: torch.optim.Adam(p, 0.001, weight_decay=1e-2)},
    "adamw": {"optimizer": lambda p: torch.optim.AdamW(p, 0.001)},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, mode, target, device):
    model = nn.MLP([9, 8, 4], ["elu"], dtype=torch.float64, device=device)
    assert_engines_agree(model, target, mode=mode, **RULES[rule])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_single_precision(rule, mode, device):
    model = nn.MLP([9, 8, 6, 4], ["tanh", "maxout"], pieces=3, device=device)
    assert_engines_agree(model, "numbers", mode=mode, **RULES[rule])


@pytest.mark.parametrize("mode", MODES)
def test_no_bias_and_frozen_parameters(mode, device):
    options = {"dtype": torch.float64, "device": device}
    assert_engines_agree(nn.MLP([9, 6, 5, 4], "gelu", bias=False, **options), "numbers", mode=mode)
    for frozen in (["0.weight"], ["1.bias"], ["0.weight", "0.bias", "1.weight"]):
        model = nn.MLP([9, 6, 5, 4], "tanh", **options)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        assert_engines_agree(model, "numbers", mode=mode, weight_decay=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_held_out_samples_and_early_stopping(mode, device):
    model = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64, device=device)
    options = {"validation": 0.3, "early_stopping": 1, "epochs": 6, "lr": 0.2}
    assert_engines_agree(model, "classes, cross_entropy", mode=mode, **options)


def test_rows_of_a_memory_map(device, tmp_path):
    x = torch.randn(67, 9, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    models = [nn.MLP([9, 6, 4], "tanh", dtype=torch.float64, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, data in zip(models, (x, np.load(tmp_path / "x.npy", mmap_mode="r")), strict=True):
        options = {"batch_size": 16, "seed": 1, "progress": False, "engine": "native", "validation": 0.2}
        fit(model, data, x[:, :4].sin(), **options)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_autocast_is_left_aside(device):
    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.autocast(device, torch.bfloat16):
        trained("native", models[0], "numbers")
    trained("autograd", models[1], "numbers")
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


def test_fit_moves_model_and_data(device):
    models = [nn.MLP([9, 7, 4], "tanh") for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x, d = np.random.default_rng(1).normal(size=(67, 9)), torch.randint(4, (67,)).numpy()
    options = {"device": device, "seed": 1, "validation": (x, d), "progress": False}
    fit(models[0], x, d, engine="native", **options)
    fit_many(models[1:], x, d, engine="native", **options)
    for model in models:
        assert model[0].weight.device.type == device
        for ours, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_a_callback_may_change_rate_and_momentum(make, dtype, device):
    models = [nn.MLP([9, 7, 4], "tanh", dtype=dtype, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, engine in zip(models, ("native", "autograd"), strict=True):
        optimizer = make(model.parameters(), lr=0.01)

        def change(epoch, group=optimizer.param_groups[0]):
            group["lr"] *= 0.5
            if epoch.epoch == 3:
                group["weight_decay"] = 0.1

        trained(engine, model, "numbers", optimizer=optimizer, callbacks=[change], epochs=6)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=DTYPES[dtype], atol=0.01 * DTYPES[dtype])


@pytest.mark.parametrize("device", ["recorded", CUDA], indirect=True)
def test_graphs_are_replayed(device):
    """67 samples are two blocks of 32 and one of 3. Each is captured when it comes again; in float32 another
    rate goes on with the graphs, weight decay makes new ones."""
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    group = optimizer.param_groups[0]
    made = []

    def change(epoch):
        made.append(len(graphs))
        group["lr"] *= 0.5
        if epoch.epoch == 3:
            group["weight_decay"] = 0.1

    trained("native", model, "numbers", optimizer=optimizer, callbacks=[change], epochs=5)
    assert made == [1, 2, 2, 3, 4]
    assert [graph.replays for graph in graphs] == [5, 2, 3, 1]


@pytest.mark.parametrize("mode", MODES)
@SAME
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(mode, device, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, 0.01)

    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"mode": mode, "optimizer": adam}
    trained("native", models[0], "numbers", epochs=5, **options)
    trained("native", models[1], "numbers", epochs=2, checkpoint=tmp_path, **options)
    trained("native", models[1], "numbers", epochs=5, checkpoint=tmp_path, resume=True, **options)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("mode", "steps"), [("stochastic", 4), ("mini-batch", 4), ("batch", 0)])
def test_ctrl_c_completes_the_block(mode, steps, device, monkeypatch):
    """Pressed in the second block: the model has made its steps and no others; in batch mode in the first,
    and none."""
    model = nn.MLP([9, 7, 4], "tanh", dtype=torch.float64, device=device)
    other, take, calls = copy.deepcopy(model), cuda_graphs.Steps._take, []
    x = torch.randn(67, 9, dtype=torch.float64)

    def pressed(*arguments):
        calls.append(0)
        if len(calls) == (1 if mode == "batch" else 2):
            os.kill(os.getpid(), signal.SIGINT)
        return take(*arguments)

    monkeypatch.setattr(cuda_graphs.Steps, "_take", pressed)
    options = {"batch_size": 16, "mode": mode, "lr": 0.1, "epochs": 1, "shuffle": False, "progress": False}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.raises(KeyboardInterrupt):
        fit(model, x, x[:, :4].sin(), engine="native", optimizer=optimizer, **options)
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
    rows = steps * (1 if mode == "stochastic" else 16)
    if rows:
        optimizer = torch.optim.Adam(other.parameters(), 0.01)
        fit(other, x[:rows], x[:rows, :4].sin(), engine="autograd", optimizer=optimizer, **options)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_loss_stops_and_weights_come_back(mode, device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LOOK", 0.0)
    model = nn.MLP([9, 7, 4], "relu", device=device)
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="of epoch [12]; try a smaller lr"):
        trained("native", model, "numbers", lr=1e30, mode=mode)
    assert len(before) == len(model)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_progress_adds_up(device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LOOK", 0.0)
    told = []
    monkeypatch.setattr(Progress, "on_progress", lambda self, *news: told.append(news))
    history = trained("native", nn.MLP([9, 7, 4], "tanh", device=device), "numbers", epochs=1)
    assert [rows for rows, _ in told] == [32, 32, 3]
    assert sum(rows * error for rows, error in told) / 67 == pytest.approx(history["loss"][0], rel=1e-6)


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_no_synchronisation_within_an_epoch(mode, target, device, monkeypatch):
    """Once the graphs are made the host waits for the losses and for the metric, at the end."""
    reads, epochs = [], []
    read, run_epoch = cuda_graphs._read, CudaGraphsEngine.run_epoch

    def reading(values):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(epochs))
        values = read(values)
        torch.cuda.set_sync_debug_mode(mode)
        return values

    def running(*arguments):
        epochs.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(epochs) > 2 else "default")
        try:
            return run_epoch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(cuda_graphs, "_read", reading)
    monkeypatch.setattr(CudaGraphsEngine, "run_epoch", running)
    monkeypatch.setattr(cuda_graphs, "LOOK", 1e9)
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    trained("native", model, target, mode=mode, epochs=5, validation=0.2, momentum=0.9)
    assert reads == [epoch for epoch in range(1, 6) for _ in range(2)]


def test_auto_takes_the_loop_until_graphs_are_measured(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setitem(engines.NATIVE, "cpu", CudaGraphsEngine)
    calls = []
    monkeypatch.setattr(CudaGraphsEngine, "run_epoch", lambda *arguments: calls.append(arguments))
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    other = copy.deepcopy(model)
    trained("auto", model, "numbers")
    trained("autograd", other, "numbers")
    assert not calls
    for ours, loops in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, loops)
