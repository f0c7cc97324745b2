"""What csrc/cuda/cublaslt.cpp asks of cuBLASLt, answered on the CPU by tests/cuda_emulator/cublasLt.h.

That header follows NVIDIA's documentation, naively; what the library itself makes of a request, and whether
it has an algorithm for it, only a GPU can say (tests/test_cuda.py).
"""

import sys

import numpy as np
import pytest
import torch

import reference
from common import FLOATS
from test_cuda_emulated import RACES, SANITIZED, Fault, build, poison

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux")

PROGRAM = {"sources": ("cublaslt.cpp",), "main": "cublaslt.cpp"}
NAMES = ("identity", "relu", "gelu_tanh")
NOT_ASKED, NO_ALGORITHM, DONE = range(3)
RELU_BIAS = 2 | 4
SIZES = [(5, 8, 24), (1, 40, 136), (7, 1, 8), (64, 130, 72)]  # rows, in_features, out_features

half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
every_size = pytest.mark.parametrize("sizes", SIZES, ids=str)


@pytest.fixture(scope="module")
def library():
    return Library(build("cublaslt", *SANITIZED, **PROGRAM))


class Matrix:
    """(rows, columns) of random values in memory of their own, by rows or, `transposed`, by columns."""

    def __init__(self, rows, columns, dtype, padding=0, transposed=False):
        down, across = (columns, rows) if transposed else (rows, columns)
        ld = across + padding
        self.memory = torch.randn(max(0, (down - 1) * ld + across)).to(dtype)
        self.strides = (1, ld) if transposed else (ld, 1)
        self.tensor = self.memory.as_strided((rows, columns), self.strides)

    @property
    def values(self):
        return self.tensor.double().numpy()


class Library:
    def __init__(self, emulator, before=""):
        self.emulator, self.before = emulator, before

    def ask(self, request, sizes, activation, a, b, tensors, offset=0):
        """What happened, and what the tensors hold afterwards."""
        words = [*sizes, NAMES.index(activation), *a.strides, *b.strides]
        tensors = [a.memory, b.memory, *tensors, torch.full((1,), -1)]
        results = self.emulator(self.before + request, a.memory.dtype, words, tensors, offset)
        return results[-1].item(), results[2:-1]

    def forward(self, name, x, w, bias, keep=False, offset=0):
        sizes = (*x.tensor.shape, len(w.tensor))
        dtype = x.memory.dtype
        y, aux = poison(torch.empty(sizes[0], sizes[2], dtype=dtype)), None
        if keep and name == "relu":
            aux = poison(torch.empty(sizes[0], (sizes[2] + 127) // 128 * 16, dtype=torch.uint8))
        elif keep:
            aux = poison(y)
        outcome, (_, y, aux) = self.ask("forward", sizes, name, x, w, [bias, y, aux], offset)
        return outcome, y, aux

    def input_gradient(self, name, dz, w, aux, with_sums=True):
        sizes = (len(dz.tensor), w.tensor.shape[1], len(w.tensor))
        dx = poison(torch.empty(sizes[:2], dtype=dz.memory.dtype))
        db = poison(dx[0]) if with_sums else None
        outcome, (_, dx, db) = self.ask("input_gradient", sizes, name, dz, w, [aux, dx, db])
        return outcome, dx, db

    def weight_gradient(self, dz, x):
        sizes = (*x.tensor.shape, dz.tensor.shape[1])
        dw = poison(torch.empty(sizes[2], sizes[1], dtype=x.memory.dtype))
        db = poison(torch.empty(sizes[2], dtype=x.memory.dtype))
        outcome, (dw, db) = self.ask("weight_gradient", sizes, "identity", dz, x, [dw, db])
        return outcome, dw, db


def assert_rounded_once(actual, expected):
    eps = torch.finfo(actual.dtype).eps
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=eps / 2 * 1.001, atol=1e-7)


LAYOUTS = {
    "dense": {},
    "odd leading dimensions": {"padding": 3},
    "transposed": {"transposed": True},
    "transposed, odd leading dimensions": {"transposed": True, "padding": 5},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


# ---------------------------------------------------------------- the numbers


@half_types
@every_size
@every_layout
@pytest.mark.parametrize("name", NAMES)
def test_forward(library, name, layout, sizes, dtype):
    rows, n_in, n_out = sizes
    x, w = Matrix(rows, n_in, dtype, **LAYOUTS[layout]), Matrix(n_out, n_in, dtype, **LAYOUTS[layout])
    for bias in (None, torch.randn(n_out).to(dtype)):
        z = reference.linear(x.values, w.values, None if bias is None else bias.double().numpy())
        for keep in (False, True) if name != "identity" else (False,):
            outcome, y, aux = library.forward(name, x, w, bias, keep)
            assert outcome == DONE
            assert_rounded_once(y, reference.fast(name, {}, z)[0])
            if keep and name == "gelu_tanh":
                assert_rounded_once(aux, z)


@half_types
@every_size
@every_layout
@pytest.mark.parametrize("name", ["relu", "gelu_tanh"])
def test_backward_through_two_layers(library, name, layout, sizes, dtype):
    """x -> w1, f -> w2: the product with w2 brings f' of the layer below and its bias' gradient."""
    rows, n_out, n_hidden = sizes[0], sizes[1], sizes[2]
    x, w1 = Matrix(rows, 16, dtype), Matrix(n_hidden, 16, dtype)
    w2, dz2 = Matrix(n_out, n_hidden, dtype, **LAYOUTS[layout]), Matrix(rows, n_out, dtype, **LAYOUTS[layout])
    b1 = torch.randn(n_hidden).to(dtype)
    outcome, _, aux = library.forward(name, x, w1, b1, keep=True)
    assert outcome == DONE
    z1 = reference.linear(x.values, w1.values, b1.double().numpy())
    if name == "gelu_tanh":
        z1 = aux.double().numpy()
    delta = dz2.values @ w2.values * reference.fast(name, {}, z1)[1]
    for with_sums in (False, True):
        outcome, dz1, db1 = library.input_gradient(name, dz2, w2, aux, with_sums)
        assert outcome == DONE
        assert_rounded_once(dz1, delta)
        if with_sums:
            assert_rounded_once(db1, delta.sum(0))
        else:
            assert db1 is None


@half_types
@every_size
@every_layout
def test_weight_gradient(library, layout, sizes, dtype):
    rows, n_in, n_out = sizes
    dz, x = Matrix(rows, n_out, dtype, **LAYOUTS[layout]), Matrix(rows, n_in, dtype, **LAYOUTS[layout])
    outcome, dw, db = library.weight_gradient(dz, x)
    assert outcome == DONE
    assert_rounded_once(dw, dz.values.T @ x.values)
    assert_rounded_once(db, dz.values.sum(0))


# ---------------------------------------------------------------- what the library is not asked for


def test_other_dtypes_and_empty_matrices(library):
    for dtype in FLOATS:
        for sizes in ((4, 8, 16), (0, 8, 16), (4, 0, 16)):
            x, w = Matrix(sizes[0], sizes[1], dtype), Matrix(sizes[2], sizes[1], dtype)
            served = dtype.itemsize == 2 and 0 not in sizes
            assert library.forward("relu", x, w, None)[0] == (DONE if served else NOT_ASKED), (dtype, sizes)


@half_types
def test_addresses(library, dtype):
    """8 elements are 16 bytes: the algorithm was told no more."""
    x, w, bias = Matrix(4, 8, dtype), Matrix(16, 8, dtype), torch.randn(16).to(dtype)
    for offset in (1, 4, 8):
        outcome, y, _ = library.forward("gelu_tanh", x, w, bias, keep=True, offset=offset)
        assert outcome == (DONE if offset == 8 else NOT_ASKED)
    assert_rounded_once(
        y, reference.linear_activation(x.values, w.values, bias.double().numpy(), "gelu_tanh", {})
    )


@half_types
def test_leading_dimensions(library, dtype):
    """z of gelu_tanh has rows of 8 elements; relu's bits are padded; strides must describe a matrix."""
    x, w = Matrix(4, 8, dtype), Matrix(20, 8, dtype)
    assert library.forward("gelu_tanh", x, w, None, keep=True)[0] == NOT_ASKED
    assert library.forward("gelu_tanh", x, w, None)[0] == DONE
    assert library.forward("relu", x, w, None, keep=True)[0] == DONE
    for strides in ((0, 1), (1, 0), (0, 0), (4, 1), (16, 2)):
        x.memory, x.strides = torch.randn(128).to(dtype), strides
        assert library.forward("relu", x, w, None)[0] == NOT_ASKED, strides


def test_no_algorithm(library):
    x, w, bias = (Matrix(4, 8, torch.float16), Matrix(16, 8, torch.float16), torch.randn(16).half())
    refusing = Library(library.emulator, f"refuse {RELU_BIAS}\n")
    assert refusing.forward("relu", x, w, bias)[0] == NO_ALGORITHM
    assert refusing.forward("relu", x, w, None)[0] == DONE


# ---------------------------------------------------------------- plans

HELD = 256


def numbers(emulator, request, words, count):
    head = f"{request} {' '.join(map(str, words))} 1 {8 * count} 0\n".encode()
    run = emulator.run([emulator.program], head + bytes(8 * count))
    if b"unexpected memory mapping" in run.stderr:  # TSan, where the kernel scatters addresses widely
        run = emulator.run(["setarch", "-R", emulator.program], head + bytes(8 * count))
    if run.returncode != 0:
        raise Fault(run.stderr.decode(errors="replace"))
    return np.frombuffer(run.stdout, dtype=np.int64).tolist()


def check_the_cache(emulator):
    """As many plans as it holds, each made once; one more, and it begins anew."""
    assert numbers(emulator, "cache", [HELD], 3) == [HELD, HELD, 0]
    assert numbers(emulator, "cache", [3 * HELD + 1], 3) == [HELD, 3 * HELD + 1, 0]


def test_plans_are_made_once_and_bounded(library):
    check_the_cache(library.emulator)


def test_threads_share_plans():
    """More shapes than the cache holds: it is emptied under their feet."""
    emulator = build("cublaslt_raced", *RACES, **PROGRAM)
    assert numbers(emulator, "together", [4, HELD + 20], 2) == [0, 1]  # none wrong, one handle


# ---------------------------------------------------------------- what these tests can see


def ask_for_everything(library):
    for name in ("relu", "gelu_tanh"):
        test_backward_through_two_layers(library, name, "odd leading dimensions", SIZES[0], torch.bfloat16)
    test_weight_gradient(library, "odd leading dimensions", SIZES[0], torch.float16)
    test_addresses(library, torch.float16)


FAULTS = {
    "a transpose lost": ("cublaslt.cpp", "x, transposed(w), y", "x, w, y"),
    "the other operand's sums": ("cublaslt.cpp", "CUBLASLT_EPILOGUE_BGRADB", "CUBLASLT_EPILOGUE_BGRADA"),
    "rows of bits not padded": ("cublaslt.h", "ceil_div(columns, 128) * 16", "ceil_div(columns, 8)"),
    "a better alignment promised": ("cublaslt.cpp", "reinterpret_cast<void*>(alignment)", "(void*)256"),
    "pointers of another call": (
        "cublaslt.cpp",
        "if (product.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias);",
        "",
    ),
    "an allocation in a capture": ("cublaslt.cpp", "const Relaxed relaxed;", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    file, text, wrong = FAULTS[fault]
    name = f"cublaslt_{fault.replace(' ', '_')}"
    planted = Library(build(name, plant=(f"cuda/{file}", text, wrong), **PROGRAM))
    with pytest.raises((AssertionError, Fault)):
        ask_for_everything(planted)


def test_nothing_is_caught_without_a_fault(library):
    ask_for_everything(library)


def test_an_endless_cache_is_caught():
    plant = ("cuda/cublaslt.cpp", "if (all.plans.size() == max_plans) all.plans.clear();", "")
    with pytest.raises(AssertionError):
        check_the_cache(build("cublaslt_endless", plant=plant, **PROGRAM))


def test_an_unguarded_cache_is_caught():
    plant = (
        "cuda/cublaslt.cpp",
        "const std::lock_guard lock(all.mutex);\n  const auto found",
        "const auto found",
    )
    emulator = build("cublaslt_unguarded", *RACES, plant=plant, **PROGRAM)
    with pytest.raises(Fault, match="data race"):
        numbers(emulator, "together", [4, HELD + 20], 2)
