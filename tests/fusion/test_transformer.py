"""torch's transformer layers: the feed-forward part fused, and the operator of eval mode as before."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import mlpext
from fusion_common import ACTIVATIONS, assert_same, is_alone, randn, results, rows, types, unfused
from mlpext.fusion import FusedActivation
from mlpext.fusion._transformer import FusedTransformerDecoderLayer, FusedTransformerEncoderLayer
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")

FUNCTIONS = {"LeakyReLU": "leaky_relu", "LogSigmoid": "logsigmoid"}


def encoder_layer(activation=TF.relu, cls=nn.TransformerEncoderLayer, **kwargs):
    torch.manual_seed(0)
    return cls(8, 2, 16, activation=activation, batch_first=True, **kwargs).double()


def fuse_layer(layer, *inputs):
    fused, report = mlpext.fuse(layer, report=True)
    inputs = inputs or (randn(2, 5, 8),)
    assert_same(layer, fused, inputs)
    assert list(fused.state_dict()) == list(layer.state_dict())
    return fused, report


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    parameters = {key: value for key, value in ACTIVATIONS[name].items() if key != "inplace"}
    function = getattr(TF, FUNCTIONS.get(name, name.lower()))
    for given in (
        functools.partial(function, **parameters),
        lambda x: function(x, **parameters),
        getattr(nn, name)(**parameters),
    ):
        layer = encoder_layer(given, dropout=0.0)
        fused = mlpext.fuse(layer)
        assert_same(layer, fused, (randn(2, 5, 8),), 1e-6 if name in ("CELU", "Hardsigmoid") else 1e-12)
        assert type(fused.linear1) is LinearActivation
        if isinstance(given, nn.Module):
            assert type(fused) is nn.TransformerEncoderLayer and type(fused.activation) is FusedActivation
        else:
            assert type(fused) is FusedTransformerEncoderLayer


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_decoder_layer(norm_first, bias):
    layer = encoder_layer("gelu", nn.TransformerDecoderLayer, norm_first=norm_first, bias=bias)
    fused, report = fuse_layer(layer, randn(2, 5, 8), randn(2, 4, 8))
    assert type(fused) is FusedTransformerDecoderLayer
    assert rows(report, "fused") == {
        "": "linear1 with gelu",
        "linear1": "with gelu, the activation of its layer",
    }
    assert unfused(report)["linear2"] == "its output goes to dropout3 (Dropout)"


def test_there_and_back_and_twice():
    layer = encoder_layer()
    before, attributes = types(layer), sorted(vars(layer))
    fused, report = fuse_layer(layer)
    assert isinstance(fused, nn.TransformerEncoderLayer) and types(layer) == before
    assert all(a is b for a, b in zip(fused.parameters(), layer.parameters(), strict=True))
    assert [row.path for row in report][-1] == "" and str(report).endswith("1 fused, 1 replaced, 2 left")
    again, report = mlpext.fuse(fused, report=True)
    assert rows(report, "unchanged")[""] == "fused already: it was TransformerEncoderLayer"
    assert types(again) == types(fused)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), again, fused):
        assert_same(layer, twin, (randn(2, 5, 8),))
        assert types(mlpext.unfuse(twin)) == before and sorted(vars(twin)) == attributes
        assert_same(layer, twin, (randn(2, 5, 8),))


def test_the_activation_can_be_changed_after_unfuse():
    fused = mlpext.fuse(encoder_layer())
    with pytest.raises(AttributeError, match=r"activation: it has become part .*unfuse"):
        fused.activation = TF.gelu
    assert fused.activation is TF.relu
    fused.norm_first = True
    mlpext.unfuse(fused).activation = TF.gelu
    layer = encoder_layer(TF.gelu, norm_first=True)
    torch.testing.assert_close(fused.eval()(x := randn(2, 5, 8)), layer.eval()(x))


class OwnFeedForward(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return self.linear2(self.activation(self.linear1(x)) * 2)


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, x):
        return self.linear2(self.activation(self.linear1(x))) if x.sum() > 0 else self.linear1(x)


class SameForward(nn.TransformerEncoderLayer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = "mine"


class Without(nn.TransformerEncoderLayer):
    """Without a feed-forward part."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.linear1, self.linear2

    def _ff_block(self, x):
        return self.dropout2(x)


class UsesLinear1(nn.TransformerEncoderLayer):
    def hidden(self, x):
        return self.linear1(x)


class Model(nn.Module):
    """A model that calls a layer's parts."""

    def __init__(self):
        super().__init__()
        self.layer = encoder_layer()

    def forward(self, x):
        return self.layer(x)

    def hidden(self, x):
        return self.layer.linear1(x)


def changed(change, activation=TF.relu):
    layer = encoder_layer(activation)
    change(layer)
    return layer


def own_feed_forward(layer):
    layer._ff_block = lambda x: layer.linear2(TF.silu(layer.linear1(x)))


def replaced(name, module):
    return lambda layer: setattr(layer, name, module)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def more_than_an_activation(x):
    return torch.sin(3 * x) * 2


class Callable:
    slope = 0.1

    def __call__(self, x):
        return TF.leaky_relu(x, self.slope)


def nothing(*_):
    return None


LEFT = {
    "own forward": (lambda: encoder_layer(cls=OwnForward), "OwnForward.forward cannot be traced"),
    "own feed-forward": (lambda: encoder_layer(cls=OwnFeedForward), "more than an activation"),
    "own feed-forward of modules": (
        lambda: encoder_layer(nn.Tanh(), OwnFeedForward),
        "OwnFeedForward._ff_block uses activation and linear1",
    ),
    "subclass": (lambda: encoder_layer(cls=SameForward), "in SameForward, not torch's class"),
    "method": (lambda: encoder_layer(cls=UsesLinear1), "UsesLinear1.hidden uses linear1"),
    "feed-forward of the instance": (lambda: changed(own_feed_forward), "cannot be traced"),
    "hook": (lambda: changed(lambda m: m.linear1.register_forward_hook(nothing)), "it has hooks"),
    "hook on the activation": (
        lambda: changed(lambda m: m.activation.register_forward_hook(nothing), nn.ReLU()),
        "activation (ReLU) has hooks",
    ),
    "parametrized": (
        lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m.linear1)),
        "parametrized",
    ),
    "weight_norm": (lambda: changed(lambda m: nn.utils.weight_norm(m.linear1)), "computed at each call"),
    "own linear": (
        lambda: changed(replaced("linear1", OwnLinear(8, 16).double())),
        "OwnLinear is not torch.nn.Linear itself",
    ),
    "more": (lambda: encoder_layer(more_than_an_activation), "more than an activation"),
    "unknown": (lambda: encoder_layer(lambda x: x * 2), "its output goes to mul"),
    "a branch": (lambda: encoder_layer(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
    "an object": (lambda: encoder_layer(Callable()), "an object of Callable"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    make, why = LEFT[name]
    layer = make()
    fused, report = mlpext.fuse(layer, report=True)
    assert why in unfused(report)["linear1"], str(report)
    assert type(fused) is type(layer) and is_alone(fused.linear1, layer.linear1)
    if "feed-forward of the instance" not in name:  # whose closure calls the layer itself
        assert_same(layer, fused, (randn(2, 5, 8),))


def test_left_where_a_method_of_the_model_reaches_in():
    report = mlpext.fuse(Model(), report=True)[1]
    assert unfused(report)["layer.linear1"] == "Model.hidden reaches into TransformerEncoderLayer"


def test_a_subclass_without_linear_layers():
    _, report = fuse_layer(encoder_layer(TF.silu, Without))  # with relu, torch reads linear1 in eval mode
    assert not rows(report, "fused")


@pytest.mark.native
@pytest.mark.parametrize("activation", [TF.relu, TF.gelu, nn.GELU(), TF.silu])
@pytest.mark.parametrize("fast", [False, True])
def test_the_encoder_in_eval_mode(activation, fast):
    """Its operator of torch, with and without padding, bit for bit; and without it."""
    model = nn.TransformerEncoder(encoder_layer(activation).float(), 2).eval()
    fused = mlpext.fuse(model)
    assert all(type(layer.linear1) is LinearActivation for layer in fused.layers)
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[3], [5]])
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        for mask in (None, padding):
            for net in (model, fused):
                with torch.no_grad(), torch.profiler.profile() as profile:
                    net(x, src_key_padding_mask=mask)
                names = {event.name for event in profile.events()}
                taken = "aten::_transformer_encoder_layer_fwd" in names
                assert taken == (fast and activation is not TF.silu)
                assert ("mlpext::linear_activation" in names) == (net is fused and not taken)
            with torch.no_grad():
                actual, expected = (net(x, src_key_padding_mask=mask) for net in (fused, model))
            exact = fast and activation is not TF.silu
            torch.testing.assert_close(actual, expected, **({"rtol": 0, "atol": 0} if exact else {}))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_nested_tensors():
    for activation in (TF.relu, TF.silu):
        layer = encoder_layer(activation).eval()
        x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], dtype=torch.float64)
        with torch.no_grad():
            for actual, expected in zip(mlpext.fuse(layer)(x).unbind(), layer(x).unbind(), strict=True):
                torch.testing.assert_close(actual, expected)


def test_the_transformer_as_a_whole():
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True).double()
    fused, report = fuse_layer(model, randn(2, 5, 8), randn(2, 4, 8))
    paths = [f"{part}.layers.{i}.linear1" for part in ("encoder", "decoder") for i in range(2)]
    assert set(paths) < set(rows(report, "fused"))
    clones = nn.TransformerEncoder(fused.encoder.layers[0], 2)  # made of a fused layer
    assert_same(nn.TransformerEncoder(model.encoder.layers[0], 2), clones, (randn(2, 5, 8),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_autocast(dtype):
    layer = encoder_layer(TF.gelu, dropout=0.0).float()
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mlpext.fuse(layer)(x), layer(x))
    layer, x = layer.to(dtype), x.to(dtype)
    torch.testing.assert_close(mlpext.fuse(layer)(x), layer(x))


def test_second_derivatives():
    layer, x = encoder_layer(torch.tanh, dropout=0.0), randn(2, 5, 8)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(mlpext.fuse(layer), (x,), rtol=1e-3, atol=1e-4)


@pytest.mark.compile
def test_compile(fresh_dynamo):
    model = nn.TransformerEncoder(encoder_layer(dropout=0.0), 2)
    fused = mlpext.fuse(model)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(results(compiled, (x := randn(2, 5, 8),)), results(model, (x,)), strict=True):
        torch.testing.assert_close(actual, expected)
