"""torch's transformer layers whose activation is a function, as it is by default: F.relu.

Their feed-forward part is linear2(dropout(activation(linear1(x)))), in the method `_ff_block`. Where
`activation` is a module, it and `linear1` are a pair like any other. Where it is a function, `linear1`
becomes a LinearActivation, and the layer gets a class from here, whose `_ff_block` does not call it again.
In eval mode without gradients the layer gives `linear1.weight` to one operator of torch, now as before.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from torch.nn import Module, TransformerDecoderLayer, TransformerEncoderLayer

from mlpext.fusion._calls import Calls
from mlpext.fusion._pairs import Row, lone_linear
from mlpext.fusion._patterns import Activation, activation_after, why_not_linear
from mlpext.fusion._trace import sole_user

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)


class _Fused(Module):
    """What both have in common.

    Raises:
        AttributeError: when `activation` is set, which `linear1` would not see.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation":
            raise AttributeError(
                "activation: it has become part of the linear layer before it, and a change here would be "
                "lost; mlpext.unfuse(model) first, or change linear1.activation and linear1.params"
            )
        super().__setattr__(name, value)


class FusedTransformerEncoderLayer(_Fused, TransformerEncoderLayer):
    """A torch.nn.TransformerEncoderLayer whose `linear1` computes the activation."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.linear1(x))))  # type: ignore[no-any-return]


class FusedTransformerDecoderLayer(_Fused, TransformerDecoderLayer):
    """A torch.nn.TransformerDecoderLayer whose `linear1` computes the activation."""

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.linear1(x))))  # type: ignore[no-any-return]


FUSED: dict[type[Module], type[Module]] = {
    TransformerEncoderLayer: FusedTransformerEncoderLayer,
    TransformerDecoderLayer: FusedTransformerDecoderLayer,
}


def find_layers(calls: Calls, rows: dict[Module, Row]) -> dict[Module, Activation]:
    """The layers to fuse, each with its activation. `rows` gets what became of them and their `linear1`."""
    found: dict[Module, Activation] = {}
    for layer, path in calls.paths.items():
        if not isinstance(layer, tuple(FUSED)) or "activation" not in vars(layer):
            continue
        linear = layer._modules.get("linear1")
        if linear is None or linear not in rows or why_not_linear(linear) or calls.why_unseen(linear):
            continue
        answer = _activation(calls, layer, linear)
        if isinstance(answer, str):
            rows[linear] = lone_linear(calls.paths[linear], linear, answer)
        elif answer is not None:
            found[layer], (name, _) = answer, answer
            rows[layer] = Row(path, "fused", f"linear1 with {name}")
            rows[linear] = Row(calls.paths[linear], "fused", f"with {name}, the activation of its layer")
    return found


def _activation(calls: Calls, layer: Module, linear: Module) -> Activation | str | None:
    """The activation after every call of `linear`, its `linear1`; or why it is left, None where the row of
    `linear` says so already."""
    found: list[Activation] = []
    for node in calls.nodes[linear]:
        last, activation = activation_after(node)
        if last is None or activation is None or calls.owner[node.graph] is not layer:
            return None
        after = sole_user(last)
        if isinstance(after, str) or after.target not in ("dropout", "linear2"):
            return "its output goes to a function that is more than an activation"
        if reason := calls.why_used_apart(node, last):
            return reason
        found.append(activation)
    if not found or any(each != found[0] for each in found):
        return None
    if type(layer) not in FUSED:
        return f"its output goes to {found[0][0]}, a function, in {type(layer).__name__}, not torch's class"
    if not isinstance(layer.activation, _FUNCTIONS):
        return (
            f"its activation is an object of {type(layer.activation).__name__}, whose attributes may change"
        )
    return found[0]
