"""What a training run did: one `Epoch` record for each epoch, one loss for each step."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mlpext._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    epoch counts from 1, updates from the start of the run. loss is the mean of E over the epoch's samples,
    each taken as its step met it, before that step's update; so is the training metric. metrics holds
    `accuracy` (class targets) or `r2` (numeric ones) and, with validation data, `val_loss` and `val_accuracy`
    or `val_r2`, measured after the epoch. seconds is the time of the training steps alone, lr
    their learning rate.
    """

    epoch: int
    updates: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    samples_per_second: float
    lr: float = math.nan

    def row(self) -> dict[str, float]:
        """The record as one flat row, in the order of the columns of a CSV."""
        return {
            "epoch": self.epoch,
            "updates": self.updates,
            "loss": self.loss,
            **self.metrics,
            "lr": self.lr,
            "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
        }


class History:
    """The record of one `fit`.

    `history["loss"]` is a column, one value an epoch (columns: epoch, updates, loss, the metrics, lr,
    seconds, samples_per_second); `epochs` the list of `Epoch` records; `step_losses` a float64 tensor
    (updates,) with the mean E of each step; `config` the settings of the run, its seed among them.

        history = fit(model, x, target, epochs=20)
        history["loss"][-1]; history.to_csv("history.csv")
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.epochs: list[Epoch] = []
        self._steps = [torch.empty(0, dtype=torch.float64, device="cpu")]

    def append(self, epoch: Epoch, step_losses: Tensor) -> None:
        """Add an epoch and the losses of its steps, shape (steps,)."""
        self.epochs.append(epoch)
        self._steps.append(step_losses.to("cpu", torch.float64))

    @property
    def step_losses(self) -> Tensor:
        """Mean E of each step of the run, float64, shape (updates,)."""
        # Joined when asked for: joining at every epoch would copy the run's steps over and over.
        self._steps = [torch.cat(self._steps)]
        return self._steps[0]

    @property
    def columns(self) -> list[str]:
        """The names that `history[name]` accepts; the metrics are among them from the first epoch on."""
        return list(self.epochs[0].row() if self.epochs else Epoch(0, 0, 0.0, {}, 0.0, 0.0).row())

    def __getitem__(self, name: str) -> list[float]:
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; the columns are {', '.join(self.columns)}")
        return [epoch.row()[name] for epoch in self.epochs]

    def __len__(self) -> int:
        """The number of epochs."""
        return len(self.epochs)

    def __repr__(self) -> str:
        last = self.epochs[-1].row() if self.epochs else {"epoch": 0}
        return f"History({', '.join(f'{name}={value:.6g}' for name, value in last.items())})"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line an epoch, under a header of the columns. Raises OSError."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(epoch.row() for epoch in self.epochs)
        write_atomically(path, text.getvalue())

    def record(self) -> dict[str, Any]:
        """The whole as a nest of dicts and lists with one tensor."""
        epochs = [dataclasses.asdict(epoch) for epoch in self.epochs]
        return {"config": self.config, "epochs": epochs, "step_losses": self.step_losses}

    def entry(self, step_losses: Tensor) -> dict[str, Any]:
        """The last epoch with the losses of its steps, as the log of a checkpoint keeps it."""
        # Base64 of their bytes: to write 1438 losses as text takes as long as to train their steps.
        content = step_losses.to("cpu", torch.float64).numpy().astype("<f8").tobytes()
        return {"epoch": {**vars(self.epochs[-1])}, "steps": base64.b64encode(content).decode()}

    def load_entries(self, entries: Sequence[dict[str, Any]]) -> None:
        """Take over the epochs of a log; the configuration stays this history's own."""
        self.epochs = [Epoch(**entry["epoch"]) for entry in entries]
        contents = [base64.b64decode(entry["steps"], validate=True) for entry in entries]
        steps = [torch.from_numpy(np.frombuffer(content, "<f8").astype(float)) for content in contents]
        self._steps = [torch.empty(0, dtype=torch.float64, device="cpu"), *steps]

    def load_record(self, record: dict[str, Any]) -> None:
        """Take over the epochs and steps of a `record`; the configuration stays this history's own."""
        self.epochs = [Epoch(**epoch) for epoch in record["epochs"]]
        self._steps = [torch.as_tensor(record["step_losses"], dtype=torch.float64, device="cpu")]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything, step losses included, as `History.load` reads it. Raises OSError."""
        write_atomically(path, json.dumps({**self.record(), "step_losses": self.step_losses.tolist()}) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read a file of `to_json`: `History.load("runs/digits/batch/history.json").plot("loss.png")`.

        Raises FileNotFoundError, or ValueError for a file that is no history.
        """
        try:
            record = json.loads(Path(path).read_text())
            history = cls(record["config"])
            history.load_record(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a history written by History.to_json: {error!r}") from error
        return history

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw loss and metric over the epochs, write the picture to `path` if given, and return the figure.

        Needs matplotlib (ImportError without it).
        """
        from mlpext.plots._histories import plot_histories

        return plot_histories({str(self.config.get("mode", "training")): self}, path)


def append_csv(path: Path, row: dict[str, float]) -> None:
    """Add a line to a CSV, under a header if it is the first. Raises OSError."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


class Log:
    """`log.jsonl` and `log.csv` in a folder: one line an epoch, on disk as soon as the epoch is over.

    Begins with the epochs that `history` holds, so that a resumed run's log has each epoch once.
    """

    def __init__(self, folder: str | os.PathLike[str], history: History) -> None:
        self._jsonl, self._csv = Path(folder) / "log.jsonl", Path(folder) / "log.csv"
        write_atomically(self._jsonl, "")
        write_atomically(self._csv, "")
        for epoch in history.epochs:
            self.append(epoch)

    def append(self, epoch: Epoch) -> None:
        """Add a line to each file. Raises OSError."""
        row = epoch.row()
        with open(self._jsonl, "a") as file:
            file.write(json.dumps(row) + "\n")
        append_csv(self._csv, row)
