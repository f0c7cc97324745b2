"""Which pairs are fused, and what forbids it: hooks, and any other use of either."""

import pytest
import torch
from torch import nn

import mlpext
from fusion_common import Pair, fuse, randn, reason
from mlpext.nn import LinearActivation

pytestmark = pytest.mark.filterwarnings("ignore:::torch")


def test_the_plain_pair():
    _, report = fuse(Pair())
    assert list(report) == [("fc", "fused", "with act (Tanh)"), ("act", "fused", "into fc")]
    assert str(report).splitlines() == [
        "module  action  reason",
        "fc      fused   with act (Tanh)",
        "act     fused   into fc",
        "2 fused",
    ]


def test_a_second_fuse_says_what_is_fused_already():
    once, _ = fuse(Pair())
    twice, report = mlpext.fuse(once, report=True)
    assert list(report) == [
        ("fc", "unchanged", "fused already: it was Linear"),
        ("act", "unchanged", "fused already: it was Tanh"),
    ]
    assert [type(module) for module in twice.modules()] == [type(module) for module in once.modules()]
    assert not any(row.action == "unchanged" for row in fuse(mlpext.unfuse(twice))[1])


def test_a_report_of_nothing_and_one_with_a_refused_trace():
    assert str(fuse(torch.nn.Flatten())[1]) == "nothing to fuse: there is no Linear layer and no activation"

    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.alone = Pair(), torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.pair(x) if x.sum() > 0 else self.alone(x)

    for graph in (False, True):
        _, report = mlpext.fuse(Branches(), report=True, graph=graph)
        assert [row.path for row in report] == ["pair.fc", "pair.act", "alone", ""]
        assert str(report).splitlines()[-1] == "2 fused, 1 replaced"


HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(lambda *a: log.append(a[2].sum().item())),
    "forward_pre": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append(a[1][0].sum().item())),
    "backward": lambda m, log: m.register_full_backward_hook(lambda *a: log.append(a[2][0].sum().item())),
    "backward_pre": lambda m, log: m.register_full_backward_pre_hook(
        lambda *a: log.append(a[1][0].sum().item())
    ),
    "state_dict": lambda m, log: m.register_state_dict_post_hook(lambda *a: None),
    "load_state_dict": lambda m, log: m.register_load_state_dict_post_hook(lambda *a: None),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["fc", "act"])
def test_hooks(kind, where):
    model, log = Pair(), []
    HOOKS[kind](model.get_submodule(where), log)
    why = reason(model)
    assert "hooks" in why
    for graph in (False, True):
        fused = mlpext.fuse(model, graph=graph)
        x = randn(5, 6)
        log.clear()
        model(x).sum().backward()
        expected = list(log)
        log.clear()
        fused(x).sum().backward()
        assert log == pytest.approx(expected) and (log or "state" in kind)


@pytest.mark.parametrize("kind", list(HOOKS)[:4])
def test_hooks_of_the_model_and_of_containers(kind):
    model, log = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Tanh()).double(), []
    HOOKS[kind](model, log)
    HOOKS[kind](model[0], log)
    x = randn(5, 6)
    model(x).sum().backward()
    expected = list(log)
    for graph in (False, True):
        fused = mlpext.fuse(model, graph=graph)
        assert type(fused[0][0]) is LinearActivation
        log.clear()
        fused(x).sum().backward()
        assert log == pytest.approx(expected) and log


def no_grad_activation(self, x):
    h = self.fc(x)
    with torch.no_grad():
        h = self.act(h)
    return h + x


def autocast_activation(self, x):
    h = self.fc(x)
    with torch.autocast("cpu", enabled=True):
        return self.act(h)


def in_train_mode_only(self, x):
    return self.act(self.fc(x)) if self.training else self.fc(x)


def unless_there_is_a_mask(self, x, mask=None):
    h = self.fc(x)
    if mask is None:
        h = h * 2
    return self.act(h)


def in_a_branch(self, x):
    h = self.fc(x)
    return self.act(h) if x.sum() > 0 else h


def activation_twice(self, x):
    return self.act(self.fc(x)) + self.act(x)


def linear_twice(self, x):
    return self.fc(self.act(self.fc(x)))


def output_kept(self, x):
    h = self.fc(x)
    return self.act(h) + h


def changed_in_between(self, x):
    h = self.fc(x)
    h.mul_(2)
    return self.act(h)


def by_keyword(self, x):
    return self.act(input=self.fc(x))


@pytest.mark.parametrize(
    "body, why",
    [
        (no_grad_activation, "another autograd or autocast mode"),
        (autocast_activation, "another autograd or autocast mode"),
        (in_train_mode_only, "no activation follows it"),
        (unless_there_is_a_mask, "goes to mul"),
        (in_a_branch, "cannot be traced"),
        (activation_twice, "also used on the output of x"),
        (linear_twice, "no activation follows it"),
        (output_kept, "used more than once"),
        (changed_in_between, "used more than once"),
        (by_keyword, "among other arguments"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
def test_uses_that_forbid_it(body, why, graph):
    model = type("Other", (Pair,), {"forward": body})()
    if graph:  # where each call stands for itself
        fuse(model, graph=True)
    else:
        assert why in reason(model)
