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
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    few = classes <= COUNTED
    side = min(max(2.4, 0.5 * classes), 10.0)
    figure = Picture(side + 2.4, side + 1.4)
    axis = figure.subplots()
    # Of many classes one looks for the rare confusions: the root of their share is darker.
    image = axis.imshow(share, cmap="Blues", norm=PowerNorm(1 if few else 0.5, 0, 1))
    if few:
        for row, column in itertools.product(range(classes), repeat=2):
            count = counts[row, column]
            colour = "0.7" if count == 0 else "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, f"{count:g}", ha="center", va="center", color=colour, fontsize=8)
    places = range(0, classes, math.ceil(classes / NAMED))
    shown = short(names)[:: places.step]
    axis.set_xticks(places, shown, rotation=0 if few and max(map(len, shown)) <= 5 else 90)
    axis.set_yticks(places, shown)
    clean(axis, "predicted class", "true class")
    bar = figure.colorbar(image, shrink=0.9)
    bar.set_label("share of the samples of the true class", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return finish(figure, path)


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
