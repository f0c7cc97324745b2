"""The plan of `make wheel`: what is compiled how often, and which libraries come out. It is not run."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from mlpext import _extension

ROOT = Path(__file__).parents[2]
pytest.importorskip("ninja", reason="tools/wheel.py writes for ninja")


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """tools/wheel.py, under a name that is not that of PyPA's package; it writes to tmp_path."""
    spec = importlib.util.spec_from_file_location("make_wheel", ROOT / "tools" / "wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def read(folder):
    """build.ninja, without its line breaks within a statement."""
    return re.sub(r"\$\n\s*", "", (folder / "build.ninja").read_text())


def test_each_file_is_compiled_once_a_kind(wheel, tmp_path):
    suffixes = [".cpython-311-x.so", ".cpython-312-x.so"]
    pythons = [{"include": f"/python{suffix}", "suffix": suffix} for suffix in suffixes]
    wheel.write_build({"2.12": Path("/torch12"), "2.13": Path("/torch13")}, pythons)
    plan = read(tmp_path)
    compiled = re.findall(r"^build \S+\.o: compile (\S+)", plan, re.MULTILINE)
    kernels = [path for path in compiled if Path(path).parent == ROOT / "csrc" / "cpu"]
    assert {Path(path).name for path in kernels} >= {"baseline.cpp", "avx2.cpp", "avx512.cpp"}
    assert len(compiled) == len(set(kernels)) + 2 + 4  # operators: for each torch; Python's way in: each pair
    grouped = [
        ROOT / "csrc" / file
        for name in ("operators", "python")
        for file in re.findall(r'#include "(.+)"', (tmp_path / f"{name}.cpp").read_text())
    ]
    everything = {file for file in ROOT.glob("csrc/**/*.cpp") if "cuda" not in file.parts}
    assert sorted([*grouped, *map(Path, kernels)]) == sorted(everything)

    linked = re.findall(r"^build lib/(\S+): link", plan, re.MULTILINE)
    operators = [f"libmlpext_torch{minor}.so" for minor in ("2.12", "2.13")]
    entries = [f"_C.torch{minor}{suffix}" for minor in ("2.12", "2.13") for suffix in suffixes]
    assert sorted(linked) == sorted(["libmlpext_kernels.so", *operators, *entries])


def test_names_are_those_that_the_loader_looks_for(wheel, tmp_path):
    wheel.write_build({"2.13": Path("/torch")}, [wheel.interpreter(sys.executable)])
    (name,) = _extension.file_names("2.13.0+cpu", None)
    assert f"build lib/{name}: link" in read(tmp_path)


def test_flags_that_decide_on_bits_are_those_of_the_build(wheel):
    assert {"-ffp-contract=off", "-std=c++20", "-O2"} <= set(wheel.flags())


def test_a_python_that_is_not_there(wheel):
    with pytest.raises(SystemExit, match=r"no Python 9\.9"):
        wheel.interpreter("9.9")
