"""The fused layer f(W x + b): its numbers, which gradients it computes, layouts, types, and errors."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import mlpext.functional as F
import reference
from activation_inputs import forward
from common import (
    FLOATS,
    NAMES,
    assert_close,
    assert_same_bits,
    assert_same_outcome,
    differentiable,
    eager,
    every_case,
    every_float,
    linear_op,
    outcome,
)

pytestmark = pytest.mark.filterwarnings("error")
KEEP_Y = [
    *(("relu", {}), ("leaky_relu", {}), ("elu", {}), ("elu", {"alpha": 0.3})),
    *(("sigmoid", {}), ("tanh", {}), ("selu", {}), ("celu", {"alpha": 2.0})),
]


def inputs(dtype=torch.float64, batch=(7,), n_in=13, n_out=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, n_in), (n_out, n_in), (n_out,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def run(f, tensors, g=None):
    """Output and all gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves)
    g = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) if g is None else g
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def layer(name, parameters):
    return lambda x, w, b=None: F.linear_activation(x, w, b, activation=name, **parameters)


def eager_layer(name, parameters):
    return lambda x, w, b=None: eager(name, parameters)(TF.linear(x, w, b))


# Of sums of 13 products: rounding of the sum, of the activation and, for 16 bits, of the saved output.
TOLERANCE = {torch.float64: 2e-14, torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.008}


@pytest.mark.isa
@every_float
@every_case
def test_against_the_reference(name, parameters, dtype):
    op = linear_op(name, parameters)
    op = op.__class__(**{**op.__dict__, "shapes": ((7, 13), (9, 13), (9,))})
    tensors = op.inputs(dtype, requires_grad=False)
    net = TF.linear(*(t.double() for t in tensors))
    assert all(((net - k).abs() > 1e-3).all() for k in op.kinks), (
        "rounding to 16 bits moved an input over a kink"
    )
    actual = run(layer(name, parameters), tensors)
    arrays = [t.double().numpy() for t in tensors]
    g = torch.linspace(-1, 2, 63, dtype=torch.float64).view(7, 9).to(dtype).double().numpy()
    expected = (
        reference.linear_activation(*arrays, name, parameters),
        *reference.linear_activation_gradient(g, *arrays, name, parameters),
    )
    scale = max(1.0, abs(parameters.get("omega", 1.0)) ** 2)  # a fast sine amplifies every rounding
    for what, a, e in zip(("y", "dx", "dW", "db"), actual, expected, strict=True):
        error = np.abs(a.double().numpy() - e).max() / max(1.0, np.abs(e).max())
        assert a.dtype == dtype
        assert error <= scale * TOLERANCE[dtype], f"{what}: {error}"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@every_case
def test_no_worse_than_eager(name, parameters, dtype):
    """The error against float64 is at most twice eager's, and a little."""
    tensors = inputs(dtype, batch=(16,), n_in=32, n_out=24, seed=3)
    exact = run(
        eager_layer(name, parameters),
        [t.double() for t in tensors],
        torch.linspace(-1, 2, 384, dtype=torch.float64).view(16, 24),
    )
    ours, eagers = run(layer(name, parameters), tensors), run(eager_layer(name, parameters), tensors)
    for what, a, n, e in zip(("y", "dx", "dW", "db"), ours, eagers, exact, strict=True):
        error, theirs = (a - e).abs().max().item(), (n - e).abs().max().item()
        unit = torch.finfo(dtype).eps * max(1.0, e.abs().max().item())
        assert error <= 2 * theirs + 2 * unit, f"{what}: {error / unit:.2f} eps, eager {theirs / unit:.2f}"


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["elu", "gelu", "identity"])
def test_sizes(name, dtype):
    """Every small size, and some around the tiles of a blocked product, against eager."""
    sizes = [
        *itertools.product((1, 2, 3, 5), repeat=3),
        (1, 64, 64),
        (32, 64, 64),
        (33, 65, 31),
        (16, 17, 129),
    ]
    sizes += [(67, 1, 1), (1, 67, 1), (1, 1, 67), (31, 256, 10), (257, 3, 3)]
    for batch, n_in, n_out in sizes:
        tensors = inputs(dtype, (batch,), n_in, n_out)
        actual, expected = run(layer(name, {}), tensors), run(eager_layer(name, {}), tensors)
        for what, a, e in zip(("y", "dx", "dW", "db"), actual, expected, strict=True):
            where = f"{what} at {batch} x {n_in} -> {n_out}"
            tolerance = (0.03 if dtype == torch.bfloat16 else 1e-5) * max(1.0, e.abs().max().item())
            assert_close(a, e, f"{where}", rtol=tolerance, atol=tolerance)


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf], ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_specials_reach_their_outputs_and_no_others(name, special, dtype):
    """Weight 1: the layer is the activation itself, and the other rows do not feel a NaN."""
    for rows in (1, 5, 16, 37):
        x = torch.linspace(-2, 2, rows, dtype=torch.float64).to(dtype)[:, None]
        x[rows // 2] = special
        weight, bias = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
        actual = F.linear_activation(x, weight, bias, name)
        expected = forward(name, {}, x)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        assert actual.isnan().sum() == expected.isnan().sum() <= 1


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "name, parameters", [("elu", {}), ("gelu", {}), ("identity", {}), ("elu", {"alpha": -1.0})]
)
def test_needs_input_grad(name, parameters, bias, needs):
    """All eight combinations: the same gradients as eager, and None where none is asked for."""
    results = []
    for f in (layer(name, parameters), eager_layer(name, parameters)):
        leaves = [t.requires_grad_(n) for t, n in zip(inputs(), needs, strict=True)][: 2 + bias]
        y = f(*leaves)
        assert y.requires_grad == any(t.requires_grad for t in leaves)
        if y.requires_grad:
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape))
        results.append([y.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*results)


def test_frozen_weight_with_a_trainable_bias_sums_over_the_batch():
    x, w, b = inputs()
    b.requires_grad_()
    F.linear_activation(x, w, b, "identity").sum().backward()
    assert torch.equal(b.grad, torch.full((9,), 7.0, dtype=torch.float64))


def test_bias_gradient_in_float64_is_written():
    (_, _, _, actual), (_, _, _, expected) = (
        run(layer("relu", {}), inputs()),
        run(eager_layer("relu", {}), inputs()),
    )
    assert actual.abs().sum() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_bias_is_added_once(name):
    x, w, b = inputs()
    with_bias = F.linear_activation(x, torch.zeros_like(w), b, name)
    expected = eager(name, {})(b.expand(7, 9))
    torch.testing.assert_close(with_bias, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_penalty_trains_as_eager(name):
    """The loss holds a derivative: without a second one the weights' gradient would be silently wrong."""

    def penalised(f):
        x, w, b = (t.requires_grad_() for t in inputs(seed=5))
        (g,) = torch.autograd.grad(f(x, w, b).sum(), x, create_graph=True)
        return torch.autograd.grad(
            (g.square().sum() - 1) ** 2, (x, w, b), allow_unused=True, materialize_grads=True
        )

    f = differentiable(name, {})
    torch.testing.assert_close(penalised(layer(name, {})), penalised(lambda x, w, b: f(TF.linear(x, w, b))))


@pytest.mark.parametrize("name, parameters", KEEP_Y)
def test_y_may_be_changed_in_place_where_native_allows_it(name, parameters):
    """`y = layer(x); y += skip`: the fused layer keeps y, and must compute it again."""

    def block(f):
        x, w, b = (t.requires_grad_() for t in inputs())
        y = f(x, w, b)
        y += 1.0
        y *= 2.0
        return torch.autograd.grad(y.square().sum(), (x, w, b))

    actual, expected = outcome(block, layer(name, parameters)), outcome(block, eager_layer(name, parameters))
    if isinstance(
        expected, type
    ):  # eager keeps y as well (sigmoid, tanh, relu): at least not a wrong gradient
        if isinstance(actual, type):
            assert actual is expected
            return
        expected = block(lambda x, w, b: eager_layer(name, parameters)(x, w, b).clone())
    torch.testing.assert_close(actual, expected)


@pytest.mark.native
@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("name, parameters", KEEP_Y)
def test_changing_the_inputs_as_well_raises_or_is_right(name, parameters, which):
    """With y and what it came from both changed there is nothing to compute from: an error, no number."""
    tensors = [t.requires_grad_() for t in inputs()]
    y = layer(name, parameters)(*tensors)
    y += 1.0
    with torch.no_grad():
        tensors[which].mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_changed_weight_raises_as_eager(name):
    def block(f, which):
        tensors = [t.requires_grad_() for t in inputs()]
        y = f(*tensors)
        with torch.no_grad():
            tensors[which].mul_(3.0)
        return torch.autograd.grad(y.sum(), tensors)

    for which in range(3):
        actual, expected = (
            outcome(block, layer(name, {}), which),
            outcome(block, eager_layer(name, {}), which),
        )
        if isinstance(expected, type):
            assert actual is expected
        else:
            torch.testing.assert_close(actual, expected)


def test_backward_twice_gives_the_same():
    """A backward that works in place in what it saved would not."""
    for name in NAMES:
        tensors = [t.requires_grad_() for t in inputs()]
        y = layer(name, {})(*tensors)
        kept = y.detach().clone()
        first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
        second = torch.autograd.grad(y.sum(), tensors)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b, name)
        assert_same_bits(y.detach(), kept, name)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), tensors)


def test_backward_leaves_grad_output_and_the_neighbours_alone():
    for name in NAMES:
        x, w, b = (t.requires_grad_() for t in inputs())
        first = layer(name, {})(x, w, b)
        second = torch.exp(first)  # keeps its output, reads ours
        g = torch.ones_like(second)
        copies = [t.detach().clone() for t in (first, second, g, x, w, b)]
        torch.autograd.grad(second, (x, w, b), g)
        for t, copy in zip((first, second, g, x, w, b), copies, strict=True):
            assert_same_bits(t.detach(), copy, name)


def test_nothing_is_stale_after_the_weights_change():
    """No packed copy of the weights survives a change by any route."""
    module = __import__("mlpext").nn.LinearActivation(6, 4, "tanh")
    x = torch.randn(3, 6)

    def check(what):
        torch.testing.assert_close(module(x), torch.tanh(TF.linear(x, module.weight, module.bias)), msg=what)

    check("fresh")
    with torch.no_grad():
        module.weight.copy_(torch.randn(4, 6))
        check("copy_")
        module.bias.add_(1)
        check("add_")
    module.weight.data = torch.randn(4, 6)
    check(".data =")
    module.weight.data.mul_(2)
    check(".data.mul_")
    module.load_state_dict({k: torch.randn_like(v) for k, v in module.state_dict().items()})
    check("load_state_dict")
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module(x).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    check("optimizer step")


X_LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat([x, x], -1)[:, : x.shape[-1]],
    "every second column": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded rows": lambda x: x[:1].expand(x.shape),
    "odd offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.isa
@pytest.mark.parametrize("name", ["elu", "gelu", "identity"])
@pytest.mark.parametrize("x_layout", X_LAYOUTS)
def test_layouts(x_layout, name):
    """Nothing is read as if it were dense: inputs, weight, bias, incoming gradient, in every combination."""
    x, w, b = inputs()
    dense = torch.linspace(-1, 2, 63, dtype=torch.float64).view(7, 9)
    g_layouts = {
        "dense": dense,
        "transposed": dense.t().contiguous().t(),
        "one number": torch.tensor(1.5, dtype=torch.float64).expand(7, 9),
        "one row": dense[:1].expand(7, 9),
        "one column": dense[:, :1].expand(7, 9),
        "every second": torch.stack([dense, dense], -1)[..., 1],
    }
    w_layouts = ("contiguous", "transposed", "every second column", "odd offset")
    for w_layout, (g_layout, g) in itertools.product(w_layouts, g_layouts.items()):
        tensors = [X_LAYOUTS[x_layout](x), X_LAYOUTS[w_layout](w), torch.stack([b, b], -1)[:, 0]]
        what = f"weight {w_layout}, gradient {g_layout}"
        actual, expected = run(layer(name, {}), tensors, g), run(eager_layer(name, {}), tensors, g)
        for part, a, e in zip(("y", "dx", "dW", "db"), actual, expected, strict=True):
            assert_close(a, e, f"{part}, {what}")


@every_float
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
def test_leading_dimensions(batch, dtype):
    for sizes in [(5, 4), (1, 1), (0, 4), (5, 0)]:
        tensors = inputs(dtype, batch, *sizes)
        actual, expected = run(layer("elu", {}), tensors), run(eager_layer("elu", {}), tensors)
        for what, a, e in zip(("y", "dx", "dW", "db"), actual, expected, strict=True):
            assert a.shape == e.shape and a.dtype == e.dtype, (what, sizes)
            assert_close(a, e, f"{what} {sizes}", rtol=0.02, atol=0.02)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_leading_dimensions_with_frozen_inputs(needs):
    results = []
    for f in (layer("tanh", {}), eager_layer("tanh", {})):
        leaves = [t.requires_grad_(n) for t, n in zip(inputs(batch=(2, 3)), needs, strict=True)]
        f(*leaves).square().sum().backward()
        results.append([t.grad for t in leaves])
    torch.testing.assert_close(*results)


@hypothesis.given(
    batch=st.lists(st.integers(0, 5), max_size=3),
    n_in=st.integers(0, 20),
    n_out=st.integers(0, 20),
    bias=st.booleans(),
    transpose=st.booleans(),
    name=st.sampled_from(NAMES),
)
def test_any_size(batch, n_in, n_out, bias, transpose, name):
    x, w, b = inputs(torch.float64, tuple(batch), n_in, n_out)
    w = w.t().contiguous().t() if transpose else w
    tensors = [x, w, b][: 2 + bias]
    for a, e in zip(run(layer(name, {}), tensors), run(eager_layer(name, {}), tensors), strict=True):
        torch.testing.assert_close(a, e)


def test_the_same_from_run_to_run_and_with_more_threads_nearly():
    tensors = inputs(torch.float32, (300,), 200, 100)
    once = run(layer("tanh", {}), tensors)
    for a, b in zip(once, run(layer("tanh", {}), tensors), strict=True):
        assert_same_bits(a, b)
    torch.set_num_threads(2)
    for a, b in zip(once, run(layer("tanh", {}), tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.int64, torch.int8, torch.bool], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_other_types_do_as_eager(name, dtype):
    tensors = [(t * 2).to(dtype) for t in inputs()]
    actual = outcome(layer(name, {}), *tensors)
    assert_same_outcome(actual, outcome(eager_layer(name, {}), *tensors))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_mixed_types_are_refused(which, dtype):
    tensors = inputs()
    tensors[which] = tensors[which].to(dtype)
    for needs in (False, True):
        with pytest.raises(RuntimeError, match="dtype|type"):
            F.linear_activation(*[t.requires_grad_(needs) for t in tensors], "elu")


def test_meta_and_mixed_devices():
    x, w, b = (t.to("meta") for t in inputs(batch=(2, 3)))
    y = F.linear_activation(x, w, b, "gelu")
    assert y.is_meta and y.shape == (2, 3, 9)
    with pytest.raises((RuntimeError, NotImplementedError)):
        F.linear_activation(torch.zeros(3, 13, dtype=torch.float64), w, b, "gelu")


@pytest.mark.parametrize(
    "x, w, b",
    [
        ((3, 4), (5, 3), (5,)),
        ((3, 4), (5, 4), (4,)),
        ((3, 4), (5, 4), (3, 5)),
        ((3, 4), (2, 5, 4), (5,)),
        ((), (5, 4), (5,)),
        ((4, 3), (5, 4), None),
    ],
    ids=str,
)
def test_wrong_shapes(x, w, b):
    """A clear error and never a read beyond the end; where eager broadcasts, so do we."""
    tensors = [torch.zeros(s) for s in (x, w, b) if s is not None]
    expected = outcome(TF.linear, *tensors)
    for needs in (False, True):
        actual = outcome(F.linear_activation, *[t.requires_grad_(needs) for t in tensors], activation="relu")
        if isinstance(expected, type):
            assert isinstance(actual, type) and issubclass(actual, (RuntimeError, ValueError))
        else:
            assert actual.shape == expected.shape


@pytest.mark.parametrize(
    "wrong", [torch.relu, torch.nn.ReLU(), 3, b"relu"], ids=["function", "module", "int", "bytes"]
)
def test_activation_must_be_a_name(wrong):
    """A function in its place must not be taken for another activation."""
    with pytest.raises(TypeError, match="activation|str"):
        F.linear_activation(*inputs(), activation=wrong)


def test_unknown_activation_lists_the_known_ones():
    with pytest.raises((ValueError, RuntimeError), match=r"Relu.*leaky_relu"):
        F.linear_activation(*inputs(), activation="Relu")


@pytest.mark.parametrize(
    "name, parameters", [("relu", {"alpha": 1.0}), ("elu", {"negative_slope": 0.1}), ("elu", {"alfa": 1.0})]
)
def test_unknown_parameter_is_named(name, parameters):
    with pytest.raises(TypeError, match=next(iter(parameters))):
        F.linear_activation(*inputs(), activation=name, **parameters)


@pytest.mark.parametrize("value", ["1", None, [1.0], 1j], ids=repr)
def test_wrong_parameter(value):
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        F.linear_activation(*inputs(), activation="elu", alpha=value)


@pytest.mark.parametrize("position", [0, 1], ids=["input", "weight"])
@pytest.mark.parametrize("wrong", [None, 1.0, np.zeros((9, 13))], ids=["none", "number", "array"])
def test_no_tensor(position, wrong):
    arguments = inputs()
    arguments[position] = wrong
    with pytest.raises(TypeError):
        F.linear_activation(*arguments)


def test_relu_is_the_default_and_parameters_are_used():
    x, w, b = inputs()
    assert_same_bits(F.linear_activation(x, w, b), F.linear_activation(x, w, b, "relu"))
    assert_same_bits(F.linear_activation(x, w), F.linear_activation(x, w, None, activation="relu"))
    steep = F.linear_activation(x, w, b, "leaky_relu", negative_slope=0.5)
    torch.testing.assert_close(steep, TF.leaky_relu(TF.linear(x, w, b), 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_bias_of_ones_from_broadcast_shapes_as_linear(name):
    """torch's linear also takes a 0-d or (1,) bias."""
    x, w, _ = inputs()
    for b in (torch.tensor(0.5, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)):
        results = [outcome(f, x, w, b) for f in (layer(name, {}), eager_layer(name, {}))]
        assert_same_outcome(*results, tuple(b.shape))
