"""Measures which of torch's operators are faster on this machine than the package's: `python -m mlpext tune`.

Every case is one call of an operator of the package, timed with and without torch's in its place, in turns:
what is compared is what there is to choose from. One thread, CPU time.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import mlpext
from mlpext import _C, _choices

TUNED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [4**c for c in (3, 5, 7, 9, 10, 12)]
SIDES = [4**c for c in range(7)]
MOST_MULTIPLY_ADDS = 4**15  # 20 ms
MOST_VALUES = 4**11  # of a matrix

SAMPLE_NS = 200_000
HOPELESS_NS = 5_000_000
ROUNDS = 5
NEAR = 0.15  # of the ratio that decides: measured three times


class Case(NamedTuple):
    operation: str
    dtype: str
    name: str  # of the activation, "" of a product
    size: str
    call: Callable[[], Any]


def measure() -> dict[str, Any]:
    """The table of this machine (see `_choices`). Choices and threads are afterwards what they were."""
    ratios: dict[str, Any] = {}
    hopeless: set[tuple[object, ...]] = set()  # operation, dtype and name that need no larger sizes
    choice, threads, state = _choices.in_use, torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        for case in tqdm(_cases(), total=_count(), unit=" cases", leave=False, disable=None):
            if case[:3] in hopeless:
                continue
            if (ratio := _hopeless_ratio(case)) is not None:
                hopeless.add(case[:3])
            else:
                ratio = _ratio(case)
                if abs(ratio - _choices.SLOWER) < NEAR:
                    ratio = median([ratio, _ratio(case), _ratio(case)])
            by_dtype = ratios.setdefault(case.operation, {}).setdefault(case.dtype, {})
            (by_dtype.setdefault(case.name, {}) if case.name else by_dtype)[case.size] = ratio
    finally:
        _choices.use(choice)
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    return {
        "cpu": _choices.cpu().name,
        "isa": _C.cpu_isa(),
        "versions": _choices.versions(),
        "ratios": ratios,
    }


def _ratio(case: Case) -> float:
    """torch's time by the package's."""
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {"mlpext": [], "torch": []}
    for round_ in range(ROUNDS + 1):
        for who in sorted(times, reverse=round_ % 2 == 1):
            with _served_by(who, case):
                if round_ == 0:
                    repeats[who] = max(1, SAMPLE_NS // max(1, _time(case.call, 3) // 3))
                else:
                    times[who].append(_time(case.call, repeats[who]) / repeats[who])
    pairs = zip(times["torch"], times["mlpext"], strict=True)
    return _rounded(median(theirs / max(ours, 1) for theirs, ours in pairs))


def _hopeless_ratio(case: Case) -> float | None:
    """The ratio, where one call of each tells that torch has no loops of its own for the case: its products
    of bfloat16 take seconds without AVX-512. Both are called before they are timed."""
    times = {}
    for who in ("mlpext", "torch"):
        with _served_by(who, case):
            case.call()
            times[who] = _time(case.call, 1)
    slow = times["torch"] > max(10 * times["mlpext"], HOPELESS_NS)
    return _rounded(times["torch"] / times["mlpext"]) if slow else None


@contextlib.contextmanager
def _served_by(who: str, case: Case) -> Iterator[None]:
    operation, dtype = _choices.OPERATIONS.index(case.operation), _choices.DTYPES.index(case.dtype)
    index = list(_C.activations()).index(case.name) if case.name else 0
    everything = range(_C.VALUE_CELLS if case.name else _C.SIDE_CELLS**3)
    _C.leave_to_torch(operation, dtype, index, list(everything) if who == "torch" else [])
    try:
        yield
    finally:
        _C.leave_to_torch(operation, dtype, index, [])


def _rounded(ratio: float) -> float:
    return float(f"{ratio:.3g}")


def _time(call: Callable[[], Any], repeats: int) -> int:
    turns = itertools.repeat(None, repeats)
    start = time.process_time_ns()
    for _ in turns:
        call()
    return time.process_time_ns() - start


def _count() -> int:
    return len(TUNED) * (2 * len(mlpext.activations()[1:]) * len(SIZES) + 3 * len(_shapes()))


def _cases() -> Iterator[Case]:
    for dtype, of in TUNED.items():
        for n in SIZES:
            x = torch.randn(n).to(of).requires_grad_()
            g = torch.randn(n).to(of)
            for name in mlpext.activations()[1:]:
                params = tuple(_C.activations()[name].values())
                f = partial(_C.activation, x, name, params)
                yield Case("forward", dtype, name, str(n), torch.no_grad()(f))
                backward = partial(torch.autograd.grad, f(), x, g, retain_graph=True)
                yield Case("backward", dtype, name, str(n), backward)
        for rows, n_in, n_out in _shapes():
            x, w, b, y, g = (
                torch.randn(shape).to(of)
                for shape in ((rows, n_in), (n_out, n_in), (n_out,), (rows, n_out), (rows, n_out))
            )
            size = f"{rows}x{n_in}x{n_out}"
            elu = ("elu", (1.0,))
            yield Case(
                "linear_forward", dtype, "", size, partial(torch.ops.mlpext.linear_activation, x, w, b, *elu)
            )
            for operation, mask in (("linear_dx", (True, False, False)), ("linear_dw", (False, True, False))):
                backward = partial(torch.ops.mlpext.linear_activation_backward, g, x, w, y, *elu, True, mask)
                yield Case(operation, dtype, "", size, backward)


def _shapes() -> list[tuple[int, int, int]]:
    """Rows, in_features, out_features of the products, the smallest first."""
    return sorted(
        (
            shape
            for shape in itertools.product(SIDES, repeat=3)
            if math.prod(shape) <= MOST_MULTIPLY_ADDS and math.prod(shape) <= MOST_VALUES * min(shape)
        ),
        key=math.prod,
    )
