"""Which linear layers can be fused with the activation after them, and what the report says of each module.

The rule: every call of the linear layer is seen, each goes to an activation and nowhere else, and that
activation takes nothing but the output of such layers. One use that is not seen, and the pair is left.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx
from torch.nn import GLU, BatchNorm1d, Dropout, Linear, Module

from mlpext.fusion._calls import Calls
from mlpext.fusion._patterns import Activation, activation_called, activation_of, why_not_linear
from mlpext.fusion._trace import describe, has_hooks, is_from_torch, producer, sole_user
from mlpext.nn._activations import OURS

# Linear layer -> the activations that follow it, a set in the order of the calls; all of them are alike.
Pairs = dict[Module, dict[Module, None]]


# f(c z) = c f(z) for c >= 0, and dropout multiplies by 0 or by 1 / (1 - p): f(dropout(z)) = dropout(f(z)).
_HOMOGENEOUS = ("relu", "leaky_relu")

ACTIONS = ("fused", "replaced", "left", "unchanged")


class Row(NamedTuple):
    """What became of one module: `action` is one of ACTIONS."""

    path: str
    action: str
    reason: str


def find_pairs(calls: Calls, units: dict[Module, Row]) -> tuple[Pairs, dict[Module, Row]]:
    """The pairs to fuse, and a row for every linear layer and activation, in the model's order. `units` are
    the rows of modules that forwards have in units of their own (`_units`)."""
    pairs: Pairs = {}
    left: dict[Module, str] = {}
    for module in calls.paths:
        if isinstance(module, Linear) and module not in units:
            following = why_not_linear(module) or _activations_after(calls, module)
            if isinstance(following, str):
                left[module] = following
            else:
                pairs[module] = following
    _drop_shared(calls, pairs, left)

    fused_into: dict[Module, list[str]] = {}
    for linear, activations in pairs.items():
        for activation in activations:
            fused_into.setdefault(activation, []).append(calls.paths[linear])
    rows: dict[Module, Row] = {}
    for module, path in calls.paths.items():
        if module in units:
            rows[module] = units[module]
        elif module in pairs:
            names = ", ".join(f"{calls.paths[a]} ({type(a).__name__})" for a in pairs[module])
            rows[module] = Row(path, "fused", f"with {names}")
        elif module in fused_into:
            rows[module] = Row(path, "fused", f"into {', '.join(fused_into[module])}")
        elif isinstance(module, Linear):
            rows[module] = lone_linear(path, module, left[module])
        elif type(module) in OURS or isinstance(module, tuple(OURS)):
            rows[module] = _lone_activation(calls, module)
        elif module in calls.untraced:
            rows[module] = Row(path, "left", calls.untraced[module])
    return pairs, rows


def _activations_after(calls: Calls, linear: Module) -> dict[Module, None] | str:
    """The activations that follow the calls of `linear`, or why it cannot be fused with them."""
    if reason := calls.why_unseen(linear):
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
    return found


def _activation_after(calls: Calls, node: fx.Node) -> Module | str:
    """The activation that takes what the call `node` returns, or why there is none to fuse with."""
    after = user = sole_user(node)
    if not isinstance(after, str) and _is_dropout(after):
        user = sole_user(after)
        if isinstance(user, str) or user.op != "call_module":
            return f"its output goes to {describe(after)}"
    if isinstance(after, str) or isinstance(user, str):
        return str(user)
    if user.op != "call_module":
        hint = ", a function, in a forward that goes more than one way" if activation_called(user) else ""
        return f"its output goes to {describe(user)}{hint}"
    activation: Module = user.meta["module"]
    found = activation_of(activation)
    if found is None:
        hint = ": see inference=True" if type(activation) is BatchNorm1d else ""
        return f"its output goes to {describe(after)}{hint}"
    if user is not after and (reason := _why_not_before(after.meta["module"], found)):
        return f"{describe(after)} comes before its activation {describe(user)}, and {reason}"
    if has_hooks(activation):
        return f"its activation {describe(user)} has hooks"
    if reason := calls.why_unseen(activation):
        return f"its activation {describe(user)}: {reason}"
    return calls.why_used_apart(node, user) or activation


def _is_dropout(node: fx.Node) -> bool:
    return node.op == "call_module" and type(node.meta["module"]) is Dropout


def _why_not_before(dropout: Module, activation: Activation) -> str | None:
    """Why `activation` may not be computed before `dropout` that comes before it."""
    if activation[0] not in _HOMOGENEOUS:
        return "the other order is another function: see inference=True"
    if has_hooks(dropout):
        return "has hooks"
    return "works in place" if dropout.inplace else None


def _drop_shared(calls: Calls, pairs: Pairs, left: dict[Module, str]) -> None:
    """Drop pairs whose activation is used elsewhere too, until none is: a dropped layer is such a use."""
    settled = False
    while not settled:
        settled = True
        for linear, activations in list(pairs.items()):
            for activation in activations:
                if reason := _other_use(calls, activation, pairs):
                    left[linear] = reason
                    del pairs[linear]
                    settled = False
                    break


def _other_use(calls: Calls, activation: Module, pairs: Pairs) -> str | None:
    """A call of `activation` on anything but the output of a layer of `pairs`; None if there is none."""
    for node in calls.nodes[activation]:
        came = producer(node)
        if isinstance(came, fx.Node) and _is_dropout(came):
            came = producer(came)
        if isinstance(came, fx.Node) and came.op == "call_module" and came.meta["module"] in pairs:
            continue
        what = f"the output of {describe(came)}" if isinstance(came, fx.Node) else "something else"
        return calls.decided_by(node) or f"its activation {calls.paths[activation]} is also used on {what}"
    return None


def lone_linear(path: str, linear: Module, reason: str) -> Row:
    """The row of a linear layer that is fused with nothing: ours computes the same."""
    if type(linear) is not Linear or why_not_linear(linear) is not None:
        return Row(path, "left", reason)
    return Row(path, "replaced", f"by mlpext.nn.Linear: {reason}")


def _lone_activation(calls: Calls, activation: Module) -> Row:
    """The row of an activation that is in no pair: replaced by ours, where that is the same function."""
    path = calls.paths[activation]
    unusual = activation_of(activation) is None and type(activation) is not GLU
    if unusual or type(activation) not in OURS:
        return Row(path, "left", f"not torch.nn.{type(activation).__name__} itself, or unusual parameters")
    for parent, _ in calls.parents[activation]:
        if parent in calls.untraced and is_from_torch(type(parent)):
            return Row(path, "left", calls.untraced[parent])
    before = next((p for node in calls.nodes[activation] if isinstance(p := producer(node), fx.Node)), None)
    after = f", after {describe(before)}" if before is not None else ""
    return Row(path, "replaced", f"by mlpext.nn.{type(activation).__name__}, alone{after}")
