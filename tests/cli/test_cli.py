import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import mlpext
from mlpext import cli
from mlpext.nn import MLP
from mlpext.training.checkpoint import Checkpoint
from mlpext.training.history import History

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, line):
    """Exit code, stdout and stderr of a command line."""
    try:
        code = cli.main(line.split())
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def columns(table):
    """The printed table as {mode: {column: text}}."""
    rows = [line.split() for line in table.splitlines()]
    head = next(row for row in rows if row[0] == "mode")
    names = " ".join(head).replace("final E", "E").split()
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows if row[0] in cli.MODES}


@pytest.mark.thorough
def test_train_compares_the_modes_and_writes_everything(capsys, tmp_path):
    code, out, err = run(capsys, "train")
    assert (code, err) == (0, "")
    table = columns(out)
    assert list(table) == ["stochastic", "mini-batch", "batch"]
    for mode in ("stochastic", "mini-batch"):
        assert float(table[mode]["accuracy"].rstrip("%")) >= 95
    assert [table[mode]["updates"] for mode in table] == ["14380", "1350", "600"]

    folder = tmp_path / "runs" / "digits"
    assert {path.name for path in folder.iterdir()} == {"config.json", "loss.png", "model.mlpext", *table}
    assert out.splitlines()[-3].startswith("held-out sample 1: predicted ")
    falling = History.load(folder / "batch/history.json")["loss"]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))
    for mode, row in table.items():
        history = History.load(folder / mode / "history.json")
        assert len(history) == int(row["epochs"]) and len(history.step_losses) == int(row["updates"])
        assert sum(history["seconds"]) == pytest.approx(float(row["seconds"]), abs=0.01)
        with open(folder / mode / "history.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == len(history)
        model = MLP([64, 64, 10])
        model.load_state_dict(safetensors.torch.load_file(folder / mode / "weights.safetensors"))
        assert f"{history['val_accuracy'][-1]:.1%}" == row["accuracy"]
        assert all(int(row[speed].replace(",", "")) > 0 for speed in ("samples/s", "loop/s"))
    config = json.loads((folder / "config.json").read_text())
    assert config["sizes"] == [64, 64, 10] and config["seed"] == [0]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_regression_maxout_and_options(capsys):
    options = "--activation maxout --pieces 3 --hidden 6,5 --epochs 20 --momentum 0.5 --out here --quiet"
    code, out, err = run(capsys, f"train --data diabetes --mode batch {options}")
    assert (code, err) == (0, "")
    assert "diabetes, 10-6-5-1, maxout: 354 samples to train on, 88 held out" in out
    assert columns(out)["batch"]["epochs"] == "20" and -1 < float(columns(out)["batch"]["r2"]) < 1
    weights = safetensors.torch.load_file("here/batch/weights.safetensors")
    assert weights["0.weight"].shape == (3, 6, 10) and weights["1.weight"].shape == (3, 5, 6)


def test_leaky_relu_has_the_lectures_slope(capsys):
    common = "train --data iris --mode mini-batch --epochs 2 --activation leaky_relu --quiet --out runs/iris"
    weights = []
    for extra in ("", "--parameter negative_slope=0.1", "--parameter negative_slope=0.01"):
        assert run(capsys, f"{common} {extra} --overwrite")[0] == 0
        weights.append(safetensors.torch.load_file("runs/iris/mini-batch/weights.safetensors")["0.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.thorough
def test_a_csv_of_ones_own(capsys, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 2))
    lines = [f"{a},{'up' if a > b else 'down'},{b}" for a, b in x]
    (tmp_path / "own.csv").write_text("a,kind,b\n" + "\n".join(lines) + "\n")
    code, out, _ = run(capsys, "train --data own.csv --target kind --mode mini-batch --epochs 40 --quiet")
    assert code == 0 and float(columns(out)["mini-batch"]["accuracy"].rstrip("%")) > 80
    assert (tmp_path / "runs/own/mini-batch/weights.safetensors").exists()
    np.savez("own.npz", x=x, sum=x.sum(1))
    options = "--target sum --mode batch --epochs 200 --quiet --out sums"
    code, out, _ = run(capsys, f"train --data own.npz {options}")
    assert code == 0 and float(columns(out)["batch"]["r2"]) > 0.8


def test_resume_continues(capsys, tmp_path):
    common = "train --data iris --mode mini-batch --quiet"
    assert run(capsys, f"{common} --out whole --epochs 6")[0] == 0
    assert run(capsys, f"{common} --out part --epochs 3")[0] == 0
    code, out, _ = run(capsys, f"{common} --out part --epochs 6 --resume")
    assert code == 0 and columns(out)["mini-batch"]["epochs"] == "6"
    whole, part = (tmp_path / folder / "mini-batch/weights.safetensors" for folder in ("whole", "part"))
    assert whole.read_bytes() == part.read_bytes()
    code, _, err = run(capsys, f"{common} --out part --epochs 6 --resume --momentum 0.2")
    assert code == 1 and "part holds another run (momentum 0.0 there, 0.2 here)" in err
    assert run(capsys, f"{common} --out part --epochs 8 --resume --lr 0.2")[0] == 0
    assert History.load("part/mini-batch/history.json")["lr"] == [0.1] * 6 + [0.2] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("plot", "required: PICTURE"),
        ("plot history", "required: RUN"),
        ("train --mode online", "argument --mode: invalid choice: 'online'"),
        ("train --activation bent", "argument --activation: invalid choice: 'bent'"),
        ("train --output-activation maxout", "argument --output-activation: invalid choice: 'maxout'"),
        ("train --loss mse", "argument --loss: invalid choice: 'mse'"),
        ("train --data imagenet", "argument --data: 'imagenet' is none of digits, "),
        ("train --data own.csv", "argument --target: a table needs it"),
        ("train --target x", "argument --target: digits has its own"),
        ("train --hidden 64,x", "argument --hidden: '64,x' is not sizes of 1 or more, like 64,64"),
        ("train --hidden 64,0", "argument --hidden: '64,0' is not sizes"),
        ("train --batch-size 0", "argument --batch-size: '0' is not an integer of 1 or more"),
        ("train --epochs 1.5", "argument --epochs: '1.5' is not an integer of 1 or more"),
        ("train --lr nan", "argument --lr: 'nan' is not a finite number of 0 or more"),
        ("train --lr=-1", "argument --lr: '-1' is not a finite number of 0 or more"),
        ("train --momentum inf", "argument --momentum: 'inf' is not"),
        ("train --validation 1", "argument --validation: '1' is not a fraction between 0 and 1"),
        ("train --seed=-1", "argument --seed: '-1' is not an integer from 0"),
        ("train --device nowhere", "argument --device: 'nowhere' is not a device"),
        ("train --pieces 3", "argument --pieces: only maxout has pieces"),
        ("train --activation maxout --pieces 0", "argument --pieces: '0' is not an integer of 1 or more"),
        ("train --parameter alpha=2", "argument --parameter: relu has no parameter 'alpha'; it has none"),
        ("train --activation elu --parameter beta=2", "elu has no parameter 'beta'; it has alpha"),
        ("train --activation elu --parameter alpha", "argument --parameter: 'alpha' is not NAME=NUMBER"),
    ],
)
def test_bad_arguments_exit_with_2(capsys, tmp_path, arguments, message):
    code, out, err = run(capsys, arguments)
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --data none.csv --target y", "none.csv: No such file or directory"),
        ("train --data own.csv --target z", "own.csv: there is no column 'z'; the columns are a, y"),
        ("train --data own.csv --target y", "own.csv: line 42, column 'a': 'red' is not a number"),
        ("train --data damaged.npz", "damaged.npz is not an NPZ file"),
        ("train --data iris --out own.csv", "own.csv"),
        ("train --data iris --mode batch --lr 1e30 --quiet", "batch mode, lr=1e+30: the"),
        ("plot history none", "none: No such file or directory"),
        ("plot history empty", "empty: there is no history.json in this folder or below"),
        ("plot history own.csv", "own.csv is not a history"),
        ("plot activations --out picture.docx", "docx"),
    ],
)
def test_what_cannot_be_done_exits_with_1_and_one_line(capsys, tmp_path, arguments, message):
    rows = "".join(f"{k},{k / 7}\n" for k in range(40))
    (tmp_path / "own.csv").write_text(f"a,y\n{rows}red,3\n")
    (tmp_path / "damaged.npz").write_text("no zip")
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, arguments)
    assert code == 1 and err.startswith("mlpext: error: ") and message in err and err.count("\n") == 1
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]


@pytest.mark.thorough
def test_plot_commands(capsys, tmp_path):
    assert run(capsys, "train --data iris --epochs 3 --quiet")[0] == 0
    assert run(capsys, "plot history runs/iris runs/iris/batch/history.json --out pictures/two.png")[0] == 0
    assert run(capsys, "plot activations") == (0, "activations.png\n", "")
    for name in ("pictures/two.png", "activations.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for text in (
        mlpext.__version__,
        torch.__version__,
        *mlpext.activations(),
        mlpext._C.cpu_isa(),
        "CUDA",
        "threads",
    ):
        assert text in out


def test_info_lists_the_variables_that_are_read_at_run_time(capsys, monkeypatch):
    switches = [("MLPEXT_A", None, "what a does"), ("MLPEXT_B", "7", "what b does")]
    monkeypatch.setattr(mlpext._C, "switches", lambda: switches, raising=False)
    lines = [line.split(maxsplit=1) for line in run(capsys, "info")[1].splitlines()[-2:]]
    assert lines == [["MLPEXT_A", "not set: what a does"], ["MLPEXT_B", "7: what b does"]]


def test_help_names_the_defaults(capsys):
    code, out, _ = run(capsys, "train --help")
    assert code == 0 and "stochastic 0.005, mini-batch 0.1, batch 0.1" in " ".join(out.split())


@pytest.mark.launch
def test_ctrl_c_exits_with_130_and_keeps_the_checkpoint(tmp_path):
    line = "-m mlpext train --data iris --mode mini-batch --epochs 1000000"
    package = Path(mlpext.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, *line.split()],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(package),
            "PYTHONWARNINGS": "ignore:mlpext:RuntimeWarning",  # that there is no library, where there is none
        },
    )
    index = tmp_path / "runs/iris/mini-batch/checkpoint/checkpoint.json"
    deadline = time.monotonic() + 120
    while not (index.exists() and json.loads(index.read_text())["log"]["size"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    kept = len(Checkpoint(index.parent).load()["log"])
    assert process.returncode == 130
    assert err.splitlines() == [
        f"mlpext: interrupted; runs/iris/mini-batch/checkpoint keeps epoch {kept}, --resume continues from it"
    ]
    assert len(History.load(index.parents[1] / "history.json")) == kept
    assert (index.parents[1] / "loss.png").exists()
