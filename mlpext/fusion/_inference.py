"""`fuse(..., inference=True)`: what holds in eval mode alone.

Dropout does nothing there. BatchNorm1d multiplies each output of the Linear before it by a number and adds
another, so that both are a Linear with other weights: W' = s W, b' = s (b - mean) + shift for each row.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.nn import BatchNorm1d, Identity, Linear, Module, Parameter
from torch.nn.modules import dropout
from torch.nn.utils.fusion import fuse_linear_bn_weights

from mlpext.fusion._calls import Calls
from mlpext.fusion._pairs import Row, lone_linear
from mlpext.fusion._patterns import why_not_linear
from mlpext.fusion._trace import describe, has_hooks, producer, sole_user
from mlpext.nn import LinearActivation

# The attribute of a folded module that keeps a module with its parameters and buffers from before.
KEPT = "_before_folding"

DROPOUTS: set[type[Module]] = {getattr(dropout, name) for name in dropout.__all__}


class _ForInference(Module):
    """A part of a model that is only run.

    Raises:
        RuntimeError: when it is put in training mode.
    """

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(
                "train(): this model was fused with inference=True, for eval mode alone; "
                "mlpext.unfuse(model) gives back one that can be trained"
            )
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if kept := vars(self).get(KEPT):  # `to` moves these too
            kept._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class FusedDropout(_ForInference, Identity):
    """A dropout in eval mode: it returns its input, (*) -> (*)."""


class FoldedBatchNorm(_ForInference, Identity):
    """A BatchNorm1d that has become part of the Linear before it: it returns its input, (*) -> (*).

    Raises:
        RuntimeError: when a checkpoint is loaded that has values for it: they would be lost.
    """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if found := [key for key in state_dict if key.startswith(prefix)]:
            error_messages: list[str] = args[-1]
            error_messages.append(
                f"{found[0]}: this BatchNorm1d has become part of the Linear before it; load the checkpoint "
                "into the model before fuse(..., inference=True)"
            )


class FoldedLinear(_ForInference, LinearActivation):
    """A Linear, the BatchNorm1d after it, and an activation: (batch, in_features) -> (batch, out_features).

    Raises:
        ValueError: the input has not two dimensions. Of three, BatchNorm1d would normalize the second.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"input: {input.dim()} dimensions, expected 2: the BatchNorm1d after this layer, which has "
                "become part of it, normalizes dimension 1; fuse without inference=True"
            )
        return super().forward(input)


def fold(calls: Calls) -> tuple[dict[Linear, BatchNorm1d], dict[Module, str]]:
    """Fold each BatchNorm1d that can be into the Linear before it, as far as their parameters go: Linear ->
    BatchNorm1d. Of the others, Linear -> why it is left."""
    found: dict[Linear, BatchNorm1d] = {}
    left: dict[Module, str] = {}
    for linear in calls.paths:
        if isinstance(linear, Linear) and not why_not_linear(linear) and not calls.why_unseen(linear):
            after = _norm_after(calls, linear)
            if isinstance(after, BatchNorm1d):
                found[linear] = after
            elif after is not None:
                left[linear] = after
    for linear, norm in found.items():
        _fold(linear, norm)
    return found, left


def note_folded(
    calls: Calls, folded: dict[Linear, BatchNorm1d], left: dict[Module, str], rows: dict[Module, Row]
) -> None:
    """Add to `rows` what `fold` has found."""
    for linear, norm in folded.items():
        linear_path, norm_path, row = calls.paths[linear], calls.paths[norm], rows[linear]
        more = f", {row.reason}" if row.action == "fused" else ""
        rows[linear] = Row(linear_path, "fused", f"with {norm_path} (BatchNorm1d){more}")
        rows[norm] = Row(norm_path, "fused", f"into {linear_path}")
    rows |= {linear: lone_linear(calls.paths[linear], linear, reason) for linear, reason in left.items()}


def _norm_after(calls: Calls, linear: Linear) -> BatchNorm1d | str | None:
    """The BatchNorm1d after every call of `linear`, and after nothing else; or why it cannot be folded. None
    where no call goes to one."""
    users = {node: sole_user(node) for node in calls.nodes[linear]}
    norms = {user.meta["module"]: user for user in users.values() if _is_norm(user)}
    for norm, user in norms.items():
        what = f"its output goes to {describe(user)}, which"
        for node, other in users.items():
            if not _is_norm(other) or other.meta["module"] is not norm:
                return calls.decided_by(node) or f"{what} is not all that follows it"
            if reason := calls.why_used_apart(node, other):
                return reason
        for call in calls.nodes[norm]:
            before = producer(call)
            if not isinstance(before, fx.Node) or before.meta.get("module") is not linear:
                return calls.decided_by(call) or f"{what} is also used on something else"
        if reason := calls.why_unseen(norm):
            return f"its output goes to {describe(user)}: {reason}"
        reason = _why_not_folded(linear, norm)
        return f"{what} {reason}" if reason else norm
    return None


def _is_norm(user: fx.Node | str) -> TypeGuard[fx.Node]:
    return isinstance(user, fx.Node) and type(user.meta.get("module")) is BatchNorm1d


def _why_not_folded(linear: Linear, norm: BatchNorm1d) -> str | None:
    if has_hooks(norm) or "forward" in vars(norm):
        return "has hooks, or a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics: it takes those of each batch"
    if norm.num_features != linear.out_features:
        return f"normalizes {norm.num_features} channels, not the {linear.out_features} outputs"
    return None


@torch.no_grad()
def _fold(linear: Linear, norm: BatchNorm1d) -> None:
    """Give `linear` the weight and bias of both, computed in float64, and `norm` none."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    bias = torch.zeros_like(mean) if linear.bias is None else linear.bias.double()
    folded = fuse_linear_bn_weights(linear.weight.double(), bias, mean, variance, norm.eps, scale, shift)
    dtype = linear.weight.dtype
    weight, bias = (Parameter(value.to(dtype), requires_grad=False) for value in folded)
    for module, parameters in ((linear, {"weight": weight, "bias": bias}), (norm, {})):
        vars(module)[KEPT] = copy.copy(module)
        vars(module).update(_parameters=parameters, _buffers={})


def unfold(module: Module) -> None:
    """Give `module` its parameters and buffers from before."""
    if kept := vars(module).pop(KEPT, None):
        vars(module).update(_parameters=kept._parameters, _buffers=kept._buffers)
