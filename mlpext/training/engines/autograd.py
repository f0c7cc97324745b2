"""The weight update, and one epoch of it: the PyTorch engine."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlpext.training._losses import Metric
from mlpext.training._ranks import Ranks
from mlpext.training._samples import BLOCK, Samples


class Descent(Protocol):
    """What an epoch needs of an optimizer: torch's own have it too."""

    def step(self, closure: Any = ..., /) -> object: ...
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
    def step(self, closure: None = None) -> None:
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

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update these from now on. Those that it had keep their velocity, cast to what they are now."""
        known = {id(W): v for W, v in zip(self.parameters, self.velocity, strict=True)}
        self.parameters = list(parameters)
        self.velocity = [None if (v := known.get(id(W))) is None else v.to(W) for W in self.parameters]

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
        sizes = torch.full((-(-rows // self.chunk),), self.chunk, dtype=torch.float64, device="cpu")
        sizes[-1] = rows - self.chunk * (len(sizes) - 1)
        return sizes


def held_by(descent: Descent) -> list[nn.Parameter]:
    """The parameters that an optimizer updates."""
    if isinstance(descent, torch.optim.Optimizer):
        return [parameter for group in descent.param_groups for parameter in group["params"]]
    assert isinstance(descent, GradientDescent)
    return descent.parameters


def with_held(model: nn.Module, descent: Descent) -> list[nn.Parameter]:
    """The model's parameters, then those that the optimizer holds besides, as a loss's; each once."""
    return list({id(W): W for W in (*model.parameters(), *held_by(descent))}.values())


def needs_closure(descent: Descent) -> bool:
    """Whether a step of this optimizer asks for E and its gradient again (torch.optim.LBFGS)."""
    if isinstance(descent, GradientDescent):
        return False
    closure = inspect.signature(type(descent).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


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
    weights = with_held(model, descent)
    held = set(map(id, held_by(descent)))
    others = [W for W in weights if id(W) not in held]  # what the optimizer does not hold, nobody clears
    count = len(order)

    def clear() -> None:
        descent.zero_grad()
        for W in others:
            W.grad = None

    def step(size: int) -> None:
        plan.ranks.sum_gradients(W for W in weights if W.requires_grad)
        descent.step()
        clear()

    if plan.mode != "batch":
        clear()
        totals, score = _sweep(model, samples, order, plan, interrupted, advance, step)
        return totals / plan.sizes(count)[: len(totals)], score

    sweeps: list[tuple[Tensor, Tensor]] = []

    def sweep() -> Tensor:
        """E and, in `grad`, its gradient. The chunks' gradients are added up in float32 at least: in 16 bits
        a sum stops growing once a chunk's share is below half of its last digit."""
        sums: dict[nn.Parameter, Tensor] = {}

        def add(size: int) -> None:
            share = size / count if plan.mean else size  # what is there is the gradient of the chunk's mean
            for W in weights:
                if W.grad is None:
                    continue
                wide = torch.promote_types(W.grad.dtype, torch.float32)
                if W in sums:
                    sums[W].add_(W.grad, alpha=share)
                else:
                    sums[W] = W.grad.to(wide) * share
            clear()

        clear()
        report = (lambda rows, error: None) if sweeps else advance  # samples count once a step
        sweeps.append(_sweep(model, samples, order, plan, interrupted, report, add))
        sums = plan.ranks.sum_tensors(weights, sums)
        for W, gradient in sums.items():
            W.grad = gradient.to(W.dtype)
        total = sweeps[-1][0].sum()
        return total / count if plan.mean else total

    if needs_closure(descent):
        descent.step(sweep)
    elif sweep().isfinite():
        descent.step()
    clear()
    totals, score = sweeps[0]
    return totals.sum().reshape(1) / count, score


def _sweep(
    model: nn.Module,
    samples: Samples,
    order: Tensor,
    plan: Plan,
    interrupted: Sequence[object],
    advance: Callable[[int, float], object],
    backward_done: Callable[[int], object],
) -> tuple[Tensor, Tensor]:
    """Take the samples through the model a chunk at a time, forward and backward, and call
    `backward_done(samples of the chunk)` after each. What is differentiated is what a step minimises, in
    batch mode the mean of E over the chunk.

    Returns the sum of E over each chunk, float64, and the sum of the metric's scores; otherwise as run_epoch.
    """
    batch, ranks = plan.mode == "batch", plan.ranks
    # Rows are gathered, cast and moved, and losses and metric looked at, a block at a time, so that a step
    # does nothing but its own work.
    block = max(BLOCK // plan.chunk, 1) * plan.chunk
    score = torch.zeros((), dtype=torch.float64, device="cpu")
    losses: list[Tensor] = []
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
                torch.autograd.backward(total / size if plan.mean or batch else total)
                outputs.append(output.detach())
            totals.append(total.detach())
            backward_done(int(size))
        errors = torch.stack(totals).to("cpu", torch.float64)
        if ranks.size > 1:
            pressed = torch.tensor([float(bool(interrupted))], device="cpu")
            errors, pressed = torch.split(ranks.sum(torch.cat([errors, pressed])), [len(totals), 1])
            if pressed:
                raise KeyboardInterrupt
        losses.append(errors)
        if plan.metric is not None and outputs:
            score = score + plan.metric.score(torch.cat(outputs), d).cpu()
        advance(len(rows), errors.sum().item() / len(rows))
        if not torch.isfinite(errors).all():
            break
    return torch.cat(losses), ranks.sum(score)
