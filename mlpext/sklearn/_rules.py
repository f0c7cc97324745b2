"""After each epoch: what the estimator records of it, its learning rate from then on, and when to stop.

The rules are scikit-learn's. An epoch is better than the best before it where its loss is lower (its score on
the held-out data higher) by `tol` or more; after more than n_iter_no_change epochs in a row that were not,
training ends, or with the "adaptive" rate goes on with a fifth of it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from mlpext.sklearn._arrays import Array, Arrays, tensor

SMALLEST_RATE = 1e-6  # of learning_rate="adaptive": where it ends


@dataclasses.dataclass
class OptimizerState:
    """What a solver keeps from one call to the next: its rate, and of each parameter its buffers, arrays."""

    learning_rate: float
    buffers: dict[int, dict[str, Array]]


@dataclasses.dataclass(eq=False)
class Rules:
    """Called after each epoch of a `fit`, with the `Epoch` and the `Run`; True ends the training."""

    estimator: Any
    samples: int
    total_weight: float  # of the samples
    held_out: tuple[Array, Array, Array | None] | None  # x, y, their weights; of early_stopping alone
    updates: int = 0
    stopped: bool = False
    best: Arrays = ([], [])  # the weights of the best score
    squares: float = 0.0  # ||W||^2 before the epoch

    def __post_init__(self) -> None:
        if self.estimator._loss_divisor() > 1:
            self.squares = self.sum_of_squares()
        if self.held_out is not None:
            self.keep_best()

    def keep_best(self) -> None:
        coefs, intercepts = self.estimator.coefs_, self.estimator.intercepts_
        self.best = [coef.copy() for coef in coefs], [intercept.copy() for intercept in intercepts]

    def sum_of_squares(self) -> float:
        return sum(float(np.square(coef).sum()) for coef in self.estimator.coefs_)

    def __call__(self, epoch: Any, run: Any) -> bool:
        steps, self.updates = epoch.updates - self.updates, epoch.updates
        self.record(self.reported(epoch.loss, steps))
        self.count()
        estimator, optimizer = self.estimator, run.state.optimizer
        if estimator.solver == "sgd" and estimator.learning_rate == "invscaling":
            set_rate(optimizer, estimator.learning_rate_init / (estimator.t_ + 1) ** estimator.power_t)
        if estimator._no_improvement_count > estimator.n_iter_no_change:
            self.stopped = self.ends(optimizer)
        return self.stopped

    def reported(self, loss: float, steps: int) -> float:
        """The epoch's loss as scikit-learn reports it: of several numeric targets the mean instead of the
        sum over them, and the penalty whole. The penalty follows from ||W||^2 before and after the epoch, as
        if it went from one to the other in equal steps."""
        if (divisor := self.estimator._loss_divisor()) == 1:
            return loss
        before, self.squares = self.squares, self.sum_of_squares()
        squares = before + (self.squares - before) * (steps - 1) / (2 * steps)
        penalty = self.estimator.alpha / 2 * squares * steps / self.total_weight
        return float((loss - penalty) / divisor + penalty)

    def record(self, loss: float) -> None:
        estimator = self.estimator
        estimator.n_iter_ += 1
        estimator.loss_ = loss
        estimator.loss_curve_.append(loss)
        estimator.t_ += self.samples
        if estimator.verbose:
            print(f"Iteration {estimator.n_iter_}, loss = {loss:.8f}")

    def count(self) -> None:
        """The epochs in a row without improvement, and the best one."""
        estimator = self.estimator
        if self.held_out is None:
            value, best = -estimator.loss_, -estimator.best_loss_
            estimator.best_loss_ = min(estimator.best_loss_, estimator.loss_)
        else:
            value, best = estimator._score_held_out(*self.held_out), estimator.best_validation_score_
            estimator.validation_scores_.append(value)
            if estimator.verbose:
                print(f"Validation score: {value:f}")
            if value > best:
                estimator.best_validation_score_ = value
                self.keep_best()
        improved = value >= best + estimator.tol
        estimator._no_improvement_count = 0 if improved else estimator._no_improvement_count + 1

    def ends(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether training ends now that epochs enough brought nothing, or takes a lower rate."""
        estimator = self.estimator
        what = "Training loss" if self.held_out is None else "Validation score"
        rate = optimizer.param_groups[0]["lr"]
        adaptive = estimator.solver == "sgd" and estimator.learning_rate == "adaptive"
        end = not adaptive or rate <= SMALLEST_RATE
        if not end:
            set_rate(optimizer, rate / 5)
            estimator._no_improvement_count = 0
        if estimator.verbose:
            follows = "Stopping." if end else f"Setting learning rate to {rate / 5:f}"
            few = "Learning rate too small. " if adaptive and end else ""
            print(
                f"{what} did not improve more than tol={estimator.tol:f} for {estimator.n_iter_no_change} "
                f"consecutive epochs. {few}{follows}"
            )
        return end

    def diverged(self) -> None:
        """An epoch ended in NaN or infinity: its score is NaN, and the best weights stay."""
        self.record(math.nan)
        self.estimator.validation_scores_.append(math.nan)
        self.stopped = True


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Another learning rate from the next step on. scikit-learn's velocity is -eta v for torch's v, and
    a change of eta leaves it as it is: so v is divided by what eta is multiplied by."""
    (group,) = optimizer.param_groups
    for state in optimizer.state.values():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"].mul_(group["lr"] / rate)
    group["lr"] = rate


def make_optimizer(
    estimator: Any, parameters: list[torch.nn.Parameter], state: OptimizerState | None
) -> torch.optim.Optimizer:
    """The solver as torch's, where `state` left it."""
    rate = estimator.learning_rate_init if state is None else state.learning_rate
    optimizer: torch.optim.Optimizer
    if estimator.solver == "sgd":
        nesterov = bool(estimator.nesterovs_momentum and estimator.momentum > 0)
        optimizer = torch.optim.SGD(parameters, rate, momentum=estimator.momentum, nesterov=nesterov)
    else:
        betas = estimator.beta_1, estimator.beta_2
        optimizer = torch.optim.Adam(parameters, rate, betas=betas, eps=estimator.epsilon)
    if state is not None:
        buffers = {k: {n: tensor(a) for n, a in own.items()} for k, own in state.buffers.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": buffers})
    return optimizer


def state_of(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimizer's state in NumPy arrays."""
    buffers = {
        k: {name: np.asarray(value) for name, value in own.items() if value is not None}
        for k, own in optimizer.state_dict()["state"].items()
    }
    return OptimizerState(optimizer.param_groups[0]["lr"], buffers)
