"""What the networks of `train` are trained on, and with which steps."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from torch import Tensor

from mlpext.cli._defaults import ADAM, LEARNING_RATES
from mlpext.cli._source import Source
from mlpext.training._losses import LossName

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

METRICS = {"classes": "accuracy", "labels": "accuracy", "numbers": "r2"}
LOSS: dict[str, LossName] = {
    "classes": "cross_entropy",
    "labels": "binary_cross_entropy",
    "numbers": "squared_error",
}


@dataclasses.dataclass
class Data:
    """What the networks are trained on and measured with: float32 inputs, and targets as `fit` takes them."""

    source: Source
    held_out: Source
    steps: Any  # the pipeline from a table to inputs
    mean: Any  # of targets that are numbers, and their deviation
    scale: Any
    training: tuple[Tensor, Tensor]
    testing: tuple[Tensor, Tensor]

    @property
    def kind(self) -> str:
        return self.source.kind


def learning_rate(mode: str, data: Data, options: argparse.Namespace) -> float:
    """That of the command line, or the mode's or the optimizer's own."""
    if options.lr is not None:
        return float(options.lr)
    if options.optimizer != "sgd":
        return ADAM
    lr = LEARNING_RATES[mode]
    if options.reduction == "sum":  # the same step as of the mean
        lr /= {"stochastic": 1, "mini-batch": options.batch_size, "batch": len(data.source)}[mode]
    return lr


def steps_of(mode: str, lr: float, loss: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `fit` that say what a step is."""
    steps: dict[str, Any] = {
        "mode": mode,
        "batch_size": options.batch_size,
        "loss": loss,
        "reduction": options.reduction,
        "l2": options.l2,
        "schedule": options.schedule,
        "class_weight": options.class_weight,
        "seed": seed,
    }
    if options.optimizer == "sgd":
        return {**steps, "lr": lr, "momentum": options.momentum, "weight_decay": options.weight_decay}
    kind, decay = OPTIMIZERS[options.optimizer], options.weight_decay
    return {**steps, "optimizer": lambda parameters: kind(parameters, lr=lr, weight_decay=decay)}
