"""Which of torch's operators run in the place of the package's, because they are faster on this CPU.

What was measured on one kind of CPU is a JSON file, a table, written by `python -m mlpext tune`:

    {"cpu": "...", "isa": "avx512", "versions": {"mlpext": "...", "torch": "..."},
     "ratios": {"forward": {"float32": {"tanh": {"16384": 0.7}}},
                "linear_dw": {"float32": {"2048x1000x1000": 0.31}}}}

A ratio is torch's time by the package's: below SLOWER, torch serves. Sizes are numbers of values, or rows x
in_features x out_features; one that was not measured is served as the nearest that was, by logarithms. The
choice depends on operator, dtype, shape and machine only, so that results repeat bit by bit.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mlpext import _C, _extension
from mlpext._version import __version__

OPERATIONS = ("forward", "backward", "linear_forward", "linear_dx", "linear_dw")
DTYPES = ("float64", "float32", "bfloat16", "float16")
SLOWER = 0.97  # differences below 3 % are noise

SHIPPED = Path(__file__).parent / "tables"
# Products of an unknown CPU from which on torch's are the safe side: 4^13 multiply-adds, 1 ms.
LARGE_PRODUCT = 13

VALUE_CELLS = range(_C.VALUE_CELLS)
PRODUCT_CELLS = list(itertools.product(range(_C.SIDE_CELLS), repeat=3))

Cells = dict[tuple[str, str, str], frozenset[int]]  # by operation, dtype, activation ("" of a product)


class CPU(NamedTuple):
    """What tells kinds of CPU apart; on machines that do not say, vendor "" and 0."""

    vendor: str
    family: int
    model: int
    name: str


class Choice(NamedTuple):
    """What torch serves, and where that comes from, in words."""

    cells: Cells
    source: str


@cache
def cpu() -> CPU:
    """The CPU at hand, from the head of /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file.read(1024).splitlines()]
    except OSError:
        lines = []
    entries = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    try:
        family, model = int(entries["cpu family"]), int(entries["model"])
        return CPU(entries["vendor_id"], family, model, entries.get("model name", ""))
    except (KeyError, ValueError):
        return CPU("", 0, 0, "")


def file_name() -> str:
    """The table of this CPU and the instruction set in use; the baseline is the same loops everywhere."""
    vendor, family, model, _ = cpu()
    isa = _C.cpu_isa()
    return "baseline.json" if isa == "baseline" else f"{vendor}-{family}-{model}-{isa}.json"


def user_file() -> Path:
    """Where `python -m mlpext tune` writes what it has measured."""
    cache_folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_folder, "mlpext", file_name())


def versions() -> dict[str, str]:
    """What a user's own table must have been measured with to be used."""
    return {"mlpext": __version__, "torch": torch.__version__}


def choose() -> Choice:
    """What this machine takes: MLPEXT_TUNE's table, the user's own, the one that the package brings, or the
    safe side. ValueError, OSError: the file that MLPEXT_TUNE names is no table, or cannot be read."""
    if _extension.missing is not None:
        return Choice({}, "every operator")
    named = os.environ.get("MLPEXT_TUNE", "")
    if named == "0":
        return Choice({}, "none (MLPEXT_TUNE=0)")
    if named:
        return Choice(cells(read(Path(named))), f"{named} (MLPEXT_TUNE)")
    ignored = ""
    if (own := user_file()).exists():
        try:
            table = read(own)
            if table["versions"] == versions():
                return Choice(cells(table), str(own))
            ignored = f" ({own} was measured with other versions)"
        except (OSError, ValueError) as error:
            warnings.warn(f"{error}; python -m mlpext tune writes a new one", stacklevel=2)
    if (shipped := SHIPPED / file_name()).exists():
        return Choice(cells(read(shipped)), f"mlpext's {shipped.name}{ignored}")
    return Choice(safe(), f"the safe side, for a CPU that was not measured{ignored}")


def safe() -> Cells:
    """For a CPU that has no table: torch where it is faster on any CPU of that vendor (of any, if there is
    none) with the instruction set in use, and for all large products."""
    tables = list(SHIPPED.glob(f"*-{_C.cpu_isa()}.json"))
    tables = [table for table in tables if table.name.startswith(f"{cpu().vendor}-")] or tables
    large = frozenset(_product_cell(sides) for sides in PRODUCT_CELLS if sum(sides) >= LARGE_PRODUCT)
    every: Cells = {(product, dtype, ""): large for product in OPERATIONS[2:] for dtype in DTYPES}
    for table in tables:
        for key, some in cells(read(table)).items():
            every[key] = every.get(key, frozenset()) | some
    return every


in_use = Choice({}, "none")


def use(choice: Choice) -> None:
    """Run torch's operators where `choice` says so, and the package's own elsewhere, from now on."""
    global in_use
    in_use = choice
    names = list(_C.activations())
    for (o, operation), (d, dtype) in itertools.product(enumerate(OPERATIONS), enumerate(DTYPES)):
        for i, name in enumerate(names if o < 2 else [""]):
            _C.leave_to_torch(o, d, i, sorted(choice.cells.get((operation, dtype, name), ())))


def read(path: Path) -> dict[str, Any]:
    """A table, checked. ValueError: it is none; OSError: it cannot be read."""
    try:
        table = json.loads(path.read_text())
        for operation, by_dtype in table["ratios"].items():
            _check(operation, OPERATIONS)
            for dtype, ratios in by_dtype.items():
                _check(dtype, DTYPES)
                for name, by_size in ratios.items() if operation in OPERATIONS[:2] else [("", ratios)]:
                    _check(name, ["", *_C.activations()])
                    sides = 3 if operation in OPERATIONS[2:] else 1
                    if any(len(_sides(size)) != sides or not ratio > 0 for size, ratio in by_size.items()):
                        raise ValueError(f"{operation}: sizes have {sides} side(s), ratios are above 0")
        table["versions"], table["cpu"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a table of mlpext tune ({error})") from None
    return dict(table)


def text(table: Mapping[str, Any]) -> str:
    """A table as it is written: JSON, all sizes of an activation, or of a product, in one line."""
    lines = json.dumps(table, indent=1)
    return re.sub(r"\{([^{}]*)\}", lambda found: "{" + " ".join(found[1].split()) + "}", lines) + "\n"


def flat(ratios: Mapping[str, Any]) -> dict[str, float]:
    """The ratios of an operation and dtype by what was measured: "tanh 16384", "2048x1000x1000"."""
    every: dict[str, float] = {}
    for key, value in ratios.items():
        sizes = value if isinstance(value, dict) else {"": value}
        every |= {f"{key} {size}".strip(): ratio for size, ratio in sizes.items()}
    return every


def cells(table: Mapping[str, Any]) -> Cells:
    """The cells of each operation that torch serves by a table."""
    served: Cells = {}
    for operation, by_dtype in table["ratios"].items():
        for dtype, ratios in by_dtype.items():
            if operation not in OPERATIONS[:2]:
                served[operation, dtype, ""] = _slower(ratios, PRODUCT_CELLS, _product_cell)
                continue
            for name, by_size in ratios.items():
                served[operation, dtype, name] = _slower(by_size, [(c,) for c in VALUE_CELLS], lambda c: c[0])
    return {key: some for key, some in served.items() if some}


def _check(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{name!r}, expected one of {', '.join(filter(None, known))}")


def _sides(size: str) -> list[float]:
    """The logarithms, to base 4, of a size."""
    return [math.log(int(side), 4) for side in size.split("x")]


def _product_cell(sides: tuple[int, ...]) -> int:
    rows, in_features, out_features = sides
    return (rows * _C.SIDE_CELLS + in_features) * _C.SIDE_CELLS + out_features


def _slower(ratios: Mapping[str, float], grid: Any, number: Any) -> frozenset[int]:
    """The cells of which the nearest size that was measured is slower than torch."""
    if all(ratio >= SLOWER for ratio in ratios.values()):
        return frozenset()
    # By NumPy: torch's threads would wait for busy cores, up to a second.
    measured = np.array([_sides(size) for size in ratios])
    nearest = np.square(np.array(grid)[:, None] - measured).sum(-1).argmin(1)
    slower = [ratio < SLOWER for ratio in ratios.values()]
    return frozenset(number(cell) for cell, i in zip(grid, nearest, strict=True) if slower[i])
