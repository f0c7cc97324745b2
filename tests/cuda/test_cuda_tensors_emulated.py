"""csrc/cuda in the place of csrc/cpu, on CPU tensors, with the emulator's kernels.

The tests for a GPU run with that, and those of tests/functional. What remains for a GPU: devices, streams,
graphs, and what is fast.
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

from cuda_emulator import COMPILER, EMULATOR, ROOT, command
from mlpext import _extension

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
    shutil.copytree(ROOT / "mlpext", folder / "mlpext", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for device, key in (("cpu", "PrivateUse3"), ("cuda", "CPU")):  # the first: out of the way
        for path in source.glob(f"{device}/*.cpp"):
            text = path.read_text()
            path.write_text(re.sub(rf"(?i)(TORCH_LIBRARY_IMPL\(mlpext, ){device},", rf"\g<1>{key},", text))
    files = sorted([*source.rglob("*.cpp"), *source.rglob("*.cu")])
    objects = [folder / f"{path.parent.name}-{path.name}.o" for path in files]
    flags = [f"-I{EMULATOR / 'torch'}", f"-I{source}", "-fPIC", "-w", "-fopenmp"]
    flags += ["-DMLPEXT_WITH_CUDA", "-DTORCH_EXTENSION_NAME=_C"]
    flags += [f"-isystem{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_path("include"))]
    jobs = []
    for path, o in zip(files, objects, strict=True):
        jobs.append([*COMPILER, *flags, "-x", "c++", "-c", str(path), "-o", str(o)])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(command, jobs))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-fopenmp"]
    extension = folder / "mlpext" / "lib" / _extension.file_names(torch.__version__, None)[0]
    extension.parent.mkdir()
    command([*COMPILER, "-shared", *map(str, objects), *libraries, "-o", str(extension)])
    return folder


# Files, which of their tests (a few would take minutes each), and at least how many must pass.
RUNS = {
    "cuda/test_cuda.py": ("not large", 850),
    "cuda/test_cuda_narrow_gpu.py": ("others or frozen or changed", 12),
    # torch's gelu_tanh, fused with the product, is NaN at -inf, where ours has the limit 0.
    "functional/test_linear_activation.py": ("not (specials and gelu_tanh)", 950),
    "functional/test_linear_maxout.py": ("", 80),
    "nn/test_mlp.py": ("", 200),
}


@pytest.mark.parametrize("file", RUNS)
def test_with_kernels_of_cuda(package, file):
    wanted, at_least = RUNS[file]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{package}{os.pathsep}{ROOT / 'tests'}",
        "MLPEXT_TEST_DEVICE": "cpu",
    }
    words = ["-q", "-rs", "-m", "", "-k", wanted, "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(ROOT / "tests" / file)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=package,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "in this build" not in run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= at_least, run.stdout[-400:]
