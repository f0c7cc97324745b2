"""fit_many on a GPU: the models of its threads are trained together, those of one shape as batched products.

Each thread runs a whole `fit` of its own and comes here once an epoch. The last to come runs the epochs of
all, while the others wait.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlpext.training.engines import cuda_graphs
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine, Job, RunJob, Steps, Update, run_jobs
from mlpext.training.engines.plan import StepPlan


class Stack(Steps):
    """The steps of several engines of one shape, each with samples of its own, as batched products.

    Rows, outputs and losses have the models as their second dimension, weights as their first.
    """

    def __init__(self, engines: Sequence[CudaGraphsEngine], plan: StepPlan, samples: int) -> None:
        first = copy.deepcopy(engines[0].model)
        named = dict(first.named_parameters())
        with torch.no_grad():  # torch.func.stack_module_state would refuse an MLP beside a Sequential
            stacked = {
                name: torch.stack([engine.model.get_parameter(name) for engine in engines]) for name in named
            }
        weights = [stacked[name].requires_grad_() for name, weight in named.items() if weight.requires_grad]
        states = [[torch.zeros_like(w, requires_grad=False) for w in weights] for _ in engines[0].states]
        everything = [*stacked.values(), *itertools.chain(*states)]
        self._parts = [tensor.detach()[k] for k in range(len(engines)) for tensor in everything]
        updates = [
            Update(engines[own[0]].rule, weights, states, own if len(own) < len(engines) else None)
            for own in group_equal([engine.rule for engine in engines])
        ]

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(first, parameters, (x,))  # type: ignore[no-any-return]

        every = torch.vmap(one, (0, 1), 1)
        loss_sum = torch.vmap(plan.loss_sum, 1)
        super().__init__(lambda x: every(stacked, x), loss_sum, weights, updates, plan, samples)

    @contextlib.contextmanager
    def epoch(self, engines: Sequence[CudaGraphsEngine]) -> Iterator[None]:
        """As Steps.epoch; the models have their new weights and buffers at its end."""
        theirs = [
            tensor.detach()
            for engine in engines
            for tensor in (*engine.model.parameters(), *itertools.chain(*engine.states))
        ]
        with super().epoch(engines):
            torch._foreach_copy_(self._parts, theirs)
            try:
                yield
            finally:
                torch._foreach_copy_(theirs, self._parts)


def group_equal(things: Sequence[object]) -> list[list[int]]:
    """The places of things that are equal, group by group."""
    places: list[list[int]] = []
    for k, thing in enumerate(things):
        for same in places:
            if things[same[0]] == thing:
                same.append(k)
                break
        else:
            places.append([k])
    return places


def _kind(job: Job) -> tuple[object, ...]:
    """What jobs that go as one stack have in common."""
    engine = job.engine
    layers = [
        (
            layer.activation,
            layer.gated,
            layer.params,
            layer.weight.shape,
            layer.weight.requires_grad,
            None if layer.bias is None else layer.bias.requires_grad,
        )
        for layer in engine.layers
    ]
    plan = engine.plan.mode, engine.plan.step_size, engine.plan.mean, engine.plan.loss_sum
    weight = engine.trained[0]
    rows = len(job.order), engine.samples.one_hot, *engine.samples.shapes
    return layers, plan, weight.dtype, weight.device, rows, len(engine.states)


class Group:
    """Threads that run one epoch each, which go together: the last to come runs all, those of one kind as a
    stack."""

    def __init__(self, threads: int) -> None:
        self._change = threading.Condition()
        self._threads = threads
        self._waiting: dict[int, Job] = {}
        self._stacks: dict[object, tuple[Stack, list[Steps]]] = {}

    @contextlib.contextmanager
    def member(self, place: int) -> Iterator[RunJob]:
        """How one of the threads runs an epoch, as long as it takes part; in a stack the models go by their
        places."""
        try:
            yield functools.partial(self._run, place)
        finally:
            with self._change:
                self._threads -= 1
                self._run_if_all_wait()

    def _run(self, place: int, job: Job) -> tuple[Tensor, Tensor]:
        """The result of `job`, once all have come."""
        with self._change:
            self._waiting[place] = job
            self._run_if_all_wait()
            while job.result is None:
                if job.interrupted:
                    del self._waiting[place]
                    raise KeyboardInterrupt
                self._change.wait(cuda_graphs.LOOK)
        if isinstance(job.result, BaseException):
            raise job.result
        return job.result

    def _run_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._threads:
            return
        jobs = [job for _, job in sorted(self._waiting.items())]
        self._waiting = {}
        before, self._stacks = self._stacks, {}
        for places in group_equal([_kind(job) for job in jobs]):
            own = [jobs[place] for place in places]
            results: Sequence[tuple[Tensor, Tensor] | BaseException]
            try:
                results = run_jobs(own, own[0].engine.steps if len(own) == 1 else self._stack(own, before))
            except BaseException as error:  # each thread raises it
                results = [error] * len(own)
            for job, result in zip(own, results, strict=True):
                job.result = result
        self._change.notify_all()

    def _stack(self, jobs: list[Job], before: dict[object, tuple[Stack, list[Steps]]]) -> Stack:
        """The stack of these jobs' models: that of the last epoch, where nothing that it holds changed."""
        engines = [job.engine for job in jobs]
        steps = [engine.steps for engine in engines]  # kept: another has another id
        key = (*map(id, steps), str(group_equal([engine.rule for engine in engines])))
        known = before.get(key)
        stack = known[0] if known else Stack(engines, engines[0].plan, len(jobs[0].order))
        self._stacks[key] = stack, steps
        return stack
