"""What the tests of fuse share: a pair to change, torch's activations, the comparison of two models."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mlpext


def mlp(*sizes, act=nn.Tanh, **kwargs):
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), act(**kwargs))]
    return nn.Sequential(*layers[:-1])


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@dataclass
class Architecture:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple] = lambda: (randn(5, 6),)
    fused: tuple[str, ...] = ()  # linear layers that become LinearActivation
    # Modules whose forward has a gated unit, each with the linear layers of it.
    gated: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)  # what does not, with part of the reason
    functions: tuple[str, ...] = ()  # those that are fused with a function, in the forward of their module
    graph: bool = True  # graph=True makes a GraphModule


LAST = "no activation follows it"


def flat(output):
    """All that a model returns, in one tensor."""
    return torch.cat([part.flatten() for part in tree_leaves(output)])


def results(model, inputs):
    """Output, and the gradient of every input and parameter."""
    torch.manual_seed(1)  # for dropout
    output = flat(model(*inputs))
    wanted = [t for t in [*inputs, *model.parameters()] if t.requires_grad]
    gradients = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return output.detach(), *gradients


def assert_same(model, other, inputs, tolerance=4e-12):
    for mode in (True, False):
        expected, actual = results(model.train(mode), inputs), results(other.train(mode), inputs)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def rows(report, action):
    return {path: reason for path, what, reason in report if what == action}


def unfused(report):
    """Why layers and activations are fused with nothing."""
    reasons = {**rows(report, "left"), **rows(report, "replaced")}
    return {path: reason.removeprefix("by mlpext.nn.Linear: ") for path, reason in reasons.items()}


def is_alone(linear, before):
    """Whether a linear layer is fused with nothing."""
    return type(linear) in (type(before), mlpext.nn.Linear)


def types(model):
    return {path: type(module) for path, module in model.named_modules()}


def fuse(model, *inputs, **kwargs):
    """The fused model and its report, once seen to be the same."""
    fused, report = mlpext.fuse(model.double(), report=True, **kwargs)
    # torch's gradients of these two take 1 / alpha and 1 / 6 in float32.
    coarse = any(word in repr(model) or word in str(report) for word in ("CELU", "celu", "ardsigmoid"))
    assert_same(model, fused, inputs or (randn(5, 6),), 1e-7 if coarse else 1e-12)
    return fused, report


class Pair(nn.Module):
    """self.act(self.fc(x)), for tests that change one thing."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x))


def reason(model, path="fc", **kwargs):
    """Why `path` was fused with nothing, once all is seen to be the same."""
    fused, report = fuse(model, **kwargs)
    assert is_alone(fused.get_submodule(path), model.get_submodule(path))
    return unfused(report)[path]


ACTIVATIONS = {
    "Sigmoid": {},
    "Tanh": {},
    "ReLU": {"inplace": True},
    "LeakyReLU": {"negative_slope": 0.2},
    "ELU": {"alpha": 0.7},
    "GELU": {"approximate": "tanh"},
    "SiLU": {"inplace": True},
    "Mish": {},
    "Softplus": {"beta": 2, "threshold": 3},
    "SELU": {},
    "CELU": {"alpha": 0.7},
    "ReLU6": {},
    "Hardtanh": {"min_val": -0.4, "max_val": 0.3},
    "Hardsigmoid": {},
    "Hardswish": {},
    "LogSigmoid": {},
    "Softsign": {},
    "Tanhshrink": {},
    "Softshrink": {"lambd": 0.2},
    "Hardshrink": {"lambd": 0.2},
    "Threshold": {"threshold": 0.2, "value": -0.5},
}
