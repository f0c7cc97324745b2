"""Loads the compiled library that fits this torch and this Python, as the module mlpext._C.

The library is written against two C++ interfaces: Python's, and torch's, which holds within a minor version.
Its name says both: lib/_C.torch2.13.cpython-311-x86_64-linux-gnu.so, or `torch2.13-cu130` where it has the
kernels for CUDA 13.0. So libraries lie side by side: those of a wheel for many versions, and those of two
environments that share a checkout. Where none fits, torch's own operators do the work.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import torch

from mlpext._version import __version__

FOLDER = Path(__file__).parent / "lib"
BUILD = (
    "To build one, with a C++ compiler, in the folder of mlpext's sources (a checkout or the unpacked "
    "sdist): pip install --no-build-isolation --force-reinstall --no-deps ."
)

VARIABLE = "MLPEXT_EXTENSION"

library: Path | None = None  # the file that was loaded
missing: str | None = None  # where none was: what is missing, and how to build it


def switch() -> tuple[str, str | None, str]:
    """The environment variable that is read here, its value and its meaning, as `_C.switches` has others."""
    meaning = "torch's own operators (0) in the place of the compiled library's (1)"
    return VARIABLE, os.environ.get(VARIABLE), meaning


def file_names(torch_version: str, cuda: str | None) -> list[str]:
    """Names of the libraries that fit, best first; one without CUDA serves a torch with CUDA as well."""
    minor = ".".join(torch_version.split(".")[:2])
    tags = [f"torch{minor}-cu{cuda.replace('.', '')}"] if cuda else []
    return [f"_C.{tag}{EXTENSION_SUFFIXES[0]}" for tag in (*tags, f"torch{minor}")]


def described(names: list[str]) -> str:
    """What libraries were built for, by their names: "torch 2.12 with Python 3.11, 3.12; ..."."""
    pythons: dict[str, list[str]] = {}
    for name in names:
        if part := re.match(r"_C\.torch([\d.]+\d(?:-cu\d+)?)\.cpython-(\d)(\d+)", name):
            pythons.setdefault(part[1], []).append(f"{part[2]}.{part[3]}")
    return "; ".join(f"torch {torch} with Python {', '.join(each)}" for torch, each in pythons.items())


def load() -> ModuleType:
    """The library as a module. ImportError: there is none, or it does not load."""
    global library
    for name in file_names(torch.__version__, torch.version.cuda):
        if (FOLDER / name).exists():
            loader = ExtensionFileLoader("mlpext._C", str(FOLDER / name))
            spec = spec_from_loader(loader.name, loader)
            assert spec is not None
            module = module_from_spec(spec)
            loader.exec_module(module)
            library = FOLDER / name
            return module
    there = described(sorted(file.name for file in FOLDER.glob("_C.*")))
    raise ImportError(f"there is one for {there}" if there else "there is none at all")


def load_or_replace() -> ModuleType:
    """The library, or the module of the same names that calls torch's operators: with a warning, unless that
    was asked for. ValueError: the environment asks for neither."""
    global missing
    if (choice := os.environ.get(VARIABLE, "1")) not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: {choice!r}, expected 0 or 1")
    if choice == "0":
        missing = f"{VARIABLE}=0 asks for torch's own operators"
        return importlib.import_module("mlpext._C_in_torch")
    try:
        return load()
    except ImportError as error:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        missing = (
            f"mlpext {__version__} has no compiled library for torch {torch.__version__} with "
            f"Python {python} ({error}). {BUILD}"
        )
    # At the line that imports the package: three levels up are this function, this module and the package.
    warnings.warn(f"{missing} Until then torch's own operators do the work, slower.", RuntimeWarning, 4)
    return importlib.import_module("mlpext._C_in_torch")


module = load_or_replace()
sys.modules["mlpext._C"] = module
sys.modules["mlpext"]._C = module  # type: ignore[attr-defined]
