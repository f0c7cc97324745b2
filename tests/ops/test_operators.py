"""The registered operators themselves: torch's own checks of schema, fake kernel, autograd and tracing."""

import itertools

import pytest
import torch
from torch.library import opcheck

from common import CASES, NAMES, every_case, indices, stack, values_of

ops = torch.ops.mlpext
pytestmark = [pytest.mark.native, pytest.mark.compile, pytest.mark.usefixtures("fresh_dynamo")]
MASKS = [list(m) for m in itertools.product([True, False], repeat=3)][:-1]


def from_output(name, parameters):
    """Whether the derivative follows from the output, by asking the operator."""
    x = -torch.ones(1)
    try:
        ops.activation_backward(x, x, name, values_of(name, parameters), True)
    except (ValueError, RuntimeError):
        return False
    return True


def randn(*shape, grad=True):
    return torch.randn(shape, requires_grad=grad)


def test_the_operators_are_these():
    """A new operator needs a check here."""
    registered = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mlpext::")}
    assert registered == {
        f"mlpext::{n}{suffix}"
        for n, suffixes in {
            "activation": ("", "_", "_backward"),
            "gated": ("", "_backward"),
            **dict.fromkeys(
                ("maxout", "linear_activation", "linear_maxout", "linear_gated", "mlp"),
                ("", "_forward", "_backward"),
            ),
        }.items()
        for suffix in suffixes
    }


@every_case
def test_activation(name, parameters):
    opcheck(ops.activation.default, (randn(3, 6), name, values_of(name, parameters)))


@every_case
def test_activation_inplace(name, parameters):
    opcheck(ops.activation_.default, (randn(3, 6, grad=False), name, values_of(name, parameters)))


@every_case
@pytest.mark.parametrize("grad", [False, True])
def test_activation_backward(name, parameters, grad):
    for output in (False, True) if from_output(name, parameters) else (False,):
        saved = torch.rand(3, 6, requires_grad=grad)
        arguments = (randn(3, 6, grad=grad), saved, name, values_of(name, parameters), output)
        opcheck(ops.activation_backward.default, arguments)


def test_from_output_where_it_does_not_suffice_is_refused():
    refused = [case.id for case in CASES if not from_output(*case.values)]
    assert {"gelu", "silu", "mish", "elu(alpha=-0.5)", "leaky_relu(negative_slope=-0.3)"} <= set(refused)
    assert not {"relu", "elu", "sigmoid", "tanh", "selu", "celu", "leaky_relu"} & set(refused)


@pytest.mark.parametrize("pieces, dim", [(2, -1), (3, -1), (3, 0), (6, 1)])
def test_maxout(pieces, dim):
    x = randn(3, 6)
    opcheck(ops.maxout.default, (x, pieces, dim))
    opcheck(ops.maxout_forward.default, (x, pieces, dim))
    opcheck(ops.maxout_forward.default, (x.detach(), pieces, dim))
    y, index = ops.maxout_forward(x.detach(), pieces, dim)
    for grad in (False, True):
        opcheck(ops.maxout_backward.default, (torch.randn_like(y).requires_grad_(grad), index, pieces, dim))


@pytest.mark.parametrize("name", NAMES)
def test_linear_activation(name):
    opcheck(ops.linear_activation.default, (randn(3, 6), randn(5, 6), randn(5), name, values_of(name, {})))


@pytest.mark.parametrize("name", ["identity", "elu", "gelu"])
def test_linear_activation_without_bias(name):
    opcheck(ops.linear_activation.default, (randn(2, 3, 6), randn(5, 6), None, name, values_of(name, {})))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("name", ["identity", "elu", "gelu"])
def test_linear_activation_forward(name, keep):
    arguments = (randn(3, 6), randn(5, 6), randn(5), name, values_of(name, {}), keep)
    opcheck(ops.linear_activation_forward.default, arguments)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    "name, output", [("identity", False), ("elu", True), ("elu", False), ("gelu", False)]
)
def test_linear_activation_backward(name, output, mask):
    for grad in (False, True):
        saved = torch.rand(3, 5, requires_grad=grad)
        tensors = (randn(3, 5, grad=grad), randn(3, 6, grad=grad), randn(5, 6, grad=grad), saved)
        opcheck(ops.linear_activation_backward.default, (*tensors, name, values_of(name, {}), output, mask))


def test_linear_maxout():
    arguments = (randn(3, 6), randn(3, 5, 6), randn(3, 5))
    opcheck(ops.linear_maxout.default, arguments)
    opcheck(ops.linear_maxout.default, (*arguments[:2], None))
    opcheck(ops.linear_maxout_forward.default, arguments)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_linear_maxout_backward(mask):
    x, weight = randn(3, 6, grad=False), randn(3, 5, 6, grad=False)
    _, index = ops.linear_maxout_forward(x, weight, None)
    for grad in (False, True):
        tensors = (randn(3, 5, grad=grad), x.requires_grad_(grad), weight.requires_grad_(grad), index)
        opcheck(ops.linear_maxout_backward.default, (*tensors, 3, mask))


@pytest.mark.parametrize("name", ["identity", "silu", "elu"])
def test_linear_gated(name):
    for bias in (randn(2, 5), None):
        arguments = (randn(3, 6), randn(2, 5, 6), bias, name, values_of(name, {}))
        opcheck(ops.linear_gated.default, arguments)
        opcheck(ops.linear_gated_forward.default, arguments)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("name", ["identity", "silu"])
def test_linear_gated_backward(name, mask):
    for grad in (False, True):
        tensors = (
            randn(3, 5, grad=grad),
            randn(3, 6, grad=grad),
            randn(2, 5, 6, grad=grad),
            randn(3, 10, grad=grad),
        )
        opcheck(ops.linear_gated_backward.default, (*tensors, name, values_of(name, {}), mask))


@pytest.mark.parametrize("name", ["identity", "silu", "softplus"])
def test_gated(name):
    values = values_of(name, {})
    gate, value = randn(3, 10).chunk(2, -1)
    for tensors in ((randn(3, 6), randn(3, 6)), (gate, value), (randn(3, 6), randn(6).double())):
        opcheck(ops.gated.default, (*(t.detach().requires_grad_() for t in tensors), name, values))


@pytest.mark.parametrize("mask", [[True, True], [True, False], [False, True]], ids=str)
@pytest.mark.parametrize("name", ["identity", "silu"])
def test_gated_backward(name, mask):
    for grad in (False, True):
        g, gate, value = (randn(3, 6, grad=grad) for _ in range(3))
        opcheck(ops.gated_backward.default, (g, gate, value, name, values_of(name, {}), mask))
        if not mask[0]:
            opcheck(ops.gated_backward.default, (g, gate, None, name, values_of(name, {}), mask))


def test_the_gradient_of_a_gate_needs_the_value():
    with pytest.raises(ValueError, match="value: None, expected a tensor"):
        ops.gated_backward(randn(3), randn(3), None, "silu", [], [True, True])


NETWORKS = {
    ("tanh", "identity"): (),
    ("gelu", "elu"): (0.3,),
    ("maxout", "tanh"): (),
    ("identity", "maxout"): (),
    ("sine", "relu6"): (1.0,),
    ("gated silu", "identity"): (),
    ("gated elu", "tanh"): (0.3,),
    ("gelu", "gated identity"): (),
}
every_network = pytest.mark.parametrize("names", NETWORKS, ids=", ".join)


def network(names, bias, grad):
    weights = [randn(*stack(name), 5, 6 - i, grad=grad) for i, name in enumerate(names)]
    return weights, [randn(*stack(name), 5, grad=grad) for name in names] if bias else []


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@every_network
def test_mlp(names, bias):
    weights, biases = network(names, bias, grad=True)
    opcheck(ops.mlp.default, (randn(3, 6), weights, biases, indices(names), NETWORKS[names]))
    opcheck(ops.mlp_forward.default, (randn(3, 6), weights, biases, indices(names), NETWORKS[names]))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", [[1] * 5, [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], ids=str)
@every_network
def test_mlp_backward(names, mask, grad):
    weights, biases = network(names, True, grad=False)
    x, values = randn(3, 6, grad=False), NETWORKS[names]
    output, last, kept = ops.mlp_forward(x, weights, biases, indices(names), values)
    from_output = last is None and names[-1] != "identity"
    for tensor in (x, *weights, *biases):
        tensor.requires_grad_(grad)
    last = output if from_output else last
    arguments = (x, weights, biases, kept, last, from_output, indices(names), values, mask)
    opcheck(ops.mlp_backward.default, (randn(3, 5, grad=grad), *arguments))


def test_a_network_that_does_not_fit_together_is_refused():
    x, (weights, biases) = randn(3, 6), network(("tanh", "elu"), True, grad=False)
    tanh, elu, relu = indices(["tanh", "elu", "relu"])
    for activations, params, b, message in (
        ([tanh], (), biases, "1 for 2 weights"),
        ([tanh, elu], (), biases, "too few"),
        ([tanh, elu], (1.0, 2.0), biases, "take 1, got 2"),
        ([tanh, relu], (), biases[:1], "1 for 2 weights"),
        ([tanh, -2], (), biases, r"-2, expected -1 \(maxout\) or an index"),
        ([tanh, len(NAMES)], (), biases, f"{len(NAMES)}, expected -1"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.mlp(x, weights, b, activations, params)
    with pytest.raises(RuntimeError, match=r"\[3, 5, 6\], expected \(2, out_features, in_features\)"):
        ops.mlp(x, [randn(3, 5, 6)], [], [tanh], ())
