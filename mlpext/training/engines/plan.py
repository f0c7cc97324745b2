"""How the steps of an epoch go, the same for every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from mlpext.training import _samples
from mlpext.training._losses import LossSum
from mlpext.training._metrics import Metrics
from mlpext.training._ranks import Ranks

# Told during an epoch: so many samples more are done, and this is the mean of E over them.
OnProgress: TypeAlias = Callable[[int, float], object]


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Which samples a step takes, what it minimises, what is measured on the way, and which ranks take part.

    A step minimises (sum of w E + l2 / 2 ||W||^2) / (sum of w) over its samples, whose weights w are 1 unless
    they are given; with `mean` False the numerator.

    Three sizes, in rows: a step of `step_size` makes one update; a `chunk` goes through the model at once; a
    `block` is gathered from the data at once. A step is one chunk, but in batch mode it is as many as there
    are; a block is one chunk or more.
    """

    mode: str
    step_size: int
    mean: bool
    loss_sum: LossSum
    metric: Metrics | None
    ranks: Ranks
    l2: float = 0.0
    clip_grad_norm: float = 0.0  # the longest that the gradient of a step may be; 0: as long as it is
    seed: int = 0  # of dropout's masks

    @property
    def chunk(self) -> int:
        """The rows that the model takes at once: those of a step, in batch mode a part of them."""
        return _samples.BLOCK if self.mode == "batch" else self.step_size

    @property
    def block(self) -> int:
        """The rows that are gathered at once: whole chunks, about BLOCK rows."""
        return max(_samples.BLOCK // self.chunk, 1) * self.chunk

    def sizes(self, rows: int, weights: Tensor | None = None) -> Tensor:
        """The samples of each chunk of so many rows, or the sum of their `weights`, (rows,), float64."""
        if weights is not None:
            return torch.stack([part.sum() for part in torch.split(weights.double().cpu(), self.chunk)])
        sizes = torch.full((-(-rows // self.chunk),), self.chunk, dtype=torch.float64, device="cpu")
        sizes[-1] = rows - self.chunk * (len(sizes) - 1)
        return sizes
