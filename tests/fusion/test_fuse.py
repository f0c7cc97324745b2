"""fuse and unfuse on whole models: the same numbers, parameters and attributes, there and back."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations, prune

import mlpext
from architectures import ARCHITECTURES, architectures, build, table
from fusion_common import ACTIVATIONS, Pair, assert_same, flat, fuse, randn, rows, types, unfused
from mlpext.fusion import FusedActivation, FusedForward
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


@architectures
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_same_outputs_gradients_and_state(name, graph):
    architecture = ARCHITECTURES[name]
    model, inputs = build(name)
    before = types(model)
    fused, report = mlpext.fuse(model, graph=graph, report=True)
    assert types(model) == before
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(fused.buffers(), model.buffers(), strict=True))
    if graph and architecture.graph:
        assert isinstance(fused, torch.fx.GraphModule)
    else:
        assert isinstance(fused, type(model))
    assert_same(model, fused, inputs)
    assert list(fused.state_dict()) == list(model.state_dict())

    for path in architecture.fused:
        assert rows(report, "fused")[path].startswith("with ")
        assert type(fused.get_submodule(path)) is LinearActivation
    gated = {}
    for owner, layers in architecture.gated.items():
        gated |= {f"{owner}.{layer}".lstrip("."): owner or "the model" for layer in layers}
        assert "its forward has" in rows(report, "fused")[owner]
        assert isinstance(fused, torch.fx.GraphModule) or isinstance(fused.get_submodule(owner), FusedForward)
    for path, owner in gated.items():
        assert rows(report, "fused")[path].startswith(f"in the forward of {owner}: ")
        assert type(fused.get_submodule(path)) is mlpext.nn.Linear
    left = unfused(report)
    for path, reason in architecture.left.items():
        assert reason in left[path]
    assert {*architecture.functions} <= {*rows(report, "fused")}
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= {*architecture.fused, *architecture.functions, *gated, *architecture.left}


def test_the_page_shows_them():
    page = (Path(__file__).parents[2] / "docs/fuse.md").read_text()
    assert table() in page and f"{len(ARCHITECTURES)} architectures" in page


@architectures
def test_state_dict_loads_both_ways(name):
    model, inputs = build(name)
    model(*inputs)  # lazy layers get their shapes
    other, _ = build(name, seed=1)
    other(*inputs)
    fused = mlpext.fuse(other)
    fused.load_state_dict(model.state_dict())
    assert_same(model, fused, inputs)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_(std=0.1)
    model.load_state_dict(fused.state_dict())
    assert_same(model, fused, inputs)


@architectures
def test_unfuse_restores(name):
    model, inputs = build(name)
    for graph in (False, True):
        before, text = types(model), repr(model)
        back = mlpext.unfuse(mlpext.fuse(model, graph=graph))
        assert types(back) == before and repr(back) == text
        assert [sorted(vars(m)) for m in back.modules()] == [sorted(vars(m)) for m in model.modules()]
        assert_same(model, back, inputs)


@architectures
def test_in_place_and_twice(name):
    model, inputs = build(name)
    reference = mlpext.unfuse(mlpext.fuse(model))
    assert mlpext.fuse(model, inplace=True) is model
    once = types(model)
    assert types(mlpext.fuse(model, inplace=True)) == once
    assert_same(reference, model, inputs)


@architectures
def test_copies(name):
    model, inputs = build(name)
    model(*inputs)
    for graph in (False, True):
        fused = mlpext.fuse(model, graph=graph)
        twins = [copy.deepcopy(fused)]
        if name not in ("weight-normed", "scripted part"):  # torch pickles neither
            twins.append(pickle.loads(pickle.dumps(fused)))
        for twin in twins:
            reference = copy.deepcopy(model)
            assert list(twin.state_dict()) == list(model.state_dict())
            assert not set(twin.parameters()) & set(model.parameters())
            assert_same(reference, twin, inputs)


@architectures
def test_an_optimizer_goes_on(name):
    if name == "scripted part":
        pytest.skip("its copies share their parameters")
    model, inputs = build(name)
    model(*inputs)
    twin = copy.deepcopy(model)

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            torch.manual_seed(3)
            flat(model(*inputs)).square().mean().backward()
            optimizer.step()

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 3)
    train(mlpext.fuse(model), optimizer, 3)
    train(twin, torch.optim.Adam(twin.parameters(), 0.01), 6)
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_hook_that_is_an_object_stays_the_same_object():
    class Recorder:
        seen = 0

        def hook(self, *_):
            self.seen += 1

    model, recorder = Pair().double(), Recorder()
    model.register_forward_hook(recorder.hook)
    mlpext.fuse(model)(randn(5, 6))
    assert recorder.seen == 1


def test_an_attribute_that_is_named_like_hooks():
    model = Pair()
    model.my_hooks = [torch.tanh]
    fused, _ = fuse(model)
    assert fused.my_hooks == [torch.tanh] and fused.my_hooks is not model.my_hooks


def test_changed_after_it_was_fused():
    """Utilities that look for `weight` find it in a LinearActivation."""
    for change in (
        lambda m: parametrizations.weight_norm(m),
        lambda m: torch.nn.utils.weight_norm(m),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ):
        model = Pair().double()
        fused, twin = mlpext.fuse(copy.deepcopy(model)), copy.deepcopy(model)
        change(fused.fc)
        change(twin.fc)
        assert_same(twin, fused, (randn(5, 6),))


class OwnLeaky(nn.Module):
    """An activation of one's own, with its parameter behind a property, and one of the class."""

    negative_slope = 0.1

    def __init__(self):
        super().__init__()
        self._scale, self.note = 1.0, ""

    @property
    def scale(self):
        return self._scale

    @scale.setter
    def scale(self, value):
        self._scale = value

    def forward(self, x):
        return TF.leaky_relu(x, self.slope())

    def slope(self):
        return self.negative_slope * self._scale


PARAMETERS = [(name, attribute) for name in ACTIVATIONS for attribute in ACTIVATIONS[name]]
PARAMETERS = [(name, attribute) for name, attribute in PARAMETERS if attribute != "inplace"]


@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
@pytest.mark.parametrize("library", [nn, mlpext.nn], ids=["torch", "mlpext"])
@pytest.mark.parametrize("name, attribute", PARAMETERS)
def test_a_parameter_of_a_fused_activation_cannot_be_changed(name, attribute, library, graph):
    model = nn.Sequential(nn.Linear(6, 8), getattr(library, name)(**ACTIVATIONS[name])).double()
    value, x = ACTIVATIONS[name][attribute], randn(5, 6)
    other = "none" if name == "GELU" else value / 2
    fused, before = mlpext.fuse(model, graph=graph), model(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.eval().to(torch.float64)):
        act = twin.get_submodule("1")
        with pytest.raises(AttributeError, match=f"{attribute}: this {name} has become .*unfuse"):
            setattr(act, attribute, other)
        assert getattr(act, attribute) == value
        torch.testing.assert_close(twin(x), before)
    back = mlpext.unfuse(fused)
    for net in (back, model):
        setattr(net[1], attribute, other)
        assert not torch.equal(net(x), before)
    torch.testing.assert_close(back(x), model(x))


@pytest.mark.parametrize("attribute", ["negative_slope", "_scale", "scale", "slope"])
def test_a_parameter_of_an_activation_of_ones_own_cannot_be_changed(attribute):
    model = Pair()
    model.act = OwnLeaky()
    fused, _ = fuse(model)
    assert type(fused.fc) is LinearActivation and type(fused.act) is FusedActivation
    with pytest.raises(AttributeError, match=f"{attribute}: this OwnLeaky has become .*unfuse"):
        setattr(fused.act, attribute, 0.9)
    mlpext.unfuse(fused).act.scale = 3.0
    x = randn(5, 6)
    torch.testing.assert_close(fused(x), TF.leaky_relu(model.fc(x), 0.3))


def test_what_else_a_fused_activation_has_can_be_changed():
    fused = mlpext.fuse(nn.Sequential(nn.Linear(6, 6), nn.ELU(inplace=True), nn.Linear(6, 6), OwnLeaky()))
    for act in (fused[1], fused[3]):
        for note in ("mine", "yours"):
            act.note, act.inplace = note, False
            assert act.note == note and act.inplace is False
        act.train(False).requires_grad_(False).to(torch.float64)
        assert act.training is False
    assert mlpext.unfuse(fused)[1].inplace is False
    FusedActivation().alpha = 1.0  # one that has replaced nothing


def test_the_repr_of_a_fused_activation():
    fused = mlpext.fuse(nn.Sequential(nn.Linear(6, 6), nn.LeakyReLU()))
    assert repr(fused[1]) == "FusedActivation(LeakyReLU)"
    assert repr(FusedActivation()) == "FusedActivation()"


def test_hooks_on_a_fused_activation():
    fused, log = mlpext.fuse(Pair()), []
    fused.act.register_forward_hook(lambda *a: log.append(a[2]))
    y = fused(torch.randn(5, 6))
    assert torch.equal(log[0], y)


def test_it_prints_nothing(capsys):
    mlpext.fuse(ARCHITECTURES["PPO policy"].make(), report=True)
    assert capsys.readouterr() == ("", "")


def test_the_same_module_in_two_places():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
            self.b, self.c = self.a, nn.Sequential(self.a[0], nn.Tanh())

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    fused, _ = fuse(Twice())
    assert type(fused.a[0]) is LinearActivation and fused.c[0] is fused.a[0] and fused.b is fused.a


def test_attributes_and_modes_stay():
    model = Pair()
    model.fc.note, model.fc.training = "mine", False
    model.fc.bias.requires_grad_(False)
    fused = mlpext.fuse(model)
    assert fused.fc.note == "mine" and not fused.fc.training and fused.act.training
    assert not fused.fc.bias.requires_grad
    assert "note" in vars(mlpext.unfuse(fused).fc)


def test_the_model_itself():
    assert type(mlpext.fuse(nn.ELU(0.5))) is mlpext.nn.ELU
    assert type(mlpext.fuse(nn.Linear(2, 2))) is mlpext.nn.Linear
    net = mlpext.nn.MLP([6, 8, 2])
    assert types(mlpext.fuse(net)) == types(net)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got int"):
        mlpext.fuse(3)
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got builtin_function_or_method"):
        mlpext.unfuse(torch.tanh)


def test_unfuse_leaves_layers_of_its_own():
    model = nn.Sequential(LinearActivation(6, 6, "tanh"), mlpext.nn.ReLU(), nn.Identity())
    before = types(model)
    assert types(mlpext.unfuse(mlpext.fuse(model))) == types(mlpext.unfuse(model)) == before


@pytest.mark.compile
@pytest.mark.parametrize("name", ["MLP", "residual", "functional activations", "autoencoder"])
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_compile_without_graph_breaks(name, graph, fresh_dynamo):
    model, inputs = build(name)
    fused = mlpext.fuse(model, graph=graph)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(model, compiled, inputs)
    assert_same(model, compiled, tuple(randn(9, *x.shape[1:]) for x in inputs))


@pytest.mark.compile
@pytest.mark.parametrize("name", ["MLP", "residual", "functional activations", "ViT block", "autoencoder"])
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_what_is_compiled_is_the_same(name, graph, fresh_dynamo):
    """Inductor gets the same operators, forward and backward, as from the model unfused: no slower."""

    def operators(net):
        graphs = []

        def keep(module, _):
            graphs.append(module.code)
            return make_boxed_func(module)

        torch.compiler.reset()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        torch.compile(net, fullgraph=True, backend=backend)(*inputs).sum().backward()
        return graphs

    model, inputs = build(name)
    expected, actual = operators(model), operators(mlpext.fuse(model, graph=graph))
    assert len(expected) == 2 and actual == expected


@pytest.mark.compile
@pytest.mark.parametrize("name", ["MLP", "residual", "functional activations", "ViT block"])
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_export(name, graph):
    model, inputs = build(name)
    fused = mlpext.fuse(model.eval(), graph=graph)
    batch = torch.export.Dim("batch", min=2, max=64)
    inputs = tuple(x.detach() for x in inputs)
    program = torch.export.export(fused, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    bigger = tuple(torch.cat([x, x]) for x in inputs)
    torch.testing.assert_close(program.module()(*bigger), model(*bigger), rtol=1e-12, atol=1e-12)
    assert not [n for n in program.graph.nodes if "mlpext" in str(n.target)]
