"""csrc/cuda in the place of csrc/cpu, on CPU tensors, with the emulator's kernels, cuBLASLt and CUTLASS.

tests/cuda/test_cuda.py runs with that. What remains for a GPU: devices, streams, graphs, and what is fast.
"""

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from test_cuda_emulated import COMPILER, EMULATOR, ROOT, command

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux"),
]


@pytest.fixture(scope="module")
def package():
    """A folder with an mlpext whose CPU operators are those of csrc/cuda."""
    folder = ROOT / "build" / "cuda_tensors"
    shutil.rmtree(folder, ignore_errors=True)
    source = shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(
        ROOT / "mlpext", folder / "mlpext", ignore=shutil.ignore_patterns("_C*.so", "__pycache__")
    )
    for device, key in (("cpu", "PrivateUse3"), ("cuda", "CPU")):  # the first: out of the way
        for path in source.glob(f"{device}/*.cpp"):
            text = path.read_text()
            path.write_text(re.sub(rf"(?i)(TORCH_LIBRARY_IMPL\(mlpext, ){device},", rf"\g<1>{key},", text))
    kernels = source / "cuda" / "cutlass"
    for path in kernels.glob("*.cu"):
        path.unlink()
    shutil.copy(EMULATOR / "cutlass_launchers.cpp", kernels)  # in their place
    files = sorted([*source.rglob("*.cpp"), *source.rglob("*.cu")])
    objects = [folder / f"{path.parent.name}-{path.name}.o" for path in files]
    flags = [f"-I{EMULATOR / 'torch'}", f"-I{source}", "-fPIC", "-w", "-fopenmp"]
    flags += ["-DMLPEXT_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    jobs = []
    for path, o in zip(files, objects, strict=True):
        # The products that stand in for the libraries' are naive.
        quick = ["-O1"] if path.parent.name in ("cuda", "cutlass") else []
        jobs.append([*COMPILER, *flags, *quick, "-x", "c++", "-c", str(path), "-o", str(o)])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(command, jobs))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-fopenmp"]
    modules: dict[str, list[str]] = {"_C": [], "_cutlass": []}
    for path, o in zip(files, objects, strict=True):
        modules["_cutlass" if path.parent == kernels else "_C"].append(str(o))
    for name, parts in modules.items():
        extension = folder / "mlpext" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        command([*COMPILER, "-shared", *parts, *libraries, "-o", str(extension)])
    # cuda: whether torch must have it.
    build = f'version = "0"\ntorch_version = "{torch.__version__}"\n'
    build += 'cuda = False\ncutlass = True\ncuda_archs = ""\n'
    (folder / "mlpext" / "_build.py").write_text(build)
    return folder


def run_tests_for_a_gpu(package, wanted, at_least, **switches):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{package}{os.pathsep}{ROOT / 'tests'}",
        "MLPEXT_TEST_DEVICE": "cpu",
        **switches,
    }
    words = ["-q", "-rs", "-m", "cuda", "-k", wanted, "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(ROOT / "tests" / "test_cuda.py")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=package,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "in this build" not in run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= at_least, run.stdout[-400:]


@pytest.mark.parametrize("switches", ["0", "1"])
def test_the_tests_for_a_gpu(package, switches):
    wanted = "(cutlass or epilogue or switch or plans or expanded or frozen or layouts) and not triton"
    run_tests_for_a_gpu(package, wanted, 91, MLPEXT_CUBLASLT=switches, MLPEXT_CUTLASS=switches)


def test_those_of_triton(package):
    """By its interpreter, which cannot multiply bfloat16."""
    pytest.importorskip("triton", reason="triton is not installed: make test-triton")
    run_tests_for_a_gpu(package, "triton and not bfloat16", 10, TRITON_INTERPRET="1")
