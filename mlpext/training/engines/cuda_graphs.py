"""engine="native" on a GPU: steps in CUDA graphs, of PyTorch's own operators, which run anywhere.

A graph holds a block of steps, so that the host starts a few kernels a block instead of some twenty a step,
and waits for nothing within an epoch: losses stay on the device, and are read at its end, or ten times a
second for progress. Without a GPU the same blocks are calls, which the tests hold against the PyTorch loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mlpext.training._losses import NamedLoss
from mlpext.training._modules import device_of
from mlpext.training._samples import Samples
from mlpext.training.engines._support import check_no_options, check_rows, describe, layers_of, trained_of
from mlpext.training.engines.optimizer import Optimizer, Rule, count_steps, rule_and_states
from mlpext.training.engines.plan import OnProgress, StepPlan

# A graph has so many steps, or fewer where these would be more rows than so many.
STEPS, ROWS = 32, 16384
# Seconds between two looks at the losses.
LOOK = 0.1

# (x, d) of a block -> the sum of E over each chunk, and the outputs.
Block: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
# What a function leaves behind once it is captured: how to run it again, and where its results then lie.
Captured: TypeAlias = tuple[Callable[[], object], tuple[Tensor, Tensor]]


class CudaGraphsEngine:
    """Epochs in CUDA graphs (see `engines.Engine`), those of the PyTorch loop to rounding; but progress,
    Ctrl-C and losses that are NaN or infinite are looked at between blocks of steps, the losses ten times a
    second.

    Under fit_many `run_job` runs an epoch beside those of the other models.
    """

    replaces_buffers = False

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        plan: StepPlan,
        optimizer: Optimizer,
        run_job: RunJob | None = None,
    ) -> None:
        self.model, self.samples, self.plan, self.optimizer = model, samples, plan, optimizer
        self._run_job = run_job
        layers = layers_of(model, device_of(model))
        check_rows(samples, plan, layers[0])
        check_no_options(samples, plan, model)
        self.trained = trained_of(layers)
        self.rule, states = rule_and_states(optimizer, self.trained)
        self.layers = describe(model, layers, states)
        # By kind: the velocities of all weights, say.
        self.states = [
            list(kind) for kind in zip(*(states.get(id(w), ()) for w in self.trained), strict=True)
        ]
        update = Update(self.rule, self.trained, self.states)
        self.steps = Steps(model, plan.loss_sum, self.trained, [update], plan, len(samples))

        # What would be wrong in the graphs, were it another: the rule's other numbers, and where tensors lie.
        scalars: dict[str, Any] = dict.fromkeys(_device_scalars(self.trained), 0)
        self._captured_constants = dataclasses.replace(self.rule, **scalars), _identity(tuple(self.layers))

    def rebuilt(self, samples: Samples) -> CudaGraphsEngine:
        """As `Engine.rebuilt`; with its graphs where they still hold."""
        other = CudaGraphsEngine(self.model, samples, self.plan, self.optimizer, self._run_job)
        if other._captured_constants == self._captured_constants:
            other.steps = self.steps
        return other

    def run_epoch(
        self, order: Tensor, epoch: int, interrupted: Sequence[object], on_progress: OnProgress
    ) -> tuple[Tensor, Tensor]:
        job = Job(self, order, interrupted, on_progress)
        return run_jobs([job], self.steps)[0] if self._run_job is None else self._run_job(job)


def _identity(part: Any) -> Any:
    """What tells a tensor in a graph from another; other things are compared as they are."""
    if isinstance(part, tuple):
        return tuple(map(_identity, part))
    return (id(part), part.data_ptr(), part.requires_grad) if isinstance(part, Tensor) else part


def _device_scalars(weights: Sequence[Tensor]) -> tuple[str, ...]:
    """The numbers of a rule that kernels read from the device. torch's kernels read lr there in float32
    alone; in float64 it is a number in the graph, and another lr makes another graph."""
    return ("steps", "lr") if weights[0].dtype == torch.float32 else ("steps",)


class Update:
    """A rule on torch's fused kernels: one launch, two for Adam. Of stacks of several models' weights it
    moves those of `members`, or all."""

    def __init__(
        self,
        rule: Rule,
        weights: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        members: Sequence[int] | None = None,
    ) -> None:
        self.members = members
        self._rule = rule
        self._weights = self._own(weights)
        self._states = [self._own(kind) for kind in states]
        self._steps = torch.zeros((), dtype=torch.float32, device=weights[0].device)
        self._lr = torch.zeros_like(self._steps) if "lr" in _device_scalars(weights) else rule.lr

    def _own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = [tensor.detach() for tensor in tensors]
        return tensors if self.members is None else [t[member] for t in tensors for member in self.members]

    def begin(self, rule: Rule) -> None:
        """An epoch under this rule, which differs in nothing but its device scalars."""
        self._steps.fill_(rule.steps)
        if isinstance(self._lr, Tensor):
            self._lr.fill_(rule.lr)

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        rule, gradients = self._rule, self._own([gradient.contiguous() for gradient in gradients])
        options: dict[str, Any] = {"lr": self._lr, "weight_decay": rule.weight_decay, "maximize": False}
        if rule.kind == "descent":
            options |= {"momentum": rule.momentum, "nesterov": rule.nesterov, "dampening": 0.0}
            velocity = self._states[0] if rule.momentum else []
            torch._fused_sgd_(self._weights, gradients, velocity, is_first_step=False, **options)
        else:
            options |= {"beta1": rule.betas[0], "beta2": rule.betas[1], "eps": rule.eps}
            self._steps.add_(1)
            steps = [self._steps] * len(gradients)
            fused: Any = torch._fused_adam_ if rule.kind == "adam" else torch._fused_adamw_
            fused(self._weights, gradients, *self._states, [], steps, amsgrad=False, **options)


class Steps:
    """Blocks of rows, taken through `forward` a chunk at a time. An update follows each chunk; in batch mode
    their gradients are added up."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        loss_sum: Callable[[Tensor, Tensor], Tensor],
        weights: Sequence[Tensor],
        updates: list[Update],
        plan: StepPlan,
        samples: int,
    ) -> None:
        self._forward, self._loss_sum, self._weights, self._updates = forward, loss_sum, weights, updates
        self._plan, self._samples = plan, samples
        assert isinstance(plan.loss_sum, NamedLoss)
        self._gradient = plan.loss_sum.gradient
        self.device = weights[0].device
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._sums = [torch.zeros_like(weight) for weight in weights] if plan.mode == "batch" else []
        capture = CAPTURE.get(self.device.type)
        self.take: Block = self._take if capture is None else GraphedFunction(self._take, capture)

    @contextlib.contextmanager
    def epoch(self, engines: Sequence[CudaGraphsEngine]) -> Iterator[None]:
        """Room for an epoch of these engines, on a stream that can be captured."""
        # Like the engine in C++ it knows no autocast, whose copies of weights would outlive their update.
        with self._on_stream(), torch.autocast(self.device.type, enabled=False):
            for update in self._updates:
                update.begin(engines[update.members[0] if update.members else 0].rule)
            if self._sums:
                torch._foreach_zero_(self._sums)
            yield

    @contextlib.contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _take(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of E over each chunk, and the outputs."""
        chunk, outputs = self._plan.chunk, []
        for inputs, targets in zip(torch.split(x, chunk), torch.split(d, chunk), strict=True):
            with torch.enable_grad():
                output = self._forward(inputs)
            own = output.detach()
            slope = self._gradient(own, targets) * self._scale(len(inputs))
            gradients = torch.autograd.grad(output, self._weights, slope)
            if self._sums:
                torch._foreach_add_(self._sums, gradients)
            else:
                self.update(gradients)
            outputs.append(own)
        output = torch.cat(outputs)
        return self._totals(output, d), output

    def _totals(self, output: Tensor, d: Tensor) -> Tensor:
        """The sum of E over each chunk, of all at once: no step waits for them."""
        chunk = self._plan.chunk
        whole = len(output) // chunk * chunk
        totals = []
        if whole:
            chunks = (rows[:whole].reshape(-1, chunk, *rows.shape[1:]) for rows in (output, d))
            totals.append(torch.vmap(self._loss_sum)(*chunks))
        if whole < len(output):
            totals.append(self._loss_sum(output[whole:], d[whole:]).unsqueeze(0))
        return torch.cat(totals)

    def _scale(self, rows: int) -> float:
        """What a step of so many rows minimises is the sum of E times this."""
        return 1 / (self._samples if self._sums else rows) if self._plan.mean else 1.0

    def update(self, gradients: Sequence[Tensor] | None = None) -> None:
        """Move the weights; without gradients, by those added up."""
        for update in self._updates:
            update(self._sums if gradients is None else gradients)


class GraphedFunction:
    """A function of tensors to tensors that is captured once for each shape of its first argument, and then
    replayed. The first call with a shape is a plain one, which makes whatever is made once; what a call gives
    is valid until the next."""

    def __init__(self, function: Block, capture: Callable[[Block, Sequence[Tensor]], Captured]) -> None:
        self._function, self._capture = function, capture
        self._met: set[torch.Size] = set()
        self._captured: dict[torch.Size, tuple[list[Tensor], Captured]] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        shape = inputs[0].shape
        if shape not in self._met:
            self._met.add(shape)
            return self._function(*inputs)
        if shape not in self._captured:
            own = [tensor.clone() for tensor in inputs]
            self._captured[shape] = own, self._capture(self._function, own)
        own, (replay, outputs) = self._captured[shape]
        for to, value in zip(own, inputs, strict=True):
            to.copy_(value)
        replay()
        return outputs


_one_at_a_time = threading.Lock()


def capture(function: Block, inputs: Sequence[Tensor]) -> Captured:
    """A CUDA graph of what `function` does to `inputs` on the current stream."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    # A thread's first product makes this, which cannot be done within a graph.
    torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
    with _one_at_a_time, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph.replay, outputs


# By type of device; what is not here runs block after block as calls.
CAPTURE = {"cuda": capture}


@dataclasses.dataclass(eq=False)
class Job:
    """An epoch to run: an engine with the arguments of `run_epoch`, and in the end its result or error."""

    engine: CudaGraphsEngine
    order: Tensor
    interrupted: Sequence[object]
    on_progress: OnProgress
    result: tuple[Tensor, Tensor] | BaseException | None = None


RunJob: TypeAlias = Callable[[Job], tuple[Tensor, Tensor]]


def run_jobs(jobs: Sequence[Job], steps: Steps) -> list[tuple[Tensor, Tensor]]:
    """The epochs of all jobs, step by step together. `steps` is that of the one job, or a stack of them."""
    plan, count = jobs[0].engine.plan, len(jobs[0].order)
    sizes = plan.sizes(count)
    block = max(min(STEPS, ROWS // (plan.chunk * len(jobs))), 1) * plan.chunk
    done = complete = 0
    interrupted = False
    with steps.epoch([job.engine for job in jobs]):
        errors = torch.zeros(len(sizes), len(jobs), dtype=torch.float64, device=steps.device)
        metric_sums = [torch.zeros((), dtype=torch.float64, device=steps.device)] * len(jobs)
        orders = [_to(job.order, steps.device) for job in jobs]
        progress = _Progress(jobs, sizes)
        for first in range(0, count, block):
            interrupted = any(job.interrupted for job in jobs)
            if interrupted:
                break
            rows = slice(first, first + block)
            parts = [job.engine.samples[order[rows]] for job, order in zip(jobs, orders, strict=True)]
            x, d = map(_join, zip(*parts, strict=True))
            totals, outputs = steps.take(x, d)
            errors[done : done + len(totals)].copy_(totals.view(-1, len(jobs)))
            done += len(totals)
            complete = 0 if plan.mode == "batch" else done
            for k, (job, (_, own)) in enumerate(zip(jobs, parts, strict=True)):
                if (metric := job.engine.plan.metric) is not None:
                    its = outputs if len(jobs) == 1 else outputs[:, k]
                    metric_sums[k] = metric_sums[k] + metric.sum(its, own)
            if progress.due() and not progress.report(_read(errors[:done])):
                break
        else:
            if plan.mode == "batch":
                steps.update()
                complete = 1
        read, metric_sums = _read(errors[:done]), list(map(_read, metric_sums))
    for job in jobs:
        count_steps(job.engine.optimizer, job.engine.rule, complete)
    if interrupted:
        raise KeyboardInterrupt
    progress.report(read)
    losses = read.sum(0, keepdim=True) / count if plan.mode == "batch" else read / sizes[:done, None]
    return list(zip(losses.t().contiguous(), metric_sums, strict=True))


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), 1)


def _to(rows: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def _read(values: Tensor) -> Tensor:
    """The one place where the host waits for the device within an epoch."""
    return values.cpu()


class _Progress:
    """What has been reported of the jobs' sums of E."""

    def __init__(self, jobs: Sequence[Job], sizes: Tensor) -> None:
        self._jobs, self._sizes = jobs, sizes
        self._rows, self._totals = 0.0, torch.zeros(len(jobs), dtype=torch.float64, device="cpu")
        self._looked = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._looked >= LOOK

    def report(self, errors: Tensor) -> bool:
        """Tell of the chunks done so far; whether any job's are all finite."""
        self._looked = time.monotonic()
        rows, totals = self._sizes[: len(errors)].sum().item(), errors.sum(0)
        if rows > self._rows:
            means = (totals - self._totals) / (rows - self._rows)
            for job, mean in zip(self._jobs, means.tolist(), strict=True):
                job.on_progress(int(rows - self._rows), mean)
        self._rows, self._totals = rows, totals
        return bool(totals.isfinite().any())
