"""`fuse` and `unfuse`: for a model that exists, each Linear and the activation after it as one layer, and
each gated unit as one product.

A module is fused where it stands: it gets another class and keeps its identity, its parameters, its name and
its attributes, so that whatever refers to it (an optimizer, a list, another name in the same model) still
does. Its class before is noted on it, for `unfuse`. The way: `_trace` makes graphs of forwards, while
`_observe` looks on; `_source` reads what they cannot show; `_calls` puts both together for the whole model.
`_pairs` finds modules to fuse by the `_patterns`; `_units` what a forward computes itself, and `_forwards`
replaces that forward. `_transformer` looks into torch's transformer layers, `_inference` does inference=True
and `_graph` graph=True.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import Identity, Linear, Module

from mlpext import nn
from mlpext.fusion._calls import Calls
from mlpext.fusion._forwards import WAS, FusedForward, find_forwards, set_class
from mlpext.fusion._graph import FusedGraph, fuse_graph
from mlpext.fusion._inference import (
    DROPOUTS,
    KEPT,
    FoldedBatchNorm,
    FoldedLinear,
    FusedDropout,
    fold,
    note_folded,
    unfold,
)
from mlpext.fusion._pairs import ACTIONS, Row, find_pairs
from mlpext.fusion._patterns import activation_of, why_not_linear
from mlpext.fusion._source import reads
from mlpext.fusion._trace import HOOKS
from mlpext.fusion._transformer import FUSED, find_layers
from mlpext.fusion._units import Unit
from mlpext.nn._activations import OURS

M = TypeVar("M", bound=Module)


class FusedActivation(Identity):
    """What `fuse` puts in an activation's place: it returns its input, (*) -> (*), since the layer before has
    computed the activation.

    Raises:
        AttributeError: when a parameter of the activation is set, which the layer before would not see.
            `inplace` can be set: no output hangs on it, and utilities set it on all modules of a model.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        was = vars(self).get(WAS)
        if was and name in {*dir(was), *reads(was)} - {*dir(Identity), "inplace", "training"}:
            raise AttributeError(
                f"{name}: this {was.__name__} has become part of the linear layer before it, and a change "
                "here would be lost; mlpext.unfuse(model) first, or change `params` of that layer"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        was = vars(self).get(WAS)
        return was.__name__ if was else ""


class Report(list[Row]):
    """The rows of `fuse(..., report=True)`, what concerns the model as a whole last; as text, a table and
    how many modules each action has met."""

    def __str__(self) -> str:
        if not self:
            return "nothing to fuse: there is no Linear layer and no activation"
        rows = [Row("module", "action", "reason"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        table = (f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)
        counts = Counter(row.action for row in self if row.path)
        summary = (f"{counts[action]} {action}" for action in ACTIONS if counts[action])
        return "\n".join([*table, ", ".join(summary)])


@overload
def fuse(
    model: M,
    *,
    inplace: bool = ...,
    graph: Literal[False] = ...,
    inference: bool = ...,
    report: Literal[False] = ...,
) -> M: ...
@overload
def fuse(
    model: Module, *, inplace: bool = ..., graph: bool, inference: bool = ..., report: Literal[False] = ...
) -> Module: ...
@overload
def fuse(
    model: Module, *, inplace: bool = ..., graph: bool = ..., inference: bool = ..., report: Literal[True]
) -> tuple[Module, Report]: ...
def fuse(
    model: Module,
    *,
    inplace: bool = False,
    graph: bool = False,
    inference: bool = False,
    report: bool = False,
) -> Any:
    """`model` with each Linear and the activation after it as one LinearActivation, each gated unit as one
    product, other Linear layers and activations as this package's, and everything else as it was.

    Same outputs, same parameters (the same objects: an optimizer made before goes on), same state_dict keys.
    The Linear becomes a LinearActivation, its activation a FusedActivation, which is an Identity. A pair is
    fused only where every use of both is seen to be the one after the other. A module that multiplies,
    `act(self.gate(x)) * self.up(x)`, gets a subclass of its class with another forward. Hooks,
    parametrizations, subclasses of Linear and the like are left alone. Methods of the model are read; code
    outside it that calls a Linear directly is not known. docs/fuse.md has the details.

    Args:
        model: any module; it stays as it is, and the result shares its parameters and buffers.
        inplace: change `model` itself instead, and return it.
        graph: fuse functional calls too, `F.elu(self.a(x))`. Where torch.fx can trace the whole model, the
            result is a torch.fx.GraphModule.
        inference: for a model that will only be run. The result is in eval mode, and its `train()` raises
            RuntimeError. A Linear and the BatchNorm1d after it are one layer, with a weight and a bias of its
            own, which need no gradient; the BatchNorm1d's keys are gone from the state_dict. Dropout is an
            Identity. Later changes of `model` are not seen. `unfuse` brings back what was, in eval mode.
        report: return (model, Report): what was fused, what was left, and why.

    Raises:
        TypeError: `model` is not a module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> fused, report = mlpext.fuse(model, report=True)
    >>> print(report)
    module  action    reason
    0       fused     with 1 (Tanh)
    1       fused     into 0
    2       replaced  by mlpext.nn.Linear: no activation follows it: its output is a result
    2 fused, 1 replaced
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    result = model if inplace else _copy(model, inference)
    rows = _fuse(result, inference)
    if graph:
        result = fuse_graph(result, rows)
    return (result, Report(sorted(rows.values(), key=lambda row: not row.path))) if report else result


def unfuse(model: Module) -> Module:
    """Undo `fuse`, in place: every module is again of the class that it was, with the parameters that it had.

    Returns `model`; for the GraphModule of `fuse(..., graph=True)`, the model it was made of.

    Raises:
        TypeError: `model` is not a module.

    >>> mlpext.unfuse(mlpext.fuse(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())))
    Sequential(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (1): Tanh()
    )
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, FusedGraph):
        model = model.model
    for module in model.modules():
        was = vars(module).pop(WAS, None)
        if was is not None:
            if isinstance(module, nn.LinearActivation):
                del module.activation, module.params
            set_class(module, was)
            unfold(module)
    return model


def _copy(model: Module, inference: bool) -> Module:
    """A copy of the modules, with the very same parameters, buffers and hooks."""
    memo: dict[int, Any] = {}

    def keep(values: Iterable[Any]) -> None:
        memo.update((id(value), value) for value in values)

    kept = (vars(module)[KEPT] for module in model.modules() if KEPT in vars(module))
    for module in chain(model.modules(), kept):
        if isinstance(module, torch.jit.ScriptModule):
            keep([] if inference else [module])  # nothing in it is changed, but for its mode
            continue
        keep(module._parameters.values())
        keep(module._buffers.values())
        keep(value for value in vars(module).values() if isinstance(value, Tensor))
        hooks = (hook for name in HOOKS for hook in (vars(module).get(name) or {}).values())
        # A hook that is a method of the model goes with the copy.
        keep(hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), Module))
    memo.pop(id(None), None)
    return copy.deepcopy(model, memo)


def _fuse(model: Module, inference: bool) -> dict[Module, Row]:
    """Fuse in place; what became of every linear layer and every activation, in the model's order."""
    before = {module: vars(module)[WAS] for module in model.modules() if WAS in vars(module)}
    if inference:
        model.eval()
        for dropout in [module for module in model.modules() if type(module) in DROPOUTS]:
            _change_class(dropout, FusedDropout)
    calls = Calls(model)
    folded, why_not_folded = fold(calls) if inference else ({}, {})
    for norm in folded.values():
        _change_class(norm, FoldedBatchNorm)
    forwards = find_forwards(calls)
    units: dict[Module, Row] = {}
    for module, (_, found_units) in forwards.items():
        for part, row in _unit_rows(module, found_units, calls):
            units.setdefault(part, row)
    pairs, rows = find_pairs(calls, units)
    layers = find_layers(calls, rows)
    note_folded(calls, folded, why_not_folded, rows)
    for module, was in before.items():
        rows[module] = Row(calls.paths[module], "unchanged", f"fused already: it was {was.__name__}")

    found = {linear: activation_of(next(iter(activations))) for linear, activations in pairs.items()}
    found |= {layer.get_submodule("linear1"): activation for layer, activation in layers.items()}
    for linear in found | folded:
        linear.activation, linear.params = found.get(linear) or ("identity", {})  # type: ignore[assignment]
        _change_class(linear, FoldedLinear if linear in folded else nn.LinearActivation)
    for module, (cls, _) in forwards.items():
        _change_class(module, cls)
    for layer in layers:
        _change_class(layer, FUSED[type(layer)])
    for activation in {a: None for activations in pairs.values() for a in activations}:
        _change_class(activation, FusedActivation)
    for module, row in rows.items():
        if type(module) is Linear and why_not_linear(module) is None:
            _change_class(module, nn.Linear)
        elif row.action == "replaced":
            _change_class(module, OURS[type(module)])
    return {module: rows[module] for module in calls.paths if module in rows}


def _unit_rows(module: Module, units: list[Unit], calls: Calls) -> Iterator[tuple[Module, Row]]:
    """The rows of a module whose forward has such units, and of their parts."""
    action = "unchanged" if isinstance(module, FusedForward) else "fused"
    owner = calls.paths[module] or "the model"
    yield module, Row(calls.paths[module], action, "its forward has " + ", ".join(map(str, units)))
    for unit in units:
        for node in unit.parts:
            if node.op == "call_module":
                part = node.meta["module"]
                yield part, Row(calls.paths[part], action, f"in the forward of {owner}: {unit}")


def _change_class(module: Module, cls: type[Module]) -> None:
    vars(module).setdefault(WAS, type(module))
    set_class(module, cls)
