"""The curves of activations and of their derivatives."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from mlpext import _C
from mlpext import functional as F
from mlpext._names import Activation
from mlpext.plots._figures import COLOURS, clean, finish, grid

# Defaults that a picture would not show: a slope of 0.01 looks like 0, thirty waves like a bar, a threshold
# of 0 like relu. 0.1 is the lecture's.
READABLE = {"leaky_relu": {"negative_slope": 0.1}, "sine": {"omega": 1.0}, "threshold": {"threshold": 1.0}}

# Of the maxout that is drawn: three affine pieces, slope and offset of each.
SLOPES, OFFSETS = (-0.8, 0.2, 1.0), (-1.5, 0.5, -0.5)


def plot_activations(
    path: str | os.PathLike[str] | None = None, *, names: Sequence[str] | None = None
) -> Figure:
    """Draw f(x) and f'(x) of activations, and of a maxout of three affine pieces, for x from -4 to 4.

    Parameters have their defaults, but leaky_relu's slope is the lecture's 0.1, and sine's omega and
    threshold's threshold are 1, so that they can be seen; the titles say which. Writes the picture to `path`
    if given. docs/lecture.md, row 3.

    Args:
        path: where the picture goes.
        names: of `mlpext.activations()`, or "maxout"; all of them by default.

    Raises:
        ValueError: there is no activation of that name, or none is asked for.

    >>> from mlpext.plots import plot_activations
    >>> figure = plot_activations("activations.png", names=["sigmoid", "tanh", "maxout"])
    """
    known: dict[str, dict[str, float]] = {**_C.activations(), "maxout": {"pieces": len(SLOPES)}}
    names = list(known if names is None else names)
    if not names or not {*names} <= {*known}:
        raise ValueError(f"names: {names}, expected some of {', '.join(known)}")
    columns = 5 if len(names) > 9 else 3
    figure, axes = grid(len(names), columns, 2.4, 2.0, sharex=True)
    for axis, name in zip(axes, names, strict=True):
        parameters = {**known[name], **READABLE.get(name, {})}
        if name == "maxout":
            _draw_maxout(axis)
        else:
            _draw_curve(axis, _elementwise(name, parameters))
        axis.set_title(name, loc="left", fontsize=9)
        shown = ", ".join(f"{parameter}={value:g}" for parameter, value in parameters.items())
        axis.set_title(shown, loc="right", fontsize=7, color="0.4")
    for axis in figure.axes[-min(columns, len(names)) :]:
        axis.set_xlabel("x", fontsize=9)
        axis.tick_params(labelbottom=True)
    figure.legend(
        handles=figure.axes[0].get_lines()[:2], loc="outside upper center", ncols=2, frameon=False, fontsize=9
    )
    return finish(figure, path)


def _elementwise(name: str, parameters: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
    """The activation alone: a layer whose weight is 1, because layers know every activation by its name."""
    activation = cast(Activation, name)
    return lambda x: F.linear_activation(x, torch.ones(1, 1).to(x), None, activation, **parameters)


def _draw_maxout(axis: Axes) -> None:
    slopes, offsets = torch.tensor(SLOPES).double(), torch.tensor(OFFSETS).double()
    _draw_curve(axis, lambda x: F.linear_maxout(x, slopes.reshape(-1, 1, 1), offsets.reshape(-1, 1)))
    for slope, offset in zip(SLOPES, OFFSETS, strict=True):
        axis.axline((0, offset), slope=slope, color="0.6", linewidth=0.8, linestyle=":", zorder=1)
    axis.set_ylim(-1.2, 4)


def _draw_curve(axis: Axes, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64, requires_grad=True)
    y = function(x[:, None])[:, 0]
    (slope,) = torch.autograd.grad(y.sum(), x)
    axis.plot(x.detach(), _with_gaps(y.detach()), color=COLOURS[0], linewidth=2.2, label="f(x)")
    # Dashed and above: where both are 0, as relu's left of 0, both are seen.
    axis.plot(x.detach(), _with_gaps(slope), "--", color=COLOURS[1], linewidth=1.3, label="f'(x)")
    axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    axis.set_xlim(-4, 4)
    clean(axis, "", "")


def _with_gaps(values: Tensor) -> Tensor:
    """The values with NaN where they jump, so that a jump is a gap in the curve and not an upright line."""
    change = values.diff().abs()
    around = torch.nn.functional.pad(change, (1, 1))
    jump = change > 10 * (around[:-2] + around[2:]) + 1e-3
    return values.masked_fill(torch.nn.functional.pad(jump, (1, 0)), math.nan)
