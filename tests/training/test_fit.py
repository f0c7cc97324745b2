"""`fit` as a whole: which updates it makes, in which order it visits the samples, what it leaves alone."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fit_helpers import classes, network, numbers, same_weights, train
from mlpext.training import MODES


@pytest.mark.parametrize(
    ("mode", "batch_size", "updates"),
    [
        ("stochastic", 7, 50),
        ("mini-batch", 7, 8),
        ("mini-batch", 50, 1),
        ("mini-batch", 99, 1),
        ("batch", 7, 1),
    ],
)
def test_updates_per_epoch(mode, batch_size, updates):
    history = train(network(), *classes(50), mode=mode, batch_size=batch_size, epochs=2)
    assert history["updates"] == [updates, 2 * updates]
    assert history.step_losses.shape == (2 * updates,)


def test_batch_mode_adds_up_chunks_to_the_gradient_of_all():
    x, d = (data.double() for data in numbers(2500))
    expected = network(dtype=torch.float64)
    (0.5 * (d - expected(x)).square().sum(1).mean()).backward()
    model = network(dtype=torch.float64)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    train(model, x, d, mode="batch", epochs=1, lr=0.3)
    assert max(seen) <= 1024 and sum(seen) == 2501  # and one row to learn the outputs' shape
    for W, start in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(W, start - 0.3 * start.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("weight_decay", [0, 0.01])
def test_the_update_has_the_bits_of_torch_sgd(momentum, weight_decay):
    x, d = numbers()
    expected = network()
    sgd = torch.optim.SGD(expected.parameters(), 0.1, momentum=momentum, weight_decay=weight_decay)
    for _ in range(3):
        for rows in torch.arange(50).split(8):
            sgd.zero_grad()
            (0.5 * F.mse_loss(expected(x[rows]), d[rows], reduction="sum") / len(rows)).backward()
            sgd.step()
    ours, theirs = network(), network()
    options = {"batch_size": 8, "shuffle": False, "engine": "autograd"}
    train(ours, x, d, lr=0.1, momentum=momentum, weight_decay=weight_decay, **options)
    train(
        theirs,
        x,
        d,
        optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=momentum, weight_decay=weight_decay),
        **options,
    )
    assert same_weights(ours, expected) and same_weights(theirs, expected)


def test_an_optimizer_of_ones_own():
    x, d = numbers()
    made, given = network(), network()
    train(made, x, d, optimizer=torch.optim.Adam)
    train(given, x, d, optimizer=torch.optim.Adam(given.parameters()))
    assert same_weights(made, given) and not same_weights(made, network())


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    train(model, *classes())
    assert torch.equal(model[0].weight, network()[0].weight) and not torch.equal(
        model[1].weight, network()[1].weight
    )


@pytest.mark.parametrize("mode", ["stochastic", "mini-batch"])
def test_every_epoch_visits_each_sample_once_in_a_new_order(mode):
    x = torch.randn(50, 6)
    d = torch.arange(50.0)[:, None].expand(50, 3)
    visited = []

    def loss(output, target):
        visited.extend(target[:, 0].tolist())
        return (output - target).square().sum(1) * 0

    train(network(), x, d, mode=mode, loss=loss, epochs=2)
    first, second = visited[:50], visited[50:]
    assert sorted(first) == sorted(second) == d[:, 0].tolist()
    assert first != second and first != sorted(first)
    visited.clear()
    train(network(), x, d, mode=mode, loss=loss, epochs=1, shuffle=False)
    assert visited == d[:, 0].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_repeats_a_run_and_leaves_the_global_generator_alone(mode):
    x, d = classes()
    first, again, other = network(), network(), network()
    state = torch.get_rng_state()
    train(first, x, d, mode=mode, seed=5, validation=0.2)
    train(again, x, d, mode=mode, seed=5, validation=0.2)
    train(other, x, d, mode=mode, seed=6, validation=0.2)
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(first, again) and not same_weights(first, other)


def test_a_drawn_seed_is_kept():
    x, d = classes()
    first, again = network(), network()
    state = torch.get_rng_state()
    history = train(first, x, d, seed=None)
    assert torch.equal(torch.get_rng_state(), state)
    train(again, x, d, seed=history.config["seed"])
    assert same_weights(first, again)
    assert train(network(), x, d, seed=None).config["seed"] != history.config["seed"]


def test_reported_losses_are_means_for_either_reduction():
    x, d = numbers(10)
    mean = train(network(), x, d, mode="batch", epochs=1)
    total = train(network(), x, d, mode="batch", epochs=1, reduction="sum", lr=0.005)
    assert mean["loss"] == total["loss"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_says_the_dtype(dtype):
    model = network(dtype=dtype)
    assert math.isfinite(train(model, *classes())["loss"][-1])
    assert model[0].weight.dtype == dtype


def test_any_module_will_do():
    model = nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.LazyLinear(3)
    )
    history = train(model, *classes(), epochs=20)
    assert history["loss"][-1] < history["loss"][0]


def test_modes_and_gradients_are_left_clean():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    train(model, *classes(), validation=0.2)
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_epochs():
    model = network()
    history = train(model, *classes(), epochs=0)
    assert len(history) == 0 and history["loss"] == [] and history.step_losses.shape == (0,)
    assert same_weights(model, network())
