"""The native engine: whole epochs in C++ on the CPU (csrc/cpu/epoch), for models that `_support` knows.

The weights, and the optimizer's buffers, are updated where they are. Data in memory are read where they are
too; C++ asks Python for the next block of rows only where they come from a memory map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mlpext import _C
from mlpext.training._losses import NamedLoss
from mlpext.training._samples import Samples
from mlpext.training.engines._support import (
    Unsupported,
    check_no_options,
    check_rows,
    describe,
    layers_of,
    trained_of,
)
from mlpext.training.engines.optimizer import Optimizer, count_steps, rule_and_states
from mlpext.training.engines.plan import OnProgress, StepPlan

NOTHING = torch.zeros((), dtype=torch.float64, device="cpu")


class NativeEngine:
    """Epochs in C++ (see `engines.Engine`), those of the PyTorch loop to rounding; but a loss that is NaN or
    infinite ends an epoch at once.

    Made once a run, because to look up layers, optimizer and data takes as long as an epoch of few samples. A
    change of layers, options or buffers, as by a callback, needs another.
    """

    replaces_buffers = False

    def __init__(self, model: nn.Module, samples: Samples, plan: StepPlan, optimizer: Optimizer) -> None:
        self._model, self._samples, self._plan, self._optimizer = model, samples, plan, optimizer
        layers = layers_of(model, torch.device("cpu"))
        check_rows(samples, plan, layers[0])
        check_no_options(samples, plan, model)
        self._rule, states = rule_and_states(optimizer, trained_of(layers))
        self._layers = describe(model, layers, states)
        assert isinstance(plan.loss_sum, NamedLoss)
        self._loss = plan.loss_sum.name
        if self._loss == "binary_cross_entropy":
            raise Unsupported("no")
        self._dtype = layers[0].weight.dtype
        self._dense = samples.dense_tensors(self._dtype)
        self._block = len(samples) if self._dense else min(len(samples), plan.block)
        self._outputs: Tensor | None = None  # of a block, as the steps met its samples
        if plan.metric is not None:
            shape = (self._block, *samples.output_shape)
            self._outputs = torch.empty(shape, dtype=self._dtype, device="cpu")

    def rebuilt(self, samples: Samples) -> NativeEngine:
        return NativeEngine(self._model, samples, self._plan, self._optimizer)

    def run_epoch(
        self, order: Tensor, epoch: int, interrupted: Sequence[object], on_progress: OnProgress
    ) -> tuple[Tensor, Tensor]:
        plan, count, outputs = self._plan, len(order), self._outputs
        losses = torch.empty(-(-count // plan.step_size), dtype=torch.float64, device="cpu")
        metric_sum = NOTHING
        targets: list[Tensor] = []  # of the block under way, where they come block by block

        def add_metric() -> None:
            nonlocal metric_sum
            if plan.metric is not None and outputs is not None:
                for d in targets:
                    metric_sum = metric_sum + plan.metric.sum(outputs[: len(d)], d)
            targets.clear()

        def fetch(first: int, rows: int) -> tuple[Tensor, Tensor]:
            add_metric()
            x, d = self._samples[order[first : first + rows]]
            targets.append(d)
            return x, d

        reported, total = 0, 0.0

        def poll(done: int, error: float) -> bool:
            nonlocal reported, total
            on_progress(done - reported, (error - total) / (done - reported))
            reported, total = done, error
            return not interrupted

        x = d = None
        if self._dense is not None:
            x, d, rows = self._dense
            order = (order if rows is None else rows[order]).contiguous()
        steps, stopped = _C.run_epoch(
            layers=self._layers,
            rule=self._rule,
            loss=self._loss,
            mean=plan.mean,
            samples=count,
            step_size=plan.step_size,
            x=x,
            d=d,
            order=order,
            fetch=None if self._dense else fetch,
            block_size=self._block,
            losses=losses,
            outputs=outputs,
            poll=poll,
        )
        count_steps(self._optimizer, self._rule, steps)
        if stopped:
            raise KeyboardInterrupt
        if steps < len(losses):  # the last of these is NaN or infinite
            losses = losses[:steps]
        elif d is not None and plan.metric is not None and outputs is not None:
            metric_sum = plan.metric.sum(outputs, d, order)
        else:
            add_metric()
        return losses, metric_sum
