"""Each activation over the whole of float32, every 4093rd number: the errors that docs/accuracy.md shows stay
within the bounds of `accuracy.py`, on each instruction set (test_isa.py)."""

import json
import re

import pytest
import torch

import accuracy
import mlpext.functional as F
from common import NAMES, ours

STRIDE = 4093


@pytest.mark.native
@pytest.mark.isa
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_within_the_bounds(name):
    implementation = {"ours": lambda x: accuracy.value_and_derivative(ours(name, {}), x)}
    errors = accuracy.measure(name, implementation, STRIDE)["ours"]
    for what, bound in accuracy.bounds(name, {}).items():
        worst = getattr(errors, what)
        assert worst.error <= bound, (what, worst)


@pytest.mark.parametrize("name", NAMES[1:])
def test_docstrings_state_the_measured_error(name):
    """Of the worst instruction set, rounded up; "exact" where every result is the nearest number."""
    errors = json.loads(accuracy.RESULTS.read_text())[name]["errors"]
    worst = max(errors[isa]["value"]["error"] for isa in ("baseline", "avx2", "avx512"))
    doc = getattr(F, "gelu" if name == "gelu_tanh" else name).__doc__
    stated = re.findall(r"to ([\d.]+) ULP|, exact\.", doc)[name == "gelu_tanh"]
    assert worst <= float(stated or 0.5) < worst + 0.1


def test_an_error_is_seen():
    """What the measure is worth: a value one place off is an error of 1."""
    x = torch.tensor([1.5, -3.0, 2.0**-140, 1e30])
    above = torch.nextafter(x, torch.tensor(torch.inf)).double()
    assert accuracy.ulps(above, x.double()).tolist() == [1, 1, 1, 1]
    assert accuracy.ulps(torch.full((4,), torch.inf).double(), x.double()).isinf().all()
    off = {"off": lambda x: accuracy.value_and_derivative(lambda x: torch.tanh(x) * (1 + 2**-21), x)}
    errors = accuracy.measure("tanh", off, 1_000_003)["off"]
    assert 3 < errors.value.error < 10 and errors.value.above_one > 1000
