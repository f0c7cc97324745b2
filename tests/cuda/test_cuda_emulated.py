"""CUDA's kernels, run on the CPU by tests/cuda/emulator: their numbers, layouts and edges, under sanitizers.

What this cannot see: the hardware's approximations of exp and division in 16 bits (the C library stands in),
what the compiler for GPUs makes of the code, and the tensor side (test_cuda.py, where there is a GPU).
"""

import sys
from functools import partial

import numpy as np
import pytest
import torch

import mlpext
import reference
from common import assert_same_bits, distance, every_case, every_float, points, ulp, values_of
from cuda_emulator import OF_OUTPUT, RACES, SANITIZED, Fault, build, poison

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux"),
]
INTEGERS = {1: torch.uint8, 4: torch.int32}


@pytest.fixture(scope="module")
def plain():
    """Every activation, no sanitizer."""
    return build("plain")


@pytest.fixture(scope="module")
def checked():
    """A few activations, under ASan and UBSan."""
    return build("checked", *SANITIZED, activations="std::tuple<ReLU, Hardtanh, ELU>")


@pytest.fixture(scope="module")
def raced():
    """One activation, under TSan."""
    return build("raced", *RACES, activations="std::tuple<ELU>", sources=("float64.cu", "bfloat16.cu"))


def from_outputs(name, parameters):
    return name in OF_OUTPUT and all(v >= 0 for v in values_of(name, parameters))


def operators(name, parameters, x, g):
    """By the operators on the CPU: y, g f'(x), g f' from y."""
    values = values_of(name, parameters)
    y = torch.ops.mlpext.activation(x, name, values)
    backward = torch.ops.mlpext.activation_backward
    from_y = backward(g, y, name, values, True) if from_outputs(name, parameters) else None
    return y, backward(g, x, name, values, False), from_y


BY_TABLES = {"tanh", "gelu", "tanhshrink"}  # on the CPU, whose registers hold tables: other bits
SPECIALS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]


@pytest.mark.skipif(mlpext._C.cpu_isa() == "baseline", reason="rounds a product and a sum apart")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_case
@pytest.mark.usefixtures("own_loops")
def test_the_bits_of_the_cpu(plain, name, parameters, dtype):
    x = torch.cat([points(name, parameters, dtype, 6000), torch.tensor(SPECIALS, dtype=dtype)])
    g = torch.randn(x.shape, dtype=dtype)
    y, dx, dx_from_y = operators(name, parameters, x, g)
    same = assert_same_bits
    if dtype == torch.float32 and name in BY_TABLES:
        same = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6, equal_nan=True)
    same(plain.elementwise(name, 0, parameters, x), y)
    same(plain.elementwise(name, 1, parameters, x, g), dx)
    if dx_from_y is not None:
        assert_same_bits(plain.elementwise(name, 2, parameters, y, g), dx_from_y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_case
def test_half_is_rounded_nearly_once(plain, name, parameters, dtype):
    x = points(name, parameters, dtype, 3000)
    at = x.double().numpy()
    for kind, expected in enumerate(reference.fast(name, parameters, at)):
        g = None if kind == 0 else torch.ones_like(x)
        actual = plain.elementwise(name, kind, parameters, x, g)
        # What float32 cannot give: where the parts of a sum cancel, and an angle rounded before sin.
        angle = abs(parameters.get("omega", 1.0)) * np.abs(at) if name == "sine" else 0.0
        angle = np.where(angle > torch.finfo(torch.float32).max, np.inf, angle)
        slack = 2.0**-21 * np.maximum(4.0 if kind else 0.0, np.abs(at) if name == "tanhshrink" else angle)
        with np.errstate(invalid="ignore"):
            error = np.fmax(distance(actual, expected) - slack, 0) / ulp(expected, dtype)
        assert error.max() <= 0.52, (kind, error.max(), at[error.argmax()])


@every_float
def test_specials_as_on_the_cpu(plain, dtype):
    x = torch.tensor(SPECIALS, dtype=dtype)
    for name in mlpext.activations():
        for kind, expected in enumerate(operators(name, {}, x, torch.ones_like(x))[:2]):
            actual = plain.elementwise(name, kind, {}, x, torch.ones_like(x) if kind else None)
            torch.testing.assert_close(
                actual, expected, equal_nan=True, msg=f"{name}, {kind}: {actual} {expected}"
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_value_of_16_bits_passes(plain, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(plain.elementwise("identity", 0, {}, x), x)


CPU = torch.ops.mlpext


def tile(dtype):
    return 256 * 2 * 16 // dtype.itemsize


@every_float
@pytest.mark.parametrize("offset", [0, 1])
def test_lengths(checked, dtype, offset):
    for n in (1, 3, 255, tile(dtype) - 1, tile(dtype), tile(dtype) + 5):
        x, g = torch.randn(2, n).to(dtype)
        assert_same_bits(
            checked.elementwise("relu", 0, {}, x, offset=offset), CPU.activation(x, "relu", []), (n, offset)
        )
        assert_same_bits(
            checked.elementwise("hardtanh", 1, {}, x, g, offset=offset),
            CPU.activation_backward(g, x, "hardtanh", [-1, 1], False),
        )


@every_float
def test_in_place_and_with_a_bias(checked, dtype):
    for columns, offset in ((8, 0), (24, 0), (24, 1), (7, 0)):
        x, bias = torch.randn(tile(dtype) // 8 + 3, columns).to(dtype), torch.randn(columns).to(dtype)
        wanted = torch.relu((x.double() + bias.double()).to(dtype))
        nothing = x.new_empty(0)
        words = ["relu", 0, 0, 0, x.numel(), columns, 0]
        actual = checked("elementwise", dtype, words, [x, nothing, None, bias], offset)[0]
        torch.testing.assert_close(actual, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


@every_float
def test_any_strides(checked, dtype):
    """Sizes from the fastest dimension on; the output is dense, the input transposed, expanded or sliced."""
    sizes = (5, 7, 3)
    memory = torch.randn(400).to(dtype)
    for strides in ((21, 3, 1), (0, 5, 35), (2, 11, 80), (1, 0, 0)):
        layout = (sizes, [(1, 5, 35), strides, (0, 0, 0)])
        view = memory.as_strided(sizes[::-1], strides[::-1])
        result = checked.elementwise("relu", 0, {}, memory, layout=layout, output=poison(view))
        assert_same_bits(result, CPU.activation(view.contiguous(), "relu", []), strides)
    twelve = ((2,) * 12, [tuple(2**d for d in range(12)), tuple(2 ** (11 - d) for d in range(12)), (0,) * 12])
    memory = torch.randn(4096).to(dtype)
    result = checked.elementwise("relu", 0, {}, memory, layout=twelve)
    assert_same_bits(
        result.view((2,) * 12), CPU.activation(memory, "relu", []).view((2,) * 12).permute(*range(11, -1, -1))
    )


@every_float
def test_beyond_two_billion_elements(checked, dtype):
    tail = torch.randn(3 * tile(dtype)).to(dtype)
    n = 2**31 + 2**20 + 77
    result = checked("last_of_many", dtype, [dtype.itemsize, n, len(tail)], [tail])[0]
    # The last two blocks: a whole one and the tail.
    ran = n % tile(dtype) + tile(dtype)
    assert_same_bits(result[-ran:], CPU.activation(tail, "relu", [])[-ran:])
    assert not result[: len(tail) - ran].any()


SHAPES = [(1, 1), (3, 8), (70, 5), (300, 40), (33, 300), (2100, 16)]


@every_float
@pytest.mark.parametrize("rows, columns", SHAPES, ids=str)
def test_gradient_with_its_column_sums(checked, dtype, rows, columns):
    g, x = torch.randn(2, rows, columns).to(dtype)
    for offset in (0, 1):
        dz, db = checked.rows("elu", 1, {}, g, x, offset=offset)
        expected = CPU.activation_backward(g, x, "elu", [1.0], False)
        again = checked.elementwise("elu", 1, {}, x, g)
        assert_same_bits(dz, again, "by rows as elementwise")
        torch.testing.assert_close(dz, expected)
        exact = (g.double() * torch.where(x.double() > 0, 1.0, x.double().exp())).sum(0)
        epsilon = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * 8
        allowed = epsilon * (exact.abs() + 3 * rows**0.5)
        assert ((db.double() - exact).abs() <= allowed).all()
        dz, _ = checked.rows("relu", 2, {}, g, x, offset=offset)
        assert_same_bits(dz, CPU.activation_backward(g, x, "relu", [], True))


@every_float
def test_gradient_of_expanded_and_transposed(checked, dtype):
    x = torch.randn(40, 16).to(dtype)
    one, columns = torch.randn(1).to(dtype), torch.randn(16, 40).to(dtype)
    for g, strides, view in ((one, (0, 0), one.expand(40, 16)), (columns, (1, 40), columns.t())):
        dz, _ = checked.rows("relu", 1, {}, g, x, g_strides=strides)
        assert_same_bits(dz, CPU.activation_backward(view.contiguous(), x, "relu", [], False))


@every_float
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("outer, pieces, inner", [(1, 2, 3000), (70, 3, 16), (5, 2, 7), (300, 4, 1)], ids=str)
def test_maxout(checked, dtype, width, outer, pieces, inner):
    x = torch.randn(outer, pieces, inner).to(dtype)
    x[0, 0, 0], x[-1, -1, -1] = float("nan"), float("nan")
    x[outer // 2] = x[outer // 2, :1]  # ties
    g = torch.randn(outer, inner).to(dtype)
    value, winner = (torch.from_numpy(a) for a in reference.maxout(x.double().numpy(), pieces, 1))
    value, winner = value.squeeze(1).to(dtype), winner.squeeze(1).to(INTEGERS[width])
    for offset in (0, 1):
        words = [int(width == 4), outer, pieces, inner]
        _, y, index = checked("maxout", dtype, words, [x, poison(g), poison(winner)], offset)
        assert_same_bits(y, value)
        assert torch.equal(index, winner)
        assert_same_bits(checked("maxout", dtype, words, [x, poison(g), None], offset)[1], value)
        *_, dx = checked("maxout_backward", dtype, words, [g, winner, poison(x)], offset)
        scattered = torch.where(winner[:, None] == torch.arange(pieces)[:, None], g[:, None], 0)
        assert_same_bits(dx, scattered)
        dz, db = checked.rows("maxout", words[0], {}, g, winner, pieces, offset=offset)
        assert_same_bits(dz.view(x.shape), scattered)
        sums = scattered.double().sum(0).flatten()
        torch.testing.assert_close(db.double(), sums, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_nothing_to_do(checked):
    nothing = torch.empty(0)
    assert checked.elementwise("relu", 0, {}, nothing).numel() == 0
    _, db = checked.rows("elu", 1, {}, torch.empty(0, 5), torch.empty(0, 5))
    assert torch.equal(db, torch.zeros(5))


def test_no_races(raced):
    for dtype in (torch.float64, torch.bfloat16):
        g, x = torch.randn(2, 600, 24).to(dtype)
        first = raced.rows("elu", 1, {}, g, x)
        for a, b in zip(first, raced.rows("elu", 1, {}, g, x), strict=True):
            assert_same_bits(a, b, "the same from run to run")


ONE = {"activations": "std::tuple<ELU>", "sources": ("float32.cu",)}
# file, text, what stands there instead; the sanitizer and its message
FAULTS = {
    "a write out of bounds": (
        ("cuda/loops.cuh", "if (column(j) < job.columns) dz[", "dz["),
        (SANITIZED, "heap-buffer-overflow(.|\n)*WRITE"),
    ),
    "a read out of bounds": (
        ("cuda/loops.cuh", "if (i >= job.n) break;", ""),
        (SANITIZED, "heap-buffer-overflow(.|\n)*READ"),
    ),
    "a missing barrier": (
        ("cuda/loops.cuh", "    __syncthreads();\n  }\n", "  }\n"),
        (RACES, "data race"),
    ),
    "a barrier that some threads skip": (
        ("cuda/loops.cuh", "  sum_columns(sums);\n", "  if (threadIdx.y % 2 == 0) sum_columns(sums);\n"),
        ((), "not every thread of the block"),
    ),
    "a misaligned access": (
        ("cuda/access.cuh", "% sizeof(WordOf<T, n>) == 0;", "% sizeof(T) == 0;"),
        (SANITIZED, "misaligned address"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    plant, (sanitizer, message) = FAULTS[fault]
    emulator = build(fault.replace(" ", "_"), *sanitizer, **ONE, plant=plant)
    x = torch.randn(600, 24)
    with pytest.raises(Fault, match=message):
        for columns in (5, 24) * 4:  # on a busy machine threads that race may happen to take turns
            emulator.rows("elu", 1, {}, x[:, :columns], x[:, :columns], offset=1)
        emulator.elementwise("elu", 0, {}, x[0])


def test_a_wrong_tail_is_caught():
    """Nothing is out of bounds: a value is missing, and the poison in its place shows it."""
    plant = ("cuda/loops.cuh", "at < min(first + tile, job.n)", "at < min(first + tile, job.n) - 1")
    emulator = build("wrong_tail", **ONE, plant=plant)
    x = torch.randn(255)
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(emulator.elementwise("elu", 0, {}, x), CPU.activation(x, "elu", [1.0]))
