"""What fuse recognises: each activation as a module, and linear layers that are just that."""

import pytest
import torch
import torch.nn.functional as TF
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mlpext
from common import TORCH_LACKS, module
from fusion_common import ACTIVATIONS, Pair, fuse, randn, reason, results, rows, types, unfused
from mlpext.fusion import FusedActivation
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


def test_every_activation_is_here():
    ours = {name for name, cls in vars(mlpext.nn).items() if isinstance(cls, type) and hasattr(nn, name)}
    assert ours >= set(ACTIVATIONS)
    here = {word.lower() for word in ACTIVATIONS} | {"identity", "gelutanh"}
    lacking = {name.replace("_", "") for name in TORCH_LACKS}
    assert {name.replace("_", "") for name in mlpext.activations()} == here | lacking


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


@pytest.mark.parametrize("name", sorted(TORCH_LACKS))
def test_activations_that_torch_lacks(name):
    fused, _ = fuse(nn.Sequential(nn.Linear(6, 8), module(mlpext.nn, name, {})))
    assert type(fused[0]) is LinearActivation and fused[0].activation == name


class OwnSine(nn.Module):
    def forward(self, x):
        return torch.sin(3.0 * x)


class OwnSiLU(nn.Module):  # as in transformers
    def __init__(self):
        super().__init__()
        self.act = TF.silu

    def forward(self, input):
        return self.act(input)


class OwnSwish(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x) * x


class OwnQuickGELU(nn.Module):  # as in CLIP and transformers
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class OwnReLUSquared(nn.Module):  # as in transformers
    def forward(self, input):
        return torch.square(nn.functional.relu(input))


class Power(nn.Module):
    def forward(self, x):
        return TF.relu(x) ** 2


class Cube(nn.Module):
    def forward(self, x):
        return TF.relu(x) ** 3


class AnotherGate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x) * x


class OtherInput(nn.Module):
    def forward(self, x):
        return 2 * x * torch.sigmoid(1.702 * x)


class Scaled(nn.Module):
    def forward(self, x):
        return TF.silu(x) * 2


class TrainOnly(nn.Module):
    def forward(self, x):
        return TF.silu(x) if self.training else x.relu()


def test_modules_that_only_call_an_activation():
    for cls, name, params in (
        (OwnSine, "sine", {"omega": 3.0}),
        (OwnSiLU, "silu", {}),
        (OwnSwish, "silu", {}),
        (OwnQuickGELU, "quick_gelu", {"alpha": 1.702}),
        (OwnReLUSquared, "relu_squared", {}),
        (Power, "relu_squared", {}),
    ):
        fused, _ = fuse(nn.Sequential(nn.Linear(6, 8), cls()))
        assert (fused[0].activation, fused[0].params) == (name, params)
        assert type(fused[1]) is FusedActivation and type(mlpext.unfuse(fused)[1]) is cls
        assert type(fuse(nn.Sequential(cls()))[0][0]) is cls
    for cls in (Scaled, TrainOnly, Cube, AnotherGate, OtherInput):
        assert reason(nn.Sequential(nn.Linear(6, 8), cls()), "0") == f"its output goes to 1 ({cls.__name__})"


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
        assert why in unfused(report)["fc"]
        assert type(fused.fc) is type(model.fc)


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
        assert unfused(report)["fc"] == "its dtype is torch.complex64"
    else:
        assert type(fused.fc) is LinearActivation


def test_unusual_parameters_of_an_activation():
    model = Pair()
    model.act = nn.ELU(alpha=torch.tensor(0.5))
    assert reason(model) == "its output goes to act (ELU)"
