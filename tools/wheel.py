"""Builds one wheel for several versions of torch and Python (`make wheel`), from three kinds of libraries:

    libmlpext_kernels.so              the kernels of each instruction set: without torch, without Python
    libmlpext_torch2.13.so            the operators: for each minor version of torch
    _C.torch2.13.cpython-311-....so   Python's way in: for each torch and each Python

Of a torch its headers and libraries are enough, so that a CUDA build of it serves on every machine: the one
of this environment, or what pip downloads to build/torches.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from ninja.ninja_syntax import Writer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "wheel"
TORCH_LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")
# What each kind of library shows to the others.
VISIBLE = {
    "kernels": "_ZN6mlpext*7kernelsE;",
    "operators": "_ZN6mlpext*; _ZNK6mlpext*;",
    "python": "PyInit__C;",
}


def main() -> None:
    installed = importlib.metadata.version("torch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torches", nargs="+", default=[minor_of(installed)], help="2.12 2.13")
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="3.12, or a path")
    parser.add_argument("--out", default="dist", help="the folder for the wheel (dist)")
    options = parser.parse_args()
    shutil.rmtree(FOLDER / "lib", ignore_errors=True)
    (FOLDER / "lib").mkdir(parents=True)
    torches = {minor: torch_folder(minor, installed) for minor in options.torches}
    write_build(torches, [interpreter(name) for name in options.pythons])
    subprocess.run(["ninja", "-C", FOLDER], check=True)
    pack(Path(options.out))


def minor_of(version: str) -> str:
    return ".".join(version.split(".")[:2])


def torch_folder(minor: str, installed: str) -> Path:
    """Where the headers and libraries of that torch are."""
    if minor == minor_of(installed):
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        return Path(spec.origin).resolve().parent
    folder = ROOT / "build" / "torches" / minor
    if not folder.exists():
        download = folder.with_suffix(".download")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", download]
        subprocess.run([*command, f"torch=={minor}.*"], check=True)
        (archive,) = download.glob("torch-*.whl")
        with zipfile.ZipFile(archive) as files:
            libraries = {f"torch/lib/lib{name}.so" for name in TORCH_LIBRARIES}
            wanted = [
                name for name in files.namelist() if name.startswith("torch/include/") or name in libraries
            ]
            files.extractall(download, wanted)
        (download / "torch").rename(folder)
        shutil.rmtree(download)
    return folder


def interpreter(name: str) -> dict[str, str]:
    """Where the headers of a Python are, and how its extension modules end."""
    path = shutil.which(name) or shutil.which(f"python{name}")
    if path is None:
        sys.exit(f"wheel: there is no Python {name} (versions on PATH, or interpreters' paths)")
    code = (
        "import json, sysconfig; print(json.dumps({'include': sysconfig.get_path('include'), "
        "'suffix': sysconfig.get_config_var('EXT_SUFFIX')}))"
    )
    return json.loads(subprocess.run([path, "-c", code], check=True, capture_output=True, text=True).stdout)


def flags() -> list[str]:
    """Those of setup.py; importing that would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CXX_FLAGS":
            return [*ast.literal_eval(node.value), "-DNDEBUG", "-fwrapv", "-fPIC", "-fopenmp"]
    raise LookupError("CXX_FLAGS in setup.py")


def write_build(torches: dict[str, Path], pythons: list[dict[str, str]]) -> None:
    """build.ninja: what is compiled, and linked of what."""
    files = sorted(file for file in ROOT.glob("csrc/**/*.cpp") if "cuda" not in file.parts)
    kernels = [file for file in files if "isa_kernels.h" in file.read_text()]
    python = [file for file in files if file.parent.name == "python"]
    # Compiled as one file each, which takes a third of the time.
    for name, group in {"python": python, "operators": set(files) - {*kernels, *python}}.items():
        text = "".join(f'#include "{file.relative_to(ROOT / "csrc")}"\n' for file in sorted(group))
        (FOLDER / f"{name}.cpp").write_text(text)
    for name, symbols in VISIBLE.items():
        (FOLDER / f"{name}.map").write_text(f"{{ global: {symbols} local: *; }};\n")

    with (FOLDER / "build.ninja").open("w") as out:
        ninja = Writer(out, width=200)
        compiler = os.environ.get("CXX", "c++")
        # The builder's folders stay out of messages.
        own = [*flags(), f"-I{ROOT / 'csrc'}", f"-ffile-prefix-map={ROOT}=mlpext"]
        command = f"{compiler} -MMD -MF $out.d {' '.join(own)} $flags -c $in -o $out"
        ninja.rule("compile", command, depfile="$out.d", deps="gcc")
        link = f"{compiler} -shared -s -Wl,-rpath,'$$ORIGIN' -Wl,-soname,$name -Wl,--version-script=$kind.map"
        ninja.rule("link", f"{link} $in $flags -o $out")

        def compile(source: Path, to: str, *flags: str) -> str:
            # Shown symbols are chosen by the linker; within a library calls stay direct.
            variables = {"flags": ["-fvisibility=default", "-fvisibility-inlines-hidden", *flags]}
            return ninja.build(f"objects/{to}.o", "compile", str(source), variables=variables)[0]

        def link_library(kind: str, name: str, objects: list[str], *torch: str) -> str:
            variables = {"kind": kind, "name": name, "flags": torch}
            return ninja.build(f"lib/{name}", "link", objects, implicit=f"{kind}.map", variables=variables)[0]

        common = link_library(
            "kernels", "libmlpext_kernels.so", [compile(file, file.stem) for file in kernels]
        )
        for minor, torch in torches.items():
            include = torch / "include"
            system = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
            system += [f"-ffile-prefix-map={torch}=torch", "-DTORCH_API_INCLUDE_EXTENSION_H"]
            libraries = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in TORCH_LIBRARIES[:3])]
            operators = link_library(
                "operators",
                f"libmlpext_torch{minor}.so",
                [compile(FOLDER / "operators.cpp", f"operators-{minor}", *system), common],
                *libraries,
            )
            for each in pythons:
                name = f"_C.torch{minor}{each['suffix']}"
                entry = [*system, f"-isystem{each['include']}", "-DTORCH_EXTENSION_NAME=_C"]
                objects = [compile(FOLDER / "python.cpp", f"python-{name}", *entry), operators, common]
                link_library("python", name, objects, *libraries, "-ltorch_python")


def pack(out: Path) -> None:
    """Writes the wheel, under the tag of any Python, and of the oldest system that it runs on."""
    made = FOLDER / "packed"
    for folder in (made, FOLDER / "base"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", FOLDER / "base"]
    command += ["bdist_wheel", "--dist-dir", made]
    environment = {**os.environ, "MLPEXT_LIBRARIES": str(FOLDER / "lib")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    # torch's operators serve where no library fits: so the wheel is honest for every Python and torch.
    retag = ["tags", "--remove", "--python-tag", "py3", "--abi-tag", "none"]
    subprocess.run([sys.executable, "-m", "wheel", *retag, *made.glob("*.whl")], check=True)
    excluded = [f"--exclude=lib{name}.so" for name in TORCH_LIBRARIES]
    command = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        *excluded,
        "--wheel-dir",
        out,
        *made.glob("*.whl"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
