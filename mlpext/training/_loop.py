"""The epoch loop of `fit`: run an epoch, measure it, write it down, until the run is over.

An epoch that fails leaves the weights that it began with, so that what the model has is always what the
history and the checkpoint say. Callbacks come before the checkpoint and the best weights, which hold what
they left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mlpext import _C
from mlpext.training._arguments import Arguments
from mlpext.training._evaluate import evaluate_samples
from mlpext.training._interrupts import Interrupts
from mlpext.training._metrics import Metrics
from mlpext.training._modules import copy_all, dtype_and_device
from mlpext.training._progress import Progress
from mlpext.training._samples import Samples
from mlpext.training._schedule import learning_rate
from mlpext.training._state import State
from mlpext.training.checkpoint import Checkpoint
from mlpext.training.engines import Engine, choose
from mlpext.training.engines.optimizer import needs_closure
from mlpext.training.engines.plan import StepPlan
from mlpext.training.history import Epoch, Log


@dataclasses.dataclass(eq=False)
class Run:
    """A `fit` under way: what was asked for, what changes (`state`), and the parts that were made for it."""

    arguments: Arguments
    state: State
    samples: Samples
    held_out: Samples | None
    held_out_metrics: Metrics | None
    plan: StepPlan
    engine: Engine
    store: Checkpoint | None  # store and log: of rank 0 alone
    stop: Sequence[object]  # not empty once fit_many wants the run to end
    log: Log | None = None
    # Called after each epoch as callbacks are; it may change the learning rate, and else nothing.
    after_epoch: Callable[[Epoch, Run], bool] | None = None

    def rebuild_engine(self) -> None:
        """The engine for model and optimizer as they are now."""
        name, model, optimizer = self.arguments.engine, self.state.model, self.state.optimizer
        self.engine = choose(name, model, self.samples, self.plan, optimizer, before=self.engine)


def loop(run: Run) -> None:
    """Run epochs until all are done, early stopping is due, or a callback says so."""
    arguments, state, plan, history = run.arguments, run.state, run.plan, run.state.history
    samples = len(run.samples)
    shuffled = arguments.shuffle and plan.mode != "batch"
    order: Tensor | None = None
    lr = learning_rate(state.optimizer)
    weights: list[Tensor] = []
    before: list[Tensor] = []  # what they were when the epoch under way began
    show = arguments.progress if plan.ranks.rank == 0 else False
    progress = Progress(show, samples, arguments.epochs, len(history))
    with state.training(), progress, Interrupts(run.stop) as interrupts, _saved_at_the_end(run):
        while len(history) < arguments.epochs and not state.stopping.due(len(history)):
            if shuffled:
                order = torch.randperm(samples, generator=state.generator, device="cpu")
            elif order is None:
                order = torch.arange(samples, device="cpu")
            if arguments.callbacks:
                _follow_callbacks(run)
            elif state.schedule is not None or lr != learning_rate(state.optimizer):
                run.rebuild_engine()
            lr = learning_rate(state.optimizer)
            if arguments.callbacks or run.engine.replaces_buffers or not weights:
                weights = state.weights()
                before = [weight.clone() for weight in weights]
            else:
                torch._foreach_copy_(before, weights)
            started = time.perf_counter()
            try:
                with interrupts.defer_interrupt() as interrupted:
                    losses, metric_sum = run.engine.run_epoch(
                        order, len(history) + 1, interrupted, progress.on_progress
                    )
            except BaseException as error:
                # Ctrl-C comes between two steps, and the complete ones stay; but not within a closure's step.
                if not isinstance(error, KeyboardInterrupt) or needs_closure(state.optimizer):
                    copy_all(before, state.weights())
                raise
            seconds = time.perf_counter() - started
            plan.ranks.broadcast_(state.buffers())
            loss = _C.mean_loss(losses, plan.step_size, samples)
            metrics, trouble = _measure(run, loss, losses, metric_sum)
            if trouble is not None:
                copy_all(before, state.weights())
                raise FloatingPointError(
                    f"{trouble} of epoch {len(history) + 1}; try a smaller lr. "
                    f"The model has its weights of the end of epoch {len(history)} again"
                )
            epoch = Epoch(
                epoch=len(history) + 1,
                updates=len(losses) + (history.epochs[-1].updates if len(history) else 0),
                loss=loss,
                metrics=metrics,
                seconds=seconds,
                samples_per_second=samples / seconds,
                lr=lr,
            )
            history.append(epoch, losses)
            progress.end(epoch)
            if _record(run, epoch, losses):
                break


def _follow_callbacks(run: Run) -> None:
    """Go on with what callbacks made of model and optimizer, in the dtype and on the device that it has
    now."""
    dtype, device = dtype_and_device(run.state.model)
    run.samples = run.samples.to(dtype, device)
    run.held_out = None if run.held_out is None else run.held_out.to(dtype, device)
    run.state.follow_model()
    run.rebuild_engine()


def _measure(
    run: Run, loss: float, losses: Tensor, metric_sum: Tensor
) -> tuple[dict[str, float], str | None]:
    """The metrics of an epoch, or what is NaN or infinite after it, if anything."""
    metrics: dict[str, float] = {}
    if (trouble := _find_non_finite(loss, losses, run.state.trained)) is not None:
        return metrics, trouble
    if run.plan.metric is not None:
        metrics = run.plan.metric.values(metric_sum, len(run.samples))
    if run.held_out is not None:
        model, loss_sum = run.state.model, run.plan.loss_sum
        measured = evaluate_samples(model, run.held_out, loss_sum, run.held_out_metrics)
        measured = run.plan.ranks.broadcast_object(measured)
        metrics |= {f"val_{name}": value for name, value in measured.items()}
        if not math.isfinite(measured["loss"]):
            trouble = f"the validation loss became {measured['loss']} after step {len(losses)}"
    return metrics, trouble


def _find_non_finite(loss: float, losses: Tensor, parameters: Sequence[Tensor]) -> str | None:
    """What is NaN or infinite after an epoch, and at which step. A finite mean is one of finite losses."""
    if not math.isfinite(loss) and not _C.all_finite([losses]):
        step = int((~losses.isfinite()).nonzero()[0])
        return f"the loss became {losses[step].item()} at step {step + 1}"
    if not _C.all_finite(parameters):
        return f"a weight became NaN or infinite at step {len(losses)} or shortly before"
    return None


@contextlib.contextmanager
def _saved_at_the_end(run: Run) -> Iterator[None]:
    """Whatever ends the run, the checkpoint has the last complete epoch."""
    try:
        yield
    finally:
        if run.store is not None:
            run.store.flush()


def _record(run: Run, epoch: Epoch, losses: Tensor) -> bool:
    """Log the epoch, call the callbacks, and keep what they left. Whether one of them says stop."""
    if run.log is not None:
        run.log.append(epoch)
    state = run.state
    if state.schedule is not None:
        state.schedule.step(epoch)
    answers = [call(epoch, state.model, state.optimizer) for call in run.arguments.calls]
    if run.after_epoch is not None:
        answers.append(run.after_epoch(epoch, run))
    if run.arguments.early_stopping is not None:
        state.stopping.see(epoch, state.weights())
    if run.store is not None:
        run.store.keep(state.state_dict(), state.history.entry(losses))
    return run.plan.ranks.any(any(map(_means_stop, answers)))


def _means_stop(answer: object) -> bool:
    if isinstance(answer, str):
        return answer == "stop"
    return isinstance(answer, (bool, np.bool_)) and bool(answer)
