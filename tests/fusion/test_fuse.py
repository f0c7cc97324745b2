"""fuse and unfuse: the same numbers and parameters, and nothing touched that could mean something else."""

import copy
import enum
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as TF
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations, parametrize, prune

import mlpext
from mlpext.fusion import FusedActivation
from mlpext.nn import LinearActivation

# ---------------------------------------------------------------- architectures


def mlp(*sizes, act=nn.Tanh, **kwargs):
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), act(**kwargs))]
    return nn.Sequential(*layers[:-1])


class MixerBlock(nn.Module):
    def __init__(self, tokens=4, channels=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = mlp(tokens, 8, tokens, act=nn.GELU)
        self.channels = mlp(channels, 8, channels, act=nn.GELU)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class ViTMlp(nn.Module):  # as in timm
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, width), nn.Dropout(0.1)

    def forward(self, x):
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class ViTBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(width), ViTMlp(width, 16)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DLRM(nn.Module):
    """Towers that are called whole, beside lookups in a loop that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 4) for _ in range(2))
        self.bottom, self.top = mlp(6, 8, 4, act=nn.ReLU), mlp(7, 8, 1, act=nn.ReLU)
        self.top.append(nn.Sigmoid())

    def forward(self, dense, sparse):
        rows = [self.bottom(dense)] + [t(s) for t, s in zip(self.tables, sparse.T, strict=True)]
        pairs = [(a * b).sum(-1, keepdim=True) for i, a in enumerate(rows) for b in rows[:i]]
        return self.top(torch.cat([rows[0], *pairs], -1))


class Policy(nn.Module):
    """An actor and a critic, with a method of its own and an `if`, as in PPO."""

    def __init__(self):
        super().__init__()
        self.policy_net, self.value_net = mlp(4, 8, 8), mlp(4, 8, 8)
        self.action, self.value = nn.Linear(8, 2), nn.Linear(8, 1)
        self.policy_net.append(nn.Tanh())
        self.value_net.append(nn.Tanh())

    def forward(self, x, deterministic=False):
        logits = self.action(self.policy_net(x))
        if deterministic:
            logits = logits.softmax(-1)
        return torch.cat([logits, self.predict_values(x)], -1)

    def predict_values(self, x):
        return self.value(self.value_net(x))


class SirenLayer(nn.Module):
    def __init__(self, i, o, omega=30.0):
        super().__init__()
        self.linear, self.omega = nn.Linear(i, o), omega
        with torch.no_grad():  # as published; from torch's range sin(30 z) would lose two digits
            self.linear.weight.uniform_(-((6 / i) ** 0.5) / omega, (6 / i) ** 0.5 / omega)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(8, 6, 3, act=nn.ELU), mlp(3, 6, 8, act=nn.ELU)

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.decoder(self.encode(x))


class Residual(nn.Module):
    def __init__(self, width=6, act=nn.ELU):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.act1, self.act2 = act(), act()

    def forward(self, x):
        y = self.act1(self.fc1(x))
        y += x
        return self.act2(self.fc2(y)) + y


class Tied(nn.Module):
    """Two layers with the same weight, and a decoder with its transpose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
        self.b.weight = self.a.weight

    def forward(self, x):
        y = self.act(self.b(self.act(self.a(x))))
        return TF.linear(y, self.a.weight.T)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = TF.elu(self.a(x), 0.5)
        x = torch.tanh(self.b(x))
        return self.d(self.c(x).relu())


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.act = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.SiLU()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class LoRA(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.sigmoid = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sigmoid()
        self.left, self.right = mlp(6, 8, 6, act=nn.ReLU), mlp(6, 4, 6, act=nn.Mish)

    def forward(self, x):
        z = self.stem(x)
        return (self.left(z) + self.right(z)) * self.sigmoid(self.gate(z))


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@dataclass
class Architecture:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple] = lambda: (randn(5, 6),)
    fused: tuple[str, ...] = ()  # linear layers that become LinearActivation
    left: dict[str, str] = field(default_factory=dict)  # what does not, with part of the reason
    graph: bool = True  # graph=True makes a GraphModule
    graph_fused: tuple[str, ...] = ()  # and fuses these too


LAST = "no activation follows it"
UNTRACED = "Policy.forward cannot be traced"
ARCHITECTURES = {
    "MLP": Architecture(lambda: mlp(6, 8, 8, 3), fused=("0", "2"), left={"4": LAST}),
    "MLP-Mixer": Architecture(
        MixerBlock,
        lambda: (randn(2, 4, 6),),
        fused=("tokens.0", "channels.0"),
        left={"tokens.2": "transpose", "channels.2": "add"},
    ),
    "ViT block": Architecture(
        ViTBlock,
        lambda: (randn(2, 5, 8),),
        fused=("mlp.fc1",),
        left={"mlp.fc2": "drop2 (Dropout)", "attn.out_proj": "NonDynamicallyQuantizableLinear"},
    ),
    "DLRM": Architecture(
        DLRM,
        lambda: (randn(5, 6), torch.randint(5, (5, 2))),
        fused=("bottom.0", "top.0", "top.2"),
        left={"bottom.2": LAST},
        graph=False,
    ),
    "PPO policy": Architecture(
        Policy,
        lambda: (randn(5, 4),),
        fused=("policy_net.0", "policy_net.2", "value_net.0", "value_net.2"),
        left={"action": UNTRACED, "value": UNTRACED},
        graph=False,
    ),
    "SIREN": Architecture(
        lambda: nn.Sequential(SirenLayer(6, 8), SirenLayer(8, 8), nn.Linear(8, 2)),
        left={"0.linear": "goes to mul", "1.linear": "goes to mul", "2": LAST},
        graph_fused=("0.linear", "1.linear"),
    ),
    "autoencoder": Architecture(
        Autoencoder,
        lambda: (randn(5, 8),),
        fused=("encoder.0", "decoder.0"),
        left={"encoder.2": "goes to decoder.0", "decoder.2": LAST},
    ),
    "residual": Architecture(Residual, fused=("fc1", "fc2")),
    "weight-tied": Architecture(Tied, fused=("a", "b")),
    "weight-normed": Architecture(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 6), nn.ReLU()
        ),
        fused=("2",),
        left={"0": "parametrized"},
    ),
    "with dropout": Architecture(
        lambda: nn.Sequential(
            *(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3)), *(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU())
        ),
        fused=("0",),
        left={"3": "goes to 4 (Dropout)"},
    ),
    "with batch-norm": Architecture(
        lambda: nn.Sequential(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.ReLU6())
        ),
        fused=("3",),
        left={"0": "goes to 1 (BatchNorm1d)"},
    ),
    "functional activations": Architecture(
        Functional,
        left=dict.fromkeys("abc", "a function: see graph=True") | {"d": LAST},
        graph_fused=("a", "b", "c"),
    ),
    "in-place activations": Architecture(
        lambda: mlp(6, 8, 8, 3, act=nn.LeakyReLU, inplace=True), fused=("0", "2"), left={"4": LAST}
    ),
    "shared activation": Architecture(SharedActivation, fused=("layers.0", "layers.1", "layers.2")),
    "LoRA": Architecture(
        lambda: nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()),
        fused=("2",),
        left={"0.base": "goes to add", "0.down": "goes to up (Linear)", "0.up": "goes to add"},
    ),
    "branches": Architecture(
        Branches,
        fused=("left.0", "right.0", "gate"),
        left={"stem": "used more than once", "left.2": "goes to add", "right.2": "goes to add"},
    ),
    "TransformerEncoderLayer": Architecture(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True),
        lambda: (randn(2, 5, 8),),
        left={
            "self_attn.out_proj": "NonDynamicallyQuantizableLinear",
            "linear1": "torch.nn.TransformerEncoderLayer",
            "linear2": "torch.nn.TransformerEncoderLayer",
        },
        graph=False,
    ),
    "lazy": Architecture(
        lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()),
        fused=("2",),
        left={"0": "LazyLinear is not torch.nn.Linear itself"},
    ),
    "scripted part": Architecture(
        lambda: nn.Sequential(
            torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh())), nn.Linear(8, 4), nn.Softplus()
        ),
        fused=("1",),
        left={"0": "scripted"},
    ),
}
assert len(ARCHITECTURES) == 20
architectures = pytest.mark.parametrize("name", ARCHITECTURES)
pytestmark = pytest.mark.filterwarnings("ignore:::torch")


def build(name, seed=0):
    torch.manual_seed(seed)
    architecture = ARCHITECTURES[name]
    return architecture.make().double(), architecture.inputs()


def results(model, inputs):
    """Output, and the gradient of every input and parameter."""
    torch.manual_seed(1)  # for dropout
    output = model(*inputs)
    wanted = [t for t in [*inputs, *model.parameters()] if t.requires_grad]
    gradients = torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)
    return output.detach(), *gradients


def assert_same(model, other, inputs, tolerance=1e-12):
    for mode in (True, False):
        expected, actual = results(model.train(mode), inputs), results(other.train(mode), inputs)
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            if e is not None:
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def rows(report, action):
    return {path: reason for path, what, reason in report if what == action}


def types(model):
    return {path: type(module) for path, module in model.named_modules()}


# ---------------------------------------------------------------- the 20


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
        assert type(fused) is type(model)
    assert_same(model, fused, inputs)
    assert list(fused.state_dict()) == list(model.state_dict())

    for path in architecture.fused:
        assert rows(report, "fused")[path].startswith("with ")
        assert type(fused.get_submodule(path)) is LinearActivation
    left = rows(report, "left")
    for path, reason in architecture.left.items():
        if graph and path in architecture.graph_fused:
            assert path in rows(report, "fused")
        else:
            assert reason in left[path]
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears <= {*architecture.fused, *architecture.left}


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
            parameter.normal_()
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
            model(*inputs).square().mean().backward()
            optimizer.step()

    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, 3)
    train(mlpext.fuse(model), optimizer, 3)
    train(twin, torch.optim.Adam(twin.parameters(), 0.01), 6)
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- each activation, each way to write it

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
}


def test_every_activation_is_here():
    ours = {name for name, cls in vars(mlpext.nn).items() if isinstance(cls, type) and hasattr(nn, name)}
    names = {word.lower() for word in ACTIVATIONS} | {"identity", "gelutanh", "sine", "squareplus"}
    assert ours >= set(ACTIVATIONS)
    assert {name.replace("_", "") for name in mlpext.activations()} == names


def fuse(model, *inputs, **kwargs):
    """The fused model and its report, once seen to be the same."""
    fused, report = mlpext.fuse(model.double(), report=True, **kwargs)
    # torch's gradients of these two take 1 / alpha and 1 / 6 in float32.
    coarse = any(word in repr(model) or word in str(report) for word in ("CELU", "celu", "ardsigmoid"))
    assert_same(model, fused, inputs or (randn(5, 6),), 1e-7 if coarse else 1e-12)
    return fused, report


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    module = getattr(nn, name)(**ACTIVATIONS[name])
    fused, _ = fuse(nn.Sequential(nn.Linear(6, 8), module))
    assert types(fused) == {"": nn.Sequential, "0": LinearActivation, "1": FusedActivation}

    bare, report = fuse(nn.Sequential(nn.LayerNorm(6), getattr(nn, name)(**ACTIVATIONS[name])))
    assert type(bare[1]) is getattr(mlpext.nn, name) and repr(bare[1]) == repr(module)
    assert rows(report, "replaced") == {"1": f"by mlpext.nn.{name}, alone, after 0 (LayerNorm)"}

    ours = getattr(mlpext.nn, name)(**ACTIVATIONS[name])
    assert type(fuse(nn.Sequential(nn.Linear(6, 8), ours))[0][0]) is LinearActivation


@pytest.mark.parametrize("activation", [mlpext.nn.Sine(3.0), mlpext.nn.Squareplus(1.0)], ids=repr)
def test_activations_that_torch_lacks(activation):
    assert type(fuse(nn.Sequential(nn.Linear(6, 8), activation))[0][0]) is LinearActivation


class OwnSine(nn.Module):
    def forward(self, x):
        return torch.sin(3.0 * x)


class OwnSiLU(nn.Module):  # as in transformers
    def __init__(self):
        super().__init__()
        self.act = TF.silu

    def forward(self, input):
        return self.act(input)


class Scaled(nn.Module):
    def forward(self, x):
        return TF.silu(x) * 2


class TrainOnly(nn.Module):
    def forward(self, x):
        return TF.silu(x) if self.training else x.relu()


def test_modules_that_only_call_an_activation():
    for cls, name in ((OwnSine, "sine"), (OwnSiLU, "silu")):
        fused, _ = fuse(nn.Sequential(nn.Linear(6, 8), cls()))
        assert fused[0].activation == name and type(fused[1]) is FusedActivation
        assert type(mlpext.unfuse(fused)[1]) is cls
        assert type(fuse(nn.Sequential(cls()))[0][0]) is cls
    for cls in (Scaled, TrainOnly):
        assert reason(nn.Sequential(nn.Linear(6, 8), cls()), "0") == f"its output goes to 1 ({cls.__name__})"


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
    ],
)
def test_what_only_looks_like_it(function):
    assert mlpext.functional.linear_maxout not in (found := graph_of(function))
    assert mlpext.functional.linear_activation not in found


# ---------------------------------------------------------------- what is left alone, and why


class Pair(nn.Module):
    """self.act(self.fc(x)), for tests that change one thing."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x))


def reason(model, path="fc", **kwargs):
    """Why `path` was left, once all is seen to be the same."""
    fused, report = fuse(model, **kwargs)
    assert type(fused.get_submodule(path)) is type(model.get_submodule(path))
    return rows(report, "left")[path]


def test_the_plain_pair():
    _, report = fuse(Pair())
    assert list(report) == [("fc", "fused", "with act (Tanh)"), ("act", "fused", "into fc")]
    assert str(report).splitlines() == [
        "module  action  reason",
        "fc      fused   with act (Tanh)",
        "act     fused   into fc",
    ]


HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(lambda *a: log.append(a[2].sum().item())),
    "forward_pre": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append(a[1][0].sum().item())),
    "backward": lambda m, log: m.register_full_backward_hook(lambda *a: log.append(a[2][0].sum().item())),
    "backward_pre": lambda m, log: m.register_full_backward_pre_hook(
        lambda *a: log.append(a[1][0].sum().item())
    ),
    "state_dict": lambda m, log: m.register_state_dict_post_hook(lambda *a: None),
    "load_state_dict": lambda m, log: m.register_load_state_dict_post_hook(lambda *a: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["fc", "act"])
def test_hooks(kind, where):
    model, log = Pair(), []
    HOOKS[kind](model.get_submodule(where), log)
    why = reason(model)
    assert "hooks" in why
    for graph in (False, True):
        fused = mlpext.fuse(model, graph=graph)
        x = randn(5, 6)
        log.clear()
        model(x).sum().backward()
        expected = list(log)
        log.clear()
        fused(x).sum().backward()
        assert log == pytest.approx(expected) and (log or "state" in kind)


@pytest.mark.parametrize("kind", list(HOOKS)[:4])
def test_hooks_of_the_model_and_of_containers(kind):
    model, log = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Tanh()).double(), []
    HOOKS[kind](model, log)
    HOOKS[kind](model[0], log)
    x = randn(5, 6)
    model(x).sum().backward()
    expected = list(log)
    for graph in (False, True):
        fused = mlpext.fuse(model, graph=graph)
        assert type(fused[0][0]) is LinearActivation
        log.clear()
        fused(x).sum().backward()
        assert log == pytest.approx(expected) and log


def test_a_hook_that_is_an_object_stays_the_same_object():
    class Recorder:
        seen = 0

        def hook(self, *_):
            self.seen += 1

    model, recorder = Pair().double(), Recorder()
    model.register_forward_hook(recorder.hook)
    mlpext.fuse(model)(randn(5, 6))
    assert recorder.seen == 1


def test_parametrizations_weight_norm_and_pruning():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    for change, why in {
        lambda m: parametrize.register_parametrization(m, "weight", Double()): "parametrized",
        lambda m: parametrizations.spectral_norm(m): "parametrized",
        lambda m: torch.nn.utils.weight_norm(m): "computed at each call",
        lambda m: torch.nn.utils.spectral_norm(m): "computed at each call",
        lambda m: prune.l1_unstructured(m, "weight", 0.5): "computed at each call",
    }.items():
        model = Pair().double()
        change(model.fc)
        model(randn(5, 6))
        fused, report = mlpext.fuse(model.eval(), report=True)  # spectral_norm moves on in train mode
        torch.testing.assert_close(results(fused, [x := randn(5, 6)]), results(model, [x]))
        assert why in rows(report, "left")["fc"]
        assert type(fused.fc) is type(model.fc)


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


def test_a_subclass_of_linear():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = Pair()
    model.fc = Own(6, 6)
    assert reason(model) == "Own is not torch.nn.Linear itself"


def test_a_subclass_of_an_activation():
    class Own(nn.ReLU):
        def forward(self, x):
            return super().forward(x) * 2

    model = Pair()
    model.act = Own()
    assert reason(model) == "its output goes to act (Own)"
    assert "itself" in reason(model, "act")


def test_a_forward_of_the_instance():
    model = Pair()
    model.fc.forward = lambda x: TF.linear(x, model.fc.weight)
    assert "'forward' of its own" in reason(model)
    model = Pair()
    model.act.forward = torch.sigmoid
    assert reason(model) == "its output goes to act (Tanh)"
    model = Pair()
    model.forward = lambda x: model.fc(x)
    assert "replaced on the instance" in reason(model)


def test_quantized_layers():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    fused, report = mlpext.fuse(model, report=True)
    x = torch.randn(5, 6)
    torch.testing.assert_close(fused(x), model(x))
    assert rows(report, "replaced")["1"] == "by mlpext.nn.Tanh, alone, after 0 (Linear)"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    model = Pair().to(dtype)
    fused, report = mlpext.fuse(model, report=True)
    x = torch.randn(5, 6, dtype=dtype)
    torch.testing.assert_close(fused(x), model(x))
    if dtype.is_complex:
        assert rows(report, "left")["fc"] == "its dtype is torch.complex64"
    else:
        assert type(fused.fc) is LinearActivation


def test_unusual_parameters_of_an_activation():
    model = Pair()
    model.act = nn.ELU(alpha=torch.tensor(0.5))
    assert reason(model) == "its output goes to act (ELU)"


def no_grad_activation(self, x):
    h = self.fc(x)
    with torch.no_grad():
        h = self.act(h)
    return h + x


def autocast_activation(self, x):
    h = self.fc(x)
    with torch.autocast("cpu", enabled=True):
        return self.act(h)


def in_train_mode_only(self, x):
    return self.act(self.fc(x)) if self.training else self.fc(x)


def unless_there_is_a_mask(self, x, mask=None):
    h = self.fc(x)
    if mask is None:
        h = h * 2
    return self.act(h)


def in_a_branch(self, x):
    h = self.fc(x)
    return self.act(h) if x.sum() > 0 else h


def activation_twice(self, x):
    return self.act(self.fc(x)) + self.act(x)


def linear_twice(self, x):
    return self.fc(self.act(self.fc(x)))


def output_kept(self, x):
    h = self.fc(x)
    return self.act(h) + h


def changed_in_between(self, x):
    h = self.fc(x)
    h.mul_(2)
    return self.act(h)


def by_keyword(self, x):
    return self.act(input=self.fc(x))


@pytest.mark.parametrize(
    "body, why",
    [
        (no_grad_activation, "another autograd or autocast mode"),
        (autocast_activation, "another autograd or autocast mode"),
        (in_train_mode_only, "no activation follows it"),
        (unless_there_is_a_mask, "goes to mul"),
        (in_a_branch, "cannot be traced"),
        (activation_twice, "also used on the output of x"),
        (linear_twice, "no activation follows it"),
        (output_kept, "used more than once"),
        (changed_in_between, "used more than once"),
        (by_keyword, "among other arguments"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_uses_that_forbid_it(body, why, graph):
    model = type("Other", (Pair,), {"forward": body})()
    if graph:  # where each call stands for itself
        fuse(model, graph=True)
    else:
        assert why in reason(model)


class Branching(Pair):
    """A pair, and attributes for a forward to branch on."""

    always = True

    def __init__(self):
        super().__init__()
        self.return_pre, self.mode, self.depth, self.taps, self.hook = False, "post", 1, [], None
        self.cfg, self.order, self.norm = SimpleNamespace(pre=False), Order.LINEAR_FIRST, None
        self.down = nn.ModuleList([nn.Linear(6, 6)])


class Order(enum.Enum):
    LINEAR_FIRST, ACTIVATION_FIRST = 1, 2


def early_return(self, x):
    z = self.fc(x)
    if self.return_pre:
        return z
    return self.act(z)


def conditional(self, x):
    z = self.fc(x)
    return self.act(z) if self.always else z


def both_results(self, x):
    z = self.fc(x)
    return self.act(z) + ((self.return_pre and z) or 0)


def of_another_input(self, x):
    return self.act(x if self.return_pre else self.fc(x))


def something_between(self, x):
    z = self.fc(x)
    if self.mode == "scaled":
        z = z * 2
    return self.act(z)


def the_third_of_three(self, x):
    if self.mode == "post":
        return self.act(self.fc(x))
    if self.mode == "twice":
        return self.act(self.fc(x)) * 2
    return self.fc(x)


def by_number(self, x):
    z = self.fc(x)
    for i, layer in enumerate(self.down):
        if i == self.depth:
            return z
        z = layer(self.act(z))
    return z


def by_content(self, x):
    z = self.fc(x)
    return self.act(z) + (z if "fc" in self.taps else 0)


def none_so_far(self, x):
    z = self.fc(x)
    if self.hook is not None and 0 in self.hook:
        return z
    return self.act(z)


def of_a_config(self, x):
    z = self.fc(x)
    return z if self.cfg.pre else self.act(z)


def by_enum(self, x):
    return self.act(self.fc(x)) if self.order is Order.LINEAR_FIRST else self.fc(self.act(x))


def by_name(self, x):
    z = self.fc(x)
    return z if getattr(self, "return_pre", None) else self.act(z)


def of_a_tensor_too(self, x):
    z = self.fc(x)
    if self.return_pre and x.sum() > 0:
        return z
    return self.act(z)


@pytest.mark.parametrize(
    "body, attribute",
    [
        *((early_return, "return_pre"), (conditional, "always"), (both_results, "return_pre")),
        *((of_another_input, "return_pre"), (something_between, "mode"), (the_third_of_three, "mode")),
        *((by_number, "depth"), (by_content, "taps"), (none_so_far, "hook"), (of_a_config, "cfg.pre")),
        *(
            (by_enum, "order"),
            (by_name, "return_pre"),
            (of_a_tensor_too, "return_pre"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_branch_on_an_attribute(body, attribute):
    model = type("Net", (Branching,), {"forward": body})()
    assert f"Net.forward branches on self.{attribute}, which may change" in reason(model)
    assert model.cfg == SimpleNamespace(pre=False) and not model.return_pre and model.taps == []


def in_train_mode_too(self, x):
    y = self.act(self.fc(x))
    return y * 2 if self.training else y


def after_the_pair(self, x):
    y = self.act(self.fc(x))
    return y + x if self.return_pre else y


def around_the_pair(self, x):
    return self.act(self.fc(x)) if self.always else x


def parts_that_may_be_absent(self, x):
    z = self.fc(x)
    if self.norm is not None:
        z = self.norm(z)
    if self.act is not None and self.fc.bias is not None and isinstance(self.down, nn.ModuleList):
        z = self.act(z)
    for layer in self.down:
        z = layer(z)
    return z


def only_refused(self, x):
    z = self.fc(x)
    if self.mode != "post":
        raise ValueError(self.mode)
    assert self.always and not self.return_pre
    return self.act(z)


def no_test_at_all(self, x):
    return self.act(self.fc(x)).view(-1, 6 * self.depth) * len(self.mode)


def without_end(self, x):
    while self.return_pre:
        x = x + 1
    return self.act(self.fc(x))


def not_to_be_followed(self, x):
    """As torchrl's MLP has it: a proxy's shape has no length."""
    y = self.act(self.fc(x))
    return y.view(*y.shape[:-1], 2, 3) if self.return_pre else y


def not_to_be_turned(self, x):
    n = 0
    while n > self.depth:
        n -= 1
    return self.act(self.fc(x))


@pytest.mark.parametrize(
    "body",
    [
        *(in_train_mode_too, after_the_pair, around_the_pair, parts_that_may_be_absent, only_refused),
        *(no_test_at_all, not_to_be_turned, without_end, not_to_be_followed),
    ],
)
def test_a_branch_that_leaves_the_pair_as_it_is(body):
    fused, _ = fuse(type("Net", (Branching,), {"forward": body})())
    assert type(fused.fc) is LinearActivation


class HelperBranches(Branching):
    def forward(self, x):
        return self.block(x)

    def block(self, x):
        z = self.fc(x)
        return z if self.return_pre else self.act(z)


class SharesItsActivation(nn.Module):
    """No linear layer, and a use of someone else's activation that is off."""

    def __init__(self, act):
        super().__init__()
        self.act, self.first = act, False

    def forward(self, x):
        return self.act(x) if self.first else x


def test_a_branch_on_an_attribute_elsewhere():
    assert "HelperBranches.forward branches on self.return_pre" in reason(HelperBranches())
    inner = type("Inner", (Branching,), {"forward": early_return})
    assert "Inner.forward branches on" in reason(nn.Sequential(Pair(), inner()), "1.fc")
    assert type(fuse(nn.Sequential(Pair(), inner()))[0][0].fc) is LinearActivation

    outer = Branching()
    outer.fc = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    outer.__class__ = type("Outer", (Branching,), {"forward": early_return})
    assert "Outer.forward branches on" in reason(outer, "fc.2")
    assert type(mlpext.fuse(outer).fc[0]) is LinearActivation

    pair = Pair()
    both = nn.Sequential(pair, SharesItsActivation(pair.act))
    assert "SharesItsActivation.forward branches on self.first" in reason(both, "0.fc")


def test_an_attribute_that_is_set_after_fusing():
    """What would be lost otherwise: the model does what it would do without fuse()."""
    model = type("Net", (Branching,), {"forward": early_return})()
    fused, x = mlpext.fuse(model), torch.randn(5, 6)
    fused.return_pre = True
    torch.testing.assert_close(fused(x), model.fc(x))

    graph = mlpext.fuse(model, graph=True)
    torch.testing.assert_close(graph(x), torch.tanh(model.fc(x)))
    with pytest.raises(AttributeError, match="return_pre: the graph was made with return_pre as it is"):
        graph.return_pre = True
    graph.mode = "pre"  # which no forward reads
    graph.fc = nn.Linear(6, 6)
    graph.note = "mine"
    assert not mlpext.unfuse(graph).return_pre


def test_the_graph_of_a_graph_can_be_set():
    fused = mlpext.fuse(torch.fx.symbolic_trace(Pair()), graph=True)
    fused.graph = fused.graph
    fused.meta["note"] = "mine"


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
    assert type(mlpext.fuse(nn.Linear(2, 2))) is nn.Linear
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


# ---------------------------------------------------------------- compiled and exported


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
