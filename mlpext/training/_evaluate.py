"""Loss and metric of a model on data, without training it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlpext.training._arguments import anywhere, samples_for
from mlpext.training._losses import FunctionSum, Loss, LossName, LossSum, loss_sum_of, widened
from mlpext.training._metrics import Metrics, MetricsArgument, metrics_for
from mlpext.training._modules import in_mode
from mlpext.training._samples import Samples
from mlpext.training._tables import Data, as_targets

# The loss of the last `fit` of each model, None for a function, and the labels of its classes.
TRAINED_WITH: weakref.WeakKeyDictionary[nn.Module, tuple[LossName | None, list[str] | None]] = (
    weakref.WeakKeyDictionary()
)


def evaluate(
    model: nn.Module,
    x: Data,
    target: Data,
    *,
    loss: Loss | None = None,
    metrics: MetricsArgument | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, float]:
    """The samples' mean E ("loss") and their "accuracy" (classes) or "r2" (numbers), in eval() mode.

        evaluate(model, x_test, labels)["accuracy"]

    `loss` and `classes`, the labels in the order of the outputs where the target holds text, are by default
    those that `fit` last trained the model with, else squared_error and the labels of the target. Takes x,
    target, loss and metrics as `fit` does, a block at a time, and raises the same errors; ValueError without
    a loss for a model that was trained with a function.
    """
    with anywhere(model):
        trained_with, labels = TRAINED_WITH.get(model, ("squared_error", None))
        classes = labels if classes is None else classes
        loss = trained_with if loss is None else loss
        if loss is None:
            raise ValueError("loss: the model was trained with a function; evaluate needs to be given it")
        loss_sum = loss_sum_of(loss)
        samples = samples_for(model, x, as_targets(target, "target", classes)[0], loss)
        return evaluate_samples(model, samples, loss_sum, metrics_for(samples, loss, metrics))


def evaluate_samples(
    model: nn.Module, samples: Samples, loss_sum: LossSum, metrics: Metrics | None
) -> dict[str, float]:
    """Mean E ("loss") and metrics of the samples under the model as it is, in eval() mode."""
    error, metric_sum = 0.0, torch.zeros((), dtype=torch.float64, device="cpu")
    averaged: list[tuple[Tensor, Tensor]] = []  # by a function, whose mean of all need not be that of blocks
    with torch.no_grad(), in_mode(model, training=False):
        for rows in samples.blocks():
            x, target = samples[rows]
            output = model(x)
            if metrics is not None:
                metric_sum = metric_sum + metrics.sum(output, target).cpu()
            value = (loss_sum.value if isinstance(loss_sum, FunctionSum) else loss_sum)(output, target)
            if isinstance(loss_sum, FunctionSum) and value.ndim == 0:
                averaged.append((output, target))
            else:
                error += widened(value).sum().item()
        if averaged:
            output, target = (torch.cat(parts) for parts in zip(*averaged, strict=True))
            error = loss_sum(output, target).item()
    result = {"loss": error / len(samples)}
    return result if metrics is None else result | metrics.values(metric_sum, len(samples))
