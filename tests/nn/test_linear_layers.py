"""LinearActivation, Maxout and MLP: initialisation, attributes, errors, and what users do to modules."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch.nn.utils import prune

import mlpext
from common import (
    NAMES,
    assert_close,
    assert_same_bits,
    class_name,
    eager,
)
from mlpext import nn

pytestmark = pytest.mark.filterwarnings("error")
CLASSES = sorted({class_name(n) for n in NAMES if n not in ("identity", "gelu_tanh")})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_layer_has_linears_parameters_and_weights(name, bias):
    torch.manual_seed(5)
    layer = nn.LinearActivation(7, 4, name, bias=bias)
    torch.manual_seed(5)
    linear = torch.nn.Linear(7, 4, bias=bias)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in linear.named_parameters()]
    for ours, theirs in zip(layer.parameters(), linear.parameters(), strict=True):
        assert_same_bits(ours.detach(), theirs.detach())
        assert type(ours) is torch.nn.Parameter
    x = torch.randn(3, 7)
    assert_close(layer(x), eager(name, {})(linear(x)))
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    if not bias:
        assert layer.bias is None


def test_layers_attributes_and_repr():
    layer = nn.LinearActivation(7, 4, "elu", alpha=0.5)
    assert (layer.in_features, layer.out_features, layer.activation) == (7, 4, "elu")
    for word in ("LinearActivation", "in_features=7", "out_features=4", "bias=True", "elu", "alpha=0.5"):
        assert word in repr(layer)
    assert "bias=False" in repr(nn.LinearActivation(7, 4, bias=False))
    names = list(inspect.signature(nn.LinearActivation.__init__).parameters)
    assert names == ["self", "in_features", "out_features", "activation", "bias", "device", "dtype", "params"]


def test_layer_reads_its_parameters_at_each_call():
    layer, x = nn.LinearActivation(4, 3, "elu"), torch.randn(2, 4)
    net = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(layer(x), torch.nn.functional.elu(net))
    layer.params["alpha"] = 0.25
    assert_close(layer(x), torch.nn.functional.elu(net, 0.25))


@pytest.mark.parametrize("wrong", [False, True, torch.relu, torch.nn.ReLU, 3, None])
def test_layer_wants_a_name(wrong):
    """LinearActivation(5, 3, False) is a bias given in the activation's place."""
    with pytest.raises(TypeError, match="activation"):
        nn.LinearActivation(5, 3, wrong)


SCALARS = [np.int64, np.int32, np.uint8, torch.tensor]


@pytest.mark.parametrize("integer", SCALARS, ids=lambda s: s.__name__)
def test_sizes_of_numpy_and_torch(integer):
    """Taken as by torch.nn, and kept as plain integers."""
    for made, plain in [
        (nn.LinearActivation(integer(3), integer(2)), nn.LinearActivation(3, 2)),
        (nn.Maxout(integer(3), integer(2), pieces=integer(4)), nn.Maxout(3, 2, pieces=4)),
        (
            nn.MLP([3, integer(5), integer(2)], "maxout", pieces=integer(3)),
            nn.MLP([3, 5, 2], "maxout", pieces=3),
        ),
        (nn.MLP(np.array([3, 5, 2])), nn.MLP([3, 5, 2])),
    ]:
        assert repr(made) == repr(plain) == repr(copy.deepcopy(made))
        for part in made.modules():
            sizes = [vars(part).get(name) for name in ("in_features", "out_features", "pieces")]
            assert all(size is None or type(size) is int for size in sizes)
        assert [p.shape for p in made.parameters()] == [p.shape for p in plain.parameters()]
        made.load_state_dict(plain.state_dict())
        x = torch.randn(4, 3)
        assert_close(made(x), plain(x))


@pytest.mark.parametrize(
    "number", [np.float32, np.float64, np.float16, torch.tensor], ids=lambda s: s.__name__
)
def test_parameters_of_numpy_and_torch(number):
    x = torch.randn(4, 3)
    for made, plain in [
        (nn.LinearActivation(3, 2, "elu", alpha=number(0.5)), nn.LinearActivation(3, 2, "elu", alpha=0.5)),
        (nn.MLP([3, 4, 2], "elu", alpha=number(0.5)), nn.MLP([3, 4, 2], "elu", alpha=0.5)),
        (nn.Sine(number(0.5)), nn.Sine(0.5)),
        (nn.Squareplus(number(0.5)), nn.Squareplus(0.5)),
        (nn.QuickGELU(number(0.5)), nn.QuickGELU(0.5)),
        (nn.ELU(number(0.5)), nn.ELU(0.5)),
    ]:
        if not isinstance(made, nn.ELU):  # torch's own constructor
            assert repr(made) == repr(plain)
        made.load_state_dict(plain.state_dict())
        assert_close(made(x), plain(x))
    for name, parameter in [
        ("elu", "alpha"),
        ("sine", "omega"),
        ("squareplus", "b"),
        ("quick_gelu", "alpha"),
        ("hardshrink", "lambd"),
    ]:
        f = getattr(mlpext.functional, name)
        assert_close(f(x, **{parameter: number(0.5)}), f(x, 0.5))
    weight = torch.randn(2, 3)
    f = mlpext.functional.linear_activation
    assert_close(f(x, weight, None, "elu", alpha=number(0.5)), f(x, weight, None, "elu", alpha=0.5))
    layer = nn.LinearActivation(3, 2, "elu")
    layer.params["alpha"] = number(0.5)  # read at each call
    assert_close(layer(x), f(x, layer.weight, layer.bias, "elu", alpha=0.5))


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), "3", 2.0, None], ids=repr)
def test_what_is_no_size_is_refused(wrong):
    for make in (
        lambda: nn.LinearActivation(wrong, 2),
        lambda: nn.Maxout(3, 2, pieces=wrong),
        lambda: nn.MLP([3, wrong, 2]),
    ):
        with pytest.raises(TypeError, match="expected an integer"):
            make()


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), "0.5", None, 1j], ids=repr)
def test_what_is_no_parameter_is_refused(wrong):
    for make in (
        lambda: nn.LinearActivation(3, 2, "elu", alpha=wrong),
        lambda: nn.MLP([3, 4, 2], "elu", alpha=wrong),
        lambda: nn.Sine(wrong),
    ):
        with pytest.raises(TypeError, match="expected a number"):
            make()


def test_layers_bad_arguments():
    with pytest.raises(ValueError, match=r"swish.*silu"):
        nn.LinearActivation(5, 3, "swish")
    with pytest.raises(TypeError, match="alpha"):
        nn.LinearActivation(5, 3, "relu", alpha=1.0)
    with pytest.raises(TypeError, match="alfa"):
        nn.LinearActivation(5, 3, "elu", alfa=1.0)
    with pytest.raises((ValueError, RuntimeError)):
        nn.LinearActivation(-1, 3)
    with pytest.raises((ValueError, RuntimeError)):
        nn.LinearActivation(3, -1)
    with pytest.raises(TypeError):
        nn.LinearActivation("5", 3)
    with pytest.raises(RuntimeError):
        nn.LinearActivation(5, 3)(torch.zeros(2, 4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_maxout_shapes_initialisation_and_value(pieces, bias):
    torch.manual_seed(2)
    layer = nn.Maxout(16, 300, pieces=pieces, bias=bias)
    assert layer.weight.shape == (pieces, 300, 16)
    bound = 16**-0.5  # each piece is an nn.Linear of its own
    for parameter in layer.parameters():
        for piece in parameter:
            assert piece.abs().max() <= bound
            assert piece.abs().max() > 0.97 * bound
            assert piece.mean().abs() < 0.1 * bound
    if bias:
        assert layer.bias.shape == (pieces, 300)
    else:
        assert layer.bias is None
    x = torch.randn(3, 16)
    nets = [
        torch.nn.functional.linear(x, layer.weight[k], layer.bias[k] if bias else None) for k in range(pieces)
    ]
    assert_close(layer(x), torch.stack(nets).amax(0))


def test_maxout_repr_and_signature():
    for word in ("Maxout", "in_features=4", "out_features=3", "pieces=5", "bias=False"):
        assert word in repr(nn.Maxout(4, 3, pieces=5, bias=False))
    names = list(inspect.signature(nn.Maxout.__init__).parameters)
    assert names == ["self", "in_features", "out_features", "pieces", "bias", "device", "dtype"]
    assert nn.Maxout(4, 3).pieces == 2


@pytest.mark.parametrize("arguments", [(4, 3, 0), (4, 3, -1), (-4, 3), (4, -3)])
def test_maxouts_bad_arguments(arguments):
    with pytest.raises((ValueError, RuntimeError)):
        nn.Maxout(*arguments)


@pytest.mark.parametrize("pieces", [2.5, "2", None])
def test_maxouts_pieces_must_be_whole(pieces):
    with pytest.raises(TypeError):
        nn.Maxout(4, 3, pieces)


def test_mlp_is_a_sequential_of_layers():
    model = nn.MLP([64, 32, 16, 10], "tanh")
    assert isinstance(model, torch.nn.Sequential)
    expected = ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert [n for n, _ in model.named_parameters()] == expected
    assert [layer.activation for layer in model] == ["tanh", "tanh", "identity"]
    assert all(isinstance(layer, nn.LinearActivation) for layer in model)


def test_mlp_has_the_weights_of_its_layers_in_a_row():
    torch.manual_seed(9)
    model = nn.MLP([6, 5, 4], "elu", alpha=0.3)
    torch.manual_seed(9)
    theirs = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ELU(0.3), torch.nn.Linear(5, 4))
    x = torch.randn(3, 6)
    assert_close(model(x), theirs(x))


def test_mlp_options():
    model = nn.MLP([4, 5, 6, 3], ["relu", "sigmoid"], output_activation="tanh", bias=False)
    assert [layer.activation for layer in model] == ["relu", "sigmoid", "tanh"]
    assert all(layer.bias is None for layer in model)
    model = nn.MLP([4, 5, 6, 3], "leaky_relu", negative_slope=0.1)
    assert "negative_slope=0.1" in repr(model[0]) and "negative_slope" not in repr(model[2])
    model = nn.MLP([64, 32, 10], "maxout", pieces=3)
    assert isinstance(model[0], nn.Maxout) and model[0].pieces == 3 and model[1].activation == "identity"
    assert nn.MLP([4, 5, 3], ("maxout",))[0].pieces == 2
    assert nn.MLP([4, 3])(torch.zeros(2, 4)).shape == (2, 3)
    assert nn.MLP([4, 5, 3], dtype=torch.float64)[0].weight.dtype == torch.float64


@pytest.mark.parametrize(
    "sizes, options, exception",
    [
        ([], {}, ValueError),
        ([4], {}, ValueError),
        ([4, -1, 3], {}, (ValueError, RuntimeError)),
        ([4, 5, 3], {"activation": "swish"}, ValueError),
        ([4, 3], {"activation": "swish"}, ValueError),
        ([4, 5, 3], {"activation": ["relu", "relu"]}, ValueError),
        ([4, 5, 3], {"activation": []}, ValueError),
        ([4, 5, 3], {"output_activation": "swish"}, ValueError),
        ([4, 5, 3], {"activation": abs}, TypeError),
        ([4, 5, 3], {"activation": "relu", "alpha": 1.0}, TypeError),
        ([4, 5, 3], {"activation": "relu", "pieces": 3}, TypeError),
        ("453", {}, TypeError),
        (4, {}, TypeError),
        ([4, 5.5, 3], {}, TypeError),
    ],
    ids=str,
)
def test_mlps_bad_arguments(sizes, options, exception):
    with pytest.raises(exception):
        nn.MLP(sizes, **options)


LAYERS = {
    "layer": lambda **k: nn.LinearActivation(4, 3, "elu", **k),
    "maxout": lambda **k: nn.Maxout(4, 3, 2, **k),
    "mlp": lambda **k: nn.MLP([4, 5, 3], "gelu", **k),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@every_layer
def test_meta_device_and_to_empty(make):
    with torch.device("meta"):
        under = make()
    for model in (make(device="meta"), under):
        assert all(p.is_meta for p in model.parameters())
        assert model(torch.zeros(2, 4, device="meta")).is_meta
        real = model.to_empty(device="cpu")
        for m in real.modules():
            if hasattr(m, "reset_parameters"):
                m.reset_parameters()
        assert real(torch.randn(2, 4)).isfinite().all()


def test_skip_init():
    assert torch.nn.utils.skip_init(nn.LinearActivation, 4, 3).weight.shape == (3, 4)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(make, dtype):
    for model in (make(dtype=dtype), make().to(dtype)):
        assert all(p.dtype == dtype for p in model.parameters())
        assert model(torch.randn(2, 4).to(dtype)).dtype == dtype
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 4))


@every_layer
def test_data_parallel_wrappers_see_gradients(make):
    """Hooks on modules and parameters fire as they do for torch's own."""
    model, seen = make(), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    model.register_forward_hook(lambda m, i, o: seen.append("forward"))
    model.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert sorted(seen) == sorted(["forward", "backward", *(n for n, _ in model.named_parameters())])


@pytest.mark.parametrize("make", [LAYERS["layer"], LAYERS["maxout"]], ids=["layer", "maxout"])
def test_replaced_weights(make):
    """Pruning, parametrization and weight normalisation replace `weight` by something computed."""
    x = torch.randn(2, 4)

    class Doubled(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    model = make()
    reference = copy.deepcopy(model)
    parametrize.register_parametrization(model, "weight", Doubled())
    with torch.no_grad():
        reference.weight.mul_(2)
    assert_close(model(x), reference(x))
    model(x).sum().backward()
    assert model.parametrizations.weight.original.grad is not None
    model = make()
    prune.random_unstructured(model, "weight", amount=0.5)
    pruned = copy.deepcopy(reference)
    pruned.load_state_dict({"weight": model.weight_orig * model.weight_mask, "bias": model.bias})
    assert_close(model(x), pruned(x))
    model = make()
    torch.nn.utils.parametrizations.weight_norm(model)
    length, direction = model.parametrizations.weight.original0, model.parametrizations.weight.original1
    with torch.no_grad():
        length.mul_(3)
    normed = copy.deepcopy(reference)
    dims = tuple(range(1, direction.dim()))
    weight = (3 * direction).detach().requires_grad_()  # 3 ||v|| v / ||v||
    y = torch.func.functional_call(normed, {"weight": weight, "bias": model.bias}, x)
    assert_close(model(x), y)
    # Of the length, the gradient along the direction; of the direction, what is across it, times 3.
    (grad_weight,) = torch.autograd.grad(y.square().sum(), weight)
    unit = direction.detach() / direction.detach().norm(dim=dims, keepdim=True)
    along = (grad_weight * unit).sum(dims, keepdim=True)
    actual = torch.autograd.grad(model(x).square().sum(), [length, direction])
    assert_close(actual, (along, 3 * (grad_weight - along * unit)))


@every_layer
def test_shared_and_deleted_parameters(make):
    model = make()
    first = model if hasattr(model, "weight") else model[0]
    other = copy.deepcopy(first)
    other.weight = first.weight
    x = torch.randn(2, 4)
    (first(x).sum() + other(x).sum()).backward()
    grad = first.weight.grad.clone()
    first.weight.grad = None
    first(x).sum().backward()
    assert_close(grad, 2 * first.weight.grad)


def test_class_names_and_inheritance():
    layers = ("LinearActivation", "Maxout", "GatedLinear", "MLP", "GatedMLP")
    for name in itertools.chain(CLASSES, layers):
        cls = getattr(mlpext.nn, name)
        assert cls.__module__.startswith("mlpext.nn.") and cls.__qualname__ == name
        assert cls.__doc__, name
    assert issubclass(nn.LinearActivation, torch.nn.Module)
