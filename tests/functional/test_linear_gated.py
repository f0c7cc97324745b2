"""The gated layer f(x W1' + b1) (x W2' + b2)."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import mlpext
import mlpext.functional as F
import reference
from common import CASES, assert_close, differentiable, every_float, outcome, usual

pytestmark = pytest.mark.filterwarnings("error")
# Of the largest number of a result: products of a few terms, in 16 bits two roundings of each half.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
PARTS = ("y", "dx", "dW", "db")


def inputs(dtype=torch.float64, batch=(7,), n_in=5, n_out=9, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*batch, n_in), (2, n_out, n_in), (2, n_out)][: 2 + bias]
    scales = (1, 1 / math.sqrt(max(1, n_in)), 0.5)
    return [
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape, scale in zip(shapes, scales, strict=False)
    ]


def gradient_of(y):
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)


def run(tensors, g=None, name="silu", parameters=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = F.linear_gated(*leaves, activation=name, **(parameters or {}))
    return y.detach(), *torch.autograd.grad(y, leaves, gradient_of(y) if g is None else g)


def expected_of(tensors, g, name="silu", parameters=None):
    """By reference.py, in float64."""
    x, weight, *bias = (t.double().contiguous().numpy() for t in tensors)
    rest = (weight, bias[0] if bias else None, name, parameters or {})
    d_x, d_w, d_b = reference.linear_gated_gradient(g.double().numpy(), x, *rest)
    return reference.linear_gated(x, *rest), d_x, d_w, *([d_b] if bias else [])


def check(tensors, g=None, name="silu", parameters=None, about=""):
    actual = run(tensors, g, name, parameters)
    g = gradient_of(actual[0]) if g is None else g
    steep = max(1, (parameters or {}).get("omega", 1))  # the rounding of z counts so many times
    for what, a, e in zip(PARTS, actual, expected_of(tensors, g, name, parameters), strict=False):
        largest = max(1.0, np.abs(e).max(initial=0))
        error = np.abs(a.double().numpy() - e).max(initial=0) / largest
        assert a.dtype == tensors[0].dtype and error <= steep * TOLERANCE[a.dtype], f"{what} {about}: {error}"


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("name, parameters", CASES)
def test_against_the_reference(name, parameters, dtype):
    if not usual(name, parameters):
        dtype = torch.float64  # torch's operators, whose roundings in 16 bits are their own
    for bias in (True, False):
        check(inputs(dtype, bias=bias), None, name, parameters)


# One below, at and above: a register (8, 16 lanes), the half of a panel (32 columns), the rows of a strip
# (6), those that are dot products (12, 48), a block of rows (60) and of terms (512).
ROWS = (1, 5, 6, 7, 12, 13, 47, 48, 49, 61)
COLUMNS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65)
TERMS = (1, 16, 513)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sizes(dtype):
    sizes = [(rows, n_in, 33) for rows in ROWS for n_in in TERMS] + [(13, 31, n) for n in COLUMNS]
    sizes += [(1, 1024, n) for n in COLUMNS] + [(1100, 3, 2), (70, 520, 70)]
    for rows, n_in, n_out in sizes:
        check(inputs(dtype, (rows,), n_in, n_out), about=f"at {rows}x{n_in}->{n_out}")


@hypothesis.given(
    *(st.integers(1, most) for most in (70, 40, 70)),
    st.sampled_from(["silu", "gelu", "relu", "sigmoid", "identity"]),
    st.booleans(),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_size(rows, n_in, n_out, name, bias):
    check(inputs(torch.float32, (rows,), n_in, n_out, bias, seed=rows), None, name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("batch", [(7,), (2, 3), ()], ids=str)
def test_needs_input_grad(batch, needs):
    results = []
    for f in (F.linear_gated, by_torch):
        leaves = [t.requires_grad_(n) for t, n in zip(inputs(batch=batch), needs, strict=True)]
        y = f(*leaves)
        assert y.requires_grad == any(needs)
        if y.requires_grad:
            y.backward(gradient_of(y))
        results.append([y.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*results)


def by_torch(x, weight, bias=None, activation="silu"):
    b1, b2 = (None, None) if bias is None else bias
    return differentiable(activation, {})(TF.linear(x, weight[0], b1)) * TF.linear(x, weight[1], b2)


@every_float
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions_and_empty_sizes(batch, dtype):
    for sizes in [(5, 4), (1, 1), (0, 4), (5, 0)]:
        tensors = inputs(dtype, batch, *sizes)
        actual = run(tensors)
        assert actual[0].shape == (*batch, sizes[1])
        for a, t in zip(actual[1:], tensors, strict=True):
            assert a.shape == t.shape and a.dtype == dtype, sizes


@pytest.mark.isa
@every_float
def test_layouts(dtype):
    x, w, b = inputs(dtype, batch=(6,))
    dense = torch.linspace(-1, 2, 54, dtype=torch.float64).view(6, 9).to(dtype)
    xs = {
        "t": x.t().contiguous().t(),
        "step": x.repeat_interleave(2, -1)[:, ::2],
        "expanded": x[:1].expand(6, 5),
    }
    ws = {
        "permuted": w.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "step": w.repeat_interleave(2, -1)[..., ::2],
        "one half expanded": w[:1].expand(2, 9, 5),
    }
    gs = {
        "one number": torch.tensor(1.5, dtype=dtype).expand(6, 9),
        "t": dense.t().contiguous().t(),
        "row": dense[:1].expand(6, 9),
        "rows apart": dense.repeat_interleave(2, 0)[::2],
    }
    bs = {"t": b.t().contiguous().t(), "expanded": b[:, :1].expand(2, 9)}
    for keys in itertools.product(xs, ws, bs, gs):
        check([xs[keys[0]], ws[keys[1]], bs[keys[2]]], gs[keys[3]], about=str(keys))


@pytest.mark.native
@pytest.mark.isa
@pytest.mark.usefixtures("own_loops")
@every_float
def test_a_row_has_the_same_bits_alone(dtype):
    """Whatever block of rows and columns it is in, as long as the same loop serves it."""
    if mlpext._C.cpu_isa() == "baseline":
        pytest.skip("torch's product, which promises no such thing, serves there")
    x, w, b = inputs(dtype, (200,), 64, 70)
    whole = F.linear_gated(x, w, b)
    assert torch.equal(whole[100:], F.linear_gated(x[100:], w, b))
    x, w, b = inputs(dtype, (6,), 640, 70)
    assert torch.equal(F.linear_gated(x, w, b)[2:5], F.linear_gated(x[2:5], w, b))


def test_a_gate_of_zeros_has_a_gradient():
    """f(0) = 0 hides the value, and f'(0) does not."""
    x, w, b = inputs()
    w[0], b[0] = 0, 0
    assert run([x, w, b])[2][0].abs().max() > 0.1
    check([x, w, b])


@pytest.mark.parametrize("name", ["silu", "relu"])
def test_nan_and_inf_are_torchs(name):
    for value in (math.nan, math.inf, -math.inf):
        x, w, b = inputs()
        x[3, 2] = value
        torch.testing.assert_close(
            F.linear_gated(x, w, b, name), by_torch(x, w, b, name), equal_nan=True, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((3, 4), (3, 5, 4), (3, 5)), r"weight: shape .3, 5, 4., expected \(2, out_features, in_features\)"),
        (((3, 4), (5, 4), (5,)), r"weight: shape .5, 4., expected \(2, out_features"),
        (((3, 4), (2, 5, 3), (2, 5)), r"input: shape .3, 4."),
        (((3, 4), (2, 5, 4), (5,)), r"bias: shape .5,?., expected .2, 5."),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(RuntimeError, match=message):
        F.linear_gated(*(torch.randn(shape) for shape in shapes))


@pytest.mark.native
def test_dtypes_that_do_not_match():
    x, w, b = inputs()
    with pytest.raises(RuntimeError, match="weight: dtype Float does not match input's Double"):
        F.linear_gated(x, w.float(), b)


def test_wrong_calls():
    x, w, b = inputs()
    with pytest.raises(ValueError, match="activation: unknown name 'swiglu'"):
        F.linear_gated(x, w, b, "swiglu")
    with pytest.raises(TypeError, match="alpha: not a parameter of activation 'silu'"):
        F.linear_gated(x, w, b, alpha=1.0)
    assert outcome(lambda: F.linear_gated([1.0], w, b))


def test_autocast_computes_in_its_dtype():
    tensors = [t.requires_grad_() for t in inputs(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear_gated(*tensors)
        expected = by_torch(*tensors)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
class TestModules:
    def test_first_weights_are_those_of_two_linear_layers(self, bias):
        torch.manual_seed(3)
        layer = mlpext.nn.GatedLinear(5, 300, bias=bias)
        torch.manual_seed(3)
        gate, value = torch.nn.Linear(5, 300, bias), torch.nn.Linear(5, 300, bias)
        assert torch.equal(layer.weight, torch.stack([gate.weight, value.weight]))
        assert layer.bias is None if not bias else torch.equal(layer.bias[1], value.bias)

    def test_layouts_of_other_packages_both_ways(self, bias):
        gate, value = torch.nn.Linear(5, 3, bias), torch.nn.Linear(5, 3, bias)
        x = torch.randn(4, 5)
        expected = TF.gelu(gate(x)) * value(x)
        layer = mlpext.nn.GatedLinear.from_linear(gate, value, "gelu")
        packed, torchs = layer.to_packed(), layer.to_packed(gate_first=False)
        first, second = packed(x).chunk(2, -1)
        for y in (
            layer(x),
            TF.gelu(first) * second,
            TF.gelu(torchs(x).chunk(2, -1)[1]) * torchs(x).chunk(2, -1)[0],
            mlpext.nn.GatedLinear.from_packed(packed, "gelu")(x),
            mlpext.nn.GatedLinear.from_packed(torchs, "gelu", gate_first=False)(x),
            mlpext.nn.GatedLinear.from_linear(*layer.to_linear(), "gelu")(x),
        ):
            torch.testing.assert_close(y, expected)
        glu = torch.nn.Sequential(torch.nn.Linear(5, 6, bias), torch.nn.GLU())
        ours = mlpext.nn.GatedLinear.from_packed(glu[0], "sigmoid", gate_first=False)
        torch.testing.assert_close(ours(x), glu(x))
        with torch.no_grad():
            gate.weight.zero_()
        assert layer.weight[0].abs().max() > 0, "the parameters are copies"

    def test_llamas_mlp_both_ways(self, bias):
        gate, up, down = (torch.nn.Linear(*sizes, bias) for sizes in ((6, 16), (6, 16), (16, 6)))
        x = torch.randn(4, 6)
        mlp = mlpext.nn.GatedMLP.from_linear(gate, up, down)
        torch.testing.assert_close(mlp(x), down(TF.silu(gate(x)) * up(x)))
        for ours, theirs in zip(mlp.to_linear(), (gate, up, down), strict=True):
            assert torch.equal(ours.weight, theirs.weight) and (ours.bias is None) == (not bias)
        assert set(mlpext.nn.GatedMLP(6, 16, bias=bias).state_dict()) == set(mlp.state_dict())


def test_module_errors_and_repr():
    layer = mlpext.nn.GatedLinear(5, 3, "elu", alpha=0.5)
    assert "in_features=5, out_features=3, bias=True, activation='elu', alpha=0.5" in repr(layer)
    with pytest.raises(ValueError, match="packed: 5 rows, expected two halves"):
        mlpext.nn.GatedLinear.from_packed(torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match="gate and value must be of one shape"):
        mlpext.nn.GatedLinear.from_linear(torch.nn.Linear(4, 5), torch.nn.Linear(4, 6))
    with pytest.raises(TypeError, match="write bias=False"):
        mlpext.nn.GatedLinear(5, 3, False)
    with pytest.raises(RuntimeError, match="out_features: -3 is negative"):
        mlpext.nn.GatedLinear(5, -3)
