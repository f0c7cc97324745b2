"""Modules: torch.nn's names, signatures, defaults and repr, on the functions of mlpext.functional.

An activation maps (*) to (*), keeps the dtype, and has the formula, errors and source of its function. It
inherits from its counterpart in torch.nn, so that `isinstance`, `extra_repr` and its attributes are the same;
like it, it reads its parameters (`alpha`, `inplace`, ...) at each call. A layer is one call of an operator.
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
from mlpext._checks import PARAMETERS, activation_parameters, number, plain_sizes
from mlpext._names import Activation, LayerActivation


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
    """sin(omega x); see `mlpext.functional.sine`."""

    def __init__(self, omega: float = 1.0) -> None:
        super().__init__()
        self.omega = number("omega", omega)

    def forward(self, input: Tensor) -> Tensor:
        return F.sine(input, self.omega)

    def extra_repr(self) -> str:
        return f"omega={self.omega}"


class Squareplus(Module):
    """(x + sqrt(x^2 + b)) / 2; see `mlpext.functional.squareplus`."""

    def __init__(self, b: float = 4.0) -> None:
        super().__init__()
        self.b = number("b", b)

    def forward(self, input: Tensor) -> Tensor:
        return F.squareplus(input, self.b)

    def extra_repr(self) -> str:
        return f"b={self.b}"


class _Affine(Module):
    """What LinearActivation and Maxout share: `weight`, and `bias` or None."""

    weight: Parameter
    bias: Parameter | None

    def _create_parameters(self, shape: tuple[int, ...], bias: bool, **device_and_dtype: Any) -> None:
        """`weight` of `shape`, (..., out_features, in_features), and `bias`."""
        *_, self.out_features, self.in_features = shape
        self.weight = Parameter(torch.empty(shape, **device_and_dtype))
        values = torch.empty(shape[:-1], **device_and_dtype)
        self.register_parameter("bias", Parameter(values) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch.nn.Linear's initialisation: uniform within 1 / sqrt(in_features)."""
        torch.nn.Linear.reset_parameters(self)  # type: ignore[arg-type]

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        # Module.__getattr__, behind `self.weight` and `self.bias`, costs 1 us of a call that takes 4. A
        # parametrized, weight-normed or pruned module has its weight elsewhere.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return self.weight, self.bias
        return weight, parameters["bias"]


class LinearActivation(_Affine):
    """f(x W' + b): a linear layer whose activation is part of it. x (*, in_features) -> (*, out_features).

    `weight` (out_features, in_features) and `bias` (out_features,) have torch.nn.Linear's names, shapes and
    initialisation: the same seed gives the same numbers. It is not a torch.nn.Linear: code that replaces
    linear layers would drop the activation. docs/lecture.md, rows 2 and 4.

    Args:
        activation: one of `mlpext.activations()`.
        params: its parameters, `alpha=0.5`; kept in the dict `params` and read at each call.

    Raises:
        ValueError: `activation` is no known name.
        TypeError: it lacks one of `params`.
        RuntimeError: a size is negative.

    >>> mlpext.nn.LinearActivation(5, 3, "elu", alpha=0.5)(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation = "relu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        super().__init__()
        in_features, out_features = plain_sizes(in_features=in_features, out_features=out_features)
        if isinstance(activation, bool):
            raise TypeError(
                f"activation: expected a name (str), got {activation!r}; write bias={activation!r}"
            )
        values = activation_parameters(activation, params)
        self.activation = activation
        self.params = dict(zip(PARAMETERS[activation], values, strict=True))
        self._create_parameters((out_features, in_features), bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias()
        return _C.linear_activation(input, weight, bias, self.activation, tuple(self.params.values()))

    def extra_repr(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._weight_and_bias()[1] is not None}, activation={self.activation!r}{params}"
        )


class Maxout(_Affine):
    """max over k of x W[k]' + b[k], k = 1 ... pieces. x (*, in_features) -> (*, out_features).

    `weight` (pieces, out_features, in_features), `bias` (pieces, out_features); each piece is initialised as
    a torch.nn.Linear of its own. The first piece wins a tie, a NaN wins over all. docs/lecture.md, row 3, for
    two pieces; Goodfellow et al., 2013, arXiv:1302.4389.

    Raises:
        ValueError: `pieces` is below 1.
        RuntimeError: a size is negative.

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
        in_features, out_features, pieces = plain_sizes(
            in_features=in_features, out_features=out_features, pieces=pieces
        )
        if pieces < 1:
            raise ValueError(f"pieces: {pieces}, expected 1 or more")
        self.pieces = pieces
        self._create_parameters((pieces, out_features, in_features), bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The numbers of `pieces` torch.nn.Linear made in a row."""
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
    """The parameters of a layer of an MLP; an error for what is no activation and not "maxout"."""
    if activation == "maxout":
        return ["pieces"]
    activation_parameters(activation, {}, others=("maxout",))
    return list(PARAMETERS[activation])


class MLP(torch.nn.Sequential):
    """A multilayer perceptron: LinearActivation and Maxout layers in a row. x (*, n0) -> (*, n_last).

    Its parameters are W1, b1, W2, b2, ..., under the keys 0.weight, 0.bias, ... (docs/lecture.md, row 4).

    Args:
        sizes: n0, n1, ..., the width of the input and of every layer.
        activation: of the hidden layers, one of `mlpext.activations()` or "maxout", or one for each.
        output_activation: the last layer's.
        dropout: in train() mode each hidden unit's output is 0 with this probability, else divided by 1 minus
            it (torch.nn.Dropout; arXiv:1207.0580).
        params: of the hidden layers (`alpha=...`, `pieces=...`); each takes those that it has.

    Raises:
        ValueError: fewer than two sizes, an unknown activation, a sequence of the wrong length, or a dropout
            that is not at least 0 and below 1.
        TypeError: no hidden layer has one of `params`.

    >>> mlpext.nn.MLP([64, 32, 10], activation="maxout", pieces=3)(torch.randn(8, 64)).shape
    torch.Size([8, 10])
    """

    dropout: float = 0.0
    # (seed, epoch, place of the first row) of the next masks where `fit` trains this; else torch draws them.
    mask_origin: tuple[int, int, int] | None = None

    def __init__(
        self,
        sizes: Sequence[int],
        activation: LayerActivation | Sequence[LayerActivation] = "relu",
        output_activation: LayerActivation = "identity",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        dropout: float = 0.0,
        **params: float,
    ) -> None:
        sizes = list(sizes)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout}, expected at least 0 and below 1")
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

        def layer(n_in: int, n_out: int, name: LayerActivation, given: dict[str, Any]) -> Module:
            own = {param: given[param] for param in _parameter_names(name) if param in given}
            own |= {"bias": bias, "device": device, "dtype": dtype}
            if name == "maxout":
                return Maxout(n_in, n_out, **own)
            return LinearActivation(n_in, n_out, name, **own)

        *pairs, last = pairwise(sizes)
        layers = [layer(*pair, name, params) for pair, name in zip(pairs, hidden, strict=True)]
        super().__init__(*layers, layer(*last, output_activation, {}))
        if dropout:
            self.dropout = float(dropout)

    def forward(self, input: Tensor) -> Tensor:
        if self.dropout and self.training:
            return self._forward_with_dropout(input)
        output: Tensor = _C.mlp(self, input)
        if output is NotImplemented:
            output = super().forward(input)  # type: ignore[no-untyped-call]
        return output

    def _forward_with_dropout(self, x: Tensor) -> Tensor:
        *hidden, last = self
        for place, layer in enumerate(hidden):
            x = layer(x)
            if self.mask_origin is None:
                x = torch.nn.functional.dropout(x, self.dropout)
            else:
                seed, epoch, first = self.mask_origin
                each = x[0].numel() // x.shape[-1]  # rows of a sample
                rows = first * each, len(x) * each
                dtype = torch.promote_types(x.dtype, torch.float32)
                mask = _C.dropout_mask(self.dropout, seed, epoch, place, *rows, x.shape[-1], dtype)
                x = x * mask.to(x).view(x.shape)
        return last(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def __getitem__(self, idx: slice | int) -> Any:
        # Sequential would make a slice by calling this class's __init__.
        if isinstance(idx, slice):
            return torch.nn.Sequential(*list(self._modules.values())[idx])
        return super().__getitem__(idx)


# What C++ takes for layers when it runs an MLP as one operator: these classes themselves.
_C.register_layers(LinearActivation, Maxout)
