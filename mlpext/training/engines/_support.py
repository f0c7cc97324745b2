"""Which models and data the compiled engines (native, cuda_graphs) can take, and each layer as a record.

These engines do not call the model: they compute what its layers are known to compute. So everything that
could make a model another function, or have it trained otherwise, is refused by name (hooks, patched
functions, shared memory, a compiled module). What cannot be known is not guessed: engine="auto" then takes
the PyTorch loop.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mlpext import _C, _extension
from mlpext.nn import MLP, GatedLinear, GatedMLP, LinearActivation, Maxout
from mlpext.training import _losses
from mlpext.training._samples import Samples
from mlpext.training.engines.plan import StepPlan

Layer: TypeAlias = "LinearActivation | Maxout | GatedLinear"
LAYERS = (LinearActivation, Maxout, GatedLinear)
# The optimizer's buffers of a parameter, by the parameter's id: velocity, or Adam's two averages.
States: TypeAlias = dict[int, tuple[Tensor, ...]]

OPTIMIZERS: dict[type, str] = {
    torch.optim.SGD: "descent",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}


class Unsupported(Exception):
    """Why a compiled engine cannot train this."""


class LayerRecord(NamedTuple):
    """A layer as the compiled engines take it. C++ reads the fields by these names."""

    weight: Tensor
    bias: Tensor | None
    activation: str  # or "maxout"
    params: tuple[float, ...]
    weight_states: tuple[Tensor, ...]
    bias_states: tuple[Tensor, ...]
    dropout: float = 0.0  # the probability of an output to become 0
    gated: bool = False  # the activation is that of a gate


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
KNOWN = {kind: _functions(kind) for kind in (MLP, nn.Sequential, GatedMLP, *LAYERS, *OPTIMIZERS)}


def check_functions(thing: object) -> None:
    """Refuses an object that has functions of its own in place of its class's, or whose class was patched."""
    known = KNOWN[type(thing)]
    for name in known.keys() & vars(thing).keys():
        if name != "step" or not _only_counts(vars(thing)["step"], known["step"]):
            raise Unsupported(f"the {type(thing).__name__} has a {name} of its own")
    if _functions(type(thing)) != known:
        raise Unsupported(f"{type(thing).__name__} has other functions than it came with")


def _only_counts(step: Any, known: Any) -> bool:
    """Whether this is what a learning-rate scheduler puts around an optimizer's `step`, to see it called."""
    inner = getattr(step, "__wrapped__", None)
    return getattr(step, "_wrapped_by_lr_sched", False) and getattr(inner, "__wrapped__", inner) is known


def layers_of(model: nn.Module, device: torch.device) -> list[Layer]:
    """The layers of a model on `device`, in their order.

    Unsupported for every way in which it could be another function, or be trained otherwise, than layers in a
    row that have parameters of their own.
    """
    if _extension.missing is not None:
        raise Unsupported(f"there is no compiled engine ({_extension.missing})")
    if _has_any_global_hook():  # type: ignore[no-untyped-call]
        raise Unsupported("torch has global module hooks")
    if _get_current_dispatch_mode_stack():
        raise Unsupported("a torch dispatch mode is at work, which would see nothing of it")
    modules: list[nn.Module | None] = [model]
    if type(model) in (MLP, nn.Sequential):
        _check_module(model)
        modules = list(model._modules.values())  # children() leaves out a module that stands there again
    layers: list[Layer] = []
    for module in modules:
        if type(module) is GatedMLP:
            if isinstance(model, MLP) and model.dropout:
                raise Unsupported("the MLP has dropout around a GatedMLP, but none within")
            _check_module(module)
            layers += [_checked_layer(module._modules.get(name)) for name in ("gated", "down")]
        else:
            layers.append(_checked_layer(module))
    if not layers:
        raise Unsupported("model has no layer")
    if len({id(layer) for layer in layers}) < len(layers):
        raise Unsupported("a layer stands twice in the model")
    _check_parameters(layers, device)
    for before, after in pairwise(layers):
        if parameters_of(before)[0].shape[-2] != parameters_of(after)[0].shape[-1]:
            raise Unsupported("the layers do not fit one another")
    return layers


def _checked_layer(module: nn.Module | None) -> Layer:
    if type(module) not in LAYERS:
        raise Unsupported(
            f"model has a {type(module).__name__}; it takes LinearActivation, Maxout and GatedLinear layers, "
            "and GatedMLPs, in a row"
        )
    _check_module(module)
    return module  # type: ignore[return-value]


def _check_module(module: nn.Module | None) -> None:
    for hooks in _C.MODULE_HOOKS:
        if getattr(module, hooks):
            raise Unsupported(f"{type(module).__name__} has hooks")
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise Unsupported(f"{type(module).__name__} is compiled")
    check_functions(module)


def _check_parameters(layers: list[Layer], device: torch.device) -> None:
    places: list[tuple[int, int, str]] = []  # where each parameter's memory begins and ends
    first = parameters_of(layers[0])[0]
    for layer in layers:
        for name, parameter in zip(("weight", "bias"), parameters_of(layer), strict=True):
            if parameter is None and name == "bias":
                continue
            if type(parameter) is not nn.Parameter:
                raise Unsupported(f"a layer's {name} is a {type(parameter).__name__}, not a Parameter")
            if parameter.device != device or parameter.dtype not in (torch.float32, torch.float64):
                raise Unsupported(
                    f"a {name} is {parameter.dtype} on {parameter.device}, not float32/64 on {device}"
                )
            if parameter.dtype != first.dtype:
                raise Unsupported(f"weights of {first.dtype} and {parameter.dtype} are mixed")
            if not parameter.is_contiguous() or parameter.numel() == 0 or parameter.is_neg():
                raise Unsupported(f"a {name} is empty, or not contiguous")
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise Unsupported(f"a {name} has gradient hooks")
            begin = parameter.data_ptr()
            places.append((begin, begin + parameter.numel() * parameter.element_size(), name))
        if not isinstance(layer, Maxout) and not _C.has_kernel(
            layer.activation, tuple(layer.params.values())
        ):
            raise Unsupported(f"{layer.activation} with {layer.params} runs on torch's operators")
    for (_, end, _), (begin, _, name) in pairwise(sorted(places)):
        if begin < end:
            raise Unsupported(f"a {name} shares memory with another parameter")


def parameters_of(layer: Layer) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias, as the layer's forward finds them."""
    weight, bias = layer._weight_and_bias()
    return weight, bias  # type: ignore[return-value]


def trained_of(layers: list[Layer]) -> list[nn.Parameter]:
    """The parameters that require a gradient."""
    return [p for layer in layers for p in parameters_of(layer) if p is not None and p.requires_grad]


def check_rows(samples: Samples, plan: StepPlan, first: Layer) -> None:
    """Refuses ranks, a loss, or data that a compiled engine cannot take."""
    if plan.ranks.size > 1:
        raise Unsupported(
            f"{plan.ranks.size} ranks add up their gradients at every step, for which it has no place"
        )
    if not isinstance(plan.loss_sum, _losses.NamedLoss):
        raise Unsupported("loss is a function; it takes the names " + ", ".join(_losses.LOSSES))
    x, d = samples.shapes
    if len(x) != 2 or len(samples.output_shape) != 1 or len(d) > 2:
        raise Unsupported(
            f"x has shape {tuple(x)} and target {tuple(d)}; it takes (N, n0) and (N,) or (N, n)"
        )
    if x[1] != first.weight.shape[-1]:
        raise Unsupported(f"x has {x[1]} columns, the first layer takes {first.weight.shape[-1]}")


def check_no_options(samples: Samples, plan: StepPlan, model: nn.Module) -> None:
    """Refuses what an engine has no place for."""
    options = {
        "sample_weight or class_weight": samples.weights is not None,
        "l2": plan.l2,
        "clip_grad_norm": plan.clip_grad_norm,
        "dropout": isinstance(model, MLP) and model.dropout,
    }
    for name, given in options.items():
        if given:
            raise Unsupported(f"it has no {name}")


def describe(model: nn.Module, layers: list[Layer], states: States) -> list[LayerRecord]:
    """The layers of a model with the optimizer's buffers of their weights and biases."""
    dropout = model.dropout if isinstance(model, MLP) else 0.0
    records = []
    for layer in layers:
        weight, bias = parameters_of(layer)
        name, params = (
            ("maxout", ()) if isinstance(layer, Maxout) else (layer.activation, layer.params.values())
        )
        buffers = states.get(id(weight), ()), states.get(id(bias), ())
        own = dropout if layer is not layers[-1] else 0.0
        gated = isinstance(layer, GatedLinear)
        records.append(LayerRecord(weight, bias, name, tuple(params), *buffers, own, gated))
    return records
