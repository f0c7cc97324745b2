"""What the command line trains on: a built-in data set, arrays in a file, or a table of any columns."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from mlpext import data
from mlpext.tabular import read_table, target_of

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclasses.dataclass(frozen=True)
class Source:
    """N samples. `y` are class numbers (N,), labels 0 or 1 (N, labels), or numbers (N, targets), float64;
    `names` those of the classes, the labels or the targets. `plain`: every column is a number, and all are
    kept."""

    name: str
    frame: pd.DataFrame
    kind: str
    y: Array
    names: list[str]
    plain: bool

    def __len__(self) -> int:
        return len(self.frame)


def read_source(options: argparse.Namespace, path: str) -> Source:
    """The data of --data or --test. ValueError for all that is wrong in them."""
    if path in data.NAMES or path.endswith(".npz"):
        target = options.target[0] if options.target else None
        return _of_dataset(data.load(path, target, options.task))
    frame = read_table(path, separator=options.separator, as_text=options.target)
    return of_frame(frame, Path(path).name, options.target, options.task)


def _of_dataset(dataset: data.Dataset) -> Source:
    frame = pd.DataFrame(dataset.x.double().numpy(), columns=[*dataset.features])
    y = dataset.target.numpy()
    if dataset.classes is not None:
        return Source(dataset.name, frame, "classes", y, [*dataset.classes], plain=True)
    names = ["target"] if y.shape[1] == 1 else [f"target {k}" for k in range(y.shape[1])]
    return Source(dataset.name, frame, "numbers", y.astype(np.float64), names, plain=True)


def of_frame(frame: pd.DataFrame, name: str, targets: Sequence[str], task: str, one: bool = False) -> Source:
    """Samples of a table, whose target columns are as they were written. `one`: one class will do."""
    if missing := [target for target in targets if target not in frame.columns]:
        columns = ", ".join(frame.columns)
        raise ValueError(f"{name}: there is no column {missing[0]!r}; the columns are {columns}")
    rest = frame.drop(columns=[*targets])
    if not len(rest.columns):
        raise ValueError(f"{name}: there is no column beside the target to predict it from")
    kind, y, names = target_of(frame, targets, name, task)
    if kind == "classes" and len(names) == 1 and not one:
        raise ValueError(f"{name}: {targets[0]!r} is {names[0]!r} in every row: there is nothing to learn")
    return Source(name, rest, kind, y, names, plain=False)


def split(source: Source, held_out: float, seed: int) -> tuple[Array, Array]:
    """The rows to train on and those held out, of every class alike."""
    labels = source.y if source.kind == "classes" else None
    train, test = data.split_rows(len(source), labels, held_out, seed)
    return train.numpy(), test.numpy()


def rows(source: Source, places: Array) -> Source:
    """These samples alone."""
    return dataclasses.replace(source, frame=source.frame.iloc[places], y=source.y[places])


def like(source: Source, names: list[str], kind: str) -> Source:
    """The same samples with classes numbered as in training. ValueError for a class that was not there."""
    if source.kind != kind:
        raise ValueError(f"{source.name}: its target holds {source.kind}, that of the training data {kind}")
    if kind != "classes":
        return source
    if unknown := [name for name in source.names if name not in names]:
        known = ", ".join(names)
        raise ValueError(f"{source.name}: {unknown[0]!r} is no class of the training data: {known}")
    numbers = np.array([names.index(name) for name in source.names])
    return dataclasses.replace(source, y=numbers[source.y], names=names)
