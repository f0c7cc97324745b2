"""The record of a run: its columns, its files, and the log that grows with each epoch."""

import csv
import json
import os

import numpy as np
import pytest
import torch

from fit_helpers import classes, network, train
from mlpext.training.history import History


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
        *(
            "epoch",
            "updates",
            "loss",
            "accuracy",
            "val_loss",
            "val_accuracy",
            "lr",
            "seconds",
            "samples_per_second",
        )
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
