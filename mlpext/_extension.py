"""Decides what `mlpext._C` is: the compiled library, or torch's own operators in its place."""

from __future__ import annotations

import importlib
import os
import sys

VARIABLE = "MLPEXT_EXTENSION"

missing: str | None = None  # where torch's operators are in use: why


def switch() -> tuple[str, str | None, str]:
    """The environment variable that is read here, its value and its meaning, as `_C.switches` has others."""
    meaning = "torch's own operators (0) in the place of the compiled library's (1)"
    return VARIABLE, os.environ.get(VARIABLE), meaning


if (_choice := os.environ.get(VARIABLE, "1")) not in ("0", "1"):
    raise ValueError(f"{VARIABLE}: {_choice!r}, expected 0 or 1")
if _choice == "0":
    missing = f"{VARIABLE}=0 asks for torch's own operators"
    _module = importlib.import_module("mlpext._C_in_torch")
    sys.modules["mlpext._C"] = _module
    sys.modules["mlpext"]._C = _module  # type: ignore[attr-defined]
