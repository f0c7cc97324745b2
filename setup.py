"""Builds mlpext/lib/_C... against the torch of this environment; pyproject.toml has the rest of the package.

MLPEXT_CUDA=auto|0|1    auto: with CUDA where torch has it and a toolkit is found (never by looking for a GPU)
MLPEXT_WERROR=1         warnings are errors: for `make check`, not for users
MLPEXT_EMULATE_AVX512=1 AVX-512's loops on AVX2, by tests/cpu/avx512_emulator, to test where it lacks
MLPEXT_INSTRUMENT=...   address: with ASan and UBSan, thread: with TSan, both with the checks of MLPEXT_DEBUG;
                        coverage: with gcov's counters
MLPEXT_LIBRARIES=folder packs the libraries in there and compiles nothing: for tools/wheel.py
MAX_JOBS=n              files compiled at a time (as many as there are cores, and memory for)
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import setuptools


def stop(message: str) -> None:
    sys.exit(f"mlpext: {message}")


if int(setuptools.__version__.partition(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old to build it: pip install 'setuptools>=77' first")
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    stop("free-threaded Python is not supported: the extension holds Python's objects without counting them")
try:
    import torch
except ImportError:
    stop(
        "building needs torch: in an environment that has torch (a CPU wheel is enough) and setuptools, run "
        "`pip install --no-build-isolation .`"
    )
minor = ".".join(torch.__version__.split(".")[:2])
if minor not in ("2.11", "2.12", "2.13", "2.14", "2.15"):
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
# tools/wheel.py reads this line.
CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-ffp-contract=off", "-fvisibility=hidden"]
flags = [*CXX_FLAGS]
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
extension = make_extension("mlpext.lib._C", sources + (kernels if cuda else []))
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


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "tools/compiler.cpp"]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            return
    stop(f"building needs GCC 11, clang 14 or newer, which {compiler} is not (CXX chooses another one)")


def jobs() -> int:
    """A file takes up to 1.3 GiB, and the system needs some too."""
    memory = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # a container's; "max" where there is none
        memory.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(1, min(os.cpu_count() or 1, min(memory) // (3 << 29)))


def units(sources: list[str]) -> list[str]:
    """The same code in fewer files: torch's headers, which take most of the time, are read twice."""
    groups: dict[str, list[str]] = {"operators": [], "python": []}
    alone = []
    for source in sources:
        if "isa_kernels.h" in Path(source).read_text() or source in kernels:
            alone.append(source)
        else:
            groups["python" if source.startswith("csrc/python/") else "operators"].append(source)
    os.makedirs("build/units", exist_ok=True)
    for name, group in groups.items():
        includes = "".join(f'#include "{os.path.abspath(source)}"\n' for source in group)
        Path(f"build/units/{name}.cpp").write_text(includes)
    return [*alone, *(f"build/units/{name}.cpp" for name in groups)]


class Build(cpp_extension.BuildExtension):
    def finalize_options(self) -> None:
        # A fixed place for objects, so that pip's editable build does not start from nothing at every edit;
        # one for each torch and Python, because ninja does not watch system headers.
        versions = f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
        self.build_temp = self.build_temp or f"build/{versions}"
        super().finalize_options()

    def get_ext_filename(self, name: str) -> str:
        """mlpext/lib/_C..., or its last part for `_C`, under the name that mlpext/_extension.py looks for."""
        cuda_tag = f"-cu{torch.version.cuda.replace('.', '')}" if cuda else ""
        file = f"_C.torch{minor}{cuda_tag}{sysconfig.get_config_var('EXT_SUFFIX')}"
        return os.path.join(*name.split(".")[:-1], file)

    def run(self) -> None:
        if self.inplace:
            os.makedirs("mlpext/lib", exist_ok=True)
        else:  # a wheel must not take in what lies there of an earlier build
            shutil.rmtree(f"{self.build_lib}/mlpext/lib", ignore_errors=True)
        if folder := os.environ.get("MLPEXT_LIBRARIES"):
            shutil.copytree(folder, f"{self.build_lib}/mlpext/lib")
            return
        check_compiler()
        if "bdist_wheel" in self.distribution.commands:  # not for developers, who change one file at a time
            extension.sources = units(extension.sources)
        os.environ.setdefault("MAX_JOBS", str(jobs()))
        number, at_once = len(extension.sources), os.environ["MAX_JOBS"]
        print(f"mlpext: compiling {number} files for torch {minor}, {at_once} at a time", flush=True)
        super().run()


setuptools.setup(ext_modules=[extension], cmdclass={"build_ext": Build})
