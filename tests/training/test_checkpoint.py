"""Checkpoints: a resumed run has the bits of an undisturbed one, whenever it was killed."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from fit_helpers import classes, network, same_weights, train
from mlpext import _files
from mlpext._files import sweep, write_atomically
from mlpext.training import checkpoint
from mlpext.training.checkpoint import Checkpoint

# A killed child must not share locks or buffers with the tests: it only computes and writes its checkpoint.
FORK = multiprocessing.get_context("fork")
FILES = [".lock", "checkpoint.json", "log", "state"]


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


def test_a_finished_run_resumed_takes_away_what_a_killed_one_left(tmp_path):
    x, d = classes()
    train(network(), x, d, checkpoint=tmp_path)
    left = (
        "state-0123456789abcdef.safetensors",
        "log-0123456789abcdef.jsonl",
        ".checkpoint.json.0123abcd.tmp",
    )
    for name in left:
        (tmp_path / name).touch()
    Checkpoint(tmp_path).load()  # who only reads touches nothing: a run may be at work
    assert all((tmp_path / name).exists() for name in left)
    train(network(), x, d, checkpoint=tmp_path, resume=True)
    assert sorted(name.partition("-")[0] for name in os.listdir(tmp_path)) == FILES


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
    assert len(kept["log"]) == 1 and torch.equal(kept["model"]["0.weight"], model[0].weight)
    assert sorted(name.partition("-")[0] for name in os.listdir(tmp_path)) == FILES


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
        ({"l2": 0.1}, "l2 is 0.1 here and None there"),
        ({"schedule": "cosine"}, "schedule is 'cosine' here and None there"),
        ({"sample_weight": [1.0] * 50}, "weighted is True here and None there; data is"),
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


def adam(lr, betas=(0.9, 0.999)):
    return lambda parameters: torch.optim.Adam(parameters, lr, betas)


def test_resuming_with_other_settings_is_refused_unless_they_are_named(tmp_path):
    """Adam with another lr went on with the old one, without a word."""
    x, d = classes()
    train(network(), x, d, optimizer=adam(1e-3), checkpoint=tmp_path)
    options = {"epochs": 5, "checkpoint": tmp_path}
    with pytest.raises(ValueError, match=r"lr is 0.1 here and 0.001 there"):
        train(network(), x, d, optimizer=adam(1e-1), resume=True, **options)
    with pytest.raises(ValueError, match=r"betas is \[0.8, 0.999\] here and \[0.9, 0.999\] there"):
        train(network(), x, d, optimizer=adam(1e-3, (0.8, 0.999)), resume=["lr"], **options)
    history = train(network(), x, d, optimizer=adam(1e-1), resume=["lr"], **options)
    assert history["lr"] == [1e-3] * 3 + [1e-1] * 2
    with pytest.raises(ValueError, match="resume: 'rate' is no setting of a run"):
        train(network(), x, d, optimizer=adam(1e-1), resume=["rate"], **options)
    train(network(), x, d, checkpoint=tmp_path / "plain", lr=0.1)
    history = train(network(), x, d, checkpoint=tmp_path / "plain", lr=0.2, epochs=4, resume=["lr"])
    assert history["lr"] == [0.1, 0.1, 0.1, 0.2]


def test_resuming_with_other_numbers_of_the_same_shape_is_refused(tmp_path):
    x, d = classes()
    train(network(), x, d, checkpoint=tmp_path)
    for other in ((x + 1e-5, d), (x, d.flip(0))):
        with pytest.raises(ValueError, match="data is '[0-9a-f]{16}' here and '[0-9a-f]{16}' there"):
            train(network(), *other, checkpoint=tmp_path, resume=True, epochs=5)


def test_a_second_run_is_kept_out(tmp_path):
    """It removed the temporary file that the first was writing."""
    x, d = classes()

    def second(epoch):
        with pytest.raises(RuntimeError, match=f"checkpoint: another run is writing to {tmp_path}"):
            train(network(), x, d, checkpoint=tmp_path)

    train(network(), x, d, checkpoint=tmp_path, callbacks=[second])
    train(network(), x, d, checkpoint=tmp_path, resume=True, epochs=4)
    with pytest.raises(RuntimeError, match="stop"):
        train(network(), x, d, checkpoint=tmp_path, resume=True, epochs=5, callbacks=[fail])
    train(network(), x, d, checkpoint=tmp_path, resume=True, epochs=5)


def fail(epoch):
    raise RuntimeError("stop")


def test_fast_epochs_are_saved_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    save = Checkpoint.save
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, *nest: (saved.append(len(nest[1:])), save(self, *nest))
    )
    x, d = classes()
    history = train(network(), x, d, checkpoint=tmp_path, epochs=50)
    assert len(saved) <= 3
    kept = Checkpoint(tmp_path).load()["log"]
    assert [entry["epoch"]["loss"] for entry in kept] == history["loss"]
    saved.clear()
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
    train(network(), x, d, checkpoint=tmp_path, epochs=60, resume=True)
    assert len(saved) == 10 and len(Checkpoint(tmp_path).load()["log"]) == 60


def test_an_error_between_two_saves_keeps_the_last_complete_epoch(tmp_path):
    x, d = classes()

    def strike(epoch):
        if epoch.epoch == 5:
            raise RuntimeError("stop")

    options = {"checkpoint": tmp_path, "momentum": 0.9, "epochs": 8}
    whole, resumed = network(), network(seed=3)
    train(whole, x, d, **options | {"checkpoint": None})
    with pytest.raises(RuntimeError, match="stop"):
        train(network(), x, d, **options, callbacks=[strike])
    assert len(Checkpoint(tmp_path).load()["log"]) == 4
    train(resumed, x, d, **options, resume=True)
    assert same_weights(whole, resumed)


def edited(index, *path, value):
    *path, last = path
    part = index
    for key in path:
        part = part[key]
    part[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors",), "../outside.safetensors"),
        (("tensors",), "/etc/passwd"),
        (("tensors",), 3),
        (("log", "name"), "../log-1.jsonl"),
        (("log", "size"), 10**9),
        (("log", "size"), 5),
        (("log",), []),
        (("state",), {}),
        (("state", "config"), 3),
        (("state", "model"), {"0.weight": 1.5}),
        (("state", "model", "0.weight", "tensor"), "/nowhere"),
        (("state", "descent"), {}),
        (("state", "descent", "velocity"), [1, 2]),
        (("state", "stopping"), None),
        (("state", "order"), [1]),
    ],
    ids=str,
)
def test_a_state_edited_by_hand_is_damaged(tmp_path, path, value):
    x, d = classes()
    train(network(), x, d, checkpoint=tmp_path, momentum=0.5)
    index = tmp_path / "checkpoint.json"
    content = json.loads(index.read_text())
    edited(content, *path, value=value)
    index.write_text(json.dumps(content))
    model = network(seed=4)
    with pytest.raises(ValueError, match="is damaged"):
        train(model, x, d, checkpoint=tmp_path, momentum=0.5, resume=True, epochs=5)
    assert same_weights(model, network(seed=4))


def test_a_nest_too_deep_is_damaged(tmp_path):
    (tmp_path / "checkpoint.json").write_text('{"tensors": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match="is damaged"):
        train(network(), *classes(), checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "empty", "log"])
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
    elif damage == "log":
        (log,) = tmp_path.glob("log-*")
        log.write_text(log.read_text().replace("1", "2", 1))
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
    # What the dead left is swept.
    assert sorted(name.partition("-")[0] for name in os.listdir(tmp_path)) == FILES[1:]


def resume_in_child(folder, options):
    torch.set_num_threads(1)
    train(network(seed=9), *classes(), **options, checkpoint=folder, resume=True)
    os._exit(0)


@pytest.mark.launch
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"engine": "native", "mode": "stochastic"}, marks=pytest.mark.native),
        pytest.param({"engine": "native", "momentum": 0.9}, marks=pytest.mark.native),
        {"engine": "autograd", "momentum": 0.9},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_killed_again_and_again_a_run_ends_as_if_never_killed(tmp_path, monkeypatch, options):
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
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
        reached.append(len(Checkpoint(tmp_path).load()["log"]))
    assert reached == sorted(reached) and reached[-1] > 0
    model = network(seed=9)
    history = train(model, x, d, **options, checkpoint=tmp_path, resume=True)
    assert same_weights(model, expected) and history["epoch"] == list(range(1, 61))
    assert sorted(name.partition("-")[0] for name in os.listdir(tmp_path)) == FILES


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
