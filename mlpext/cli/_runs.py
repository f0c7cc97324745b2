"""`predict` and `evaluate`: what a trained model makes of new rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn.metrics

from mlpext import _artefact
from mlpext._files import write_atomically
from mlpext.cli._source import Source, like, of_frame
from mlpext.tabular import read_table


def _model(run: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a run's folder, or of a file."""
    path = Path(run)
    path = path / "model.mlpext" if path.is_dir() else path
    return _artefact.load(path), _artefact.load_about(path)


def predict(options: argparse.Namespace) -> None:
    """Write a prediction for each row of a table: the class and the probabilities of all, or numbers in the
    target's unit."""
    pipeline, about = _model(options.model)
    frame = read_table(options.data, separator=options.separator)
    try:
        table = _predictions(pipeline, about, frame)
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    text = table.to_csv(index=False)
    if options.out is None:
        print(text, end="")
    else:
        write_atomically(options.out, text)
        print(f"{options.out}: {len(table)} predictions")


def _predictions(pipeline: Any, about: dict[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    predicted, names, targets = pipeline.predict(frame), about["names"], about["target"]
    if about["kind"] == "classes":
        columns = {targets[0]: predicted}
    else:
        values = predicted.reshape(len(frame), -1)
        columns = {name: values[:, k] for k, name in enumerate(names)}
    if hasattr(pipeline, "predict_proba"):
        probabilities = pipeline.predict_proba(frame)
        columns |= {f"P({name})": probabilities[:, k].round(6) for k, name in enumerate(names)}
    return pd.DataFrame(columns)


def evaluate(options: argparse.Namespace) -> None:
    """Print how well a model predicts a table whose answers are known, and draw it."""
    pipeline, about = _model(options.model)
    if about["plain"]:
        raise ValueError(f"{options.model}: of a built-in data set or an NPZ, which train has measured")
    name = Path(options.data).name
    frame = read_table(options.data, separator=options.separator, as_text=about["target"])
    # A file of one class only is fine here: what its target means is known.
    task = "auto" if about["kind"] == "labels" else about["kind"]
    source = of_frame(frame, name, about["target"], task, one=True)
    source = like(source, about["names"], about["kind"])
    try:
        predicted = pipeline.predict(source.frame)
        probabilities = pipeline.predict_proba(source.frame) if hasattr(pipeline, "predict_proba") else None
    except ValueError as error:
        raise ValueError(f"{options.data}: {error}") from error
    run = Path(options.model)
    folder = run if run.is_dir() else run.parent
    picture = folder / "evaluation.png" if options.out is None else Path(options.out)
    measures = _measures(source, predicted, probabilities, about)
    print(f"{name}: {len(source)} samples")
    width = max(28, *(len(measure) + 2 for measure in measures))
    for measure, value in measures.items():
        print(f"{measure:<{width}}{value}")
    _draw(source, predicted, about, picture)
    print(picture)


def _measures(source: Source, predicted: Any, probabilities: Any, about: dict[str, Any]) -> dict[str, str]:
    metrics = sklearn.metrics
    if about["kind"] == "numbers":
        true, given = source.y, predicted.reshape(source.y.shape)
        measures = {}
        for k, name in enumerate(about["names"]):
            of = f" of {name}" if len(about["names"]) > 1 else ""
            measures[f"R2{of}"] = f"{metrics.r2_score(true[:, k], given[:, k]):.4f}"
            measures[f"MAE{of}"] = f"{metrics.mean_absolute_error(true[:, k], given[:, k]):.6g}"
            measures[f"MAE of the median{of}"] = f"{np.abs(true[:, k] - np.median(true[:, k])).mean():.6g}"
        return measures
    if about["kind"] == "labels":
        f1 = metrics.f1_score(source.y, predicted, average="macro", zero_division=0)
        return {
            "all labels right": f"{(predicted == source.y).all(1).mean():.1%}",
            "each label right": f"{(predicted == source.y).mean():.1%}",
            "F1, mean of the labels": f"{f1:.4f}",
        }
    names = about["names"]
    true = np.asarray(names)[source.y]
    share = np.bincount(source.y, minlength=len(names)).max() / len(true)
    measures = {"accuracy": f"{(true == predicted).mean():.1%}", "share of the largest class": f"{share:.1%}"}
    f1 = metrics.f1_score(true, predicted, labels=names, average="macro", zero_division=0)
    measures["F1, mean of the classes"] = f"{f1:.4f}"
    if probabilities is not None and len(np.unique(source.y)) == len(names):
        scores = probabilities[:, 1] if len(names) == 2 else probabilities
        auc = metrics.roc_auc_score(source.y, scores, multi_class="ovr")
        measures["ROC AUC"] = f"{auc:.4f}"
    return measures


def _draw(source: Source, predicted: Any, about: dict[str, Any], path: Path) -> None:
    from mlpext import plots

    names = about["names"]
    if about["kind"] == "classes":
        confusion = sklearn.metrics.confusion_matrix(np.asarray(names)[source.y], predicted, labels=names)
        plots.plot_confusion_matrix(confusion, names, path)
    elif about["kind"] == "labels":
        plots.plot_labels(source.y, predicted, names, path)
    else:
        plots.plot_predictions(source.y, predicted.reshape(source.y.shape), names, path)
