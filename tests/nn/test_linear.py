"""mlpext.nn.Linear is a torch.nn.Linear: what that takes, refuses and gives, it does."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import mlpext
from common import assert_close, assert_same_bits

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pair(*sizes, **options):
    layers = []
    for make in (torch.nn.Linear, mlpext.nn.Linear):
        torch.manual_seed(0)
        layers.append(make(*sizes, **options))
    return layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 7), (2, 33, 7), (1, 1, 1, 7)], ids=str)
def test_outputs_and_gradients(shape, dtype, bias):
    theirs, ours = pair(7, 18, bias=bias, dtype=dtype)
    assert isinstance(ours, torch.nn.Linear) and repr(ours) == repr(theirs)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    results = []
    for layer in (ours, theirs):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert_close(a, b)


def test_it_stays_a_linear_for_whoever_looks():
    theirs, ours = pair(6, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(5, 6)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is mlpext.nn.Linear
        assert_close(twin(x), theirs(x))
    for change in (
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda each: prune.l1_unstructured(each, "weight", 0.5),
    ):
        both = pair(6, 4)
        for each in both:
            torch.manual_seed(1)
            change(each)
        assert_close(both[1].eval()(x), both[0].eval()(x))


def test_inputs_that_only_torch_takes():
    theirs, ours = pair(6, 4)
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    for a, b in zip(ours(nested).unbind(), theirs(nested).unbind(), strict=True):
        assert_close(a, b)
    sparse = torch.eye(6).to_sparse()
    assert_close(ours(sparse), theirs(sparse))
    assert ours.to("meta")(torch.empty(3, 6, device="meta")).shape == (3, 4)


@pytest.mark.parametrize("x", [torch.randn(3, 5), torch.randn(3, 6).double(), torch.ones(3, 6, dtype=int)])
def test_errors_are_torchs(x):
    messages = []
    for layer in pair(6, 4):
        with pytest.raises(RuntimeError) as error:
            layer(x)
        messages.append(type(error.value))
    assert messages[0] is messages[1]


def test_autocast_and_grad_mode():
    theirs, ours = pair(6, 4)
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert not ours(x).requires_grad
    assert ours(x).requires_grad
