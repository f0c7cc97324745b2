"""What `fuse` finds in the graph of a forward, and makes one call: gated units, f(gate) * value, and
activation functions of linear layers, F.relu(self.fc(x))."""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Identity, Linear, Module
from torch.nn.modules.module import _has_any_global_hook

from mlpext import _C, nn
from mlpext import functional as F
from mlpext.fusion._patterns import (
    PRODUCTS,
    Activation,
    activation_after,
    activation_called,
    why_not_linear,
)
from mlpext.fusion._source import changes
from mlpext.fusion._trace import describe, has_hooks
from mlpext.nn._activations import NAME_OF, name_and_parameters

_PRODUCTS = (*PRODUCTS, torch.multiply, "multiply")
_SPLITS: tuple[Any, ...] = (torch.chunk, torch.split, torch.tensor_split, torch.unbind)
_SPLITS += ("chunk", "split", "tensor_split", "unbind")
_ASKS = (getattr, "size", "dim")  # what changes nothing: x.shape


class Gate(NamedTuple):
    """The calls of one gated unit: `product` is f(gate) * value, `call` is f(gate)."""

    product: fx.Node
    call: fx.Node
    activation: Activation
    gate: fx.Node
    value: fx.Node

    @property
    def parts(self) -> list[fx.Node]:
        """The calls that it is made of: the activation, and the layers or what makes both halves."""
        whole = _whole(self.gate)
        return [self.call, self.gate, self.value] if whole is None else [self.call, whole]

    def __str__(self) -> str:
        activation, *layers = map(describe, self.parts)
        if len(layers) == 1:
            return f"{activation} of one half of {layers[0]} times the other"
        return f"{activation} of {layers[0]} times {layers[1]}"

    def fuse(self) -> None:
        """Make it one call."""
        name, params = self.activation
        graph, call = self.product.graph, self.call
        with graph.inserting_before(self.product):
            if call.op == "call_module":
                module = graph.get_attr(str(call.target))
                fused = graph.call_function(gated_by, (module, self.gate, self.value, name, params))
            else:
                fused = graph.call_function(F.gated, (self.gate, self.value, name), dict(params))
        replace(call, self.product, fused)


class ActivatedLinear(NamedTuple):
    """The calls of a linear layer, and of an activation function, up to `last`, that takes what it gives."""

    linear: fx.Node
    last: fx.Node
    activation: Activation

    @property
    def parts(self) -> list[fx.Node]:
        """The call of the layer."""
        return [self.linear]

    def __str__(self) -> str:
        return f"{describe(self.last)} of {describe(self.linear)}"

    def fuse(self) -> None:
        """Make it one call."""
        name, params = self.activation
        graph = self.linear.graph
        with graph.inserting_before(self.linear):
            module = graph.get_attr(str(self.linear.target))
            fused = graph.call_function(linear_then, (module, *self.linear.args, name, (*params.values(),)))
        replace(self.linear, self.last, fused)


class GLU(NamedTuple):
    """The call of torch.nn.functional.glu."""

    call: fx.Node

    @property
    def parts(self) -> list[fx.Node]:
        """What makes both halves."""
        return [part for part in self.call.args[:1] if isinstance(part, fx.Node)]

    def __str__(self) -> str:
        return " of ".join(["glu", *map(describe, self.parts)])

    def fuse(self) -> None:
        """Call ours, of the same arguments."""
        self.call.target = F.glu


Unit = Gate | ActivatedLinear | GLU


def gated_by(module: Module, gate: Tensor, value: Tensor, name: str, params: dict[str, float]) -> Tensor:
    """In a graph: module(gate) * value in one call, for an activation `module`, with the parameters that it
    has by now, and as two calls if it has hooks. `name` and `params` are of one of someone's own class."""
    known = name_and_parameters(module) if type(module) in NAME_OF else (name, params)
    if known is None or has_hooks(module):
        return module(gate) * value  # type: ignore[no-any-return]
    return F.gated(gate, value, known[0], **known[1])  # type: ignore[arg-type]


def linear_then(linear: Module, input: Tensor, name: str, params: tuple[float, ...]) -> Tensor:
    """In a graph: an activation of what `linear` gives for `input`, in one call unless the layer has been
    exchanged, or somebody watches it."""
    watched = any(getattr(linear, hooks) for hooks in _C.MODULE_HOOKS) or _has_any_global_hook()  # type: ignore[no-untyped-call]
    if type(linear) is nn.Linear and not watched:
        return _C.linear_activation(input, linear.weight, linear.bias, name, params)
    return _C.activation(linear(input), name, params)


def find_units(graph: fx.Graph) -> list[Unit]:
    """All that can be made one call. No node is part of two."""
    gates = [gate for node in graph.nodes if (gate := _gate_of(node)) is not None]
    taken = set(chain.from_iterable(gate.parts for gate in gates))
    linears = [unit for node in graph.nodes if node not in taken and (unit := _activated(node)) is not None]
    glus = [GLU(node) for node in graph.nodes if node.target is torch.nn.functional.glu]
    return [*gates, *linears, *glus]


def _gate_of(product: fx.Node) -> Gate | None:
    """The gated unit that ends with `product`: of two layers of one input, or of both halves of one tensor,
    of which one goes through an activation that nobody else sees."""
    if product.target not in _PRODUCTS or len(product.args) != 2 or product.kwargs:
        return None
    left, right = product.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    for call, value in ((left, right), (right, left)):
        activation = activation_called(call)
        if activation is None or activation[0] == "identity" or [*call.users] != [product]:
            continue
        if call.op == "call_module" and _may_change(call.meta["module"]):
            continue
        gate = call.args[0] if call.args else call.kwargs.get("input")
        alike = call.meta["modes"] == product.meta["modes"]
        if alike and isinstance(gate, fx.Node) and [*gate.users] == [call] and _are_siblings(gate, value):
            return Gate(product, call, activation, gate, value)
    return None


def _may_change(activation: Module) -> bool:
    """Whether it is of someone's own class, with attributes that decide on what it computes."""
    return type(activation) not in NAME_OF and any(True for _ in changes(activation))


def _are_siblings(gate: fx.Node, value: fx.Node) -> bool:
    """Whether both are layers of one input, or the two halves of one tensor."""
    if gate.op == value.op == "call_module":
        modules = gate.meta["module"], value.meta["module"]
        sizes = [getattr(module, "out_features", None) for module in modules]
        alike = (gate.args, gate.kwargs) == (value.args, value.kwargs)
        return alike and sizes[0] == sizes[1] and not any(isinstance(each, Identity) for each in modules)
    if gate.target is value.target is torch.nn.functional.linear:
        return gate.args[:1] == value.args[:1] != ()
    if gate.args[:1] != value.args[:1]:
        return False
    # Two items of one thing: halves by chunk, or slices. Nobody else may have changed it in between.
    whole = _whole(gate)
    return whole is not None and whole is _whole(value) and _is_only_for(gate.args[0], (gate, value))


def _whole(item: fx.Node) -> fx.Node | None:
    """What `item` is a part of, if that is all it is."""
    if item.target is not operator.getitem or not isinstance(item.args[0], fx.Node):
        return None
    came = item.args[0]
    if came.target not in _SPLITS:
        return came
    whole = came.args[0] if came.args else None
    return whole if isinstance(whole, fx.Node) and _is_only_for(whole, (came,)) else None


def _is_only_for(node: Any, users: tuple[fx.Node, ...]) -> bool:
    return all(user in users or user.target in _ASKS for user in node.users)


def _activated(node: fx.Node) -> ActivatedLinear | None:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    linear = node.meta["module"]
    if not isinstance(linear, Linear) or why_not_linear(linear) is not None:
        return None
    last, activation = activation_after(node)
    if last is None or activation is None or last.op == "call_module":
        return None
    return ActivatedLinear(node, last, activation)


def replace(first: fx.Node, last: fx.Node, fused: fx.Node) -> None:
    """Put `fused` in the place of the calls from `first` to `last`, each the only user of the one before."""
    fused.meta["modes"] = last.meta["modes"]
    last.replace_all_uses_with(fused)
    calls = [first]
    while calls[-1] is not last:
        calls += calls[-1].users
    for call in reversed(calls):
        call.graph.erase_node(call)
