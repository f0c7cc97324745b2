"""Tables from files, by pandas, with all that is wrong in one named at once."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SEPARATORS = (",", ";", "\t", "|")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz"}
# A column of text is one of numbers with faults in it where more than this share of the entries are numbers.
MOSTLY = 0.9
# As many faults are named; of the others their number.
NAMED = 20
DATE = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}([ T].*)?$|\d{1,2}[./]\d{1,2}[./]\d{2,4}( .*)?$|\d{4}/\d{1,2}/\d{1,2}( .*)?$"
)
DECIMAL_COMMA = re.compile(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)?,\d+(e[+-]?\d+)?$", re.IGNORECASE)


def read_table(
    path: str | os.PathLike[str], *, separator: str = "auto", as_text: Iterable[str] = ()
) -> pd.DataFrame:
    r"""A table: a header line and one line a row (.csv, .tsv, .txt, also .gz, .bz2 or .xz of these), or
    .parquet.

    Args:
        path: the file. separator: of the fields; "auto" takes the most frequent of comma, semicolon, tab and
        bar in the header. as_text: columns that are kept as they are written, so that "01" and "1" are two
        labels.

    Raises:
        ValueError: what is wrong in the file, all of it, with line (the header is line 1) and column.
        FileNotFoundError: there is no such file.

    >>> from mlpext.tabular import read_table
    >>> _ = open("data.csv", "w").write("age;town\n1,5;Rome\n2,5;Oslo\n")
    >>> read_table("data.csv").age.sum()
    np.float64(4.0)
    """
    path = Path(path)
    name = path.name.lower()
    compression = next((kind for suffix, kind in COMPRESSED.items() if name.endswith(suffix)), None)
    stem = name if compression is None else name.rpartition(".")[0]
    if stem.endswith(".parquet"):
        return _parquet(path)
    if not stem.endswith((".csv", ".tsv", ".txt")):
        raise ValueError(f"{path}: a table ends in .csv, .tsv, .txt, .parquet, or one of these and .gz")
    open_: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(compression or "", open)
    try:
        with open_(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole {compression} file: {error}") from error
    return _Text(path, content, separator).table([*as_text])


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs the package pyarrow: {error}") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the reader's own errors are
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


class _Text:
    """A table as text, with what is wrong in it."""

    def __init__(self, path: Path, content: bytes, separator: str) -> None:
        self._path = path
        self._content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        self._faults: list[str] = []
        header = self._header_line()
        if separator == "auto":
            separator = max(SEPARATORS, key=_outside_quotes(header).count)
        elif separator not in SEPARATORS:
            raise ValueError(f"separator must be 'auto' or one of {SEPARATORS}, got {separator!r}")
        self._separator = separator
        try:
            fields = next(csv.reader([header], delimiter=separator))
        except csv.Error as error:
            raise ValueError(f"{self._path}, line 1: {error}") from error
        self._header = [field.strip() for field in fields]

    def _header_line(self) -> str:
        line = next((line for line in io.BytesIO(self._content) if line.strip()), b"")
        if not line:
            raise ValueError(f"{self._path}: the file is empty; its first line must name the columns")
        if b"\0" in line:
            raise ValueError(f"{self._path} is not a text file: it holds zero bytes")
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}, line 1: not UTF-8 text: {error}") from error

    def table(self, as_text: list[str]) -> pd.DataFrame:
        for name in sorted({name for name in self._header if self._header.count(name) > 1}):
            self._faults.append(f"line 1: there are {self._header.count(name)} columns {name!r}")
        for name in as_text:
            if name not in self._header:
                self._faults.append(f"there is no column {name!r}; the columns are {', '.join(self._header)}")
        self._check_fields()
        self._report()
        try:
            frame = self._frame({k: str for k, name in enumerate(self._header) if name in as_text})
        except (ValueError, OverflowError, pd.errors.ParserError) as error:
            raise ValueError(f"{self._path}: {error}") from error
        frame.columns = pd.Index(self._header)
        if not len(frame):
            raise ValueError(f"{self._path}: there is no data below the header")
        for name in frame.columns:
            if name not in as_text:
                frame[name] = self._typed(frame[name])
            elif not pd.api.types.is_numeric_dtype(frame[name]):
                text = frame[name].str.strip()
                frame[name] = _with_points(text) if self._has_decimal_commas(text) else text
        self._report()
        return frame

    def _frame(self, dtype: dict[int, type]) -> pd.DataFrame:
        """The columns as pandas reads them: in pieces, which takes half of the memory, unless a column is of
        numbers in one piece and of text in another, where "01" would be 1 in the first."""
        read = partial(pd.read_csv, sep=self._separator, skipinitialspace=True, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.DtypeWarning)
            try:
                return read(io.BytesIO(self._content), low_memory=True)
            except pd.errors.DtypeWarning:
                pass
        return read(io.BytesIO(self._content), low_memory=False)

    def _check_fields(self) -> None:
        """Every line has as many fields as the header. Without quotes separators are counted, which takes a
        tenth of the time."""
        expected = len(self._header)
        if b'"' in self._content:
            for line, fields in self._lines():
                if len(fields) != expected:
                    self._wrong_width(line, len(fields))
            return
        first, separator = 1, ord(self._separator)
        for block in _blocks(self._content):
            values = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(values == ord("\n"))
            starts = np.concatenate([[0], ends[:-1] + 1])
            places = np.flatnonzero(values == separator)
            counts = np.diff(np.searchsorted(places, np.concatenate([[0], ends])))
            wrong = np.flatnonzero(counts != expected - 1)
            for k in wrong:
                if block[starts[k] : ends[k]].strip():  # blank lines are skipped
                    self._wrong_width(first + int(k), int(counts[k]) + 1)
            first += len(ends)

    def _wrong_width(self, line: int, fields: int) -> None:
        self._faults.append(f"line {line}: {fields} fields, but the header has {len(self._header)}")

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """The lines that are not blank, with the number of the line that each begins in."""
        try:
            text = self._content.decode()
        except UnicodeDecodeError as error:
            line = self._content.count(b"\n", 0, error.start) + 1
            raise ValueError(f"{self._path}, line {line}: not UTF-8 text: {error.reason}") from error
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._separator, skipinitialspace=True)
        before = 0
        try:
            for fields in reader:
                if fields:
                    yield before + 1, fields
                before = reader.line_num
        except csv.Error as error:
            raise ValueError(f"{self._path}, line {before + 1}: {error}") from error

    def _typed(self, column: pd.Series) -> pd.Series:
        """Text as numbers or dates, where it is mostly that."""
        if not (pd.api.types.is_string_dtype(column) or column.dtype == object):
            return column
        column = (
            column.str.strip() if pd.api.types.is_string_dtype(column) else column.astype(str).str.strip()
        )
        known = column[column.notna()]
        if not len(known):
            return column
        if self._has_decimal_commas(known):
            return self._numbers(column, _with_points(column))
        if DATE.match(known.iloc[0]):
            dates = to_dates(column)
            if dates.notna().sum() >= MOSTLY * len(known):
                self._name_faults(column, dates, "a date")
                return dates
        return self._numbers(column, column)

    def _has_decimal_commas(self, column: pd.Series) -> bool:
        if self._separator == ",":
            return False
        return bool(column.dropna().map(lambda text: bool(DECIMAL_COMMA.match(text))).mean() > 0.5)

    def _numbers(self, column: pd.Series, text: pd.Series) -> pd.Series:
        numbers = pd.to_numeric(text.where(text.isna() | text.str.isascii()), errors="coerce")
        if numbers.notna().sum() < MOSTLY * column.notna().sum():
            return column
        self._name_faults(column, numbers, "a number")
        return numbers.astype(float)

    def _name_faults(self, column: pd.Series, parsed: pd.Series, what: str) -> None:
        rows = np.flatnonzero(column.notna() & parsed.isna())
        if not len(rows):
            return
        lines = [line for line, _ in self._lines()][1:]
        for row in rows:
            self._faults.append(
                f"line {lines[row]}, column {column.name!r}: {column.iloc[row]!r} is not {what}"
            )

    def _report(self) -> None:
        if self._faults:
            raise ValueError(f"{self._path}: {listed(self._faults)}")


def _with_points(column: pd.Series) -> pd.Series:
    """1.234,5 as 1234.5."""
    return column.str.replace(".", "", regex=False).str.replace(",", ".", regex=False)


def listed(faults: Sequence[str]) -> str:
    """The first faults, and how many there are besides."""
    more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return "; ".join(faults[:NAMED]) + more


def _blocks(content: bytes, size: int = 1 << 22) -> Iterator[bytes]:
    """The bytes in pieces of whole lines."""
    begin = 0
    while begin < len(content):
        end = content.find(b"\n", begin + size)
        if end < 0:
            last = content[begin:]
            yield last if last.endswith(b"\n") else last + b"\n"
            return
        yield content[begin : end + 1]
        begin = end + 1


def _outside_quotes(line: str) -> str:
    return re.sub(r'"[^"]*"', "", line)


def to_dates(column: pd.Series) -> pd.Series:
    """Text as dates, NaT where it is none; 3.4.2024 is the third of April."""
    first = column.dropna().iloc[0] if column.notna().any() else ""
    return pd.to_datetime(column, errors="coerce", dayfirst="." in str(first)[:3])
