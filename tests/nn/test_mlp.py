"""nn.MLP as one operator: when it is, what it keeps, and that it equals its layers called one by one."""

import copy
import itertools

import pytest
import torch

import mlpext
from common import NAMES, Kept, assert_close, every_float, indices
from mlpext import nn

pytestmark = [pytest.mark.native, pytest.mark.filterwarnings("error")]
SUFFICES = {"relu", "leaky_relu", "elu", "sigmoid", "tanh", "selu", "celu", "threshold"}


def network(activation="tanh", output="identity", dtype=torch.float64, sizes=(5, 7, 6, 3), **options):
    torch.manual_seed(0)
    return nn.MLP(sizes, activation, output, dtype=dtype, **options)


def with_gates(model, *places):
    """The network with gated layers at these places, of the activations that are there."""
    for place in places:
        old = model[place]
        sizes = (old.in_features, old.out_features, old.activation, old.bias is not None)
        model[place] = nn.GatedLinear(*sizes, dtype=old.weight.dtype, **old.params)
    return model


def by_layers(model, x):
    return torch.nn.Sequential.forward(model, x)


def results(call, model, x):
    """y and the gradients of all that requires one."""
    y = call(model, x)
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    cotangent = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, wanted, cotangent)


def whole(model, x):
    y = model(x)
    assert y.grad_fn.name() == "MlpBackward0"
    return y


def assert_whole_equals_layers(model, x):
    assert_close(results(whole, model, x), results(by_layers, model, x))


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("name", [*NAMES, "maxout"])
def test_every_activation(name, dtype):
    """Behind a layer and before one, and last."""
    x = torch.randn(4, 5).to(dtype).requires_grad_()
    assert_whole_equals_layers(network(name, name, dtype), x)
    assert_whole_equals_layers(network([name, "tanh"], dtype=dtype, bias=False), x)
    if name != "maxout":
        assert_whole_equals_layers(with_gates(network(name, name, dtype), 0, 1, 2), x)
        assert_whole_equals_layers(with_gates(network([name, "tanh"], dtype=dtype, bias=False), 0), x)


@pytest.mark.isa
@pytest.mark.parametrize("width", [15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("rows", [1, 6, 60, 61])
def test_gated_layers_around_the_sizes_of_tiles(rows, width):
    x = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    assert_whole_equals_layers(with_gates(network("silu", sizes=(width, width + 1, width, 3)), 0, 1), x)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5), (0, 5), (300, 5)], ids=str)
def test_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match="zero-element"):
        empty = network(sizes=(5, 0, 3))
    gated = with_gates(network(["gelu", "silu"], "elu"), 1, 2)
    for model in (network(["gelu", "maxout"], "elu"), gated, network(sizes=(5, 3)), empty):
        assert_whole_equals_layers(model, x)
        with torch.no_grad():
            assert_close(model(x), by_layers(model, x))


def test_strided_input_and_gradients():
    model, x = network(), torch.randn(5, 8, dtype=torch.float64).t()[::2].requires_grad_()
    assert_whole_equals_layers(model, x)
    (dx,) = torch.autograd.grad(model(x).sum(), x)  # an expanded gradient
    assert_close(dx, torch.autograd.grad(by_layers(model, x).sum(), x)[0])


@pytest.mark.parametrize("gates", [(), (0,), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "gelu", "maxout"])
def test_whatever_is_frozen(activation, gates):
    for free in itertools.product([False, True], repeat=4):
        model = network("silu" if gates and activation == "maxout" else activation, "sigmoid")
        with_gates(model, *gates)
        for layer, wanted in zip(model, free, strict=False):
            layer.weight.requires_grad_(wanted)
            layer.bias.requires_grad_(wanted != free[3])
        for needs_dx in (False, True):
            x = torch.randn(4, 5, dtype=torch.float64, requires_grad=needs_dx)
            if needs_dx or any(p.requires_grad for p in model.parameters()):
                assert_whole_equals_layers(model, x)
            else:
                assert not model(x).requires_grad


def test_layers_before_the_first_that_learns_keep_nothing():
    model, x = network(dtype=torch.float32, sizes=(16, 64, 32, 8)), torch.randn(10, 16)
    for layer in model[:2]:
        layer.requires_grad_(False)
    with Kept(x, *model.parameters()) as kept:
        y = model(x)
    assert kept.bytes == 4 * 10 * 32  # the last layer's input
    del y


@pytest.mark.parametrize("activation", [*NAMES, "maxout"])
def test_bytes_kept(activation):
    """The outputs of all layers but the last; z beside them where f' does not follow; a byte for a winner."""
    model, x = network(activation, dtype=torch.float32, sizes=(16, 64, 32, 8)), torch.randn(10, 16)
    with Kept(x, *model.parameters()) as kept:
        y = model(x)
    outputs = 10 * (64 + 32)
    more = {"identity": 0, "maxout": outputs}.get(activation, 0 if activation in SUFFICES else 4 * outputs)
    assert kept.bytes == 4 * outputs + more
    del y


def test_bytes_kept_of_gated_layers():
    """Both halves of z in the place of the output."""
    model, x = network("tanh", dtype=torch.float32, sizes=(16, 64, 32, 8)), torch.randn(10, 16)
    for gate, count in ((0, 2 * 64 + 32), (2, 2 * 64 + 32 + 2 * 8)):
        with_gates(model, gate)
        with Kept(x, *model.parameters()) as kept:
            y = model(x)
        assert kept.bytes == 4 * 10 * count
        del y


def test_a_weight_of_another_dimension_is_refused_by_its_layer():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    model[1].weight = torch.nn.Parameter(torch.randn(2, 6, 7, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"weight: shape \[2, 6, 7\], expected \(out_features"):
        model(x)


@pytest.mark.parametrize("gates", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_output_may_be_changed_in_place(name, gates):
    """Where eager's activation allows that."""
    model, x = with_gates(network("tanh", name), *gates), torch.randn(4, 5, dtype=torch.float64)
    outcomes = []
    for call in (whole, by_layers):
        y = call(model, x)
        y += 1
        try:
            outcomes.append(torch.autograd.grad(y.square().sum(), list(model.parameters())))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            outcomes.append(None)
    if outcomes[1] is not None:  # ours may allow more: it can go forward again from what it keeps
        assert_close(*outcomes)


def changed(model, x, name, wanted, **options):
    """The gradients after a change of a parameter, or None where autograd refuses them."""
    calls = {"whole": whole, "eager": lambda model, x: eagers(model)(x)}
    for call in calls.values():
        y = call(model, x)
        with torch.no_grad():
            model.get_parameter(name).add_(1)
        try:
            yield torch.autograd.grad(y.sum(), [model.get_parameter(w) for w in wanted], **options)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            yield None
        with torch.no_grad():
            model.get_parameter(name).sub_(1)


def eagers(model):
    """torch's layers with the same parameters."""
    layers = []
    for layer in model:
        linear = torch.nn.Linear(layer.in_features, layer.out_features)
        linear.weight, linear.bias = layer.weight, layer.bias
        layers += [linear, torch.nn.Identity() if layer.activation == "identity" else torch.nn.Tanh()]
    return torch.nn.Sequential(*layers)


PARAMETERS = [f"{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]


@pytest.mark.parametrize("wanted", [PARAMETERS, ["2.weight"], ["1.bias"]], ids=["all", "last", "middle"])
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("output", ["identity", "tanh"])
def test_a_parameter_changed_in_place_is_an_error_only_where_backward_reads_it(output, name, wanted):
    """Biases, the first weight where x needs no gradient, all below the gradients asked for: as eager."""
    model, x = network(output=output), torch.randn(4, 5, dtype=torch.float64)
    actual, expected = changed(model, x, name, wanted)
    if expected is None:  # eager also looks at a weight that these gradients do not need
        assert actual is None or (name[0] == wanted[0][0] and wanted != PARAMETERS)
    else:
        assert_close(actual, expected)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_graph_of_the_backward_reads_every_parameter(name):
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    actual, expected = changed(model, x, name, PARAMETERS, create_graph=True)
    assert actual is None  # never from other numbers; eager keeps each layer's output, and goes on
    assert (expected is None) == (name in ("1.weight", "2.weight"))


def test_input_changed_in_place_under_a_frozen_first_weight():
    model, x = network(), torch.randn(4, 5, dtype=torch.float64)
    model[0].weight.requires_grad_(False)
    expected = torch.autograd.grad(whole(model, x).sum(), model[0].bias)
    y = whole(model, x)
    x.add_(1)
    assert_close(torch.autograd.grad(y.sum(), model[0].bias), expected)


def test_backward_twice():
    model, x = network("gelu", "elu"), torch.randn(4, 5, dtype=torch.float64)
    y = model(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def hooked(model, seen):
    model[1].register_forward_hook(lambda *_: seen.append("hook"))


def pre_hooked(model, seen):
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre-hook"))


def backward_hooked(model, seen):
    model[1].register_full_backward_hook(lambda *_: seen.append("backward hook"))


def with_a_forward_of_its_own(model, seen):
    forward = model[1].forward
    model[1].forward = lambda x: (seen.append("forward"), forward(x))[1]


def with_a_subclass(model, seen):
    class Own(nn.LinearActivation):
        def forward(self, input):
            seen.append("subclass")
            return super().forward(input)

    model[1].__class__ = Own


def parametrized(model, seen):
    class Seen(torch.nn.Module):
        def forward(self, weight):
            seen.append("parametrization")
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", Seen())


def with_another_layer(model, seen):
    class Noted(torch.nn.Module):
        def forward(self, x):
            seen.append("another layer")
            return x

    model.append(Noted())


OBSTACLES = [
    hooked,
    pre_hooked,
    backward_hooked,
    with_a_forward_of_its_own,
    with_a_subclass,
    parametrized,
    with_another_layer,
]


@pytest.mark.parametrize("obstruct", OBSTACLES, ids=lambda f: f.__name__)
def test_what_stands_between_a_layer_and_its_forward_is_called(obstruct):
    model, seen = network(), []
    obstruct(model, seen)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = model(x)
    y.sum().backward()
    assert seen
    assert_close(y, by_layers(model, x))


def test_a_global_hook_is_called():
    model, seen = network(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(torch.randn(4, 5, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen == [*model, model]


def test_a_layer_without_bias_among_others():
    model = network()
    model[1] = nn.LinearActivation(7, 6, "tanh", bias=False, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_close(model(x), by_layers(model, x))


def test_what_does_not_fit_is_refused_as_by_the_layers():
    model = network()
    for x in (torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 5), "text"):
        errors = []
        for call in (lambda m, x: m(x), by_layers):
            with pytest.raises((RuntimeError, TypeError)) as raised:
                call(model, x)
            errors.append(raised.type)
        assert errors[0] is errors[1]
    model[1].activation = "rule"
    with pytest.raises(ValueError, match="unknown name 'rule'"):
        model(torch.randn(4, 5, dtype=torch.float64))


def test_parameters_are_read_at_each_call():
    model, x = network("elu"), torch.randn(4, 5, dtype=torch.float64)
    before = model(x)
    model[0].params["alpha"] = 0.25
    assert not torch.equal(model(x), before)
    assert_close(model(x), by_layers(model, x))
    model[0].params["alpha"] = -0.5  # torch's own operators
    assert_close(model(x), by_layers(model, x))


def test_copies_train_alone():
    model = network()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 5, dtype=torch.float64)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert_close(results(whole, twin, x), results(by_layers, model, x))


@pytest.mark.parametrize("gates", [(), (0, 2)], ids=str)
def test_gradient_penalty(gates):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    model = with_gates(network(["tanh", "maxout"], "softplus"), *gates)

    def penalty(call):
        (dx,) = torch.autograd.grad(call(model, x).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), list(model.parameters()), allow_unused=True)

    assert_close(penalty(whole), penalty(by_layers))


@pytest.mark.parametrize("gates", [(), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, gates):
    model, x = with_gates(network(dtype=torch.float32), *gates), torch.randn(4, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        assert y.dtype == dtype
        assert_close(y, by_layers(model, x))
    grads = torch.autograd.grad(y.float().sum(), list(model.parameters()))
    assert all(g.dtype == torch.float32 for g in grads)


def test_the_operator_is_what_the_module_calls():
    model, x = network("elu", "tanh"), torch.randn(4, 5, dtype=torch.float64)
    weights, biases = [layer.weight for layer in model], [layer.bias for layer in model]
    y = torch.ops.mlpext.mlp(x, weights, biases, indices(["elu", "elu", "tanh"]), [1.0, 1.0])
    assert torch.equal(y, model(x)) and mlpext._C.mlp(model, x).grad_fn.name() == "MlpBackward0"
