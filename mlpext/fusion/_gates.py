"""Gated units in a graph, f(gate) * value: found, and made one call of `functional.gated`."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Identity, Module

from mlpext import functional as F
from mlpext.fusion._patterns import Activation, activation_called
from mlpext.fusion._source import changes
from mlpext.fusion._trace import describe, has_hooks
from mlpext.nn._activations import NAME_OF, name_and_parameters

_PRODUCTS = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_SPLITS = (torch.chunk, torch.split, torch.tensor_split, "chunk", "split", "tensor_split")


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
        if self.gate.target is not operator.getitem:
            return [self.call, self.gate, self.value]
        split = self.gate.args[0]
        return [self.call, split.args[0]]  # type: ignore[union-attr,list-item]

    def __str__(self) -> str:
        activation, *layers = map(describe, self.parts)
        if len(layers) == 1:
            return f"{activation} of one half of {layers[0]} times the other"
        return f"{activation} of {layers[0]} times {layers[1]}"


def find_gates(graph: fx.Graph) -> list[Gate]:
    """The gated units in `graph`: products of two layers of one input, or of both halves of one tensor, of
    which one goes through an activation that nobody else sees."""
    return [gate for node in graph.nodes if (gate := _gate_of(node)) is not None]


def multiplies(graph: fx.Graph) -> bool:
    """Whether there may be a gated unit in `graph`."""
    return any(node.target in _PRODUCTS for node in graph.nodes)


def _gate_of(product: fx.Node) -> Gate | None:
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


def _are_siblings(gate: fx.Node, value: fx.Node) -> bool:
    """Whether both are layers of one input, or the two halves of one tensor."""
    if gate.op == value.op == "call_module":
        modules = gate.meta["module"], value.meta["module"]
        sizes = [getattr(module, "out_features", None) for module in modules]
        alike = (gate.args, gate.kwargs) == (value.args, value.kwargs)
        return alike and sizes[0] == sizes[1] and not any(isinstance(each, Identity) for each in modules)
    if gate.target is value.target is torch.nn.functional.linear:
        return gate.args[:1] == value.args[:1] != ()
    if gate.target is not operator.getitem or value.target is not operator.getitem:
        return False
    (split, first), (other, second) = gate.args, value.args
    is_split = isinstance(split, fx.Node) and split.target in _SPLITS
    return is_split and split is other and {first, second} == {0, 1}


def _may_change(activation: Module) -> bool:
    """Whether it is of someone's own class, with attributes that decide on what it computes."""
    return type(activation) not in NAME_OF and any(True for _ in changes(activation))


def fuse_gate(gate: Gate) -> None:
    """Make it one call."""
    graph, call = gate.product.graph, gate.call
    name, params = gate.activation
    with graph.inserting_before(gate.product):
        if call.op == "call_module":
            module = graph.get_attr(str(call.target))
            fused = graph.call_function(gated_by, (module, gate.gate, gate.value, name, params))
        else:
            fused = graph.call_function(F.gated, (gate.gate, gate.value, name), dict(params))
    fused.meta["modes"] = gate.product.meta["modes"]
    gate.product.replace_all_uses_with(fused)
    graph.erase_node(gate.product)
    graph.erase_node(call)


def gated_by(module: Module, gate: Tensor, value: Tensor, name: str, params: dict[str, float]) -> Tensor:
    """module(gate) * value in one call, for an activation `module`: with the parameters that it has by now,
    and as two calls if it has hooks. `name` and `params` are of an activation of someone's own class."""
    known = name_and_parameters(module) if type(module) in NAME_OF else (name, params)
    if known is None or has_hooks(module):
        return module(gate) * value  # type: ignore[no-any-return]
    return F.gated(gate, value, known[0], **known[1])  # type: ignore[arg-type]
