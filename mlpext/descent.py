"""The weight update, and one epoch of it: the PyTorch engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .objective import Metric
from .ranks import Ranks
from .samples import BLOCK, Samples


class Descent(Protocol):
    """What an epoch needs of an optimizer: torch's own have it too."""

    def step(self) -> object: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class GradientDescent:
    """W <- W - eta dE/dW; with weight decay and momentum as torch.optim.SGD has them, to the same bits:

        g = dE/dW + weight_decay W;    v = momentum v + g, first v = g;    W <- W - eta v

    and with nesterov W <- W - eta (g + momentum v). lr is eta. Parameters without a gradient stay as they
    are.

        descent = GradientDescent(model.parameters(), lr=0.1)
        E.backward(); descent.step(); descent.zero_grad()
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.velocity: list[Tensor | None] = [None] * len(self.parameters)

    @torch.no_grad()
    def step(self) -> None:
        for k, W in enumerate(self.parameters):
            if W.grad is None:
                continue
            g = W.grad
            if self.weight_decay:
                g = g.add(W, alpha=self.weight_decay)
            if self.momentum:
                v = self.velocity[k]
                v = self.velocity[k] = g.clone() if v is None else v.mul_(self.momentum).add_(g)
                g = g.add(v, alpha=self.momentum) if self.nesterov else v
            W.add_(g, alpha=-self.lr)

    def zero_grad(self) -> None:
        for W in self.parameters:
            W.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"velocity": self.velocity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.velocity = [
            None if v is None else v.to(W, copy=True)
            for W, v in zip(self.parameters, state_dict["velocity"], strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an epoch goes: which samples a step takes, what it minimises, what is measured on the way, and who
    takes part."""

    mode: str
    step_size: int
    mean: bool
    total: Callable[[Tensor, Tensor], Tensor]
    metric: Metric | None
    ranks: Ranks

    @property
    def chunk(self) -> int:
        """The rows that the model takes at once: those of a step, in batch mode a part of them."""
        return BLOCK if self.mode == "batch" else self.step_size

    def sizes(self, rows: int) -> Tensor:
        """The samples of each chunk of so many rows, float64; the last may have fewer."""
        sizes = torch.full((-(-rows // self.chunk),), self.chunk, dtype=torch.float64)
        sizes[-1] = rows - self.chunk * (len(sizes) - 1)
        return sizes


def run_epoch(
    model: nn.Module,
    samples: Samples,
    order: Tensor,
    plan: Plan,
    descent: Descent,
    interrupted: Sequence[object],
    advance: Callable[[int, float], object],
) -> tuple[Tensor, Tensor]:
    """Visit the samples once in `order` (int64 row numbers), updating the model after each step.

    Returns the mean E of each step, float64 (steps,), and the sum of the metric's scores, both as the steps
    met the samples. Stops early after a block with a loss that is NaN or infinite. Raises KeyboardInterrupt
    between two steps once `interrupted` is not empty. `advance(samples, mean E)` reports progress. Of several
    ranks each takes its share of every step, adds up the gradients with the others, and makes the same
    update; all return the same, and stop together, after a block.
    """
    batch, ranks = plan.mode == "batch", plan.ranks
    # Rows are gathered, cast and moved, and losses and metric looked at, a block at a time, so that a step
    # does nothing but its own work.
    block = max(BLOCK // plan.chunk, 1) * plan.chunk
    score = torch.zeros((), dtype=torch.float64)
    losses: list[Tensor] = []
    descent.zero_grad()
    for rows in torch.split(order, block):
        sizes = plan.sizes(len(rows))
        own, lengths = ranks.share(rows, plan.chunk)
        x, d = samples[own]
        outputs, totals = [], []
        for inputs, targets, size in zip(
            torch.split(x, lengths), torch.split(d, lengths), sizes.tolist(), strict=True
        ):
            if interrupted and ranks.size == 1:
                raise KeyboardInterrupt
            total = x.new_zeros(())
            if len(inputs):  # the last step of an epoch may have fewer samples than there are ranks
                output = model(inputs)
                total = plan.total(output, targets)
                count = len(order) if batch else size
                torch.autograd.backward(total / count if plan.mean else total)
                outputs.append(output.detach())
            if not batch:
                ranks.sum_gradients(_trained(model))
                descent.step()
                descent.zero_grad()
            totals.append(total.detach())
        errors = torch.stack(totals).to("cpu", torch.float64)
        if ranks.size > 1:
            pressed = torch.tensor([float(bool(interrupted))])
            errors, pressed = torch.split(ranks.sum(torch.cat([errors, pressed])), [len(totals), 1])
            if pressed:
                raise KeyboardInterrupt
        losses.append(errors / (len(order) if batch else sizes))
        if plan.metric is not None and outputs:
            score = score + plan.metric.score(torch.cat(outputs), d).cpu()
        mean = errors.sum().item() / len(rows)
        advance(len(rows), mean)
        if not torch.isfinite(errors).all():
            break
    else:
        if batch:
            ranks.sum_gradients(_trained(model))
            descent.step()
            descent.zero_grad()
    step_losses = torch.cat(losses)
    return (step_losses.sum().reshape(1) if batch else step_losses), ranks.sum(score)


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
