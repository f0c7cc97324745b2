"""Modules: torch.nn's names, signatures, defaults and repr, on the functions of mlpext.functional.

An activation inherits from its counterpart in torch.nn, so that `isinstance`, `extra_repr` and its
attributes are the same; like it, it reads its parameters (`alpha`, `inplace`, ...) at each call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from mlpext import _C
from mlpext import functional as F


class Sigmoid(torch.nn.Sigmoid):
    """1 / (1 + e^-x); see `mlpext.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class Tanh(torch.nn.Tanh):
    """tanh(x); see `mlpext.functional.tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class ReLU(torch.nn.ReLU):
    """max(0, x); see `mlpext.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """x, and negative_slope x below 0; see `mlpext.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU):
    """x, and alpha (e^x - 1) below 0; see `mlpext.functional.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace)


class GELU(torch.nn.GELU):
    """x P(X <= x) for a normal X; see `mlpext.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """x sigmoid(x); see `mlpext.functional.silu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace)


class Mish(torch.nn.Mish):
    """x tanh(log(1 + e^x)); see `mlpext.functional.mish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace)


class Softplus(torch.nn.Softplus):
    """log(1 + e^(beta x)) / beta; see `mlpext.functional.softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)


class SELU(torch.nn.SELU):
    """scale elu(x, alpha); see `mlpext.functional.selu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input, self.inplace)


class CELU(torch.nn.CELU):
    """x, and alpha (e^(x / alpha) - 1) below 0; see `mlpext.functional.celu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """min(max(0, x), 6); see `mlpext.functional.relu6`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """x held between min_val and max_val; see `mlpext.functional.hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """x / 6 + 1/2 between 0 and 1; see `mlpext.functional.hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """x hardsigmoid(x); see `mlpext.functional.hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(input, self.inplace)


class LogSigmoid(torch.nn.LogSigmoid):
    """log(1 / (1 + e^-x)); see `mlpext.functional.logsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class Softsign(torch.nn.Softsign):
    """x / (1 + |x|); see `mlpext.functional.softsign`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class Tanhshrink(torch.nn.Tanhshrink):
    """x - tanh(x); see `mlpext.functional.tanhshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


class Softshrink(torch.nn.Softshrink):
    """x moved towards 0 by lambd; see `mlpext.functional.softshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softshrink(input, self.lambd)


class Hardshrink(torch.nn.Hardshrink):
    """x, and 0 where |x| <= lambd; see `mlpext.functional.hardshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardshrink(input, self.lambd)


class Sine(Module):
    """sin(omega x); see `mlpext.functional.sine`.

    >>> siren = mlpext.nn.Sine(omega=30.0)
    >>> siren(torch.zeros(3))
    """

    def __init__(self, omega: float = 1.0) -> None:
        super().__init__()
        self.omega = F._number("omega", omega)

    def forward(self, input: Tensor) -> Tensor:
        return F.sine(input, self.omega)

    def extra_repr(self) -> str:
        return f"omega={self.omega}"


class Squareplus(Module):
    """(x + sqrt(x^2 + b)) / 2; see `mlpext.functional.squareplus`.

    >>> mlpext.nn.Squareplus(b=1.0)(torch.zeros(3))
    tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        self.b = F._number("b", b)

    def forward(self, input: Tensor) -> Tensor:
        return F.squareplus(input, self.b)

    def extra_repr(self) -> str:
        return f"b={self.b}"


def _sizes(**sizes: Any) -> list[int]:
    """As plain integers, after a check."""
    plain = [F._integer(name, size) for name, size in sizes.items()]
    for name, size in zip(sizes, plain, strict=True):
        if size < 0:
            raise RuntimeError(f"{name}: {size} is negative, expected 0 or more")
    return plain


class _Affine(Module):
    """What LinearActivation and Maxout share: `weight`, `bias` or None, read without Module.__getattr__."""

    in_features: int
    out_features: int
    weight: Parameter
    bias: Parameter | None

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        # `self.weight` and `self.bias` cost 1 us of a call that takes 4. A parametrized, weight-normed or
        # pruned module has its weight elsewhere.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return self.weight, self.bias
        return weight, parameters["bias"]


class LinearActivation(_Affine):
    """f(x W' + b): a linear layer whose activation is part of it (lecture rows 2 and 4).

    x (*, in_features) -> (*, out_features). `weight` (out_features, in_features) and `bias` (out_features,)
    have torch.nn.Linear's names, shapes and initialisation: the same seed gives the same numbers.
    `activation` is one of `mlpext.activations()`, `params` are its parameters, kept in the dict `params`
    and read at each call. It is not a torch.nn.Linear: code that replaces linear layers would drop the
    activation.

    ValueError for an unknown activation, TypeError for an unknown parameter, RuntimeError for a negative
    size.

    >>> layer = mlpext.nn.LinearActivation(5, 3, "elu", alpha=0.5)
    >>> layer(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        super().__init__()
        in_features, out_features = _sizes(in_features=in_features, out_features=out_features)
        if isinstance(activation, bool):
            raise TypeError(
                f"activation: expected a name (str), got {activation!r}; write bias={activation!r}"
            )
        values = F._parameters(activation, params)
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.params = dict(zip(_C.activations()[activation], values, strict=True))
        self.weight = Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initialisation: uniform within 1 / sqrt(in_features)."""
        torch.nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias()
        return _C.linear_activation(input, weight, bias, self.activation, tuple(self.params.values()))

    def extra_repr(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.activation!r}{params}"
        )


class Maxout(_Affine):
    """max over k of x W[k]' + b[k] (lecture row 3: max(w1'x + b1, w2'x + b2); Goodfellow et al., 2013).

    x (*, in_features) -> (*, out_features). `weight` (pieces, out_features, in_features), `bias` (pieces,
    out_features). Each piece is initialised as a torch.nn.Linear of its own. The first piece wins a tie, a
    NaN wins over all.

    ValueError for pieces < 1, RuntimeError for a negative size.

    >>> mlpext.nn.Maxout(5, 3, pieces=4)(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        pieces: int = 2,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features, pieces = _sizes(
            in_features=in_features, out_features=out_features, pieces=pieces
        )
        if pieces < 1:
            raise ValueError(f"pieces: {pieces}, expected 1 or more")
        self.in_features = in_features
        self.out_features = out_features
        self.pieces = pieces
        self.weight = Parameter(torch.empty(pieces, out_features, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", Parameter(torch.empty(pieces, out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initialisation, piece after piece: the numbers of `pieces` linear layers made
        in a row."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        with torch.no_grad():
            for piece in range(self.pieces):
                self.weight[piece].uniform_(-bound, bound)
                if self.bias is not None:
                    self.bias[piece].uniform_(-bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return _C.linear_maxout(input, *self._weight_and_bias())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, pieces={self.pieces}, "
            f"bias={self.bias is not None}"
        )


def _parameter_names(activation: Any) -> list[str]:
    if activation == "maxout":
        return ["pieces"]
    F._parameters(activation, {})  # refuses what is no name
    return list(_C.activations()[activation])


def _layer(
    in_features: int, out_features: int, activation: Any, params: dict[str, Any], common: dict[str, Any]
) -> Module:
    """One layer of an MLP, given those of `params` that it has."""
    own = {name: params[name] for name in _parameter_names(activation) if name in params}
    if activation == "maxout":
        return Maxout(in_features, out_features, **common, **own)
    return LinearActivation(in_features, out_features, activation, **common, **own)


class MLP(torch.nn.Sequential):
    """A multilayer perceptron (lecture row 4): LinearActivation and Maxout layers in a row.

    `sizes` are n0, n1, ..., the width of the input and of every layer; x (*, n0) -> (*, n_last).
    `activation` is one name for all hidden layers or a sequence of one name each, of `mlpext.activations()`
    or "maxout"; `output_activation` is the last layer's. `params` (`alpha=...`, `pieces=...`) go to the
    hidden layers. Parameters come in the order W1, b1, W2, b2, ..., under the keys 0.weight, 0.bias,
    1.weight, ...

    ValueError for fewer than two sizes, an unknown activation, or a sequence of the wrong length; TypeError
    for a parameter that no hidden layer has.

    >>> net = mlpext.nn.MLP([64, 32, 10], activation="maxout", pieces=3)
    >>> net(torch.randn(8, 64)).shape
    torch.Size([8, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "relu",
        output_activation: str = "identity",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes: {sizes}, expected at least an input and an output width")
        if isinstance(activation, (list, tuple)):
            hidden = list(activation)
        else:
            _parameter_names(activation)  # also where no hidden layer will need it
            hidden = [activation] * (len(sizes) - 2)
        if len(hidden) != len(sizes) - 2:
            raise ValueError(f"activation: {len(hidden)} names for {len(sizes) - 2} hidden layers")
        accepted = {name for each in hidden for name in _parameter_names(each)}
        for name in params:
            if name not in accepted:
                known = ", ".join(sorted(accepted)) or "no parameters"
                raise TypeError(f"{name}: no hidden layer ({activation!r}) has it; accepted: {known}")
        common = {"bias": bias, "device": device, "dtype": dtype}
        pairs = list(pairwise(sizes))
        layers = [_layer(*pair, each, params, common) for pair, each in zip(pairs, hidden, strict=False)]
        super().__init__(*layers, _layer(*pairs[-1], output_activation, {}, common))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _C.mlp(self, input)
        if output is NotImplemented:
            output = super().forward(input)  # type: ignore[no-untyped-call]
        return output

    def __getitem__(self, idx: slice | int) -> Any:
        # Sequential would make a slice by calling this class's __init__.
        if isinstance(idx, slice):
            return torch.nn.Sequential(*list(self._modules.values())[idx])
        return super().__getitem__(idx)


_C.register_layers(LinearActivation, Maxout)
