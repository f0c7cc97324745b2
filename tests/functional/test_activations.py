"""Each activation on the plain path: its numbers, bits, edges, shapes and types, in place and not."""

import functools
import inspect
import itertools
import math
import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import accuracy
import mlpext
import mlpext.functional as F
import reference
from common import (
    CASES,
    FUNCTIONAL_CASES,
    NAMES,
    assert_same_bits,
    assert_same_outcome,
    bits,
    class_name,
    every_case,
    every_finite,
    every_float,
    every_functional_case,
    every_inplace_case,
    gradients,
    gradients_of_ones,
    has_inplace,
    native,
    ours,
    outcome,
    points,
    reference_of,
    ulp,
    values_of,
    worst,
)

pytestmark = pytest.mark.filterwarnings("error")
SPECIALS = (math.nan, math.inf, -math.inf, -0.0)


def forward(name, parameters, x):
    return torch.ops.mlpext.activation(x, name, values_of(name, parameters))


def derivative(name, parameters, x, g=None):
    """By the backward operator on the input, without a graph."""
    g = torch.ones_like(x) if g is None else g
    return torch.ops.mlpext.activation_backward(g, x, name, values_of(name, parameters), False)


# ---------------------------------------------------------------- the list


def test_list_is_the_references():
    assert sorted(NAMES) == sorted(reference.ACTIVATIONS)
    assert list(NAMES) == list(mlpext._C.activations())


def test_parameters_and_defaults_are_the_references():
    for name, activation in reference.ACTIVATIONS.items():
        arguments = list(inspect.signature(activation.formula).parameters.values())[2:]
        assert mlpext._C.activations()[name] == {a.name: a.default for a in arguments}, name


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
def test_each_has_a_function_and_a_module(name):
    assert callable(getattr(mlpext.functional, name))
    assert issubclass(getattr(mlpext.nn, class_name(name)), torch.nn.Module)


# ---------------------------------------------------------------- the numbers

# How many units in the last place more than native's an error may be.
BEYOND_NATIVE = {"mish": 2.5, "tanh": 2.5}
if mlpext._C.cpu_isa() == "baseline":  # the reduction by quarter turns loses more without fused multiply-add
    BEYOND_NATIVE["sine"] = 2.0


@pytest.mark.isa
@pytest.mark.parametrize(
    "dtype, count", [(torch.float32, 60_000), (torch.float64, 600)], ids=["float32", "float64"]
)
@every_case
def test_value_to_the_last_places(name, parameters, dtype, count):
    x = points(name, parameters, dtype, count)
    at, expected = x.double().numpy(), reference_of(name, parameters, x)[0]
    error, bound = accuracy.value_error(name, parameters, forward(name, parameters, x), at, expected)
    assert error.max() <= bound, worst(error, at)
    natives, _ = accuracy.value_error(name, parameters, native(name, parameters)(x), at, expected)
    allowed = natives.max() + BEYOND_NATIVE.get(name, 1.0)
    assert error.max() <= allowed, f"{worst(error, at)}, native {worst(natives, at)}"


@pytest.mark.isa
@pytest.mark.parametrize(
    "dtype, count", [(torch.float32, 60_000), (torch.float64, 600)], ids=["float32", "float64"]
)
@every_case
def test_derivative_to_the_last_places(name, parameters, dtype, count):
    x = points(name, parameters, dtype, count)
    at, expected = x.double().numpy(), reference_of(name, parameters, x)[1]
    error, bound = accuracy.derivative_error(
        name, parameters, gradients_of_ones(ours(name, parameters), x), at, expected
    )
    assert error.max() <= bound, worst(error, at)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_case
def test_sixteen_bits_all_values(name, parameters, dtype):
    """Computed in float32 and rounded once: the nearest number, but for near ties."""
    x = every_finite(dtype)
    at = x.double().numpy()
    value, slope = reference.fast(name, parameters, at)
    y = forward(name, parameters, x)
    error, bound = accuracy.value_error(name, parameters, y, at, (value, 0.0))
    assert error.max() <= bound, worst(error, at)
    clear = accuracy.unavoidable(name, parameters, at, torch.float32) < 1e-3 * ulp(value, dtype)
    nearest = torch.from_numpy(np.array(value)).to(dtype)
    share = (bits(y + 0.0) == bits(nearest + 0.0)).numpy()[clear].mean()
    assert share >= 0.999, share

    error, bound = accuracy.derivative_error(
        name, parameters, gradients_of_ones(ours(name, parameters), x), at, (slope, 0.0)
    )
    assert error.max() <= bound, worst(error, at)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_functional_case
def test_numbers_of_native_where_native_is_right(name, parameters, dtype):
    x = torch.linspace(-4, 4, 501, dtype=torch.float64).to(dtype).requires_grad_()
    for actual, expected in zip(
        gradients(ours(name, parameters), [x]), gradients(native(name, parameters), [x]), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.isa
@every_float
@every_functional_case
def test_derivative_at_a_kink_is_natives(name, parameters, dtype):
    kinks = [*reference.kinks(name, parameters), 0.0, -0.0]
    x = torch.tensor(kinks * 20, dtype=dtype)  # long enough for the vector loops
    actual = gradients_of_ones(ours(name, parameters), x)
    expected = gradients_of_ones(native(name, parameters), x)
    torch.testing.assert_close(actual, expected, msg=lambda m: f"at {kinks}: {m}")


@pytest.mark.isa
@every_float
@every_case
def test_infinity_gives_the_limit(name, parameters, dtype):
    expected = torch.from_numpy(reference.limits(name, parameters)).to(dtype)
    x = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for length in (1, 40):  # the tail alone, and the vector loop
        x_long = x.repeat(length)
        torch.testing.assert_close(
            forward(name, parameters, x_long), expected[0].repeat(length), equal_nan=True
        )
        slope = gradients_of_ones(ours(name, parameters), x_long)
        torch.testing.assert_close(slope, expected[1].repeat(length), equal_nan=True)


@pytest.mark.isa
@every_float
@every_case
def test_nan_in_nan_out(name, parameters, dtype):
    x = torch.full((37,), math.nan, dtype=dtype)
    assert forward(name, parameters, x).isnan().all()


@every_float
@every_functional_case
def test_derivative_at_nan_is_one_everywhere(name, parameters, dtype):
    """Native's scalar and vector loops disagree at a NaN; either answer will do, but one everywhere."""
    x = torch.full((1024,), math.nan, dtype=dtype)
    slope = gradients_of_ones(ours(name, parameters), x)
    one, long = (gradients_of_ones(native(name, parameters), t)[:1] for t in (x[:1], x))
    assert (bits(slope) == bits(slope[:1])).all()
    assert bits(slope[:1]) in (bits(one), bits(long)) or slope.isnan().all(), (slope[0], one, long)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_right_where_native_is_wrong(dtype):
    """Measured faults of native: gelu's tail, sigmoid and silu below -88, overflow far out."""
    x = torch.tensor([-6.0, -8.0, -12.0] * 11, dtype=dtype)
    for name in ("gelu", "gelu_tanh"):
        expected = torch.tensor(reference.fast(name, {}, x.double().numpy())[0], dtype=dtype)
        torch.testing.assert_close(forward(name, {}, x), expected, rtol=1e-6, atol=0)
    far = torch.full((9,), -95.0, dtype=dtype)
    assert (forward("sigmoid", {}, far) > 0).all() and (forward("silu", {}, far) < 0).all()
    huge = torch.tensor([-3e38, -1e20, 1e20, 3e38] * 5, dtype=dtype)
    for name in NAMES:
        if name != "sine":
            assert forward(name, {}, huge).isfinite().all(), name
            assert gradients_of_ones(ours(name, {}), huge).isfinite().all(), name


@every_float
def test_relu_is_flat_at_zero(dtype):
    zero = torch.zeros(21, dtype=dtype)
    assert (gradients_of_ones(F.relu, zero) == 0).all()
    layer = F.linear_activation(
        zero[:, None].requires_grad_(), torch.ones(1, 1, dtype=dtype), activation="relu"
    )
    assert (
        layer.grad_fn is not None
        and (torch.autograd.grad(layer.sum(), layer.grad_fn.next_functions[0][0].variable)[0] == 0).all()
    )


# ---------------------------------------------------------------- the same bits everywhere


@functools.cache
def special_tensors(dtype, longest=67):
    """Every length, each special value at every position, at several offsets from an aligned address."""
    return tuple(_special_tensors(dtype, longest))


def _special_tensors(dtype, longest):
    base = torch.linspace(-3, 3, longest, dtype=torch.float64).to(dtype)
    for length, special in itertools.product(range(1, longest + 1), SPECIALS):
        rows = base[:length].repeat(length, 1)
        rows.fill_diagonal_(special)
        yield from rows


def _together(f, tensors):
    """f on each tensor alone, and on all of them as one long tensor."""
    return torch.cat([f(x) for x in tensors]), f(torch.cat(tensors))


@pytest.mark.thorough
@pytest.mark.isa
@every_float
@every_case
def test_specials_at_every_position_of_every_length(name, parameters, dtype):
    tensors = special_tensors(dtype)
    assert_same_bits(*_together(lambda x: forward(name, parameters, x), tensors), "value")
    if name != "identity":
        assert_same_bits(*_together(lambda x: derivative(name, parameters, x), tensors), "derivative")


@pytest.mark.isa
@every_float
@every_functional_case
def test_specials_through_autograd(name, parameters, dtype):
    """The same with what autograd keeps (y or x), at lengths around the widths of the vectors."""
    tensors = [x for x in special_tensors(dtype, longest=35) if len(x) in (1, 2, 7, 8, 9, 15, 16, 17, 33, 35)]
    f = ours(name, parameters)
    assert_same_bits(*_together(lambda x: gradients_of_ones(f, x), tensors))


def layouts(dtype):
    """Tensors of many layouts with ordinary values."""
    base = torch.linspace(-3, 3, 2 * 3 * 20 * 6, dtype=torch.float64).to(dtype)
    cube = base.view(2, 3, 20, 6)
    return {
        "contiguous": cube,
        "empty": base[:0],
        "empty with shape": base[:0].view(0, 3, 0),
        "scalar": base[77],
        "one": base[5:6],
        "odd offset": base[3:70],
        "every third": base[::3],
        "columns": cube.view(36, 20)[:, 3:14],
        "odd columns": cube.view(36, 20)[:, 1::2],
        "transposed": cube.view(36, 20).t(),
        "permuted": cube.permute(3, 1, 0, 2),
        "channels last": cube.contiguous(memory_format=torch.channels_last),
        "expanded": base[:20].expand(7, 20),
        "expanded inside": base[:20, None].expand(20, 5),
        "expanded scalar": base[9].expand(3, 4),
        "overlapping": base.as_strided((10, 8), (3, 1)),
        "sliced channels last": cube.contiguous(memory_format=torch.channels_last)[:, :2, ::2],
    }


@pytest.mark.isa
@every_float
@every_functional_case
def test_layouts(name, parameters, dtype):
    f, f_native = ours(name, parameters), native(name, parameters)
    for layout, x in layouts(dtype).items():
        y = f(x)
        like_native = "logsigmoid" not in name  # native's makes everything contiguous
        assert y.stride() == (f_native(x) if like_native else torch.empty_like(x)).stride(), layout
        assert_same_bits(y, f(x.contiguous().flatten()).view(x.shape), layout)
        for gradient_layout, g in cotangents(x).items():
            what = f"{layout}, gradient {gradient_layout}"
            leaf = x.detach().requires_grad_()
            (actual,) = torch.autograd.grad(f(leaf), leaf, g)
            flat = x.contiguous().flatten().requires_grad_()
            (expected,) = torch.autograd.grad(f(flat), flat, g.contiguous().flatten())
            assert_same_bits(actual, expected.view(x.shape), what)
            if gradient_layout == "as the output":
                (natives,) = torch.autograd.grad(f_native(leaf), leaf, g)
                assert actual.stride() == natives.stride(), what


def cotangents(x):
    dense = (
        torch.linspace(-1, 2, max(x.numel(), 1), dtype=torch.float64).to(x.dtype)[: x.numel()].view(x.shape)
    )
    several = {
        "as the output": torch.empty_like(x).copy_(dense),
        "dense": dense,
        "one number expanded": x.new_ones(()).mul(1.5).expand(x.shape),
    }
    if x.dim() >= 2:
        several["transposed"] = dense.transpose(0, 1).contiguous().transpose(0, 1)
        several["expanded"] = dense[:1].expand(x.shape)
        several["every second"] = torch.stack([dense, dense + 9], -1)[..., 0]
    return several


@pytest.mark.isa
@every_functional_case
def test_bits_do_not_depend_on_threads(name, parameters):
    x = torch.linspace(-9, 9, 2**18 + 3)
    once = torch.cat([forward(name, parameters, x), derivative(name, parameters, x)])
    torch.set_num_threads(2)
    again = torch.cat([forward(name, parameters, x), derivative(name, parameters, x)])
    assert_same_bits(again, once)
    half = len(x) // 3
    assert_same_bits(
        torch.cat([forward(name, parameters, x[:half]), forward(name, parameters, x[half:])]), once[: len(x)]
    )


SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=4)


@st.composite
def strided(draw):
    """A view of a random base: permuted, sliced with steps, expanded, at an offset."""
    shape = draw(SHAPES)
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offset = draw(st.integers(0, 3))
    base = torch.linspace(-4, 4, 1 + math.prod(s * k + 1 for s, k in zip(shape, steps, strict=True)) + offset)
    x = base[offset : offset + math.prod(s * k for s, k in zip(shape, steps, strict=True))]
    x = x.view([s * k for s, k in zip(shape, steps, strict=True)])
    for d, k in enumerate(steps):
        x = x[(slice(None),) * d + (slice(None, None, k),)]
    x = x.permute(draw(st.permutations(range(x.dim()))))
    if draw(st.booleans()):
        x = x.unsqueeze(-1).expand(*x.shape, draw(st.integers(1, 3)))
    return x


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
@hypothesis.settings(max_examples=25)
@hypothesis.given(x=strided())
def test_any_view(name, x):
    f, f_native = ours(name, {}), native(name, {})
    y = f(x)
    # The stride of a dimension of size 1 means nothing; native's logsigmoid makes everything contiguous.
    if all(s > 1 for s in x.shape) and name != "logsigmoid":
        assert y.stride() == f_native(x).stride()
    assert_same_bits(y, f(x.reshape(-1).contiguous()).view(x.shape))
    torch.testing.assert_close(y, f_native(x))


# ---------------------------------------------------------------- in place


@every_float
@every_inplace_case
def test_inplace_writes_where_it_should_and_nowhere_else(name, parameters, dtype):
    f, f_inplace = ours(name, parameters), ours(name, parameters, inplace=True)
    guard = -77.0
    for length in range(68):
        room = torch.full((length + 20,), guard, dtype=dtype)
        x = room[10 : 10 + length]
        x.copy_(torch.linspace(-4, 4, max(length, 1), dtype=torch.float64)[:length])
        expected, version = f(x), x._version
        assert f_inplace(x) is x
        assert x._version == version + 1, length
        if min(parameters.values(), default=0) >= 0:
            assert_same_bits(x, expected, length)
        else:  # in place, a negative slope goes to native
            torch.testing.assert_close(x, expected)
        assert (room[:10] == guard).all() and (room[10 + length :] == guard).all(), length


@every_inplace_case
def test_inplace_on_layouts(name, parameters):
    for layout, x in layouts(torch.float32).items():
        here, there = (
            x.clone(memory_format=torch.preserve_format),
            x.clone(memory_format=torch.preserve_format),
        )
        assert_same_outcome(ours(name, parameters, True)(here), native(name, parameters, True)(there), layout)
    x = torch.linspace(-3, 3, 60)
    room, room_native = x.clone(), x.clone()
    ours(name, parameters, True)(room[1::3])
    native(name, parameters, True)(room_native[1::3])
    torch.testing.assert_close(room, room_native)


@every_inplace_case
def test_inplace_gradient(name, parameters):
    """As native: same gradient, or, where the output cannot give it (a negative slope), the same refusal."""
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)

    def through(f):
        y = x * 1.5
        f(y)  # y now is the result
        return torch.autograd.grad((y * y).sum(), x)[0]

    actual = outcome(through, ours(name, parameters, True))
    assert_same_outcome(actual, outcome(through, native(name, parameters, True)))


@every_inplace_case
def test_inplace_refusals_are_natives(name, parameters):
    overlapping = torch.zeros(1).expand(5)
    leaf = torch.zeros(5, requires_grad=True)
    attempts = {
        "leaf that requires grad": lambda: leaf,
        "view of such a leaf": lambda: leaf[1:],
        "expanded": lambda: overlapping,
        "integers": lambda: torch.arange(5),
        "booleans": lambda: torch.ones(3, dtype=torch.bool),
    }
    for what, make in attempts.items():
        actual = outcome(ours(name, parameters, True), make())
        assert_same_outcome(actual, outcome(native(name, parameters, True), make()), what)
    with torch.no_grad():
        ours(name, parameters, True)(leaf)
        expected = native(name, parameters)(torch.zeros(5))
    torch.testing.assert_close(leaf.detach(), expected)


@every_inplace_case
def test_inplace_spoils_what_others_keep(name, parameters):
    x = torch.linspace(0.1, 1, 5, requires_grad=True)
    y = x.exp()  # keeps its own output
    ours(name, parameters, True)(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|negative slope"):
        y.sum().backward()


@every_inplace_case
def test_inplace_of_a_view_reaches_its_base(name, parameters):
    def through(f):
        x = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        base = x * 1
        f(base[:, 1::2])
        return torch.cat([base.detach(), torch.autograd.grad((base * base).sum(), x)[0]])

    actual = outcome(through, ours(name, parameters, True))
    assert_same_outcome(actual, outcome(through, native(name, parameters, True)))


@pytest.mark.parametrize(
    "name, parameters", [("leaky_relu", {"negative_slope": -0.1}), ("elu", {"alpha": -1.0})]
)
def test_inplace_with_a_negative_slope_raises_as_native(name, parameters):
    """Its derivative cannot be told from its output, and silence would be a wrong gradient."""
    messages = []
    for f in (native(name, parameters, True), ours(name, parameters, True)):
        x = torch.ones(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="negative slope") as raised:
            f(x * -1.0).sum().backward()
        messages.append(str(raised.value).split(".")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
def test_inplace_is_offered_where_torch_offers_it(name):
    offered = "inplace" in inspect.signature(getattr(F, name)).parameters
    assert offered == has_inplace(name)


WITH_OUT = ("gelu", "gelu_tanh", "softplus", "logsigmoid", "softshrink", "hardshrink")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "identity"])
def test_out_is_offered_where_torch_offers_it(name):
    x = torch.linspace(-3, 3, 12).view(3, 4)
    for f in (ours(name, {}), *([native(name, {})] if name not in ("sigmoid", "tanh", "sine") else [])):
        if name in WITH_OUT:
            out = torch.empty(3, 4)
            assert f(x, out=out) is out
            torch.testing.assert_close(out, native(name, {})(x))
        else:
            with pytest.raises(TypeError, match="out"):
                f(x, out=torch.empty(3, 4))


@pytest.mark.parametrize("name, parameters", [c for c in CASES if c.values[0] in WITH_OUT])
def test_out_is_written_or_refused_as_torchs(name, parameters):
    x = torch.linspace(-30, 30, 24).view(4, 6)
    outs = {
        "strided": lambda: torch.zeros(4, 12)[:, ::2],
        "empty": lambda: torch.empty(0),
        "itself": lambda: x.clone(),
        "another shape": lambda: torch.zeros(2),
        "another dtype": lambda: torch.zeros(4, 6, dtype=torch.float64),
        "wants a gradient": lambda: torch.zeros(4, 6, requires_grad=True),
        "no tensor": lambda: 3,
    }
    for what, make in outs.items():
        results = []
        for f in (ours(name, parameters), native(name, parameters)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # resizing is deprecated
                results.append(outcome(f, x, out=make()))
        assert_same_outcome(*results, what)


# ---------------------------------------------------------------- types and bad arguments


def unusual_inputs():
    dense = torch.linspace(-2, 2, 12).view(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([dense[0, :2], dense[1, :3]])
    return {
        "int64": torch.arange(-3, 4),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.complex(dense, dense.flip(0)),
        "complex128": torch.complex(dense, dense.flip(0)).to(torch.complex128),
        "sparse": dense.relu().to_sparse(),
        "sparse csr": dense.relu().to_sparse_csr(),
        "nested": nested,
        "meta": dense.to("meta"),
        "conjugate": torch.complex(dense, dense).conj(),
        "negative view": torch.complex(dense, dense).conj().imag,
        "zero tensor": torch._efficientzerotensor(4),
        "float8": dense.to(torch.float8_e4m3fn),
        "no tensor": 1.5,
        "array": dense.numpy(),
        "none": None,
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", unusual_inputs())
@every_functional_case
def test_unusual_inputs_do_as_native(name, parameters, kind):
    if (name, kind) == ("squareplus", "nested"):
        return  # torch has no squareplus to be like, and its nested tensors hardly an operator
    x = unusual_inputs()[kind]
    actual, expected = outcome(ours(name, parameters), x), outcome(native(name, parameters), x)
    if isinstance(expected, torch.Tensor) and expected.is_nested:
        assert actual.is_nested
        actual, expected = actual.values(), expected.values()
    assert_same_outcome(actual, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@every_functional_case
def test_complex_gradient_is_natives(name, parameters, dtype):
    def through(f):
        x = torch.tensor([0.3 + 0.4j, -1.0 + 2.0j], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(f(x).abs().sum(), x)[0]

    assert_same_outcome(outcome(through, ours(name, parameters)), outcome(through, native(name, parameters)))


WRONG = [("a",), (None,), ([1.0],), (1j,)]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize(
    "name", [n for n in NAMES if mlpext._C.activations()[n] and n not in ("sine", "squareplus")]
)
def test_wrong_parameters_do_as_native(name, wrong):
    x = torch.linspace(-2, 2, 5)
    parameter = next(iter(mlpext._C.activations()[name]))
    actual = outcome(lambda: getattr(F, name)(x, **{parameter: wrong[0]}))
    expected = outcome(lambda: native(name, {parameter: wrong[0]})(x))
    assert_same_outcome(actual, expected)


EXTREMES = [
    *(
        0.2,
        -0.2,
        0.3,
        1 / 3,
        1.7,
        1e-9,
        1e5,
        1e30,
        -1e30,
        1e39,
        1e300,
        10**18,
        10**25,
        0.0,
        -0.0,
        1e-46,
        1e-320,
    ),
    *(math.inf, -math.inf, math.nan),
]
PARAMETERS = [
    (name, parameter)
    for name, defaults in mlpext._C.activations().items()
    for parameter in defaults
    if name not in ("sine", "squareplus")
]


@every_float
@pytest.mark.parametrize("value", EXTREMES, ids=repr)
@pytest.mark.parametrize("name, parameter", PARAMETERS)
def test_any_parameter_does_as_native(name, parameter, value, dtype):
    """Rounded to the dtype where native rounds it, refused where native refuses it; alone and in a layer."""
    least, most = (
        torch.finfo(dtype if dtype == torch.float16 else torch.float32).max * s for s in (-0.9, 0.9)
    )
    other = {"min_val": {"max_val": most}, "max_val": {"min_val": least}}.get(parameter, {})
    parameters = {parameter: value, **other}
    base = torch.tensor([0.2, 0.3, 1 / 3, 1.7, 3.0, 1e-8, 0.0], dtype=dtype)
    base = torch.cat([base, torch.nextafter(base, base * 2), torch.nextafter(base, base * 0)])
    x, one = torch.cat([base, -base]), torch.ones(1, 1, dtype=dtype)
    f = native(name, parameters)

    def through(f):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        return torch.cat(
            [y.detach().flatten(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0].flatten()]
        )

    def layer(x):
        return F.linear_activation(x[:, None], one, None, name, **parameters)

    expected = outcome(through, f)
    for what, own in {"alone": ours(name, parameters), "in a layer": layer}.items():
        actual = outcome(through, own)
        if name == "celu" and dtype == torch.float64 and isinstance(expected, torch.Tensor):
            # native's 1 / alpha is a float
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
        else:
            assert_same_outcome(actual, expected, what)


def signature_of_torchs(name):
    """None where torch has a builtin without a signature, or nothing."""
    try:
        return inspect.signature(getattr(torch.nn.functional, name, None))
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", [n for n in NAMES if signature_of_torchs(n)])
def test_signature_is_torchs(name):
    actual, expected = inspect.signature(getattr(F, name)), signature_of_torchs(name)
    assert [(p.name, p.default, p.kind) for p in actual.parameters.values()] == [
        (p.name, p.default, p.kind) for p in expected.parameters.values()
    ]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
def test_wrong_calls_raise_type_error(name):
    f, x = getattr(F, name), torch.zeros(3)
    for args, kwargs in [((), {}), ((x, 1.0, 1.0, 1.0, 1.0), {}), ((x,), {"no_such_parameter": 1})]:
        with pytest.raises(TypeError):
            f(*args, **kwargs)
    assert_same_bits(f(input=x + 1), f(x + 1))


def test_unknown_approximation_of_gelu():
    for f in (torch.nn.functional.gelu, F.gelu):
        with pytest.raises(RuntimeError, match="approximate"):
            f(torch.zeros(3), approximate="sometimes")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises((ValueError, RuntimeError), match=r"no_such.*leaky_relu"):
        torch.ops.mlpext.activation(torch.zeros(3), "no_such", [])


@pytest.mark.parametrize("name, wrong", [("elu", []), ("elu", [1.0, 2.0]), ("relu", [1.0])])
def test_wrong_number_of_parameters(name, wrong):
    with pytest.raises((ValueError, RuntimeError, TypeError), match=name):
        torch.ops.mlpext.activation(torch.zeros(3), name, wrong)


def test_backward_operator_refuses_shapes_that_do_not_match():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.mlpext.activation_backward(torch.zeros(3), torch.zeros(4), "elu", [1.0], False)


def test_out_of_place_leaves_the_input_alone():
    for case in FUNCTIONAL_CASES:
        x = torch.linspace(-3, 3, 100, requires_grad=True)
        before = x.detach().clone()
        ours(*case.values)(x).sum().backward()
        assert_same_bits(x.detach(), before, case.id)
        assert x._version == 0, case.id
