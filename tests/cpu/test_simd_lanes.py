"""Loads and stores of parts of registers (csrc/formulas/simd_memory.h), by partial_words.cpp: compiled for
each instruction set, and for AVX-512 once more on tests/cpu/avx512_emulator."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++").split()
EMULATED = "-DMLPEXT_EMULATED_AVX512"
BUILDS = {
    "baseline": (16,),
    "avx2": (32,),
    "avx512": (64,),
    "avx512 emulated": (64, EMULATED),
}
SKIPPED = 77  # the program's answer on a machine that lacks the instructions

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets are x86-64's"),
    pytest.mark.skipif(not shutil.which(CXX[0]), reason="needs a C++ compiler"),
]


def run(command, **options):
    # Where these tests run under a sanitizer's library, the compiler need not.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


def build(folder, vector_bytes, *flags, sources=CSRC):
    program = folder / "partial_words"
    words = [*CXX, "-std=c++20", "-O1", "-ffp-contract=off", f"-I{sources}", f"-I{HERE}", *flags]
    words += [f"-DMLPEXT_VECTOR_BYTES={vector_bytes}", HERE / "partial_words.cpp", "-o", program]
    compiled = run(words)
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    return program


@pytest.mark.parametrize("name", BUILDS)
def test_every_part_of_a_register(name, tmp_path):
    ran = run([build(tmp_path, *BUILDS[name])])
    if ran.returncode == SKIPPED:
        pytest.skip(f"this machine lacks {name}")
    assert ran.returncode == 0, ran.stdout or "it crashed: a byte beyond the part was touched"


def test_a_mask_that_is_empty_for_a_whole_register_is_seen(tmp_path):
    """A shift by all 64 bits: how outputs that fill a register were once lost."""
    sources = tmp_path / "csrc"
    for folder in ("formulas", "cpu"):
        shutil.copytree(CSRC / folder, sources / folder)
    words = sources / "formulas" / "simd_memory.h"
    mask = "_bzhi_u64(~uint64_t(0), static_cast<unsigned>(n * sizeof(M)))"
    text = words.read_text()
    assert text.count(mask) == 1
    words.write_text(text.replace(mask, "(uint64_t(1) << (n * sizeof(M))) - 1"))
    ran = run([build(tmp_path, 64, EMULATED, sources=sources)])
    if ran.returncode == SKIPPED:
        pytest.skip("this machine lacks AVX2")
    assert {"load of 16 of float", "store of 16 of float", "load of 8 of double"} <= {*ran.stdout.split("\n")}


def test_a_debug_build_stops_at_what_is_no_part(tmp_path):
    program = build(tmp_path, 16, "-DMLPEXT_DEBUG")
    for n in (0, 4):
        assert run([program, str(n)]).returncode == 0
    for n in (-1, 5):
        ran = run([program, str(n)])
        assert ran.returncode != 0 and f"{n} elements are no part of a register of 4" in ran.stderr
