"""Random calls of every operator beside torch's own, drawn and compared as tests/random_ops.py has it.

`make fuzz` goes on where these stop. A case that fails is printed as it can be put here, as an example.
"""

import dataclasses
import random

import hypothesis
import pytest
import torch

import random_ops
from common import NAMES, drawn, examples
from random_ops import DIFFERENCES, IN_PLACE, WAYS, Case, Layer, check, draw

pytestmark = pytest.mark.native


@pytest.mark.thorough
@pytest.mark.isa
@drawn(8000)
def test_a_random_call_is_torchs(r):
    """Values, gradients, shapes, dtypes, strides and exceptions."""
    case = draw(r)
    hypothesis.note(case)
    check(case)


@pytest.mark.compile
@drawn(60)
def test_a_random_call_compiled_is_torchs(r):
    case = draw(r, compiled=True)
    hypothesis.note(case)
    check(case)


def test_every_activation_and_every_way_is_drawn():
    r = random.Random(0)
    cases = [draw(r) for _ in range(5000)]
    assert {layer.name for case in cases for layer in case.layers} == {*NAMES, "maxout"}
    assert {case.way for case in cases} == WAYS.keys() - {"compile"}


def _alone(name, **rest):
    params = rest.pop("params", {})
    return Case(layers=(Layer(0, name, tuple(params.items())),), **rest)


def _layer(name, **rest):
    params, width = rest.pop("params", {}), rest.pop("width", 8)
    return Case("layer", (Layer(width, name, tuple(params.items())),), **rest)


@pytest.mark.isa
@examples(
    *(
        case
        for name in ("softshrink", "hardshrink")
        for params in ({}, {"lambd": 1.25})
        for case in (
            _alone(name, params=params, way="twice"),
            _layer(name, params=params, shape=(3, 5), way="twice", masks=(True,) * 3),
            Case("mlp", (Layer(4, name), Layer(3, "identity")), (2, 5), way="twice", masks=(True,) * 5),
        )
    )
)
def test_a_gradient_of_a_constant_gradient(case):
    """Raised: the composite's gradient did not depend on x."""
    assert check(case) is None


@pytest.mark.isa
@examples(
    *(
        _alone("celu", params={"alpha": alpha}, shape=(33,), way=way, dtype=dtype)
        for alpha in (1.7, 0.5, 30.0)
        for way in IN_PLACE
        for dtype in ("float32", "float64")
    )
)
def test_the_derivative_from_a_rounded_output(case):
    """1 + y / alpha loses a digit that (y + alpha) / alpha keeps."""
    assert check(case) is None


@pytest.mark.isa
@examples(
    *(
        _alone("squareplus", params=params, shape=(65,), values=values, way=way, dtype=dtype)
        for params in ({}, {"b": 1e-30}, {"b": 1e18})
        for values in ("wide", "special")
        for way in ("backward", "no_grad", "saved tensors hooks")
        for dtype in ("float32", "bfloat16", "float16", "float64")
    )
)
def test_squareplus_of_anything(case):
    """Through torch's operators it was 0 at -1e4, and infinite in float16 at 300."""
    check(case)


@pytest.mark.isa
@examples(
    *(
        _layer(name, params=params, shape=(33, 15), dtype=dtype, masks=masks, way=way)
        for name, params in (("hardshrink", {"lambd": 0.2}), ("leaky_relu", {"negative_slope": 1 / 3}))
        for dtype in ("bfloat16", "float16")
        for masks in ((True, True, True), (False, True, False), (False, False, True))
        for way in ("backward", "saved tensors hooks")
    )
)
def test_parameters_that_16_bits_round(case):
    check(case)


@examples(
    Case(
        "mlp",
        (Layer(4, "squareplus"), Layer(15, "softsign")),
        (48, 64),
        bias=False,
        entry="module",
        dtype="bfloat16",
        layouts=("contiguous", "channels last", "contiguous", "contiguous"),
        masks=(True,) * 3,
        way="hessian product",
        seed=477839884,
    ),
    _layer(
        "sine",
        params={"omega": 30.0},
        width=47,
        shape=(9, 3, 8),
        entry="module",
        dtype="float16",
        values="grid",
        masks=(True,) * 3,
        way="twice",
        seed=1605788751,
    ),
    Case(
        "mlp",
        (Layer(24, "silu"), Layer(32, "sine", (("omega", 30.0),)), Layer(4, "mish")),
        (12, 5, 3),
        entry="module",
        dtype="bfloat16",
        values="special",
        layouts=(*["contiguous"] * 3, "offset", "overlapping", "contiguous", "channels last", "contiguous"),
        masks=(True, True, False, True, True, True, True),
        way="inference_mode",
        seed=1792754988,
    ),
    Case(
        "mlp",
        (Layer(32, "celu", (("alpha", 0.5),)), Layer(9, "maxout", pieces=3), Layer(16, "logsigmoid")),
        (130, 63),
        values="grid",
        layouts=("expanded", "expanded", *["contiguous"] * 2, "rows apart", *["contiguous"] * 2, "expanded"),
        masks=(True, True, True, False, True, False, True),
        seed=836608303,
    ),
    Case(
        "mlp",
        (
            Layer(15, "hardshrink", (("lambd", 1.25),)),
            Layer(15, "leaky_relu", (("negative_slope", -0.3),)),
            Layer(15, "elu"),
            Layer(12, "elu", (("alpha", 2.5),)),
        ),
        (12, 33),
        bias=False,
        entry="module",
        dtype="float64",
        values="grid",
        layouts=("contiguous", "contiguous", "one number", "contiguous", "one number", "contiguous"),
        masks=(True, True, True, False, True),
        seed=506156484,
    ),
)
def test_roundings_that_decide(case):
    """The sign of z near 0, where softsign'' jumps; 65533, to float16 65504 or inf; the sign of a y that is
    multiplied by inf; the error of a row that 130 rows have in common, and of a unit that 15 have."""
    check(case)


ON_PURPOSE = (
    Case(
        "layer",
        (Layer(0, "celu", (("alpha", -2.0),), gated=True),),
        (12,),
        bias=False,
        dtype="float16",
        layouts=("negative", "contiguous", "channels last"),
        masks=(False, True),
        way="per sample",
        seed=739647765,
    ),
    _layer("mish", shape=(49,), layouts=("contiguous", "overlapping", "offset"), masks=(True, True, False)),
    _alone("leaky_relu", shape=(12, 12, 5), layouts=("transposed", "contiguous")),
    _alone("identity", shape=(48, 3), layouts=("contiguous", "one number"), way="twice"),
    _alone("squareplus", shape=(15, 2), way="per sample", seed=1460067629),
    _alone("sine", params={"omega": -0.5}, shape=(), way="jvp"),
    _alone("logsigmoid", shape=(12, 2), layouts=("transposed", "contiguous"), way="no_grad"),
    _layer("gelu", shape=(9,), dtype="bfloat16", masks=(True,) * 3, way="jvp", wrong="dtype", seed=912752567),
    _alone("elu", params={"alpha": 1e30}, shape=(33, 1), values="wide", seed=632501607),
    _alone("gelu", shape=(47, 2), layouts=("contiguous", "overlapping")),
    _alone("hardswish", shape=(4, 31), values="special", layouts=("contiguous", "offset"), seed=56199652),
    _alone(
        "sine",
        params={"omega": 1e30},
        shape=(3, 1, 1, 3, 2, 4),
        dtype="bfloat16",
        values="wide",
        seed=1618757023,
    ),
)


def test_every_difference_has_an_example_and_is_one(monkeypatch):
    """Without its line in the table each example is a failure."""
    assert {check(case) for case in ON_PURPOSE} == DIFFERENCES.keys()
    monkeypatch.setattr(random_ops, "DIFFERENCES", {})
    for case in ON_PURPOSE:
        with pytest.raises(AssertionError):
            check(case)


def _spoiled(monkeypatch, change):
    """Every result of ours after `change`."""
    functions = random_ops.functions

    def spoiled(case, tensors):
        ours, eager = functions(case, tensors)
        return (lambda *args: change(ours(*args))), eager

    monkeypatch.setattr(random_ops, "functions", spoiled)


def _last_off(y):
    off = torch.zeros(y.numel(), dtype=y.dtype)
    off[-1] = y.detach().abs().amax() / 8
    return y + off.view(y.shape)


FAULTS = {
    "one element": _last_off,
    "dtype": lambda y: y.double(),
    "shape": lambda y: y.unsqueeze(0),
    "strides": lambda y: y.t().contiguous().t(),
    "graph": lambda y: y.detach(),
}


@pytest.mark.parametrize("fault", FAULTS)
@examples(
    *(
        dataclasses.replace(case, way=way, dtype=dtype)
        for case in (
            _alone("tanh", shape=(9, 17)),
            _layer("sigmoid", shape=(9, 17), masks=(True,) * 3),
            Case("maxout", (Layer(0, "maxout"),), (9, 16)),
            Case("gated", (Layer(0, "silu"),), (9, 17), masks=(True, True)),
            Case("mlp", (Layer(7, "tanh"), Layer(5, "gelu")), (9, 16), masks=(True,) * 5),
        )
        for way in ("backward", "twice", "jvp")
        for dtype in ("float32", "bfloat16")
    )
)
def test_a_fault_is_seen(monkeypatch, case, fault):
    assert check(case) in (None, *DIFFERENCES, "too near a kink to tell")
    _spoiled(monkeypatch, FAULTS[fault])
    with pytest.raises(Exception):  # noqa: B017 - whatever the comparison makes of it
        check(case)
