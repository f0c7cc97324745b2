"""Each instruction set: which one runs, and the tests marked `isa` again under each of the others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlpext

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
ISAS = mlpext._C.cpu_isas()
OTHERS = [isa for isa in ISAS if isa != mlpext._C.cpu_isa()]


def python(*arguments, isa):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "MLPEXT_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_the_list():
    assert ISAS in (["neon"], ["baseline", "avx2", "avx512"][: len(ISAS)])
    assert mlpext._C.cpu_isa() in ISAS
    if "MLPEXT_CPU_ISA" not in os.environ:
        assert mlpext._C.cpu_isa() == ISAS[-1], "the best is the default"


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_chooses(isa):
    run = python("-c", "import mlpext; print(mlpext._C.cpu_isa())", isa=isa)
    assert run.stdout.strip() == isa, run.stderr


def test_an_unknown_one_is_refused():
    program = "import mlpext, torch; print(mlpext._C.cpu_isa()); mlpext.functional.elu(torch.zeros(3))"
    run = python("-c", program, isa="sse9")
    assert run.returncode != 0
    assert "sse9" in run.stderr and "baseline" in run.stderr and "MLPEXT_CPU_ISA" in run.stderr


@pytest.mark.skipif("MLPEXT_CPU_ISA" in os.environ, reason="this is a run under one instruction set already")
@pytest.mark.parametrize("isa", OTHERS)
def test_everything_again(isa):
    """Numbers, specials, layouts and bits under this instruction set."""
    run = python("-m", "pytest", "-q", "-x", "-m", "isa", "-p", "no:cacheprovider", "tests", isa=isa)
    assert run.returncode == 0, run.stdout[-6000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(ISAS == ["neon"], reason="there is but one")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_symbol_but_the_table_leaves_its_object(isa):
    """A weak function compiled for one instruction set could be the copy that the linker keeps for all."""
    objects = sorted((ROOT / "build").glob(f"torch-*/csrc/cpu/{isa}.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs the objects of the build in place, and nm")
    for path in objects:
        run = subprocess.run(
            ["nm", "--extern-only", "--defined-only", "-C", path], capture_output=True, text=True
        )
        names = [line.split(maxsplit=2)[2] for line in run.stdout.splitlines()]
        assert names == [f"mlpext::{isa}::kernels"], path
