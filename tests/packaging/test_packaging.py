"""What a newcomer meets before any operator: the build's refusals, the import guard, make's checks."""

import os
import re
import shutil
import subprocess
import sys
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
    assert not [name for name in packed if name.endswith(".so") or name == "mlpext/_build.py"]


# The import guard.


def guarded_import(folder, built=None, torch_version="2.13.0", cuda=None, extension=True):
    """Import a package of nothing but the guard, under a torch of nothing but a version."""
    write(folder / "torch.py", f"__version__ = '{torch_version}'\nclass version:\n    cuda = {cuda!r}\n")
    write(folder / "mlpext" / "__init__.py", "from mlpext._import_check import __version__")
    shutil.copy(ROOT / "mlpext" / "_import_check.py", folder / "mlpext")
    if built is not None:
        write(folder / "mlpext" / "_build.py", built)
    if extension:
        write(folder / "mlpext" / "_C.py", "")
    # -S: without site-packages, where an editable install would supply what the folder lacks.
    return run(
        [sys.executable, "-S", "-c", "import mlpext; print(mlpext.__version__)"],
        folder,
        PYTHONPATH=str(folder),
    )


def build_of(torch_version, cuda=False):
    return f"version = '0.0'\ntorch_version = '{torch_version}'\ncuda = {cuda}\n"


def last_line(result):
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("met", ["2.13.0", "2.13.1+cpu", "2.13.0+cu130"])
def test_import_takes_the_same_minor_version(tmp_path, met):
    assert guarded_import(tmp_path, build_of("2.13.0+cpu"), met).stdout == "0.0\n"


@pytest.mark.parametrize("met", ["2.14.1+cu130", "2.1.0", "3.13.0"])
def test_import_refuses_another_torch(tmp_path, met):
    message = last_line(guarded_import(tmp_path, build_of("2.13.0+cpu"), met))
    assert message.startswith("ImportError: mlpext was built against torch 2.13.0+cpu, but torch ")
    assert met in message and "pip install --no-build-isolation" in message


def test_import_refuses_a_torch_without_the_cuda_it_was_built_with(tmp_path):
    message = last_line(guarded_import(tmp_path, build_of("2.13.0+cu130", cuda=True), "2.13.0+cpu"))
    assert "2.13.0+cu130" in message and "2.13.0+cpu" in message


def test_import_of_what_was_never_built(tmp_path):
    message = last_line(guarded_import(tmp_path))
    assert "not built" in message and "pip install --no-build-isolation" in message


def test_import_without_an_extension_for_this_python(tmp_path):
    assert "not built for this Python" in last_line(
        guarded_import(tmp_path, build_of("2.13.0"), extension=False)
    )


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
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert mlpext.__version__ == version
    others = [
        ROOT / "setup.py",
        *(path for path in (ROOT / "mlpext").glob("*.py") if path.name != "_build.py"),
    ]
    assert not [path.name for path in others if version in path.read_text()]


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
