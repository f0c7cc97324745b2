"""Activation functions of linear layers, F.relu(self.fc(x)), in the forwards where people write them."""

import copy

import pytest
import torch
import torch.nn.functional as TF
from torch import nn
from torch.nn.utils import parametrizations

import mlpext
from fusion_common import assert_same, randn, rows, unfused
from mlpext import _C
from mlpext.fusion._forwards import FusedForward


def written(expression):
    """A module with the layers fc1 and fc2 whose forward is an expression of self and x."""

    class Written(nn.Module):
        slope = 0.2

        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)
            self.omega = 3.0

        def forward(self, x):
            return expression(self, x)

    torch.manual_seed(0)
    return Written().double()


def fused_calls(model, *inputs):
    """The names of the activations that linear layers compute in one call."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        original = _C.linear_activation

        def count(input, weight, bias, name, params=()):
            if name != "identity":
                names.append(name)
            return original(input, weight, bias, name, params)

        patch.setattr(_C, "linear_activation", count)
        model(*inputs)
    return names


SPELLINGS = {
    "relu": lambda self, x: self.fc2(TF.relu(self.fc1(x))),
    "tanh": lambda self, x: self.fc2(torch.tanh(self.fc1(x))),
    "sigmoid": lambda self, x: self.fc2(self.fc1(x).sigmoid()),
    "leaky_relu": lambda self, x: self.fc2(TF.leaky_relu(self.fc1(x), negative_slope=0.3)),
    "elu": lambda self, x: self.fc2(TF.elu(self.fc1(x), alpha=0.5, inplace=True)),
    "gelu_tanh": lambda self, x: self.fc2(TF.gelu(self.fc1(x), approximate="tanh")),
    "softplus": lambda self, x: self.fc2(TF.softplus(self.fc1(x), 2.0)),
    "sine": lambda self, x: self.fc2(torch.sin(self.omega * self.fc1(x))),
    "silu": lambda self, x: self.fc2(mlpext.functional.silu(self.fc1(x))),
}
LEFT = {
    "z is used twice": lambda self, x: self.fc2(TF.relu(z := self.fc1(x)) + z),
    "something between": lambda self, x: self.fc2(TF.relu(self.fc1(x) + 1)),
    "no gradients": lambda self, x: self.fc2(
        TF.relu(self.fc1(x)) if torch.is_grad_enabled() else self.fc1(x)
    ),
    "in training": lambda self, x: self.fc2(TF.relu(self.fc1(x)) if self.training else self.fc1(x)),
    "a number": lambda self, x: self.fc2(TF.relu(self.fc1(x)) if x.sum() > 0 else self.fc1(x)),
    "random": lambda self, x: self.fc2(TF.relu(self.fc1(x)) if torch.rand([]) < 2 else self.fc1(x)),
    "autocast": lambda self, x: self.fc2(
        self.fc1(x) if torch.is_autocast_enabled("cpu") else TF.relu(self.fc1(x))
    ),
}


@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, graph):
    model, x = written(SPELLINGS[name]), randn(5, 6)
    fused, report = mlpext.fuse(model, graph=graph, report=True)
    assert fused_calls(fused, x) == [name] and fused_calls(model, x) == []
    assert_same(model, fused, (x,))
    assert "fc1" in rows(report, "fused") and "fc2" in unfused(report)
    if not graph:
        twice = mlpext.fuse(fused)
        assert type(twice) is type(fused)
        assert_same(model, twice, (x,))
    assert type(mlpext.unfuse(fused)) is type(model)


@pytest.mark.parametrize("expression", LEFT.values(), ids=LEFT)
def test_left(expression):
    model, x = written(expression), randn(5, 6)
    fused = mlpext.fuse(model)
    assert type(fused) is type(model) and fused_calls(fused, x) == []
    assert_same(model, fused, (x,))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), model(x), rtol=1e-2, atol=1e-2)


def test_modules_of_one_class_share_theirs():
    layers = nn.Sequential(*(written(SPELLINGS["relu"]) for _ in range(3)))
    for layer in layers:  # each is made with a class of its own
        layer.__class__ = type(layers[0])
    fused = mlpext.fuse(layers)
    assert len({type(layer) for layer in fused}) == 1 and isinstance(fused[0], FusedForward)


@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "global"])
def test_hooks_see_what_they_saw(kind):
    """On a layer after it was fused: the pre-activation, as before."""
    model, x, seen = written(SPELLINGS["relu"]), randn(5, 6), []
    fused = mlpext.fuse(model)
    handles = []
    for each in (model, fused):
        if kind == "forward":
            each.fc1.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        elif kind == "forward pre":
            each.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        elif kind == "backward":
            each.fc1.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    if kind == "global":
        is_fc1 = lambda module: isinstance(module, nn.Linear) and module.out_features == 8  # noqa: E731
        handles.append(
            nn.modules.module.register_module_forward_hook(
                lambda module, args, output: seen.append(output.detach()) if is_fc1(module) else None
            )
        )
    try:
        for each in (model, fused):
            each(x).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    torch.testing.assert_close(*seen)


def test_layers_may_be_exchanged_and_changed():
    model, x = written(SPELLINGS["tanh"]), randn(5, 6)
    fused = mlpext.fuse(model)
    for each in (model, fused):
        torch.manual_seed(1)
        each.fc1 = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 8)).double()
    assert isinstance(fused, FusedForward)
    assert_same(model, fused, (x,))

    model = written(SPELLINGS["tanh"])
    fused = mlpext.fuse(model)
    for each in (model, fused):
        each.fc1.weight = nn.Parameter(torch.ones(8, 6, dtype=torch.float64))
    assert fused_calls(fused, x) == ["tanh"]
    assert_same(model, fused, (x,))
    parametrizations.weight_norm(fused.fc1)
    assert fused_calls(fused, x) == []
    torch.testing.assert_close(fused(x), model(x))


def test_attributes_that_the_forward_reads_may_change():
    model, x = written(SPELLINGS["sine"]), randn(5, 6)
    fused = mlpext.fuse(model)
    twin = copy.deepcopy(fused)
    model.omega = fused.omega = 2.0
    assert type(fused) is type(model)
    assert_same(model, fused, (x,))
    assert fused_calls(twin, x) == ["sine"]
    fused = mlpext.fuse(model)
    assert fused_calls(fused, x) == ["sine"]
    assert_same(model, fused, (x,))


def test_other_attributes_are_nobodys_business():
    fused = mlpext.fuse(written(SPELLINGS["sine"]))
    fused.note, fused.training = "of ours", False
    assert isinstance(fused, FusedForward) and fused.eval() is fused.train()


def test_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x, scale=2.0, *, shift=None):
            y = TF.relu(self.fc(x)) * scale
            return {"y": y, "x": (x, y)}

    model, x = Net().double(), randn(5, 6)
    fused = mlpext.fuse(model)
    for arguments in ({}, {"scale": 3.0}, {"scale": torch.tensor(4.0), "shift": None}):
        expected, actual = model(x, **arguments), fused(x, **arguments)
        torch.testing.assert_close(actual, expected)
    with pytest.raises(TypeError, match="unexpected keyword"):
        fused(x, nothing=1)


@pytest.mark.compile
def test_compile_export_and_transforms():
    model, x = written(SPELLINGS["relu"]), randn(5, 6)
    fused = mlpext.fuse(model)
    torch._dynamo.reset()
    assert_same(model, torch.compile(fused, backend="aot_eager", fullgraph=True), (x,))
    x = x.detach()
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), model(x))
    torch.testing.assert_close(torch.jit.trace(fused, (x,))(x), model(x))
    torch.testing.assert_close(torch.func.vmap(fused)(x), model(x))
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(fused, parameters, (x,)), model(x))
    checkpointed = torch.utils.checkpoint.checkpoint(fused, x.requires_grad_(), use_reentrant=False)
    torch.testing.assert_close(checkpointed, model(x))
