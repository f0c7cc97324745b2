"""Where in the plane a model decides for which class."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from mlpext.plots._figures import clean, distinct, finish, grid, light, markers, short
from mlpext.training._modules import in_mode
from mlpext.training._tables import as_targets

Model: TypeAlias = Callable[[Tensor], Tensor]
Array: TypeAlias = "np.ndarray[Any, Any]"

# Values of x1 and of x2 at which the model is asked.
POINTS = 200

# More classes than these have no place in a legend.
LISTED = 20


def plot_decision_boundary(
    model: Model | Mapping[str, Model],
    x: Any,
    target: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    features: Sequence[str] = ("x1", "x2"),
    threshold: float = 0.5,
) -> Figure:
    """Draw which regions of the plane a model gives to each class, and the samples with their true classes.

    Of a model with one output the picture shows its value o, and the line on which o is the threshold. Writes
    the picture to `path` if given. Modules are asked in eval() mode.

    Args:
        model: a module, or a function of tensors, from (n, 2) to (n, classes) or (n, 1); or several of them
            with their titles, {"epoch 1": ..., "epoch 50": ...}, for a panel each.
        x: the samples, (n, 2).
        target: their classes, (n,): class numbers, 0 or 1 for one output, or labels, which stand for the
            outputs in sorted order, as in `fit`.
        path: where the picture goes.
        names: of the classes, in the order of the outputs.
        features: names of the two columns of x, with their units.
        threshold: the value of a single output above which it means class 1: 0 where the output is a logit.

    Raises:
        ValueError: shapes that do not go together, no model, or classes that the model does not have.

    >>> from mlpext.plots import plot_decision_boundary
    >>> net = mlpext.nn.MLP([2, 8, 3], "tanh")
    >>> figure = plot_decision_boundary(net, torch.randn(20, 2), torch.randint(3, (20,)), "boundary.png")
    """
    models = model if isinstance(model, Mapping) else {"": model}
    if not models:
        raise ValueError("model: an empty mapping, expected at least one model")
    samples = np.asarray(x, dtype=float)
    if samples.ndim != 2 or samples.shape[1] != 2 or len(samples) == 0:
        raise ValueError(f"x: shape {samples.shape}, expected (n, 2)")
    numbers, labels = as_targets(target)
    classes = np.asarray(numbers).astype(int)
    if classes.shape != (len(samples),):
        raise ValueError(
            f"target: shape {classes.shape}, expected {(len(samples),)}, a class for each sample"
        )

    low, high = samples.min(0), samples.max(0)
    margin = np.where(high > low, 0.15 * (high - low), 1.0)
    across, up = np.linspace(low - margin, high + margin, POINTS).T
    plane = np.stack(np.meshgrid(across, up), -1).reshape(-1, 2)
    outputs = [_outputs(each, plane) for each in models.values()]
    one = outputs[0].shape[1] == 1
    count = 2 if one else outputs[0].shape[1]
    names = [str(name) for name in (names or labels or range(count))]
    if len(names) != count or classes.min() < 0 or classes.max() >= count:
        raise ValueError(
            f"target: classes {classes.min()} to {classes.max()}, {len(names)} names; the model has {count}"
        )

    figure, axes = grid(len(models), 3, 3.0, 3.0, sharex=True, sharey=True)
    figure.set_figwidth(figure.get_figwidth() + 1.6)
    colours = distinct(count)
    reach = max(float(np.abs(output - threshold).max()) for output in outputs)
    shades = LinearSegmentedColormap.from_list("", [light(colours[0], 0.6), "white", light(colours[1], 0.6)])
    tints = np.array([light(colour, 0.3) for colour in colours])
    extent = across[0], across[-1], up[0], up[-1]
    for axis, title, output in zip(axes, models, outputs, strict=True):
        values = output.reshape(POINTS, POINTS, -1)
        if one:
            norm = CenteredNorm(threshold, reach)
            image = axis.imshow(
                values[..., 0], cmap=shades, norm=norm, extent=extent, origin="lower", aspect="auto"
            )
            borders = values - threshold
        else:
            axis.imshow(tints[values.argmax(-1)], extent=extent, origin="lower", aspect="auto")
            second, best = np.sort(values, -1)[..., -2:, None].transpose(2, 0, 1, 3)
            borders = values - np.where(values == best, second, best)  # how far each class leads
        for border in borders.transpose(2, 0, 1):
            if border.min() < 0 < border.max():
                axis.contour(across, up, border, [0.0], colors="black", linewidths=0.8)
        _draw_samples(axis, samples, classes, colours)
        clean(axis, features[0], features[1], title)
    if one:
        bar = figure.colorbar(image, ax=figure.axes, shrink=0.9)
        bar.set_label("output o", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    _list_classes(figure, names, colours)
    return finish(figure, path)


def _outputs(model: Model, plane: Array) -> Array:
    """What the model gives for points (n, 2): (n, outputs)."""
    points = torch.as_tensor(plane, dtype=torch.get_default_dtype())
    with torch.no_grad():
        if isinstance(model, torch.nn.Module):
            points = points.to(next(model.parameters(), points))
            with in_mode(model, training=False):
                output = model(points)
        else:
            output = model(points)
    if output.ndim != 2 or len(output) != len(plane):
        raise ValueError(f"model: outputs of shape {(*output.shape,)}, expected ({len(plane)}, classes)")
    values: Array = output.double().cpu().numpy()
    return values


def _draw_samples(axis: Axes, samples: Array, classes: Array, colours: Sequence[Any]) -> None:
    """Each class with its colour and shape; of many samples small ones, through which others are seen."""
    size = min(30.0, max(2.0, 6000 / len(samples)))
    edge = {"edgecolors": "white", "linewidths": 0.6} if size > 10 else {"linewidths": 0.0, "alpha": 0.5}
    for number, (colour, marker) in enumerate(zip(colours, markers(len(colours)), strict=True)):
        own = samples[classes == number]
        axis.scatter(own[:, 0], own[:, 1], s=size, color=[colour], marker=marker, zorder=3, **edge)


def _list_classes(figure: Figure, names: Sequence[str], colours: Sequence[Any]) -> None:
    handles = [
        Line2D([], [], linestyle="", color=colour, marker=marker, label=name)
        for name, colour, marker in zip(short(names), colours, markers(len(names)), strict=True)
    ]
    more = len(handles) - LISTED
    if more > 0:
        handles[LISTED:] = [Line2D([], [], linestyle="", label=f"and {more} others")]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
