"""What csrc/cuda/cutlass.cpp asks of CUTLASS's kernels, and what their epilogues compute, on the CPU.

The products are a stand-in's (tests/cuda_emulator/cutlass_launchers.cpp); the epilogues' formulas and the
choice of one at run time are the kernels' own. That the kernels compile, `make cutlass-check` sees.
"""

import sys

import numpy as np
import pytest
import torch

import mlpext
import reference
from common import FLOATS, NAMES, every_case, values_of
from test_cublaslt_emulated import LAYOUTS, Matrix, every_layout, every_size, half_types
from test_cuda_emulated import EMULATOR, SANITIZED, Fault, build, poison, two

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux")

PROGRAM = {"sources": ("cutlass.cpp", str(EMULATOR / "cutlass_launchers.cpp")), "main": "cutlass.cpp"}
TILE, STRIPS = 128, 4


@pytest.fixture(scope="module")
def kernels():
    return Kernels(build("cutlass", *SANITIZED, **PROGRAM))


def round_up(n, step):
    return (n + step - 1) // step * step


class Kernels:
    def __init__(self, emulator, before=""):
        self.emulator, self.before = emulator, before

    def ask(self, request, sizes, name, parameters, a, b, tensors, offset=0):
        """Whether the kernels serve it, and what the tensors hold afterwards."""
        words = [*sizes, NAMES.index(name), *two(name, parameters), *a.strides, *b.strides]
        tensors = [a.memory, b.memory, *tensors, torch.full((1,), -1)]
        results = self.emulator(self.before + request, a.memory.dtype, words, tensors, offset)
        return bool(results[-1].item()), results[2:-1]

    def forward(self, name, parameters, x, w, bias, keep=False, offset=0):
        y = poison(torch.empty(len(x.tensor), len(w.tensor), dtype=x.memory.dtype))
        tensors = [bias, y, poison(y) if keep else None]
        sizes = (*x.tensor.shape, len(w.tensor))
        served, (_, y, z) = self.ask("forward", sizes, name, parameters, x, w, tensors, offset)
        return served, y, z

    def input_gradient(self, name, parameters, dz, w, kept, with_sums=True):
        rows, n_in = len(dz.tensor), w.tensor.shape[1]
        dx = poison(torch.empty(rows, n_in, dtype=dz.memory.dtype))
        shape = (round_up(rows, TILE) // TILE * STRIPS, round_up(n_in, TILE))
        sums = poison(torch.empty(shape)) if with_sums else None
        sizes = (rows, n_in, len(w.tensor))
        served, (_, dx, sums) = self.ask("input_gradient", sizes, name, parameters, dz, w, [kept, dx, sums])
        return served, dx, None if sums is None else sums[:, :n_in]


def assert_near(actual, expected, dtype):
    """Nearly one rounding: exp and division are approximations in 16 bits."""
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0.55 * eps, atol=5e-5)


def keeps_output(name, parameters):
    """What a layer in 16 bits keeps."""
    if name == "leaky_relu":
        return values_of(name, parameters)[0] >= 0
    return name in ("sigmoid", "tanh", "relu")


# ---------------------------------------------------------------- the numbers


@half_types
@every_case
def test_every_activation(kernels, name, parameters, dtype):
    if not mlpext._C.usual(name, values_of(name, parameters)):
        pytest.skip("native's")
    x, w, bias = Matrix(150, 16, dtype), Matrix(24, 16, dtype), torch.randn(24).to(dtype)
    served, y, z = kernels.forward(name, parameters, x, w, bias, keep=True)
    exact = reference.linear(x.values, w.values, bias.double().numpy())
    assert served
    assert_near(y, reference.fast(name, parameters, exact)[0], dtype)
    assert_near(z, exact, dtype)

    above, dz = Matrix(8, 24, dtype), Matrix(150, 8, dtype)
    kept = y if keeps_output(name, parameters) else z
    served, dx, sums = kernels.input_gradient(name, parameters, dz, above, kept)
    assert served
    held = kept.double().numpy()
    slope = {
        "sigmoid": lambda: held * (1 - held),
        "tanh": lambda: 1 - held * held,
    }.get(name, lambda: reference.fast(name, parameters, held)[1])()
    delta = dz.values @ above.values * slope
    assert_near(dx, delta, dtype)
    np.testing.assert_allclose(sums.double().sum(0).numpy(), delta.sum(0), rtol=1e-4, atol=1e-4)


@half_types
@every_size
def test_sizes(kernels, sizes, dtype):
    rows, n_in, n_out = sizes
    x, w = Matrix(rows, n_in, dtype), Matrix(n_out, n_in, dtype)
    dz = Matrix(rows, n_out, dtype)
    serves = n_in % 8 == 0 and n_out % 8 == 0
    for bias in (None, torch.randn(n_out).to(dtype)):
        z = reference.linear(x.values, w.values, None if bias is None else bias.double().numpy())
        served, y, _ = kernels.forward("silu", {}, x, w, bias)
        assert served == serves
        if serves:
            assert_near(y, reference.fast("silu", {}, z)[0], dtype)
    kept = torch.randn(rows, n_in).to(dtype)
    for with_sums in (False, True):
        served, dx, sums = kernels.input_gradient("mish", {}, dz, w, kept, with_sums)
        assert served == serves
        if serves:
            delta = dz.values @ w.values * reference.fast("mish", {}, kept.double().numpy())[1]
            assert_near(dx, delta, dtype)
        if serves and with_sums:
            np.testing.assert_allclose(sums.double().sum(0).numpy(), delta.sum(0), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what the kernels are not asked for


@every_layout
def test_layouts(kernels, layout):
    """By rows, and rows a multiple of 16 bytes apart."""
    for padding, serves in ((0, True), (8, True), (3, False)):
        options = {**LAYOUTS[layout], "padding": padding}
        x, w = Matrix(40, 16, torch.float16, **options), Matrix(24, 16, torch.float16, **options)
        served, y, _ = kernels.forward("elu", {}, x, w, None)
        assert served == (serves and not options.get("transposed"))
        if served:
            z = reference.linear(x.values, w.values, None)
            assert_near(y, reference.fast("elu", {}, z)[0], torch.float16)


def test_other_dtypes_and_empty_matrices(kernels):
    for dtype in FLOATS:
        for sizes in ((4, 8, 16), (0, 8, 16), (4, 0, 16)):
            x, w = Matrix(sizes[0], sizes[1], dtype), Matrix(sizes[2], sizes[1], dtype)
            served = dtype.itemsize == 2 and 0 not in sizes
            assert kernels.forward("tanh", {}, x, w, None)[0] == served, (dtype, sizes)


@half_types
def test_addresses(kernels, dtype):
    """Of all but the bias."""
    x, w, bias = Matrix(4, 8, dtype), Matrix(16, 8, dtype), torch.randn(16).to(dtype)
    for elements in (1, 4, 8):
        for i in range(5):  # x, w, bias, y, z
            offset = [elements * (i == j) for j in range(6)]
            served, *_ = kernels.forward("tanh", {}, x, w, bias, keep=True, offset=offset)
            assert served == (elements == 8 or i == 2)


def test_other_gpus(kernels):
    x, w = Matrix(4, 8, torch.float16), Matrix(16, 8, torch.float16)
    for capability, served in (("8 0", False), ("9 0", True), ("10 0", False), ("12 0", False)):
        other = Kernels(kernels.emulator, f"capability {capability}\n")
        assert other.forward("tanh", {}, x, w, None)[0] == served


@pytest.mark.skipif(mlpext._C.has_cutlass(), reason="CUTLASS is in this build")
def test_a_build_without_the_kernels():
    mlpext._C.set_cutlass(False)
    with pytest.raises(RuntimeError, match=r"set_cutlass: this build of mlpext has no mlpext\._cutlass"):
        mlpext._C.set_cutlass(True)


# ---------------------------------------------------------------- what these tests can see


FAULTS = {
    "another activation": ("activation_info.h", "index < middle", "index <= middle"),
    "leading dimensions of any size": ("cuda/cutlass.cpp", "found->ld % step == 0 && ", ""),
    "transposes taken": ("cuda/cutlass.cpp", "!found->transposed && ", ""),
    "any address of an operand": ("cuda/cutlass.cpp", " && aligned(matrix.data)", ""),
    "any address of y": ("cuda/cutlass.cpp", "!aligned(product.d) || ", ""),
    "any address of z": ("cuda/cutlass.cpp", "!aligned(product.aux) || ", ""),
    "any GPU": ("cuda/cutlass.cpp", " || !is_sm90(sizes.device)", ""),
    "f' from z where y is kept": (
        "cuda/cutlass/epilogue.h",
        "HasDerivativeFromOutput<A> && !A::coarse_in_half",
        "false",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    planted = Kernels(build(f"cutlass_{fault.replace(' ', '_')}", plant=FAULTS[fault], **PROGRAM))
    with pytest.raises((AssertionError, Fault)):
        ask_for_everything(planted)


def test_nothing_is_caught_without_a_fault(kernels):
    ask_for_everything(kernels)


def ask_for_everything(kernels):
    for name in NAMES:
        test_every_activation(kernels, name, {}, torch.bfloat16)
    for layout in LAYOUTS:
        test_layouts(kernels, layout)
    test_addresses(kernels, torch.float16)
    test_other_gpus(kernels)
