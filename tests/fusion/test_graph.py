"""graph=True: each activation as a function, and each way to write a maxout."""

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import mlpext
from fusion_common import ACTIVATIONS, Pair, fuse, randn

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


class Call(nn.Module):
    """One linear layer and a function of its output."""

    def __init__(self, function, outputs=12):
        super().__init__()
        self.a, self.function = nn.Linear(6, outputs), function

    def forward(self, x):
        return self.function(self.a(x))


def graph_of(function, *inputs):
    """The functions that are left in the fused graph."""
    fused, _ = fuse(Call(function), *inputs, graph=True)
    return [node.target for node in fused.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_function(name):
    words = {"LeakyReLU": "leaky_relu", "LogSigmoid": "logsigmoid"}
    function = getattr(TF, words.get(name, name.lower()))
    arguments = ACTIVATIONS[name]
    ours = [mlpext.functional.linear_activation]
    assert graph_of(lambda z: function(z, **arguments)) == ours
    assert graph_of(lambda z: function(z, *arguments.values()) if name != "GELU" else function(z)) == ours


@pytest.mark.parametrize(
    "function",
    [
        *(torch.relu, torch.tanh, torch.sigmoid, torch.selu, lambda z: torch.celu(z, 0.5)),
        *(lambda z: z.relu(), lambda z: z.tanh(), lambda z: z.sigmoid(), torch.sin, lambda z: z.sin()),
        *(lambda z: torch.sin(30 * z), lambda z: (z * 0.5).sin(), lambda z: torch.sin(torch.mul(z, 2.0))),
        *(lambda z: TF.relu(z).square(), lambda z: torch.relu(z) ** 2, lambda z: torch.threshold(z, 0.1, 2)),
    ],
)
def test_other_ways_to_write_a_function(function):
    assert graph_of(function) == [mlpext.functional.linear_activation]


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.unflatten(-1, (3, 4)).max(-2).values,
        lambda z: z.unflatten(-1, (3, -1)).max(dim=-2)[0],
        lambda z: z.unflatten(-1, (4, 3)).max(-1)[0],
        lambda z: torch.max(torch.unflatten(z, -1, (3, 4)), -2).values,
        lambda z: z.unflatten(-1, (3, 4)).amax(-2),
        lambda z: z.unflatten(-1, (3, 4)).amax(dim=(-1,)),
        lambda z: z.view(-1, 3, 4).max(1).values,
        lambda z: z.reshape((-1, 4, 3)).amax(2),
    ],
)
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)], ids=["2d", "3d"])
def test_maxout(function, shape):
    assert mlpext.functional.linear_maxout in graph_of(function, randn(*shape))


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.unflatten(-1, (3, 4)).max(-2, keepdim=True).values,
        lambda z: z.unflatten(-1, (3, 4)).max(-2)[1] + z.sum(),
        lambda z: z.unflatten(-1, (3, 4)).amax((-1, -2)),
        lambda z: z.unflatten(-1, (3, 2, 2)).amax(-2),
        lambda z: z.view(-1, 2, 3).amax(-2),
        lambda z: z.view(5, 3, 4).amax(-2),
        lambda z: TF.elu(z) + z,
        lambda z: TF.softmax(z, -1),
        lambda z: TF.elu(z.detach()) + z.sum(),
        lambda z: torch.sin(z * z),
        lambda z: TF.threshold(z, 0.1, z.size(0)),
    ],
)
def test_what_only_looks_like_it(function):
    assert mlpext.functional.linear_maxout not in (found := graph_of(function))
    assert mlpext.functional.linear_activation not in found


def test_the_graph_of_a_graph_can_be_set():
    fused = mlpext.fuse(torch.fx.symbolic_trace(Pair()), graph=True)
    fused.graph = fused.graph
    fused.meta["note"] = "mine"
