"""Epochs on a GPU: steps in CUDA graphs. What a step does is PyTorch's operators, which run anywhere.

A graph holds a block of steps, so that the host starts a few kernels a block instead of some twenty a step,
and waits for nothing within an epoch: losses stay on the device, and are read at its end, or ten times a
second for progress. Without a GPU the same blocks are calls, which the tests hold against descent.run_epoch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mlpext.training import _losses as objective
from mlpext.training._samples import Samples
from mlpext.training.engines import native as engine
from mlpext.training.engines.autograd import Descent, Plan

# A graph has so many steps, or fewer where these would be more rows than so many.
STEPS, ROWS = 32, 16384
# Seconds between two looks at the losses.
LOOK = 0.1

Block: TypeAlias = Callable[..., tuple[Tensor, Tensor]]
# What a function leaves behind once it is captured: how to run it again, and where its results then lie.
Captured: TypeAlias = tuple[Callable[[], object], tuple[Tensor, Tensor]]


class Network:
    """As engine.Network, of a model on any device; with the steps of its epochs, and so their graphs."""

    def __init__(self, model: nn.Module, samples: Samples, plan: Plan, descent: Descent) -> None:
        self._of = (model, plan, descent)
        layers = engine.layers_of(model, next(model.parameters()).device)
        engine.check_rows(samples, plan, layers[0])
        self.model = model
        self.rule, states = engine.rule_and_states(descent, layers)
        self.layers = [engine.describe(layer, states) for layer in layers]
        self.trained = engine.trained_of(layers)
        # By kind: the velocities of all weights, say.
        self.states = [
            list(kind) for kind in zip(*(states.get(id(w), ()) for w in self.trained), strict=True)
        ]
        update = Update(self.rule, self.trained, self.states)
        self.steps = Steps(model, plan.total, self.trained, [update], plan, len(samples))

        # What would be wrong in the graphs, were it another.
        bound = {name: value for name, value in self.rule.items() if name not in _free(self.trained)}
        self._taken_for_granted = bound, _identity(tuple(self.layers))

    def renewed(self, samples: Samples) -> Network:
        """The same with these samples after a change of layers, options or buffers; with its graphs where
        they still hold."""
        model, plan, descent = self._of
        other = Network(model, samples, plan, descent)
        if other._taken_for_granted == self._taken_for_granted:
            other.steps = self.steps
        return other


def _identity(part: Any) -> Any:
    """What tells a tensor in a graph from another; other things are compared as they are."""
    if isinstance(part, tuple):
        return tuple(map(_identity, part))
    return (id(part), part.data_ptr(), part.requires_grad) if isinstance(part, Tensor) else part


def _free(weights: Sequence[Tensor]) -> tuple[str, ...]:
    """The numbers of a rule that kernels read from the device. torch's kernels read lr there in float32
    alone; in float64 it is a number in the graph, and another lr makes another graph."""
    return ("steps", "lr") if weights[0].dtype == torch.float32 else ("steps",)


class Update:
    """An engine's rule on torch's fused kernels: one launch, two for Adam. Of stacks of several networks'
    weights it moves those of `members`, or all."""

    def __init__(
        self,
        rule: dict[str, Any],
        weights: Sequence[Tensor],
        states: Sequence[Sequence[Tensor]],
        members: Sequence[int] | None = None,
    ) -> None:
        self.members = members
        self._rule = rule
        self._weights = self._own(weights)
        self._states = [self._own(kind) for kind in states]
        self._steps = torch.zeros((), dtype=torch.float32, device=weights[0].device)
        self._lr = torch.zeros_like(self._steps) if "lr" in _free(weights) else rule["lr"]

    def _own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = [tensor.detach() for tensor in tensors]
        return tensors if self.members is None else [t[member] for t in tensors for member in self.members]

    def begin(self, rule: dict[str, Any]) -> None:
        """An epoch under this rule, which differs in nothing but its free numbers."""
        self._steps.fill_(rule.get("steps", 0))
        if isinstance(self._lr, Tensor):
            self._lr.fill_(rule["lr"])

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        rule, gradients = self._rule, self._own([gradient.contiguous() for gradient in gradients])
        options: dict[str, Any] = {"lr": self._lr, "weight_decay": rule["weight_decay"], "maximize": False}
        if rule["kind"] == "descent":
            options |= {"momentum": rule["momentum"], "nesterov": rule["nesterov"], "dampening": 0.0}
            velocity = self._states[0] if rule["momentum"] else []
            torch._fused_sgd_(self._weights, gradients, velocity, is_first_step=False, **options)
        else:
            options |= {"beta1": rule["betas"][0], "beta2": rule["betas"][1], "eps": rule["eps"]}
            self._steps.add_(1)
            steps = [self._steps] * len(gradients)
            fused: Any = torch._fused_adam_ if rule["kind"] == "adam" else torch._fused_adamw_
            fused(self._weights, gradients, *self._states, [], steps, amsgrad=False, **options)


class Steps:
    """Blocks of rows, taken through `forward` a chunk at a time. An update follows each chunk; in batch mode
    their gradients are added up."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        total: Callable[[Tensor, Tensor], Tensor],
        weights: Sequence[Tensor],
        updates: list[Update],
        plan: Plan,
        samples: int,
    ) -> None:
        self._forward, self._total, self._weights, self._updates = forward, total, weights, updates
        self._plan, self._samples = plan, samples
        self.device = weights[0].device
        on_gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._sums = [torch.zeros_like(weight) for weight in weights] if plan.mode == "batch" else []
        capture = CAPTURE.get(self.device.type)
        self.take: Block = self._take if capture is None else Replayed(self._take, capture)

    @contextlib.contextmanager
    def epoch(self, networks: Sequence[Network]) -> Iterator[None]:
        """Room for an epoch of these networks, on a stream that can be captured."""
        # As the engine in C++, it knows no autocast, whose copies of weights would outlive their update.
        with self._on_stream(), torch.autocast(self.device.type, enabled=False):
            for update in self._updates:
                update.begin(networks[update.members[0] if update.members else 0].rule)
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
        chunk = self._plan.chunk
        outputs = []
        for inputs, targets in zip(torch.split(x, chunk), torch.split(d, chunk), strict=True):
            with torch.enable_grad():
                output = self._forward(inputs)
            own = output.detach()
            slope = objective.gradient(self._plan.total, own, targets) * self._scale(len(inputs))
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
            totals.append(torch.vmap(self._total)(*chunks))
        if whole < len(output):
            totals.append(self._total(output[whole:], d[whole:]).unsqueeze(0))
        return torch.cat(totals)

    def _scale(self, rows: int) -> float:
        """What a step of so many rows minimises is the sum of E times this."""
        return 1 / (self._samples if self._sums else rows) if self._plan.mean else 1.0

    def update(self, gradients: Sequence[Tensor] | None = None) -> None:
        """Move the weights; without gradients, by those added up."""
        for update in self._updates:
            update(self._sums if gradients is None else gradients)


class Stack(Steps):
    """The steps of several networks of one shape, each with samples of its own, as batched products.

    Rows, outputs and losses have the networks as their second dimension, weights as their first.
    """

    def __init__(self, networks: Sequence[Network], plan: Plan, samples: int) -> None:
        first = copy.deepcopy(networks[0].model)
        named = dict(first.named_parameters())
        with torch.no_grad():
            stacked = {
                name: torch.stack([network.model.get_parameter(name) for network in networks])
                for name in named
            }
        weights = [stacked[name].requires_grad_() for name, weight in named.items() if weight.requires_grad]
        states = [[torch.zeros_like(w, requires_grad=False) for w in weights] for _ in networks[0].states]
        everything = [*stacked.values(), *itertools.chain(*states)]
        self._parts = [tensor.detach()[k] for k in range(len(networks)) for tensor in everything]
        updates = [
            Update(networks[own[0]].rule, weights, states, own if len(own) < len(networks) else None)
            for own in alike([network.rule for network in networks])
        ]

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(first, parameters, (x,))  # type: ignore[no-any-return]

        every = torch.vmap(one, (0, 1), 1)
        total = torch.vmap(plan.total, 1)
        super().__init__(lambda x: every(stacked, x), total, weights, updates, plan, samples)

    @contextlib.contextmanager
    def epoch(self, networks: Sequence[Network]) -> Iterator[None]:
        """As Steps.epoch; the networks have their new weights and buffers at its end."""
        theirs = [
            tensor.detach()
            for network in networks
            for tensor in (*network.model.parameters(), *itertools.chain(*network.states))
        ]
        with super().epoch(networks):
            torch._foreach_copy_(self._parts, theirs)
            try:
                yield
            finally:
                torch._foreach_copy_(theirs, self._parts)


def alike(things: Sequence[object]) -> list[list[int]]:
    """The places of things that are the same, place by place."""
    places: list[list[int]] = []
    for k, thing in enumerate(things):
        for same in places:
            if things[same[0]] == thing:
                same.append(k)
                break
        else:
            places.append([k])
    return places


class Replayed:
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
    """An epoch to run: the arguments of run_epoch, and in the end its result or error."""

    network: Network
    samples: Samples
    order: Tensor
    plan: Plan
    descent: Descent
    interrupted: Sequence[object]
    advance: Callable[[int, float], object]
    result: tuple[Tensor, Tensor] | BaseException | None = None

    def kind(self) -> tuple[object, ...]:
        """What jobs that go as one stack have in common."""
        layers = [
            (name, params, w.shape, w.requires_grad, None if b is None else b.requires_grad)
            for w, b, name, params, *_ in self.network.layers
        ]
        plan = self.plan.mode, self.plan.step_size, self.plan.mean, self.plan.total
        weight = self.network.trained[0]
        rows = len(self.order), self.samples.one_hot, *self.samples.shapes
        return layers, plan, weight.dtype, weight.device, rows, len(self.network.states)


def run_epoch(
    network: Network,
    samples: Samples,
    order: Tensor,
    plan: Plan,
    descent: Descent,
    interrupted: Sequence[object],
    advance: Callable[[int, float], object],
) -> tuple[Tensor, Tensor]:
    """As descent.run_epoch, to rounding, for the model that `network` describes; but progress, Ctrl-C and
    losses that are NaN or infinite are looked at between blocks of steps, the losses ten times a second."""
    job = Job(network, samples, order, plan, descent, interrupted, advance)
    group: Group | None = getattr(_thread, "group", None)
    return _run([job], network.steps)[0] if group is None else group.run(job)


def _run(jobs: list[Job], steps: Steps) -> list[tuple[Tensor, Tensor]]:
    """The epochs of all jobs, step by step together."""
    plan, count = jobs[0].plan, len(jobs[0].order)
    sizes = plan.sizes(count)
    block = max(min(STEPS, ROWS // (plan.chunk * len(jobs))), 1) * plan.chunk
    done = complete = 0
    interrupted = False
    with steps.epoch([job.network for job in jobs]):
        errors = torch.zeros(len(sizes), len(jobs), dtype=torch.float64, device=steps.device)
        scores = [torch.zeros((), dtype=torch.float64, device=steps.device)] * len(jobs)
        orders = [_to(job.order, steps.device) for job in jobs]
        progress = _Progress(jobs, sizes)
        for first in range(0, count, block):
            interrupted = any(job.interrupted for job in jobs)
            if interrupted:
                break
            rows = slice(first, first + block)
            parts = [job.samples[order[rows]] for job, order in zip(jobs, orders, strict=True)]
            x, d = map(_join, zip(*parts, strict=True))
            totals, outputs = steps.take(x, d)
            errors[done : done + len(totals)].copy_(totals.view(-1, len(jobs)))
            done += len(totals)
            complete = 0 if plan.mode == "batch" else done
            for k, (job, (_, own)) in enumerate(zip(jobs, parts, strict=True)):
                if job.plan.metric is not None:
                    its = outputs if len(jobs) == 1 else outputs[:, k]
                    scores[k] = scores[k] + job.plan.metric.score(its, own)
            if progress.due() and not progress.report(_read(errors[:done])):
                break
        else:
            if plan.mode == "batch":
                steps.update()
                complete = 1
        read, scores = _read(errors[:done]), list(map(_read, scores))
    for job in jobs:
        engine.count_steps(job.descent, job.network.rule, complete)
    if interrupted:
        raise KeyboardInterrupt
    progress.report(read)
    losses = read.sum(0, keepdim=True) / count if plan.mode == "batch" else read / sizes[:done, None]
    return list(zip(losses.t().contiguous(), scores, strict=True))


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), 1)


def _to(rows: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def _read(values: Tensor) -> Tensor:
    """The one place where the host waits for the device within run_epoch."""
    return values.cpu()


class _Progress:
    """What has been reported of the jobs' sums of E."""

    def __init__(self, jobs: list[Job], sizes: Tensor) -> None:
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
                job.advance(int(rows - self._rows), mean)
        self._rows, self._totals = rows, totals
        return bool(totals.isfinite().any())


class Group:
    """Threads that run one epoch each, which go together: the last to come runs all, those of one kind as a
    stack."""

    def __init__(self, threads: int) -> None:
        self._change = threading.Condition()
        self._threads = threads
        self._waiting: dict[int, Job] = {}
        self._stacks: dict[object, tuple[Stack, list[Steps]]] = {}

    @contextlib.contextmanager
    def member(self, place: int) -> Iterator[None]:
        """This thread as one of them; in a stack the networks go by their places."""
        _thread.group, _thread.place = self, place
        try:
            yield
        finally:
            del _thread.group, _thread.place
            with self._change:
                self._threads -= 1
                self._run_if_all_wait()

    def run(self, job: Job) -> tuple[Tensor, Tensor]:
        """The result of `job`, once all have come."""
        with self._change:
            self._waiting[_thread.place] = job
            self._run_if_all_wait()
            while job.result is None:
                if job.interrupted:
                    del self._waiting[_thread.place]
                    raise KeyboardInterrupt
                self._change.wait(LOOK)
        if isinstance(job.result, BaseException):
            raise job.result
        return job.result

    def _run_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._threads:
            return
        jobs = [job for _, job in sorted(self._waiting.items())]
        self._waiting = {}
        before, self._stacks = self._stacks, {}
        for places in alike([job.kind() for job in jobs]):
            own = [jobs[place] for place in places]
            results: Sequence[tuple[Tensor, Tensor] | BaseException]
            try:
                results = _run(own, own[0].network.steps if len(own) == 1 else self._stack(own, before))
            except BaseException as error:  # each thread raises it
                results = [error] * len(own)
            for job, result in zip(own, results, strict=True):
                job.result = result
        self._change.notify_all()

    def _stack(self, jobs: list[Job], before: dict[object, tuple[Stack, list[Steps]]]) -> Stack:
        """The stack of these jobs' networks: that of the last epoch, where nothing that it holds changed."""
        networks = [job.network for job in jobs]
        steps = [network.steps for network in networks]  # kept: another has another id
        key = (*map(id, steps), str(alike([network.rule for network in networks])))
        known = before.get(key)
        stack = known[0] if known else Stack(networks, jobs[0].plan, len(jobs[0].order))
        self._stacks[key] = stack, steps
        return stack


# Of a thread of fit_many: its group, and its place there.
_thread = threading.local()
