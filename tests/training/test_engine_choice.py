"""engine="native" takes plain networks alone: whatever else a model, an optimizer or torch itself holds is
refused by name, and engine="auto" then trains as the PyTorch loop does."""

import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from mlpext.nn import MLP, GatedLinear, GatedMLP, LinearActivation, Maxout
from mlpext.training import evaluate, fit
from mlpext.training.engines import Unsupported
from mlpext.training.engines.native import NativeEngine

pytestmark = pytest.mark.native


def data(columns=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    return x, (2 * x).sin()


def train(model, **options):
    x, d = data()
    return fit(model, x, d, **{"epochs": 3, "seed": 0, "batch_size": 16, "progress": False, **options})


def layer(activation="tanh", **options):
    return LinearActivation(6, 6, activation, dtype=torch.float64, **options)


def network():
    return MLP([6, 6, 6], "tanh", dtype=torch.float64)


def trains_as_the_loop(make, refused, **options):
    """`make()` is refused by engine="native" with this reason, and "auto" trains it as "autograd" does."""

    def made():  # not copied: a copy would have memory of its own
        torch.manual_seed(3)
        return make()

    with pytest.raises(ValueError, match=f"engine='native' cannot train this.*{refused}"):
        train(made(), engine="native", **options)
    model, other = made(), made()
    ours, theirs = train(model, **options), train(other, engine="autograd", **options)
    assert ours["loss"] == theirs["loss"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return model, ours


# A module that is not what it looks like


def twice():
    first = layer()
    return nn.Sequential(first, first, layer("identity"))


def put_in_again():
    model = network()
    model[1] = model[0]
    return model


def tied():
    model = network()
    model[1].weight = model[0].weight
    return model


def overlapping():
    """The second weight begins within the first one's memory."""
    model = network()
    memory = torch.randn(60, dtype=torch.float64)
    model[0].weight = nn.Parameter(memory[:36].view(6, 6))
    model[1].weight = nn.Parameter(memory[24:].view(6, 6))
    return model


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (twice, "stands twice"),
        (put_in_again, "stands twice"),
        (lambda: MLP([6, 6], dtype=torch.float64) * 2, "stands twice"),
        (lambda: nn.Sequential(*[Maxout(6, 6, dtype=torch.float64)] * 2), "stands twice"),
        (lambda: nn.Sequential(*[GatedMLP(6, 5, dtype=torch.float64)] * 2), "stands twice"),
        (tied, "shares memory"),
        (overlapping, "shares memory"),
    ],
    ids=["twice", "put in again", "MLP * 2", "maxout", "gated", "tied", "overlapping"],
)
@pytest.mark.parametrize("mode", ["stochastic", "mini-batch", "batch"])
def test_a_module_or_parameter_that_stands_twice(make, refused, mode):
    """children() yields a module once, so the native engine trained a network of one layer less."""
    model, history = trains_as_the_loop(make, refused, mode=mode, epochs=1, lr=0.0)
    assert history["loss"][0] == pytest.approx(evaluate(model, *data())["loss"])


def gated(*, dropout=0.0, hook=False, down=None):
    """A GatedMLP in an MLP."""
    block = GatedMLP(6, 5, dtype=torch.float64)
    block.down = down or block.down
    if hook:
        block.register_forward_hook(lambda *_: None)
    return MLP([6, 6, 6], dtype=torch.float64, dropout=dropout).append(block)


@pytest.mark.parametrize("container", ["layer", "GatedMLP", "MLP", "Sequential"])
def test_auto_takes_gated_layers_in_cpp(container, monkeypatch):
    epochs, run_epoch = [], NativeEngine.run_epoch

    def counted(self, order, epoch, *rest):
        epochs.append(epoch)
        return run_epoch(self, order, epoch, *rest)

    monkeypatch.setattr(NativeEngine, "run_epoch", counted)
    model = {
        "layer": GatedLinear(6, 6),
        "GatedMLP": GatedMLP(6, 5),
        "MLP": gated().append(GatedLinear(6, 6)),
        "Sequential": nn.Sequential(GatedLinear(6, 4), GatedMLP(4, 5), LinearActivation(4, 6)),
    }[container]
    train(model.double())
    assert epochs == [1, 2, 3]


def with_own(name):
    def make():
        model = network()
        if name == "forward":
            model[1].forward = model[1].forward
        elif name == "_weight_and_bias":
            own = model[1]
            own._weight_and_bias = lambda: (own.weight * 0, own.bias)
        elif name == "_call_impl":
            model._call_impl = model._call_impl
        elif name == "gated forward":
            model.append(GatedMLP(6, 5, dtype=torch.float64))
            model[2].forward = model[2].forward
        return model

    return make


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (with_own("forward"), "has a forward of its own"),
        (with_own("_weight_and_bias"), "has a _weight_and_bias of its own"),
        (with_own("_call_impl"), "has a _call_impl of its own"),
        (with_own("gated forward"), "the GatedMLP has a forward of its own"),
        (lambda: gated(hook=True), "GatedMLP has hooks"),
        (lambda: gated(down=nn.Linear(5, 6, dtype=torch.float64)), "model has a Linear"),
        (lambda: gated(dropout=0.5), "dropout around a GatedMLP, but none within"),
        (lambda: parametrizations.weight_norm(network()[0]), "ParametrizedLinearActivation"),
        (lambda: prune.l1_unstructured(layer(), "weight", 0.5), "hooks"),
        (lambda: nn.Sequential(network(), layer()), "MLP"),
    ],
    ids=[
        *("forward", "weight", "call", "gated forward", "gated hook", "gated linear", "gated dropout"),
        *("weight_norm", "pruned", "nested"),
    ],
)
def test_a_module_with_functions_of_its_own(make, refused):
    torch.manual_seed(3)
    with pytest.raises(ValueError, match=refused):
        train(make(), engine="native")


@pytest.mark.parametrize("name", ["forward", "_weight_and_bias"])
def test_a_class_that_was_patched(name, monkeypatch):
    original = getattr(LinearActivation, name)
    monkeypatch.setattr(LinearActivation, name, lambda *args: original(*args))
    with pytest.raises(ValueError, match="LinearActivation has other functions than it came with"):
        train(network(), engine="native")
    assert len(train(network())) == 3


@pytest.mark.compile
def test_a_compiled_module():
    model = network()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"):
        train(model, engine="native")


def test_a_dispatch_mode_sees_the_steps():
    counter = FlopCounterMode(display=False)
    with counter:
        train(network())
    assert counter.get_total_flops() > 0


# What hangs on an optimizer


def optimizer(model, kind=torch.optim.SGD):
    return kind(model.parameters(), lr=0.05)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_step_wrapped_on_the_optimizer_runs(kind):
    """As gradient clipping is done: it ran 0 times of 9, and the weights moved 400 times as far."""
    model = network()
    own = optimizer(model, kind)
    step, norms = own.step, []

    def clipped(*args, **kwargs):
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item())
        return step(*args, **kwargs)

    own.step = clipped
    with pytest.raises(ValueError, match=f"the {kind.__name__} has a step of its own"):
        train(model, optimizer=own, engine="native")
    train(model, optimizer=own)
    assert len(norms) == 9


def test_a_zero_grad_of_the_optimizers_own():
    model = network()
    own = optimizer(model)
    own.zero_grad = own.zero_grad
    with pytest.raises(ValueError, match="has a zero_grad of its own"):
        train(model, optimizer=own, engine="native")


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_global_optimizer_hooks_run(register):
    calls, model = [], network()
    handle = register(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match="torch has global optimizer hooks"):
            train(model, optimizer=optimizer(model), engine="native")
        train(model, optimizer=optimizer(model))
    finally:
        handle.remove()
    assert len(calls) == 9


def test_a_step_patched_in_the_class_runs(monkeypatch):
    calls, model = [], network()
    own = optimizer(model)
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: (calls.append(1), step(*args))[1])
    with pytest.raises(ValueError, match="SGD has other functions than it came with"):
        train(model, optimizer=own, engine="native")
    train(model, optimizer=own)
    assert len(calls) == 9


def test_a_scheduler_is_no_reason_to_refuse():
    """It puts a function of its own around `step` that only notes the call; two of them do so once."""
    model = network()
    own = optimizer(model)
    schedulers = [torch.optim.lr_scheduler.StepLR(own, 1, 0.5) for _ in range(2)]

    def step(epoch):
        for scheduler in schedulers:
            scheduler.step()

    train(model, optimizer=own, engine="native", callbacks=[step])
    assert own.param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**6)


@pytest.mark.parametrize("first", ["wrapper", "scheduler"])
def test_a_step_wrapped_before_or_after_a_scheduler_runs(first):
    model, calls = network(), []
    own = optimizer(model)

    def wrap():
        step = own.step
        own.step = types.MethodType(lambda _: (calls.append(1), step())[1], own)

    if first == "wrapper":
        wrap()
    torch.optim.lr_scheduler.StepLR(own, 1)
    if first == "scheduler":
        wrap()
    train(model, optimizer=own)
    assert len(calls) == 9


def test_state_that_is_laid_out_otherwise_than_its_parameter():
    model = network()
    own = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for parameter in model.parameters():
        own.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
    with pytest.raises(ValueError, match="momentum_buffer is not laid out as its parameter"):
        train(model, optimizer=own, engine="native")


# Callbacks that touch the model: "auto" goes on with the loop where the native engine no longer serves


def freeze(model, epoch):
    model[0].requires_grad_(epoch.epoch != 1)


def free_the_bias(model, epoch):
    model[0].bias.requires_grad_(epoch.epoch >= 2)


def clamp(model, epoch):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.1, 0.1)


def in_epoch_2(change):
    def callback(model, epoch):
        if epoch.epoch == 2:
            change(model)

    return callback


SERVED = {
    "freeze": freeze,
    "free the bias": free_the_bias,
    "clamp": clamp,
    "append": in_epoch_2(lambda model: model.append(layer("identity"))),
    "eval": in_epoch_2(lambda model: model.eval()),
    "another activation": in_epoch_2(lambda model: setattr(model[0], "activation", "softsign")),
}
NOT_SERVED = {
    "hook": in_epoch_2(lambda model: model[0].register_forward_hook(lambda *_: None)),
    "gradient hook": in_epoch_2(lambda model: model[0].weight.register_hook(lambda g: g)),
    "prune": in_epoch_2(lambda model: prune.l1_unstructured(model[0], "weight", 0.5)),
    "weight_norm": in_epoch_2(lambda model: parametrizations.weight_norm(model[0])),
    "bfloat16": in_epoch_2(lambda model: model.bfloat16()),
    "repeat": in_epoch_2(lambda model: model.append(model[1])),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_a_callback_that_changes_the_model(name, momentum):
    change = (SERVED | NOT_SERVED)[name]
    results = []
    for kind in ("auto", "autograd", "native"):
        torch.manual_seed(3)
        model = network()
        options = {"engine": kind, "epochs": 4, "momentum": momentum, "validation": data()}
        call = lambda epoch, model=model: change(model, epoch)  # noqa: E731
        if kind == "native" and name in NOT_SERVED:
            with pytest.raises(ValueError, match="engine='native' cannot train this"):
                train(model, callbacks=[call], **options)
            continue
        torch.manual_seed(4)
        results.append((train(model, callbacks=[call], **options), model.state_dict()))
    (expected, weights), *others = [results[1], results[0], *results[2:]]
    plain = fit(network_of_seed_3(), *data(), seed=0, batch_size=16, epochs=4, momentum=momentum)
    if name != "eval":
        assert expected["loss"][2:] != pytest.approx(plain["loss"][2:], rel=1e-6) or name in (
            "hook",
            "gradient hook",
        )
    for history, own in others:
        assert history["loss"] == pytest.approx(expected["loss"], rel=1e-9)
        for key, value in weights.items():
            torch.testing.assert_close(own[key], value, rtol=1e-9, atol=1e-12)


def network_of_seed_3():
    torch.manual_seed(3)
    return network()


@pytest.mark.parametrize("kind", ["autograd", "native"])
@pytest.mark.parametrize("make", [None, torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1)])
def test_a_parameter_unfrozen_by_a_callback_is_trained(kind, make):
    """As with an optimizer over all parameters; its `.grad` grew from step to step instead."""
    model = network_of_seed_3()
    model[0].requires_grad_(False)
    start = model[0].weight.clone()
    grads = []

    def unfreeze(epoch):
        grads.extend(parameter.grad for parameter in model.parameters())
        if epoch.epoch == 1:
            assert torch.equal(model[0].weight, start)
            model[0].requires_grad_(True)

    engine_used = "auto" if make is torch.optim.Adam and kind == "native" else kind  # its steps differ then
    train(model, engine=engine_used, optimizer=make, callbacks=[unfreeze])
    assert not torch.equal(model[0].weight, start)
    assert grads == [None] * len(grads)


def test_a_parameter_that_the_optimizer_does_not_hold_gets_no_growing_gradient():
    model = network_of_seed_3()
    own = torch.optim.SGD(model[1].parameters(), 0.1)
    norms = []
    own.register_step_pre_hook(lambda *_: norms.append(model[0].weight.grad.abs().max().item()))
    history = train(model, optimizer=own, epochs=10)
    assert len(norms) == 30 and max(norms) < 3 * norms[0] and len(history) == 10
    assert torch.equal(model[0].weight, network_of_seed_3()[0].weight)


def test_a_callback_that_freezes_everything_is_an_error():
    for kind in ("auto", "autograd", "native"):
        model = network()
        with pytest.raises(ValueError, match="nothing to train"):
            train(model, engine=kind, callbacks=[lambda epoch, m=model: m.requires_grad_(False) and None])


def test_what_the_engine_raises_is_private():
    assert not issubclass(Unsupported, ValueError)
