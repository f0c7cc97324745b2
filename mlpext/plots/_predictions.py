"""What a model says of samples whose answers are known: a confusion matrix, and numbers against numbers."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mlpext.plots._figures import COLOURS, Picture, clean, finish, grid, short

# Classes whose counts are written into their cells, and whose names all find place.
COUNTED, NAMED = 20, 50

# More points than these hide one another, and are counted in cells.
MOST_POINTS = 3000


def plot_confusion_matrix(
    counts: Any, names: Sequence[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw a confusion matrix: how many samples of each class (down) were taken for each class (across).

    A cell's colour is its share of the samples of its class. Counts are written for up to 20 classes; of more
    than 50 classes every second or third has its name. Writes the picture to `path` if given.

    Args:
        counts: numbers of samples, (classes, classes), as scikit-learn's confusion_matrix gives them.
        names: of the classes, in their order.
        path: where the picture goes.

    Raises:
        ValueError: counts of another shape, or a negative one.

    >>> from mlpext.plots import plot_confusion_matrix
    >>> figure = plot_confusion_matrix([[8, 2], [1, 9]], ["no", "yes"], "confusion.png")
    """
    counts, classes = np.asarray(counts), len(names)
    if counts.shape != (classes, classes) or classes == 0:
        raise ValueError(f"counts: shape {counts.shape}, expected (classes, classes) with {classes} names")
    if counts.min() < 0:
        raise ValueError(f"counts: {counts.min()}, expected 0 or more")
    figure = _matrix(counts, names, names, "share of the samples of the true class")
    clean(figure.axes[0], "predicted class", "true class")
    return finish(figure, path)


def plot_labels(
    true: Any, predicted: Any, names: Sequence[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw how often each of several labels was given rightly and wrongly, a row a label.

    Writes the picture to `path` if given.

    Args:
        true: 1 for each label that a sample has, else 0, (n, labels).
        predicted: the same as a model says it, (n, labels).
        names: of the labels, in their order.
        path: where the picture goes.

    Raises:
        ValueError: shapes that do not go together.

    >>> from mlpext.plots import plot_labels
    >>> figure = plot_labels([[1, 0], [1, 1]], [[1, 1], [0, 1]], ["hot", "wet"], "labels.png")
    """
    true, predicted = np.asarray(true).astype(bool), np.asarray(predicted).astype(bool)
    if true.shape != predicted.shape or true.ndim != 2 or true.shape[1] != len(names) or not true.size:
        raise ValueError(
            f"true {true.shape} and predicted {predicted.shape}: expected (n, {len(names)}), a column a name"
        )
    cases = (true & predicted, true & ~predicted, ~true & predicted, ~true & ~predicted)
    counts = np.stack([case.sum(0) for case in cases], 1)
    figure = _matrix(
        counts, names, ["found", "missed", "wrongly said", "rightly not said"], "share of the samples"
    )
    clean(figure.axes[0], "what was said of the samples", "label")
    return finish(figure, path)


def _matrix(counts: Any, rows: Sequence[str], columns: Sequence[str], share_of: str) -> Figure:
    """Counts in cells, whose colour is their share of the row."""
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    height, width = counts.shape
    few = max(height, width) <= COUNTED
    across, down = (min(max(2.4, 0.5 * size), 10.0) for size in (width, height))
    figure = Picture(across + 2.4, down + 1.4)
    axis = figure.subplots()
    # Of many classes one looks for the rare confusions: the root of their share is darker.
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(1 if few else 0.5, 0, 1))
    if few:
        for row, column in itertools.product(range(height), range(width)):
            count = counts[row, column]
            colour = "0.7" if count == 0 else "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, f"{count:g}", ha="center", va="center", color=colour, fontsize=8)
    for set_ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        places = range(0, len(names), math.ceil(len(names) / NAMED))
        set_ticks(places, short(names)[:: places.step])
    if not few or max(map(len, short(columns))) > 5:
        axis.tick_params(axis="x", rotation=90)
    bar = figure.colorbar(image, shrink=0.9)
    bar.set_label(share_of, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def plot_predictions(
    true: Any, predicted: Any, names: Sequence[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw predicted numbers against the true ones, a panel a target, with the line on which they agree.

    Both axes have the target's name and range. Of more than 3000 samples the picture shows how many fall into
    each cell. Writes the picture to `path` if given.

    Args:
        true: numbers, (n, targets), or (n,) of one target.
        predicted: of the same shape.
        names: of the targets, with their units: "price (EUR)".
        path: where the picture goes.

    Raises:
        ValueError: shapes that do not go together, no samples, or numbers that are not finite.

    >>> from mlpext.plots import plot_predictions
    >>> figure = plot_predictions([1.0, 2.0], [1.1, 1.9], ["price (EUR)"], "predictions.png")
    """
    true, predicted = _columns("true", true, names), _columns("predicted", predicted, names)
    if len(true) != len(predicted):
        raise ValueError(f"predicted: {len(predicted)} samples, expected {len(true)}, as true has")
    figure, axes = grid(len(names), 3, 3.8, 3.6)
    for name, axis, x, y in zip(short(names), axes, true.T, predicted.T, strict=True):
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        margin = 0.05 * (high - low) or 0.5
        limits = low - margin, high + margin
        axis.axline((0, 0), slope=1, color="0.4", linewidth=0.8, linestyle=":")
        if len(x) <= MOST_POINTS:
            few = len(x) <= 200
            axis.scatter(x, y, s=20 if few else 8, color=COLOURS[0], alpha=0.8 if few else 0.4, linewidths=0)
        else:
            cells = axis.hexbin(x, y, gridsize=60, extent=limits * 2, mincnt=1, bins="log", cmap="viridis_r")
            bar = figure.colorbar(cells, shrink=0.75)
            bar.set_label("samples in a cell", fontsize=9)
            bar.ax.tick_params(labelsize=8)
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        for along, most in ((axis.xaxis, 3), (axis.yaxis, 5)):  # long numbers find place side by side
            along.set_major_locator(MaxNLocator(most, steps=(1, 2, 2.5, 5, 10)))
            along.set_major_formatter(lambda value, _: f"{value:,.10g}")
        clean(axis, f"true {name}", f"predicted {name}")
    return finish(figure, path)


def _columns(argument: str, values: Any, names: Sequence[str]) -> np.ndarray[Any, Any]:
    """Numbers of (n, targets)."""
    columns = np.asarray(values, dtype=float)
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[1] != len(names) or columns.size == 0:
        raise ValueError(f"{argument}: shape {columns.shape}, expected (n, targets) with {len(names)} names")
    if not np.isfinite(columns).all():
        raise ValueError(f"{argument}: holds numbers that are not finite")
    return columns
