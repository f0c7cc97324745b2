"""What training reports beside E: accuracy for classes, R2 for numbers.

A metric is a sum over samples, `sum`, from which `value` makes the figure: so it adds up over blocks of rows,
and over ranks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mlpext import _C
from mlpext.training._losses import Loss
from mlpext.training._samples import Samples


class Metric(Protocol):
    """A figure of merit that adds up over blocks of samples."""

    name: str

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """What these samples add; their targets are those of `rows`, where they are given."""

    def value(self, metric_sum: Tensor, samples: int) -> float:
        """The metric of so many samples from what all of them add up to."""


class Accuracy:
    """The share of samples whose largest output is that of their class (or of the largest entry of d)."""

    name = "accuracy"

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        return _C.count_correct(output, target, rows)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        return metric_sum.item() / samples


class R2:
    """1 - sum (d - o)^2 / sum (d - mean d)^2, averaged over the outputs (scikit-learn's r2_score).

    An output whose d is constant counts 1 where it is met exactly, else 0.
    """

    name = "r2"

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._spread: list[float] | None = None  # sum (d - mean d)^2 of each output, once it is asked for

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        return _C.squared_errors(output, target, rows)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        if self._spread is None:
            self._spread = _C.spread(map(self._samples.targets, self._samples.blocks()))
        return _C.r2(metric_sum, self._spread)


def metric_for(samples: Samples, loss: Loss) -> Metric | None:
    """Accuracy for classes, R2 for numbers of the outputs' shape, None for anything else."""
    if samples.has_classes or loss == "cross_entropy":
        return Accuracy() if len(samples.output_shape) == 1 and samples.output_shape[0] > 1 else None
    return R2(samples) if samples.shapes[1][1:] == samples.output_shape else None
