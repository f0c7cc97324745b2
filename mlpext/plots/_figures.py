"""What all pictures have in common: colours, size, axes without a frame, and how a figure is written."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlpext._files import write_atomically
from mlpext._names import MODES

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("plots need matplotlib: pip install 'mlpext[train]'") from error

# Okabe and Ito's colours, which colour-blind readers tell apart too; shapes, for those who see none.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Of the modes of training, in every picture the same.
COLOUR_OF = dict(zip(MODES, COLOURS, strict=False))

# More characters of a name would leave no place for the picture.
LONGEST = 24


class Picture(Figure):
    """A figure that notebooks show also where nobody has imported pyplot.

    pyplot itself is not used: its global state keeps every figure alive, and it may look for a display.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        return written(self, "png", dpi=100)


def grid(
    panels: int, columns: int, width: float, height: float, **options: Any
) -> tuple[Picture, Iterator[Axes]]:
    """A figure of so many panels of this size in inches, in rows of at most `columns`, with its axes."""
    columns = min(panels, columns)
    rows = math.ceil(panels / columns)
    figure = Picture(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flat
    for axis in list(axes)[panels:]:
        axis.remove()
    return figure, iter(figure.axes)


def written(figure: Figure, form: str, dpi: int) -> bytes:
    """The figure in a format of matplotlib's; ValueError for another."""
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=dpi, bbox_inches="tight", pad_inches=0.1)
    return content.getvalue()


def finish(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, written to `path` if given, in the format that the name ends in and never by halves.

    Raises:
        ValueError: matplotlib does not write the format.
        OSError: the file cannot be written.
    """
    if path is not None:
        write_atomically(path, written(figure, Path(path).suffix[1:] or "png", dpi=150))
    return figure


def clean(axis: Axes, x: str, y: str, title: str = "") -> None:
    """Name the axes, and take away what is not needed."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, length=3)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    if title:
        axis.set_title(title, fontsize=9)


def distinct(count: int) -> list[Any]:
    """So many colours: those of COLOURS, or, where they are too few, of a map from dark to light."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [colormaps["viridis"](k / (count - 1)) for k in range(count)]


def markers(count: int) -> list[str]:
    """So many shapes of points, which repeat after seven."""
    return list(itertools.islice(itertools.cycle(MARKERS), count))


def short(names: Sequence[object]) -> list[str]:
    """The names, at most LONGEST characters each: of longer ones without what all of them begin and end with,
    and without their middle."""
    texts = [str(name) for name in names]
    if max(map(len, texts)) > LONGEST and len(texts) > 1:
        head = _common(texts)
        tail = _common([text[head:][::-1] for text in texts])
        texts = ["…" * (head > 0) + text[head : len(text) - tail] + "…" * (tail > 0) for text in texts]
    half = LONGEST // 2
    return [text if len(text) <= LONGEST else text[: half - 1] + "…" + text[-half:] for text in texts]


def _common(texts: Sequence[str]) -> int:
    """How many characters all of them begin with."""
    same = [len({*letters}) == 1 for letters in zip(*texts, strict=False)]
    return same.index(False) if False in same else len(same)


def light(colour: Any, strength: float) -> Any:
    """A colour mixed with white, of which 1 leaves nothing."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(colour))
