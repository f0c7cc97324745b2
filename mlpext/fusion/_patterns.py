"""What `fuse` recognises: activations, as modules and as calls, and linear layers that are just that.

An activation is a name of the compiled list with the values of its parameters, ("elu", {"alpha": 1.0}). In a
model it may be torch's module or ours, a class whose forward calls one and nothing else, or a function.
"""

from __future__ import annotations

import inspect
import math
import operator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx
from torch.nn import Linear, Module, Parameter

from mlpext import _C, nn
from mlpext import functional as F
from mlpext.fusion._observe import Untraceable
from mlpext.fusion._trace import has_hooks, is_from_torch, modes, operations, sole_user, trace
from mlpext.nn._activations import NAME_OF, name_and_parameters

Activation = tuple[str, dict[str, float]]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# torch's function, or the name of Tensor's method -> name of ours.
_FUNCTIONS: dict[Any, str] = {torch.sin: "sine", "sin": "sine"}
for _name in NAME_OF.values():
    _FUNCTIONS |= {getattr(TF, _name, None): _name, getattr(torch, _name, None): _name}
    _FUNCTIONS |= {_name: _name} if hasattr(Tensor, _name) else {}
del _FUNCTIONS[None]
PRODUCTS = (operator.mul, torch.mul, "mul")
_SQUARES = (torch.square, "square")
_POWERS = (operator.pow, torch.pow, "pow")


def activation_of(module: Module) -> Activation | None:
    """The activation that a module is, None for any other."""
    if "forward" in vars(module):
        return None
    if type(module) in NAME_OF:
        return name_and_parameters(module)
    return _activation_by_trace(module)


def _activation_by_trace(module: Module) -> Activation | None:
    """The activation that a module of someone else's class is, if its forward calls that and nothing else."""
    parts = chain(module.children(), module.parameters(), module.buffers())
    if is_from_torch(type(module)) or any(True for _ in parts):
        return None
    try:
        graphs, _ = trace(module)
    except Untraceable:
        return None
    found = [_only_activation(graph) or _WRITTEN_OUT.get(_steps(graph)) for graph in graphs]
    return found[0] if all(each == found[0] for each in found) else None


def _new_gelu(x: Any) -> Any:  # of transformers' GPT-2 and T5
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _steps(graph: fx.Graph) -> tuple[str, ...]:
    """What `graph` does to its argument, whatever that is called."""
    (x, *_) = graph.nodes
    return tuple(step.replace(f"'{x.target}'", "x") for step in operations(graph))


# What an activation does that is written out as a formula -> that activation.
_WRITTEN_OUT: dict[tuple[str, ...], Activation] = {
    _steps(fx.symbolic_trace(_new_gelu).graph): ("gelu_tanh", {}),
}


def _only_activation(graph: fx.Graph) -> Activation | None:
    """The activation that is all that `graph` computes."""
    x, *calls, output = graph.nodes
    if x.op != "placeholder" or not calls or output.args != (calls[-1],):
        return None
    if any(call.meta["modes"] != modes() for call in calls):
        return None
    last, activation = activation_after(x)
    return activation if last is calls[-1] else _times_sigmoid(x, calls)


def _times_sigmoid(x: fx.Node, calls: list[fx.Node]) -> Activation | None:
    """x sigmoid(alpha x), which is silu without the alpha, where `calls` are that and nothing else."""
    if len(calls) not in (2, 3):
        return None
    *scaled, gate, product = calls
    inner = scaled[0] if scaled else x
    alpha = _factor(inner) if scaled and x in inner.args else None
    if activation_called(gate) != ("sigmoid", {}) or gate.args != (inner,) or (scaled and alpha is None):
        return None
    if product.target not in PRODUCTS or product.args not in ((x, gate), (gate, x)) or product.kwargs:
        return None
    return ("silu", {}) if alpha is None else ("quick_gelu", {"alpha": alpha})


def activation_after(node: fx.Node) -> tuple[fx.Node | None, Activation | None]:
    """The activation that takes the output of `node`, and the last of its calls: sin(omega x) is two, as is
    the square of a relu."""
    last = sole_user(node)
    if isinstance(last, str):
        return None, None
    activation = activation_called(last)
    if activation is None and (omega := _factor(last)) is not None:
        last = sole_user(last)
        if not isinstance(last, str) and activation_called(last) == ("sine", {"omega": 1.0}):
            return last, ("sine", {"omega": omega})
        return None, None
    if activation == ("relu", {}) and not isinstance(square := sole_user(last), str) and _squares(square):
        return square, ("relu_squared", {})
    return last, activation


def _squares(node: fx.Node) -> bool:
    """Whether `node` squares what it is given, by torch.square or as a power."""
    return (node.target in _SQUARES and len(node.args) == 1 and not node.kwargs) or (
        node.target in _POWERS and node.args[1:] == (2,) and not node.kwargs
    )


def _factor(node: fx.Node) -> float | None:
    """The number by which `node` multiplies what it is given."""
    if node.target not in PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    return next((float(value) for value in node.args if isinstance(value, (int, float))), None)


def why_not_linear(linear: Module) -> str | None:
    """Why `linear` cannot be fused, whatever follows it; None if it can."""
    if torch.nn.utils.parametrize.is_parametrized(linear):
        return "its weight is parametrized"
    if linear._parameters.keys() != {"weight", "bias"}:
        return "its weight is computed at each call (weight_norm, spectral_norm, pruning)"
    if type(linear) not in (Linear, nn.Linear):
        return f"{type(linear).__name__} is not torch.nn.Linear itself"
    if has_hooks(linear):
        return "it has hooks"
    if own := vars(linear).keys() & {"forward", "activation", "params"}:
        return f"it has an attribute {min(own)!r} of its own"
    for parameter in linear.parameters():
        if type(parameter) is not Parameter or parameter.layout is not torch.strided:
            return f"its parameters are {type(parameter).__name__}s, {parameter.layout}"
        if parameter.dtype not in _FLOATS:
            return f"its dtype is {parameter.dtype}"
    return None


def activation_called(node: fx.Node) -> Activation | None:
    """The activation that `node` calls, as a module, a function or a method; None for any other call."""
    if node.op == "call_module":
        module = node.meta["module"]
        return None if has_hooks(module) else activation_of(module)
    name = _FUNCTIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    if name is None:
        return None
    try:  # ours have torch's signatures
        params = dict(inspect.signature(getattr(F, name)).bind(*node.args, **node.kwargs).arguments)
    except TypeError:
        return None
    params.pop("input")
    params.pop("inplace", None)
    if name == "gelu" and params.pop("approximate", "none") == "tanh":
        name = "gelu_tanh"
    params = {**_C.activations()[name], **params}
    return (name, params) if all(type(value) in (int, float) for value in params.values()) else None
