"""One epoch in C++: what it serves, and the way there. descent.run_epoch is the same epoch in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mlpext import _C
from mlpext.nn import MLP, LinearActivation, Maxout
from mlpext.training import _losses as objective
from mlpext.training._samples import BLOCK, Samples
from mlpext.training.engines.autograd import Descent, GradientDescent, Plan

Layer: TypeAlias = "LinearActivation | Maxout"
LOSSES: dict[Any, str] = {objective.squared_error: "squared_error", objective.cross_entropy: "cross_entropy"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OPTIMIZERS: dict[type, str] = {
    torch.optim.SGD: "descent",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}


def _functions(kind: type) -> dict[str, Any]:
    """What is called when a module runs or an optimizer steps, by name. `step` is the function within what
    torch wraps around it, once, to profile it."""
    names = ("step", "zero_grad") if kind in OPTIMIZERS else (*CALLED, "_weight_and_bias")
    found = {name: getattr(kind, name) for name in names if hasattr(kind, name)}
    if getattr(found.get("step"), "hooked", False):
        found["step"] = found["step"].__wrapped__
    return found


CALLED = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
# As they are when this is imported: somebody may put others in their place.
KNOWN = {kind: _functions(kind) for kind in (MLP, nn.Sequential, LinearActivation, Maxout, *OPTIMIZERS)}


class Refused(Exception):
    """Why the native engine does not serve."""


class Network:
    """What epochs in C++ know of model, data and optimizer. Refused where they are not what it serves.

    Made once a run, because an epoch of few samples takes no longer than looking all of this up. A change of
    layers, options or buffers, as by a callback, needs another.
    """

    def __init__(self, model: nn.Module, samples: Samples, plan: Plan, descent: Descent) -> None:
        self._of = (model, plan, descent)
        layers = layers_of(model, torch.device("cpu"))
        check_rows(samples, plan, layers[0])
        self.rule, states = rule_and_states(descent, layers)
        self.layers = [describe(layer, states) for layer in layers]
        self.dtype = layers[0].weight.dtype

    def renewed(self, samples: Samples) -> Network:
        """The same after such a change, with these samples."""
        model, plan, descent = self._of
        return Network(model, samples, plan, descent)


def run_epoch(
    network: Network,
    samples: Samples,
    order: Tensor,
    plan: Plan,
    descent: Descent,
    interrupted: Sequence[object],
    advance: Callable[[int, float], object],
) -> tuple[Tensor, Tensor]:
    """As descent.run_epoch, to rounding, for the model that `network` describes; but a loss that is NaN or
    infinite stops it at once."""
    resident = samples.resident(network.dtype)
    count = len(order)
    losses = torch.empty(-(-count // plan.step_size), dtype=torch.float64, device="cpu")
    whole_steps = max(BLOCK // plan.step_size, 1) * plan.step_size
    block = count if resident else min(count, BLOCK if plan.mode == "batch" else whole_steps)
    outputs = None
    if plan.metric is not None:
        outputs = torch.empty(block, *samples.outputs, dtype=network.dtype, device="cpu")
    score = torch.zeros((), dtype=torch.float64, device="cpu")
    seen: list[Tensor] = []  # the targets of the block under way

    def add_score() -> None:
        nonlocal score
        if plan.metric is not None and outputs is not None:
            for d in seen:
                score = score + plan.metric.score(outputs[: len(d)], d)
        seen.clear()

    def fetch(first: int, rows: int) -> tuple[Tensor, Tensor]:
        add_score()
        x, d = samples[order[first : first + rows]]
        seen.append(d)
        return x, d

    reported, total = 0, 0.0

    def poll(done: int, error: float) -> bool:
        nonlocal reported, total
        advance(done - reported, (error - total) / (done - reported))
        reported, total = done, error
        return not interrupted

    x = d = None
    if resident is not None:
        x, d, rows = resident
        order = order if rows is None else rows[order]
    steps, stopped = _C.run_epoch(
        layers=network.layers,
        rule=network.rule,
        loss=LOSSES[plan.total],
        mean=plan.mean,
        samples=count,
        step_size=plan.step_size,
        x=x,
        d=d,
        order=order.contiguous(),
        fetch=None if resident else fetch,
        block_size=block,
        losses=losses,
        outputs=outputs,
        poll=poll,
    )
    count_steps(descent, network.rule, steps)
    if stopped:
        raise KeyboardInterrupt
    losses = losses[:steps]
    if d is not None and plan.metric is not None and math.isfinite(losses[-1]):
        seen.append(d.index_select(0, order))
    add_score()
    if reported < count:
        done = min(steps * plan.step_size, count)
        error = float(losses.sum()) * plan.step_size  # of the bar only: the last step may be shorter
        advance(done - reported, max(error - total, 0.0) / (done - reported))
    return losses, score


def layers_of(model: nn.Module, device: torch.device) -> list[Layer]:
    """The layers of a network on `device` that the engine can run as it stands. Refused for every way to be
    another function, or to be trained otherwise, than layers in a row of their own parameters."""
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise Refused("torch has global module hooks")
    if _get_current_dispatch_mode_stack():
        raise Refused("a torch dispatch mode is at work, which would see nothing of it")
    modules: list[nn.Module | None] = [model]
    if type(model) in (MLP, nn.Sequential):
        _check_module(model)
        modules = list(model._modules.values())  # children() leaves out a module that stands there again
    layers: list[Layer] = []
    for module in modules:
        if type(module) not in (LinearActivation, Maxout):
            raise Refused(
                f"model has a {type(module).__name__}; it takes LinearActivation and Maxout layers in a row"
            )
        _check_module(module)
        layers.append(module)  # type: ignore[arg-type]
    if not layers:
        raise Refused("model has no layer")
    if len({id(layer) for layer in layers}) < len(layers):
        raise Refused("a layer stands twice in the model")
    places: list[tuple[int, int, str]] = []  # where each parameter's memory begins and ends
    first = parameters_of(layers[0])[0]
    for layer in layers:
        for name, parameter in zip(("weight", "bias"), parameters_of(layer), strict=True):
            if parameter is None and name == "bias":
                continue
            if type(parameter) is not nn.Parameter:
                raise Refused(f"a layer's {name} is a {type(parameter).__name__}, not a Parameter")
            if parameter.device != device or parameter.dtype not in (torch.float32, torch.float64):
                raise Refused(
                    f"a {name} is {parameter.dtype} on {parameter.device}, not float32/64 on {device}"
                )
            if parameter.dtype != first.dtype:
                raise Refused(f"weights of {first.dtype} and {parameter.dtype} are mixed")
            if not parameter.is_contiguous() or parameter.numel() == 0 or parameter.is_neg():
                raise Refused(f"a {name} is empty, or not contiguous")
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise Refused(f"a {name} has gradient hooks")
            begin = parameter.data_ptr()
            places.append((begin, begin + parameter.numel() * parameter.element_size(), name))
        if isinstance(layer, LinearActivation) and not _C.has_kernel(
            layer.activation, tuple(layer.params.values())
        ):
            raise Refused(f"{layer.activation} with {layer.params} runs on torch's operators")
    for (_, end, _), (begin, _, name) in pairwise(sorted(places)):
        if begin < end:
            raise Refused(f"a {name} shares memory with another parameter")
    for before, after in pairwise(layers):
        if before.weight.shape[-2] != after.weight.shape[-1]:
            raise Refused("the layers do not fit one another")
    return layers


def parameters_of(layer: Layer) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias, as the layer's forward finds them."""
    weight, bias = layer._weight_and_bias()
    return weight, bias  # type: ignore[return-value]


def _check_module(module: nn.Module | None) -> None:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise Refused(f"{type(module).__name__} has hooks")
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise Refused(f"{type(module).__name__} is compiled")
    _check_functions(module)


def _check_functions(thing: object) -> None:
    """Refuses an object that has functions of its own in place of its class's, or whose class was patched."""
    known = KNOWN[type(thing)]
    for name in known.keys() & vars(thing).keys():
        if name != "step" or not _only_counts(vars(thing)["step"], known["step"]):
            raise Refused(f"the {type(thing).__name__} has a {name} of its own")
    if _functions(type(thing)) != known:
        raise Refused(f"{type(thing).__name__} has other functions than it came with")


def _only_counts(step: Any, known: Any) -> bool:
    """Whether this is what a learning-rate scheduler puts around an optimizer's `step`, to see it called."""
    inner = getattr(step, "__wrapped__", None)
    return getattr(step, "_wrapped_by_lr_sched", False) and getattr(inner, "__wrapped__", inner) is known


def check_rows(samples: Samples, plan: Plan, first: Layer) -> None:
    """Refuses data, loss and ranks that it does not serve."""
    if plan.ranks.size > 1:
        raise Refused(
            f"{plan.ranks.size} ranks add up their gradients at every step, for which it has no place"
        )
    if plan.total not in LOSSES:
        raise Refused("loss is a function; it takes the names " + ", ".join(LOSSES.values()))
    x, d = samples.shapes
    if len(x) != 2 or len(samples.outputs) != 1 or len(d) > 2:
        raise Refused(f"x has shape {tuple(x)} and target {tuple(d)}; it takes (N, n0) and (N,) or (N, n)")
    if x[1] != first.weight.shape[-1]:
        raise Refused(f"x has {x[1]} columns, the first layer takes {first.weight.shape[-1]}")


def describe(layer: Layer, states: dict[int, tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Weight, bias, name and parameters of the activation, and the optimizer's buffers of the two."""
    weight, bias = parameters_of(layer)
    name, params = ("maxout", ()) if isinstance(layer, Maxout) else (layer.activation, layer.params.values())
    return (
        weight,
        bias,
        name,
        tuple(params),
        states.get(id(weight), ()),
        states.get(id(bias), ()),
    )


def trained_of(layers: list[Layer]) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for layer in layers for p in parameters_of(layer) if p is not None and p.requires_grad]


def rule_and_states(
    descent: Descent, layers: list[Layer]
) -> tuple[dict[str, Any], dict[int, tuple[Tensor, ...]]]:
    """The update rule, and the optimizer's buffers of each parameter that it moves (made where missing)."""
    trained = trained_of(layers)
    if isinstance(descent, GradientDescent):
        if {id(p) for p in trained} != {id(p) for p in descent.parameters if p.requires_grad}:
            raise Refused("the optimizer does not hold exactly the parameters that require a gradient")
        rule = {"kind": "descent", "nesterov": descent.nesterov}
        rule |= {name: getattr(descent, name) for name in ("lr", "momentum", "weight_decay")}
        states: dict[int, tuple[Tensor, ...]] = {}
        if descent.momentum:
            for k, parameter in enumerate(descent.parameters):
                if not parameter.requires_grad:
                    continue
                velocity = descent.velocity[k]
                if velocity is None:  # v = momentum 0 + g is the first step's v = g
                    velocity = descent.velocity[k] = torch.zeros_like(parameter, requires_grad=False)
                states[id(parameter)] = (velocity,)
        return rule, states
    return _torch_states(descent, trained)


def _torch_states(
    optimizer: Descent, trained: list[nn.Parameter]
) -> tuple[dict[str, Any], dict[int, tuple[Tensor, ...]]]:
    kind = OPTIMIZERS.get(type(optimizer))
    if kind is None or not isinstance(optimizer, torch.optim.Optimizer):
        raise Refused(f"the optimizer is a {type(optimizer).__name__}; it takes torch's SGD, Adam and AdamW")
    if len(optimizer.param_groups) != 1:
        raise Refused("the optimizer has more than one group of parameters")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise Refused("the optimizer has hooks")
    if torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
        raise Refused("torch has global optimizer hooks")
    _check_functions(optimizer)
    group = optimizer.param_groups[0]
    if {id(p) for p in trained} != {id(p) for p in group["params"] if p.requires_grad}:
        raise Refused("the optimizer does not hold exactly the parameters that require a gradient")
    for option in ("maximize", "differentiable", "amsgrad", "capturable", "dampening"):
        if group.get(option):
            raise Refused(f"the optimizer has {option}={group[option]}")
    if isinstance(group["lr"], Tensor):
        raise Refused("the optimizer's lr is a tensor")
    rule = {"kind": kind, "lr": group["lr"], "weight_decay": group["weight_decay"]}
    names: tuple[str, ...]
    if kind == "descent":
        rule |= {"momentum": group["momentum"], "nesterov": group["nesterov"]}
        names = ("momentum_buffer",) if group["momentum"] else ()
    else:
        if group.get("decoupled_weight_decay"):
            rule["kind"] = "adamw"
        steps = {int(optimizer.state[p]["step"]) if optimizer.state[p] else 0 for p in trained}
        if len(steps) != 1:
            raise Refused("the optimizer's parameters have made different numbers of steps")
        rule |= {"betas": group["betas"], "eps": group["eps"], "steps": steps.pop()}
        names = ("exp_avg", "exp_avg_sq")
    states = {}
    for parameter in trained:
        own = optimizer.state[parameter]
        if kind != "descent" and not own:
            own["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        for name in names:
            if own.get(name) is None:
                own[name] = torch.zeros_like(parameter, requires_grad=False)
            state = own[name]
            if (
                state.dtype != parameter.dtype
                or state.device != parameter.device
                or not state.is_contiguous()
            ):
                raise Refused(f"the optimizer's {name} is not laid out as its parameter")
        states[id(parameter)] = tuple(own[name] for name in names)
    return rule, states


def count_steps(descent: Descent, rule: dict[str, Any], steps: int) -> None:
    """Tell rule and optimizer of so many steps more; frozen parameters have made none."""
    if "steps" in rule:
        rule["steps"] += steps
    if isinstance(descent, torch.optim.Optimizer):
        descent._opt_called = True  # type: ignore[attr-defined]  # schedulers warn unless step was called
        for parameter in descent.param_groups[0]["params"]:
            if parameter.requires_grad and "step" in descent.state[parameter]:
                descent.state[parameter]["step"] += steps
