"""Gated units, f(gate) * value, in the forwards where people write them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import mlpext
from fusion_common import assert_same, randn, rows, unfused
from mlpext import functional as F
from mlpext.fusion._forwards import FusedForward


class Gated(nn.Module):
    """down(f(gate(x)) * up(x)), for tests that change one thing."""

    def __init__(self, act=nn.SiLU, hidden=8):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, hidden), nn.Linear(6, hidden), nn.Linear(hidden, 6)
        self.act = act()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """down of both halves of one layer, of which the last is the gate, unless told otherwise."""

    def __init__(self, act=nn.GELU, gate_last=True):
        super().__init__()
        self.packed, self.down, self.act = nn.Linear(6, 16), nn.Linear(8, 6), act()
        self.gate_last = gate_last

    def forward(self, x):
        first, last = self.packed(x).chunk(2, dim=-1)
        return self.down(first * self.act(last) if self.gate_last else self.act(first) * last)


class ReGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return value * TF.relu(gate)


class OwnLeaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 0.1

    def forward(self, x):
        return TF.leaky_relu(x, self.slope)


class Mixed(Gated):
    """As T5: down may be in float32 where the rest is not."""

    def forward(self, x):
        x = self.act(self.gate(x)) * self.up(x)
        if isinstance(self.down.weight, torch.Tensor) and x.dtype != self.down.weight.dtype:
            x = x.to(self.down.weight.dtype)
        return self.down(x)


def written(expression):
    """A Gated whose forward is down(expression of self and x)."""

    class Written(Gated):
        def forward(self, x):
            return self.down(expression(self, x))

    return Written()


def packed(expression):
    """A Packed whose forward is down(expression of self and both halves)."""

    class Written(Packed):
        def forward(self, x):
            return self.down(expression(self, self.packed(x)))

    return Written()


def more_arguments(self, x, *args, scale=1.0, mask=None, **kwargs):
    return self.down(self.act(self.gate(x)) * self.up(x) * scale)


def only_if_asked(self, x, **kwargs):
    return self.up(x) if kwargs.get("gated") is None else self.down(self.act(self.gate(x)) * self.up(x))


def only_if_false(self, x, plain=True):
    return self.up(x) if plain is True else self.down(self.act(self.gate(x)) * self.up(x))


def only_of_a_tensor(self, x, scale=1.0):
    y = self.up(x)
    return self.act(self.gate(x)) * y if isinstance(scale, torch.Tensor) else y


def keeping(self, x):
    self.calls.append(x.shape)
    return self.down(self.act(self.gate(x)) * self.up(x)) * len(self.calls)


def noting(self, x):
    self.seen = self.seen + 1
    return self.down(self.act(self.gate(x)) * self.up(x)) * self.seen


def printing(self, x):
    print("here")
    return self.down(self.act(self.gate(x)) * self.up(x))


def with_forward(function, **attributes):
    """A Gated with that forward, and with attributes that it reads."""
    model = type("Own", (Gated,), {"forward": function})()
    vars(model).update(attributes)
    return model


SPELLINGS = {
    "modules": Gated,
    "an activation with a parameter": lambda: Gated(lambda: nn.LeakyReLU(0.3)),
    "in place": lambda: Gated(lambda: nn.SiLU(inplace=True)),
    "ours": lambda: Gated(mlpext.nn.Mish),
    "value first": lambda: written(lambda self, x: self.up(x) * self.act(self.gate(x))),
    "function": lambda: written(lambda self, x: TF.silu(self.gate(x)) * self.up(x)),
    "function with a parameter": lambda: written(lambda self, x: TF.elu(self.gate(x), 0.5) * self.up(x)),
    "method": lambda: written(lambda self, x: self.gate(x).sigmoid().mul(self.up(x))),
    "torch.mul": lambda: written(lambda self, x: torch.mul(torch.tanh(self.gate(x)), self.up(x))),
    "weights": lambda: written(
        lambda self, x: TF.relu(TF.linear(x, self.gate.weight)) * TF.linear(x, self.up.weight, self.up.bias)
    ),
    "packed": Packed,
    "packed, gate first": lambda: Packed(nn.Sigmoid, gate_last=False),
    "slices": lambda: packed(lambda self, z: TF.silu(z[..., : z.shape[-1] // 2]) * z[..., z.size(-1) // 2 :]),
    "unbound": lambda: packed(lambda self, z: (p := z.unflatten(-1, (2, 8)).unbind(-2))[1] * self.act(p[0])),
    "glu": lambda: packed(lambda self, z: TF.glu(z)),
    "without layers": lambda: nn.Sequential(nn.Linear(6, 16), ReGLU(), nn.Linear(8, 6)),
    "dtypes compared": Mixed,
    "torch's functions with numbers": lambda: written(
        lambda self, x: self.act(self.gate(y := torch.pow(x, 3.0) + torch.zeros(x.size(-1)))) * self.up(y)
    ),
    "more arguments": lambda: with_forward(more_arguments),
}
LEFT = {
    "halves that change in between": lambda: packed(
        lambda self, z: (v := z[..., 8:], y := TF.relu(z[..., :8]), z.mul_(2), y * v)[-1]
    ),
    "f(gate) is used twice": lambda: written(
        lambda self, x: (y := self.act(self.gate(x))) * self.up(x) + y,
    ),
    "the gate is used twice": lambda: written(
        lambda self, x: self.act(y := self.gate(x)) * self.up(x) + y,
    ),
    "layers of two inputs": lambda: written(lambda self, x: self.act(self.gate(x)) * self.up(2 * x)),
    "no gradients": lambda: written(
        lambda self, x: self.act(self.gate(x)) * self.up(x) if torch.is_grad_enabled() else self.up(x)
    ),
    "random": lambda: written(
        lambda self, x: self.up(x) if torch.rand([]) < 0.5 else self.act(self.gate(x)) * self.up(x)
    ),
    "something is kept": lambda: with_forward(keeping, calls=[]),
    "something is counted": lambda: with_forward(noting, seen=0),
    "something is printed": lambda: with_forward(printing),
    "**kwargs decide": lambda: with_forward(only_if_asked),
    "an argument decides": lambda: with_forward(only_if_false),
    "the class of an argument decides": lambda: with_forward(only_of_a_tensor),
    "an activation of one's own with a parameter": lambda: Gated(OwnLeaky),
    "an if on a tensor": lambda: written(
        lambda self, x: self.act(self.gate(x)) * self.up(x) if x.sum() > 0 else self.up(x)
    ),
}


def fused_forwards(model):
    return [module for module in model.modules() if isinstance(module, FusedForward)]


def calls_of_gated(model, *inputs):
    """How often functional.gated is called."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        original = mlpext._C.gated
        patch.setattr(mlpext._C, "gated", lambda *args: calls.append(1) or original(*args))
        model(*inputs)
    return len(calls)


@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
@pytest.mark.parametrize("make", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(make, graph):
    torch.manual_seed(0)
    model = make().double()
    before = type(model)
    fused, report = mlpext.fuse(model, graph=graph, report=True)
    assert calls_of_gated(fused, randn(5, 6)) == 1 and calls_of_gated(model, randn(5, 6)) == 0
    for shape in ((5, 6), (2, 3, 6), (0, 6)):
        assert_same(model, fused, (randn(*shape),))
    assert any("its forward has" in reason for reason in rows(report, "fused").values())
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    if isinstance(fused, before):
        for twin in (copy.deepcopy(fused), mlpext.fuse(fused)):
            assert_same(model, twin, (randn(5, 6),))
            assert calls_of_gated(twin, randn(5, 6)) == 1
    again = rows(mlpext.fuse(mlpext.fuse(model), report=True)[1], "unchanged")
    assert any(reason.startswith("fused already") for reason in again.values())
    back = mlpext.unfuse(fused)
    assert type(back) is before and calls_of_gated(back, randn(5, 6)) == 0


@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_left(make, graph):
    torch.manual_seed(0)
    model = make().double()
    fused = mlpext.fuse(model, graph=graph)
    assert calls_of_gated(copy.deepcopy(fused), randn(5, 6)) == 0
    assert_same(model, fused, (randn(5, 6),))


def test_a_branch_on_an_object_of_the_module():
    class Config:
        def __init__(self):
            self.gated = True

    class Configured(Gated):
        def __init__(self):
            super().__init__()
            self.config = Config()

        def forward(self, x):
            y = self.up(x)
            return self.down(self.act(self.gate(x)) * y if self.config.gated else y)

    model = Configured().double()
    fused = mlpext.fuse(model)
    assert not fused_forwards(fused)
    model.config.gated = fused.config.gated = False
    assert_same(model, fused, (randn(5, 6),))


def test_hooks_on_the_activation():
    model = Gated().double()
    model.act.register_forward_hook(lambda module, args, output: output + 1)
    fused = mlpext.fuse(model)
    assert not fused_forwards(fused)
    assert_same(model, fused, (randn(5, 6),))


def test_hooks_on_the_layers_and_the_module_are_called():
    model, seen = Gated().double(), []
    for module in (model, model.gate, model.up):
        module.register_forward_hook(lambda module, args, output: seen.append(module) or output)
    fused = mlpext.fuse(model)
    assert fused_forwards(fused)
    fused(randn(5, 6))
    assert len(seen) == 3


@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_what_decided_on_the_forward_may_change(graph):
    model = Packed().double()
    fused = mlpext.fuse(model, graph=graph)
    if graph:
        with pytest.raises(AttributeError, match="gate_last"):
            fused.gate_last = False
        return
    model.gate_last = fused.gate_last = False
    assert type(fused) is Packed
    assert_same(model, fused, (randn(5, 6),))


def test_the_activation_may_be_exchanged_and_its_parameters_set():
    model = Gated(lambda: nn.LeakyReLU(0.3)).double()
    fused = mlpext.fuse(model)
    fused.act.negative_slope = 0.7
    model.act.negative_slope = 0.7
    assert fused_forwards(fused)
    assert_same(model, fused, (randn(5, 6),))
    model.act.register_forward_hook(lambda module, args, output: output + 1)
    fused.act.register_forward_hook(lambda module, args, output: output + 1)
    assert_same(model, fused, (randn(5, 6),))
    model.act, fused.act = nn.Tanh(), nn.Tanh()
    assert type(fused) is Gated
    assert_same(model, fused, (randn(5, 6),))


def test_layers_may_be_exchanged():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(6, 2).double(), nn.Linear(2, 8).double()

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = Gated().double()
    fused = mlpext.fuse(model)
    fused.gate = model.gate = Adapted(model.gate)
    assert calls_of_gated(fused, randn(5, 6)) == 1
    assert_same(model, fused, (randn(5, 6),))


def test_dtypes_that_differ_take_the_forward_before():
    model = Mixed().bfloat16()
    model.down.float()
    fused = mlpext.fuse(model)
    x = torch.randn(5, 6, dtype=torch.bfloat16)
    assert fused_forwards(fused) and fused(x).dtype == torch.float32
    torch.testing.assert_close(fused(x), model(x))
    model.down.bfloat16()
    assert fused(x).dtype == torch.bfloat16
    assert not isinstance(mlpext.fuse(model, graph=True), torch.fx.GraphModule)


def test_a_method_of_the_class_that_calls_a_layer_alone():
    class Probed(Gated):
        def probe(self, x):
            return self.gate(x)

    model = Probed().double()
    fused = mlpext.fuse(model)
    x = randn(5, 6)
    assert calls_of_gated(fused, x) == 1
    torch.testing.assert_close(fused.probe(x), model.probe(x))


def test_an_activation_that_serves_elsewhere_too():
    class Shared(Gated):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 6)

        def forward(self, x):
            return self.act(self.head(self.down(self.act(self.gate(x)) * self.up(x))))

    model = Shared().double()
    fused, report = mlpext.fuse(model, report=True)
    assert "also used on" in unfused(report)["head"]
    assert_same(model, fused, (randn(5, 6),))


def test_shapes_that_broadcast_are_torchs():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Conv1d(6, 1, 1), nn.Conv1d(6, 4, 1)

        def forward(self, x):
            return torch.sigmoid(self.gate(x)) * self.up(x)

    model = Scale().double()
    fused = mlpext.fuse(model)
    assert_same(model, fused, (randn(2, 6, 5),))


def test_pickle():
    torch.manual_seed(0)
    model = Gated().double()
    fused = mlpext.fuse(model)
    twin = pickle.loads(pickle.dumps(fused))
    assert calls_of_gated(twin, randn(5, 6)) == 1
    assert_same(model, twin, (randn(5, 6),))
    assert not set(twin.parameters()) & set(model.parameters())


def test_glu_as_a_module():
    model = nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 6), nn.GLU(0)).double()
    fused, report = mlpext.fuse(model, report=True)
    assert [type(module) for module in fused[1::2]] == [mlpext.nn.GLU] * 2
    assert rows(report, "replaced")["1"] == "by mlpext.nn.GLU, alone, after 0 (Linear)"
    assert_same(model, fused, (randn(4, 6),))


@pytest.mark.compile
@pytest.mark.parametrize("make", [Gated, Packed, Mixed])
def test_compile_and_export(make):
    model = make().double()
    fused, x = mlpext.fuse(model), randn(5, 6)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_same(model, compiled, (x,))
    exported = torch.export.export(fused, (x.detach(),)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_gated_is_what_the_graph_calls():
    fused = mlpext.fuse(SPELLINGS["function"]())
    assert F.gated in fused.forward.__func__.__globals__.values()
