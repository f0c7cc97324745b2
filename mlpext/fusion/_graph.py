"""`fuse(..., graph=True)`: functional calls fused in the graph of the whole model.

Fused are a linear layer, as a module or as a function, and what follows it: an activation in any spelling,
or a maxout written as groups of outputs and their maximum. A graph has no `if`, so only a forward that does
the same in every mode has one.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as TF
from torch import fx
from torch.nn import Linear, Module

from mlpext import functional as F
from mlpext.fusion._pairs import Row
from mlpext.fusion._patterns import activation_after, activation_called, why_not_linear
from mlpext.fusion._source import reads
from mlpext.fusion._trace import describe, expect, has_hooks, sole_user, steady_graph
from mlpext.fusion._units import ActivatedLinear, find_units, replace


class FusedGraph(fx.GraphModule):
    """The graph of `model` with its functional calls fused, over the modules and parameters of `model`."""

    model: Module

    def __init__(self, model: Module, graph: fx.Graph) -> None:
        super().__init__(model, graph, type(model).__name__)
        # Not as a submodule: what is in it is here too, under the same names and in the same order.
        vars(self)["model"] = model
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = vars(model)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        model = vars(self).get("model")
        # Not layers and weights: the graph finds them by name, so that they may be exchanged.
        plain = model is not None and inspect.getattr_static(model, name, ...) is not ...
        if plain and name in reads(type(model)):
            raise AttributeError(
                f"{name}: the graph was made with {name} as it is, and a change here would be lost; "
                "mlpext.unfuse(model) first, and fuse what it returns again"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> FusedGraph:
        super().train(mode)
        self.model.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return fuse_graph(copy.deepcopy(self.model, memo), {})

    def __reduce__(self) -> Any:
        return fuse_graph, (self.model, {})


def fuse_graph(model: Module, rows: dict[Module, Row]) -> Module:
    """The graph of `model` with functional calls fused, or `model` itself where no one graph holds in every
    mode. What came of it is added to `rows`."""
    steady = {module for module in model.modules() if steady_graph(module)}
    graph = None if has_hooks(model) else steady_graph(model, steady.__contains__)
    if graph is None or any(node.target is expect for node in graph.nodes):
        said = rows.get(model, Row("", "left", ""))
        reason = "graph=True: no one graph of its forward holds in every mode"
        rows[model] = said._replace(reason=f"{said.reason}; {reason}" if said.action != "left" else reason)
        return model
    paths = {module: path for path, module in model.named_modules()}
    for unit in find_units(graph):
        if not isinstance(unit, ActivatedLinear):  # of those `_fuse_activation` takes more
            unit.fuse()
    for node in list(graph.nodes):
        if _is_linear(node):
            what = _fuse_activation(node) or _fuse_maxout(node)
            if what and node.op == "call_module":
                module = node.meta["module"]
                rows[module] = Row(paths[module], "fused", f"with {what}")
    for node in list(graph.nodes):
        _replace_lone_activation(node)
    graph.lint()
    return FusedGraph(model, graph)


def _is_linear(node: fx.Node) -> bool:
    """A linear layer, as a module or as a function, whose weight may be read beside it."""
    if node.op == "call_module":
        module = node.meta["module"]
        plain = len(node.args) == 1 and not node.kwargs
        return plain and isinstance(module, Linear) and why_not_linear(module) is None
    return node.target is TF.linear and len(node.args) >= 2


def _fuse_activation(linear: fx.Node) -> str | None:
    """linear, then an activation: one call. What was fused, for the report."""
    last, activation = activation_after(linear)
    if last is None or activation is None:
        return None
    what = describe(last)
    name, params = activation
    _replace(linear, last, lambda *operands: _call(linear, F.linear_activation, *operands, name, **params))
    return what


# max(dim) returns (values, indices); the two ways to take the values.
_VALUES = ((operator.getitem, (0,)), (getattr, ("values",)))


def _fuse_maxout(linear: fx.Node) -> str | None:
    """linear, then groups of its outputs, then the maximum over each: one call."""
    groups = sole_user(linear)
    if isinstance(groups, str) or (split := _split(groups, linear)) is None:
        return None
    last = sole_user(groups)
    if isinstance(last, str) or last.args[0] is not groups or (axis := _reduced(last, groups)) is None:
        return None
    if last.target in ("max", torch.max):
        picked = sole_user(last)
        if isinstance(picked, str) or (picked.target, picked.args[1:]) not in _VALUES:
            return None
        last = picked

    def by_piece(parameter: fx.Node) -> fx.Node:
        pieces = _call(linear, torch.unflatten, parameter, 0, split)
        return pieces if axis == -2 else _call(linear, torch.transpose, pieces, 0, 1)

    def maxout(x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        bias = None if bias is None else by_piece(bias)
        result = _call(linear, F.linear_maxout, x, by_piece(weight), bias)
        outputs = split[1] if axis == -2 else split[0]
        flat = groups.target in ("view", "reshape")
        return _call(linear, torch.reshape, result, (-1, outputs)) if flat else result

    _replace(linear, last, maxout)
    return f"the maximum over {split[0] if axis == -2 else split[1]} pieces"


def _split(node: fx.Node, linear: fx.Node) -> tuple[int, int] | None:
    """The two sizes into which `node` splits the last dimension of `linear`, (pieces, outputs) or (outputs,
    pieces); None if it does something else."""
    arguments: tuple[Any, ...] = node.args
    given, *sizes = arguments
    if given is not linear or node.kwargs:
        return None
    if node.target in ("unflatten", torch.unflatten) and len(sizes) == 2 and sizes[0] == -1:
        sizes = list(sizes[1])
    elif node.target in ("view", "reshape") and linear.op == "call_module":
        sizes = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
        if sizes[:1] != [-1] or math.prod(n for n in sizes[1:] if type(n) is int) != _outputs(linear):
            return None
        sizes = sizes[1:]
    else:
        return None
    if len(sizes) != 2 or any(type(size) is not int for size in sizes):
        return None
    return sizes[0], sizes[1]


def _outputs(linear: fx.Node) -> int:
    return int(linear.meta["module"].out_features)


def _reduced(node: fx.Node, groups: fx.Node) -> int | None:
    """The dimension, -1 or -2, whose maximum `node` takes; None if it does something else."""
    if node.target not in ("max", "amax", torch.max, torch.amax):
        return None
    given = {**dict(zip(("input", "dim"), node.args, strict=False)), **node.kwargs}
    dim = given.get("dim")
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        (dim,) = dim
    if given.keys() != {"input", "dim"} or len(node.args) > 2 or type(dim) is not int:
        return None
    if dim > 0 and groups.target in ("view", "reshape"):  # of three dimensions
        dim -= 3
    return dim if dim in (-1, -2) else None


def _replace_lone_activation(node: fx.Node) -> None:
    """An activation function by itself: ours, of the same signature."""
    if node.op == "call_function" and node.target is not torch.sin and (found := activation_called(node)):
        node.target = getattr(F, "gelu" if found[0] == "gelu_tanh" else found[0])


def _call(before: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new call of `function`, in the graph in front of `before`."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(function, args, kwargs)
    node.meta["modes"] = before.meta["modes"]
    return node


def _replace(linear: fx.Node, last: fx.Node, make: Callable[[Any, Any, Any], fx.Node]) -> None:
    """Put `make(x, weight, bias)` in the place of everything from `linear` to `last`, a chain."""
    graph = linear.graph
    if linear.op == "call_module":
        x, bias = linear.args[0], None
        with graph.inserting_before(linear):
            weight: Any = graph.get_attr(f"{linear.target}.weight")
            if linear.meta["module"].bias is not None:
                bias = graph.get_attr(f"{linear.target}.bias")
    else:
        x, weight, bias = (*linear.args, linear.kwargs.get("bias"))[:3]  # type: ignore[assignment]
    replace(linear, last, make(x, weight, bias))
