"""The compile-only check of CUDA (tools/cuda_check.py, part of `make check`): that it can fail, and skip."""

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.emulator

TOOL = Path(__file__).parents[2] / "tools" / "cuda_check.py"
spec = importlib.util.spec_from_file_location("cuda_check", TOOL)
cuda_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_check)

PTX = ".entry wide(p)\n ld.global.v4.u32 \n st.global.wb.v4.u32 \n"


def ptxas(registers=40, spilled=0, stack=0):
    return (
        "ptxas info    : Compiling entry function 'wide' for 'sm_90'\n"
        f"    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, 480 bytes cmem[0]\n"
    )


def test_within_the_budget():
    line, faults = cuda_check.judge("float32", ptxas(), PTX)
    assert line.startswith("float32: 1 kernels") and "at most 40 registers" in line
    assert not faults


@pytest.mark.parametrize(
    "beyond, what",
    [
        ({"registers": 99}, "99 registers"),
        ({"spilled": 400}, "400 bytes spilled"),
        ({"stack": 80}, "80 bytes"),
    ],
)
def test_beyond_the_budget(beyond, what):
    (fault,) = cuda_check.judge("float32", ptxas(**beyond), PTX)[1]
    assert what in fault and "sm_90" in fault


def test_lost_wide_accesses_and_an_unknown_report():
    assert cuda_check.judge("float32", ptxas(), PTX.replace("st.global.wb.v4.u32", "st.global.v2.u16"))[1]
    assert cuda_check.judge("float32", ptxas(), PTX.replace("ld.global.v4.u32", "ld.global.u16"))[1]
    assert cuda_check.judge("float32", "nothing that it knows", PTX)[1]


NARROW = (
    ".entry narrow_forward(p)\n cp.async.cg.shared.global \n ldmatrix.sync.aligned.m8n8.x4.shared.b16 \n"
    " mma.sync.aligned.m16n8k16.row.col \n"
    ".entry narrow_backward(p)\n cp.async.cg.shared.global \n ldmatrix.sync.aligned.m8n8.x4.shared.b16 \n"
    " ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 \n mma.sync.aligned.m16n8k16.row.col \n"
    ".func library_sin(p)\n st.local.u64 \n"
)


def test_narrow_networks_within_the_budget():
    line, faults = cuda_check.judge_narrow("narrow_float16", ptxas(128), NARROW, "HMMA.16816.F32 R0")
    assert "1 HMMA" in line and not faults
    line, faults = cuda_check.judge_narrow("narrow_float16", ptxas(128), NARROW, "")
    assert "no disassembler" in line and not faults


@pytest.mark.parametrize(
    "said, ptx, sass, what",
    [
        (ptxas(129), NARROW, "", "129 registers"),
        (ptxas(spilled=4), NARROW, "", "4 bytes spilled"),
        (ptxas(), NARROW.replace("mma.sync", "fma", 1), "", "mma.* in narrow_forward"),
        (ptxas(), NARROW.replace(".trans", ""), "", "trans.* in narrow_backward"),
        (ptxas(), NARROW.replace("narrow_backward", "other"), "", "0 kernels narrow_backward"),
        (ptxas(), NARROW.replace(".func", "ld.local.f32\n.func"), "", "local memory in narrow_backward"),
        (ptxas(), NARROW, "FFMA R0", "no HMMA"),
    ],
)
def test_narrow_networks_beyond_the_budget(said, ptx, sass, what):
    faults = cuda_check.judge_narrow("narrow_bfloat16", said, ptx, sass)[1]
    assert any(re.search(what, fault) for fault in faults), faults


def test_without_nvcc_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    cuda_check.main()
    assert "skipped" in capsys.readouterr().out


def test_an_error_of_the_compiler_is_a_fault(monkeypatch):
    """Of every file of kernels, wherever it lies under csrc/cuda."""

    def fail(*_):
        raise RuntimeError("error: expected a ';'")

    monkeypatch.setattr(cuda_check, "compile_kernels", fail)
    monkeypatch.setattr(cuda_check, "compile_binding", lambda *_: None)
    faults = cuda_check.check(Path("/nowhere/bin/nvcc"))[1]
    kernels = list(TOOL.parent.parent.glob("csrc/cuda/**/*.cu"))
    assert len(faults) == len(kernels) >= 4 and "expected a ';'" in faults[0]


def test_the_flags_are_those_of_the_build():
    assert "-fmad=false" in cuda_check.nvcc_flags() and "-std=c++20" in cuda_check.nvcc_flags()
