"""`Columns`, the first step of a pipeline on a table, and `preprocessing`, the steps to numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mlpext.tabular._read import listed, to_dates

# Columns of names that tell rows apart.
IDENTIFIER = re.compile(r"(^|[ _.-])(id|uuid|guid|index|key)$|^unnamed: 0$|^$", re.IGNORECASE)
# From so many rows on, text that is different in every row tells nothing of another row.
ROWS_TO_REPEAT = 20
# Columns that one of text becomes at most; its rarer values share the last.
CATEGORIES = 64


class Columns(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The columns of a DataFrame with the types that they had in training: numbers as float64, dates as days
    since 1970, everything else as text, "" where it is missing.

    Columns that tell nothing are left out: `left_out_` says which and why. `numeric_`, `dates_` and `texts_`
    are the names of the others.

    Args:
        drop: names of columns to leave out.
        categorical: names of columns whose numbers are labels.
        keep_all: whether constant columns and identifiers stay.

    >>> import pandas
    >>> from mlpext.tabular import Columns
    >>> Columns().fit(pandas.DataFrame({"id": [1, 2], "age": [30, 40], "unit": "kg"})).left_out_
    {'id': 'is an identifier', 'unit': 'is constant'}
    """

    def __init__(
        self, drop: Sequence[str] = (), categorical: Sequence[str] = (), keep_all: bool = False
    ) -> None:
        self.drop = drop
        self.categorical = categorical
        self.keep_all = keep_all

    def fit(self, X: pd.DataFrame, y: Any = None) -> Columns:
        """Learn the types. ValueError for a name that is no column, or where no column is left."""
        for option in ("drop", "categorical"):
            if unknown := [name for name in getattr(self, option) if name not in X.columns]:
                raise ValueError(
                    f"{option}: there is no column {unknown[0]!r}; the columns are {', '.join(X.columns)}"
                )
        self.left_out_: dict[str, str] = {}
        self.numeric_: list[str] = []
        self.dates_: list[str] = []
        self.texts_: list[str] = []
        for name in X.columns:
            column = X[name]
            reason = "as asked" if name in self.drop else None if self.keep_all else self._useless(column)
            if reason is not None:
                self.left_out_[name] = reason
            elif pd.api.types.is_datetime64_any_dtype(column):
                self.dates_.append(name)
            elif _is_numeric(column) and name not in self.categorical:
                self.numeric_.append(name)
            else:
                self.texts_.append(name)
        if not (self.numeric_ or self.dates_ or self.texts_):
            raise ValueError(
                "no column is left to learn from: "
                + "; ".join(f"{name!r} {reason}" for name, reason in self.left_out_.items())
            )
        self.feature_names_in_ = np.asarray([*X.columns], dtype=object)
        self.n_features_in_ = len(X.columns)
        return self

    def _useless(self, column: pd.Series) -> str | None:
        different = column.nunique()
        if different == 0:
            return "is empty"
        if different == 1 and not column.isna().any():
            return "is constant"
        if different < len(column) or column.name in self.categorical:
            return None
        if IDENTIFIER.search(str(column.name)):
            return "is an identifier"
        whole = pd.api.types.is_integer_dtype(column)
        if whole and len(column) > 2 and bool((column.diff().dropna() == 1).all()):
            return "numbers the rows"
        if not _is_numeric(column) and not pd.api.types.is_datetime64_any_dtype(column):
            return "is different in every row" if len(column) >= ROWS_TO_REPEAT else None
        return None

    def transform(self, X: pd.DataFrame) -> pd.DataFrame:
        """The columns that are kept, of another table too. ValueError for columns that it lacks, and entries
        that are no numbers or dates though the column's are."""
        names = [*self.numeric_, *self.dates_, *self.texts_]
        if missing := [name for name in names if name not in X.columns]:
            raise ValueError(f"there is no column {', '.join(map(repr, missing))}")
        faults: list[str] = []
        made = {name: _as_numbers(X[name], faults) for name in self.numeric_}
        made |= {name: _as_days(X[name], faults) for name in self.dates_}
        made |= {name: _as_text(X[name]) for name in self.texts_}
        if faults:
            raise ValueError(listed(faults))
        return pd.DataFrame(made, index=X.index)

    def get_feature_names_out(self, input_features: Any = None) -> Any:
        return np.asarray([*self.numeric_, *self.dates_, *self.texts_], dtype=object)


def _is_numeric(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _as_numbers(column: pd.Series, faults: list[str]) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce").astype(float)
    _name_rows(column, numbers, "a number", faults)
    infinite = np.flatnonzero(np.isinf(numbers))
    faults += [f"row {row + 1}, column {column.name!r}: {column.iloc[row]} is infinite" for row in infinite]
    return numbers


def _as_days(column: pd.Series, faults: list[str]) -> pd.Series:
    dates = column if pd.api.types.is_datetime64_any_dtype(column) else to_dates(column.astype("string"))
    _name_rows(column, dates, "a date", faults)
    return (dates - pd.Timestamp(0, tz=getattr(dates.dt, "tz", None))) / pd.Timedelta(days=1)


def _name_rows(column: pd.Series, parsed: pd.Series, what: str, faults: list[str]) -> None:
    for row in np.flatnonzero(column.notna() & parsed.isna()):
        faults.append(f"row {row + 1}, column {column.name!r}: {column.iloc[row]!r} is not {what}")


def _as_text(column: pd.Series) -> pd.Series:
    if pd.api.types.is_float_dtype(column):  # whole numbers that became floats beside a missing one
        whole = column.dropna()
        if bool((whole == whole.round()).all()) and bool((whole.abs() < 2**53).all()):
            column = column.astype("Int64")
    return column.astype("string").fillna("").astype(object)


def preprocessing(columns: Columns, standardise: bool = True) -> Pipeline:
    """The steps from a table to float64 numbers: missing numbers become the median, with a column that says
    so; text becomes a column for each of its values, at most CATEGORIES, all 0 for one that was not seen in
    training.

    >>> import pandas
    >>> from mlpext.tabular import Columns, preprocessing
    >>> preprocessing(Columns()).fit_transform(pandas.DataFrame({"age": [30, 40], "town": ["Rome", "Oslo"]}))
    array([[-1.,  0.,  1.],
           [ 1.,  1.,  0.]])
    """
    numbers = [SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)]
    numbers += [StandardScaler()] if standardise else []
    texts = OneHotEncoder(
        handle_unknown="infrequent_if_exist", max_categories=CATEGORIES, sparse_output=False
    )
    encode = ColumnTransformer(
        [
            ("numbers", make_pipeline(*numbers), make_column_selector(dtype_include="number")),
            ("texts", texts, make_column_selector(dtype_exclude="number")),
        ]
    )
    return Pipeline([("columns", columns), ("encode", encode)])
