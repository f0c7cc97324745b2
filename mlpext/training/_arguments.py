"""The arguments of `fit`: a record of them, their checks, and what is made of them (data, optimizer, config).

Every message names the argument that is wrong. Nothing here changes the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mlpext._names import MODES, did_you_mean
from mlpext.training._callbacks import Callback, as_calls
from mlpext.training._losses import Loss, loss_sum_of, shape_targets
from mlpext.training._metrics import MetricsArgument
from mlpext.training._modules import device_of, dtype_and_device
from mlpext.training._samples import Array, Samples
from mlpext.training._schedule import Schedule, ScheduleArgument, name_of
from mlpext.training._tables import Data, as_inputs, as_targets
from mlpext.training._weights import ClassWeight, weights_for
from mlpext.training.engines.optimizer import GradientDescent, Optimizer
from mlpext.training.engines.plan import StepPlan

Reduction: TypeAlias = Literal["mean", "sum"]
EngineName: TypeAlias = Literal["auto", "native", "autograd"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
ENGINES: tuple[str, ...] = get_args(EngineName)

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(eq=False)
class Arguments:
    """The arguments of one `fit`, by its names; see there."""

    model: nn.Module
    x: Data
    target: Data
    mode: str
    batch_size: int
    lr: float
    epochs: int
    loss: Loss
    reduction: str
    momentum: float
    weight_decay: float
    nesterov: bool
    l2: float
    clip_grad_norm: float | None
    schedule: ScheduleArgument | None
    sample_weight: Data | None
    class_weight: ClassWeight | None
    optimizer: torch.optim.Optimizer | MakeOptimizer | None
    validation: tuple[Data, Data] | float | None
    metrics: MetricsArgument | None
    shuffle: bool
    seed: int | None
    early_stopping: int | None
    callbacks: Sequence[Callback]
    checkpoint: str | os.PathLike[str] | None
    resume: bool | Sequence[str]
    log_dir: str | os.PathLike[str] | None
    progress: bool | tqdm
    device: torch.device | str | None
    engine: str

    def __post_init__(self) -> None:
        self.classes: list[str] | None = None  # the labels of class numbers that came as text

    def check(self) -> None:
        """Refuses what can be seen to be wrong without the data; integers become plain ones."""
        _one_of("mode", self.mode, MODES)
        _one_of("reduction", self.reduction, REDUCTIONS)
        _one_of("engine", self.engine, ENGINES)
        self.batch_size = count("batch_size", self.batch_size, 1)
        self.epochs = count("epochs", self.epochs, 0)
        if self.early_stopping is not None:
            self.early_stopping = count("early_stopping", self.early_stopping, 1)
            if self.validation is None:
                raise ValueError(
                    "early_stopping watches the validation loss: give validation=(x, d) or a fraction"
                )
        if self.resume and self.checkpoint is None:
            raise ValueError("resume=True needs checkpoint, the folder to continue from")
        self.calls = as_calls(self.callbacks)
        loss_sum_of(self.loss)
        if not isinstance(self.progress, (bool, tqdm)):
            raise TypeError(f"progress must be True, False or a tqdm bar, got {self.progress!r}")
        self.l2 = _at_least_zero("l2", self.l2)
        if self.clip_grad_norm is not None:
            self.clip_grad_norm = _at_least_zero("clip_grad_norm", self.clip_grad_norm)
            if self.clip_grad_norm == 0:
                raise ValueError("clip_grad_norm must be above 0: the longest that a gradient may be, got 0")

    def make_samples(self, generator: torch.Generator) -> tuple[Samples, Samples | None]:
        """The data to train on, and those to validate with."""
        target, self.classes = as_targets(self.target)
        samples = samples_for(self.model, self.x, target, self.loss)
        samples.weights = weights_for(samples, self.sample_weight, self.class_weight, self.classes)
        if self.validation is None:
            return samples, None
        if isinstance(self.validation, (tuple, list)) and len(self.validation) == 2:
            x, target = self.validation
            target, _ = as_targets(target, "validation target", self.classes)
            return samples, samples_for(self.model, x, target, self.loss, "validation ")
        return _hold_out(self.validation, samples, generator)

    def make_optimizer(self) -> tuple[Optimizer, dict[str, Any]]:
        """What updates the model's parameters, and its part of the run's configuration."""
        parameters = list(self.model.parameters())
        if any(parameter.is_inference() for parameter in parameters):
            raise ValueError("model was made in torch.inference_mode: its parameters can have no gradient")
        rates = {
            name: _at_least_zero(name, getattr(self, name)) for name in ("lr", "momentum", "weight_decay")
        }
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        optimizer = self.optimizer
        if optimizer is None:
            config = {"optimizer": None, **rates, **({"nesterov": True} if self.nesterov else {})}
            # torch's schedulers take torch's optimizers.
            descent: Any = GradientDescent if self.schedule is None else torch.optim.SGD
            return descent(parameters, **rates, nesterov=bool(self.nesterov)), config
        if self.momentum or self.weight_decay:
            raise ValueError(
                "momentum and weight_decay belong to the optimizer when one is given: set them there"
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            if not callable(optimizer):
                raise TypeError(
                    "optimizer must be a torch.optim.Optimizer or a function that makes one from parameters, "
                    f"got {type(optimizer).__name__}"
                )
            optimizer = optimizer(parameters)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    f"optimizer must return a torch.optim.Optimizer, it returned {type(optimizer).__name__}"
                )
        updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if updated.isdisjoint(map(id, parameters)):
            raise ValueError("optimizer holds none of the model's parameters")
        return optimizer, {"optimizer": type(optimizer).__name__, **_settings(optimizer)}

    def make_schedule(self, optimizer: Optimizer) -> Schedule | None:
        """What changes the learning rate after each epoch."""
        if self.schedule is None:
            return None
        assert isinstance(optimizer, torch.optim.Optimizer)
        return Schedule(self.schedule, optimizer, self.epochs)

    def make_config(
        self, samples: Samples, held_out: Samples | None, plan: StepPlan, optimizer: dict[str, Any]
    ) -> dict[str, Any]:
        """What `history.config` says of the run. A run that resumes another must have the same."""
        loss, model = self.loss, self.model
        rest: dict[str, Any] = {
            "l2": self.l2,
            "clip_grad_norm": self.clip_grad_norm,
            "schedule": None if self.schedule is None else name_of(self.schedule),
            "weighted": samples.weights is not None,
            "classes": self.classes,
        }
        return {
            "mode": self.mode,
            "samples_per_update": plan.step_size,
            "epochs": self.epochs,
            "loss": loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__qualname__),
            "reduction": self.reduction,
            **optimizer,
            "shuffle": bool(self.shuffle),
            "seed": self.seed,
            "early_stopping": self.early_stopping,
            "samples": len(samples),
            "validation_samples": 0 if held_out is None else len(held_out),
            "x": samples.shapes[0],
            "target": samples.shapes[1],
            "model": re.sub(
                r" at 0x[0-9a-fA-F]+", "", str(model)
            ),  # an address is another in another process
            "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
            "dtype": str(samples.dtype),
            **{name: value for name, value in rest.items() if value},  # of what was asked for alone
        }


@contextlib.contextmanager
def anywhere(model: nn.Module, device: torch.device | str | None = None) -> Iterator[torch.device]:
    """Within it training is the same wherever it is called: gradients are on, autocast is off, and tensors
    are made on the model's device, whatever the caller has set of these or of inference_mode. Gives that
    device, which is `device` if that is not None."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    device = device_of(model) if device is None else torch.device(device)
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # A default device is a function mode; without any of these there is no need to ask for it, in 3 us.
        if torch._C._len_torch_function_stack() and torch.get_default_device() not in (
            torch.device("cpu"),
            device,
        ):
            stack.enter_context(device)
        yield device


def samples_for(model: nn.Module, x: Data, target: Array, loss: Loss, name: str = "") -> Samples:
    """The data as the model takes it: in the dtype and on the device of its first floating-point weight."""
    dtype, device = dtype_and_device(model)
    x, classes = as_inputs(x, f"{name}x"), loss != "binary_cross_entropy"
    samples = Samples(x, target, dtype=dtype, device=device, name=name, classes=classes)
    shape_targets(model, samples, loss, name)
    return samples


def _hold_out(fraction: Any, samples: Samples, generator: torch.Generator) -> tuple[Samples, Samples]:
    """All but a random share of the samples, and that share, each in their old order."""
    if not _is_number(fraction) or not 0 < fraction < 1:
        raise ValueError(
            f"validation must be (x, d), a fraction between 0 and 1, or None, got {_brief(fraction)}"
        )
    held_out = round(float(fraction) * len(samples))
    if not 0 < held_out < len(samples):
        raise ValueError(
            f"validation={fraction} of {len(samples)} samples leaves none to validate or none to train on"
        )
    rows = torch.randperm(len(samples), generator=generator, device="cpu")
    return samples.subset(rows[held_out:].sort().values), samples.subset(rows[:held_out].sort().values)


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers that an optimizer was made with, as JSON gives them back."""
    settings: dict[str, Any] = {}
    for name, value in optimizer.defaults.items():
        if isinstance(value, (tuple, list)):
            settings[name] = [float(number) for number in value]
        elif value is not None and name not in ("foreach", "fused"):
            settings[name] = value.item() if isinstance(value, Tensor) else value
    return {name: value for name, value in settings.items() if isinstance(value, (bool, int, float, list))}


def check_same_run(
    saved: dict[str, Any], config: dict[str, Any], where: str, but: Sequence[str] = ()
) -> None:
    """Refuses a checkpoint of another run, by what differs in the two configurations `but` these names."""
    differences = [
        f"{name} is {config.get(name)!r} here and {saved.get(name)!r} there"
        for name in dict.fromkeys([*config, *saved])
        if name not in ("epochs", *but) and config.get(name) != saved.get(name)
    ]
    if differences:
        raise ValueError(f"cannot resume, because {where} is of another run: {'; '.join(differences)}")


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(
            f"{name} must be one of {', '.join(accepted)}, got {_brief(value)}"
            + did_you_mean(value, accepted)
        )


def count(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """`value` as a plain int; numpy's integers and tensors of no dimension are integers too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {_brief(value)}")
    if not least <= number <= most:
        raise ValueError(
            f"{name} must be {least} or more{f', at most {most}' if most < math.inf else ''}, got {number}"
        )
    return number


def _at_least_zero(name: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {_brief(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and 0 or more, got {value}")
    return float(value)


def _is_number(value: object) -> bool:
    if type(value) in (float, int):
        return True
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and _is_number(value.item())
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _brief(value: object) -> str:
    return f"{value!r}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
