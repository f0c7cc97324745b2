import csv
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F

from mlpext import _files
from mlpext._files import sweep, write_atomically
from mlpext.nn import MLP
from mlpext.training import MODES, evaluate, fit
from mlpext.training.checkpoint import Checkpoint
from mlpext.training.history import History

# A killed child must not share locks or buffers with the tests: it only computes and writes its checkpoint.
FORK = multiprocessing.get_context("fork")


def network(sizes=(6, 5, 3), seed=1, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return MLP(list(sizes), "tanh", dtype=dtype, **kwargs)


def classes(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def numbers(count=50, seed=0, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, outputs, generator=generator)


def train(model, x, d, **kwargs):
    return fit(model, x, d, **{"progress": False, "seed": 0, "epochs": 3, "lr": 0.05, **kwargs})


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# Steps and updates


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


# Order and seeds


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


# Losses and targets


def test_class_numbers_are_one_hot_d():
    x, labels = classes()
    numbered, one_hot = network(), network()
    train(numbered, x, labels)
    train(one_hot, x, F.one_hot(labels, 3).float())
    assert same_weights(numbered, one_hot)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integer_dtypes_number_classes(dtype):
    x, labels = classes()
    labels = labels % 2
    expected, model = network(), network()
    train(expected, x, labels)
    train(model, x, labels.to(dtype))
    assert same_weights(model, expected)


def test_cross_entropy_of_classes_and_of_probabilities():
    x, labels = classes()
    by_number, by_probability, by_callable = network(), network(), network()
    first = train(by_number, x, labels, loss="cross_entropy")
    second = train(by_probability, x, F.one_hot(labels, 3).float(), loss="cross_entropy")
    third = train(by_callable, x, labels, loss=nn.CrossEntropyLoss())
    for history in (second, third):
        assert history["loss"] == pytest.approx(first["loss"])
        assert history["accuracy"] == first["accuracy"]


def test_a_loss_of_ones_own_per_sample_or_mean():
    x, d = numbers()
    builtin, each, mean = network(), network(), network()
    train(builtin, x, d, mode="batch")
    train(each, x, d, mode="batch", loss=lambda o, d: 0.5 * (d - o).square().sum(1))
    train(mean, x, d, mode="batch", loss=lambda o, d: 0.5 * (d - o).square().sum(1).mean())
    for other in (each, mean):
        for a, b in zip(builtin.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_one_output_takes_a_plain_column():
    x, d = numbers(outputs=1)
    flat, column = network((6, 5, 1)), network((6, 5, 1))
    train(flat, x, d[:, 0])
    train(column, x, d)
    assert same_weights(flat, column)


def test_reported_losses_are_means_for_either_reduction():
    x, d = numbers(10)
    mean = train(network(), x, d, mode="batch", epochs=1)
    total = train(network(), x, d, mode="batch", epochs=1, reduction="sum", lr=0.005)
    assert mean["loss"] == total["loss"]


# Inputs


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.float64),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[::-1].copy()[::-1],
        lambda x: np.lib.stride_tricks.as_strided(x.numpy(), x.shape, writeable=False),
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["numpy", "float64", "big-endian", "reversed", "read-only", "double", "strided", "requires-grad"],
)
def test_arrays_and_tensors_of_any_kind(convert):
    x, d = numbers()
    expected, model = network(), network()
    train(expected, x, d)
    train(model, convert(x), convert(d))
    assert same_weights(model, expected)


def test_memory_mapped_arrays_are_read_in_blocks(tmp_path):
    x, d = numbers(3000)
    for name, data in (("x", x), ("d", d)):
        data.numpy().astype(np.float64).tofile(tmp_path / name)

    class Watched(np.memmap):
        largest = 0

        def __getitem__(self, index):
            part = super().__getitem__(index)
            Watched.largest = max(Watched.largest, len(part) if part.ndim == self.ndim else 0)
            return part

    expected, model = network(), network()
    mapped = [
        Watched(tmp_path / name, np.float64, "r", shape=tuple(data.shape))
        for name, data in (("x", x), ("d", d))
    ]
    options = {"validation": 0.1, "epochs": 2}
    history = train(expected, x, d, **options)
    assert train(model, *mapped, **options)["val_loss"] == history["val_loss"]
    assert same_weights(model, expected)
    assert 0 < Watched.largest <= 1024


def test_the_inputs_are_left_as_they_are():
    x, d = numbers()
    kept = x.clone(), d.clone()
    train(network(), x, d)
    assert torch.equal(x, kept[0]) and torch.equal(d, kept[1])


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


# Metrics, validation, early stopping, callbacks


def test_metrics_of_classes():
    x, labels = classes(120)
    model = network()
    history = train(model, x, labels, validation=(x[:30], labels[:30]))
    measured = evaluate(model, x[:30], labels[:30])
    output = model(x[:30]).detach()
    assert measured["accuracy"] == (output.argmax(1) == labels[:30]).double().mean()
    assert measured["loss"] == pytest.approx(
        0.5 * (F.one_hot(labels[:30], 3) - output).square().sum(1).mean().item()
    )
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (measured["loss"], measured["accuracy"])


def test_training_metrics_are_those_that_the_steps_met():
    x, labels = classes(3000)
    model = network()
    before = evaluate(model, x, labels)
    history = train(model, x, labels, mode="batch", epochs=1)
    assert (
        history["loss"][0] == pytest.approx(before["loss"]) and history["accuracy"][0] == before["accuracy"]
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_r2_is_scikit_learns(outputs):
    x, d = numbers(2000, outputs=outputs)
    d = d * 1e-3 + 100
    model = network((6, 5, outputs), dtype=torch.float64)
    expected = r2_score(d.double(), model(x.double()).detach())
    assert evaluate(model, x, d)["r2"] == pytest.approx(expected, rel=1e-9)


def test_r2_of_a_constant():
    x, d = torch.zeros(4, 6), torch.ones(4, 3)
    model = network()
    assert evaluate(model, x, d)["r2"] == 0
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(1)
    assert evaluate(model, x, d)["r2"] == 1


def test_a_fraction_is_held_out_of_training():
    x = torch.zeros(40, 6)
    d = torch.arange(40.0)[:, None].expand(40, 3)
    trained = set()

    def loss(output, target):
        if torch.is_grad_enabled():
            trained.update(target[:, 0].tolist())
        return (output - target).square().sum(1)

    history = train(network(), x, d, loss=loss, validation=0.25, lr=1e-5)
    assert (
        len(trained) == 30 and history.config["samples"] == 30 and history.config["validation_samples"] == 10
    )
    assert trained != set(range(30))


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_restores_the_best_weights(patience):
    x, d = numbers(20)
    model = network()
    kept = []
    history = train(
        model,
        x,
        d,
        lr=0.5,
        epochs=100,
        validation=numbers(20, seed=1),
        early_stopping=patience,
        callbacks=[lambda epoch: kept.append([W.detach().clone() for W in model.parameters()])],
    )
    best = int(np.argmin(history["val_loss"]))
    assert len(history) == best + 1 + patience < 100
    assert all(torch.equal(W, kept_W) for W, kept_W in zip(model.parameters(), kept[best], strict=True))


@pytest.mark.parametrize("answer", [True, "stop"])
def test_a_callback_can_stop(answer):
    epochs = []

    def callback(epoch):
        epochs.append(epoch)
        return answer if epoch.epoch == 2 else None

    after = []
    history = train(network(), *classes(), callbacks=[callback, after.append], epochs=9)
    assert [epoch.epoch for epoch in epochs] == [1, 2] and after == epochs == history.epochs
    assert epochs[1].row() == {name: history[name][1] for name in history.columns}
    assert epochs[1].samples_per_second == pytest.approx(50 / epochs[1].seconds)


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


# The history


def test_history_round_trip(tmp_path):
    history = train(network(), *classes(), validation=0.2)
    history.to_json(tmp_path / "new folder" / "history.json")
    loaded = History.load(tmp_path / "new folder" / "history.json")
    assert loaded.epochs == history.epochs and loaded.config == history.config
    assert torch.equal(loaded.step_losses, history.step_losses)
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == history.columns
    assert history.columns == [
        *("epoch", "updates", "loss", "accuracy", "val_loss", "val_accuracy", "seconds", "samples_per_second")
    ]
    assert [float(row["val_loss"]) for row in rows] == history["val_loss"]
    assert os.listdir(tmp_path / "new folder") == ["history.json"]


def test_history_epoch_loss_weighs_the_last_step_by_its_size():
    history = train(network(), *classes(50), batch_size=20, epochs=1)
    assert history["loss"][0] == pytest.approx(np.average(history.step_losses, weights=[20, 20, 10]))


def test_history_names_its_columns():
    history = train(network(), *classes())
    with pytest.raises(
        KeyError, match="no column 'val_loss'; the columns are epoch, updates, loss, accuracy"
    ):
        history["val_loss"]
    assert repr(history).startswith("History(epoch=3, updates=6, loss=")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"config": {}, "epochs": [{"epoch": 1}], "step_losses": []}']
)
def test_history_of_another_file(tmp_path, content):
    (tmp_path / "history.json").write_text(content)
    with pytest.raises(ValueError, match="is not a history"):
        History.load(tmp_path / "history.json")


def test_logs_have_one_line_an_epoch_as_it_ends(tmp_path):
    lines = []
    history = train(
        network(),
        *classes(),
        log_dir=tmp_path / "logs",
        callbacks=[lambda epoch: lines.append((tmp_path / "logs/log.jsonl").read_text().count("\n"))],
    )
    assert lines == [1, 2, 3]
    rows = [json.loads(line) for line in (tmp_path / "logs/log.jsonl").read_text().splitlines()]
    assert rows == [epoch.row() for epoch in history.epochs]
    assert (tmp_path / "logs/log.csv").read_text().splitlines()[0] == ",".join(history.columns)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_alone(monkeypatch):
    for stream, progress, shown in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        train(network(), *classes(), progress=progress)
        text = stream.getvalue()
        assert bool(text) == shown
        if shown:
            assert "loss=" in text and "accuracy=" in text and "samples/s" in text and "epoch 3" in text


# NaN and infinity


@pytest.mark.parametrize(("mode", "step"), [("stochastic", 8), ("mini-batch", 2), ("batch", 1)])
def test_a_loss_beyond_float32_names_epoch_and_step(tmp_path, mode, step):
    x, d = numbers(20)
    model = network()
    d[7] = 1e25  # whose square overflows, once the second epoch has switched it on
    on = torch.tensor(False)

    def strike(epoch):
        on.fill_(epoch.epoch == 2)

    def loss(output, target):
        return (target.clamp(max=math.inf if on else 1) - output).square().sum(1)

    with pytest.raises(FloatingPointError, match=f"loss became inf at step {step} of epoch 3"):
        train(
            model,
            x,
            d,
            mode=mode,
            loss=loss,
            epochs=5,
            batch_size=4,
            shuffle=False,
            checkpoint=tmp_path,
            callbacks=[strike],
        )
    kept = Checkpoint(tmp_path).load()
    assert len(kept["epochs"]) == 2
    assert all(torch.equal(kept["model"][name], weight) for name, weight in model.state_dict().items())
    assert all(bool(W.isfinite().all()) for W in model.parameters())
    assert all(W.grad is None for W in model.parameters())


def test_a_last_update_beyond_float_is_noticed():
    model = network(dtype=torch.float64)
    start = network(dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="a weight became NaN or infinite at step 1 .* of epoch 1"):
        train(model, *(data.double() * 1e150 for data in numbers()), lr=1e200, epochs=1, mode="batch")
    assert same_weights(model, start)


def test_an_infinite_validation_loss_is_noticed(tmp_path):
    x, d = numbers()
    with pytest.raises(FloatingPointError, match="the validation loss became inf after step 2 of epoch 1"):
        train(network(), x, d, validation=(x, d * 1e25), checkpoint=tmp_path)
    assert Checkpoint(tmp_path).load()["epochs"] == []


# Ctrl-C


class Interrupting(nn.Module):
    """Presses Ctrl-C while it computes its n-th training step."""

    def __init__(self, inner, step):
        super().__init__()
        self.inner, self.left = inner, step

    def forward(self, x):
        if torch.is_grad_enabled():
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
        return self.inner(x)


@pytest.mark.parametrize(
    ("mode", "step", "updates"), [("stochastic", 63, 63), ("mini-batch", 20, 20), ("batch", 4, 4)]
)
def test_ctrl_c_completes_the_step(tmp_path, mode, step, updates):
    x, d = classes()
    model = Interrupting(network(), step)
    options = {"mode": mode, "batch_size": 4, "shuffle": False, "epochs": 9}
    with pytest.raises(KeyboardInterrupt):
        train(model, x, d, checkpoint=tmp_path, **options)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    expected = network()
    sgd = torch.optim.SGD(expected.parameters(), 0.05)
    steps = torch.arange(50).split({"stochastic": 1, "mini-batch": 4, "batch": 50}[mode])
    for k in range(updates):
        rows = steps[k % len(steps)]
        sgd.zero_grad()
        (
            0.5 * F.mse_loss(expected(x[rows]), F.one_hot(d[rows], 3).float(), reduction="sum") / len(rows)
        ).backward()
        sgd.step()
    assert same_weights(model.inner, expected)
    whole = updates // len(steps) - (updates % len(steps) == 0)
    assert len(Checkpoint(tmp_path).load()["epochs"]) == whole
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ctrl_c_in_a_long_batch_step_drops_it():
    x, d = classes(3000)
    model = Interrupting(network(), 1)
    with pytest.raises(KeyboardInterrupt):
        train(model, x, d, mode="batch")
    assert model.left == 0 and same_weights(model.inner, network())


def test_a_handler_of_ones_own_is_respected():
    pressed = []
    previous = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        history = train(Interrupting(network(), 2), *classes())
    finally:
        signal.signal(signal.SIGINT, previous)
    assert pressed == [1] and len(history) == 3


# Checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "stochastic"},
        {"mode": "mini-batch", "momentum": 0.9, "weight_decay": 0.01},
        {"mode": "batch", "momentum": 0.9},
        {"optimizer": torch.optim.Adam, "validation": 0.2},
        {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, nesterov=True)},
        {"validation": 0.3, "early_stopping": 4, "lr": 0.3},
        {"seed": None},
    ],
    ids=["stochastic", "momentum", "batch", "adam", "nesterov", "early stopping", "drawn seed"],
)
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(tmp_path, options):
    x, d = classes()

    def make(seed=1):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))

    if options.get("seed", 0) is None:
        (tmp_path / "seed").mkdir()
        train(make(), x, d, seed=None, epochs=0, checkpoint=tmp_path)
        options = {"checkpoint": tmp_path, "seed": None}
        drawn = Checkpoint(tmp_path).load()["config"]["seed"]
    else:
        drawn = options.get("seed", 0)
    if options.get("mode") == "stochastic":
        make = network  # a batch norm cannot train on one sample
    torch.manual_seed(7)
    whole = make()
    expected = train(whole, x, d, **{**options, "epochs": 6, "seed": drawn, "checkpoint": None})

    torch.manual_seed(7)
    part = make()
    train(part, x, d, **{**options, "epochs": 2, "checkpoint": tmp_path, "resume": "checkpoint" in options})
    torch.manual_seed(99)
    resumed = make(seed=8)
    history = train(resumed, x, d, **{**options, "epochs": 6, "checkpoint": tmp_path, "resume": True})
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert torch.equal(history.step_losses, expected.step_losses)
    for column in set(expected.columns) - {"seconds", "samples_per_second"}:
        assert history[column] == expected[column]


def test_resuming_a_finished_run_gives_its_result(tmp_path):
    x, d = classes()
    first, again = network(), network(seed=2)
    history = train(first, x, d, checkpoint=tmp_path, validation=0.2, early_stopping=2, lr=0.5, epochs=50)
    assert len(history) < 50
    same = train(
        again, x, d, checkpoint=tmp_path, validation=0.2, early_stopping=2, lr=0.5, epochs=50, resume=True
    )
    assert same_weights(first, again) and same.epochs == history.epochs


def test_logs_of_a_resumed_run_have_each_epoch_once(tmp_path):
    x, d = classes()
    train(network(), x, d, epochs=2, checkpoint=tmp_path / "c", log_dir=tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"epoch": 3}\n{"epo')  # a kill between log and checkpoint, and one within a line
    train(network(), x, d, epochs=4, checkpoint=tmp_path / "c", log_dir=tmp_path, resume=True)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    assert (tmp_path / "log.csv").read_text().count("\n") == 5


def test_a_run_that_does_not_resume_starts_anew(tmp_path):
    x, d = classes()
    train(network(), x, d, checkpoint=tmp_path, epochs=5)
    model = network()
    train(model, x, d, checkpoint=tmp_path, epochs=1, lr=0.01)
    kept = Checkpoint(tmp_path).load()
    assert len(kept["epochs"]) == 1 and torch.equal(kept["model"]["0.weight"], model[0].weight)
    assert sorted(os.listdir(tmp_path))[0] == "checkpoint.json" and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mode": "stochastic"},
            "mode is 'stochastic' here and 'mini-batch' there; samples_per_update is 1 here",
        ),
        ({"lr": 0.5}, "lr is 0.5 here and 0.05 there"),
        ({"batch_size": 8}, "samples_per_update is 8 here and 32 there"),
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"loss": "cross_entropy"}, "loss is 'cross_entropy' here and 'squared_error' there"),
        ({"optimizer": torch.optim.Adam}, "optimizer is 'Adam' here and None there"),
        ({"validation": 0.5}, "samples is 25 here and 50 there"),
        ({"momentum": 0.5}, "momentum is 0.5 here and 0.0 there"),
        ({"epochs": 1}, "epochs is 1, but the checkpoint in .* is of epoch 2"),
    ],
)
def test_resuming_another_run_is_refused(tmp_path, change, message):
    x, d = classes()
    train(network(), x, d, checkpoint=tmp_path, epochs=2)
    with pytest.raises(ValueError, match=message):
        train(network(), x, d, **{"checkpoint": tmp_path, "resume": True, "epochs": 4, **change})


def test_resuming_another_model_or_data_is_refused(tmp_path):
    train(network(), *classes(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"cannot resume.*'0.weight': \[7, 6\]"):
        train(network((6, 7, 3)), *classes(), checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="samples is 60 here and 50 there"):
        train(network(), *classes(60), checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match="float64"):
        train(network(dtype=torch.float64), *classes(), checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "empty"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(network(), *classes(), checkpoint=tmp_path)
    (state,) = tmp_path.glob("state-*")
    index = tmp_path / "checkpoint.json"
    content = state.read_bytes()
    if damage == "truncate":
        state.write_bytes(content[:-9])
    elif damage == "flip":
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        state.unlink()
    else:
        index.write_text("{" if damage == "json" else "{}")
    error = FileNotFoundError if damage == "remove" else ValueError
    with pytest.raises(error, match="checkpoint in .* is damaged|no complete checkpoint in"):
        train(network(), *classes(), checkpoint=tmp_path, resume=True)


def test_tied_weights_and_odd_states(tmp_path):
    shared = torch.randn(3, 4)
    state = {
        "a": shared,
        "b": shared.t(),
        "list": [1, 2.5, None, True, "text", torch.tensor(7)],
        "empty": torch.empty(0),
        "half": shared.bfloat16(),
    }
    Checkpoint(tmp_path).save(state)
    loaded = Checkpoint(tmp_path).load()
    assert torch.equal(loaded["a"].t(), loaded["b"]) and loaded["list"][:5] == [1, 2.5, None, True, "text"]
    assert loaded["half"].dtype == torch.bfloat16 and loaded["empty"].shape == (0,)
    with pytest.raises(TypeError, match="/x/1 is a set"):
        Checkpoint(tmp_path).save({"x": [1, {2}]})
    assert torch.equal(Checkpoint(tmp_path).load()["a"], shared)


# Kills


def in_child(function, *arguments):
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def die_at(call, folder):
    """Save a second state, and die without clean-up just before the n-th system call that changes a file."""
    count = 0

    def mortal(original):
        def wrapper(*args, **kwargs):
            nonlocal count
            if count == call:
                os._exit(7)
            count += 1
            return original(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "open", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    Checkpoint(folder).save({"number": 2, "tensor": torch.full((1000,), 2.0)})
    os._exit(0)


def test_a_kill_at_any_call_leaves_the_old_state_or_the_new(tmp_path):
    found = []
    for call in range(100):
        Checkpoint(tmp_path).save({"number": 1, "tensor": torch.ones(1000)})
        child = in_child(die_at, call, tmp_path)
        child.join()
        state = Checkpoint(tmp_path).load()
        assert torch.equal(state["tensor"], torch.full((1000,), float(state["number"])))
        found.append(state["number"])
        if child.exitcode == 0:
            break
        assert child.exitcode == 7
    assert call >= 8 and found == sorted(found) and set(found) == {1, 2}
    Checkpoint(tmp_path).save({})
    assert len(os.listdir(tmp_path)) == 2  # what the dead left is swept


def resume_in_child(folder, options):
    torch.set_num_threads(1)
    train(network(seed=9), *classes(), **options, checkpoint=folder, resume=True)
    os._exit(0)


@pytest.mark.launch
@pytest.mark.parametrize(
    "options",
    [
        {"engine": "native", "mode": "stochastic"},
        {"engine": "native", "momentum": 0.9},
        {"engine": "autograd", "momentum": 0.9},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_killed_again_and_again_a_run_ends_as_if_never_killed(tmp_path, options):
    x, d = classes()
    options = {**options, "epochs": 60}
    expected = network()
    train(expected, x, d, **options)
    train(network(), x, d, **{**options, "epochs": 0}, checkpoint=tmp_path)
    chance = random.Random(4)
    reached = []
    for _ in range(10):
        child = in_child(resume_in_child, tmp_path, options)
        time.sleep(chance.uniform(0.02, 0.25))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        reached.append(len(Checkpoint(tmp_path).load()["epochs"]))
    assert reached == sorted(reached)
    model = network(seed=9)
    history = train(model, x, d, **options, checkpoint=tmp_path, resume=True)
    assert same_weights(model, expected) and history["epoch"] == list(range(1, 61))
    assert len(os.listdir(tmp_path)) == 2


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_sweep_takes_temporary_files_alone(tmp_path):
    for name in (".a.json.0123abcd.tmp", "b.tmp", ".c"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".c", "b.tmp"]


# Bad arguments


X, LABELS = classes()
D = numbers()[1]


def nan_at(row, column):
    x = X.clone()
    x[row, column] = math.nan
    return x


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": print}, TypeError, "model must be a torch.nn.Module"),
        ({"model": nn.Flatten(), "target": X}, ValueError, "no parameter that requires a gradient"),
        ({"x": X.tolist()}, TypeError, "x must be a tensor or a numpy array, got list"),
        ({"x": X.int()}, TypeError, "x must be floating point, got torch.int32"),
        ({"x": X.numpy().astype(int)}, TypeError, "x must be floating point, got int64"),
        ({"x": X.to(torch.complex64)}, TypeError, "x must be floating point, got torch.complex64"),
        ({"x": np.array([["a"]])}, TypeError, "x must be floating point, got <U1"),
        ({"x": X[0]}, ValueError, r"x must have shape \(N, ...\), one row per sample"),
        ({"x": X[:0], "target": LABELS[:0]}, ValueError, r"x is empty: its shape is \(0, 6\)"),
        ({"x": X[:, :0]}, ValueError, r"x is empty: its shape is \(50, 0\)"),
        ({"x": X[:9]}, ValueError, "x has 9 samples but target has 50"),
        ({"x": nan_at(33, 2)}, ValueError, r"x\[33, 2\] is nan; training needs finite numbers"),
        ({"x": X.double() * 1e300}, ValueError, r"x\[0, 0\] is -?inf"),
        ({"target": "labels"}, TypeError, "target must be a tensor or a numpy array, got str"),
        ({"target": LABELS.tolist()}, TypeError, "target must be a tensor or a numpy array, got list"),
        ({"target": LABELS.to(torch.complex64)}, TypeError, "target must hold class numbers"),
        ({"target": D.index_fill(0, torch.tensor(3), math.inf)}, ValueError, r"target\[3, 0\] is inf"),
        ({"target": LABELS[:, None]}, ValueError, r"class numbers, which have shape \(N,\), got \(50, 1\)"),
        ({"target": LABELS + 1}, ValueError, r"class numbers up to 3, which needs 4 outputs .* are \(n, 3\)"),
        ({"target": LABELS - 1}, ValueError, r"target\[\d+\] is -1; classes are numbered from 0"),
        ({"target": D[:, :2]}, ValueError, r"target has shape \(n, 2\), but the model's outputs \(n, 3\)"),
        ({"target": D[:, 0]}, ValueError, r"target has shape \(n,\), but the model's outputs \(n, 3\)"),
        ({"model": nn.Linear(6, 1)}, ValueError, "for one output give target as floating point"),
        ({"model": nn.Flatten(0), "target": X}, ValueError, "one row of outputs per sample"),
        ({"mode": "online"}, ValueError, "mode must be one of stochastic, mini-batch, batch, got 'online'"),
        ({"mode": 1}, ValueError, "mode must be one of .*, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"lr": math.nan}, ValueError, "lr must be finite and 0 or more, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be finite and 0 or more, got inf"),
        ({"lr": -0.1}, ValueError, "lr must be finite and 0 or more, got -0.1"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, got -1"),
        ({"epochs": None}, TypeError, "epochs must be an integer, got a NoneType"),
        ({"momentum": -1}, ValueError, "momentum must be finite and 0 or more"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite"),
        (
            {"loss": "mse"},
            ValueError,
            "loss must be one of squared_error, cross_entropy, or a function .*, got 'mse'",
        ),
        ({"loss": 3}, TypeError, "loss must be a name or a function"),
        (
            {"loss": lambda o, d: o},
            ValueError,
            r"loss must return a tensor of shape \(\) or \(32,\).*got \(32, 3\)",
        ),
        ({"loss": lambda o, d: 1.0}, ValueError, "loss must return a tensor .* got float"),
        (
            {"loss": "cross_entropy", "model": nn.Unflatten(1, (2, 3)), "target": X.view(50, 2, 3)},
            ValueError,
            "classes",
        ),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
        ({"engine": "jax"}, ValueError, "engine must be one of auto, native, autograd, got 'jax'"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer or a function"),
        ({"optimizer": lambda p: None}, TypeError, "optimizer must return a torch.optim.Optimizer"),
        (
            {"optimizer": torch.optim.Adam(nn.Linear(1, 1).parameters())},
            ValueError,
            "none of the model's parameters",
        ),
        ({"optimizer": torch.optim.Adam, "momentum": 0.9}, ValueError, "belong to the optimizer"),
        (
            {"validation": 1.0},
            ValueError,
            "validation must be .* a fraction between 0 and 1, or None, got 1.0",
        ),
        ({"validation": math.nan}, ValueError, "validation must be"),
        ({"validation": True}, ValueError, "validation must be"),
        ({"validation": (X,)}, ValueError, "validation must be"),
        ({"validation": 1e-6}, ValueError, "validation=1e-06 of 50 samples leaves none"),
        (
            {"validation": (X, LABELS[:3])},
            ValueError,
            "validation x has 50 samples but validation target has 3",
        ),
        ({"validation": (X, LABELS + 9)}, ValueError, "validation target has class numbers up to 11"),
        ({"validation": (nan_at(0, 0), LABELS)}, ValueError, r"validation x\[0, 0\] is nan"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, at most 18446744073709551615, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"early_stopping": 3}, ValueError, "early_stopping watches the validation loss"),
        ({"early_stopping": 0, "validation": 0.2}, ValueError, "early_stopping must be 1 or more"),
        ({"callbacks": ["print"]}, TypeError, "callbacks must be functions of an Epoch, got str"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"model": network(), "x": X, "target": LABELS, "progress": False, **changes}
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_evaluate_checks_as_fit_does():
    with pytest.raises(ValueError, match="loss must be one of"):
        evaluate(network(), X, LABELS, loss="mse")
    with pytest.raises(ValueError, match="x has 9 samples"):
        evaluate(network(), X[:9], LABELS)
