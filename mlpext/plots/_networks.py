"""A multilayer perceptron as a diagram."""

from __future__ import annotations

import itertools
import os
from typing import TypeAlias

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from mlpext.nn import GatedLinear, LinearActivation, Maxout
from mlpext.plots._figures import COLOURS, Picture, finish

Layer: TypeAlias = LinearActivation | Maxout | GatedLinear | torch.nn.Linear

# Neurons of a layer that are drawn one by one; of more, the first and last ones with three dots between.
MOST = 10


def plot_network(model: torch.nn.Module, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw an MLP: its layers of neurons from left to right, with sizes, activations and weights' shapes.

    Shapes are those of torch, out x in. Of a wide layer only the first and last neurons are drawn. Writes the
    picture to `path` if given. docs/lecture.md, row 4.

    Args:
        model: an `mlpext.nn.MLP`, or LinearActivation, Maxout, GatedLinear and torch.nn.Linear layers, alone
            or in a torch.nn.Sequential.
        path: where the picture goes.

    Raises:
        TypeError: the model has another layer, or none.

    >>> from mlpext.plots import plot_network
    >>> figure = plot_network(mlpext.nn.MLP([4, 8, 3], "tanh"), "network.png")
    """
    layers = _layers(model)
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    rows = min(max(sizes), MOST)
    figure = Picture(1.7 * len(sizes), 0.4 * rows + 1.4)
    axis = figure.subplots()
    columns = [_heights(size) for size in sizes]
    for place, (left, right) in enumerate(itertools.pairwise(columns)):
        ends = [[(place, y), (place + 1, to)] for y in left for to in right]
        axis.add_collection(LineCollection(ends, colors="0.75", linewidths=0.6, zorder=1))
    for place, (heights, size) in enumerate(zip(columns, sizes, strict=True)):
        colour = "white" if place == 0 else COLOURS[0] if place < len(layers) else COLOURS[1]
        axis.scatter([place] * len(heights), heights, s=130, c=colour, edgecolors="black", zorder=2)
        if size > len(heights):
            axis.text(place, 0, "⋮", ha="center", va="center", fontsize=16)
        _label(axis, place, (rows - 1) / 2, size, layers)
    axis.set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-rows / 2, rows / 2))
    axis.set_axis_off()
    return finish(figure, path)


def _layers(model: torch.nn.Module) -> list[Layer]:
    layers = []
    for layer in model if isinstance(model, torch.nn.Sequential) else [model]:
        if not isinstance(layer, Layer):
            raise TypeError(
                f"model: {type(layer).__name__}, expected LinearActivation, Maxout, GatedLinear or "
                "torch.nn.Linear layers, alone or in a row, as in an MLP"
            )
        layers.append(layer)
    if not layers:
        raise TypeError("model: an empty Sequential, expected at least one layer")
    return layers


def _heights(size: int) -> list[float]:
    """Where the neurons of a layer stand, from top to bottom, about 0."""
    drawn = min(size, MOST)
    heights = [(drawn - 1) / 2 - k for k in range(drawn)]
    return heights if size <= MOST else [height for height in heights if abs(height) >= 1]


def _label(axis: Axes, place: int, top: float, size: int, layers: list[Layer]) -> None:
    """What a column is, above it; how many neurons it has and what leads there, below."""
    if place == 0:
        above, below = "x", f"n0 = {size}\ninputs"
    else:
        layer = layers[place - 1]
        name = "maxout" if isinstance(layer, Maxout) else getattr(layer, "activation", "identity")
        name += " gate" if isinstance(layer, GatedLinear) else ""
        params = {"pieces": layer.pieces} if isinstance(layer, Maxout) else getattr(layer, "params", {})
        above = "\n".join([f"o{place}", name, *(f"{param} {value:g}" for param, value in params.items())])
        below = f"n{place} = {size}"
        for symbol, array in (("W", layer.weight), ("b", layer.bias)):
            if array is not None:
                below += f"\n{symbol}{place}: {' × '.join(map(str, array.shape))}"
    axis.text(place, top + 0.6, above, ha="center", va="bottom", fontsize=9)
    axis.text(place, -top - 0.6, below, ha="center", va="top", fontsize=9)
