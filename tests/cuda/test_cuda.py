"""Every promise on a GPU: `pytest -m cuda`. Without one, or without CUDA built in, all of it is skipped.

MLPEXT_TEST_DEVICE=cpu runs the tests themselves on a CPU, to see that they are right.
"""

import concurrent.futures
import contextlib
import itertools
import os
import threading
from functools import partial

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
    every_case,
    every_float,
    every_functional_case,
    few_ops,
    linear_op,
    native,
    outcome,
    points,
    ulp,
    values_of,
)

DEVICE = os.environ.get("MLPEXT_TEST_DEVICE", "cuda")
on_gpu = DEVICE != "cuda" or (torch.cuda.is_available() and mlpext._C.has_cuda())
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason="no GPU, or no CUDA in this build")]
on_hopper = not on_gpu or DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0)
gpu_only = pytest.mark.skipif(DEVICE == "cpu", reason="streams and graphs are CUDA's")
OPERATORS = torch.ops.mlpext


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_streams(step, streams=1, times=1):
    """The results of each run of step, on side streams in turn."""
    sides = [torch.cuda.Stream() for _ in range(streams)]
    results = []
    for _ in range(times):
        for stream in sides:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    return results


def in_a_graph(step):
    """The graph, which keeps its memory, and the results of its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    return graph, captured


def here(tensors, **kwargs):
    return [t.detach().to(DEVICE, **kwargs).requires_grad_(t.requires_grad) for t in tensors]


def inputs(op, dtype=torch.float64, seed=0):
    return here(op.inputs(dtype, seed))


def gradients(f, tensors):
    y = f(*tensors)
    g = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], g)]


# ---------------------------------------------------------------- the numbers


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
def test_as_native(op, dtype):
    if "omega=30" in op.id and dtype != torch.float64:
        pytest.skip("rounding z moves sin(30 z) by 30 times as much")
    half = dtype.itemsize == 2
    tensors = inputs(op, dtype)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps} if half else {}
    if dtype == torch.float32:
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in zip(gradients(op.ours, tensors), gradients(op.native, wide), strict=True):
        assert actual.dtype == dtype
        assert_close(actual.double(), expected, op.id, **tolerance)


@pytest.mark.parametrize("name", ["relu", "elu", "gelu", "hardtanh"])
@every_float
def test_large_layers(name, dtype):
    """Several tiles of columns and chunks of rows, and widths that are no multiple of 16 bytes."""
    for rows, n_in, n_out in ((3000, 64, 512), (513, 40, 96), (1000, 16, 37), (20000, 8, 8)):
        tensors = [torch.randn(s) for s in ((rows, n_in), (n_out, n_in), (n_out,))]
        tensors = here([t.requires_grad_() for t in tensors], dtype=dtype)
        tensors = [t.detach().requires_grad_() for t in tensors]
        ours = gradients(lambda *t: F.linear_activation(*t, activation=name), tensors)
        again = gradients(lambda *t: F.linear_activation(*t, activation=name), tensors)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = gradients(lambda *t: native(name, {})(TF.linear(*t)), wide)
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


# ---------------------------------------------------------------- narrow networks


@pytest.fixture
def by_switch(monkeypatch):
    """Calls f with narrow networks layer by layer, and again as one kernel: both results."""

    def both(f):
        results = []
        for choice in "01":
            monkeypatch.setenv("MLPEXT_CUDA_NARROW", choice)
            results.append(f())
        return results

    return both


NARROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_narrow_dtype = pytest.mark.parametrize("dtype", NARROW_DTYPES, ids=lambda d: str(d)[6:])
MIXED = [("gelu", {}), ("elu", {"alpha": 0.5}), ("relu", {}), ("identity", {})]


def narrow_leaves(dtype, widths, rows, bias=True):
    """x, then the weights, then the biases."""
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(o, i) / i**0.5 for i, o in pairs]
    biases = [torch.randn(o) for _, o in pairs] if bias else []
    tensors = [torch.randn(rows, widths[0]), *weights, *biases]
    return here([t.to(dtype).requires_grad_() for t in tensors])


def narrow_results(leaves, cases):
    """The network's output, and the gradients of the leaves that want one."""
    names = ",".join(name for name, _ in cases)
    parameters = [value for case in cases for value in values_of(*case)]
    n = len(cases)

    def network(x, *rest):
        return OPERATORS.mlp(x, rest[:n], rest[n:], names, parameters)

    return gradients(network, leaves)


def narrow_reference(leaves, cases):
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    n = len(cases)

    def network(x, *rest):
        for (name, parameters), weight, bias in itertools.zip_longest(cases, rest[:n], rest[n:]):
            x = native(name, parameters)(TF.linear(x, weight, bias))
        return x

    return gradients(network, leaves)


def assert_narrow(by_switch, leaves, cases):
    """As exact as layer by layer, and the same bits from run to run."""
    layers, whole = by_switch(lambda: narrow_results(leaves, cases))
    for a, b in zip(whole, narrow_results(leaves, cases), strict=True):
        assert_same_bits(a, b, "from run to run")
    least = {4: 1e-5, 2: 1e-2}[leaves[0].element_size()]
    for a, b, exact in zip(whole, layers, narrow_reference(leaves, cases), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
        errors = [(t.double() - exact).norm() for t in (a, b)]
        assert errors[0] <= 2 * errors[1] + least * exact.norm(), (errors, exact.norm())


@every_narrow_dtype
@every_case
def test_narrow_every_activation(by_switch, name, parameters, dtype):
    cases = [(name, parameters), ("softsign", {}), (name, parameters)]
    assert_narrow(by_switch, narrow_leaves(dtype, (17, 40, 33, 9), 200), cases)


@every_narrow_dtype
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 2**14 + 3])
def test_narrow_batches(by_switch, rows, dtype):
    for widths in ((64, 64, 64, 64, 64), (3, 128, 100, 128, 1)):
        assert_narrow(by_switch, narrow_leaves(dtype, widths, rows, bias=rows != 17), MIXED)


@every_narrow_dtype
@pytest.mark.parametrize("first", range(8))
def test_narrow_widths(by_switch, first, dtype):
    """All widths from 1 to 128: each layer of these networks has others."""
    widths = [*range(first + 1, 129, 8)]
    assert_narrow(by_switch, narrow_leaves(dtype, widths, 70), [MIXED[i % 4] for i in range(15)])


@every_narrow_dtype
def test_narrow_frozen(by_switch, dtype):
    leaves = narrow_leaves(dtype, (20, 33, 24, 17, 9), 150)
    for learning in ([0], [3], [8], [1, 4], [2, 3, 7], range(1, 9), [0, 6]):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in learning)
        assert_narrow(by_switch, leaves, MIXED)


@every_narrow_dtype
def test_narrow_output_changed_in_place(by_switch, dtype):
    leaves = narrow_leaves(dtype, (20, 33, 9), 150)

    def run():
        y = OPERATORS.mlp(leaves[0], leaves[1:3], leaves[3:], "gelu,elu", [1.0])
        y += 1
        return torch.autograd.grad(y.square().sum(), leaves)

    for a, b in zip(*by_switch(run), strict=True):
        assert (a - b).norm() <= {4: 1e-5, 2: 2e-2}[dtype.itemsize] * b.norm()


@gpu_only
@every_narrow_dtype
def test_narrow_runs_two_kernels_and_one_for_the_sums(by_switch, dtype):
    leaves = narrow_leaves(dtype, (64, 64, 64, 64, 64), 1000)

    def kernels():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            narrow_results(leaves, MIXED)
            torch.cuda.synchronize()
        return [e.key for e in profile.key_averages() if "narrow" in e.key]

    layers, whole = by_switch(kernels)
    assert not layers
    assert len(whole) == 3 and all(
        any(f"narrow_{part}_kernel" in key for key in whole) for part in ("forward", "backward", "add")
    )


@gpu_only
def test_narrow_in_a_graph(monkeypatch):
    monkeypatch.setenv("MLPEXT_CUDA_NARROW", "1")
    leaves = narrow_leaves(torch.bfloat16, (20, 33, 24, 17, 9), 150)
    step = partial(narrow_results, leaves, MIXED)
    (expected,) = on_streams(step)
    _graph, captured = in_a_graph(step)
    for a, b in zip(captured, expected, strict=True):
        assert_same_bits(a, b)


@gpu_only
def test_narrow_switch():
    x, weights = torch.randn(3, 4, device=DEVICE), [torch.randn(5, 4, device=DEVICE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPEXT_CUDA_NARROW", "yes")
        with pytest.raises(ValueError, match="MLPEXT_CUDA_NARROW='yes'"):
            OPERATORS.mlp(x, weights, [], "relu", [])


@pytest.mark.parametrize(
    "case", ["129 wide", "33 layers", "float64", "maxout", "empty batch", "one row as a vector"]
)
def test_narrow_others_as_layers(by_switch, case):
    """What the kernels do not serve, or serve in another shape: the layers' numbers."""
    dtype = torch.float64 if case == "float64" else torch.float32
    widths = {"129 wide": (4, 129, 3), "33 layers": (2,) * 34}.get(case, (4, 6, 3))
    model = mlpext.nn.MLP(widths, "maxout" if case == "maxout" else "tanh", device=DEVICE, dtype=dtype)
    shape = {"empty batch": (0, widths[0]), "one row as a vector": widths[:1]}.get(case, (2, 5, widths[0]))
    x = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)

    def run():
        y = model(x)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])

    for a, b in zip(*by_switch(run), strict=True):
        assert a.shape == b.shape
        assert_close(a, b, case, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- layouts

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
        natives = torch.autograd.grad(op.native(*tensors), tensors, g)
        for a, e in zip(ours, natives, strict=True):
            assert_close(a, e, op.id)


@gpu_only
def test_beyond_two_billion_elements():
    n = 2**31 + 77
    x = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    x[-100:] = torch.linspace(-3, 3, 100, device=DEVICE)
    assert_same_bits(F.elu(x)[-100:], F.elu(x[-100:].clone()))


# ---------------------------------------------------------------- derivatives


@all_ops
def test_first_and_second_order(op):
    assert gradcheck(op, inputs(op), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(op, inputs(op), check_fwd_over_rev=True)


@few_ops
def test_frozen_inputs(op):
    tensors = inputs(op)
    for free in range(len(tensors)):
        assert gradcheck(op, [t if i == free else t.detach() for i, t in enumerate(tensors)])


# ---------------------------------------------------------------- compile, autocast, devices, streams, graphs


@default_ops
def test_compile(op, fresh_dynamo):
    tensors = inputs(op, torch.float32)
    compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    for a, e in zip(gradients(compiled, tensors), gradients(op.native, tensors), strict=True):
        assert_close(a, e, op.id, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@few_ops
def test_autocast(op, dtype):
    tensors = inputs(op, torch.float32)
    with torch.autocast(DEVICE, dtype):
        ours, natives = gradients(op.ours, tensors), gradients(op.native, tensors)
    for a, e in zip(ours, natives, strict=True):
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
def test_on_a_side_stream_and_in_a_graph():
    op = linear_op("gelu", {})
    tensors = inputs(op, torch.float32)
    expected = gradients(op.ours, tensors)
    g = torch.linspace(-1, 2, expected[0].numel(), device=DEVICE).view(expected[0].shape)

    def step():
        y = op(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, g)]

    (side,) = on_streams(step)
    _graph, captured = in_a_graph(step)
    for e, s, c in zip(expected, side, captured, strict=True):
        assert_same_bits(s, e, "side stream")
        assert_same_bits(c, e, "graph")


@gpu_only
def test_kernels_of_ours_run():
    """Not native's: the profiler sees the kernels by name."""
    x = torch.randn(1000, device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        F.elu(x)
        torch.cuda.synchronize()
    assert any("elementwise_kernel" in e.key and "mlpext" in e.key for e in profile.key_averages())


# ---------------------------------------------------------------- epilogues of cuBLASLt and CUTLASS

needs_switch = pytest.mark.skipif(not mlpext._C.has_cuda(), reason="no CUDA in this build")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@contextlib.contextmanager
def switches(cublaslt, cutlass):
    """Gives a function that turns these on or off, and turns them on. A build without CUDA has none."""
    if cutlass and mlpext._C.has_cuda() and not mlpext._C.has_cutlass():
        pytest.skip("no CUTLASS in this build")
    before = mlpext._C.cublaslt(), mlpext._C.cutlass()

    def turn(on, wanted=(cublaslt, cutlass)):
        if mlpext._C.has_cuda():
            mlpext._C.set_cublaslt(on and wanted[0])
        if mlpext._C.has_cutlass():
            mlpext._C.set_cutlass(on and wanted[1])

    turn(True)
    yield turn
    turn(True, before)


@pytest.fixture
def cublaslt():
    with switches(True, False) as turn:
        yield turn


@pytest.fixture
def cutlass():
    with switches(False, True) as turn:
        yield turn


@pytest.fixture(params=[(True, False), (False, True)], ids=["cuBLASLt", "CUTLASS"])
def epilogues(request):
    with switches(*request.param) as turn:
        yield turn


def grows(count, call, *arguments):
    """Calls it, and fails unless a library serves something new."""
    before = count()
    result = call(*arguments)
    assert count() != before, "no epilogue was used"
    return result


def chain(names, bias=True):
    """A network as a function of x, its weights and its biases."""
    count = len(names)
    parameters = [value for name in names if name != "maxout" for value in values_of(name, {})]

    def call(x, *tensors):
        weights, biases = tensors[:count], tensors[count:] if bias else []
        return OPERATORS.mlp(x, weights, biases, ",".join(names), parameters)

    def wide(x, *tensors):
        for i, name in enumerate(names):
            b = tensors[count + i] if bias else None
            w = tensors[i]
            x = F.linear_maxout(x, w, b) if name == "maxout" else native(name, {})(TF.linear(x, w, b))
        return x

    return call, wide


def chain_inputs(names, sizes, dtype, bias=True, rows=96):
    x = torch.randn(rows, sizes[0])
    pairs = list(zip(names, sizes[:-1], sizes[1:], strict=True))
    stacks = [(2,) if name == "maxout" else () for name in names]
    weights = [torch.randn(*s, n, m) / m**0.5 for s, (_, m, n) in zip(stacks, pairs, strict=True)]
    biases = [torch.randn(*s, n) for s, (_, _, n) in zip(stacks, pairs, strict=True)] if bias else []
    return [t.to(DEVICE, dtype).requires_grad_() for t in (x, *weights, *biases)]


def assert_near(actual, exact, what, most=0.12):
    """By norms: in 16 bits some z are rounded to the other side of a kink, which moves gradients by 7 %."""
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        error = (a.double() - e).norm()
        assert error <= most * e.norm(), (what, i, error)


def widened(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


@HALF
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("name", ["identity", "relu", "gelu_tanh", "sigmoid", "elu", "silu"])
def test_epilogues_of_a_layer(name, bias, dtype, epilogues):
    """Also where the library may refuse: rows of z, leading dimensions and addresses that are odd."""
    for rows, n_in, n_out in ((512, 256, 128), (1, 64, 32), (77, 33, 20), (300, 8, 7)):
        x, w, b = chain_inputs([name], [n_in, n_out], dtype, rows=rows)
        tensors = [x, w, b][: 2 + bias]
        ours = lambda *t: F.linear_activation(*t, activation=name)  # noqa: E731
        again = gradients(ours, tensors)
        exact = gradients(lambda *t: native(name, {})(TF.linear(*t)), widened(tensors))
        for a, e in zip(gradients(ours, tensors), again, strict=True):
            assert_same_bits(a, e, "the same from run to run")
        assert_near(again, exact, (name, rows, n_in, n_out))
        shifted = [
            torch.cat([t.detach().flatten()[:1], t.detach().flatten()])[1:].view_as(t) for t in tensors
        ]
        turned = [x.detach().t().contiguous().t(), w.detach().t().contiguous().t(), *tensors[2:]]
        for others in (shifted, turned):
            others = [t.detach().requires_grad_() for t in others]
            assert_near(gradients(ours, others), exact, (name, rows, n_in, n_out, "layout"))


CHAINS = {
    "relu": (["relu", "relu", "identity"], [64, 128, 96, 40]),
    "gelu_tanh": (["gelu_tanh", "gelu_tanh", "identity"], [64, 128, 96, 40]),
    "mixed": (["relu", "gelu_tanh", "tanh", "relu", "relu"], [64, 128, 96, 64, 128, 32]),
    "maxout above and below": (["relu", "maxout", "relu", "gelu_tanh", "maxout"], [64, 128, 96, 64, 32, 16]),
    "others": (["silu", "elu", "sigmoid", "leaky_relu", "mish"], [64, 128, 96, 64, 128, 40]),
    "odd widths": (["relu", "gelu_tanh", "relu", "identity"], [33, 100, 20, 7, 5]),
}


@HALF
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("case", CHAINS)
def test_epilogues_in_a_network(case, bias, dtype, epilogues):
    names, sizes = CHAINS[case]
    call, wide = chain(names, bias)
    tensors = chain_inputs(names, sizes, dtype, bias)
    exact = gradients(wide, widened(tensors))
    assert_near(gradients(call, tensors), exact, case)
    deep = [tensors[0].detach().view(4, 8, 3, -1).requires_grad_(), *tensors[1:]]
    results = gradients(call, deep)
    assert results[0].shape == (4, 8, 3, sizes[-1])
    for free in range(len(tensors)):  # what is frozen has no gradient, and the rest the same one
        some = [t.detach().requires_grad_(i == free) for i, t in enumerate(tensors)]
        assert_near(gradients(call, some)[1:], [exact[1 + free]], (case, free))


@needs_switch
def test_the_switch_may_change_between_forward_and_backward(epilogues):
    names, sizes = CHAINS["mixed"]
    call, wide = chain(names)
    tensors = chain_inputs(names, sizes, torch.bfloat16)
    exact = gradients(wide, widened(tensors))
    for forward, backward in ((True, False), (False, True)):
        epilogues(forward)
        y = call(*tensors)
        epilogues(backward)
        g = torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape).to(y.dtype)
        assert_near([y, *torch.autograd.grad(y, tensors, g)], exact, (forward, backward))


@needs_switch
@pytest.mark.parametrize("name", ["identity", "relu", "gelu_tanh"])
def test_epilogues_are_used(name, cublaslt):
    """Otherwise everything here would only test the other path. Shapes that no other test has."""
    served = partial(grows, mlpext._C.cublaslt_plans)
    x, w, b = chain_inputs([name], [136, 264], torch.bfloat16, rows=200)
    y = served(lambda: F.linear_activation(x, w, b, activation=name))
    if name == "identity":
        served(torch.autograd.grad, y, [w, b], torch.ones_like(y))
    else:
        call, _ = chain([name, "tanh"])
        tensors = chain_inputs([name, "tanh"], [72, 136, 264], torch.bfloat16)
        y = served(call, *tensors)
        served(torch.autograd.grad, y, tensors[:2], torch.ones_like(y))


@needs_switch
@pytest.mark.skipif(not on_hopper, reason="CUTLASS's kernels are for sm_90")
@every_functional_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_cutlass_of_every_activation(name, parameters, dtype, cutlass):
    """In the layer's own product, and its derivative in that of the layer above, with the bias' gradient."""
    values = values_of(name, parameters)
    if not mlpext._C.has_kernel(name, tuple(values)):
        pytest.skip("native's")
    call = lambda x, w, v, b, c: OPERATORS.mlp(x, [w, v], [b, c], f"{name},identity", values)  # noqa: E731
    x, *pairs = chain_inputs(["tanh", "identity"], [72, 136, 264], dtype, rows=200)
    tensors = [x, *pairs]
    served = partial(grows, mlpext._C.cutlass_calls)
    y = served(call, *tensors)
    g = torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape)
    results = served(torch.autograd.grad, y, tensors, g.to(dtype))
    wide = widened(tensors)
    exact = TF.linear(native(name, parameters)(TF.linear(wide[0], wide[1], wide[3])), wide[2], wide[4])
    wanted = torch.autograd.grad(exact, wide, g.to(dtype).double())
    assert_near([y, *results], [exact, *wanted], (name, parameters))


@pytest.mark.parametrize("names", [["relu", "tanh"], ["gelu_tanh", "silu", "identity"]], ids=str)
def test_derivatives_with_epilogues_on(names, epilogues):
    """float64 is served by the other path; in 16 bits a graph of the backward goes forward again."""
    call, wide = chain(names)
    tensors = chain_inputs(names, [4, *[6] * len(names)], torch.float64, rows=2)
    assert gradcheck(call, tensors) and gradgradcheck(call, tensors)

    def second(f, tensors):
        (slope,) = torch.autograd.grad(f(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), tensors)

    half = chain_inputs(names, [16, *[32] * len(names)], torch.bfloat16)
    assert_near(second(call, half), second(wide, widened(half)), names, most=0.1)


@pytest.mark.parametrize("name", ["relu", "gelu_tanh", "identity", "elu"])
def test_nan_stays_nan_with_epilogues(name, epilogues):
    x, w, b = (t.detach() for t in chain_inputs([name], [64, 128], torch.bfloat16, rows=64))
    x[3, 5] = torch.nan
    y = F.linear_activation(x, w, b, activation=name)
    assert y[3].isnan().all() and not y[:3].isnan().any() and not y[4:].isnan().any()


@gpu_only
def test_epilogues_in_graphs_streams_and_without_synchronisation(epilogues):
    """The plans of a shape are made in the capture itself."""
    names = ["relu", "gelu_tanh", "silu", "identity"]
    call, _ = chain(names)
    tensors = chain_inputs(names, [64, 144, 80, 96, 48], torch.bfloat16, rows=168)
    g = torch.randn(168, 48, device=DEVICE).to(torch.bfloat16)

    def step():
        y = call(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, g)]

    other = chain_inputs(names, [64, 144, 80, 96, 48], torch.bfloat16, rows=8)
    gradients(call, other)  # the library's own start, with another shape
    _graph, captured = in_a_graph(step)
    with no_synchronisation():
        expected = step()
    for results in (captured, *on_streams(step, streams=2, times=20)):
        for a, e in zip(results, expected, strict=True):
            assert_same_bits(a, e)


@needs_switch
def test_threads_share_the_plans(cublaslt):
    """More shapes than are held, from four threads: the plans are forgotten and made again all the time."""
    x, w, b = (t.detach() for t in chain_inputs(["relu"], [16, 32], torch.bfloat16, rows=320))
    expected = [F.linear_activation(x[:rows], w, b, activation="relu") for rows in range(1, 321)]
    assert 0 < mlpext._C.cublaslt_plans() <= 256

    def work(first):
        for i in range(320):
            rows = (first + i) % 320 + 1
            y = F.linear_activation(x[:rows], w, b, activation="relu")
            assert_same_bits(y, expected[rows - 1])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, 80 * t) for t in range(4)]:
            future.result()
    assert mlpext._C.cublaslt_plans() <= 256


# ---------------------------------------------------------------- linear + maxout in Triton


@pytest.fixture
def triton(monkeypatch):
    """The switch on; counts the calls of the kernel. A build without CUDA has no switch."""
    if not mlpext._C.has_cuda():
        yield lambda: 0
        return
    module = pytest.importorskip("mlpext._triton")
    calls, launch = [], module.linear_maxout
    turn = threading.Lock() if DEVICE == "cpu" else contextlib.nullcontext()  # the interpreter has one state

    def counted(*given):
        calls.append(1)
        with turn:
            launch(*given)

    monkeypatch.setattr(module, "linear_maxout", counted)
    before = mlpext._C.triton()
    mlpext._C.set_triton(True)
    yield lambda: len(calls)
    mlpext._C.set_triton(before)


def maxout_inputs(dtype, rows, n_in, n_out, pieces, bias=True):
    """-1, 0 and 1: every sum is exact, with ties in plenty, so that the winner is never in doubt."""
    shapes = ((rows, n_in), (pieces, n_out, n_in), (pieces, n_out))[: 2 + bias]
    return here([torch.randint(-1, 2, s).to(dtype).requires_grad_() for s in shapes])


def by_passes(f, *arguments):
    if mlpext._C.has_cuda():
        mlpext._C.set_triton(False)
    result = f(*arguments)
    if mlpext._C.has_cuda():
        mlpext._C.set_triton(True)
    return result


@HALF
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_triton_as_by_passes(pieces, bias, dtype, triton):
    """The bits of y, the index and so the gradients; from run to run as well."""
    for rows, n_in, n_out in ((128, 64, 128), (300, 72, 50), (1100, 33, 131)):
        tensors = maxout_inputs(dtype, rows, n_in, n_out, pieces, bias)
        parts = [*(t.detach() for t in tensors), *([] if bias else [None])]
        for function in (OPERATORS.linear_maxout_forward, lambda *t: [OPERATORS.linear_maxout(*t)]):
            for a, again, b in zip(
                function(*parts), function(*parts), by_passes(function, *parts), strict=True
            ):
                assert torch.equal(a, b) and a.dtype == b.dtype and torch.equal(a, again)
        deep = [tensors[0].detach().view(1, rows, n_in).requires_grad_(), *tensors[1:]]
        for leaves in (tensors, deep):
            ours, passes = gradients(F.linear_maxout, leaves), by_passes(gradients, F.linear_maxout, leaves)
            for a, b in zip(ours, passes, strict=True):
                assert_same_bits(a, b)


@HALF
def test_triton_layouts(dtype, triton):
    x, w, b = (t.detach() for t in maxout_inputs(dtype, 70, 40, 24, 3))
    expected = OPERATORS.linear_maxout_forward(x, w, b)
    turned = (
        x.t().contiguous().t(),
        w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        b.t().contiguous().t(),
    )
    stepped = (x.repeat_interleave(2, -1)[:, ::2], w.repeat_interleave(2, 1)[:, ::2], b)
    shifted = tuple(torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t) for t in (x, w, b))
    for tensors in (turned, stepped, shifted):
        for a, e in zip(OPERATORS.linear_maxout_forward(*tensors), expected, strict=True):
            assert torch.equal(a, e)


@needs_switch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_triton_is_used_and_what_it_leaves(dtype, triton):
    F.linear_maxout(*maxout_inputs(dtype, 5, 8, 6, 2))
    assert triton() == 1
    OPERATORS.mlp(*(lambda x, w, b: (x, [w], [b], "maxout", []))(*maxout_inputs(dtype, 5, 8, 6, 2)))
    assert triton() == 2
    for other in (torch.float32, torch.float64):
        F.linear_maxout(*maxout_inputs(other, 5, 8, 6, 2))
    for sizes in ((0, 8, 6, 2), (5, 0, 6, 2), (5, 8, 0, 2), (5, 8, 6, 257)):
        rows, _, n_out, _ = sizes
        assert F.linear_maxout(*maxout_inputs(dtype, *sizes)).shape == (rows, n_out)
    with pytest.raises(RuntimeError, match="weight: dtype"):
        F.linear_maxout(torch.zeros(3, 4, device=DEVICE, dtype=dtype), torch.zeros(2, 5, 4, device=DEVICE))
    assert triton() == 2
    mlpext._C.set_triton(False)
    F.linear_maxout(*maxout_inputs(dtype, 5, 8, 6, 2))
    assert triton() == 2


@needs_switch
def test_triton_raises_what_it_raises(triton, monkeypatch):
    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(mlpext._triton, "linear_maxout", fails)
    for call in (F.linear_maxout, OPERATORS.linear_maxout):
        with pytest.raises(OSError, match="no room"):
            call(*maxout_inputs(torch.float16, 5, 8, 6, 2))


@HALF
def test_triton_nan_wins(dtype, triton):
    for piece in range(3):
        x, w, b = (t.detach() for t in maxout_inputs(dtype, 20, 16, 9, 3))
        w[piece, 4] = torch.nan
        y, index = OPERATORS.linear_maxout_forward(x, w, b)
        assert y.isnan().sum() == 20 and y[:, 4].isnan().all() and (index[:, 4] == piece).all()


@HALF
def test_triton_in_threads_and_backward(dtype, triton):
    """Forward also runs on autograd's own threads, without Python's lock: in a checkpoint, for one."""
    tensors = maxout_inputs(dtype, 70, 40, 24, 2)
    expected = gradients(F.linear_maxout, tensors)

    def work(_):
        again = torch.utils.checkpoint.checkpoint
        return gradients(lambda *t: again(F.linear_maxout, *t, use_reentrant=False), tensors)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(8)):
            for a, e in zip(results, expected, strict=True):
                assert_same_bits(a, e)


@gpu_only
def test_triton_in_graphs_streams_and_without_synchronisation(triton):
    """The kernel of these sizes is compiled and loaded in the capture itself."""
    tensors = maxout_inputs(torch.bfloat16, 300, 80, 56, 7)
    g = torch.randn(300, 56, device=DEVICE).to(torch.bfloat16)

    def step():
        y = F.linear_maxout(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, g)]

    by_passes(step)  # cuBLAS' own start
    _graph, captured = in_a_graph(step)
    with no_synchronisation():
        expected = step()
    for results in (captured, *on_streams(step)):
        for a, e in zip(results, expected, strict=True):
            assert_same_bits(a, e)


@gpu_only
def test_triton_beyond_two_billion_elements(triton):
    rows, n_out = 2**20 + 3, 2100
    x, w, b = (t.detach() for t in maxout_inputs(torch.float16, rows, 16, n_out, 2))
    y, index = OPERATORS.linear_maxout_forward(x, w, b)
    last = OPERATORS.linear_maxout_forward(x[-100:], w, b)
    assert torch.equal(y[-100:], last[0]) and torch.equal(index[-100:], last[1])
    apart = torch.empty(2**31 + 64, dtype=x.dtype, device=DEVICE).as_strided((2, 16), (2**31 + 8, 1))
    assert torch.equal(F.linear_maxout(apart.copy_(x[:2]), w, b), F.linear_maxout(x[:2], w, b))
    assert triton() == 4
