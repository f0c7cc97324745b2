"""E as a landscape over two weights, with the paths of descents."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mlpext.plots._figures import COLOUR_OF, COLOURS, clean, finish, grid
from mlpext.training import evaluate

if TYPE_CHECKING:
    from mlpext.training._tables import Data

# Up to the middle: paths in any colour are seen on it.
GREYS = LinearSegmentedColormap.from_list("", ["white", "0.45"])

# Steps that are marked one by one on a path.
MARKED = 200

# Places along each axis at which E is computed.
POINTS = 41


def plot_contour(
    model: torch.nn.Module,
    x: Data,
    target: Data,
    paths: Mapping[str, Sequence[Tensor] | Tensor],
    path: str | os.PathLike[str] | None = None,
    *,
    weights: tuple[int, int] | None = None,
    loss: Any = "squared_error",
) -> Figure:
    """Draw the contour lines of E, the mean over the samples, in a plane of weights, and paths of descents.

    Each path has a panel: a circle where it begins, a star where it ends. Writes the picture to `path` if
    given. The model is left as it is. Li et al., 2018, arXiv:1712.09913 (the plane of the paths).

    Args:
        model: a module with P parameters.
        x: the samples, as `fit` takes them.
        target: what the model should give, as `fit` takes it.
        paths: the parameters after each step of a descent, (steps, P) or a list of (P,), as
            torch.nn.utils.parameters_to_vector gives them, by the descent's name.
        path: where the picture goes.
        weights: the places in 0 ... P-1 of the two parameters that the axes are; the others have the model's
            values. Without them the plane is that of the two directions along which the paths spread most.
        loss: as `fit` takes it.

    Raises:
        ValueError: no paths, or one of another shape; weights that are not two places.

    >>> from mlpext.plots import plot_contour
    >>> net, d = mlpext.nn.MLP([5, 1]), torch.randn(2, 1)
    >>> start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    >>> figure = plot_contour(net, x, d, {"a walk": [start, start + 0.1]}, "contour.png", weights=(0, 1))
    """
    origin = parameters_to_vector(model.parameters()).detach().double().cpu()
    walks = {name: _walk(name, walk, len(origin)) for name, walk in paths.items()}
    together = torch.cat([*walks.values()]) if walks else origin.new_empty(0, len(origin))
    if len(together) < 2 or len(origin) < 2:
        raise ValueError(
            f"paths: {len(together)} steps of {len(origin)} parameters, expected 2 or more of both"
        )
    if weights is None:
        origin = together.mean(0)
        directions = torch.linalg.svd(together - origin, full_matrices=False).Vh[:2]
        labels = ["first direction of the paths", "second direction"]
    else:
        if len({*weights} & {*range(len(origin))}) != 2 or len(weights) != 2:
            raise ValueError(f"weights: {weights}, expected two different places in 0 ... {len(origin) - 1}")
        directions = torch.eye(len(origin), dtype=torch.float64)[list(weights)]
        labels = [_names(model)[place] for place in weights]
        origin[list(weights)] = 0.0
    points = {name: (walk - origin) @ directions.T for name, walk in walks.items()}

    every = torch.cat([*points.values()])
    low, high = every.min(0).values, every.max(0).values
    # As far up as across: a step along the gradient then is at a right angle to the lines of equal E.
    reach = 0.75 * (float((high - low).max()) or 1.0)
    across, up = (
        torch.linspace(middle - reach, middle + reach, POINTS, dtype=torch.float64)
        for middle in ((low + high) / 2).tolist()
    )
    errors = _landscape(model, x, target, loss, origin, directions, across, up)

    figure, axes = grid(len(points), 3, 3.0, 3.2, sharex=True, sharey=True)
    figure.set_figwidth(figure.get_figwidth() + 1.3)  # for the bar
    lowest, highest = float(errors.min()), float(errors.max())
    logarithmic = lowest > 0 and highest > 10 * lowest
    levels = (np.geomspace if logarithmic else np.linspace)(lowest, highest, 15)
    colours = itertools.cycle(COLOURS)
    for axis, (name, walk) in zip(axes, points.items(), strict=True):
        image = axis.contourf(across, up, errors, levels, cmap=GREYS, norm="log" if logarithmic else None)
        colour = COLOUR_OF.get(name, next(colours))
        axis.plot(
            *walk.T, color=colour, linewidth=1.2, marker="." if len(walk) <= MARKED else "", markersize=4
        )
        for place, marker, size in ((walk[0], "o", 40), (walk[-1], "*", 130)):
            axis.scatter(
                place[0], place[1], s=size, marker=marker, color=colour, edgecolors="white", zorder=3
            )
        axis.set_aspect("equal")
        clean(axis, labels[0], labels[1], f"{name}, {len(walk) - 1} steps")
    bar = figure.colorbar(image, ax=figure.axes, shrink=0.8, format="{x:.3g}")
    bar.set_label("E, mean over the samples", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return finish(figure, path)


def _landscape(
    model: torch.nn.Module,
    x: Data,
    target: Data,
    loss: Any,
    origin: Tensor,
    directions: Tensor,
    across: Tensor,
    up: Tensor,
) -> Tensor:
    """E of a copy of the model at each place of the plane, (up, across)."""
    probe = copy.deepcopy(model)
    like = next(model.parameters())
    errors = torch.empty(len(up), len(across), dtype=torch.float64)
    for row, column in np.ndindex(*errors.shape):
        place = origin + torch.stack([across[column], up[row]]) @ directions
        vector_to_parameters(place.to(like), probe.parameters())
        errors[row, column] = evaluate(probe, x, target, loss=loss, metrics=[])["loss"]
    return errors


def _walk(name: str, walk: Sequence[Tensor] | Tensor, parameters: int) -> Tensor:
    """A path as float64 (steps, P)."""
    steps = torch.stack([*walk]).detach().double().cpu() if len(walk) else torch.empty(0)
    if steps.ndim != 2 or steps.shape[1] != parameters:
        raise ValueError(f"paths[{name!r}]: shape {(*steps.shape,)}, expected (steps, {parameters})")
    return steps


def _names(model: torch.nn.Module) -> list[str]:
    """A name for each place in the vector of all parameters, as "0.weight[2, 1]"."""
    return [
        f"{name}[{', '.join(map(str, place))}]"
        for name, parameter in model.named_parameters()
        for place in np.ndindex(*parameter.shape)
    ]
