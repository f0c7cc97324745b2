"""What the package promises on a GPU: `pytest -m cuda`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import mlpext
import mlpext.functional as F
import reference
from common import (
    all_ops,
    assert_close,
    assert_same_bits,
    assert_same_outcome,
    default_ops,
    distance,
    eager,
    every_case,
    every_float,
    few_ops,
    linear_op,
    outcome,
    points,
    ulp,
    values_of,
)
from cuda_common import (
    DEVICE,
    OPERATORS,
    gpu_only,
    gradients,
    here,
    in_a_graph,
    inputs,
    needs_gpu,
    no_synchronisation,
    on_a_side_stream,
)

pytestmark = needs_gpu


def layer_inputs(rows, n_in, n_out, dtype):
    shapes = ((rows, n_in), (n_out, n_in), (n_out,))
    return here([torch.randn(shape).to(dtype).requires_grad_() for shape in shapes])


@pytest.mark.skipif(mlpext._C.cpu_isa() == "baseline", reason="rounds a product and a sum apart")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_case
def test_the_bits_of_the_cpu(name, parameters, dtype):
    x, values = points(name, parameters, dtype, 60_000), values_of(name, parameters)
    g = torch.randn_like(x)
    y = OPERATORS.activation(x.to(DEVICE), name, values)
    dx = OPERATORS.activation_backward(g.to(DEVICE), x.to(DEVICE), name, values, False)
    # Where sin reduces a large argument each side has its own library.
    near = x.abs() * abs(parameters.get("omega", 1.0)) < 1e5 if name == "sine" else slice(None)
    assert_same_bits(y.cpu()[near], OPERATORS.activation(x, name, values)[near])
    expected = OPERATORS.activation_backward(g, x, name, values, False)
    assert_same_bits(dx.cpu()[near], expected[near])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_case
def test_half_is_rounded_nearly_once(name, parameters, dtype):
    x, values = points(name, parameters, dtype, 60_000), values_of(name, parameters)
    at, one = x.double().numpy(), torch.ones_like(x).to(DEVICE)
    value, slope = reference.fast(name, parameters, at)
    near = np.abs(at) * abs(parameters.get("omega", 1.0)) < 1e3 if name == "sine" else np.isfinite(at)
    for expected, actual in (
        (value, OPERATORS.activation(x.to(DEVICE), name, values)),
        (slope, OPERATORS.activation_backward(one, x.to(DEVICE), name, values, False)),
    ):
        slack = 2.0**-19 * np.maximum(1.0, np.abs(at))
        error = np.fmax(distance(actual.cpu(), expected) - slack, 0)[near] / ulp(expected, dtype)[near]
        assert error.max() <= 0.55, (error.max(), at[near][error.argmax()])


@every_float
@all_ops
def test_as_torch(op, dtype):
    if "omega=30" in op.id and dtype != torch.float64:
        pytest.skip("rounding z moves sin(30 z) by 30 times as much")
    half = dtype.itemsize == 2
    tensors = inputs(op, dtype)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps} if half else {}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in zip(gradients(op.ours, tensors), gradients(op.eager, wide), strict=True):
        assert actual.dtype == dtype
        assert_close(actual.double(), expected, op.id, **tolerance)


@pytest.mark.parametrize("name", ["relu", "elu", "gelu", "hardtanh"])
@every_float
def test_large_layers(name, dtype):
    """Several tiles of columns and chunks of rows, and widths that are no multiple of 16 bytes."""
    for rows, n_in, n_out in ((3000, 64, 512), (513, 40, 96), (1000, 16, 37), (20000, 8, 8)):
        tensors = layer_inputs(rows, n_in, n_out, dtype)
        ours = gradients(lambda *t: F.linear_activation(*t, activation=name), tensors)
        again = gradients(lambda *t: F.linear_activation(*t, activation=name), tensors)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = gradients(lambda *t: eager(name, {})(TF.linear(*t)), wide)
        for actual, repeated, expected in zip(ours, again, exact, strict=True):
            assert_same_bits(actual, repeated, "the same from run to run")
            error = (actual.double() - expected).norm() / expected.norm()
            # In 16 bits some z are rounded to the other side of hardtanh's kinks.
            assert error < {8: 1e-12, 4: 1e-3, 2: 6e-2}[dtype.itemsize], (rows, n_in, n_out, error)


@every_float
@pytest.mark.parametrize("pieces", [2, 3, 300])
def test_large_maxout(dtype, pieces):
    x = torch.randn(70, pieces * 48, dtype=torch.float64).to(dtype)
    for dim, t in ((1, x), (0, x.t().contiguous()), (1, x[:, : pieces * 7])):
        ours = gradients(lambda z, d=dim: F.maxout(z, pieces, d), here([t.requires_grad_()]))
        expected = gradients(lambda z, d=dim: F.maxout(z, pieces, d), [t.detach().requires_grad_()])
        for a, e in zip(ours, expected, strict=True):
            assert_same_bits(a.cpu(), e)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1),
    "sliced": lambda t: t[..., 1::2],
    "misaligned": lambda t: t.flatten()[1:],
    "expanded": lambda t: t[:1].expand(5, *t.shape[1:]),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "empty": lambda t: t[:0],
    "0-d": lambda t: t[0, 0, 0, 0],
}


@every_float
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = LAYOUTS[layout](torch.randn(4, 6, 5, 8, device=DEVICE).to(dtype))
    y = F.elu(x)
    assert y.stride() == TF.elu(x).stride()
    assert_same_bits(y, F.elu(x.contiguous()))
    g = LAYOUTS[layout](torch.randn(4, 6, 5, 8, device=DEVICE).to(dtype))
    for cotangent in (g, g.contiguous(), torch.ones((), device=DEVICE, dtype=dtype).expand_as(x)):
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(F.elu(leaf), leaf, cotangent)
        (expected,) = torch.autograd.grad(TF.elu(leaf), leaf, cotangent)
        assert_close(dx, expected)
    target, plain = x.clone(), x.clone()
    assert_same_outcome(outcome(F.elu, target, inplace=True), outcome(TF.elu, plain, inplace=True))


@few_ops
def test_expanded_and_transposed_gradients(op):
    tensors = inputs(op)
    y = op(*tensors)
    for g in (
        torch.ones((), device=DEVICE, dtype=y.dtype).expand_as(y),
        torch.randn_like(y).t().contiguous().t(),
    ):
        ours = torch.autograd.grad(op(*tensors), tensors, g)
        eagers = torch.autograd.grad(op.eager(*tensors), tensors, g)
        for a, e in zip(ours, eagers, strict=True):
            assert_close(a, e, op.id)


@gpu_only
def test_beyond_two_billion_elements():
    n = 2**31 + 77
    x = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    x[-100:] = torch.linspace(-3, 3, 100, device=DEVICE)
    assert_same_bits(F.elu(x)[-100:], F.elu(x[-100:].clone()))


@all_ops
def test_first_and_second_order(op):
    assert gradcheck(op, inputs(op), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, inputs(op), check_fwd_over_rev=True)


@few_ops
def test_frozen_inputs(op):
    tensors = inputs(op)
    for free in range(len(tensors)):
        assert gradcheck(op, [t if i == free else t.detach() for i, t in enumerate(tensors)])


@default_ops
def test_compile(op, fresh_dynamo):
    tensors = inputs(op, torch.float32)
    compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for a, e in zip(gradients(compiled, tensors), gradients(op.eager, tensors), strict=True):
        assert_close(a, e, op.id, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@few_ops
def test_autocast(op, dtype):
    tensors = inputs(op, torch.float32)
    with torch.autocast(DEVICE, dtype):
        ours, eagers = gradients(op.ours, tensors), gradients(op.eager, tensors)
    for a, e in zip(ours, eagers, strict=True):
        assert a.dtype == e.dtype
        assert_close(a.double(), e.double(), op.id, rtol=0.05, atol=0.05)


@gpu_only
def test_two_devices_are_refused():
    x, w = torch.randn(3, 4, device=DEVICE), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="same device"):
        F.linear_activation(x, w)
    with pytest.raises(RuntimeError, match="same device"):
        F.linear_activation(w, x)


@gpu_only
@few_ops
def test_no_synchronisation(op):
    tensors = inputs(op, torch.float32)
    gradients(op.ours, tensors)
    with no_synchronisation():
        y = op(*tensors)
        torch.autograd.grad(y, tensors, torch.ones_like(y))


@gpu_only
@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_on_a_side_stream_and_in_a_graph(name):
    op = linear_op(name, {})
    tensors = inputs(op, torch.float32)
    expected = gradients(op.ours, tensors)
    g = torch.linspace(-1, 2, expected[0].numel(), device=DEVICE).view(expected[0].shape)

    def step():
        y = op(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, g)]

    side = on_a_side_stream(step)
    _graph, captured = in_a_graph(step)
    for e, s, c in zip(expected, side, captured, strict=True):
        assert_same_bits(s, e, "side stream")
        assert_same_bits(c, e, "graph")


@gpu_only
def test_kernels_of_ours_run():
    """Not torch's: the profiler sees the kernels by name."""
    x = torch.randn(1000, device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        F.elu(x)
        torch.cuda.synchronize()
    assert any("elementwise_kernel" in e.key and "mlpext" in e.key for e in profile.key_averages())


def torch_fuses(name, dtype):
    """As csrc/cuda/linear.cpp: bias + this activation come from torch's own product."""
    return name == "relu" if dtype.itemsize == 4 else name in ("relu", "gelu_tanh") and dtype.itemsize == 2


def layouts_of(x, w, b):
    """The same numbers at an address that 16 bytes do not divide, and transposed."""
    yield [torch.cat([t.detach().flatten()[:1], t.detach().flatten()])[1:].view_as(t) for t in (x, w, b)]
    yield [x.detach().t().contiguous().t(), w.detach().t().contiguous().t(), b.detach()]


@every_float
@pytest.mark.parametrize("name", ["relu", "gelu_tanh"])
@pytest.mark.parametrize(
    "rows, n_in, n_out", [(256, 128, 64), (1, 64, 32), (77, 33, 20), (30, 1, 1)], ids=str
)
def test_bias_and_activation(rows, n_in, n_out, name, dtype):
    """Fused with the product by torch or not: y with and without a gradient, in any layout."""
    tensors = layer_inputs(rows, n_in, n_out, dtype)

    def layer(*tensors):
        return F.linear_activation(*tensors, activation=name)

    exact = gradients(
        lambda *t: eager(name, {})(TF.linear(*t)), [t.detach().double().requires_grad_() for t in tensors]
    )
    # In 16 bits some z are rounded to the other side of relu's kink.
    most = {8: 1e-12, 4: 1e-3, 2: 6e-2}[dtype.itemsize]
    for leaves in (tensors, *layouts_of(*tensors)):
        leaves = [t.detach().requires_grad_() for t in leaves]
        results = gradients(layer, leaves)
        for actual, again, expected in zip(results, gradients(layer, leaves), exact, strict=True):
            assert actual.dtype == dtype
            assert_same_bits(actual, again, "the same from run to run")
            assert (actual.double() - expected).norm() <= most * expected.norm()
        with torch.no_grad():
            assert_close(layer(*leaves).double(), exact[0], rtol=most, atol=most)


@pytest.mark.parametrize("name", ["relu", "gelu_tanh"])
def test_without_inputs_a_layer_is_the_activation_of_its_bias(name):
    x, w, b = (t.detach() for t in layer_inputs(5, 0, 7, torch.bfloat16))
    expected = eager(name, {})(b.double()).expand(5, 7)
    assert_close(F.linear_activation(x, w, b, name).double(), expected, rtol=0.01, atol=0.01)


@every_float
@pytest.mark.parametrize("name", ["relu", "gelu_tanh", "elu"])
def test_nan_stays_nan(name, dtype):
    x, w, b = (t.detach() for t in layer_inputs(64, 64, 128, dtype))
    x[3, 5] = torch.nan
    y = F.linear_activation(x, w, b, name)
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


@pytest.mark.skipif(not mlpext._C.has_cuda(), reason="no CUDA in this build")
@every_float
@pytest.mark.parametrize("name", ["relu", "gelu_tanh", "elu"])
def test_torch_fuses_where_it_can(name, dtype):
    """On a GPU no kernel of ours runs; over the emulator torch's own activation does."""
    tensors = [t.detach() for t in layer_inputs(64, 32, 16, dtype)]
    with torch.profiler.profile() as profile:
        F.linear_activation(*tensors, name)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    seen = {e.key for e in profile.key_averages()}
    if DEVICE == "cuda":
        fused = not any("elementwise_kernel" in key and "mlpext" in key for key in seen)
    else:
        fused = bool(seen & {"aten::_addmm_activation", "aten::gelu"})
    assert fused == torch_fuses(name, dtype), sorted(seen)
