"""The native engine against the PyTorch loop: the same weights after the same epochs."""

import copy
import itertools
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mlpext
from mlpext import nn
from mlpext.training import _samples, evaluate, fit

pytestmark = pytest.mark.native

MODES = ("stochastic", "mini-batch", "batch")
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}
TARGETS = ("numbers", "classes, squared_error", "classes, cross_entropy")


def trained(engine, model, target, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(67, 9, generator=generator, dtype=next(model.parameters()).dtype)
    numbers = torch.randn(67, 4, generator=generator, dtype=x.dtype)
    classes = torch.randint(4, (67,), generator=generator)
    loss = "cross_entropy" if target.endswith("cross_entropy") else "squared_error"
    options = {"batch_size": 16, "lr": 0.01, "epochs": 3, "seed": 1, "progress": False, **options}
    d = numbers if target == "numbers" else classes
    return fit(model, x, d, loss=loss, engine=engine, **options)


def assert_engines_agree(model, target, **options):
    other = copy.deepcopy(model)
    native, autograd = (
        trained("native", model, target, **options),
        trained("autograd", other, target, **options),
    )
    bound = DTYPES[next(model.parameters()).dtype]
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error <= bound, f"{name}: {error:.1e}"
    assert native["loss"] == pytest.approx(autograd["loss"], rel=100 * bound)
    for column in set(native.columns) & {"accuracy", "r2"}:
        assert native[column] == pytest.approx(autograd[column], rel=100 * bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [*mlpext.activations(), "maxout"])
def test_every_activation(activation, mode, dtype):
    params = {"pieces": 3} if activation == "maxout" else {}
    model = nn.MLP([9, 7, 5, 4], activation, dtype=dtype, **params)
    assert_engines_agree(model, "numbers", mode=mode)


def gated_network(widths, activation="silu", **options):
    """Gated layers, the last of them without an activation behind its products' product."""
    layers = [nn.GatedLinear(*pair, activation, **options) for pair in itertools.pairwise(widths)]
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", mlpext.activations())
def test_every_gate(activation, mode, dtype):
    # lr: relu_squared makes outputs of the sixth degree.
    assert_engines_agree(gated_network([9, 7, 4], activation, dtype=dtype), "numbers", mode=mode, lr=0.001)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlps(bias, mode):
    """As the model itself, in a row, and of layers that are frozen."""
    whole = nn.GatedMLP(9, 13, bias=bias, dtype=torch.float64)
    whole.down = nn.LinearActivation(13, 4, "identity", bias, dtype=torch.float64)
    first = nn.GatedMLP(9, 17, "gelu", bias, dtype=torch.float64)
    row = torch.nn.Sequential(first, nn.Maxout(9, 6, dtype=torch.float64), *gated_network([6, 4], bias=bias))
    row.double()
    for model in (whole, row):
        assert_engines_agree(model, "numbers", mode=mode, momentum=0.9, lr=0.001)
    row[0].gated.weight.requires_grad_(False)
    row[0].down.requires_grad_(False)
    assert_engines_agree(row, "classes, cross_entropy", mode=mode, weight_decay=0.1, lr=0.001)


@pytest.mark.parametrize("mode", MODES)
def test_gated_layers_in_an_mlp_with_dropout(mode):
    model = nn.MLP([9, 8, 8], "tanh", "gelu", dropout=0.3, dtype=torch.float64)
    model[1] = nn.GatedLinear(8, 6, dtype=torch.float64)
    model.append(nn.LinearActivation(6, 4, "identity", dtype=torch.float64))
    assert_engines_agree(model, "classes, cross_entropy", mode=mode, l2=0.1, clip_grad_norm=0.1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"weight_decay": 1e-2},
        {"momentum": 0.5, "weight_decay": 1e-3, "reduction": "sum", "lr": 0.0005},
        {"shuffle": False, "batch_size": 67},
        {"optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True)},
        {"optimizer": lambda p: torch.optim.Adam(p, 0.001, weight_decay=1e-2)},
        {"optimizer": lambda p: torch.optim.AdamW(p, 0.001)},
    ],
    ids=["momentum", "decay", "sum", "one step", "nesterov", "adam", "adamw"],
)
def test_every_rule(options, mode, target):
    model = nn.MLP([9, 33, 4], ["elu"], dtype=torch.float64)
    assert_engines_agree(model, target, mode=mode, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("widths", [(9, 1, 4), (9, 64, 65, 4), (9, 130, 4), (9, 4)], ids=str)
def test_widths_around_the_panels(widths, mode):
    assert_engines_agree(nn.MLP(widths, "tanh", dtype=torch.float64), "numbers", mode=mode)
    assert_engines_agree(gated_network(widths, "tanh", dtype=torch.float64), "numbers", mode=mode)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_outputs(mode, dtype):
    """Up to two of the widest registers and one more: none is left out of the loss, nor of the gradient."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=dtype)
    for outputs in range(1, 34):
        model = nn.MLP([3, 4, outputs], "tanh", dtype=dtype)
        numbers = torch.randn(5, outputs, generator=generator, dtype=dtype)
        classes = torch.randint(outputs, (5,), generator=generator)
        for d, loss in ((numbers, "squared_error"), (classes, "squared_error"), (classes, "cross_entropy")):
            if loss == "cross_entropy" and outputs == 1:
                continue  # refused: E is 0 whatever the weights
            options = {"mode": mode, "loss": loss, "epochs": 1, "progress": False, "engine": "native"}
            expected = evaluate(model, x, d, loss=loss)["loss"]
            measured = fit(model, x, d, lr=0, **options)["loss"][0]
            assert measured == pytest.approx(expected, rel=1e-5, abs=1e-7), (outputs, loss)
            before = [p.detach().clone() for p in model.parameters()]
            fit(model, x, d, lr=0.1, **options)
            for old, new in zip(before, model.parameters(), strict=True):
                assert (old != new).all(), (outputs, loss)


@pytest.mark.parametrize("mode", MODES)
def test_no_bias_and_frozen_parameters(mode):
    assert_engines_agree(nn.MLP([9, 6, 5, 4], "gelu", bias=False, dtype=torch.float64), "numbers", mode=mode)
    for frozen in (["0.weight"], ["0.bias"], ["1.bias"], ["2.weight"], ["0.weight", "0.bias", "1.weight"]):
        model = nn.MLP([9, 6, 5, 4], "tanh", dtype=torch.float64)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        assert_engines_agree(model, "numbers", mode=mode)
        assert_engines_agree(model, "numbers", mode=mode, weight_decay=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_rows_that_come_in_blocks(mode, tmp_path):
    """A memory-mapped array is read a block at a time; the blocks' ends divide no step."""
    x = torch.randn(2500, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64)
    results = []
    for data, engine in ((x, "native"), (mapped, "native"), (mapped, "autograd")):
        results.append(copy.deepcopy(model))
        options = {"batch_size": 48, "lr": 0.1, "epochs": 2, "seed": 1, "progress": False}
        fit(results[-1], data, x[:, :4].sin(), mode=mode, engine=engine, **options)
    for other in results[1:]:
        for ours, theirs in zip(results[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def memory_map(x, folder):
    np.save(folder / "x.npy", x.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("count", [1, 2, 95, 96, 97, 100, 1023, 1024, 1025, 1500, 2049])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_of_any_number_of_rows(target, mode, count, tmp_path):
    """Batch mode of 100 such rows was refused (1024 is no multiple of 100). Of 1500 the last chunk of a block
    began the next one early: the rows left over counted in the metric, with no outputs of their own."""
    x = torch.randn(count, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = x[:, :4].sin() if target == "numbers" else x[:, :4].argmax(1)
    loss = "cross_entropy" if target.endswith("cross_entropy") else "squared_error"
    options = {"mode": mode, "loss": loss, "batch_size": 48, "lr": 0.1, "epochs": 2, "seed": 1}
    if count > 2:
        options["validation"] = 0.2
    layouts = {
        "dense": x,
        "transposed": x.t().contiguous().t(),
        "strided": x.repeat(1, 2)[:, ::2].copy_(x),
        "memory map": memory_map(x, tmp_path),
    }
    results = {}
    for name, rows in layouts.items():
        model = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64)
        model.load_state_dict(START)
        results[name] = (
            fit(model, rows, d, engine="native", progress=False, **options),
            list(model.parameters()),
        )
    expected, weights = results["dense"]
    for name, (history, own) in results.items():
        for column in set(expected.columns) - {"seconds", "samples_per_second"}:
            assert history[column] == pytest.approx(expected[column], rel=1e-9), (name, column)
        for ours, theirs in zip(own, weights, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


START = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64).state_dict()


@pytest.mark.parametrize("block", [1, 7, 64, 95, 96, 97, 1000])
@pytest.mark.parametrize("mode", MODES)
def test_blocks_of_any_size(mode, block, monkeypatch, tmp_path):
    """Below, at and above the 96 rows of a chunk; steps are whole in a block, or longer than it."""
    monkeypatch.setattr(_samples, "BLOCK", block)
    x = torch.randn(500, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    histories = []
    for rows in (x, memory_map(x, tmp_path)):
        model = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64)
        model.load_state_dict(START)
        options = {"batch_size": 60, "lr": 0.1, "epochs": 2, "seed": 1, "progress": False}
        histories.append(fit(model, rows, x[:, :4].sin(), mode=mode, engine="native", **options))
    for column in ("loss", "r2"):
        assert histories[1][column] == pytest.approx(histories[0][column], rel=1e-9)


def test_ctrl_c_then_resume_ends_as_if_never_interrupted(tmp_path):
    """Wherever it lands: in an epoch of 50 ms, in the checkpoint's writing, between epochs."""
    x = torch.randn(200_000, 9, generator=torch.Generator().manual_seed(1))
    options = {
        "mode": "stochastic",
        "lr": 1e-3,
        "epochs": 3,
        "seed": 1,
        "progress": False,
        "engine": "native",
    }
    models = [nn.MLP([9, 8, 4], "tanh")]
    first_weights = copy.deepcopy(models[0].state_dict())
    models.append(copy.deepcopy(models[0]))
    started = time.perf_counter()
    fit(models[0], x, x[:, :4].sin(), **options)
    took = time.perf_counter() - started
    chance, interrupted = random.Random(2), 0
    for _ in range(100):
        timer = threading.Timer(chance.uniform(0.01, took), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            fit(models[1], x, x[:, :4].sin(), **options, checkpoint=tmp_path, resume=interrupted > 0)
            timer.cancel()
            timer.join()
            if interrupted > 0:
                break
            models[1].load_state_dict(first_weights)  # it was through before the signal: once more
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 0
    # On a machine that has become busy since, none of the runs may have come to the end before its signal.
    fit(models[1], x, x[:, :4].sin(), **options, checkpoint=tmp_path, resume=True)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_it_does_not_serve_is_said():
    layer = torch.nn.Linear(9, 4)
    with pytest.raises(ValueError, match="engine='native' cannot train this"):
        trained("native", torch.nn.Sequential(layer), "numbers")
    hooked = nn.MLP([9, 4])
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        trained("native", hooked, "numbers")
    assert len(trained("auto", hooked, "numbers")) == 3


def _another_class_of_parameter(net):
    net[0].weight = type("Mine", (torch.nn.Parameter,), {})(net[0].weight.detach())


def _not_contiguous(net):
    net[1].weight = torch.nn.Parameter(net[1].weight.detach().t().contiguous().t())


@pytest.mark.parametrize(
    "change, why",
    [
        (_another_class_of_parameter, "a layer's weight is a Mine, not a Parameter"),
        (_not_contiguous, "not contiguous"),
    ],
    ids=["parameter", "strides"],
)
def test_why_it_does_not_serve_a_network(change, why):
    net = nn.MLP([9, 7, 4])
    change(net)
    with pytest.raises(ValueError, match=f"engine='native' cannot train this.*{why}"):
        trained("native", net, "numbers")


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_groups_of_parameters_and_dispatch_modes_are_refused():
    net = nn.MLP([9, 7, 4])
    groups = torch.optim.SGD([{"params": layer.parameters()} for layer in net], lr=0.1)
    with pytest.raises(ValueError, match="more than one group"):
        trained("native", net, "numbers", optimizer=groups)
    with Watching(), pytest.raises(ValueError, match="dispatch mode"):
        trained("native", net, "numbers")


def test_a_callback_may_change_the_learning_rate():
    models = [nn.MLP([9, 7, 4], "tanh", dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, engine in zip(models, ("native", "autograd"), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def change(epoch, group=optimizer.param_groups[0]):
            group["lr"] *= 0.5

        trained(engine, model, "numbers", optimizer=optimizer, callbacks=[change], lr=0.0)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
