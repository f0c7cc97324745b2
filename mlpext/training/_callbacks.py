"""Callbacks: how `fit` calls a user's, and those that come with it, `CSV` and `TensorBoard`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from mlpext.training.engines.optimizer import Optimizer
from mlpext.training.history import Epoch, append_csv

# (epoch) or (epoch, model, optimizer) -> True or "stop" to end the run.
Callback: TypeAlias = "Callable[[Epoch], object] | Callable[[Epoch, nn.Module, Any], object]"


def as_calls(callbacks: Sequence[Callback]) -> list[Callable[[Epoch, nn.Module, Optimizer], object]]:
    """Each of them as a function of (epoch, model, optimizer).

    TypeError, before the first epoch, for one that takes neither one argument nor these three.
    """
    return [_as_call(callback) for callback in callbacks]


def _as_call(callback: Callback) -> Callable[[Epoch, nn.Module, Optimizer], object]:
    if not callable(callback):
        raise TypeError(
            "callbacks must be functions of (epoch) or (epoch, model, optimizer), got "
            f"{type(callback).__name__}"
        )
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # of a builtin, such as print
        return lambda epoch, model, optimizer: callback(epoch)  # type: ignore[call-arg]
    for count in (1, 3):
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        if count == 1:
            return lambda epoch, model, optimizer: callback(epoch)  # type: ignore[call-arg]
        return callback  # type: ignore[return-value]
    raise TypeError(f"callbacks must take (epoch) or (epoch, model, optimizer), one takes {signature}")


class CSV:
    """A callback that writes one line an epoch to a file, under a header of the columns.

    A file that is there is replaced. Raises OSError.

        fit(model, x, target, callbacks=[mlpext.training.CSV("epochs.csv")])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("")

    def __call__(self, epoch: Epoch) -> None:
        append_csv(self._path, epoch.row())


class TensorBoard:
    """A callback that writes loss, metrics and learning rate to a folder that TensorBoard shows.

    Needs the package tensorboard (ImportError without it).

        fit(model, x, target, callbacks=[mlpext.training.TensorBoard("runs/first")])
    """

    def __init__(self, log_dir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoard needs the package tensorboard: {error}") from error
        self._writer: Any = SummaryWriter(os.fspath(log_dir))

    def __call__(self, epoch: Epoch) -> None:
        for name, value in epoch.row().items():
            if name not in ("epoch", "updates"):
                self._writer.add_scalar(name, value, epoch.epoch)
        self._writer.flush()
