"""The PyTorch loop: forward, backward by autograd, optimizer step. It takes any model, loss and optimizer.

It is what the compiled engines are held against, and the only engine that several ranks can use. A step does
its own work and nothing else: rows are gathered, and losses and metric read, once a block of about 1024 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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

    def rebuilt(self, samples: Samples) -> AutogradEngine:
        return AutogradEngine(self._model, samples, self._plan, self._optimizer)

    def run_epoch(
        self, order: Tensor, interrupted: Sequence[object], on_progress: OnProgress
    ) -> tuple[Tensor, Tensor]:
        plan, optimizer, count = self._plan, self._optimizer, len(order)
        weights = with_held(self._model.parameters(), optimizer)
        held = set(map(id, held_by(optimizer)))
        others = [W for W in weights if id(W) not in held]  # what the optimizer does not hold, nobody clears

        def clear() -> None:
            optimizer.zero_grad()
            for W in others:
                W.grad = None

        if plan.mode == "batch":
            return self._batch_step(order, interrupted, on_progress, weights, clear)

        def step(size: int) -> None:
            plan.ranks.sum_gradients(W for W in weights if W.requires_grad)
            optimizer.step()
            clear()

        clear()
        totals, metric_sum = self._sweep(order, interrupted, on_progress, step)
        return totals / plan.sizes(count)[: len(totals)], metric_sum

    def _batch_step(
        self,
        order: Tensor,
        interrupted: Sequence[object],
        on_progress: OnProgress,
        weights: list[nn.Parameter],
        clear: Callable[[], object],
    ) -> tuple[Tensor, Tensor]:
        """An epoch of batch mode: one step, of the gradients of all chunks."""
        plan, optimizer, count = self._plan, self._optimizer, len(order)
        sweeps: list[tuple[Tensor, Tensor]] = []

        def sweep() -> Tensor:
            """E and, in `grad`, its gradient. The chunks' gradients are added up in float32 at least: in 16
            bits a sum stops growing once a chunk's share is below half of its last digit."""
            sums: dict[nn.Parameter, Tensor] = {}

            def add(size: int) -> None:
                share = size / count if plan.mean else size  # `grad` is the gradient of the chunk's mean
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
            sweeps.append(self._sweep(order, interrupted, report, add))
            sums = plan.ranks.sum_tensors(weights, sums)
            for W, gradient in sums.items():
                W.grad = gradient.to(W.dtype)
            total = sweeps[-1][0].sum()
            return total / count if plan.mean else total

        if needs_closure(optimizer):
            optimizer.step(sweep)
        elif sweep().isfinite():
            optimizer.step()
        clear()
        totals, metric_sum = sweeps[0]
        return totals.sum().reshape(1) / count, metric_sum

    def _sweep(
        self,
        order: Tensor,
        interrupted: Sequence[object],
        on_progress: OnProgress,
        backward_done: Callable[[int], object],
    ) -> tuple[Tensor, Tensor]:
        """Take the samples through the model a chunk at a time, forward and backward, and call
        `backward_done(samples of the chunk)` after each. What is differentiated is what a step minimises, in
        batch mode the mean of E over the chunk.

        Returns the sum of E over each chunk, float64, and the sum of the metric.
        """
        plan, ranks = self._plan, self._plan.ranks
        mean = plan.mean or plan.mode == "batch"
        metric_sum = torch.zeros((), dtype=torch.float64, device="cpu")
        losses: list[Tensor] = []
        for rows in torch.split(order, plan.block):
            sizes = plan.sizes(len(rows))
            own, lengths = ranks.shard(rows, plan.chunk)
            x, d = self._samples[own]
            outputs, totals = [], []
            for inputs, targets, size in zip(
                torch.split(x, lengths), torch.split(d, lengths), sizes.tolist(), strict=True
            ):
                if interrupted and ranks.size == 1:
                    raise KeyboardInterrupt
                total = x.new_zeros(())
                if len(inputs):  # the last step of an epoch may have fewer samples than there are ranks
                    output = self._model(inputs)
                    total = plan.loss_sum(output, targets)
                    torch.autograd.backward(total / size if mean else total)
                    outputs.append(output.detach())
                totals.append(total.detach())
                backward_done(int(size))
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
