"""Methods beside forward that call a layer alone, or take a chain apart."""

import pytest
import torch
from torch import nn

import mlpext
from fusion_common import Pair, fuse, is_alone, reason
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


class OtherMethod(Pair):
    def features(self, x):
        return self.fc(x)


class HelperForBoth(Pair):
    def block(self, x):
        return self.act(self.fc(x))

    def forward(self, x):
        return self.block(x)


class HelperForOne(Pair):
    def before(self, x):
        return self.fc(x)

    def forward(self, x):
        return self.act(self.before(x))


class OnlyReads(Pair):
    def penalty(self):
        return self.fc.weight.square().sum() if self.act is not None else 0


class Reaches(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        return self.pair(x)

    def features(self, x):
        return self.pair.fc(x)


def test_other_methods():
    assert reason(OtherMethod()) == "OtherMethod.features uses fc in a way that cannot be followed"
    assert reason(HelperForOne()) == "HelperForOne.before uses fc in a way that cannot be followed"
    assert reason(Reaches(), "pair.fc") == "Reaches.features reaches into Pair"
    for cls in (HelperForBoth, OnlyReads):
        assert type(fuse(cls())[0].fc) is LinearActivation


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))


class Iterates(Chain):
    def forward(self, x):
        outputs = []
        for layer in self.net:
            x = layer(x)
            outputs.append(x)
        return torch.cat(outputs)


class IteratesUnseen(Chain):
    def forward(self, x):
        if x.sum() > 1e9:
            return x
        outputs = [x := layer(x) for layer in self.net]
        return torch.cat(outputs)


class CallsUnseen(Chain):
    def forward(self, x):
        return self.net(x) if x.sum() < 1e9 else torch.utils.checkpoint.checkpoint(self.net, x)


class Slices(Chain):
    def forward(self, x):
        return self.net(x) + self.net[:1](x)


class OwnChain(nn.Sequential):
    def first(self, x):
        return self[0](x)


def test_chains_that_are_taken_apart():
    assert "used more than once" in reason(Iterates(), "net.0")
    assert "IteratesUnseen.forward uses net" in reason(IteratesUnseen(), "net.0")
    assert "Slices.forward uses net" in reason(Slices(), "net.0")
    assert "OwnChain.first takes it apart" in reason(OwnChain(nn.Linear(6, 6), nn.ReLU()), "0")
    assert type(fuse(CallsUnseen())[0].net[0]) is LinearActivation


def test_tracing_leaves_no_trace():
    class Counts(Pair):
        def __init__(self):
            super().__init__()
            self.calls, self.log, self.last = 0, [], None
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            print("called")
            self.calls += 1
            self.last = self.act(self.fc(x))
            self.log.append(self.last)
            self.count += 1
            return self.last + torch.rand(())

    model, state = Counts(), torch.get_rng_state()
    for inplace in (False, True):
        fused = mlpext.fuse(model, inplace=inplace)
        assert fused.calls == 0 and fused.log == [] and fused.last is None and fused.count == 0
    assert torch.equal(torch.get_rng_state(), state)


class AskedByArgument(Pair):
    def forward(self, x, probe=True):
        return self.fc(x) if probe is True else self.act(self.fc(x))


class AskedByArguments(Pair):
    def forward(self, x, *args):
        return self.act(self.fc(x)) if args else self.fc(x)


class AskedByKeywords(Pair):
    def forward(self, x, **kwargs):
        return self.fc(x) if kwargs.get("act") is None else self.act(self.fc(x))


@pytest.mark.parametrize("cls", [AskedByArgument, AskedByArguments, AskedByKeywords])
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_arguments_that_decide(cls, graph):
    model = cls().double()
    fused, _ = fuse(model, graph=graph)
    assert is_alone(fused.fc, model.fc)


def test_a_method_that_only_asks_for_a_layer():
    class Initialised(Pair):
        def reset(self):
            if hasattr(self.fc, "bias"):
                nn.init.zeros_(self.fc.bias)

    assert type(fuse(Initialised())[0].fc) is LinearActivation
