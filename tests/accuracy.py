"""How far each activation is from the truth, over every float32: `make accuracy` writes docs/accuracy.md.

An error is counted in units in the last place (ULP) of the exact value, which `reference.py` has in float64.
Each instruction set computes in a process of its own, because a process keeps the one it starts with.
`test_accuracy.py` holds the bounds below on a part of the numbers, `test_activations.py` in float64 and for
other parameters too, `test_transforms.py` where torch's operators stand in.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mlpext
import reference
from common import distance, eager, ours, ulp

ROOT = Path(__file__).parent.parent
RESULTS, TABLE = ROOT / "benchmarks/results/accuracy.json", ROOT / "docs/accuracy.md"
# The largest errors allowed, in ULP: (with fused multiply-add, without). No bound is stated for a derivative
# near its root, nor for one made from a rounded y; there the last table holds, in units of 2^-23.
VALUE = {
    **dict.fromkeys(("identity", "relu", "relu6", "hardtanh", "hardshrink", "softshrink"), (0.5, 0.5)),
    **dict.fromkeys(("relu_squared", "threshold"), (0.5, 0.5)),
    **dict.fromkeys(("leaky_relu", "elu", "celu", "hardsigmoid"), (1.0, 1.0)),
    **dict.fromkeys(("selu", "softplus", "logsigmoid", "tanh", "softsign"), (1.7, 1.8)),
    **dict.fromkeys(("gelu_tanh", "quick_gelu", "hardswish", "tanhshrink"), (2.0, 3.0)),
    "gelu": (2.1, 3.0),
    **dict.fromkeys(("sigmoid", "silu"), (2.41, 2.41)),
    "mish": (2.8, 3.0),
    "sine": (1.3, 2.5),
    "squareplus": (2.8, 2.8),
}
DERIVATIVE = {
    **dict.fromkeys(("identity", "relu", "relu6", "hardtanh", "hardshrink", "softshrink"), (0.5, 0.5)),
    **dict.fromkeys(("leaky_relu", "hardsigmoid", "relu_squared", "threshold"), (0.5, 0.5)),
    **dict.fromkeys(("elu", "celu", "selu", "sine"), (1.3, 2.5)),
    **dict.fromkeys(("softplus", "logsigmoid"), (2.4, 2.9)),
    **dict.fromkeys(("softsign", "tanhshrink"), (3.6, 3.8)),
    "squareplus": (4.8, 4.8),
}
ABSOLUTE = {
    **dict.fromkeys(("sigmoid", "hardswish"), (0.8, 1.0)),
    **dict.fromkeys(("tanh", "gelu"), (1.2, 1.5)),
    **dict.fromkeys(("gelu_tanh", "quick_gelu", "silu", "mish"), (2.8, 3.0)),
}
OTHERS = {"value": (2.0, 3.0), "derivative": (4.0, 4.0)}  # a new activation's, until it has its own


def bounds(name: str, parameters: dict) -> dict[str, float]:
    """The largest errors allowed under this instruction set: "value", and "derivative" or "absolute".

    The tables are those of the default parameters; others round once or twice more.
    """
    derivative = "absolute" if name in ABSOLUTE else "derivative"
    pairs = {
        "value": VALUE.get(name, OTHERS["value"]),
        derivative: {**DERIVATIVE, **ABSOLUTE}.get(name, OTHERS["derivative"]),
    }
    return {what: pair[mlpext._C.cpu_isa() == "baseline"] + bool(parameters) for what, pair in pairs.items()}


WIDE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}  # what 16 bits are computed in


def unavoidable(name, parameters, x, dtype, derivative=False):
    """Absolute errors that the definition itself brings with it in `dtype`."""
    if derivative:
        return unavoidable(name, parameters, x, dtype) * max(1.0, abs(parameters.get("omega", 1.0)))
    info = torch.finfo(dtype)
    if name == "sine":  # omega * x is rounded, or overflows, before sin sees it
        omega = parameters.get("omega", 1.0)
        exact = math.frexp(omega)[0] in (0.5, -0.5, 0.0)
        with np.errstate(over="ignore"):
            angle = np.abs(omega * x)
        return np.where(angle > info.max, np.inf, 0.0 if exact else angle * info.eps)
    if name == "tanhshrink":  # x - tanh(x)
        return 1.5 * info.eps * np.abs(x)
    if name in ("gelu", "gelu_tanh", "quick_gelu", "silu", "mish"):  # x * gate, where the gate is subnormal
        return np.abs(x) * info.smallest_normal * info.eps
    return np.zeros_like(x)


def beyond(slack, error):
    return np.where(np.isinf(slack), 0.0, np.maximum(error - np.where(np.isinf(slack), 0.0, slack), 0.0))


def value_bound(name, parameters, dtype):
    """In units of the last place."""
    return 0.502 if dtype in WIDE else bounds(name, parameters)["value"]


def value_error(name, parameters, value, at, expected):
    """Of each point, in units of the last place, and the bound."""
    slack = unavoidable(name, parameters, at, WIDE.get(value.dtype, value.dtype))
    error = beyond(slack, distance(value, *expected)) / ulp(expected[0], value.dtype)
    return error, value_bound(name, parameters, value.dtype)


def derivative_error(name, parameters, slope, at, expected):
    """The same of the derivative; in units of 1's last place where that is what is bounded."""
    dtype, bound = slope.dtype, bounds(name, parameters)
    slack = unavoidable(name, parameters, at, WIDE.get(dtype, dtype), derivative=True)
    if dtype in WIDE:  # y kept in 16 bits, or x
        slack = slack + (torch.finfo(dtype).eps if name in ("sigmoid", "tanh") else 2e-7)
    error = beyond(slack, distance(slope, *expected))
    if dtype in WIDE:
        return error / ulp(expected[0], dtype), 0.51
    if "absolute" in bound:
        return error / torch.finfo(dtype).eps, bound["absolute"]
    return error / ulp(expected[0], dtype), bound["derivative"]


CHUNK = 1 << 16
NUMBERS = 1 << 32


@dataclass
class Worst:
    """The largest error seen, and where."""

    unit: Callable[[Tensor, Tensor], Tensor]
    error: float = 0.5
    x: float = math.nan
    above_one: int = 0  # how many errors are larger than 1

    def see(self, y: Tensor, exact: Tensor, nearest: Tensor, x: Tensor) -> None:
        """What is the nearest float32, most of it all, is off by 0.5 at most and not looked at further."""
        off = ((y != nearest) & ~(y.isnan() & nearest.isnan())).nonzero().flatten()
        if len(off) == 0:
            return
        errors = self.unit(y[off].double(), exact[off])
        most, at = errors.max(0)
        self.above_one += int((errors > 1).sum())
        if most > self.error:
            self.error, self.x = float(most), float(x[off[at]])


@dataclass
class Errors:
    """One implementation of one activation: value and derivative in ULP, and the derivative in 2^-23."""

    value: Worst = field(default_factory=lambda: Worst(ulps))
    derivative: Worst = field(default_factory=lambda: Worst(ulps))
    absolute: Worst = field(default_factory=lambda: Worst(epsilons))

    def figures(self) -> dict[str, dict[str, float]]:
        return {
            what: {"error": worst.error, "x": worst.x, "above_one": worst.above_one}
            for what, worst in vars(self).items()
        }


class Wide(reference.Fast):
    """The reference's arithmetic on float64 tensors: NumPy's answers, several times faster."""

    exp, expm1, log1p, tanh, cosh = torch.exp, torch.expm1, torch.log1p, torch.tanh, torch.cosh
    sin, cos, erfc = torch.sin, torch.cos, torch.special.erfc
    absolute, where = torch.abs, torch.where

    @staticmethod
    def sqrt(x):
        return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)

    @staticmethod
    def tanh_gap(x):
        s = torch.where(x.abs() < 0.05, x, 0.0)
        series = s**3 * (1 / 3 - s**2 * (2 / 15 - s**2 * (17 / 315 - s**2 * 62 / 2835)))
        return torch.where(x.abs() < 0.05, series, x - torch.tanh(x))


def truth(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative in float64 at the float32 numbers x."""
    value, slope = reference.ACTIVATIONS[name].formula(Wide, x.double())
    return value, slope + torch.zeros_like(value)


def ulps(y: Tensor, exact: Tensor) -> Tensor:
    """|y - exact| in units of the last place of a float32 near `exact`; infinite unless both are finite."""
    power = (exact.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    unit = (power * 2.0**-23).clamp(2.0**-149, 2.0**104)
    return ((y - exact).abs() / unit).nan_to_num(nan=math.inf, posinf=math.inf)


def epsilons(y: Tensor, exact: Tensor) -> Tensor:
    return ((y - exact).abs() * 2.0**23).nan_to_num(nan=math.inf, posinf=math.inf)


def floats(stride: int) -> Iterator[Tensor]:
    """The float32 numbers whose bits are 0, stride, 2 stride, ..., in chunks, NaN left out."""
    for start in range(0, NUMBERS, stride * CHUNK):
        x = (
            torch.arange(start, min(start + stride * CHUNK, NUMBERS), stride)
            .to(torch.int32)
            .view(torch.float32)
        )
        x = x[x.isfinite()]
        if len(x):
            yield x


def value_and_derivative(f, x: Tensor) -> tuple[Tensor, Tensor]:
    """As users meet them: the derivative is the one that autograd takes, from y where the module keeps y."""
    x = x.detach().requires_grad_()
    y = f(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


def measure(name: str, implementations: dict[str, Callable], stride: int) -> dict[str, Errors]:
    """The errors of each implementation, f(x) -> (value, derivative)."""
    errors = {label: Errors() for label in implementations}
    for x in floats(stride):
        exact = truth(name, x)
        nearest = [e.float() for e in exact]
        for label, f in implementations.items():
            value, derivative = f(x)
            errors[label].value.see(value, exact[0], nearest[0], x)
            errors[label].derivative.see(derivative, exact[1], nearest[1], x)
            errors[label].absolute.see(derivative, exact[1], nearest[1], x)
    return errors


class Elsewhere:
    """mlpext under another instruction set: a process that computes what it is sent, in shared memory."""

    def __init__(self, isa: str) -> None:
        self.memory = torch.empty(3, CHUNK).share_memory_()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        os.environ["MLPEXT_CPU_ISA"] = isa
        self.process = context.Process(target=_serve, args=(theirs, self.memory, isa), daemon=True)
        self.process.start()
        del os.environ["MLPEXT_CPU_ISA"]

    def __call__(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        self.memory[0, : len(x)] = x
        self.pipe.send((name, len(x)))
        self.pipe.recv()
        return self.memory[1, : len(x)], self.memory[2, : len(x)]


def _serve(pipe, memory: Tensor, isa: str) -> None:
    torch.set_num_threads(1)
    assert mlpext._C.cpu_isa() == isa
    while request := pipe.recv():
        name, count = request
        memory[1, :count], memory[2, :count] = value_and_derivative(ours(name, {}), memory[0, :count])
        pipe.send(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stride", type=int, default=61, help="1: all 2^32 numbers, 5 minutes an activation")
    parser.add_argument(
        "--only", nargs="+", choices=list(mlpext.activations()), metavar="NAME", help="these alone"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    isas = mlpext._C.cpu_isas()
    elsewhere = {isa: Elsewhere(isa) for isa in isas}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only or mlpext.activations():
        start = time.perf_counter()
        implementations = {isa: functools.partial(f, name) for isa, f in elsewhere.items()}
        implementations["torch"] = functools.partial(value_and_derivative, eager(name, {}))
        errors = measure(name, implementations, options.stride)
        results[name] = {
            "stride": options.stride,
            "torch": torch.__version__,
            "errors": {label: e.figures() for label, e in errors.items()},
        }
        _write(RESULTS, json.dumps(results, indent=1) + "\n")
        _write(TABLE, table(results))
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    for f in elsewhere.values():
        f.pipe.send(None)


TEXT = """\
# Accuracy

The largest error of each activation over the float32 numbers: {tried}. Errors are against float64, in
ULP, units in the last place of the exact value; at 0.5 every result is the nearest number. Infinities and
NaN are tested apart; of float16 and bfloat16 tests/functional/test_activations.py tries all 65,536 values,
and at least 99.9 % of the results are the nearest number. Made by `make accuracy`; tests/accuracy.py has the
bounds that tests hold.

What a user need not mind: large figures among the derivatives' ULP. The derivative is the one that
autograd takes. Where it passes through 0, or is made from a rounded y as torch's is (1 - y^2 of tanh
where y is nearly 1), the exact value is so small that a rounding of 1 is many of its units. Its absolute
error, in the last table in units of 2^-23, stays at a few roundings of 1.

These are activations alone, which keep x where torch's do. A fused layer of elu, selu or celu keeps y,
and takes f'(z) = y + alpha from it. Far below 0 the rounded y has few digits of that sum left: in float32
the gradient is 3 % off at z = -15, and 0 at z = -17, where torch's Linear + ELU, which keeps z, is off by
3e-8. The absolute error stays below 2^-23.

Where torch's own operators stand in for the kernels (README, "Nothing breaks"), each is held to the same
bounds, or to torch's error where that is larger."""


PARTS = {
    "value": "The value, in ULP",
    "derivative": "The derivative, in ULP",
    "absolute": "The derivative, in units of 2^-23",
}


def table(results: dict) -> str:
    """docs/accuracy.md."""
    labels = list(next(iter(results.values()))["errors"])
    text = TEXT.format(tried=_tried(results))
    lines = [textwrap.fill(paragraph.replace("\n", " "), 110) + "\n" for paragraph in text.split("\n\n")]
    for what, title in PARTS.items():
        lines += [
            f"## {title}\n",
            f"| activation | stride | {' | '.join(labels)} |",
            "|---" * (2 + len(labels)) + "|",
        ]
        for name in (name for name in mlpext.activations() if name in results):
            cells = [_figure(results[name]["errors"][label][what]) for label in labels]
            lines.append(f"| {' | '.join([name, str(results[name]['stride']), *cells])} |")
        lines.append("")
    return "\n".join(lines)


def _tried(results: dict) -> str:
    """Which numbers: all where the stride is 1."""
    full = [name for name in mlpext.activations() if results.get(name, {}).get("stride") == 1]
    others = sorted({result["stride"] for result in results.values()} - {1})
    words = [f"all 2^32 of them for {', '.join(full)}"] if full else []
    words += (
        [f"one in {' or '.join(map(str, others))} for {'the others' if full else 'each'}"] if others else []
    )
    return "; ".join(words)


def _figure(worst: dict) -> str:
    return f"{worst['error']:.3g}" if worst["error"] < 1e30 else "inf"


def _write(path: Path, text: str) -> None:
    """All of it or nothing: a run is stopped at any moment."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


if __name__ == "__main__":
    main()
