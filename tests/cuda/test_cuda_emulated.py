"""CUDA's kernels, run on the CPU by tests/cuda/emulator: their numbers, layouts and edges, under sanitizers.

What this cannot see: the hardware's approximations of exp and division in 16 bits (the C library stands in),
what the compiler for GPUs makes of the code, and the tensor side (test_cuda.py, where there is a GPU).
"""

import concurrent.futures
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mlpext
import reference
from common import FLOATS, assert_same_bits, distance, every_case, every_float, points, ulp, values_of

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
DTYPES = ("float64", "float32", "bfloat16", "float16")
INTEGERS = {1: torch.uint8, 4: torch.int32}
OF_OUTPUT = ("identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "selu", "celu")

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux"),
]


KERNELS = tuple(f"{dtype}.cu" for dtype in DTYPES)


def build(name, *flags, activations=None, plant=None, sources=KERNELS, main="main.cpp"):
    """The program; with some activations only, or with a fault in the place of a text in a file."""
    folder = ROOT / "build" / "cuda_emulator" / name
    folder.mkdir(parents=True, exist_ok=True)
    everything = sorted(p for top in (ROOT / "csrc", EMULATOR) for p in top.rglob("*") if p.is_file())
    key = hashlib.sha256(repr((COMPILER, flags, activations, plant, sources)).encode())
    for path in everything:
        key.update(path.read_bytes())
    with open(folder / "lock", "w") as lock:  # several workers run these tests: one builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / "stamp"
        if not stamp.exists() or stamp.read_text() != key.hexdigest():
            compile_and_link(folder, flags, activations, plant, sources, main)
            stamp.write_text(key.hexdigest())
    return Emulator(folder / "emulator")


COMPILER = [
    *os.environ.get("CXX", "c++").split(),
    *("-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{EMULATOR}"),
]


def compile_and_link(folder, flags, activations, plant, sources, main):
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    source = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if activations:
        edit(
            source / "formulas" / "activations.h",
            r"using Activations = [^;]+;",
            f"using Activations = {activations};",
        )
    if plant:
        file, text, fault = plant
        edit(source / file, re.escape(text), fault)
    files = [*(source / "cuda" / name for name in sources), EMULATOR / main]
    objects = [str(folder / f"{file.parent.name}-{file.stem}.o") for file in files]
    compile_ = [*COMPILER, *flags, f"-I{source}", "-x", "c++", "-c"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [[*compile_, str(f), "-o", o] for f, o in zip(files, objects, strict=True)]
        list(pool.map(command, jobs))
    command([*COMPILER, *flags, "-pthread", *objects, "-o", str(folder / "emulator")])


def edit(path, pattern, text):
    new, count = re.subn(pattern, lambda _: text, path.read_text())
    assert count == 1, f"{pattern} stands {count} times in {path.name}"
    path.write_text(new)


def command(words):
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


class Emulator:
    """One process for each request: a sanitizer ends it at the first fault."""

    def __init__(self, program):
        self.program = program

    def __call__(self, request, dtype, words, tensors, offset=0):
        """What the tensors hold afterwards; None is a null pointer, `offset` elements misalign each, or a
        list misaligns one by one."""
        offsets = offset if isinstance(offset, list) else [offset] * len(tensors)
        pairs = zip(tensors, offsets, strict=True)
        shapes = [(0, 0) if t is None else (t.nbytes, o * t.element_size()) for t, o in pairs]
        head = [request, FLOATS.index(dtype), *words, len(tensors), *(n for pair in shapes for n in pair)]
        data = b"".join(raw(t) for t in tensors if t is not None)
        data = " ".join(map(str, head)).encode() + b"\n" + data
        run = self.run([self.program], data)
        if b"unexpected memory mapping" in run.stderr:  # TSan, where the kernel scatters addresses widely
            run = self.run(["setarch", "-R", self.program], data)
        if run.returncode != 0:
            raise Fault(run.stderr.decode(errors="replace"))
        results, at = [], 0
        for t in tensors:
            size = 0 if t is None else t.nbytes
            part = (
                torch.frombuffer(bytearray(run.stdout[at : at + size]), dtype=torch.uint8) if size else None
            )
            results.append(None if t is None else t if not size else part.view(t.dtype).view(t.shape))
            at += size
        return results

    @staticmethod
    def run(command, data):
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run(command, input=data, capture_output=True, env={**os.environ, **options})

    def elementwise(
        self, name, kind, parameters, x, g=None, *, bias=None, layout=None, output=None, offset=0
    ):
        """`kind` 0: f(x + bias); 1: g f'(x); 2: g f' from y = x."""
        dims = [] if layout is None else [*layout[0], *(s for strides in layout[1] for s in strides)]
        output = poison(x) if output is None else output
        n = x.numel() if layout is None else int(np.prod(layout[0]))
        words = [name, kind, *two(name, parameters), n, 1 if bias is None else len(bias)]
        words += [0 if layout is None else len(layout[0]), *dims]
        inputs = (x, None) if g is None else (g, x)
        return self("elementwise", x.dtype, words, [output, *inputs, bias], offset)[0]

    def rows(self, name, kind, parameters, g, saved, pieces=1, g_strides=None, offset=0):
        rows, columns = saved.shape
        strides = [*(g_strides or (columns, 1)), columns, 1]
        dz, db = poison(g.new_empty(rows, pieces * columns)), poison(g.new_empty(pieces * columns))
        words = [name, kind, *two(name, parameters), rows, columns, pieces, *strides, g.element_size()]
        return self("rows", g.dtype, words, [g, saved, dz, db], offset)[2:]


class Fault(Exception):
    pass


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def poison(like):
    """Uninitialised memory, so to say: what no kernel writes stays recognisable."""
    return (
        torch.full((like.numel() * like.element_size(),), 0xA5, dtype=torch.uint8)
        .view(like.dtype)
        .view(like.shape)
    )


def two(name, parameters):
    values = [] if name == "maxout" else values_of(name, parameters)
    return [repr(float(v)) for v in (*values, 0.0, 0.0)][:2]


@pytest.fixture(scope="module")
def plain():
    """Every activation, no sanitizer."""
    return build("plain")


SANITIZED = (
    "-O1",
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)
RACES = ("-O1", "-fsanitize=thread")


@pytest.fixture(scope="module")
def checked():
    """A few activations, under ASan and UBSan."""
    return build("checked", *SANITIZED, activations="std::tuple<ReLU, Hardtanh, ELU>")


@pytest.fixture(scope="module")
def raced():
    """One activation, under TSan."""
    return build("raced", *RACES, activations="std::tuple<ELU>", sources=("float64.cu", "bfloat16.cu"))


# ---------------------------------------------------------------- the numbers


def from_outputs(name, parameters):
    return name in OF_OUTPUT and all(v >= 0 for v in values_of(name, parameters))


def operators(name, parameters, x, g):
    """By the operators on the CPU: y, g f'(x), g f' from y."""
    values = values_of(name, parameters)
    y = torch.ops.mlpext.activation(x, name, values)
    backward = torch.ops.mlpext.activation_backward
    from_y = backward(g, y, name, values, True) if from_outputs(name, parameters) else None
    return y, backward(g, x, name, values, False), from_y


SPECIALS = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0]


@pytest.mark.skipif(mlpext._C.cpu_isa() == "baseline", reason="rounds a product and a sum apart")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@every_case
def test_the_bits_of_the_cpu(plain, name, parameters, dtype):
    x = torch.cat([points(name, parameters, dtype, 6000), torch.tensor(SPECIALS, dtype=dtype)])
    g = torch.randn(x.shape, dtype=dtype)
    y, dx, dx_from_y = operators(name, parameters, x, g)
    assert_same_bits(plain.elementwise(name, 0, parameters, x), y)
    assert_same_bits(plain.elementwise(name, 1, parameters, x, g), dx)
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


# ---------------------------------------------------------------- layouts and edges, under ASan and UBSan

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


# ---------------------------------------------------------------- races, and planted faults


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
        for columns in (5, 24):
            emulator.rows("elu", 1, {}, x[:, :columns], x[:, :columns], offset=1)
        emulator.elementwise("elu", 0, {}, x[0])


def test_a_wrong_tail_is_caught():
    """Nothing is out of bounds: a value is missing, and the poison in its place shows it."""
    plant = ("cuda/loops.cuh", "at < min(first + tile, job.n)", "at < min(first + tile, job.n) - 1")
    emulator = build("wrong_tail", **ONE, plant=plant)
    x = torch.randn(255)
    with pytest.raises(AssertionError, match="bits differ"):
        assert_same_bits(emulator.elementwise("elu", 0, {}, x), CPU.activation(x, "elu", [1.0]))
