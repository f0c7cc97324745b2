"""What a module with a forward of fuse's making goes on to do: changes are seen, and it is made anew."""

import copy
import math
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import mlpext
from fusion_common import assert_same, randn
from mlpext.nn import LinearActivation
from test_gates import Gated, fused_forwards, with_forward


def scaled_by_a_list(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) * self.scales[0]


def scaled_by_a_dict(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) / (1 + self.scales["a"])


def scaled_by_an_object(self, x):
    return self.down(self.act(self.gate(x)) * self.up(x)) * self.scales.a**2


@pytest.mark.parametrize(
    "forward, make, key",
    [
        (scaled_by_a_list, lambda: [2.0], 0),
        (scaled_by_a_dict, lambda: {"a": 2.0}, "a"),
        (scaled_by_an_object, lambda: types.SimpleNamespace(a=2.0), "a"),
    ],
)
def test_numbers_in_attributes_may_change(forward, make, key):
    model = with_forward(forward, scales=make()).double()
    fused = mlpext.fuse(model)
    for each in (model, fused):
        inside = each.scales if isinstance(each.scales, (list, dict)) else vars(each.scales)
        inside[key] = 7.0
    assert_same(model, fused, (randn(5, 6),))


def test_the_approximation_of_gelu_may_change():
    model = Gated(nn.GELU).double()
    fused = mlpext.fuse(model)
    model.act.approximate = fused.act.approximate = "tanh"
    assert_same(model, fused, (randn(5, 6),))


class MadeByItself(Gated):
    def __reduce__(self):
        return type(self).of, (self.state_dict(),)

    @classmethod
    def of(cls, state):
        made = cls().double()
        made.load_state_dict(state)
        return made


class MadeByItsClass(Gated):
    def __reduce__(self):
        return type(self), (), self.__dict__


@pytest.mark.parametrize("cls", [MadeByItself, MadeByItsClass])
def test_classes_that_say_how_they_are_copied(cls):
    model = cls().double()
    twin = copy.deepcopy(mlpext.fuse(model))
    assert_same(model, twin, (randn(5, 6),))


def test_one_class_for_forwards_that_do_the_same():
    models = [Gated().double() for _ in range(3)]
    fused = [mlpext.fuse(model) for model in models]
    assert len({type(each) for each in fused}) == 1 != len({type(each) for each in (*fused, models[0])})
    assert type(mlpext.fuse(Gated(nn.GELU))) is not type(fused[0])
    x = randn(4, 6)

    def ensemble(models):
        base = copy.deepcopy(models[0]).to("meta")
        return vmap(lambda state, x: functional_call(base, state, (x,)), (0, None))(
            stack_module_state(models), x
        )

    torch.testing.assert_close(ensemble(fused), ensemble(models))


class NewGELU(nn.Module):
    def forward(self, z):
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


def test_gelu_as_a_formula():
    model = nn.Sequential(nn.Linear(6, 6), NewGELU(), Gated(NewGELU)).double()
    fused = mlpext.fuse(model)
    assert type(fused[0]) is LinearActivation and fused_forwards(fused)
    assert_same(model, fused, (randn(5, 6),))


def test_models_fused_in_several_threads():
    before = isinstance
    models = [with_forward(Gated.forward).double() for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        fused = list(pool.map(mlpext.fuse, models))
    assert isinstance is before
    for model, each in zip(models, fused, strict=True):
        assert fused_forwards(each)
        assert_same(model, each, (randn(5, 6),))
