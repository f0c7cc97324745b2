"""Attributes that a forward branches on: what their other values would change is not fused."""

import enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mlpext
from fusion_common import Pair, fuse, reason
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


class Branching(Pair):
    """A pair, and attributes for a forward to branch on."""

    always = True

    def __init__(self):
        super().__init__()
        self.return_pre, self.mode, self.depth, self.taps, self.hook = False, "post", 1, [], None
        self.cfg, self.order, self.norm = SimpleNamespace(pre=False), Order.LINEAR_FIRST, None
        self.down = nn.ModuleList([nn.Linear(6, 6)])


class Order(enum.Enum):
    LINEAR_FIRST, ACTIVATION_FIRST = 1, 2


def early_return(self, x):
    z = self.fc(x)
    if self.return_pre:
        return z
    return self.act(z)


def conditional(self, x):
    z = self.fc(x)
    return self.act(z) if self.always else z


def both_results(self, x):
    z = self.fc(x)
    return self.act(z) + ((self.return_pre and z) or 0)


def of_another_input(self, x):
    return self.act(x if self.return_pre else self.fc(x))


def something_between(self, x):
    z = self.fc(x)
    if self.mode == "scaled":
        z = z * 2
    return self.act(z)


def the_third_of_three(self, x):
    if self.mode == "post":
        return self.act(self.fc(x))
    if self.mode == "twice":
        return self.act(self.fc(x)) * 2
    return self.fc(x)


def by_number(self, x):
    z = self.fc(x)
    for i, layer in enumerate(self.down):
        if i == self.depth:
            return z
        z = layer(self.act(z))
    return z


def by_content(self, x):
    z = self.fc(x)
    return self.act(z) + (z if "fc" in self.taps else 0)


def none_so_far(self, x):
    z = self.fc(x)
    if self.hook is not None and 0 in self.hook:
        return z
    return self.act(z)


def of_a_config(self, x):
    z = self.fc(x)
    return z if self.cfg.pre else self.act(z)


def by_enum(self, x):
    return self.act(self.fc(x)) if self.order is Order.LINEAR_FIRST else self.fc(self.act(x))


def by_name(self, x):
    z = self.fc(x)
    return z if getattr(self, "return_pre", None) else self.act(z)


def of_a_tensor_too(self, x):
    z = self.fc(x)
    if self.return_pre and x.sum() > 0:
        return z
    return self.act(z)


@pytest.mark.parametrize(
    "body, attribute",
    [
        *((early_return, "return_pre"), (conditional, "always"), (both_results, "return_pre")),
        *((of_another_input, "return_pre"), (something_between, "mode"), (the_third_of_three, "mode")),
        *((by_number, "depth"), (by_content, "taps"), (none_so_far, "hook"), (of_a_config, "cfg.pre")),
        *(
            (by_enum, "order"),
            (by_name, "return_pre"),
            (of_a_tensor_too, "return_pre"),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_branch_on_an_attribute(body, attribute):
    model = type("Net", (Branching,), {"forward": body})()
    assert f"Net.forward branches on self.{attribute}, which may change" in reason(model)
    assert model.cfg == SimpleNamespace(pre=False) and not model.return_pre and model.taps == []


def in_train_mode_too(self, x):
    y = self.act(self.fc(x))
    return y * 2 if self.training else y


def after_the_pair(self, x):
    y = self.act(self.fc(x))
    return y + x if self.return_pre else y


def around_the_pair(self, x):
    return self.act(self.fc(x)) if self.always else x


def parts_that_may_be_absent(self, x):
    z = self.fc(x)
    if self.norm is not None:
        z = self.norm(z)
    if self.act is not None and self.fc.bias is not None and isinstance(self.down, nn.ModuleList):
        z = self.act(z)
    for layer in self.down:
        z = layer(z)
    return z


def only_refused(self, x):
    z = self.fc(x)
    if self.mode != "post":
        raise ValueError(self.mode)
    assert self.always and not self.return_pre
    return self.act(z)


def no_test_at_all(self, x):
    return self.act(self.fc(x)).view(-1, 6 * self.depth) * len(self.mode)


def without_end(self, x):
    while self.return_pre:
        x = x + 1
    return self.act(self.fc(x))


def not_to_be_followed(self, x):
    """As torchrl's MLP has it: a proxy's shape has no length."""
    y = self.act(self.fc(x))
    return y.view(*y.shape[:-1], 2, 3) if self.return_pre else y


def not_to_be_turned(self, x):
    n = 0
    while n > self.depth:
        n -= 1
    return self.act(self.fc(x))


@pytest.mark.parametrize(
    "body",
    [
        *(in_train_mode_too, after_the_pair, around_the_pair, parts_that_may_be_absent, only_refused),
        *(no_test_at_all, not_to_be_turned, without_end, not_to_be_followed),
    ],
)
def test_a_branch_that_leaves_the_pair_as_it_is(body):
    fused, _ = fuse(type("Net", (Branching,), {"forward": body})())
    assert type(fused.fc) is LinearActivation


class HelperBranches(Branching):
    def forward(self, x):
        return self.block(x)

    def block(self, x):
        z = self.fc(x)
        return z if self.return_pre else self.act(z)


class SharesItsActivation(nn.Module):
    """No linear layer, and a use of someone else's activation that is off."""

    def __init__(self, act):
        super().__init__()
        self.act, self.first = act, False

    def forward(self, x):
        return self.act(x) if self.first else x


def test_a_branch_on_an_attribute_elsewhere():
    assert "HelperBranches.forward branches on self.return_pre" in reason(HelperBranches())
    inner = type("Inner", (Branching,), {"forward": early_return})
    assert "Inner.forward branches on" in reason(nn.Sequential(Pair(), inner()), "1.fc")
    assert type(fuse(nn.Sequential(Pair(), inner()))[0][0].fc) is LinearActivation

    outer = Branching()
    outer.fc = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    outer.__class__ = type("Outer", (Branching,), {"forward": early_return})
    assert "Outer.forward branches on" in reason(outer, "fc.2")
    assert type(mlpext.fuse(outer).fc[0]) is LinearActivation

    pair = Pair()
    both = nn.Sequential(pair, SharesItsActivation(pair.act))
    assert "SharesItsActivation.forward branches on self.first" in reason(both, "0.fc")


def test_an_attribute_that_is_set_after_fusing():
    """What would be lost otherwise: the model does what it would do without fuse()."""
    model = type("Net", (Branching,), {"forward": early_return})()
    fused, x = mlpext.fuse(model), torch.randn(5, 6)
    fused.return_pre = True
    torch.testing.assert_close(fused(x), model.fc(x))

    graph = mlpext.fuse(model, graph=True)
    torch.testing.assert_close(graph(x), torch.tanh(model.fc(x)))
    with pytest.raises(AttributeError, match="return_pre: the graph was made with return_pre as it is"):
        graph.return_pre = True
    graph.mode = "pre"  # which no forward reads
    graph.fc = nn.Linear(6, 6)
    graph.note = "mine"
    assert not mlpext.unfuse(graph).return_pre
