"""Narrow networks (csrc/cuda/experimental/narrow) on a GPU: `pytest -m cuda`."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as TF

import mlpext
from common import assert_close, assert_same_bits, eager, every_case, indices, values_of
from cuda_common import DEVICE, OPERATORS, gpu_only, gradients, here, in_a_graph, needs_gpu, on_a_side_stream

pytestmark = needs_gpu


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
    activations = indices(name for name, _ in cases)
    parameters = [value for case in cases for value in values_of(*case)]
    n = len(cases)

    def network(x, *rest):
        return OPERATORS.mlp(x, rest[:n], rest[n:], activations, parameters)

    return gradients(network, leaves)


def narrow_reference(leaves, cases):
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    n = len(cases)

    def network(x, *rest):
        for (name, parameters), weight, bias in itertools.zip_longest(cases, rest[:n], rest[n:]):
            x = eager(name, parameters)(TF.linear(x, weight, bias))
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
def test_every_activation(by_switch, name, parameters, dtype):
    cases = [(name, parameters), ("softsign", {}), (name, parameters)]
    assert_narrow(by_switch, narrow_leaves(dtype, (17, 40, 33, 9), 200), cases)


@every_narrow_dtype
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 2**14 + 3])
def test_batches(by_switch, rows, dtype):
    for widths in ((64, 64, 64, 64, 64), (3, 128, 100, 128, 1)):
        assert_narrow(by_switch, narrow_leaves(dtype, widths, rows, bias=rows != 17), MIXED)


@every_narrow_dtype
@pytest.mark.parametrize("first", range(8))
def test_widths(by_switch, first, dtype):
    """All widths from 1 to 128: each layer of these networks has others."""
    widths = [*range(first + 1, 129, 8)]
    assert_narrow(by_switch, narrow_leaves(dtype, widths, 70), [MIXED[i % 4] for i in range(15)])


@every_narrow_dtype
def test_frozen(by_switch, dtype):
    leaves = narrow_leaves(dtype, (20, 33, 24, 17, 9), 150)
    for learning in ([0], [3], [8], [1, 4], [2, 3, 7], range(1, 9), [0, 6]):
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in learning)
        assert_narrow(by_switch, leaves, MIXED)


@every_narrow_dtype
def test_output_changed_in_place(by_switch, dtype):
    leaves = narrow_leaves(dtype, (20, 33, 9), 150)

    def run():
        y = OPERATORS.mlp(leaves[0], leaves[1:3], leaves[3:], indices(["gelu", "elu"]), [1.0])
        y += 1
        return torch.autograd.grad(y.square().sum(), leaves)

    for a, b in zip(*by_switch(run), strict=True):
        assert (a - b).norm() <= {4: 1e-5, 2: 2e-2}[dtype.itemsize] * b.norm()


@gpu_only
@every_narrow_dtype
def test_runs_two_kernels_and_one_for_the_sums(by_switch, dtype):
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
def test_in_a_graph(monkeypatch):
    monkeypatch.setenv("MLPEXT_CUDA_NARROW", "1")
    leaves = narrow_leaves(torch.bfloat16, (20, 33, 24, 17, 9), 150)
    step = partial(narrow_results, leaves, MIXED)
    expected = on_a_side_stream(step)
    _graph, captured = in_a_graph(step)
    for a, b in zip(captured, expected, strict=True):
        assert_same_bits(a, b)


@gpu_only
def test_switch():
    x, weights = torch.randn(3, 4, device=DEVICE), [torch.randn(5, 4, device=DEVICE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLPEXT_CUDA_NARROW", "yes")
        with pytest.raises(ValueError, match="MLPEXT_CUDA_NARROW='yes'"):
            OPERATORS.mlp(x, weights, [], indices(["relu"]), [])


@pytest.mark.parametrize(
    "case", ["129 wide", "33 layers", "float64", "maxout", "empty batch", "one row as a vector"]
)
def test_others_as_layers(by_switch, case):
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
