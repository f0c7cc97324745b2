"""Engines: what runs an epoch. `choose` is the one place that decides which.

    class               in           an epoch is                       takes
    AutogradEngine      autograd     PyTorch's operators, step by step any model, loss and optimizer
    NativeEngine        native       one call into C++, on the CPU     what _support and optimizer know
    CudaGraphsEngine    cuda_graphs  a few CUDA graphs, on a GPU       the same

An engine is made of a model, its data, a StepPlan and an optimizer. It knows nothing of epochs before or
after, nor of `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, device, nn

from mlpext.training._samples import Samples
from mlpext.training.engines._support import Unsupported
from mlpext.training.engines.autograd import AutogradEngine
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine, RunJob
from mlpext.training.engines.native import NativeEngine
from mlpext.training.engines.optimizer import Optimizer
from mlpext.training.engines.plan import OnProgress, StepPlan


class Engine(Protocol):
    """What the epoch loop needs of an engine."""

    # Whether modules run, which may put other buffers in place of their own.
    replaces_buffers: bool

    def run_epoch(
        self, order: Tensor, epoch: int, interrupted: Sequence[object], on_progress: OnProgress
    ) -> tuple[Tensor, Tensor]:
        """Visit the samples once in `order` (int64 row numbers), updating the model after each step. `epoch`
        is its number, from 1.

        Returns the mean E of each step, float64 (steps,), and the sum of the metric, both as the steps met
        the samples. Stops early once a loss is NaN or infinite. Raises KeyboardInterrupt between two steps
        once `interrupted` is not empty.
        """

    def rebuilt(self, samples: Samples) -> Engine:
        """The same engine with these samples, after a change of layers, options or buffers.

        Unsupported where it cannot train the model any more.
        """


# What engine="native" means, by the type of the model's device.
NATIVE: dict[str, Callable[..., Engine]] = {"cpu": NativeEngine, "cuda": CudaGraphsEngine}


def native_on(place: device) -> Callable[..., Engine]:
    """The engine that engine="native" means for a model on this device."""
    return NATIVE.get(place.type, NativeEngine)


def choose(
    name: str,
    model: nn.Module,
    samples: Samples,
    plan: StepPlan,
    optimizer: Optimizer,
    *,
    run_job: RunJob | None = None,
    before: Engine | None = None,
) -> Engine:
    """The engine for a run with engine=`name`; ValueError where "native" cannot train this.

    "auto" takes C++ where it can, else the PyTorch loop: CUDA graphs have not been measured yet. `before` is
    the engine so far, where callbacks or a checkpoint may have changed model and optimizer: it goes on as
    long as it can, and "auto" never comes back from the PyTorch loop. `run_job` is how CUDA graphs run beside
    those of other models, under fit_many.
    """
    parts: tuple[Any, ...] = (model, samples, plan, optimizer)
    try:
        if before is not None:
            return before.rebuilt(samples)
        native = native_on(samples.device)
        if name == "native" or (name == "auto" and native is NativeEngine):
            return native(*parts, *((run_job,) if native is CudaGraphsEngine else ()))
    except Unsupported as reason:
        if name == "native":
            raise ValueError(
                f"engine='native' cannot train this: {reason}; engine='auto' falls back"
            ) from None
    return AutogradEngine(*parts)
