"""What the target columns of a table mean: classes, labels of which a row may have several, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from mlpext._tasks import MOST_CLASSES
from mlpext.tabular._read import MOSTLY, listed

Array: TypeAlias = "np.ndarray[Any, Any]"

# What a column of two labels may hold, and which of them means that the label is there.
LABELS = {"0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1, "0.0": 0, "1.0": 1}


def target_of(
    frame: pd.DataFrame, targets: Sequence[str], name: str, task: str = "auto"
) -> tuple[str, Array, list[str]]:
    """Kind, y and names of target columns that are as they were written (`read_table(as_text=...)`).

    "classes": y are class numbers (N,), names those of the classes, sorted. "labels": several columns that
    hold 0 and 1 alone, y is that, (N, columns). "numbers": y is float64 (N, columns). `task` "classes" or
    "numbers" says which it is. `name` begins the messages.

    Raises:
        ValueError: values that are missing, or are not what `task` says, with row and column.

    >>> import pandas
    >>> from mlpext.tabular import target_of
    >>> target_of(pandas.DataFrame({"kind": ["rose", "lily", "rose"]}), ["kind"], "flowers.csv")
    ('classes', array([1, 0, 1]), ['lily', 'rose'])
    """
    given = frame[[*targets]].astype("string")
    given = given.apply(lambda column: column.str.strip())
    faults = [
        f"row {row + 1}, column {targets[column]!r}: the value is missing"
        for row, column in np.argwhere((given.isna() | (given == "")).to_numpy())
    ]
    if faults:
        raise ValueError(f"{name}: {listed(faults)}")
    return _meaning(given, name, task)


def _meaning(given: pd.DataFrame, name: str, task: str) -> tuple[str, Array, list[str]]:
    if given.shape[1] > 1 and task != "numbers":
        lowered = given.apply(lambda column: column.str.lower())
        if bool(lowered.isin([*LABELS]).to_numpy().all()):
            return "labels", lowered.replace(LABELS).to_numpy(dtype=np.int64), [*given.columns]
        if task == "classes":
            raise ValueError(f"{name}: of several targets that are classes each must hold 0 and 1 alone")
    numbers = given.apply(lambda column: pd.to_numeric(column.where(column.str.isascii()), errors="coerce"))
    wrong = ~np.isfinite(numbers.to_numpy(dtype=np.float64, na_value=np.nan))
    # A column of numbers with a few faults is not one of classes, unless that is said.
    mostly = task == "auto" and 0 < wrong.mean() < 1 - MOSTLY
    if given.shape[1] > 1 or task == "numbers" or mostly:
        if wrong.any():
            faults = [
                f"row {row + 1}, column {given.columns[column]!r}: {given.iat[row, column]!r} is not a number"
                for row, column in np.argwhere(wrong)
            ]
            hint = " (--task classes, if they are names of classes)" if mostly else ""
            raise ValueError(f"{name}: {listed(faults)}{hint}")
        return "numbers", numbers.to_numpy(dtype=np.float64), [*given.columns]
    column, values = given.iloc[:, 0], numbers.iloc[:, 0]
    if task == "auto" and not wrong.any():
        different = values.unique()
        if len(different) > MOST_CLASSES or (different != np.floor(different)).any():
            return "numbers", values.to_numpy(dtype=np.float64)[:, None], [*given.columns]
    names = sorted(column.unique(), key=lambda label: _order(label, numeric=not wrong.any()))
    if len(column) >= MOST_CLASSES and len(names) > len(column) // 2:
        raise ValueError(
            f"{name}: {column.name!r} has {len(names)} different values in {len(column)} rows: no classes"
        )
    place = {label: k for k, label in enumerate(names)}
    return "classes", column.map(place).to_numpy(dtype=np.int64), names


def _order(label: str, numeric: bool) -> Any:
    return (float(label), label) if numeric else label
