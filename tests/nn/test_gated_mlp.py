"""nn.GatedMLP: one operator, equal to its layers one by one, that keeps two values a hidden unit."""

import pytest
import torch

from common import NAMES, Kept, assert_close, eager, every_float, gradients
from mlpext import nn

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("error")]
# Of these eager keeps no z beside f(z), from which their derivative comes: three values a hidden unit.
KEEP_F = ("identity", "relu", "sigmoid", "tanh")


def by_layers(model):
    return lambda x, *parameters: model.down(model.gated(x))


def whole(model):
    def call(x, *parameters):
        y = model(x)
        assert y.grad_fn.name() == "MlpBackward0"
        return y

    return call


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_its_layers(name, bias, dtype):
    model = nn.GatedMLP(5, 7, name, bias, dtype=dtype)
    inputs = [torch.randn(4, 5, dtype=dtype, requires_grad=True), *model.parameters()]
    assert_close(gradients(whole(model), inputs), gradients(by_layers(model), inputs))
    assert [key for key in model.state_dict() if "weight" in key] == ["gated.weight", "down.weight"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_kept(name, bias):
    """8 a hidden unit in float32, half of eager's z1, f(z1), z2 and their product."""
    model, x = nn.GatedMLP(16, 64, name, bias), torch.randn(10, 16)
    with Kept(x, *model.parameters()) as kept:
        y = model(x)
    assert kept.bytes == 8 * 10 * 64
    gate, up, down = model.to_linear()
    with Kept(x, *(p for layer in (gate, up, down) for p in layer.parameters())) as eagers:
        y = down(eager(name, {})(gate(x)) * up(x))
    assert kept.bytes <= eagers.bytes * (2 / 3 if name in KEEP_F else 1 / 2)
    del y


def test_a_hook_is_called():
    model, seen = nn.GatedMLP(5, 7), []
    model.gated.register_forward_hook(lambda *_: seen.append("hook"))
    assert model(torch.randn(4, 5)).grad_fn.name() != "MlpBackward0"
    assert seen == ["hook"]


def test_forward_calls_gated_and_down_whatever_else_is_there():
    x, model = torch.randn(4, 5), nn.GatedMLP(5, 5)
    expected = model(x)
    model.adapter = nn.LinearActivation(5, 5)
    assert_close(model(x), expected)
    del model.adapter
    gated = model.gated
    del model.gated
    model.gated = gated  # now behind `down`
    assert_close(model(x), expected)


def test_layers_with_and_without_a_bias():
    x, model = torch.randn(4, 5), nn.GatedMLP(5, 7)
    model.down = nn.LinearActivation(7, 5, "identity")
    assert_close(model(x), model.down(model.gated(x)))
