"""What `mlpext._C` has, by torch's own operators: the same names and arguments, the same results to rounding.

It stands in the place of `mlpext._C` where no compiled library fits (see `_extension`). Where one does, its
operators serve the calls that the compiled ones leave to torch (see `_torch_fallback`). So the activations
stand here once in Python, as csrc/ops/composites.cpp has them in C++.

What the native engine alone uses is not here: without the library it says why it cannot train.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, is_tensor_like

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOW = 0xFFFFFFFF  # the lower half of 64 bits

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
VALUE_CELLS = SIDE_CELLS = 0  # torch serves everything: no sizes to tell apart


def _is_ordinary(input: Tensor) -> bool:
    """Whether this is of a dtype that has kernels, and dense; all else takes the formula as it stands."""
    return input.dtype in _FLOATS and input.layout == torch.strided and not input.is_nested


def _wide(function: Callable[[Tensor], Tensor], input: Tensor, least: torch.dtype = torch.float32) -> Tensor:
    """Several operators in `least` or wider, rounded once at the end, as single operators of torch are."""
    if not isinstance(input, Tensor) or not _is_ordinary(input):
        return function(input)
    dtype = torch.promote_types(input.dtype, least)
    return function(input) if dtype == input.dtype else function(input.to(dtype)).to(input.dtype)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Not by torch's own, whose backward has no derivative."""
    if inplace or not isinstance(input, Tensor) or not _is_ordinary(input):
        return F.hardsigmoid(input, inplace)
    return _wide(lambda x: (F.hardtanh(x, -3.0, 3.0) + 3) / 6, input)


def _sine(input: Tensor, omega: float) -> Tensor:
    return _wide(lambda x: torch.sin(x * omega), input)


def _squareplus(input: Tensor, b: float) -> Tensor:
    """As csrc/ops/composites.cpp has it, which says why."""
    b = b.item() if isinstance(b, np.generic) else b
    if not _is_ordinary(input) or not 0 < b <= sys.float_info.max:  # "< inf" is what Dynamo takes for true
        return (input + torch.sqrt(input * input + b)) / 2

    def parts(x: Tensor) -> Tensor:
        size = x.abs()
        far = size > min(1e9 * math.sqrt(b), 1e154)
        near = x.masked_fill(far, 0)
        root = torch.where(far, size, torch.sqrt(near * near + b))
        return torch.where(x >= 0, x / 2 + root / 2, b / 4 / (root / 2 + size / 2))

    return _wide(parts, input, torch.float32 if 1e-30 < b < 1e20 else torch.float64)


def _relu_squared(input: Tensor) -> Tensor:
    return F.relu(input).square()


def _quick_gelu(input: Tensor, alpha: float) -> Tensor:
    return _wide(lambda x: x * torch.sigmoid(x * alpha), input)


# The activations in the order of csrc/formulas/activations.h, with their parameters.
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "identity": (torch.clone, {}),
    "sigmoid": (torch.sigmoid, {}),
    "tanh": (torch.tanh, {}),
    "relu": (F.relu, {}),
    "leaky_relu": (F.leaky_relu, {"negative_slope": 0.01}),
    "elu": (F.elu, {"alpha": 1.0}),
    "gelu": (F.gelu, {}),
    "gelu_tanh": (partial(F.gelu, approximate="tanh"), {}),
    "silu": (F.silu, {}),
    "mish": (F.mish, {}),
    "softplus": (F.softplus, {"beta": 1.0, "threshold": 20.0}),
    "selu": (F.selu, {}),
    "celu": (F.celu, {"alpha": 1.0}),
    "relu6": (F.relu6, {}),
    "hardtanh": (F.hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    "hardsigmoid": (_hardsigmoid, {}),
    "hardswish": (F.hardswish, {}),
    "logsigmoid": (F.logsigmoid, {}),
    "softsign": (partial(_wide, F.softsign), {}),
    "tanhshrink": (partial(_wide, F.tanhshrink), {}),
    "softshrink": (F.softshrink, {"lambd": 0.5}),
    "hardshrink": (F.hardshrink, {"lambd": 0.5}),
    "sine": (_sine, {"omega": 1.0}),
    "squareplus": (_squareplus, {"b": 4.0}),
    "relu_squared": (_relu_squared, {}),
    "quick_gelu": (_quick_gelu, {"alpha": 1.702}),
    "threshold": (F.threshold, {"threshold": 0.0, "value": 0.0}),
}
# Those that torch has no function for: here they are made of several of its operators.
_COMPOSED = {name for name in _ACTIVATIONS if not hasattr(F, name)} - {"identity", "gelu_tanh"}


def activations() -> dict[str, dict[str, float]]:
    """Names of the elementwise activations, each with its parameters and their defaults."""
    return {name: dict(defaults) for name, (_, defaults) in _ACTIVATIONS.items()}


def activation(input: Tensor, name: str, params: tuple[float, ...] = (), inplace: bool = False) -> Tensor:
    """The function `name` of torch, or one made of torch's operators."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: unknown name '{name}', expected one of {', '.join(_ACTIVATIONS)}")
    function, defaults = _ACTIVATIONS[name]
    if len(params) != len(defaults):
        raise ValueError(f"params: activation '{name}' takes {len(defaults)} parameter(s), got {len(params)}")
    if name in _COMPOSED and not isinstance(input, Tensor):
        if not is_tensor_like(input):
            raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(input).__name__}")
        from mlpext import _C  # a proxy of torch.fx: in its graph stands the operator, not what it is made of

        return handle_torch_function(_C.activation, (input,), input, name, params)
    return function(input, *params, inplace=True) if inplace else function(input, *params)


def _have_shapes(*tensors: Tensor) -> bool:
    """Whether their shapes are numbers: not those of torch.fx's proxies, nor what torch.jit.trace records."""
    return all(isinstance(tensor, Tensor) for tensor in tensors) and torch._C._get_tracing_state() is None


def _index(value: Any) -> int:
    """An integer of NumPy's, or a tensor of one, as a plain one. TypeError for what is no integer."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)  # type: ignore[return-value]


def maxout(input: Tensor, pieces: int, dim: int = -1) -> Tensor:
    """Maximum over `pieces` groups of the slices of `dim`; the first piece wins a tie."""
    if _have_shapes(input):
        pieces, dim = _index(pieces), _index(dim)
        if input.dim() == 0 and dim in (0, -1):
            raise RuntimeError("input: a 0-d tensor has no dimension to split into pieces")
        if pieces < 1 or input.size(dim) % pieces:
            shape = tuple(input.shape)
            raise RuntimeError(f"pieces: {pieces} does not divide dimension {dim} of input, shape {shape}")
    parts = torch.unflatten(input, dim, (pieces, -1))
    return parts.max(dim if dim >= 0 else dim - 1).values


def gated(gate: Tensor, value: Tensor, name: str, params: tuple[float, ...] = ()) -> Tensor:
    """The activation `name` of the gate, times the value."""
    return torch.mul(gate if name == "identity" else activation(gate, name, params), value)


def linear_activation(
    input: Tensor, weight: Tensor, bias: Tensor | None, name: str, params: tuple[float, ...] = ()
) -> Tensor:
    """The activation `name` of a linear layer."""
    z = F.linear(input, weight, bias)
    return z if name == "identity" else activation(z, name, params)


def _stacked_linear(input: Tensor, weight: Tensor, bias: Tensor | None, pieces: int | None = None) -> Tensor:
    """The linear layers of a weight (pieces, out_features, in_features) side by side."""
    if _have_shapes(input, weight):
        shape = tuple(weight.shape)
        if len(shape) != 3 or (shape[0] < 1 if pieces is None else shape[0] != pieces):
            raise RuntimeError(
                f"weight: shape {shape}, expected ({pieces or 'pieces'}, out_features, in_features)"
            )
        if input.dim() < 1 or input.size(-1) != shape[2]:
            raise RuntimeError(f"input: shape {tuple(input.shape)}, expected (*, {shape[2]}) of the weight")
        if bias is not None and bias.shape != shape[:2]:
            raise RuntimeError(f"bias: shape {tuple(bias.shape)}, expected {shape[:2]} of the weight")
    return F.linear(input, weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1))


def linear_maxout(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The maximum of `pieces` linear layers: weight (pieces, out_features, in_features)."""
    return maxout(_stacked_linear(input, weight, bias), weight.size(0))


def linear_gated(
    input: Tensor, weight: Tensor, bias: Tensor | None, name: str, params: tuple[float, ...] = ()
) -> Tensor:
    """The activation `name` of one linear layer times the other: weight (2, out_features, in_features)."""
    gate, value = torch.unflatten(_stacked_linear(input, weight, bias, 2), -1, (2, -1)).unbind(-2)
    return gated(gate, value, name, params)


def mlp(module: torch.nn.Module, input: Tensor) -> Any:
    """NotImplemented, upon which MLP.forward calls layer by layer."""
    return NotImplemented


def register_layers(linear_activation: type, maxout: type, gated_linear: type) -> None:
    """Nothing: no network runs as one operator."""


def leave_to_torch(operation: int, dtype: int, activation: int, cells: Sequence[int]) -> None:
    """Nothing: everything is torch's."""


def cpu_isa() -> str:
    """The instruction set of torch's operators."""
    return torch.backends.cpu.get_cpu_capability().lower()


def cpu_isas() -> list[str]:
    """That one: the choice is torch's."""
    return [cpu_isa()]


def has_cuda() -> bool:
    """Whether there are kernels of the package for CUDA."""
    return False


def switches() -> list[tuple[str, str | None, str]]:
    """The environment variables that the library reads: none."""
    return []


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value of these tensors is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def mean_loss(losses: Tensor, step_size: int, samples: int) -> float:
    """The mean of E over an epoch's samples, from the means over its steps; the last may have fewer."""
    *means, last = losses.tolist()
    rest = samples - step_size * len(means)
    return float(sum(means) * step_size + last * rest) / samples


def _gathered(target: Tensor, rows: Tensor | None) -> Tensor:
    return target if rows is None else target[rows]


def _flat(rows: Tensor) -> Tensor:
    """(n, ...) as (n, outputs) in float64."""
    return rows.reshape(len(rows), -1).double()


def count_correct(output: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
    """Of how many rows the largest output is that of their class, or of the largest entry of d."""
    d = _gathered(target, rows)
    return (output.argmax(1) == (d if d.dim() == 1 else d.argmax(1))).sum()


def squared_errors(output: Tensor, target: Tensor, rows: Tensor | None) -> Tensor:
    """Sum over the rows of (d - o)^2, float64, one value an output."""
    return (_flat(_gathered(target, rows)) - _flat(output)).square().sum(0)


def spread(blocks: Iterable[Tensor]) -> list[float]:
    """Sum (d - mean d)^2 of each output, over blocks of rows of d; from their differences to the first row,
    because squares of d itself would cancel."""
    first: Any = None
    sums: Any = 0
    squares: Any = 0
    samples = 0
    for block in blocks:
        d = _flat(block)
        first = d[0] if first is None else first
        sums, squares = sums + (d - first).sum(0), squares + (d - first).square().sum(0)
        samples += len(d)
    return (squares - sums.square() / samples).clamp(min=0).tolist()  # type: ignore[no-any-return]


def r2(squared_errors: Tensor, spread: list[float]) -> float:
    """The mean over the outputs of 1 - squared_errors / spread; where spread is 0, of 1 for no error, else
    0."""
    scores = [
        1 - error / own if own else float(error == 0)
        for error, own in zip(squared_errors.tolist(), spread, strict=True)
    ]
    return sum(scores) / len(scores)


def dropout_mask(
    p: float, seed: int, epoch: int, layer: int, first: int, rows: int, units: int, dtype: torch.dtype
) -> Tensor:
    """0 or 1 / (1 - p) for each unit of a layer and each of the samples at first ... first + rows - 1 of an
    epoch, (rows, units): those of csrc/cpu/epoch/dropout.h, bit by bit."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: expected 0 <= p < 1, got {p}")
    # Philox's words of 32 bits in arrays of 64; for the few of a step NumPy takes a third of torch's time.
    row = np.arange(first, first + rows, dtype=np.uint64)[:, None] & _LOW
    quarter = np.arange(-(-units // 4), dtype=np.uint64)
    words = [row, *np.array([[[epoch]], [[layer]]], np.uint64), quarter]
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        one, other = (odd >> 32) ^ words[1], (even >> 32) ^ words[3]
        words = [one ^ keys[0], odd & _LOW, other ^ keys[1], even & _LOW]
        keys = [keys[0] + 0x9E3779B9 & _LOW, keys[1] + 0xBB67AE85 & _LOW]
    kept = np.stack(words, -1).reshape(rows, 4 * len(quarter))[:, :units] >= int(p * 2**32)
    return torch.from_numpy(kept).to(dtype) * (1 / (1 - p))
