"""Compiles everything in csrc/cuda without a GPU, and without a CUDA build of torch: `make check` runs this.

Every .cu for sm_80 and sm_90 with the flags that torch and setup.py give nvcc, every .cpp with the headers of
whatever torch is there. Prints registers and spills of the kernels, and fails beyond the budgets below, where
a kernel has lost its 16-byte accesses, or one of a narrow network its tensor cores. Without nvcc it says so
and passes.
"""

from __future__ import annotations

import ast
import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "cuda_check"
ARCHS = ("80", "90")
# Three blocks of 256 threads on a multiprocessor.
REGISTERS = 84
SPILLED_BYTES = 16
STACK_BYTES = 64  # the reduction of a large argument of sin needs 40
# Narrow networks: two blocks of 256 threads, no spills, and in each kernel what stands here of its PTX.
# mma.sync becomes HMMA, which is looked for as well where a disassembler is at hand.
NARROW_REGISTERS = 128
NARROW_PTX = {
    "forward": (r"cp\.async\.cg\.shared\.global", r"mma\.sync\.aligned\.m16n8k16", r"ldmatrix\S+x4\.shared"),
    "backward": (
        *(r"cp\.async\.cg\.shared\.global", r"mma\.sync\.aligned\.m16n8k16"),
        *(r"ldmatrix\S+x4\.shared", r"ldmatrix\S+x4\.trans\.shared"),
    ),
}


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: skipped, there is no nvcc 12 or newer (CUDA_HOME, /usr/local/cuda, PATH)")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    stamp, key = FOLDER / "stamp", digest(nvcc)
    if not stamp.exists() or stamp.read_text().partition("\n")[0] != key:
        report, faults = check(nvcc)
        if faults:
            sys.exit("cuda-check: " + "\n".join([*report, *faults]))
        stamp.write_text("\n".join([key, *report]))
    print("cuda-check:", stamp.read_text().partition("\n")[2])


def find_nvcc() -> Path | None:
    on_path = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        on_path and Path(on_path).resolve().parent.parent,
    ]
    for home in filter(None, places):
        nvcc = Path(home) / "bin" / "nvcc"
        if nvcc.exists() and (release := re.search(r"release (\d+)", output([nvcc, "--version"]))):
            return nvcc if int(release[1]) >= 12 else None
    return None


def output(command: list) -> str:
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def digest(nvcc: Path) -> str:
    key = hashlib.sha256(f"{torch.__version__} {output([nvcc, '--version'])}".encode())
    for path in [Path(__file__), ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))]:
        key.update(path.read_bytes())
    return key.hexdigest()


def check(nvcc: Path) -> tuple[list[str], list[str]]:
    """A line for each file of kernels, and what is wrong."""
    kernels, bindings = (sorted(ROOT.glob(f"csrc/cuda/**/*.{kind}")) for kind in ("cu", "cpp"))
    report, faults = [], []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {path: pool.submit(compile_kernels, nvcc, path) for path in kernels}
        checked = {path: pool.submit(compile_binding, nvcc, path) for path in bindings}
        for path, job in {**compiled, **checked}.items():
            try:
                result = job.result()
            except RuntimeError as error:
                faults.append(str(error))
                continue
            if path in compiled:
                line, wrong = (judge_narrow if "narrow" in path.stem else judge)(path.stem, *result)
                report.append(line)
                faults += wrong
    report.append(f"bindings: {', '.join(path.name for path in bindings)}")
    return report, faults


def nvcc_flags() -> list[str]:
    """Those that setup.py's build gives nvcc; importing setup.py would build."""
    assignments = (
        node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign)
    )
    (own,) = (node.value for node in assignments if ast.unparse(node.targets[0]) == "NVCC_FLAGS")
    return [
        *cpp_extension.COMMON_NVCC_FLAGS,
        *ast.literal_eval(own),
        *("--compiler-options", "-fPIC", "-Werror=all-warnings", f"-I{ROOT / 'csrc'}"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS),
    ]


def compile_kernels(nvcc: Path, path: Path) -> tuple[str, str, str]:
    """What ptxas says of the kernels, their PTX, and their SASS where there is a disassembler."""
    keep = FOLDER / path.stem
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir()
    words = [nvcc, *nvcc_flags(), "-Xptxas", "-v", "--keep", "--keep-dir", keep, "-c", path]
    said = output([*words, "-o", keep / "kernels.o"])
    ptx = max(keep.glob("*.ptx")).read_text()  # of the newest architecture
    dump = shutil.which("cuobjdump", path=f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    sass = output([dump, "-sass", "-arch", f"sm_{ARCHS[-1]}", keep / "kernels.o"]) if dump else ""
    shutil.rmtree(keep)
    return said, ptx, sass


def compile_binding(nvcc: Path, path: Path) -> None:
    system = [
        *cpp_extension.include_paths(),
        sysconfig.get_path("include"),
        nvcc.parent.parent / "include",
    ]
    output(
        [
            *os.environ.get("CXX", "c++").split(),
            *("-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"),
            "-DMLPEXT_WITH_CUDA",
            "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",  # a file that the CPU wheel lacks
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem{path}" for path in system),
            path,
        ]
    )


def budget(name: str, ptxas: str, registers: int, spilled: int) -> tuple[str, list[str]]:
    """A line on what ptxas says of the kernels in a file, and those beyond the budget."""
    pattern = (
        r"Compiling entry function '(\S+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores.*?Used (\d+) registers"
    )
    found = re.findall(pattern, ptxas, re.DOTALL)
    faults = [f"{name}: ptxas reports no kernels"] if not found else []
    for kernel, arch, *values in found:
        for what, value, most in zip(
            ("bytes of stack", "bytes spilled", "registers"),
            map(int, values),
            (STACK_BYTES, spilled, registers),
            strict=True,
        ):
            if value > most:
                faults.append(f"{name}, {arch}: {value} {what}, at most {most} allowed: {kernel}")
    used = max((int(registers) for *_, registers in found), default=0)
    spilling = sum(int(bytes_) > 0 for *_, bytes_, _ in found)
    archs = len({arch for _, arch, *_ in found})
    line = f"{name}: {len(found)} kernels for {archs} architectures, at most {used} registers"
    return f"{line}, {spilling} with spills of at most {spilled} bytes", faults


def entries(ptx: str) -> dict[str, str]:
    """The kernels' names and bodies: what follows a kernel and is not one belongs to neither."""
    parts = re.findall(r"\.entry ([^\s(]+)(.*?)(?=\.entry |\.func |\Z)", ptx, re.DOTALL)
    return dict(parts)


def judge(dtype: str, ptxas: str, ptx: str, sass: str = "") -> tuple[str, list[str]]:
    """A line on the kernels of a dtype, and what is wrong with them."""
    line, faults = budget(dtype, ptxas, REGISTERS, SPILLED_BYTES)
    for kernel, body in entries(ptx).items():
        wide = re.search(r"ld\.global\.v\d", body) and "st.global.wb.v" in body
        if not wide and "add_sums" not in kernel:
            faults.append(f"{dtype}: no wide loads or stores in {kernel}")
    return line, faults


def judge_narrow(name: str, ptxas: str, ptx: str, sass: str) -> tuple[str, list[str]]:
    """The same of narrow networks."""
    line, faults = budget(name, ptxas, NARROW_REGISTERS, 0)
    bodies = entries(ptx)
    for direction, patterns in NARROW_PTX.items():
        found = [body for kernel, body in bodies.items() if f"narrow_{direction}" in kernel]
        if len(found) != 1:
            faults.append(f"{name}: {len(found)} kernels narrow_{direction}")
            continue
        for pattern in (patterns[0], r"fma\.rn\.f32") if "float32" in name else patterns:
            if not re.search(pattern, found[0]):
                faults.append(f"{name}: nothing like {pattern} in narrow_{direction}")
    faults += [
        f"{name}: local memory in {k}" for k, body in bodies.items() if re.search(r"[ls][dt]\.local", body)
    ]
    tensor_cores = sass.count("HMMA.16816.F32")
    if sass and "float32" not in name and not tensor_cores:
        faults.append(f"{name}: no HMMA in the SASS")
    seen = f"{tensor_cores} HMMA" if sass else "no disassembler, its PTX has what becomes them"
    return line if "float32" in name else f"{line}; tensor cores: {seen}", faults


if __name__ == "__main__":
    main()
