"""Pictures of activation functions with their derivatives, and of training runs; no display is needed."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mlpext import _C
from mlpext import functional as F
from mlpext._files import write_atomically
from mlpext._names import MODES, Activation

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'mlpext[train]'") from error

# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Of the modes of training, in every picture the same.
COLOUR_OF = dict(zip(MODES, COLOURS, strict=False))

METRICS = {"accuracy": "accuracy", "r2": "R²"}

# Defaults that a picture would not show: a slope of 0.01 looks like 0, thirty waves like a bar. 0.1 is the
# lecture's.
READABLE = {"leaky_relu": {"negative_slope": 0.1}, "sine": {"omega": 1.0}}


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


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the name ends in (.png, .svg, .pdf), never half written.

    Raises:
        ValueError: matplotlib does not write the format.
        OSError: the file cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or "png", dpi=150)
    write_atomically(path, content.getvalue())


def plot_activations(path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw f(x) and f'(x) of every activation, and of a maxout of three affine pieces, in one grid.

    Parameters have their defaults, or those of READABLE; the titles say which. Writes the picture to `path`
    if given.

    >>> from mlpext.plots import plot_activations
    >>> figure = plot_activations("activations.png")
    """
    names = _C.activations()
    columns = 5
    rows = math.ceil((len(names) + 1) / columns)
    figure = _figure(2.4 * columns, 1.9 * rows + 0.4)
    axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axis, (name, defaults) in zip(axes, names.items(), strict=False):
        parameters = {**defaults, **READABLE.get(name, {})}
        _draw_curve(axis, _elementwise(name, parameters))
        axis.set_title(name, loc="left", fontsize=9)
        shown = ", ".join(f"{parameter}={value:g}" for parameter, value in parameters.items())
        axis.set_title(shown, loc="right", fontsize=7, color="0.4")

    axis, *unused = axes[len(names) :]
    slopes, offsets = torch.tensor([-0.8, 0.2, 1.0]).double(), torch.tensor([-1.5, 0.5, -0.5]).double()
    _draw_curve(axis, lambda x: F.linear_maxout(x, slopes.reshape(3, 1, 1), offsets.reshape(3, 1)))
    axis.set_title("maxout", loc="left", fontsize=9)
    axis.set_title("pieces=3", loc="right", fontsize=7, color="0.4")
    for slope, offset in zip(slopes.tolist(), offsets.tolist(), strict=True):
        axis.axline((0, offset), slope=slope, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    axis.set_ylim(-1.2, 4)
    for axis in unused:
        axis.set_visible(False)
    figure.legend(handles=axes[0].get_lines()[-2:], loc="outside upper center", ncols=2, frameon=False)
    return _finish(figure, path)


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
    figure = _figure(3.8 * len(panels), 3.4)
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(1, len(panels), squeeze=False).flat)
    for axis, (quantity, against) in zip(axes, panels, strict=True):
        for colour, history in zip(colours, histories.values(), strict=True):
            _draw_run(axis, history, quantity, against, colour, steps=not several)
        if several:
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if quantity == "loss" and any(max(history["loss"]) > 0 for history in histories.values()):
            # A loss of 0 is left out, where it would flatten the others on a linear axis.
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_xlabel("epoch" if against == "epoch" else "seconds of training", fontsize=9)
        axis.set_ylabel("E, mean over the samples" if quantity == "loss" else METRICS[quantity], fontsize=9)
        _clean(axis)
    handles = [
        Line2D([], [], color=colour, label=label) for colour, label in zip(colours, histories, strict=True)
    ]
    if any("val_loss" in history.columns for history in histories.values()):
        handles.append(Line2D([], [], color="0.4", label="training (each sample as its step met it)"))
        handles.append(Line2D([], [], color="0.4", linestyle="--", label="validation"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _finish(figure, path)


def _colours(labels: Sequence[str]) -> list[str]:
    """One for each run: a mode's own, wherever it is drawn, else the next that is free."""
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


def plot_confusion(counts: Any, names: Sequence[str], path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw a confusion matrix, (classes, classes): how many samples of each class (down) were taken for each
    (across), shaded by their share of the class. Writes the picture to `path` if given.

    >>> from mlpext.plots import plot_confusion
    >>> figure = plot_confusion([[8, 2], [1, 9]], ["no", "yes"], "confusion.png")
    """
    counts = torch.tensor(counts)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = max(3.0, 0.5 * len(names) + 1.8)
    figure = _figure(side, side)
    axis = figure.subplots()
    axis.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    few = len(names) <= 20
    if few:
        for (row, column), count in zip(
            itertools.product(range(len(names)), repeat=2), counts.flatten(), strict=True
        ):
            colour = "white" if share[row, column] > 0.6 else "black"
            axis.text(column, row, str(int(count)), ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("is", fontsize=9)
    return _finish(figure, path)


def plot_predicted(
    true: Any, predicted: Any, names: Sequence[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw predicted numbers against the true ones, both (n, targets), one panel a target, with the line on
    which they agree. Writes the picture to `path` if given.

    >>> from mlpext.plots import plot_predicted
    >>> figure = plot_predicted([[1.0], [2.0]], [[1.1], [1.9]], ["price"], "predicted.png")
    """
    true, predicted = torch.tensor(true), torch.tensor(predicted)
    figure = _figure(3.6 * len(names), 3.6)
    axes = figure.subplots(1, len(names), squeeze=False).flat
    for k, (axis, name) in enumerate(zip(axes, names, strict=True)):
        axis.scatter(
            true[:, k].numpy(), predicted[:, k].numpy(), s=8, color=COLOURS[0], alpha=0.4, linewidths=0
        )
        low = float(min(true[:, k].min(), predicted[:, k].min()))
        axis.axline((low, low), slope=1, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(name, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel("is", fontsize=9)
        axis.set_ylabel("predicted", fontsize=9)
        _clean(axis)
    return _finish(figure, path)


def plot_search(
    rows: Sequence[tuple[str, str, float, float]], metric: str, path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw a metric of networks, rows of (hidden, activation, learning rate, metric): a panel for each width,
    a colour for each activation. Writes the picture to `path` if given.

    >>> from mlpext.plots import plot_search
    >>> figure = plot_search([("64", "relu", 0.1, 0.9), ("64", "relu", 0.3, 0.8)], "accuracy", "search.png")
    """
    widths, activations = (sorted({row[place] for row in rows}) for place in (0, 1))
    figure = _figure(3.0 * len(widths), 3.2)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False).flat
    for axis, width in zip(axes, widths, strict=True):
        for activation, colour in zip(activations, itertools.cycle(COLOURS), strict=False):
            points = sorted(row[2:] for row in rows if row[:2] == (width, activation))
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=activation)
        axis.set_xscale("log")
        axis.set_xlabel("learning rate", fontsize=9)
        axis.set_title(f"hidden {width}", fontsize=9)
        _clean(axis)
    first = figure.axes[0]
    first.set_ylabel(METRICS.get(metric, metric), fontsize=9)
    figure.legend(handles=first.get_lines(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _finish(figure, path)


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


def _elementwise(name: str, parameters: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
    """The activation alone: a layer whose weight is 1, because layers know every activation by its name."""
    activation = cast(Activation, name)
    return lambda x: F.linear_activation(x, torch.ones(1, 1).to(x), None, activation, **parameters)


def _draw_curve(axis: Axes, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64, requires_grad=True)
    y = function(x[:, None])[:, 0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.plot(x.detach(), _with_gaps(slope), color=COLOURS[1], linewidth=1.2, label="f'(x)")
    axis.plot(x.detach(), _with_gaps(y.detach()), color=COLOURS[0], linewidth=1.8, label="f(x)")
    axis.set_xlim(-4, 4)
    _clean(axis)


def _with_gaps(values: Tensor) -> Tensor:
    """The values with NaN where they jump, so that a jump is a gap in the curve and not an upright line."""
    change = values.diff().abs()
    around = torch.nn.functional.pad(change, (1, 1))
    jump = change > 10 * (around[:-2] + around[2:]) + 1e-3
    return values.masked_fill(torch.nn.functional.pad(jump, (1, 0)), math.nan)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: its global state leaks figures, and it may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, length=3)


def _finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    if path is not None:
        save(figure, path)
    return figure
