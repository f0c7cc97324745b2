"""Early stopping: when to stop, and the weights of the best epoch, which the model gets in the end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mlpext.training._modules import copy_all
from mlpext.training.history import Epoch


class EarlyStopping:
    """The best epoch by validation loss, its weights, and whether `patience` epochs have gone by since.

    With patience None it never stops and keeps nothing. Where a callback gave the model weights of other
    shapes, the search begins anew.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_epoch = 0
        self.best_loss: float | None = None
        self.weights: list[Tensor] = []

    def see(self, epoch: Epoch, weights: list[Tensor]) -> None:
        """Keep copies of `weights` if `epoch` is the best so far."""
        loss = epoch.metrics["val_loss"]
        other_shapes = [weight.shape for weight in weights] != [weight.shape for weight in self.weights]
        if self.best_loss is None or loss < self.best_loss or other_shapes:
            self.best_epoch, self.best_loss = epoch.epoch, loss
            self.weights = [weight.clone() for weight in weights]

    def due(self, epoch: int) -> bool:
        """Whether to stop after so many epochs."""
        return self.patience is not None and epoch - self.best_epoch >= self.patience

    def restore_best(self, weights: list[Tensor]) -> None:
        """The best epoch's values in `weights`."""
        copy_all(self.weights, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best_epoch": self.best_epoch, "best_loss": self.best_loss, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_epoch, self.best_loss = state["best_epoch"], state["best_loss"]
        self.weights = state["weights"]
