"""The learning rate over the epochs: torch's schedulers, by name, class, or a function of the optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch.optim import lr_scheduler

from mlpext.training.engines.optimizer import GradientDescent, Optimizer
from mlpext.training.history import Epoch

Scheduler: TypeAlias = "lr_scheduler.LRScheduler | lr_scheduler.ReduceLROnPlateau"
ScheduleArgument: TypeAlias = "str | Callable[[torch.optim.Optimizer], Scheduler]"

# What a name stands for, of the optimizer and the number of epochs.
BY_NAME: dict[str, Callable[[torch.optim.Optimizer, int], Scheduler]] = {
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1)),
    "linear": lambda optimizer, epochs: lr_scheduler.LinearLR(
        optimizer, 1.0, 1 / max(epochs, 1), max(epochs, 1)
    ),
    "plateau": lambda optimizer, epochs: lr_scheduler.ReduceLROnPlateau(optimizer),
}


class Schedule:
    """A scheduler of torch's that takes a step after each epoch.

        schedule = Schedule(lambda optimizer: StepLR(optimizer, 2, 0.1), optimizer, epochs=6)
        schedule.step(epoch)

    Raises ValueError for an unknown name, TypeError for what makes no scheduler.
    """

    def __init__(self, schedule: ScheduleArgument, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        if isinstance(schedule, str):
            if schedule not in BY_NAME:
                raise ValueError(
                    f"schedule must be one of {', '.join(BY_NAME)}, or make a scheduler of an optimizer, "
                    f"got {schedule!r}"
                )
            self._scheduler = BY_NAME[schedule](optimizer, epochs)
            return
        if not callable(schedule):
            raise TypeError(
                "schedule must be a name, a class of torch.optim.lr_scheduler or a function that makes a "
                f"scheduler of an optimizer, got {type(schedule).__name__}"
            )
        try:
            self._scheduler = schedule(optimizer)
        except TypeError as error:
            raise TypeError(
                f"schedule: {name_of(schedule)} cannot be made of the optimizer alone ({error}); give a "
                "function, as lambda optimizer: StepLR(optimizer, step_size=10)"
            ) from error
        if not isinstance(self._scheduler, (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)):
            raise TypeError(
                f"schedule must make a scheduler of torch.optim.lr_scheduler, it made a "
                f"{type(self._scheduler).__name__}"
            )

    def step(self, epoch: Epoch) -> None:
        """Set the learning rate for the epoch after this one. A ReduceLROnPlateau watches the validation
        loss, or the loss where there is none."""
        if isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(epoch.metrics.get("val_loss", epoch.loss))
        else:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(_as_in(self._scheduler.state_dict(), state))


def _as_in(own: Any, saved: Any) -> Any:
    """`saved`, whose keys became text and whose tuples became lists, with the types that `own` has."""
    if isinstance(own, Mapping):
        keys = {str(key): key for key in own}
        whole = all(isinstance(key, int) for key in own) and own
        read = {
            (int(key) if whole else keys.get(key, key)): _as_in(own.get(keys.get(key, key)), value)
            for key, value in saved.items()
        }
        return Counter(read) if isinstance(own, Counter) else read
    if isinstance(own, (list, tuple)) and isinstance(saved, list):
        same = [_as_in(a, b) for a, b in zip(own, saved, strict=False)] + saved[len(own) :]
        return type(own)(same)
    return saved


def name_of(schedule: ScheduleArgument) -> str:
    """How a run's configuration calls it."""
    if isinstance(schedule, str):
        return schedule
    return getattr(schedule, "__qualname__", type(schedule).__qualname__)


def learning_rate(optimizer: Optimizer) -> float:
    """The learning rate at this moment, of the first group of parameters."""
    if isinstance(optimizer, GradientDescent):
        return optimizer.lr
    assert isinstance(optimizer, torch.optim.Optimizer)
    return float(optimizer.param_groups[0].get("lr", 0.0))
