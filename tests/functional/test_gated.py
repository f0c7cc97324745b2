"""The product inside a gated unit, f(gate) value."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import mlpext.functional as F
import reference
from activation_inputs import SPECIALS, derivative
from common import CASES, FLOATS, assert_same_bits, differentiable, eager, every_float, ours, usual

pytestmark = pytest.mark.filterwarnings("error")
NAMES = ("silu", "gelu", "relu", "sigmoid")
# Roundings of a result, in units of its last place: of f and of the product, of a derivative one more.
UNITS = {torch.float64: 64, torch.float32: 6, torch.bfloat16: 2, torch.float16: 2}


def by_torch(gate, value, /, activation="silu", **parameters):
    return differentiable(activation, parameters)(gate) * value


def inputs(shape, dtype=torch.float64, seed=0):
    """Gate, value, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def halves(shape, dtype=torch.float64, seed=0):
    """The same numbers, gate and value as the two halves of one tensor."""
    gate, value, g = inputs(shape, dtype, seed)
    return [*torch.cat([gate, value], -1).chunk(2, -1), g]


def run(gate, value, g, f=F.gated, /, **options):
    """y, and the gradients of gate and value."""
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    y = f(*leaves, **options)
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def exact(gate, value, g, name, parameters):
    """By reference.py, in float64."""
    gate, value, g = (t.double().contiguous().numpy() for t in (gate, value, g))
    f, slope = reference.fast(name, parameters, gate)
    return [torch.from_numpy(t) for t in (f * value, g * value * slope, g * f)]


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("make", [inputs, halves])
@pytest.mark.parametrize("name, parameters", CASES)
def test_against_the_reference(name, parameters, make, dtype):
    """No further from it than a few roundings, or than torch's operators are."""
    if not usual(name, parameters):
        dtype = torch.float64
    tensors = make((7, 131), dtype)
    wanted = exact(*tensors, name, parameters)
    results, eagers = (run(*tensors, f, activation=name, **parameters) for f in (F.gated, by_torch))
    for k, (actual, expected) in enumerate(zip(results, wanted, strict=True)):
        error, torchs = ((t.double() - expected).abs() for t in (actual, eagers[k]))
        # A derivative that cancels, of gelu at its least, has the rounding of its largest part.
        size = expected.abs().clamp(min=0.5 * k)
        bound = UNITS[dtype] * torch.finfo(dtype).eps * size + 1e-15
        assert actual.dtype == dtype and (error <= torch.maximum(bound, 2 * torchs)).all(), (k, error.max())


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_whole_no_further_from_the_reference_than_torch(name, dtype):
    tensors = inputs((1 << 15,), dtype)
    wanted = exact(*tensors, name, {})
    actual, eagers = (run(*tensors, f, activation=name) for f in (F.gated, by_torch))
    for k, expected in enumerate(wanted):
        errors = [(t[k].double() - expected).abs().mean() for t in (actual, eagers)]
        assert errors[0] <= 1.01 * errors[1], k


@pytest.mark.native
@pytest.mark.isa
@pytest.mark.usefixtures("own_loops")
@every_float
@pytest.mark.parametrize("name", ["silu", "elu"])
def test_bits_do_not_depend_on_the_place(name, dtype):
    """At every length around those of a register, and of a block (512, 1024, 2048 elements)."""
    tensors = inputs((5000,), dtype)
    whole = run(*tensors, activation=name)
    for n in (*range(70), 511, 512, 513, 1023, 1025, 2049):
        part = slice(n % 3, n % 3 + n)
        for alone, of_whole in zip(run(*(t[part] for t in tensors), activation=name), whole, strict=True):
            assert_same_bits(alone, of_whole[part], n)


@pytest.mark.native
@pytest.mark.usefixtures("own_loops")
@pytest.mark.parametrize("name, parameters", CASES)
def test_is_the_activation_and_a_product(name, parameters):
    """In float32 bit by bit; in 16 bits there is one rounding where these have two."""
    gate, value, g = inputs((131,), torch.float32)
    f = ours(name, parameters)
    y, of_gate, of_value = run(gate, value, g, activation=name, **parameters)
    assert_same_bits(y, f(gate) * value)
    assert_same_bits(of_value, f(gate) * g)
    assert_same_bits(of_gate, derivative(name, parameters, gate, g * value))


LAYOUTS = {
    "contiguous": lambda t: t,
    "half": lambda t: torch.cat([t, t], -1).chunk(2, -1)[1],
    "rows apart": lambda t: t.repeat_interleave(3, 0)[::3],
    "transposed": lambda t: t.t().contiguous().t(),
    "columns apart": lambda t: t.repeat_interleave(2, -1)[:, ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "row expanded": lambda t: t[:1].expand(t.shape),
    "column expanded": lambda t: t[:, :1].expand(t.shape),
    "one number": lambda t: t[0, 0].expand(t.shape),
}


@pytest.mark.native
@pytest.mark.usefixtures("own_loops")
@pytest.mark.isa
@every_float
@pytest.mark.parametrize("columns", [5, 200])
def test_layouts(columns, dtype):
    """Bits of the same numbers side by side, and torch's strides."""
    tensors = inputs((6, columns), dtype)
    for keys in itertools.product(LAYOUTS, repeat=3):
        gate, value, g = (LAYOUTS[key](t) for key, t in zip(keys, tensors, strict=True))
        actual = run(gate, value, g)
        dense = run(*(t.clone(memory_format=torch.contiguous_format) for t in (gate, value, g)))
        for a, d, e in zip(actual, dense, run(gate, value, g, by_torch), strict=True):
            torch.testing.assert_close(a, d, rtol=0, atol=0, msg=str(keys))
            assert a.stride() == e.stride(), keys


@pytest.mark.native
@pytest.mark.parametrize("shape", [(6, 200), (2, 3, 200), (4, 1, 2, 200), (1, 200), (3, 64)], ids=str)
def test_halves_are_not_copied(shape):
    """No operator of torch runs, forward or backward."""
    gate, value, g = halves(shape, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        y = torch.ops.mlpext.gated(gate, value, "silu", [])
        torch.ops.mlpext.gated_backward(g, gate, value, "silu", [], [True, True])
    assert {event.key for event in seen.key_averages()} == {"mlpext::gated", "mlpext::gated_backward"}
    assert y.is_contiguous()


def test_channels_last_is_kept():
    gate, value, g = (t.contiguous(memory_format=torch.channels_last) for t in inputs((2, 5, 4, 3)))
    for t in run(gate, value, g):
        assert t.is_contiguous(memory_format=torch.channels_last)


@hypothesis.given(
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(1, 150),
    st.sampled_from(NAMES),
    st.sampled_from([inputs, halves]),
)
def test_any_size(leading, columns, name, make):
    tensors = make((*leading, columns))
    torch.testing.assert_close(run(*tensors, activation=name), run(*tensors, by_torch, activation=name))


def test_no_dimension():
    tensors = inputs(())
    torch.testing.assert_close(run(*tensors), run(*tensors, by_torch))


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("make", [inputs, halves])
def test_some_inputs_frozen(make, needs):
    gate, value, g = make((6, 200))
    leaves = [t.detach().requires_grad_(need) for t, need in zip((gate, value), needs, strict=True)]
    F.gated(*leaves).backward(g)
    for leaf, expected in zip(leaves, run(gate, value, g, by_torch)[1:], strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected)


def test_gate_and_value_may_be_one():
    gate, _, g = inputs((6, 200))
    actual, expected = (
        torch.autograd.grad(f(leaf, leaf), leaf, g)[0]
        for f, leaf in ((f, gate.clone().requires_grad_()) for f in (F.gated, by_torch))
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("name", ["silu", "relu", "sigmoid", "hardswish"])
def test_nan_and_inf_are_torchs(name, dtype):
    """inf 0 included; every pair of special values, at places of a register and of its tail. For f itself
    where it differs, silu and hardswish of -inf, of which the package's is the limit."""
    pairs = torch.tensor([*itertools.product([*SPECIALS, 0.0, -0.0, 2.0, -5.0], repeat=2)]).to(dtype)
    gate, value = (column.repeat(3)[:-1] for column in pairs.T)
    f = eager(name, {}) if name in ("relu", "sigmoid") else ours(name, {})
    y, *gradients = run(gate, value, torch.full_like(gate, torch.inf), activation=name)
    torch.testing.assert_close(y, f(gate) * value, equal_nan=True)
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    torch.autograd.backward(f(leaves[0]) * leaves[1], torch.full_like(gate, torch.inf))
    torch.testing.assert_close(gradients, [leaf.grad for leaf in leaves], equal_nan=True)


@pytest.mark.native
@pytest.mark.usefixtures("own_loops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_results_written_around_the_cache(dtype):
    """From 32 MiB on, with rows that are no multiple of a piece; two threads, the same bits."""
    columns = 5003
    rows = (32 << 20) // (columns * dtype.itemsize) + 1
    gate, value, g = (t.expand(rows, columns) for t in inputs((1, columns), dtype))
    results = [run(gate, value, g.contiguous())]
    torch.set_num_threads(2)
    results.append(run(gate, value, g.contiguous()))
    assert results[0][0].nbytes >= 32 << 20
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, one[:1].expand_as(one))
    row = run(gate[0], value[0], g[0])
    for whole, alone in zip(results[0], row, strict=True):
        assert_same_bits(whole[7], alone)


MIXED = [*itertools.product(FLOATS, (*FLOATS, torch.int64, torch.bool)), (torch.float32, torch.complex64)]


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_other_dtypes_are_promoted_as_torch_promotes(dtypes):
    gate, value = (torch.ones(3, 4).to(dtype) for dtype in dtypes)
    for one, other in ((gate, value), (gate, value[0]), (gate, value.sum())):
        expected = by_torch(one, other)
        actual = F.gated(one, other)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((3, 4), ()), ((2, 1, 4), (3, 4))], ids=str
)
def test_shapes_broadcast_as_torchs_do(shapes):
    gate, value = (inputs(shape, seed=k)[0] for k, shape in enumerate(shapes))
    g = torch.randn(torch.broadcast_shapes(*shapes), dtype=torch.float64)
    torch.testing.assert_close(run(gate, value, g), run(gate, value, g, by_torch))


def test_wrong_calls():
    gate, value, _ = inputs((3, 4), torch.float32)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(4\) must match the size of tensor b \(3\)"):
        F.gated(gate, value[:, :3])
    with pytest.raises(ValueError, match="activation: unknown name 'swiglu'"):
        F.gated(gate, value, "swiglu")
    with pytest.raises(TypeError, match="alpha: not a parameter of activation 'silu'"):
        F.gated(gate, value, alpha=1.0)
    for wrong in ((gate, [1.0]), ([1.0], value), (gate, None)):
        with pytest.raises(TypeError):
            F.gated(*wrong)


@pytest.mark.parametrize("name", ["silu", "softplus"])
def test_autocast_leaves_the_dtype_as_torchs_operators_do(name):
    for dtypes in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        gate, value = (
            t.to(dtype).requires_grad_() for t, dtype in zip(inputs((3, 70))[:2], dtypes, strict=True)
        )
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = F.gated(gate, value, name), by_torch(gate, value, name)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
        y.sum().backward()
        assert [gate.grad.dtype, value.grad.dtype] == [*dtypes]
