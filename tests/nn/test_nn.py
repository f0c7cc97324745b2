"""Activation modules: torch.nn's signatures, defaults, repr, copies and state."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from common import (
    NAMES,
    assert_close,
    assert_same_bits,
    class_name,
    eager,
    every_functional_case,
    has_inplace,
    module,
)
from mlpext import nn

pytestmark = pytest.mark.filterwarnings("error")
CLASSES = sorted({class_name(n) for n in NAMES if n not in ("identity", "gelu_tanh")})
TORCH_CLASSES = [c for c in CLASSES if hasattr(torch.nn, c)]


@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_signature_and_defaults_are_torchs(name):
    ours, theirs = (inspect.signature(getattr(m, name).__init__) for m in (nn, torch.nn))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]
    assert issubclass(getattr(nn, name), getattr(torch.nn, name))


@every_functional_case
def test_repr_is_torchs(name, parameters):
    ours = module(nn, name, parameters)
    if hasattr(torch.nn, class_name(name) if name != "gelu_tanh" else "GELU"):
        assert repr(ours) == repr(module(torch.nn, name, parameters))
        if has_inplace(name):
            assert repr(module(nn, name, parameters, inplace=True)) == repr(
                module(torch.nn, name, parameters, inplace=True)
            )
    for parameter, value in parameters.items():
        assert f"{value}" in repr(ours), parameter


@every_functional_case
def test_forward_is_the_function(name, parameters):
    x = torch.linspace(-3, 3, 61)
    ours = module(nn, name, parameters)
    assert_close(ours(x), eager(name, parameters)(x))
    assert list(ours.state_dict()) == [] and list(ours.parameters()) == []


@pytest.mark.parametrize("name", [n for n in NAMES if has_inplace(n)])
def test_inplace_modules_write_into_their_input(name):
    x = torch.linspace(-3, 3, 61)
    expected = module(nn, name, {})(x)
    assert module(nn, name, {}, inplace=True)(x) is x
    assert_same_bits(x, expected)


def test_parameters_are_read_at_each_call():
    x = torch.linspace(-3, 3, 61)
    elu = nn.ELU()
    elu.alpha = 0.25
    assert_close(elu(x), torch.nn.functional.elu(x, 0.25))
    elu.inplace = True
    y = x.clone()
    assert elu(y) is y
    hardtanh = nn.Hardtanh()
    hardtanh.max_val = 2.5
    assert_close(hardtanh(x), x.clamp(-1, 2.5))
    gelu = nn.GELU()
    gelu.approximate = "tanh"
    assert_close(gelu(x), torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("name", TORCH_CLASSES)
def test_bad_arguments_are_refused_as_torch_does(name):
    for args, kwargs in [((1, 2, 3, 4, 5, 6), {}), ((), {"no_such": 1})]:
        for namespace in (torch.nn, nn):
            with pytest.raises(TypeError):
                getattr(namespace, name)(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:keyword argument:FutureWarning")
def test_bounds_of_hardtanh():
    for namespace in (torch.nn, nn):
        with pytest.raises(AssertionError):
            namespace.Hardtanh(2.0, 1.0)


def models():
    torch.manual_seed(1)
    return {
        "elu": nn.ELU(0.3),
        "gelu": nn.GELU(approximate="tanh"),
        "layer": nn.LinearActivation(4, 3, "leaky_relu", negative_slope=0.1),
        "layer without bias": nn.LinearActivation(4, 3, "softplus", bias=False, beta=2.0),
        "maxout": nn.Maxout(4, 3, pieces=3),
        "maxout without bias": nn.Maxout(4, 3, bias=False),
        "mlp": nn.MLP([4, 8, 3], "elu", alpha=0.5),
        "maxout mlp": nn.MLP([4, 8, 3], "maxout", pieces=3),
    }


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", models())
def test_copies(name, how):
    model, x = models()[name], torch.randn(5, 4)
    again = COPIES[how](model)
    assert type(again) is type(model) and repr(again) == repr(model)
    assert_same_bits(again(x), model(x))


@pytest.mark.parametrize("name", models())
def test_state_dict_holds_parameters_and_nothing_else(name):
    model = models()[name]
    state = model.state_dict()
    assert list(state) == [n for n, _ in model.named_parameters()]
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(state)
    x = torch.randn(5, 4)
    assert_same_bits(fresh(x), model(x))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_close(torch.load(file, weights_only=True), state)
