"""What training reports beside E: accuracy for classes, R2 for numbers.

A metric is a sum over samples, `sum`, from which `value` makes the figure: so it adds up over blocks of rows,
and over ranks.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mlpext.training._losses import Loss
from mlpext.training._samples import Samples


class Metric(Protocol):
    """A figure of merit that adds up over blocks of samples."""

    name: str

    def sum(self, output: Tensor, target: Tensor) -> Tensor:
        """What these samples add."""

    def value(self, metric_sum: Tensor, samples: int) -> float:
        """The metric of so many samples from what all of them add up to."""


class Accuracy:
    """The share of samples whose largest output is that of their class (or of the largest entry of d)."""

    name = "accuracy"

    def sum(self, output: Tensor, target: Tensor) -> Tensor:
        labels = target if target.ndim == 1 else target.argmax(1)
        return (output.argmax(1) == labels).sum()

    def value(self, metric_sum: Tensor, samples: int) -> float:
        return metric_sum.item() / samples


class R2:
    """1 - sum (d - o)^2 / sum (d - mean d)^2, averaged over the outputs (scikit-learn's r2_score).

    An output whose d is constant counts 1 where it is met exactly, else 0.
    """

    name = "r2"

    def __init__(self, samples: Samples) -> None:
        # Deviations from the first sample: sums of squares of the targets themselves would cancel.
        origin = _flat(samples.targets(torch.tensor([0], device="cpu")))
        total = squares = torch.zeros_like(origin[0])
        for rows in samples.blocks():
            deviation = _flat(samples.targets(rows)) - origin
            total = total + deviation.sum(0)
            squares = squares + deviation.square().sum(0)
        self._spread = (squares - total.square() / len(samples)).clamp_min(0).cpu()
        self._has_constant = bool((self._spread == 0).any())

    def sum(self, output: Tensor, target: Tensor) -> Tensor:
        return _flat(target - output).square().sum(0)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        explained = 1 - metric_sum / self._spread
        if self._has_constant:
            explained = torch.where(self._spread > 0, explained, torch.where(metric_sum == 0, 1.0, 0.0))
        return explained.mean().item()


def metric_for(samples: Samples, loss: Loss) -> Metric | None:
    """Accuracy for classes, R2 for numbers of the outputs' shape, None for anything else."""
    if samples.has_classes or loss == "cross_entropy":
        return Accuracy() if len(samples.output_shape) == 1 and samples.output_shape[0] > 1 else None
    return R2(samples) if samples.shapes[1][1:] == samples.output_shape else None


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).double()
