"""Lists, DataFrames and Series as arrays, and labels that are text as class numbers.

For `fit` and `evaluate`. Tensors, memory maps and arrays of numbers go through as they are. A table is
whatever numpy can make an array of, so that neither pandas nor polars is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from mlpext.training._samples import Array

# A tensor, an array, a DataFrame, a Series, or a list (of lists).
Data: TypeAlias = Any


def as_inputs(x: Data, name: str = "x") -> Array:
    """x (N, ...) as numbers. TypeError for what holds anything else, naming the first such entry."""
    array = _as_array(x, name)
    if isinstance(array, torch.Tensor) or array.dtype.kind not in "OUS":
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError):
        place = next(place for place, value in np.ndenumerate(array) if not _is_number(value))
        columns = getattr(x, "columns", None)
        column = f" (column {columns[place[1]]!r})" if columns is not None else ""
        raise TypeError(
            f"{name}[{', '.join(map(str, place))}]{column} is {array[place]!r}; x must hold numbers"
        ) from None


def as_targets(
    target: Data, name: str = "target", classes: Sequence[str] | None = None
) -> tuple[Array, list[str] | None]:
    """The target as numbers, and the labels that its class numbers stand for where it held text.

    The labels are `classes`, else those of the target itself, sorted. ValueError for one that is not among
    `classes`, TypeError for entries that are neither text nor numbers.
    """
    array = _as_array(target, name)
    if isinstance(array, torch.Tensor):
        return array, None
    if array.ndim == 2 and array.shape[1] == 1 and array.dtype.kind in "OUSiub":
        array = array[:, 0]  # a table of one column
    if array.dtype.kind not in "OUS":
        return array, None
    texts = [isinstance(value, str) for value in array.flat]
    if not any(texts):
        return as_inputs(array, name), None
    if not all(texts) or array.ndim != 1:
        entry = array.flat[texts.index(False)] if not all(texts) else f"of shape {array.shape}"
        raise TypeError(f"{name} must hold labels that are all text, shape (N,), or numbers, got {entry!r}")
    labels = sorted({*array.tolist()}) if classes is None else list(classes)
    number = {label: k for k, label in enumerate(labels)}
    for row, label in enumerate(array.tolist()):
        if label not in number:
            raise ValueError(f"{name}[{row}] is {label!r}; the classes are {', '.join(map(repr, labels))}")
    return np.array([number[label] for label in array.tolist()]), labels


def _as_array(data: Data, name: str) -> Array:
    """Tensors and arrays themselves; of anything else an array."""
    if isinstance(data, (torch.Tensor, np.ndarray)):
        return data
    if not (hasattr(data, "__array__") or isinstance(data, (list, tuple))):
        raise TypeError(
            f"{name} must be a tensor, a numpy array, a DataFrame, a Series or a list, got "
            f"{type(data).__name__}"
        )
    try:
        return np.asarray(data)
    except ValueError as error:
        raise ValueError(f"{name}: its rows are not of one length: {error}") from None


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return True
