"""The PyTorch loop: forward, backward by autograd, optimizer step. It takes any model, loss and optimizer.

It is what the compiled engines are held against, and the only engine that several ranks can use. A step does
its own work and nothing else: rows are gathered, and losses and metric read, once a block of about 1024 rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mlpext.nn import MLP
from mlpext.training._losses import widened
from mlpext.training._modules import layer_weights
from mlpext.training._samples import Samples
from mlpext.training.engines.optimizer import Optimizer, held_by, needs_closure, with_held
from mlpext.training.engines.plan import OnProgress, StepPlan


class AutogradEngine:
    """Epochs as PyTorch runs them (see `engines.Engine`).

    An epoch ends early after a block with a loss that is NaN or infinite. Of several ranks each takes its
    share of every step, adds up the gradients with the others, and makes the same update; all return the
    same, and stop together, after a block.
    """

    replaces_buffers = True

    def __init__(self, model: nn.Module, samples: Samples, plan: StepPlan, optimizer: Optimizer) -> None:
        self._model, self._samples, self._plan, self._optimizer = model, samples, plan, optimizer
        self._mlp = model if isinstance(model, MLP) and model.dropout else None
        self._penalised = layer_weights(model) if plan.l2 else []

    def rebuilt(self, samples: Samples) -> AutogradEngine:
        return AutogradEngine(self._model, samples, self._plan, self._optimizer)

    def run_epoch(
        self, order: Tensor, epoch: int, interrupted: Sequence[object], on_progress: OnProgress
    ) -> tuple[Tensor, Tensor]:
        plan, optimizer = self._plan, self._optimizer
        sizes = plan.sizes(len(order), self._samples.weights_of(order))
        sweep = functools.partial(self._sweep, order, epoch, sizes, interrupted)
        weights = with_held(self._model.parameters(), optimizer)
        held = set(map(id, held_by(optimizer)))
        others = [W for W in weights if id(W) not in held]  # what the optimizer does not hold, nobody clears

        def clear() -> None:
            optimizer.zero_grad()
            for W in others:
                W.grad = None

        if plan.mode == "batch":
            return self._batch_step(sweep, float(sizes.sum()), on_progress, weights, clear)

        def step(size: float) -> Tensor | None:
            plan.ranks.sum_gradients(W for W in weights if W.requires_grad)
            penalty = self._regularise(weights, size)
            optimizer.step()
            clear()
            return penalty if plan.ranks.rank == 0 else None  # the ranks' errors are added up

        clear()
        totals, metric_sum = sweep(on_progress, step)
        return _means(totals, sizes[: len(totals)]), metric_sum

    def _regularise(self, weights: list[nn.Parameter], size: float) -> Tensor | None:
        """Add the gradient of l2 / 2 ||W||^2 to that of a step of this size, then clip the whole. Gives that
        term, if there is one."""
        plan, penalty = self._plan, None
        if self._penalised:
            share = plan.l2 / (size or math.inf) if plan.mean else plan.l2
            with torch.no_grad():
                for W in self._penalised:
                    W.grad = W * share if W.grad is None else W.grad.add_(W, alpha=share)
                squares = [widened(W).square().sum() for W in self._penalised]
                penalty = plan.l2 / 2 * torch.stack(squares).sum()
        if plan.clip_grad_norm:
            nn.utils.clip_grad_norm_(weights, plan.clip_grad_norm)
        return penalty

    def _batch_step(
        self,
        sweep_chunks: Callable[..., tuple[Tensor, Tensor]],
        size: float,
        on_progress: OnProgress,
        weights: list[nn.Parameter],
        clear: Callable[[], object],
    ) -> tuple[Tensor, Tensor]:
        """An epoch of batch mode: one step, of the gradients of all chunks."""
        plan, optimizer = self._plan, self._optimizer
        sweeps: list[tuple[Tensor, Tensor]] = []

        def sweep() -> Tensor:
            """E and, in `grad`, its gradient. The chunks' gradients are added up in float32 at least: in 16
            bits a sum stops growing once a chunk's share is below half of its last digit."""
            sums: dict[nn.Parameter, Tensor] = {}

            def add(chunk: float) -> None:
                # `grad` is the gradient of the chunk's mean.
                share = chunk / (size or 1.0) if plan.mean else chunk
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
            report = (lambda rows, error: None) if sweeps else on_progress  # samples count once a step
            totals, metric_sum = sweep_chunks(report, add)
            sums = plan.ranks.sum_tensors(weights, sums)
            for W, gradient in sums.items():
                W.grad = gradient.to(W.dtype)
            total, penalty = totals.sum(), self._regularise(weights, size)
            if penalty is not None:
                total += penalty.cpu()
            sweeps.append((total.reshape(1), metric_sum))
            return total / (size or 1.0) if plan.mean else total

        if needs_closure(optimizer):
            optimizer.step(sweep)
        elif sweep().isfinite():
            optimizer.step()
        clear()
        total, metric_sum = sweeps[0]
        return total / (size or 1.0), metric_sum

    def _sweep(
        self,
        order: Tensor,
        epoch: int,
        sizes: Tensor,
        interrupted: Sequence[object],
        on_progress: OnProgress,
        backward_done: Callable[[float], Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """Take the samples through the model a chunk at a time, forward and backward, and call
        `backward_done(size of the chunk)` after each, which gives what E has besides. What is differentiated
        is what a step minimises, in batch mode the mean of E over the chunk.

        Returns the sum of E over each chunk, float64, and the sum of the metric.
        """
        plan, ranks = self._plan, self._plan.ranks
        mean = plan.mean or plan.mode == "batch"
        metric_sum = torch.zeros((), dtype=torch.float64, device="cpu")
        losses: list[Tensor] = []
        places = torch.arange(len(order), device="cpu")
        for rows, place, block in zip(
            torch.split(order, plan.block),
            torch.split(places, plan.block),
            torch.split(sizes, plan.block // plan.chunk),
            strict=True,
        ):
            own, lengths = ranks.shard(rows, plan.chunk)
            (x, d), w = self._samples[own], self._samples.weights_of(own)
            firsts = torch.split(ranks.shard(place, plan.chunk)[0], lengths)
            weights = [None] * len(block) if w is None else torch.split(w, lengths)
            outputs, totals = [], []
            for inputs, targets, weight, first, size in zip(
                torch.split(x, lengths), torch.split(d, lengths), weights, firsts, block.tolist(), strict=True
            ):
                if interrupted and ranks.size == 1:
                    raise KeyboardInterrupt
                total = x.new_zeros(())
                if len(inputs):  # the last step of an epoch may have fewer samples than there are ranks
                    if self._mlp is not None:
                        self._mlp.mask_origin = plan.seed, epoch, int(first[0])
                    output = self._model(inputs)
                    total = plan.loss_sum(output, targets, weight)
                    torch.autograd.backward(total / (size or 1.0) if mean else total)
                    outputs.append(output.detach())
                total = total.detach()
                penalty = backward_done(size)
                totals.append(total if penalty is None else total + penalty)
            errors = torch.stack(totals).to("cpu", torch.float64)
            if ranks.size > 1:
                pressed = torch.tensor([float(bool(interrupted))], device="cpu")
                errors, pressed = torch.split(
                    ranks.all_reduce(torch.cat([errors, pressed])), [len(totals), 1]
                )
                if pressed:
                    raise KeyboardInterrupt
            losses.append(errors)
            if plan.metric is not None and outputs:
                metric_sum = metric_sum + plan.metric.sum(torch.cat(outputs), d).cpu()
            on_progress(len(rows), errors.sum().item() / len(rows))
            if not torch.isfinite(errors).all():
                break
        return torch.cat(losses), ranks.all_reduce(metric_sum)


def _means(totals: Tensor, sizes: Tensor) -> Tensor:
    """Of steps whose samples have a weight; 0 of the others."""
    return torch.where(sizes > 0, totals / sizes, 0.0)
