"""Triton's kernel of linear_maxout (mlpext/_triton.py) without a GPU: its numbers in Triton's interpreter, on
CPU tensors, and what the compiler makes of it.

Where triton is installed: `make test-triton`, or a torch with CUDA. The interpreter cannot multiply bfloat16.
"""

import importlib.util
import itertools
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch

import mlpext
import reference
from common import assert_close, assert_same_bits
from test_linear_maxout import inputs

triton = pytest.importorskip("triton", reason="triton is not installed: make test-triton")
compiler = pytest.importorskip("triton.backends.compiler")

SOURCE = Path(mlpext.__file__).with_name("_triton.py")
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
interpreted = pytest.mark.skipif(VERSION < (3, 7), reason="triton's interpreter wants an older numpy")
both_tilings = pytest.mark.parametrize("capability", [8, 9])


@pytest.fixture
def load(tmp_path, monkeypatch):
    """The module as it is or with a text replaced, to be interpreted or to be compiled."""

    def load(old="", new="", interpret=True):
        text = SOURCE.read_text()
        assert text.count(old) == 1 or not old, old
        path = tmp_path / "changed.py"
        path.write_text(text.replace(old, new) if old else text)
        spec = importlib.util.spec_from_file_location("changed", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        spec.loader.exec_module(module)
        monkeypatch.delenv("TRITON_INTERPRET")
        return module

    return load


def run(module, x, weight, bias, capability=9, with_index=True):
    """y and the index; what lies behind them, a tile of rows and more, must stay as it was."""
    rows, columns = x.size(0), weight.size(1)
    y = torch.full((rows + module.ROWS + 64, columns), 77, dtype=x.dtype)
    index = torch.full_like(y, 77, dtype=torch.uint8) if with_index else None
    module.linear_maxout(x, weight, bias, y[:rows], index[:rows] if with_index else None, capability)
    assert (y[rows:] == 77).all() and (not with_index or (index[rows:] == 77).all())
    return y[:rows], index[:rows] if with_index else None


def within_nan(tensor):
    """The same as a part of a larger tensor: what is read beyond it shows."""
    larger = torch.full([size + 3 for size in tensor.shape], math.nan, dtype=tensor.dtype)
    part = larger[tuple(slice(size) for size in tensor.shape)]
    return part.copy_(tensor)


def check(module, x, weight, bias, capability):
    """Against the float64 reference; every sum is exact, so that the winner is never in doubt."""
    arrays = [None if t is None else t.double().numpy() for t in (x, weight, bias)]
    expected, winner = (torch.from_numpy(a) for a in reference.linear_maxout(*arrays))
    y, index = run(module, x, weight, bias, capability)
    assert torch.equal(y, expected.to(y.dtype))
    assert torch.equal(index, winner.to(torch.uint8))
    assert_same_bits(run(module, x, weight, bias, capability, with_index=False)[0], y)


SIZES = [(1, 1, 1), (3, 5, 2), (131, 70, 67), (128, 64, 64), (129, 65, 129), (1100, 3, 130)]


@interpreted
@both_tilings
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_against_the_reference(load, dtype, pieces, capability):
    """With ties in plenty."""
    module = load()
    for (rows, n_in, n_out), bias in itertools.product(SIZES, (True, False)):
        x, w, b = map(within_nan, inputs(dtype, (rows,), n_in, n_out, pieces))
        check(module, x, w, b if bias else None, capability)


@interpreted
def test_layouts(load):
    module = load()
    x, w, b = inputs(torch.float32, (6,))
    xs = [x.t().contiguous().t(), x.repeat_interleave(2, -1)[:, ::2], x[:1].expand(6, 5)]
    ws = [w.permute(2, 0, 1).contiguous().permute(1, 2, 0), w.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    ws += [w.repeat_interleave(2, -1)[..., ::2], w[:1].expand(3, 9, 5)]
    for tensors in itertools.product(xs, ws, [b.t().contiguous().t(), b[:, :1].expand(3, 9)]):
        check(module, *tensors, 9)


# Sizes and strides whose last offsets are beyond 2^31, which no stride is: in 32 bits they would be negative.
FAR = {
    "rows of x": (0, (3, 2, 2), (2**30 + 8, 1)),
    "width of x": (0, (2, 9, 2), (1, 2**28 + 8)),
    "pieces": (1, (2, 2, 2), (2**30 + 8, 2, 1)),
    "rows of weight": (1, (2, 2, 9), (32, 2**28 + 8, 1)),
    "width of weight": (1, (2, 9, 2), (1, 3, 2**28 + 8)),
    "pieces of bias": (2, (2, 2, 2), (2**30 + 8, 1)),
    "width of bias": (2, (2, 2, 9), (1, 2**28 + 8)),
}


def check_far(module, case):
    """In memory that is reserved, as much before as behind, and touched in a few places."""
    which, (rows, n_in, n_out), strides = FAR[case]
    tensors = inputs(torch.float16, (rows,), n_in, n_out, pieces=3)
    reserved = torch.empty(2**32 + 2**12, dtype=torch.float16)
    tensors[which] = reserved.as_strided(tensors[which].shape, strides, 2**31).copy_(tensors[which])
    check(module, *tensors, 9)


@interpreted
@pytest.mark.parametrize("case", FAR)
def test_offsets_beyond_two_billion(load, case):
    check_far(load(), case)


@interpreted
def test_the_last_of_256_pieces(load):
    w = torch.zeros(256, 1, 1)
    w[255] = 1
    y, index = run(load(), torch.tensor([[2.0], [-2.0]]), w, None)
    assert y.tolist() == [[2], [0]] and index.tolist() == [[255], [0]]


@interpreted
@both_tilings
@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_nan_and_infinity_as_on_the_cpu(load, pieces, capability):
    """Every combination of these as pre-activations of one output each."""
    values = torch.tensor(list(itertools.product([math.nan, math.inf, -math.inf, -0.0, 1.0], repeat=pieces)))
    x, bias = torch.zeros(2, 1), values.t().contiguous()
    weight = torch.zeros(pieces, len(values), 1)
    y, index = run(load(), x, weight, bias, capability)
    expected = torch.ops.mlpext.linear_maxout_forward(x, weight, bias)
    assert_close(y, expected[0], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(index, expected[1])


FAULTS = {
    "a tie goes to the last": ("~(piece <= best)", "(piece >= best)"),
    "a tie goes to the last of two": ("better = wins(second, z)", "better = ~wins(z, second)"),
    "a NaN is beaten": (" & (best == best)", ""),
    "x is read beyond its width": ("(i < rows) & (at[None, :] < depth)", "i < rows"),
    "weight is read beyond its width": ("(unit < columns) & (at[:, None] < depth)", "unit < columns"),
    "y is written beyond its rows": ("inside = (i < rows) & (j < columns)", "inside = j < columns"),
    "y is written beyond its columns": ("inside = (i < rows) & (j < columns)", "inside = i < rows"),
    "the bias of the first piece": ("piece * bias_piece", "0 * bias_piece"),
    "a band of tiles left out": ("8 * band + tile % height", "tile % height"),
    "rows in 32 bits": ("i = row_tile.to(tl.int64)", "i = row_tile"),
    "width in 32 bits": ("DEPTH).to(tl.int64)", "DEPTH)"),
    "columns in 32 bits": ("unit = column_tile.to(tl.int64)", "unit = column_tile"),
    "pieces in 32 bits": ("(beside // COLUMNS).to(tl.int64)", "(beside // COLUMNS)"),
}


@interpreted
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(load, fault):
    module = load(*FAULTS[fault])
    with pytest.raises(AssertionError):
        w = torch.zeros(3, 1, 1)
        w[0] = math.nan
        assert run(module, torch.ones(1, 1), w, None)[1].item() == 0
        for (rows, n_in, n_out), pieces in itertools.product(SIZES, (2, 3)):
            check(module, *map(within_nan, inputs(torch.float32, (rows,), n_in, n_out, pieces)), 9)
        for case in FAR:
            check_far(module, case)


# ---------------------------------------------------------------- what the compiler makes of it

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
SPILLED = {
    80: 16,
    90: 0,
}  # Triton 3.6 and 3.7 spill 16 bytes for sm_80 in one case, four pieces or more, no index
SHARED = {80: 99 * 1024, 90: 227 * 1024}  # 99: what compute capability 8.6 and 8.9 have


def compiled(module, arch, dtype, pieces, with_index=True, bias=True, **tile):
    """The kernel of rows that lie dense, of sizes and addresses that are multiples of 16."""
    kernel = module.linear_maxout_kernel
    constants = {"ROWS": module.ROWS, "DEPTH": module.DEPTH, **module.tiling(pieces, arch // 10), **tile}
    constants |= dict.fromkeys(("x_in", "weight_in", "bias_out"), 1)
    constants |= {} if with_index else {"index": None}
    constants |= {} if bias else {"bias": None}
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(
        ("x", "weight", "bias", "y"), f"*{NAMES[dtype]}"
    )
    types |= {"index": "*u8", **dict.fromkeys(constants, "constexpr")}
    aligned = [n for n, (name, kind) in enumerate(types.items()) if kind != "constexpr" and name != "rows"]
    source = triton.compiler.ASTSource(
        kernel, types, constants, {(n,): [["tt.divisibility", 16]] for n in aligned}
    )
    return triton.compile(source, target=compiler.GPUTarget("cuda", arch, 32), options=module.OPTIONS)


def resources(binary, tmp_path):
    """Registers, and bytes of stack: spills."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return [int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK")]


@pytest.mark.parametrize("pieces", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("arch", SHARED, ids=lambda arch: f"sm_{arch}")
def test_compiled(load, tmp_path, arch, dtype, pieces):
    module = load(interpret=False)
    for with_index in (True, False):
        binary = compiled(module, arch, dtype, pieces, with_index, bias=with_index or pieces > 2)
        registers, stack = resources(binary, tmp_path)
        # Eight warps: at most 255 registers a thread, and no block beside it.
        assert registers <= 255 and stack <= SPILLED[arch], (registers, stack)
        assert binary.metadata.shared <= SHARED[arch]
        ptx = binary.asm["ptx"]
        product = {
            80: r"mma\.sync\.aligned\.m16n8k16",
            90: r"wgmma\.mma_async\.sync\.aligned\.m64n(64|128|256)k16",
        }
        assert re.search(rf"{product[arch]}\S*\.f32\.{NAMES[dtype].replace('fp', 'f')}", ptx)
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
        assert not re.search(r"[ls][dt]\.local", ptx)


def test_spills_are_seen(load, tmp_path):
    """256 columns of z leave no room for the winner so far."""
    binary = compiled(load(interpret=False), 90, torch.bfloat16, 4, COLUMNS=128)
    assert resources(binary, tmp_path)[1] > 0
