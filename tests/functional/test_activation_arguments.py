"""Activations of unusual dtypes, devices and parameters, and wrong calls: as torch does."""

import inspect
import math
import warnings
from typing import get_args

import pytest
import torch

import mlpext
import mlpext.functional as F
from common import (
    FUNCTIONAL_CASES,
    NAMES,
    TORCH_LACKS,
    assert_same_bits,
    assert_same_outcome,
    eager,
    every_float,
    every_functional_case,
    ours,
    outcome,
)
from mlpext._names import Activation
from mlpext.training._losses import LossName

pytestmark = pytest.mark.filterwarnings("error")


def unusual_inputs():
    dense = torch.linspace(-2, 2, 12).view(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        nested = torch.nested.nested_tensor([dense[0, :2], dense[1, :3]])
    return {
        "int64": torch.arange(-3, 4),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "complex64": torch.complex(dense, dense.flip(0)),
        "complex128": torch.complex(dense, dense.flip(0)).to(torch.complex128),
        "sparse": dense.relu().to_sparse(),
        "sparse csr": dense.relu().to_sparse_csr(),
        "nested": nested,
        "meta": dense.to("meta"),
        "conjugate": torch.complex(dense, dense).conj(),
        "negative view": torch.complex(dense, dense).conj().imag,
        "zero tensor": torch._efficientzerotensor(4),
        "float8": dense.to(torch.float8_e4m3fn),
        "no tensor": 1.5,
        "array": dense.numpy(),
        "none": None,
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", unusual_inputs())
@every_functional_case
def test_unusual_inputs_do_as_eager(name, parameters, kind):
    if (name, kind) == ("squareplus", "nested"):
        return  # torch has no squareplus to be like, and its nested tensors hardly an operator
    x = unusual_inputs()[kind]
    actual, expected = outcome(ours(name, parameters), x), outcome(eager(name, parameters), x)
    if isinstance(expected, torch.Tensor) and expected.is_nested:
        assert actual.is_nested
        actual, expected = actual.values(), expected.values()
    assert_same_outcome(actual, expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@every_functional_case
def test_complex_gradient_is_torchs(name, parameters, dtype):
    def through(f):
        x = torch.tensor([0.3 + 0.4j, -1.0 + 2.0j], dtype=dtype, requires_grad=True)
        return torch.autograd.grad(f(x).abs().sum(), x)[0]

    assert_same_outcome(outcome(through, ours(name, parameters)), outcome(through, eager(name, parameters)))


WRONG = [("a",), (None,), ([1.0],), (1j,)]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("name", [n for n in NAMES if mlpext._C.activations()[n] and n not in TORCH_LACKS])
def test_wrong_parameters_do_as_eager(name, wrong):
    x = torch.linspace(-2, 2, 5)
    parameter = next(iter(mlpext._C.activations()[name]))
    actual, expected = (outcome(f(name, {parameter: wrong[0]}), x) for f in (ours, eager))
    assert_same_outcome(actual, expected)


EXTREMES = [
    *(
        0.2,
        -0.2,
        0.3,
        1 / 3,
        1.7,
        1e-9,
        1e5,
        1e30,
        -1e30,
        1e39,
        1e300,
        10**18,
        10**25,
        0.0,
        -0.0,
        1e-46,
        1e-320,
    ),
    *(math.inf, -math.inf, math.nan),
]
PARAMETERS = [
    (name, parameter)
    for name, defaults in mlpext._C.activations().items()
    for parameter in defaults
    if name not in TORCH_LACKS
]


@every_float
@pytest.mark.parametrize("value", EXTREMES, ids=repr)
@pytest.mark.parametrize("name, parameter", PARAMETERS)
def test_any_parameter_does_as_eager(name, parameter, value, dtype):
    """Rounded to the dtype where eager rounds it, refused where eager refuses it; alone and in a layer."""
    least, most = (
        torch.finfo(dtype if dtype == torch.float16 else torch.float32).max * s for s in (-0.9, 0.9)
    )
    other = {"min_val": {"max_val": most}, "max_val": {"min_val": least}}.get(parameter, {})
    parameters = {parameter: value, **other}
    base = torch.tensor([0.2, 0.3, 1 / 3, 1.7, 3.0, 1e-8, 0.0], dtype=dtype)
    base = torch.cat([base, torch.nextafter(base, base * 2), torch.nextafter(base, base * 0)])
    x, one = torch.cat([base, -base]), torch.ones(1, 1, dtype=dtype)
    f = eager(name, parameters)

    def through(f):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        return torch.cat(
            [y.detach().flatten(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0].flatten()]
        )

    def layer(x):
        return F.linear_activation(x[:, None], one, None, name, **parameters)

    expected = outcome(through, f)
    for what, own in {"alone": ours(name, parameters), "in a layer": layer}.items():
        actual = outcome(through, own)
        if name == "celu" and dtype == torch.float64 and isinstance(expected, torch.Tensor):
            # eager's 1 / alpha is a float
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
        else:
            assert_same_outcome(actual, expected, what)


def signature_of_torchs(name):
    """None where torch has a builtin without a signature, or nothing."""
    try:
        return inspect.signature(getattr(torch.nn.functional, name, None))
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", [n for n in NAMES if signature_of_torchs(n)])
def test_signature_is_torchs(name):
    actual, expected = inspect.signature(getattr(F, name)), signature_of_torchs(name)
    assert [(p.name, p.default, p.kind) for p in actual.parameters.values()] == [
        (p.name, p.default, p.kind) for p in expected.parameters.values()
    ]


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
def test_wrong_calls_raise_type_error(name):
    f, x = ours(name, {}), torch.zeros(3)
    for args, kwargs in [((), {}), ((x, 1.0, 1.0, 1.0, 1.0), {}), ((x,), {"no_such_parameter": 1})]:
        with pytest.raises(TypeError):
            f(*args, **kwargs)
    assert_same_bits(f(input=x + 1), f(x + 1))


def test_unknown_approximation_of_gelu():
    for f in (torch.nn.functional.gelu, F.gelu):
        with pytest.raises(RuntimeError, match="approximate"):
            f(torch.zeros(3), approximate="sometimes")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises((ValueError, RuntimeError), match=r"no_such.*leaky_relu"):
        mlpext._C.activation(torch.zeros(3), "no_such")


@pytest.mark.parametrize("name, wrong", [("elu", ()), ("elu", (1.0, 2.0)), ("relu", (1.0,))])
def test_wrong_number_of_parameters(name, wrong):
    with pytest.raises((ValueError, RuntimeError, TypeError), match=name):
        mlpext._C.activation(torch.zeros(3), name, wrong)


@pytest.mark.native
def test_backward_operator_refuses_shapes_that_do_not_match():
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.mlpext.activation_backward(torch.zeros(3), torch.zeros(4), "elu", [1.0], False)


def test_out_of_place_leaves_the_input_alone():
    for case in FUNCTIONAL_CASES:
        x = torch.linspace(-3, 3, 100, requires_grad=True)
        before = x.detach().clone()
        ours(*case.values)(x).sum().backward()
        assert_same_bits(x.detach(), before, case.id)
        assert x._version == 0, case.id


def test_the_names_that_type_checkers_know():
    assert [*get_args(Activation)] == mlpext.activations()
    assert {*get_args(LossName)} == {*mlpext.training.LOSSES}
