"""The native engine against the PyTorch loop: the same weights after the same epochs."""

import copy

import numpy as np
import pytest
import torch

import mlpext
from mlpext import nn
from mlpext.training import fit

MODES = ("stochastic", "mini-batch", "batch")
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}
TARGETS = ("numbers", "classes, squared_error", "classes, cross_entropy")


def trained(engine, model, target, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(67, 9, generator=generator, dtype=model[0].weight.dtype)
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
    bound = DTYPES[model[0].weight.dtype]
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


def test_what_it_does_not_serve_is_said():
    layer = torch.nn.Linear(9, 4)
    with pytest.raises(ValueError, match="engine='native' cannot train this"):
        trained("native", torch.nn.Sequential(layer), "numbers")
    hooked = nn.MLP([9, 4])
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        trained("native", hooked, "numbers")
    assert len(trained("auto", hooked, "numbers")) == 3
