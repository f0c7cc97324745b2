"""What a newcomer meets before any operator: the build's refusals, the import guard, make's checks."""

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mlpext

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]


def run(command, folder=ROOT, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLPEXT", "MAKE"))}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**env, **environment},
        capture_output=True,
        text=True,
    )


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# The build.


def setup(folder, torch_source=None, **environment):
    """The outcome of setup.py; with `torch_source`, where torch is that file."""
    if torch_source is not None:
        write(folder / "torch" / "__init__.py", torch_source)
        environment["PYTHONPATH"] = str(folder)
    return run([sys.executable, "setup.py", "--name"], **environment)


def one_line(result):
    assert result.returncode != 0
    assert result.stderr.startswith("mlpext: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_build_without_torch_says_what_to_run(tmp_path):
    message = one_line(setup(tmp_path, "raise ModuleNotFoundError('torch')"))
    assert "pip install --no-build-isolation ." in message and "CPU wheel" in message


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0a0+git1234", "1.13.0"])
def test_build_refuses_a_torch_out_of_range(tmp_path, version):
    message = one_line(setup(tmp_path, f"__version__ = '{version}'"))
    assert version in message and "torch>=2.11,<2.16" in message


def test_build_refuses_an_unknown_choice_of_cuda(tmp_path):
    assert "'banana'" in one_line(setup(tmp_path, "__version__ = '2.13.0'", MLPEXT_CUDA="banana"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_build_refuses_cuda_that_is_not_there(tmp_path):
    assert torch.__version__ in one_line(setup(tmp_path, MLPEXT_CUDA="1"))


def test_build_refuses_an_old_setuptools(tmp_path):
    """One that does not know `license = "MIT"` would end in a hundred lines about it."""
    write(tmp_path / "setuptools.py", "__version__ = '76.1.0'")
    assert "pip install 'setuptools>=77'" in one_line(setup(tmp_path, "__version__ = '2.13.0'"))


def test_build_refuses_a_free_threaded_python(tmp_path):
    ours = "import sysconfig\nsysconfig.get_config_var = lambda name: name == 'Py_GIL_DISABLED'\n"
    write(tmp_path / "sitecustomize.py", ours)
    assert "free-threaded" in one_line(setup(tmp_path, "__version__ = '2.13.0'"))


@pytest.mark.parametrize(
    "compiler", ["false", "there-is-no-such-compiler", "c++ -D__clang_major__=13 -D__clang__"]
)
def test_build_refuses_an_old_compiler_before_it_compiles(tmp_path, compiler):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path]
    message = one_line(run(command, CXX=compiler))
    assert "GCC 11, clang 14 or newer" in message and compiler in message
    assert not [*tmp_path.iterdir()]


def test_build_is_silent_about_cuda(tmp_path):
    result = setup(tmp_path)
    assert result.returncode == 0 and result.stdout.split() == ["mlpext"]
    assert "cuda" not in result.stderr.lower()


def test_sources_are_complete(tmp_path):
    """What is packed for others to build holds every C++ file, and nothing that this build generated."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    result = run([sys.executable, "setup.py", "-q", "sdist", "--format=tar"], copy)
    assert result.returncode == 0, result.stderr
    (archive,) = (copy / "dist").iterdir()
    packed = run(["tar", "tf", archive]).stdout.split()
    packed = {name.partition("/")[2] for name in packed}
    needed = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*")} | {
        "LICENSE",
        "mlpext/py.typed",
    }
    assert needed <= packed
    assert not [name for name in packed if name.endswith(".so")]


# The loader.


SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
# An extension of nothing but a name, for the loader to load.
SOURCE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", NULL, -1, NULL};
PyMODINIT_FUNC PyInit__C(void) {
  PyObject* m = PyModule_Create(&definition);
  PyModule_AddStringConstant(m, "built_for", BUILT_FOR);
  return m;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Makes an extension module that knows its name."""
    folder = tmp_path_factory.mktemp("libraries")
    source = write(folder / "module.c", SOURCE)

    def make(tag):
        file = folder / f"_C.{tag}{SUFFIX}"
        if not file.exists():
            flags = ["-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", f'-DBUILT_FOR="{tag}"']
            subprocess.run(["cc", *flags, source, "-o", file], check=True)
        return file

    return make


def loaded(folder, torch_version, cuda, *files):
    """Import a package of the loader and these libraries alone, under a torch that is only a version."""
    write(folder / "torch.py", f"__version__ = '{torch_version}'\nclass version:\n    cuda = {cuda!r}\n")
    write(folder / "mlpext" / "__init__.py", "from mlpext import _extension")
    write(folder / "mlpext" / "_C_in_torch.py", "built_for = 'any torch'")
    for name in ("_extension.py", "_version.py"):
        shutil.copy(ROOT / "mlpext" / name, folder / "mlpext")
    (folder / "mlpext" / "lib").mkdir()
    for file in files:
        shutil.copy(file, folder / "mlpext" / "lib")
    code = write(
        folder / "code.py",
        "import mlpext\n"
        "from mlpext import _C\n"
        "import mlpext._C as again, sys\n"
        "assert _C is again is sys.modules['mlpext._C']\n"
        "print(_C.built_for, mlpext._extension.missing is None, mlpext._extension.library is not None)\n",
    )
    # -S: without site-packages, where an editable install would supply what the folder lacks.
    result = run([sys.executable, "-S", code], folder, PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stderr
    built_for, *state = result.stdout.rsplit(maxsplit=2)
    return built_for, state, result.stderr


@pytest.mark.emulator
@pytest.mark.parametrize(
    "met, cuda, expected",
    [
        ("2.13.0", None, "torch2.13"),
        ("2.13.1+cpu", None, "torch2.13"),
        ("2.1.3", None, "torch2.1"),
        ("2.14.0a0+git12ab", None, "torch2.14"),
        ("2.13.0+cu130", "13.0", "torch2.13-cu130"),
        ("2.13.0+cu126", "12.6", "torch2.13"),
    ],
)
def test_the_library_of_this_torch_is_taken(tmp_path, library, met, cuda, expected):
    files = [library(f"torch{tag}") for tag in ("2.1", "2.13", "2.13-cu130", "2.14")]
    assert loaded(tmp_path, met, cuda, *files) == (expected, ["True", "True"], "")


@pytest.mark.emulator
def test_without_a_library_that_fits_torch_does_the_work_and_a_warning_says_so(tmp_path, library):
    other_python = write(tmp_path / f"_C.torch2.15{SUFFIX.replace('cpython-3', 'cpython-30')}", "")
    older = write(tmp_path / f"_C.torch2.12{SUFFIX.replace('cpython-3', 'cpython-30')}", "")
    files = [library("torch2.13-cu130"), library("torch2.12"), other_python, older]
    built_for, state, told = loaded(tmp_path, "2.15.1+cpu", None, *files)
    assert built_for == "any torch" and state == ["False", "False"]
    (line, source) = told.splitlines()
    assert "code.py:1: RuntimeWarning" in line and source.strip() == "import mlpext"
    python = f"Python 3.{sys.version_info.minor}"
    assert f"no compiled library for torch 2.15.1+cpu with {python} (there is one for " in line
    assert (
        f"torch 2.12 with Python 3.0{sys.version_info.minor}, 3.{sys.version_info.minor}; "
        f"torch 2.13-cu130 with {python}; torch 2.15 with Python 3.0{sys.version_info.minor})" in line
    )
    assert "pip install --no-build-isolation" in line and "sdist" in line


def test_without_any_library_the_warning_says_so(tmp_path):
    built_for, state, told = loaded(tmp_path, "2.13.0", None)
    assert built_for == "any torch" and state == ["False", "False"]
    assert "(there is none at all)" in told


def test_a_library_that_does_not_load_is_told_of(tmp_path):
    broken = write(tmp_path / f"_C.torch2.13{SUFFIX}", "no library")
    built_for, _, told = loaded(tmp_path, "2.13.0", None, broken)
    assert built_for == "any torch" and broken.name in told


# Make and CI.


@pytest.fixture
def bare(tmp_path):
    """A copy of what make needs, and a PATH with only the tools that every machine has."""
    for name in ("Makefile", "pyproject.toml", "tools"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for tool in ("sh", "make", "find", "cat", "sed"):
        write(tmp_path / "bin" / tool, f'#!/bin/sh\nexec {shutil.which(tool)} "$@"\n').chmod(0o755)
    return tmp_path


def test_make_names_each_missing_tool(bare):
    # sitecustomize runs before anything else of Python's: here it takes ensurepip and Python.h away.
    write(
        bare / "site" / "sitecustomize.py",
        "import sys, sysconfig\n"
        "sys.modules['ensurepip'] = None\n"
        "sysconfig.get_path = lambda *_: '/nowhere'\n",
    )
    result = run(
        ["make", "train", f"PYTHON={sys.executable}"],
        bare,
        PATH=str(bare / "bin"),
        PYTHONPATH=str(bare / "site"),
    )
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("mlpext needs ")]
    assert len(lines) == 3
    expected = [("C++20 compiler", "g++", "gcc-c++"), ("Python.h", "python3-dev"), ("venv", "python3-venv")]
    for line, words in zip(lines, expected, strict=True):
        assert all(word in line for word in words)
    assert not (bare / ".venv").exists()


def test_make_without_python(bare):
    result = run(["make", "test"], bare, PATH=str(bare / "bin"))
    assert result.returncode != 0
    assert "Python 3.10 or newer" in result.stderr


def test_make_lists_its_verbs(bare):
    listed = run(["make"], bare).stdout
    for verb in (
        "train",
        "test",
        "quick",
        "test-all",
        "gradcheck",
        "bench",
        "readme",
        "check",
        "wheel",
        "clean",
        "help",
    ):
        assert re.search(rf"^{verb} ", listed, re.MULTILINE)


def test_ci_runs_the_tests_and_the_checks():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    result = run(["bash", "-n", script])
    assert result.returncode == 0, result.stderr


def test_ci_fails_if_either_fails(bare):
    """With a make that fails one verb, both still run and the script fails."""
    shutil.copytree(ROOT / ".ci", bare / ".ci")
    path = f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for broken, expected in (("test", 1), ("check", 1), ("none", 0)):
        write(bare / "bin" / "make", f'#!/bin/sh\necho "ran $1"\n[ "$1" != {broken} ]\n').chmod(0o755)
        result = run(["bash", ".ci/run"], bare, PATH=path)
        assert result.returncode == expected
        assert "ran test" in result.stdout and "ran check" in result.stdout


# The metadata.


def test_version_is_written_in_one_place():
    version = mlpext.__version__
    others = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "mlpext").rglob("*.py")]
    assert [path.name for path in others if f'"{version}"' in path.read_text()] == ["_version.py"]
    result = run([sys.executable, "setup.py", "--version"])
    assert result.stdout.split() == [version], result.stderr


def test_pip_has_the_range_of_torch_that_setup_has():
    """setup.py's is that of its message, and of test_build_refuses_a_torch_out_of_range."""
    for name in ("pyproject.toml", "setup.py"):
        assert "torch>=2.11,<2.16" in (ROOT / name).read_text()


def test_an_isolated_build_does_not_fetch_torch():
    (requires,) = re.findall(r"^requires = (.+)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "torch" not in requires


@pytest.mark.launch
def test_dynamo_is_imported_when_it_is_needed_and_told_then():
    """It takes as long to import as torch itself."""
    code = """
import sys, mlpext, torch
assert "torch._dynamo" not in sys.modules
x = torch.randn(5)
compiled = torch.compile(mlpext.functional.gelu, backend="eager", fullgraph=True)
assert torch.allclose(compiled(x), torch.nn.functional.gelu(x), atol=1e-6)
"""
    for first in ("", "import torch._dynamo\n"):
        check = code if not first else code.replace('assert "torch._dynamo" not in sys.modules', "")
        subprocess.run([sys.executable, "-c", first + check], check=True)
