"""How the steps of an epoch go, the same for every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mlpext.training import _samples
from mlpext.training._losses import LossSum
from mlpext.training._metrics import Metric
from mlpext.training._ranks import Ranks

# Told during an epoch: so many samples more are done, and this is the mean of E over them.
OnProgress: TypeAlias = Callable[[int, float], object]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Which samples a step takes, what it minimises, what is measured on the way, and which ranks take part.

    Three sizes, in rows: a step of `step_size` makes one update; a `chunk` goes through the model at once; a
    `block` is gathered from the data at once. A step is one chunk, but in batch mode it is as many as there
    are; a block is one chunk or more.
    """

    mode: str
    step_size: int
    mean: bool  # minimise the mean of E over the samples of a step, else the sum
    loss_sum: LossSum
    metric: Metric | None
    ranks: Ranks

    @property
    def chunk(self) -> int:
        """The rows that the model takes at once: those of a step, in batch mode a part of them."""
        return _samples.BLOCK if self.mode == "batch" else self.step_size

    @property
    def block(self) -> int:
        """The rows that are gathered at once: whole chunks, about BLOCK rows."""
        return max(_samples.BLOCK // self.chunk, 1) * self.chunk

    def sizes(self, rows: int) -> Tensor:
        """The samples of each chunk of so many rows, float64; the last may have fewer."""
        sizes = torch.full((-(-rows // self.chunk),), self.chunk, dtype=torch.float64, device="cpu")
        sizes[-1] = rows - self.chunk * (len(sizes) - 1)
        return sizes
