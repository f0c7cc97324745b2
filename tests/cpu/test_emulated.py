"""Machines that are not at hand, by qemu's user emulation: NEON on 64-bit ARM, and x86-64 without AVX.

The kernels for NEON are compiled by a cross compiler into a program (kernel_results.cpp) that writes all that
they compute. The same loops on AVX2, which the other tests verify, must give the same bits."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

import mlpext

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARM = "aarch64-linux-gnu-"
FLAGS = ["-std=c++20", "-O2", "-g0", "-ffp-contract=off", "-Wno-psabi"]
INCLUDES = [f"-I{HERE}/without_torch", f"-I{ROOT}/csrc", *(f"-idirafter{path}" for path in include_paths())]
GEMM = [ROOT / "csrc/cpu/gemm/gemm.cpp", ROOT / "csrc/cpu/gemm/maxout_gradient.cpp"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.emulator,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the other side of each comparison is x86-64"),
]


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program} (Debian: g++-aarch64-linux-gnu, qemu-user)")


def run(*command):
    ran = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert ran.returncode == 0, (ran.stdout + ran.stderr).decode(errors="replace")[-4000:]
    return ran.stdout


def results(output):
    """The arrays by name; 16-bit numbers as integers."""
    arrays, start = {}, 0
    while start < len(output):
        end = output.index(b"\n", start)
        name, dtype, count = output[start:end].decode().rsplit(" ", 2)
        assert name not in arrays
        arrays[name] = np.frombuffer(output, dtype, int(count), end + 1)
        start = end + 1 + arrays[name].nbytes
    return arrays


def numbers(name, array):
    """As float64: the bits of 16-bit dtypes, what they stand for."""
    for dtype in (torch.bfloat16, torch.float16):
        if array.dtype == np.uint16 and str(dtype).removeprefix("torch.") in name.split():
            return torch.from_numpy(array.copy()).view(dtype).double().numpy()
    return array.astype(np.float64)


@pytest.fixture(scope="module")
def neon(tmp_path_factory):
    need(f"{ARM}g++", f"{ARM}objdump")
    kernels = tmp_path_factory.mktemp("neon") / "neon.o"
    run(f"{ARM}g++", *FLAGS, *INCLUDES, "-c", "csrc/cpu/neon.cpp", "-o", kernels)
    return kernels


def test_neon_gives_the_bits_of_avx2(neon, tmp_path):
    need("qemu-aarch64", "g++")
    if "avx2" not in mlpext._C.cpu_isas():
        pytest.skip("needs a machine with AVX2")
    program = ["tests/cpu/kernel_results.cpp", *GEMM, *FLAGS, *INCLUDES, "-static", "-o"]
    run(f"{ARM}g++", "-DMLPEXT_ISA=neon", neon, *program, tmp_path / "arm")
    run("g++", "-DMLPEXT_ISA=avx2", "csrc/cpu/avx2.cpp", *program, tmp_path / "x86")
    ours, theirs = results(run("qemu-aarch64", tmp_path / "arm")), results(run(tmp_path / "x86"))
    assert ours.keys() == theirs.keys()
    assert [name for name in mlpext.activations() if f"forward {name} float32" not in ours] == []
    with np.errstate(invalid="ignore"):  # inf - inf
        for name, array in ours.items():
            x, y = numbers(name, array), numbers(name, theirs[name])
            kind = np.finfo(array.dtype if array.dtype.kind == "f" else np.float16)
            if name.startswith("epochs"):  # sums in another order: as many lanes as a register has
                np.testing.assert_allclose(x, y, rtol=0, atol=30 * kind.eps, err_msg=name)
            elif name.endswith(" gelu bfloat16") and name.startswith(("gated", "of_value")):
                # As below, and not rounded before the product: here and there the next number.
                assert np.all((np.abs(x - y) <= np.abs(y) / 128) | (x == y) | np.isnan(x) & np.isnan(y)), name
                assert np.mean((x == y) | np.isnan(x)) > 0.999, name
            elif name.endswith(
                (" gelu float32", " gelu float16")
            ):  # AVX2 has a table: both are within 2.1 ULP
                size = np.ones_like(y) if name.startswith("backward") else np.abs(y)
                near = np.abs(x - y) <= 4.2 * np.maximum(size * kind.eps, kind.smallest_subnormal)
                assert np.all(near | (x == y) | np.isnan(x) & np.isnan(y)), name
            else:
                bits = f"u{array.itemsize}"
                same = array.view(bits) == theirs[name].view(bits)
                assert np.all(same | np.isnan(x) & np.isnan(y)), name


def test_neon_multiplies_and_adds_in_one_instruction(neon):
    """In the loops of a product alone, 6 to 1 rows of 4, 2, 1 and a part of a register: 21 x 8 of them."""
    code = run(f"{ARM}objdump", "-d", "-C", neon).decode()
    loops = [f for f in code.split("\n\n") if "gemm_block<float, false>" in f.partition("\n")[0]]
    assert sum(f.count("\tfmla\t") for f in loops) >= 168


OLD = """
import torch, mlpext
from torch.autograd import gradcheck
assert mlpext._C.cpu_isas() == ["baseline"], mlpext._C.cpu_isas()
torch.manual_seed(0)
x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
for name in mlpext.activations():
    model = torch.nn.Sequential(mlpext.nn.MLP([5, 4], output_activation=name), mlpext.nn.Maxout(4, 2))
    model.double()
    assert gradcheck(model, x), name
print("checked", len(mlpext.activations()))
"""


def test_x86_without_avx():
    need("qemu-x86_64")
    said = run("qemu-x86_64", "-cpu", "Nehalem", sys.executable, "-c", OLD).decode()
    assert said == f"checked {len(mlpext.activations())}\n"
