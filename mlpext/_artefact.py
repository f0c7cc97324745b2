"""`save` and `load`: an estimator or a pipeline in one file, which can hold numbers and names, but no code to
run.

The file is a ZIP: the estimator as skops writes it (a scheme in JSON, arrays as .npy), and `mlpext.json` with
what it is and what wrote it. skops makes objects of the types that are trusted alone: scikit-learn's,
NumPy's, and those of TRUSTED. A file that names any other is refused before an object is made.
"""

from __future__ import annotations

import io
import json
import os
import platform
import zipfile
from pathlib import Path
from typing import Any

import torch

from mlpext._files import write_atomically
from mlpext._version import __version__

TRUSTED = (
    "mlpext._network.Network",
    "mlpext.sklearn._estimators.MLPClassifier",
    "mlpext.sklearn._estimators.MLPRegressor",
    "mlpext.sklearn._rules.OptimizerState",
    "mlpext.tabular._columns.Columns",
    "numpy.dtype",
    "sklearn.compose._column_transformer.make_column_selector",
)
FORMAT = 1
ABOUT = "mlpext.json"
# Bytes of a file when it is unpacked, beyond which it is not one that `save` wrote.
LARGEST = 1 << 34


def save(estimator: Any, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write a fitted estimator, or a pipeline with one, to a file: weights, preprocessing, names of features
    and classes. `about` is kept beside it, any JSON; `load_about` gives it back.

    The file is whole or not there. Needs skops (`pip install 'mlpext[train]'`).

    Raises:
        TypeError: it holds an object of a type that `load` would refuse.
        OSError: the file cannot be written.

    >>> from mlpext.sklearn import MLPRegressor
    >>> mlpext.save(MLPRegressor(max_iter=5, tol=9).fit([[0.0], [1.0]], [2.0, 3.0]), "model.mlpext")
    >>> mlpext.load("model.mlpext").predict([[0.5]]).shape
    (1,)
    """
    skops = _skops()
    content = skops.dumps(estimator)
    if foreign := _foreign(skops, content):
        raise TypeError(
            f"estimator: {', '.join(foreign)} cannot be saved; load takes scikit-learn's types and ours"
        )
    versions = {"mlpext": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("sklearn", "numpy", "skops"):
        versions[package] = __import__(package).__version__
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(ABOUT, json.dumps({"format": FORMAT, "versions": versions, "about": about or {}}))
    write_atomically(path, file.getvalue())


def load(path: str | os.PathLike[str]) -> Any:
    """The estimator of a file that `save` wrote. Nothing in the file is run.

    Raises:
        ValueError: the file is damaged, of a newer version, or holds types that are not trusted.
        FileNotFoundError: there is no such file.

    >>> from sklearn.preprocessing import StandardScaler
    >>> mlpext.save(StandardScaler().fit([[1.0], [3.0]]), "scaler.mlpext")
    >>> mlpext.load("scaler.mlpext").mean_
    array([2.])
    """
    content, _ = _read(path)
    skops = _skops()
    try:
        foreign = _foreign(skops, content)
    except Exception as error:  # whatever a scheme by hand makes of skops
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if foreign:
        raise ValueError(
            f"{path} holds {', '.join(foreign)}: types that are not trusted, so it is not opened"
        )
    try:
        return skops.loads(content, trusted=[*TRUSTED])
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def load_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save` was told about the estimator, and the "versions" of what wrote it. Raises as `load`."""
    _, record = _read(path)
    return {**record["about"], "versions": record["versions"]}


def _read(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    content = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise ValueError("it is too large when it is unpacked")
            record = json.loads(archive.read(ABOUT))
        if not (isinstance(record["about"], dict) and isinstance(record["versions"], dict)):
            raise ValueError(f"{ABOUT} is of another kind")
        version = int(record["format"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a model that mlpext.save wrote, or it is damaged: {error}"
        ) from error
    if version > FORMAT:
        raise ValueError(
            f"{path} was written by mlpext {record['versions'].get('mlpext')}, and needs it to be read"
        )
    return content, record


def _foreign(skops: Any, content: bytes) -> list[str]:
    """The types in a file that are not trusted."""
    return sorted(set(skops.get_untrusted_types(data=content)) - set(TRUSTED))


def _skops() -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise ImportError(f"models are saved by skops: pip install 'mlpext[train]' ({error})") from error
    return skops.io
