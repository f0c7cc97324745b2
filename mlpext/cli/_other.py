"""`plot`, `tune` and `info`: pictures of activations and runs, what is faster here, and what is installed."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

import mlpext
from mlpext import _C, _choices, _extension, _tune
from mlpext._files import write_atomically
from mlpext.training import History


def plot_activations(options: argparse.Namespace) -> None:
    """Draw every activation."""
    from mlpext import plots

    plots.plot_activations(options.out)
    print(options.out)


def plot_history(options: argparse.Namespace) -> None:
    """Draw the histories of runs over one another."""
    histories: dict[str, History] = {}
    for run in map(Path, options.runs):
        files = sorted(run.rglob("history.json")) if run.is_dir() else [run]
        if not files:
            raise ValueError(f"{run}: there is no history.json in this folder or below")
        for file in files:
            histories[str(file.parent if file.name == "history.json" else file)] = History.load(file)
    from mlpext import plots

    plots.plot_histories(histories, options.out)
    print(options.out)


def tune(options: argparse.Namespace) -> None:
    """Measure which of torch's operators are faster here, and write the table that decides from now on."""
    if _extension.missing is not None:
        raise RuntimeError(f"there is nothing to tune: torch serves every operator; {_extension.missing}")
    file = _choices.user_file() if options.out is None else Path(options.out)
    table = _tune.measure()
    write_atomically(file, _choices.text(table))
    for operation, by_dtype in table["ratios"].items():
        for dtype, ratios in by_dtype.items():
            sizes = _choices.flat(ratios)
            slower = sorted((ratio, size) for size, ratio in sizes.items() if ratio < _choices.SLOWER)
            lowest = f", the lowest {slower[0][0]:.2f}, {slower[0][1]}" if slower else ""
            print(f"{operation:<16}{dtype:<10}torch serves {len(slower)} of {len(sizes)} sizes{lowest}")
    print(file)


def info(options: argparse.Namespace) -> None:
    """Say what is installed and what it uses."""
    lines = {
        "mlpext": mlpext.__version__,
        "torch": torch.__version__,
        "library": _extension.library.name if _extension.library else f"none; {_extension.missing}",
        "Python": platform.python_version(),
        "instruction sets": f"{', '.join(_C.cpu_isas())}; in use: {_C.cpu_isa()}",
        "torch serves": _choices.in_use.source,
        "threads": str(torch.get_num_threads()),
        "CUDA": "built" if _C.has_cuda() else "not built",
        "activations": " ".join(mlpext.activations()),
    }
    switches = [_extension.switch(), *_C.switches()]
    if options.json:
        values = {variable: setting for variable, setting, _ in switches}
        print(json.dumps({**lines, "activations": [*mlpext.activations()], "environment": values}, indent=1))
        return
    for name, value in lines.items():
        print(f"{name:<18}{value}")
    for variable, setting, meaning in switches:
        print(f"{variable:<20}{'not set' if setting is None else setting}: {meaning}")
