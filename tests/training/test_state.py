"""What a run keeps: checkpoints and best weights after the callbacks, everything that the optimizer moves,
and the weights of the epoch's beginning where an epoch fails."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpext.nn import MLP
from mlpext.training import fit

ENGINES = ("native", "autograd")


def network():
    torch.manual_seed(1)
    return MLP([6, 7, 4], "tanh")


def data(count=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, (2 * x[:, :4]).sin()


def train(model, x, d, **options):
    return fit(model, x, d, **{"seed": 0, "epochs": 4, "batch_size": 16, "progress": False, **options})


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def clamp(model):
    def callback(epoch):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.1, 0.1)

    return callback


def decay_to_zero(model):
    def callback(epoch):
        with torch.no_grad():
            model[0].weight.mul_(0.5)

    return callback


def halve_velocity(model, optimizer):
    def callback(epoch):
        for state in optimizer.state.values():
            state["momentum_buffer"].mul_(0.5)

    return callback


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [clamp, decay_to_zero])
def test_resumed_after_callbacks_that_change_weights_is_as_never_interrupted(make, engine, tmp_path):
    """The checkpoint was taken before the callbacks: 2 + 2 epochs differed from 4."""
    whole, half = network(), network()
    train(whole, *data(), callbacks=[make(whole)], engine=engine)
    for epochs in (2, 4):
        options = {"epochs": epochs, "checkpoint": tmp_path, "resume": epochs == 4, "engine": engine}
        train(half, *data(), callbacks=[make(half)], **options)
    assert same_weights(whole, half)


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_after_a_callback_that_changes_the_optimizer(engine, tmp_path):
    def run(model, **options):
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        callbacks = [halve_velocity(model, optimizer)]
        return train(model, *data(), optimizer=optimizer, callbacks=callbacks, engine=engine, **options)

    whole, half, fresh = network(), network(), network()
    run(whole)
    run(half, epochs=2, checkpoint=tmp_path)
    run(fresh, checkpoint=tmp_path, resume=True)
    assert same_weights(whole, fresh) and not same_weights(whole, half)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_weights_are_those_after_the_callbacks(engine):
    model = network()
    train(model, *data(), callbacks=[clamp(model)], validation=0.2, early_stopping=1, engine=engine)
    assert all(parameter.abs().max() <= 0.1 for parameter in model.parameters())


def test_the_best_weights_of_a_model_that_changed_its_shape_are_sought_anew():
    model = network()
    history = train(
        model,
        *data(),
        validation=data(20),
        early_stopping=9,
        callbacks=[lambda epoch: model.append(nn.Linear(4, 4)) and None if epoch.epoch == 2 else None],
    )
    assert len(model) == 3 and len(history) == 4
    with torch.no_grad():
        loss = 0.5 * (model(data(20)[0]) - data(20)[1]).square().sum(1).mean().item()
    assert loss == pytest.approx(min(history["val_loss"][2:]), rel=1e-6)


class ArcFace(nn.Module):
    """An additive angular margin (arXiv:1801.07698): the classes' directions belong to the loss."""

    def __init__(self):
        super().__init__()
        self.directions = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, output, target):
        self.seen += len(output)
        cosine = F.normalize(output) @ F.normalize(self.directions).t()
        return F.cross_entropy(4 * (cosine - 0.2 * F.one_hot(target, 3)), target, reduction="none")


class Scaled:
    """A log-variance that is learnt with the weights: no module's parameter, but the optimizer's."""

    def __init__(self):
        self.scale = torch.zeros((), requires_grad=True)

    def parameters(self):
        return [self.scale]

    def __call__(self, output, target):
        return F.cross_entropy(output, target, reduction="none") * (-self.scale).exp() + self.scale

    def state_dict(self):
        return {"scale": self.scale.detach().clone()}


def labels(count=50):
    return torch.arange(count) % 3


@pytest.mark.parametrize("make", [ArcFace, Scaled])
@pytest.mark.parametrize("mode", ["mini-batch", "batch"])
def test_a_loss_with_parameters_is_kept(mode, make, tmp_path):
    """Given to the optimizer they were trained; checkpoint and best weights were without them."""

    def run(model, loss, **options):
        optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 0.05)
        return train(model, data()[0], labels(), loss=loss, optimizer=optimizer, mode=mode, **options)

    whole, whole_loss = network(), make()
    expected = run(whole, whole_loss)
    run(network(), make(), epochs=2, checkpoint=tmp_path)
    model, loss = network(), make()
    history = run(model, loss, checkpoint=tmp_path, resume=True)
    assert history["loss"] == expected["loss"] and same_weights(model, whole)
    for name, value in whole_loss.state_dict().items():
        assert torch.equal(loss.state_dict()[name], value) and not torch.equal(
            make().state_dict()[name], value
        )


@pytest.mark.parametrize("make", [ArcFace, Scaled])
def test_a_loss_gets_its_best_parameters_and_those_of_before_a_break_down(make):
    model, loss = network(), make()
    options = {"validation": 0.2, "early_stopping": 1, "lr": 0.1, "epochs": 30}
    seen = {}

    def note(epoch):
        seen[epoch.metrics["val_loss"]] = copy.deepcopy(loss.state_dict())

    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 1.0)
    history = train(model, data()[0], labels(), loss=loss, optimizer=optimizer, callbacks=[note], **options)
    best = seen[min(history["val_loss"])]
    kept = loss.state_dict()
    assert all(torch.equal(kept[name], best[name]) for name in best if name != "seen")

    before = copy.deepcopy(loss.state_dict())
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], float("inf"))
    with pytest.raises(FloatingPointError):
        train(model, data()[0], labels(), loss=loss, optimizer=optimizer)
    assert all(torch.equal(loss.state_dict()[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *loss.parameters()))


class Scale:
    """Its repr has its address, as a function's has."""

    def __call__(self, x):
        return 2 * x


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner = network()

    def forward(self, x):
        return self.function(self.inner(x))

    def extra_repr(self):
        return f"function={self.function!r}"


@pytest.mark.parametrize(
    "make", [Scale, lambda: lambda x: 2 * x, lambda: network().forward.__func__.__get__(2)]
)
def test_a_model_whose_repr_holds_an_address_resumes(make, tmp_path):
    functions = [make() if make is not None else None for _ in range(2)]
    kept = [Calls(lambda x: 2 * x), Calls(lambda x: 2 * x)]
    for epochs, model, function in zip((2, 4), kept, functions, strict=True):
        model.extra_repr = lambda function=function: repr(function)
        train(model, *data(), epochs=epochs, checkpoint=tmp_path, resume=epochs == 4)
    whole = Calls(lambda x: 2 * x)
    train(whole, *data())
    assert same_weights(kept[1], whole)


def test_another_model_is_still_refused(tmp_path):
    train(Calls(Scale()), *data(), epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="model is"):
        train(Calls(torch.sin), *data(), checkpoint=tmp_path, resume=True)


class Fails(nn.Module):
    def __init__(self, calls, error):
        super().__init__()
        self.inner, self.calls, self.error = network(), calls, error
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.count += 1
            self.calls -= 1
            if self.calls == 0:
                raise self.error("in the middle")
        return self.inner(x)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, SystemExit, GeneratorExit])
@pytest.mark.parametrize("calls", [1, 2, 4, 7])
def test_an_error_in_an_epoch_leaves_the_weights_of_its_beginning(calls, error, tmp_path):
    """Four steps an epoch; half an epoch stayed in the weights."""
    model, complete = Fails(calls, error), (calls - 1) // 4
    with pytest.raises(error, match="in the middle"):
        train(model, *data(), checkpoint=tmp_path)
    expected = Fails(0, error)
    train(expected, *data(), epochs=complete)
    assert same_weights(model, expected) and model.count == 4 * complete
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_norm_with_a_last_step_of_one():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        train(model, *data(49))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Vanishing(np.memmap):
    """A file that can be read so many times."""

    def __getitem__(self, rows):
        if isinstance(rows, np.ndarray) and len(rows) > 1:
            Vanishing.reads -= 1
            if Vanishing.reads < 0:
                raise OSError("the disk is gone")
        return super().__getitem__(rows)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["stochastic", "mini-batch", "batch"])
def test_data_that_cannot_be_read_in_the_middle(mode, engine, tmp_path):
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1))
    x.numpy().tofile(tmp_path / "x")
    mapped = Vanishing(tmp_path / "x", dtype=np.float32, mode="r", shape=(3000, 6))
    Vanishing.reads = 3 + 2  # the check of the values, and two of the three blocks
    model = network()
    with pytest.raises(OSError, match="the disk is gone"):
        train(model, mapped, x[:, :4].sin(), mode=mode, engine=engine, epochs=1, lr=0.01)
    assert same_weights(model, network())
