"""Linear, Dropout, activation, in that order: fused where the activation may come before the dropout."""

import pytest
import torch
from torch import nn

import mlpext
from fusion_common import ACTIVATIONS, fuse, randn, reason, rows, types
from mlpext.fusion import FusedActivation
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


class Between(nn.Module):
    """self.act(self.drop(self.fc(x)))."""

    def __init__(self, act=None, **kwargs):
        super().__init__()
        self.fc, self.act, self.drop = nn.Linear(6, 6), act or nn.ReLU(), nn.Dropout(0.4, **kwargs)

    def forward(self, x):
        return self.act(self.drop(self.fc(x)))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.LeakyReLU(-0.5)])
@pytest.mark.parametrize("graph", [False, True])
def test_the_same_in_the_other_order(act, graph):
    model = Between(act)
    fused, report = fuse(model, graph=graph)
    assert rows(report, "fused")["fc"].startswith("with act")
    assert types(fused)["fc"] is LinearActivation and types(fused)["act"] is FusedActivation
    assert type(fused.drop) is nn.Dropout


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_and_the_same_elements_dropped(p, dtype):
    """Small integers, so that the product has no rounding."""
    model = Between().to(dtype)
    model.drop.p = p
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    fused = mlpext.fuse(model)
    x = torch.randint(-3, 4, (50, 6)).to(dtype).requires_grad_()
    results = []
    for net in (model, fused):
        torch.manual_seed(0)
        y = net(x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], y.detach() + 1)])
        results[-1].append(torch.rand(()))  # as many random numbers used
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    if p == 0.5:
        assert 0 < (results[0][0] == 0).float().mean() < 1


def test_other_activations():
    for name in ACTIVATIONS.keys() - {"ReLU", "LeakyReLU"}:
        why = reason(Between(getattr(nn, name)(**ACTIVATIONS[name])))
        assert why.startswith(f"drop (Dropout) comes before its activation act ({name})")
        assert why.endswith("inference=True")


def test_hooks_and_in_place():
    model = Between()
    model.drop.register_forward_hook(lambda *a: None)
    assert reason(model).endswith("and has hooks")
    assert reason(Between(inplace=True)).endswith("and works in place")
    model = Between()
    model.act.register_forward_hook(lambda *a: None)
    assert reason(model) == "its activation act (ReLU) has hooks"


class Twice(Between):
    def forward(self, x):
        return self.act(self.drop(self.fc(x))) + self.act(x)


class Kept(Between):
    def forward(self, x):
        y = self.drop(self.fc(x))
        return self.act(y) + y


class Alone(Between):
    def encode(self, x):
        return self.drop(self.fc(x))


class SharedDropout(Between):
    def forward(self, x):
        return self.drop(self.act(self.drop(self.fc(self.drop(x)))))


def test_other_uses():
    assert reason(Twice()) == "its activation act is also used on the output of x"
    assert reason(Kept()) == "its output goes to drop (Dropout)"
    assert reason(Alone()) == "Alone.encode uses fc in a way that cannot be followed"
    assert type(fuse(SharedDropout())[0].fc) is LinearActivation


def test_one_activation_after_both():
    """With Tanh after a Dropout, the Linear straight before the same Tanh stays too."""
    fc, drop, act = nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh()
    model = nn.Sequential(fc, act, nn.Linear(6, 6), drop, act)
    assert reason(model, "0") == "its activation 1 is also used on the output of 2 (Linear)"
    both = fuse(nn.Sequential(fc, relu := nn.ReLU(), nn.Linear(6, 6), drop, relu))[0]
    assert type(both[0]) is type(both[2]) is LinearActivation and type(both[1]) is FusedActivation
    x = randn(5, 6)
    torch.testing.assert_close(mlpext.fuse(model.eval())(x), model(x))
