"""inference=True: BatchNorm1d folded into the Linear before it, dropout looked through, no way to train."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mlpext
from architectures import architectures, build
from fusion_common import ACTIVATIONS, Pair, is_alone, mlp, randn, rows, types, unfused
from mlpext.fusion import FusedActivation
from mlpext.fusion._inference import FoldedBatchNorm, FoldedLinear, FusedDropout
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


class Normed(nn.Module):
    """self.act(self.norm(self.fc(x))), with statistics of some batches."""

    def __init__(self, act=None, bias=True, **kwargs):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 8, bias), act or nn.Tanh()
        self.norm, self.drop = nn.BatchNorm1d(8, **kwargs), nn.Dropout(0.4)
        for _ in range(3):
            nn.Sequential(self.fc, self.norm)(2 * torch.randn(20, 6) + 1)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.act(self.drop(self.norm(self.fc(x))))


def folded(model, *inputs, tolerance=1e-12, **kwargs):
    """The fused model and its report, once seen to be the same in eval mode."""
    training = {path: module.training for path, module in model.named_modules()}
    fused, report = mlpext.fuse(model, inference=True, report=True, **kwargs)
    assert {path: module.training for path, module in model.named_modules()} == training
    assert not any(module.training for module in fused.modules())
    inputs = inputs or (randn(5, 6).to(next(model.parameters()).dtype),)
    expected = copy.deepcopy(model).eval()(*inputs)
    torch.testing.assert_close(fused(*inputs), expected, rtol=tolerance, atol=tolerance)
    return fused, report


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    tolerance = 1e-6 if name == "Hardsigmoid" else 1e-12
    fused, report = folded(
        Normed(getattr(nn, name)(**ACTIVATIONS[name])).double(), tolerance=tolerance, graph=False
    )
    assert [type(m) for m in fused.children()] == [
        FoldedLinear,
        FusedActivation,
        FoldedBatchNorm,
        FusedDropout,
    ]
    assert rows(report, "fused") == {
        "fc": f"with norm (BatchNorm1d), with act ({name})",
        "act": "into fc",
        "norm": "into fc",
    }


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"affine": False}, {"eps": 0.5}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("graph", [False, True])
def test_every_batch_norm(bias, kwargs, graph):
    fused, _ = folded(Normed(bias=bias, **kwargs).double(), graph=graph)
    assert type(fused.fc) is FoldedLinear
    assert list(fused.state_dict()) == ["fc.weight", "fc.bias"]
    assert not any(parameter.requires_grad for parameter in fused.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """As near to the model in float64 as the dtype allows: the weights are folded in float64."""
    torch.manual_seed(0)
    model = Normed(nn.Identity()).to(dtype).eval()
    fused, x = mlpext.fuse(model, inference=True), torch.randn(50, 6).to(dtype)
    exact = copy.deepcopy(model).double()(x.double())
    assert fused(x).dtype == dtype
    error, other = ((net(x).double() - exact).abs().max() for net in (fused, model))
    assert error <= 2 * other


def test_without_an_activation_and_in_a_row():
    layers = nn.Sequential(
        *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4)),
        *(nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3), nn.BatchNorm1d(3)),
    ).double()
    layers(randn(20, 6))
    fused, report = folded(layers)
    assert str(report).splitlines()[1:] == [
        "0       fused   with 1 (BatchNorm1d), with 2 (ReLU)",
        "1       fused   into 0",
        "2       fused   into 0",
        "4       fused   with 6 (Tanh)",
        "6       fused   into 4",
        "7       fused   with 8 (BatchNorm1d)",
        "8       fused   into 7",
        "7 fused",
    ]
    assert type(fused[4]) is LinearActivation and fused[7].activation == "identity"
    assert fused[4].weight is layers[4].weight and fused[7].weight is not layers[7].weight
    left = unfused(mlpext.fuse(layers, report=True)[1])
    assert left["0"] == "its output goes to 1 (BatchNorm1d): see inference=True"


@architectures
def test_the_architectures(name):
    """Same outputs, and unfuse brings back every class, parameter and buffer."""
    model, inputs = build(name)
    model(*inputs)
    fused, _ = folded(model, *inputs)
    back = mlpext.unfuse(fused)
    assert types(back) == types(model) and list(back.state_dict()) == list(model.state_dict())
    if name != "scripted part":  # which is copied
        assert all(a is b for a, b in zip(back.parameters(), model.parameters(), strict=True))
        assert all(a is b for a, b in zip(back.buffers(), model.buffers(), strict=True))


def test_it_cannot_be_trained():
    for model in (Normed(), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4))):
        fused = mlpext.fuse(model, inference=True)
        with pytest.raises(RuntimeError, match=r"train\(\): .* inference=True, .*unfuse"):
            fused.train()
        assert fused.eval() is fused
        back = mlpext.unfuse(fused).train()
        assert all(module.training for module in back.modules())


def test_checkpoints():
    model, other = Normed().double(), Normed().double()
    fused, twin = (mlpext.fuse(each, inference=True) for each in (model, other))
    twin.load_state_dict(fused.state_dict())
    assert torch.equal(twin(x := randn(5, 6)), fused(x))
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"norm.weight: this BatchNorm1d has become part"):
            fused.load_state_dict(other.state_dict(), strict=strict)


def test_in_place_twice_and_copies():
    model = Normed().double()
    before, state, parameters = types(model), copy.deepcopy(model.state_dict()), list(model.parameters())
    expected = copy.deepcopy(model).eval()(x := randn(5, 6))
    assert mlpext.fuse(model, inplace=True, inference=True) is model
    once = types(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), mlpext.fuse(model, inference=True)):
        assert types(twin) == once
        torch.testing.assert_close(twin(x), expected)
        assert types(mlpext.unfuse(twin)) == before
        torch.testing.assert_close(dict(twin.state_dict()), dict(state), rtol=0, atol=0)
    report = mlpext.fuse(model, report=True, inference=True)[1]
    assert rows(report, "unchanged") == {
        "fc": "fused already: it was Linear",
        "act": "fused already: it was Tanh",
        "norm": "fused already: it was BatchNorm1d",
        "drop": "fused already: it was Dropout",
    }
    again = mlpext.unfuse(mlpext.fuse(model))
    for back in (again, mlpext.unfuse(model)):
        assert types(back) == before
        assert all(a is b for a, b in zip(back.parameters(), parameters, strict=True))
        assert sorted(vars(back.fc)) == sorted(vars(nn.Linear(1, 1)))


def test_after_a_fuse_without_it():
    model = mlpext.fuse(Normed(nn.ReLU()).double())
    assert type(model.act) is mlpext.nn.ReLU
    assert type(mlpext.unfuse(folded(model)[0]).act) is nn.ReLU


def test_moved_and_brought_back():
    model = mlpext.fuse(Normed(), inplace=True, inference=True).double()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
    back = mlpext.unfuse(model)
    assert all(
        value.dtype == torch.float64 for value in back.state_dict().values() if value.is_floating_point()
    )
    assert back(randn(5, 6)).dtype == torch.float64


def test_an_input_of_three_dimensions():
    """BatchNorm1d normalizes dimension 1 of it, where the Linear's outputs are the last."""
    model = Normed().eval()
    x = torch.randn(4, 8, 6)
    model(x)
    with pytest.raises(ValueError, match="input: 3 dimensions, expected 2"):
        mlpext.fuse(model, inference=True)(x)


class Alone(Normed):
    def scores(self, x):
        return self.fc(x)


class Both(Normed):
    def forward(self, x):
        y = self.fc(x)
        return self.act(self.norm(y)) + y


class Branch(Normed):
    use_norm = True

    def forward(self, x):
        y = self.fc(x)
        return self.act(self.norm(y) if self.use_norm else y)


class Twice(Normed):
    def forward(self, x):
        return self.act(self.norm(self.fc(x))) + self.norm(x[:, :1].expand(-1, 8))


class Untraced(Normed):
    def forward(self, x):
        return self.act(self.norm(self.fc(x))) if x.sum() < 1e9 else self.norm(x)


class Calls(Normed):
    def forward(self, x):
        return self.norm(self.fc(x)) + self.fc(x)


def hooked():
    model = Normed()
    model.norm.register_forward_hook(lambda *a: None)
    return model


def wider():
    model = Normed()
    model.fc, model.norm = nn.Linear(6, 8), nn.BatchNorm1d(5)
    return model


def parametrized():
    model = Normed()
    nn.utils.parametrizations.weight_norm(model.fc)
    return model


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: Normed(track_running_stats=False), "has no running statistics"),
        (hooked, "has hooks"),
        (Alone, "Alone.scores uses fc"),
        (Both, "its output is used more than once"),
        (Branch, "branches on self.use_norm"),
        (Twice, "is also used on something else"),
        (Untraced, "Untraced.forward cannot be traced"),
        (Calls, "is not all that follows it"),
        (parametrized, "parametrized"),
    ],
)
def test_what_is_left(make, why):
    model = make().double()
    fused, report = folded(model)
    assert why in unfused(report)["fc"]
    assert is_alone(fused.fc, model.fc) and type(fused.norm) is nn.BatchNorm1d


def test_of_another_size():
    """Three dimensions, of which the second is normalized."""
    model = wider().double()
    fused, report = folded(model, torch.randn(4, 5, 6, dtype=torch.float64))
    assert unfused(report)["fc"].endswith("which normalizes 5 channels, not the 8 outputs")
    assert type(fused.norm) is nn.BatchNorm1d


def test_hooks_on_dropout_and_on_the_model():
    model, log = mlp(6, 8, 8).append(nn.Dropout(0.4)), []
    for module in (model, model[-1]):
        module.register_forward_hook(lambda module, _, y: log.append((type(module).__name__, y.sum().item())))
    y = mlpext.fuse(model, inference=True)(torch.randn(5, 6))
    assert log == [("FusedDropout", y.sum().item()), ("Sequential", y.sum().item())]


def test_a_model_without_either():
    model = Pair().double()
    fused, _ = folded(model)
    assert fused.fc.weight is model.fc.weight and not fused.train().eval().training


def test_transformer_layers():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double()
    fused, report = folded(model, torch.randn(2, 5, 8, dtype=torch.float64), tolerance=1e-6)
    assert "layers.1.linear1" in rows(report, "fused") and type(fused.layers[0].dropout1) is FusedDropout


@pytest.mark.compile
def test_compile_and_export(fresh_dynamo):
    model = Normed().double().eval()
    fused, x = mlpext.fuse(model, inference=True), torch.randn(5, 6, dtype=torch.float64)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    program = torch.export.export(
        fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))
