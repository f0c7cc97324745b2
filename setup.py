"""Builds mlpext._C against the torch of this environment; pyproject.toml has the rest of the package.

MLPEXT_CUDA=auto|0|1    auto: with CUDA where torch has it and a toolkit is found (never by looking for a GPU)
MLPEXT_WERROR=1         warnings are errors: for `make check`, not for users
MLPEXT_EMULATE_AVX512=1 AVX-512's loops on AVX2, by tests/cpu/avx512_emulator, to test where it lacks
MLPEXT_INSTRUMENT=...   address: with ASan and UBSan, thread: with TSan, both with the checks of MLPEXT_DEBUG;
                        coverage: with gcov's counters
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import setup


def stop(message: str) -> None:
    sys.exit(f"mlpext: {message}")


try:
    import torch
except ImportError:
    stop(
        "building needs torch: in an environment that has torch (a CPU wheel is enough) and setuptools, run "
        "`pip install --no-build-isolation .`"
    )
if not (2, 11) <= tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 16):
    stop(f"torch {torch.__version__} is not supported: torch>=2.11,<2.16 is needed")

choice = os.environ.get("MLPEXT_CUDA", "auto")
if choice not in ("auto", "0", "1"):
    stop(f"MLPEXT_CUDA={choice!r} is none of auto, 0, 1")

# Before cpp_extension, which guesses from where nvcc lies and is misled by a wrapper in /usr/local/bin.
if "CUDA_PATH" not in os.environ and os.path.exists("/usr/local/cuda/bin/nvcc"):
    os.environ.setdefault("CUDA_HOME", "/usr/local/cuda")
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
from torch.utils import cpp_extension  # noqa: E402

kernels = sorted(glob("csrc/cuda/**/*.c*", recursive=True))
kernels = [kernel for kernel in kernels if kernel.endswith((".cu", ".cpp"))]
toolkit = torch.version.cuda is not None and cpp_extension.CUDA_HOME is not None
if choice == "1" and not toolkit:
    stop(f"MLPEXT_CUDA=1, but torch {torch.__version__} has no CUDA or no CUDA toolkit was found (CUDA_HOME)")
if choice == "1" and not kernels:
    stop("MLPEXT_CUDA=1, but this version has no CUDA kernels")
cuda = choice != "0" and toolkit and bool(kernels)

# No -march: the files in csrc/cpu choose their instruction set by pragma, so one build runs everywhere.
# -ffp-contract=off: the same bits from every instruction set. -g0: Python's own flags ask for debug data.
flags = ["-std=c++20", "-O2", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
# at::parallel_for is a plain loop without it. Not for the linker: so it finds the OpenMP that torch brings
# and torch.set_num_threads sets, not the system's.
link = []
if sys.platform == "linux":
    flags.append("-fopenmp")
    if "clang" in os.environ.get("CXX", "c++"):  # whose loops call an OpenMP of its own
        link.append("-fopenmp")
if os.environ.get("MLPEXT_WERROR") == "1":
    # g++ 12 sees uninitialised values, wrongly, where torch's templates and AVX-512 intrinsics are inlined.
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]

sources = sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(kernels))
if os.environ.get("MLPEXT_EMULATE_AVX512") == "1":
    # Only these two differ, so that the objects of the ordinary build serve for the others. They come first,
    # since one takes as long as several.
    emulated = {f"csrc/cpu/{name}.cpp": f"tests/cpu/avx512_emulator/{name}.cpp" for name in ("avx512", "isa")}
    sources = [*emulated.values(), *(source for source in sources if source not in emulated)]
make_extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
extension = make_extension("mlpext._C", sources + (kernels if cuda else []))
extension.define_macros = [("MLPEXT_WITH_CUDA", None)] if cuda else []
extension.extra_link_args = link
instrument = os.environ.get("MLPEXT_INSTRUMENT", "")
if instrument not in ("", "address", "thread", "coverage"):
    stop(f"MLPEXT_INSTRUMENT={instrument!r} is none of address, thread, coverage")
if instrument == "address":
    # Left out: null and object-size, where ASan stops too, and use-after-scope, which poisons every lane of
    # every inlined word. Together they make compiling four times as long.
    instruments = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size"]
    flags += ["-fno-sanitize-address-use-after-scope", "-fno-sanitize-recover=undefined"]
elif instrument == "thread":
    instruments = ["-fsanitize=thread"]
    flags.append("-Wno-tsan")  # of fences in torch's headers, which TSan does not follow
    extension.sources.append("tests/std_threads.cpp")
elif instrument == "coverage":
    instruments = ["--coverage"]
if instrument:
    flags += [*instruments, "-fno-omit-frame-pointer", "-O1"]
    extension.extra_link_args += instruments
if instrument in ("address", "thread"):
    extension.define_macros.append(("MLPEXT_DEBUG", None))
# torch's headers become system headers: a warning in them is not ours to mend.
system = [f"-isystem{path}" for path in extension.include_dirs]
extension.include_dirs = [os.path.abspath("csrc")]
# -fmad=false: as -ffp-contract=off. The kernels ask for multiply-adds where they want them.
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false"]  # tools/cuda_check.py reads this line
extension.extra_compile_args = {"cxx": flags + system, "nvcc": NVCC_FLAGS}


class Build(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        # A fixed place for objects, so that pip's editable build does not start from nothing at every edit;
        # one for each torch, because ninja does not watch system headers.
        self.build_temp = self.build_temp or f"build/torch-{torch.__version__}"
        super().finalize_options()

    def run(self) -> None:
        super().run()
        # What mlpext/_import_check.py compares with the torch that it meets.
        Path(self.get_ext_fullpath("mlpext._C")).with_name("_build.py").write_text(
            f'''"""Written by setup.py."""

version = "{self.distribution.get_version()}"
torch_version = "{torch.__version__}"
cuda = {cuda}
cuda_archs = "{os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""}"
'''
        )


setup(ext_modules=[extension], cmdclass={"build_ext": Build})
