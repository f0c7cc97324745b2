"""`fuse` and `unfuse`: an existing model, its Linear and activation pairs as one layer each.

A module is fused where it stands: it gets another class and keeps its identity, its parameters, its name and
its attributes, so that whatever refers to it (an optimizer, a list, another name in the same model) still
does. What it was stays noted on it, for `unfuse`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, fx
from torch.nn import Identity, Linear, Module

from mlpext import nn
from mlpext.fusion._graph import FusedGraph, fuse_graph
from mlpext.fusion._patterns import OURS, Row, activation_called, activation_of, why_not_linear
from mlpext.fusion._trace import Calls, describe, follower, has_hooks, is_torchs, reads, source

M = TypeVar("M", bound=Module)

_WAS = "_class_before_fuse"
_FREE = {"inplace", "training"}


class FusedActivation(Identity):
    """What `fuse` puts in an activation's place: it returns its input, since the layer before has computed
    the activation. Changes to the activation's parameters, which that layer would not see, are refused.
    `inplace` is none of them: no output hangs on it, and utilities set it on all modules of a model.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        was = vars(self).get(_WAS)
        if was and name not in _FREE and name in {*dir(was), *reads(was)} - {*dir(Identity)}:
            raise AttributeError(
                f"{name}: this {was.__name__} has become part of the linear layer before it, and a change "
                "here would be lost; mlpext.unfuse(model) first, or change `params` of that layer"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        was = vars(self).get(_WAS)
        return was.__name__ if was else ""


class Report(list[Row]):
    """The rows of `fuse(..., report=True)`; as text, a table."""

    def __str__(self) -> str:
        head = Row("module", "action", "reason")
        widths = [max(len(row[column]) for row in [head, *self]) for column in range(2)]
        return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in [head, *self])


@overload
def fuse(
    model: M, *, inplace: bool = ..., graph: Literal[False] = ..., report: Literal[False] = ...
) -> M: ...
@overload
def fuse(model: Module, *, inplace: bool = ..., graph: bool, report: Literal[False] = ...) -> Module: ...
@overload
def fuse(
    model: Module, *, inplace: bool = ..., graph: bool = ..., report: Literal[True]
) -> tuple[Module, Report]: ...
def fuse(model: Module, *, inplace: bool = False, graph: bool = False, report: bool = False) -> Any:
    """`model` with every Linear and activation that it recognises as one LinearActivation, bare activations
    as this package's, and everything else as it was.

    Same outputs, same parameters (the same objects: an optimizer made before goes on), same state_dict keys.
    The Linear becomes a LinearActivation, its activation a FusedActivation, which is an Identity. `model`
    itself stays as it is, unless `inplace`; the result shares its parameters and buffers. A pair is fused
    only where every use of both is seen to be the one after the other; hooks, parametrizations, subclasses of
    Linear and the like are left alone. Methods of the model are read; code outside it that calls a Linear
    directly is not known.

    `graph=True` fuses functional calls, `F.elu(self.a(x))`, too; where the whole model can be traced by
    torch.fx, the result is then a GraphModule. `report=True` returns (model, Report): what was fused, what
    was left, and why.

    TypeError for anything but a module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> print(mlpext.fuse(model, report=True)[1])
    module  action  reason
    0       fused   with 1 (Tanh)
    1       fused   into 0
    2       left    its output is the result of Sequential
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    result = model if inplace else _copy(model)
    rows = _fuse(result)
    if graph:
        result = fuse_graph(result, rows)
    return (result, Report(rows.values())) if report else result


def unfuse(model: Module) -> Module:
    """Undo `fuse`, in place: every module is again of the class that it was. Returns what was given to
    `fuse(..., graph=True)`, for a GraphModule that came from there.

    TypeError for anything but a module.

    >>> mlpext.unfuse(mlpext.fuse(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh())))
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, FusedGraph):
        model = model.model
    for module in model.modules():
        was = vars(module).pop(_WAS, None)
        if was is not None:
            if was is Linear:
                del module.activation, module.params
            module.__class__ = was
    return model


def _copy(model: Module) -> Module:
    """A copy of the modules, with the very same parameters, buffers and hooks."""
    memo: dict[int, Any] = {}

    def keep(values: Iterable[Any]) -> None:
        memo.update((id(value), value) for value in values)

    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            keep([module])  # nothing in it is changed
            continue
        keep(module._parameters.values())
        keep(module._buffers.values())
        keep(value for value in vars(module).values() if isinstance(value, Tensor))
        hooks = [value for name, value in vars(module).items() if name.endswith("_hooks") and value]
        # A hook that is a method of the model goes with the copy.
        keep(h for each in hooks for h in each.values() if not isinstance(getattr(h, "__self__", 0), Module))
    memo.pop(id(None), None)
    return copy.deepcopy(model, memo)


def _become(module: Module, cls: type[Module]) -> None:
    vars(module)[_WAS] = type(module)
    module.__class__ = cls


def _fuse(model: Module) -> dict[Module, Row]:
    """Fuse in place; what became of every linear layer and every activation, in the model's order."""
    calls = Calls(model)
    followers: dict[Module, dict[Module, None]] = {}
    left: dict[Module, str] = {}
    for module in calls.paths:
        if isinstance(module, Linear):
            reason = why_not_linear(module) or _find_followers(calls, module, followers)
            if reason:
                left[module] = reason
    _settle(calls, followers, left)

    rows: dict[Module, Row] = {}
    fused_into: dict[Module, list[str]] = {}
    for linear, activations in followers.items():
        for activation in activations:
            fused_into.setdefault(activation, []).append(calls.paths[linear])
    for module, path in calls.paths.items():
        if module in followers:
            names = ", ".join(f"{calls.paths[a]} ({type(a).__name__})" for a in followers[module])
            rows[module] = Row(path, "fused", f"with {names}")
        elif module in fused_into:
            rows[module] = Row(path, "fused", f"into {', '.join(fused_into[module])}")
        elif isinstance(module, Linear):
            rows[module] = Row(path, "left", left[module])
        elif type(module) in OURS or isinstance(module, tuple(OURS)):
            rows[module] = _bare(calls, module)
        elif module in calls.untraced:
            rows[module] = Row(path, "left", calls.untraced[module])

    for linear, activations in followers.items():
        linear.activation, linear.params = activation_of(next(iter(activations)))  # type: ignore[misc,assignment]
    for linear in followers:
        _become(linear, nn.LinearActivation)
    for activation in fused_into:
        _become(activation, FusedActivation)
    for module, row in rows.items():
        if row.action == "replaced":
            _become(module, OURS[type(module)])
    return rows


def _find_followers(calls: Calls, linear: Module, followers: dict[Module, dict[Module, None]]) -> str | None:
    """Note the activations that follow `linear`, or say why it has none that it could be fused with."""
    if reason := calls.unseen(linear):
        return reason
    if not calls.nodes[linear]:
        return "no forward calls it"
    found: dict[Module, None] = {}
    for node in calls.nodes[linear]:
        activation = _activation_after(calls, node)
        if not isinstance(activation, str):
            found[activation] = None
            if len({repr(activation_of(each)) for each in found}) == 1:
                continue
            activation = "different activations follow it"
        return calls.decided_by(node) or activation
    followers[linear] = found
    return None


def _activation_after(calls: Calls, node: fx.Node) -> Module | str:
    """The activation that takes what the call `node` returns, or why there is none to fuse with."""
    user = follower(node)
    if isinstance(user, str):
        return user
    if user.op != "call_module":
        hint = ", a function: see graph=True" if activation_called(user) else ""
        return f"its output goes to {describe(user)}{hint}"
    activation: Module = user.meta["module"]
    if activation_of(activation) is None:
        return f"its output goes to {describe(user)}"
    if has_hooks(activation):
        return f"its activation {describe(user)} has hooks"
    if reason := calls.unseen(activation):
        return f"its activation {describe(user)}: {reason}"
    return calls.used_by_a_method(node, user) or activation


def _settle(calls: Calls, followers: dict[Module, dict[Module, None]], left: dict[Module, str]) -> None:
    """Keep only linear layers whose activations serve no one but such layers."""
    settled = False
    while not settled:
        settled = True
        for linear, activations in list(followers.items()):
            for activation in activations:
                if reason := _stranger(calls, activation, followers):
                    left[linear] = reason
                    del followers[linear]
                    settled = False
                    break


def _stranger(calls: Calls, activation: Module, followers: dict[Module, dict[Module, None]]) -> str | None:
    """Why not every call of `activation` is of the output of one of `followers`; None if each is."""
    for node in calls.nodes[activation]:
        came = source(node)
        if isinstance(came, fx.Node) and came.op == "call_module" and came.meta["module"] in followers:
            continue
        what = f"the output of {describe(came)}" if isinstance(came, fx.Node) else "something else"
        return calls.decided_by(node) or f"its activation {calls.paths[activation]} is also used on {what}"
    return None


def _bare(calls: Calls, activation: Module) -> Row:
    """An activation by itself: ours in its place, where that is the same function."""
    path = calls.paths[activation]
    if activation_of(activation) is None or type(activation) not in OURS:
        return Row(path, "left", f"not torch.nn.{type(activation).__name__} itself, or unusual parameters")
    for parent, _ in calls.parents[activation]:
        if parent in calls.untraced and is_torchs(type(parent)):
            return Row(path, "left", calls.untraced[parent])
    linear = next((s for node in calls.nodes[activation] if isinstance(s := source(node), fx.Node)), None)
    after = f", after {describe(linear)}" if linear is not None else ""
    return Row(path, "replaced", f"by mlpext.nn.{type(activation).__name__}, alone{after}")
