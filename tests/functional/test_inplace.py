"""Activations in place and with `out`: what is written, and what is refused as torch refuses it."""

import inspect
import warnings

import pytest
import torch

import mlpext.functional as F
from activation_inputs import layouts
from common import (
    CASES,
    NAMES,
    assert_same_bits,
    assert_same_outcome,
    eager,
    every_float,
    every_inplace_case,
    has_inplace,
    ours,
    outcome,
)

pytestmark = pytest.mark.filterwarnings("error")


@every_float
@every_inplace_case
def test_inplace_writes_where_it_should_and_nowhere_else(name, parameters, dtype):
    f, f_inplace = ours(name, parameters), ours(name, parameters, inplace=True)
    guard = -77.0
    for length in range(68):
        room = torch.full((length + 20,), guard, dtype=dtype)
        x = room[10 : 10 + length]
        x.copy_(torch.linspace(-4, 4, max(length, 1), dtype=torch.float64)[:length])
        expected, version = f(x), x._version
        assert f_inplace(x) is x
        assert x._version == version + 1, length
        if min(parameters.values(), default=0) >= 0:
            assert_same_bits(x, expected, length)
        else:  # in place, a negative slope goes to eager
            torch.testing.assert_close(x, expected)
        assert (room[:10] == guard).all() and (room[10 + length :] == guard).all(), length


@every_inplace_case
def test_inplace_on_layouts(name, parameters):
    for layout, x in layouts(torch.float32).items():
        here, there = (
            x.clone(memory_format=torch.preserve_format),
            x.clone(memory_format=torch.preserve_format),
        )
        assert_same_outcome(ours(name, parameters, True)(here), eager(name, parameters, True)(there), layout)
    x = torch.linspace(-3, 3, 60)
    room, room_eager = x.clone(), x.clone()
    ours(name, parameters, True)(room[1::3])
    eager(name, parameters, True)(room_eager[1::3])
    torch.testing.assert_close(room, room_eager)


@every_inplace_case
def test_inplace_gradient(name, parameters):
    """As eager: same gradient, or, where the output cannot give it (a negative slope), the same refusal."""
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)

    def through(f):
        y = x * 1.5
        f(y)  # y now is the result
        return torch.autograd.grad((y * y).sum(), x)[0]

    actual = outcome(through, ours(name, parameters, True))
    assert_same_outcome(actual, outcome(through, eager(name, parameters, True)))


@every_inplace_case
def test_inplace_refusals_are_eagers(name, parameters):
    overlapping = torch.zeros(1).expand(5)
    leaf = torch.zeros(5, requires_grad=True)
    attempts = {
        "leaf that requires grad": lambda: leaf,
        "view of such a leaf": lambda: leaf[1:],
        "expanded": lambda: overlapping,
        "integers": lambda: torch.arange(5),
        "booleans": lambda: torch.ones(3, dtype=torch.bool),
    }
    if name == "threshold":  # torch's alone does not look whether elements share memory
        del attempts["expanded"]
    for what, make in attempts.items():
        actual = outcome(ours(name, parameters, True), make())
        assert_same_outcome(actual, outcome(eager(name, parameters, True), make()), what)
    with torch.no_grad():
        ours(name, parameters, True)(leaf)
        expected = eager(name, parameters)(torch.zeros(5))
    torch.testing.assert_close(leaf.detach(), expected)


@every_inplace_case
def test_inplace_spoils_what_others_keep(name, parameters):
    x = torch.linspace(0.1, 1, 5, requires_grad=True)
    y = x.exp()  # keeps its own output
    ours(name, parameters, True)(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|negative slope"):
        y.sum().backward()


@every_inplace_case
def test_inplace_of_a_view_reaches_its_base(name, parameters):
    def through(f):
        x = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        base = x * 1
        f(base[:, 1::2])
        return torch.cat([base.detach(), torch.autograd.grad((base * base).sum(), x)[0]])

    actual = outcome(through, ours(name, parameters, True))
    assert_same_outcome(actual, outcome(through, eager(name, parameters, True)))


@pytest.mark.parametrize(
    "name, parameters", [("leaky_relu", {"negative_slope": -0.1}), ("elu", {"alpha": -1.0})]
)
def test_inplace_with_a_negative_slope_raises_as_eager(name, parameters):
    """Its derivative cannot be told from its output, and silence would be a wrong gradient."""
    messages = []
    for f in (eager(name, parameters, True), ours(name, parameters, True)):
        x = torch.ones(3, requires_grad=True)
        with pytest.raises(RuntimeError, match="negative slope") as raised:
            f(x * -1.0).sum().backward()
        messages.append(str(raised.value).split(".")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
def test_inplace_is_offered_where_torch_offers_it(name):
    offered = "inplace" in inspect.signature(getattr(F, name)).parameters
    assert offered == has_inplace(name)


WITH_OUT = ("gelu", "gelu_tanh", "softplus", "logsigmoid", "softshrink", "hardshrink")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "identity"])
def test_out_is_offered_where_torch_offers_it(name):
    x = torch.linspace(-3, 3, 12).view(3, 4)
    for f in (ours(name, {}), *([eager(name, {})] if name not in ("sigmoid", "tanh", "sine") else [])):
        if name in WITH_OUT:
            out = torch.empty(3, 4)
            assert f(x, out=out) is out
            torch.testing.assert_close(out, eager(name, {})(x))
        else:
            with pytest.raises(TypeError, match="out"):
                f(x, out=torch.empty(3, 4))


@pytest.mark.parametrize("name, parameters", [c for c in CASES if c.values[0] in WITH_OUT])
def test_out_is_written_or_refused_as_torchs(name, parameters):
    x = torch.linspace(-30, 30, 24).view(4, 6)
    outs = {
        "strided": lambda: torch.zeros(4, 12)[:, ::2],
        "empty": lambda: torch.empty(0),
        "itself": lambda: x.clone(),
        "another shape": lambda: torch.zeros(2),
        "another dtype": lambda: torch.zeros(4, 6, dtype=torch.float64),
        "wants a gradient": lambda: torch.zeros(4, 6, requires_grad=True),
        "no tensor": lambda: 3,
    }
    for what, make in outs.items():
        results = []
        for f in (ours(name, parameters), eager(name, parameters)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # resizing is deprecated
                results.append(outcome(f, x, out=make()))
        assert_same_outcome(*results, what)
