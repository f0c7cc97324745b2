"""The functions of `mlpext._C` by torch's own operators: same arguments, same results to rounding.

For two callers. `mlpext._C` calls them when an argument is not a plain tensor (a subclass, a proxy of
torch.fx, something that is no tensor at all), for torch to take or refuse it. torch.compile traces them in
place of the compiled functions, so that Inductor fuses an activation with its neighbours. Behind the
dispatcher, csrc/ops/composites.cpp has the same in C++.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import is_tensor_like

from mlpext import _C


def _wide(function: Callable[..., Tensor], input: Tensor, parameter: float) -> Tensor:
    """`function` computed in float32 or wider and rounded once, as `wide` of csrc/ops/composites.cpp."""
    if input.dtype in (torch.float16, torch.bfloat16):
        return function(input.float(), parameter).to(input.dtype)
    return function(input, parameter)


def _sine(input: Tensor, omega: float) -> Tensor:
    return _wide(lambda x, omega: torch.sin(x * omega), input, omega)


def _squareplus(input: Tensor, b: float) -> Tensor:
    """As csrc/ops/composites.cpp has it, which says why."""
    if not 1e-30 < b < 1e20:
        return torch.ops.mlpext.activation(input, "squareplus", (b,))  # type: ignore[no-any-return]
    if not input.is_floating_point() or input.layout != torch.strided or input.is_nested:
        return (input + torch.sqrt(input * input + b)) / 2

    def parts(x: Tensor, b: float) -> Tensor:
        size = x.abs()
        far = size > 1e9 * math.sqrt(b)
        near = x.masked_fill(far, 0)
        root = torch.where(far, size, torch.sqrt(near * near + b))
        return torch.where(x >= 0, x / 2 + root / 2, b / 4 / (root / 2 + size / 2))

    return _wide(parts, input, b)


# Where torch.nn.functional has no function of that name, or a deprecated one.
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
# Where torch has no such function: made of its operators, which torch.export must see.
_COMPOSED = {"sine": _sine, "squareplus": _squareplus}


def activation(input: Tensor, name: str, params: tuple[float, ...] = (), inplace: bool = False) -> Tensor:
    """The function `name` of torch.nn.functional, or one made of torch's operators."""
    function: Callable[..., Tensor] | None = _FUNCTIONS.get(name) or getattr(F, name, None)
    if function is not None:
        return function(input, *params, inplace=True) if inplace else function(input, *params)
    if not is_tensor_like(input):  # type: ignore[no-untyped-call]
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(input).__name__}")
    if name in _COMPOSED and isinstance(input, Tensor):  # no proxy of torch.fx
        return _COMPOSED[name](input, *params)
    return torch.ops.mlpext.activation(input, name, params)  # type: ignore[no-any-return]


def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """Maximum over `pieces` groups of the slices of `dim`; the first piece wins a tie."""
    parts = torch.unflatten(input, dim, (pieces, -1))
    return parts.max(dim if dim >= 0 else dim - 1).values


def linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, name: str, params: tuple[float, ...] = ()
) -> Tensor:
    """The activation `name` of a linear layer."""
    z = F.linear(input, weight, bias)
    return z if name == "identity" else activation(z, name, params)


def linear_maxout(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The maximum of `pieces` linear layers: weight (pieces, out_features, in_features)."""
    z = F.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1))
    return maxout(z, weight.size(0))


def linear_gated(
    input: Tensor, weight: Tensor, bias: Tensor | None, name: str, params: tuple[float, ...] = ()
) -> Tensor:
    """The activation `name` of one half of a linear layer times the other: weight (2, out, in)."""
    z = F.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1))
    gate, value = torch.unflatten(z, -1, (2, -1)).unbind(-2)
    return (gate if name == "identity" else activation(gate, name, params)) * value


def mlp(module: torch.nn.Module, input: Tensor) -> Any:
    """NotImplemented, upon which MLP.forward calls layer by layer."""
    return NotImplemented


_SUBSTITUTES = (activation, maxout, linear_activation, linear_maxout, linear_gated, mlp)
for _function in _SUBSTITUTES:
    _C.register_fallback(_function.__name__, _function)


def _tell_dynamo() -> None:
    """Dynamo cannot look into a C++ function; it is told what to trace in its place."""
    for function in _SUBSTITUTES:
        compiled = getattr(_C, function.__name__)
        torch.compiler.substitute_in_graph(compiled, skip_signature_check=True)(function)


class _WhenDynamoComes(importlib.abc.MetaPathFinder):
    """Tells Dynamo once it is imported: to import it here would take as long as torch itself, 0.9 s."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            _tell_dynamo()

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec


if "torch._dynamo" in sys.modules:
    _tell_dynamo()
else:
    sys.meta_path.insert(0, _WhenDynamoComes())
