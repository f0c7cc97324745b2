"""Loss and metric of training runs, and of sweeps over learning rates."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from mlpext.plots._figures import COLOUR_OF, COLOURS, clean, distinct, finish, grid, markers

METRICS = {"accuracy": "accuracy", "r2": "R²"}


class Run(Protocol):
    """What a picture needs of a `mlpext.training.History`, which draws itself by this module."""

    @property
    def columns(self) -> list[str]:
        """The names that `run[name]` accepts."""

    @property
    def step_losses(self) -> Tensor:
        """The mean E of each step, (updates,)."""

    def __getitem__(self, name: str) -> list[float]: ...

    def __len__(self) -> int:
        """The number of epochs."""


def plot_histories(
    histories: Mapping[str, Run], path: str | os.PathLike[str] | None = None, title: str = ""
) -> Figure:
    """Draw loss and metric of runs, one colour a run: training data solid, validation data dashed.

    One run is drawn over its epochs, with the losses of its steps behind; several are compared over epochs
    and over seconds of training, on logarithmic axes. Writes the picture to `path` if given.

    Raises:
        ValueError: no history has an epoch.

    >>> from mlpext.plots import plot_histories
    >>> net, labels = mlpext.nn.MLP([5, 4, 3]), torch.tensor([0, 2])
    >>> slow = mlpext.training.fit(net, x, labels, lr=0.1, progress=False)
    >>> fast = mlpext.training.fit(net, x, labels, lr=0.2, progress=False)
    >>> figure = plot_histories({"eta 0.1": slow, "eta 0.2": fast}, "compare.png")
    """
    histories = {label: history for label, history in histories.items() if len(history)}
    if not histories:
        raise ValueError("there is no epoch to plot")
    several = len(histories) > 1
    panels = [("loss", "epoch"), ("loss", "seconds")] if several else [("loss", "epoch")]
    for metric in METRICS:
        if any(metric in history.columns for history in histories.values()):
            panels.append((metric, "seconds" if several else "epoch"))

    colours = _colours([*histories])
    figure, axes = grid(len(panels), 2 if len(panels) == 4 else 3, 3.8, 3.4)
    figure.suptitle(title, fontsize=11)
    for axis, (quantity, against) in zip(axes, panels, strict=True):
        for colour, history in zip(colours, histories.values(), strict=True):
            _draw_run(axis, history, quantity, against, colour, steps=not several)
        if several:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
        if quantity == "loss" and any(max(history["loss"]) > 0 for history in histories.values()):
            # A loss of 0 is left out, where it would flatten the others on a linear axis.
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            # Single steps may reach far below the means over epochs, which are what one looks at.
            low = max(low, min(_losses_above_0(histories)) / 10)
            axis.set_ylim(low, high)
            subs = range(1, 10) if high <= 5 * low else (1, 2, 5) if high <= 1000 * low else (1,)
            axis.yaxis.set_major_locator(LogLocator(subs=subs))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        across = "epoch" if against == "epoch" else "seconds of training"
        clean(axis, across, "E, mean over the samples" if quantity == "loss" else METRICS[quantity])
    handles = [
        Line2D([], [], color=colour, label=label) for colour, label in zip(colours, histories, strict=True)
    ]
    if any("val_loss" in history.columns for history in histories.values()):
        handles.append(Line2D([], [], color="0.4", label="training (each sample as its step met it)"))
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="validation"))
    _legend_below(figure, handles, columns=2 * len(panels))
    return finish(figure, path)


def plot_learning_rates(
    rows: Iterable[tuple[str, str, float, float]],
    metric: str = "accuracy",
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a metric against the learning rate: a panel for each network, a colour for each activation.

    Writes the picture to `path` if given. A metric that is not finite stands as a cross below the others.

    Args:
        rows: (network, activation, learning rate, metric) of each run. The first two are any names.
        metric: what the last of a row is.
        path: where the picture goes.

    Raises:
        ValueError: there are no rows, or a learning rate is not above 0.

    >>> from mlpext.plots import plot_learning_rates
    >>> rows = [("hidden 64", "relu", 0.1, 0.9), ("hidden 64", "relu", 0.3, 0.8)]
    >>> figure = plot_learning_rates(rows, "accuracy", "rates.png")
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows: there is none to plot")
    rates = sorted({rate for _, _, rate, _ in rows})
    if not rates[0] > 0:
        raise ValueError(f"rows: a learning rate of {rates[0]}, expected more than 0")
    # Shorter names first: 8 before 16.
    networks = sorted({row[0] for row in rows}, key=lambda name: (len(name), name))
    activations = sorted({row[1] for row in rows})
    figure, axes = grid(len(networks), 4, 3.0, 3.2, sharey=True, sharex=True)
    styles = list(zip(activations, distinct(len(activations)), markers(len(activations)), strict=True))
    for axis, network in zip(axes, networks, strict=True):
        for place, (activation, colour, marker) in enumerate(styles):
            points = sorted(row[2:] for row in rows if row[:2] == (network, activation))
            # Wide lines first: where two have the same values both are seen.
            width = 1.5 + 2.0 * (len(styles) - 1 - place) / max(len(styles) - 1, 1)
            finite = [point for point in points if math.isfinite(point[1])]
            x, y = zip(*finite, strict=True) if finite else ((), ())
            axis.plot(x, y, marker=marker, markersize=3.5 + width, color=colour, linewidth=width)
            lost = [rate for rate, value in points if not math.isfinite(value)]
            axis.plot(lost, [0.02] * len(lost), "x", color=colour, transform=axis.get_xaxis_transform())
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)) if len(rates) > 6 else FixedLocator(rates))
        axis.xaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
        axis.xaxis.set_minor_locator(NullLocator())
        first = axis is figure.axes[0]
        clean(axis, "learning rate", METRICS.get(metric, metric) if first else "", network)
    handles = [Line2D([], [], color=colour, marker=marker, label=name) for name, colour, marker in styles]
    if not all(math.isfinite(value) for *_, value in rows):
        handles.append(Line2D([], [], color="0.4", marker="x", linestyle="", label="not finite"))
    _legend_below(figure, handles, columns=2 * len(networks))
    return finish(figure, path)


def _losses_above_0(histories: Mapping[str, Run]) -> list[float]:
    """The means over epochs, of training and validation."""
    names = ("loss", "val_loss")
    columns = (run[name] for run in histories.values() for name in names if name in run.columns)
    return [loss for column in columns for loss in column if loss > 0]


def _legend_below(figure: Figure, handles: Sequence[Line2D], columns: int) -> None:
    """In so many columns, of which two have place below a panel."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(columns, 6), frameon=False, fontsize=9
    )


def _colours(labels: Sequence[str]) -> list[Any]:
    """One for each run: a mode's own, wherever it is drawn, else the next that is free."""
    if len(labels) > len(COLOURS):
        return distinct(len(labels))
    own = {label: COLOUR_OF.get(Path(label).name) for label in labels}
    taken = {colour for colour in own.values() if colour is not None}
    free = itertools.cycle([colour for colour in COLOURS if colour not in taken] or COLOURS)
    drawn: set[str] = set()
    chosen = []
    for label in labels:
        colour = own[label]
        if colour is None or colour in drawn:
            colour = next(free)
        drawn.add(colour)
        chosen.append(colour)
    return chosen


def _draw_run(axis: Axes, history: Run, quantity: str, against: str, colour: str, steps: bool) -> None:
    x = history["epoch"] if against == "epoch" else list(itertools.accumulate(history["seconds"]))
    if steps and quantity == "loss" and len(history.step_losses) > len(history):
        fraction = torch.arange(1, len(history.step_losses) + 1) / len(history.step_losses)
        axis.plot(fraction * len(history), history.step_losses, color=colour, linewidth=0.5, alpha=0.25)
    # A single epoch is a point, which a line would not show.
    marker = "o" if len(history) == 1 else ""
    for name, style in ((quantity, "-"), (f"val_{quantity}", "--")):
        if name in history.columns:
            axis.plot(x, history[name], style, color=colour, marker=marker, linewidth=1.5)
