"""What training reports beside E: accuracy for classes, R2 for numbers, or what `fit(metrics=...)` names.

A metric is a sum over samples, `sum`, from which `value` makes the figure: so it adds up over blocks of rows,
and over ranks. An object of torchmetrics keeps its own sums.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from mlpext import _C
from mlpext.training._losses import Loss
from mlpext.training._samples import Samples


class Metric(Protocol):
    """A figure of merit that adds up over blocks of samples."""

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """What these samples add; their targets are those of `rows`, where they are given."""

    def value(self, metric_sum: Tensor, samples: int) -> float:
        """The metric of so many samples from what all of them add up to."""


# As a user gives them: names of METRICS, or objects with update, compute and reset; or these by own names.
MetricsArgument: TypeAlias = "Sequence[str | Any] | Mapping[str, str | Any]"


class Accuracy:
    """The share of samples whose largest output is that of their class (or of the largest entry of d)."""

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        return _C.count_correct(output, target, rows)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        return metric_sum.item() / samples


class LabelAccuracy(Accuracy):
    """The share of samples whose logits all are above 0 where d is above 1/2, and below where it is below."""

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        right = (output > 0) == (_rows(target, rows) > 0.5)
        return right.flatten(1).all(1).sum().double()


class R2:
    """1 - sum (d - o)^2 / sum (d - mean d)^2, averaged over the outputs (scikit-learn's r2_score).

    An output whose d is constant counts 1 where it is met exactly, else 0.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._spread: list[float] | None = None  # sum (d - mean d)^2 of each output, once it is asked for

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        return _C.squared_errors(output, target, rows)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        if self._spread is None:
            self._spread = _C.spread(map(self._samples.targets, self._samples.blocks()))
        return _C.r2(metric_sum, self._spread)


class MeanError:
    """The mean over samples and outputs of a power of |d - o|: 1 the absolute error, 2 the squared one."""

    def __init__(self, power: int) -> None:
        self._power = power

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        error = (output - _rows(target, rows)).abs().double()
        return error.pow(self._power).flatten(1).mean(1).sum()

    def value(self, metric_sum: Tensor, samples: int) -> float:
        return metric_sum.item() / samples


class OfConfusion:
    """A figure from the confusion matrix (C, C): how many samples of each class are taken for each class."""

    def __init__(self, classes: int, figure: Callable[[Tensor], Tensor]) -> None:
        self._classes, self._figure = classes, figure

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        true, C = _classes(_rows(target, rows)), self._classes
        taken = (output > 0).long().flatten() if output.shape[1] == 1 else output.argmax(1)
        return torch.bincount(true * C + taken, minlength=C * C).double()

    def value(self, metric_sum: Tensor, samples: int) -> float:
        return self._figure(metric_sum.view(self._classes, self._classes)).item()


def f1(confusion: Tensor) -> Tensor:
    """The mean over the classes of 2 TP / (2 TP + FP + FN), 0 for a class that nobody names."""
    named = confusion.sum(0) + confusion.sum(1)
    return (2 * confusion.diagonal() / named.clamp(min=1)).mean()


def balanced_accuracy(confusion: Tensor) -> Tensor:
    """The mean over the classes that there are of the share of their samples that is right."""
    count = confusion.sum(1)
    return (confusion.diagonal() / count)[count > 0].mean()


class Updated:
    """An object with `update(outputs, targets)`, `compute` and `reset`, as torchmetrics has them."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        metric.reset()

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        target = _rows(target, rows)
        if output.ndim == 2 and output.shape[1] == 1:
            output, target = output[:, 0], target.reshape(len(output))
        self._metric.update(output, target)
        return output.new_zeros(0, dtype=torch.float64)

    def value(self, metric_sum: Tensor, samples: int) -> float:
        value = float(self._metric.compute())
        self._metric.reset()
        return value


class Metrics:
    """Several metrics as one: their sums in a row."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics
        self._sizes: list[int] = []

    def sum(self, output: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """What these samples add to every metric, as `Metric.sum` has it."""
        sums = [metric.sum(output, target, rows) for metric in self._metrics.values()]
        if len(sums) == 1:
            return sums[0]
        self._sizes = [each.numel() for each in sums]
        return torch.cat([each.reshape(-1).double() for each in sums])

    def values(self, metric_sum: Tensor, samples: int) -> dict[str, float]:
        """The figures of so many samples, by name."""
        sums = (metric_sum,) if len(self._metrics) == 1 else torch.split(metric_sum, self._sizes)
        return {
            name: metric.value(own, samples)
            for (name, metric), own in zip(self._metrics.items(), sums, strict=True)
        }


def _confusion(figure: Callable[[Tensor], Tensor]) -> Callable[[Samples, Loss], Metric]:
    def make(samples: Samples, loss: Loss) -> Metric:
        outputs = samples.output_shape
        if len(outputs) != 1 or (loss == "binary_cross_entropy" and outputs != [1]):
            raise ValueError(f"metrics: {figure.__name__} takes one class a sample")
        return OfConfusion(max(outputs[0], 2), figure)

    return make


def _accuracy(samples: Samples, loss: Loss) -> Metric:
    return LabelAccuracy() if loss == "binary_cross_entropy" else Accuracy()


METRICS: dict[str, Callable[[Samples, Loss], Metric]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _confusion(balanced_accuracy),
    "f1": _confusion(f1),
    "r2": lambda samples, loss: R2(samples),
    "mae": lambda samples, loss: MeanError(1),
    "mse": lambda samples, loss: MeanError(2),
}


def metrics_for(samples: Samples, loss: Loss, metrics: MetricsArgument | None = None) -> Metrics | None:
    """Those that were asked for; by default accuracy for classes, R2 for numbers of the outputs' shape, None
    for anything else.

    ValueError for an unknown name, a name given twice, or a metric that does not go with the targets;
    TypeError for an object without update, compute and reset.
    """
    if metrics is None:
        name = _usual_metric(samples, loss)
        return None if name is None else Metrics({name: METRICS[name](samples, loss)})
    if not isinstance(metrics, Mapping):
        names = [metric if isinstance(metric, str) else type(metric).__name__ for metric in metrics]
        if len({*names}) < len(names):
            raise ValueError(f"metrics: {names} has a name twice; a mapping gives names of your own")
        metrics = dict(zip(names, metrics, strict=True))
    made = {name: _make(metric, samples, loss) for name, metric in metrics.items()}
    return Metrics(made) if made else None


def _usual_metric(samples: Samples, loss: Loss) -> str | None:
    if loss == "binary_cross_entropy":
        return "accuracy"
    if samples.has_classes or loss == "cross_entropy":
        return "accuracy" if len(samples.output_shape) == 1 and samples.output_shape[0] > 1 else None
    return "r2" if samples.shapes[1][1:] == samples.output_shape else None


def _make(metric: Any, samples: Samples, loss: Loss) -> Metric:
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, or objects, got {metric!r}")
        of_numbers = metric in ("r2", "mae", "mse")
        if of_numbers and samples.shapes[1][1:] != samples.output_shape:
            raise ValueError(f"metrics: {metric} needs numbers of the outputs' shape as the target")
        return METRICS[metric](samples, loss)
    if not all(callable(getattr(metric, name, None)) for name in ("update", "compute", "reset")):
        raise TypeError(
            f"metrics must be names, or objects with update, compute and reset, got {type(metric).__name__}"
        )
    return Updated(copy.deepcopy(metric))


def _rows(target: Tensor, rows: Tensor | None) -> Tensor:
    return target if rows is None else target[rows]


def _classes(target: Tensor) -> Tensor:
    """Class numbers (n,): of one-hot d the place of the 1, of one output of 0 and 1 that."""
    if target.ndim == 1:
        return target.long()
    return (target[:, 0] > 0.5).long() if target.shape[1] == 1 else target.argmax(1)
