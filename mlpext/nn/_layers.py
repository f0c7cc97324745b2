"""Layers: a product, and what follows it, as one call of an operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from mlpext import _C
from mlpext._checks import PARAMETERS, activation_parameters, plain_sizes
from mlpext._names import Activation


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
        """torch.nn.Linear's initialisation, uniform within 1 / sqrt(in_features); several pieces get
        the numbers of as many torch.nn.Linear made in a row."""
        if self.weight.dim() == 2:
            torch.nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
            return
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        with torch.no_grad():
            for piece in range(len(self.weight)):
                self.weight[piece].uniform_(-bound, bound)
                if self.bias is not None:
                    self.bias[piece].uniform_(-bound, bound)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first, of a module and of those in it."""
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__}: script what MLP.to_sequential or "
            "mlpext.unfuse gives, or take torch.jit.trace, torch.compile or torch.export"
        )

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        # Module.__getattr__, behind `self.weight` and `self.bias`, costs 1 us of a call that takes 4. A
        # parametrized, weight-normed or pruned module has its weight elsewhere.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters:
            return self.weight, self.bias
        return weight, parameters["bias"]


class Linear(torch.nn.Linear):
    """x W' + b, a torch.nn.Linear whose product is the package's where that is the faster one on CPU.

    x (*, in_features) -> (*, out_features). Arguments, parameters and errors are torch.nn.Linear's.

    >>> mlpext.nn.Linear(5, 3)(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        return _C.linear_activation(input, self.weight, self.bias, "identity")


class _Activated(_Affine):
    """What LinearActivation and GatedLinear share: the name of an activation, and its parameters."""

    def _name_activation(self, activation: str, params: dict[str, float]) -> None:
        """Set `activation`, and `params` with those of its parameters that are given and defaults."""
        if isinstance(activation, bool):
            raise TypeError(
                f"activation: expected a name (str), got {activation!r}; write bias={activation!r}"
            )
        values = activation_parameters(activation, params)
        self.activation = activation
        self.params = dict(zip(PARAMETERS[activation], values, strict=True))

    def extra_repr(self) -> str:
        params = "".join(f", {name}={value}" for name, value in self.params.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._weight_and_bias()[1] is not None}, activation={self.activation!r}{params}"
        )


class LinearActivation(_Activated):
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
        self._name_activation(activation, params)
        self._create_parameters((out_features, in_features), bias, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias()
        return _C.linear_activation(input, weight, bias, self.activation, tuple(self.params.values()))


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

    @classmethod
    def from_interleaved(
        cls, weight: Tensor, bias: Tensor | None = None, *, axes: str = "out pieces in"
    ) -> Maxout:
        """The layer with copies of weights whose axes lie in another order.

        axes: of `weight`, and without "in" of `bias`. "out pieces in" is Chainer's, after W.reshape(out,
        pieces, in); "pieces in out" that of Keras 1's MaxoutDense.

        Raises:
            ValueError: `axes` are not these three, or the shapes do not go together.

        >>> mlpext.nn.Maxout.from_interleaved(torch.randn(3, 4, 5)).pieces  # 3 outputs, 4 pieces, 5 inputs
        4
        """
        order = axes.split()
        if sorted(order) != ["in", "out", "pieces"]:
            raise ValueError(f"axes: {axes!r}, expected 'out', 'pieces' and 'in' in some order")
        without = [axis for axis in order if axis != "in"]
        sizes = dict(zip(order, weight.shape, strict=True)) if weight.dim() == 3 else {}
        if not sizes or (bias is not None and [*bias.shape] != [sizes[axis] for axis in without]):
            shapes = f"weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
            raise ValueError(f"{shapes} do not have the axes {axes!r}, and without 'in' those of the bias")
        layer = cls(sizes["in"], sizes["out"], sizes["pieces"], bias is not None, device="meta")
        ordered = weight.detach().permute([order.index(axis) for axis in ("pieces", "out", "in")])
        layer.weight = Parameter(ordered.clone(memory_format=torch.contiguous_format))
        if bias is not None:
            ordered = bias.detach().permute([without.index(axis) for axis in ("pieces", "out")])
            layer.bias = Parameter(ordered.clone(memory_format=torch.contiguous_format))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return _C.linear_maxout(input, *self._weight_and_bias())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, pieces={self.pieces}, "
            f"bias={self.bias is not None}"
        )


class GatedLinear(_Activated):
    """f(x W1' + b1) * (x W2' + b2). x (*, in_features) -> (*, out_features).

    `weight` (2, out_features, in_features) and `bias` (2, out_features): first the gate's, W1 and b1, then
    the value's; each half is initialised as a torch.nn.Linear of its own. arXiv:2002.05202.

    Args:
        activation: f, one of `mlpext.activations()`: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU),
            "sigmoid" (GLU), "identity" (bilinear).
        params: its parameters, `alpha=0.5`; kept in the dict `params` and read at each call.

    Raises:
        ValueError: `activation` is no known name.
        TypeError: it lacks one of `params`.
        RuntimeError: a size is negative.

    >>> mlpext.nn.GatedLinear(5, 3, "gelu")(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation = "silu",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        super().__init__()
        in_features, out_features = plain_sizes(in_features=in_features, out_features=out_features)
        self._name_activation(activation, params)
        self._create_parameters((2, out_features, in_features), bias, device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls,
        gate: torch.nn.Linear,
        value: torch.nn.Linear,
        /,
        activation: Activation = "silu",
        **params: float,
    ) -> GatedLinear:
        """The layer f(gate(x)) * value(x), with copies of their parameters.

        >>> gate, up = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)  # as Llama has them
        >>> layer = mlpext.nn.GatedLinear.from_linear(gate, up)
        """
        if gate.weight.shape != value.weight.shape or (gate.bias is None) != (value.bias is None):
            raise ValueError(f"gate and value must be of one shape, got {gate} and {value}")
        weight, bias = _stacked([gate, value])
        return cls._of(weight, bias, activation, params)

    @classmethod
    def from_packed(
        cls,
        packed: torch.nn.Linear,
        activation: Activation = "silu",
        *,
        gate_first: bool = True,
        **params: float,
    ) -> GatedLinear:
        """The layer of one torch.nn.Linear that makes both halves, with copies of its parameters.

        gate_first: whether its first out_features / 2 rows are the gate's, as in xformers' w12 and timm's
        SwiGLUPacked; in front of torch.nn.GLU they are the value's.

        >>> layer = mlpext.nn.GatedLinear.from_packed(torch.nn.Linear(5, 6), "sigmoid", gate_first=False)
        """
        if packed.out_features % 2:
            raise ValueError(f"packed: {packed.out_features} rows, expected two halves of one size")
        order = [0, 1] if gate_first else [1, 0]
        weight, bias = (
            None if rows is None else rows.detach().view(2, -1, *rows.shape[1:])[order]
            for rows in (packed.weight, packed.bias)
        )
        assert weight is not None
        return cls._of(weight, bias, activation, params)

    @classmethod
    def _of(
        cls, weight: Tensor, bias: Tensor | None, activation: Activation, params: dict[str, Any]
    ) -> GatedLinear:
        _, out_features, in_features = weight.shape
        layer = cls(in_features, out_features, activation, bias is not None, device="meta", **params)
        layer.weight = Parameter(weight)
        layer.bias = None if bias is None else Parameter(bias)
        return layer

    def to_linear(self) -> tuple[torch.nn.Linear, torch.nn.Linear]:
        """The gate's and the value's torch.nn.Linear, with copies of the parameters: `from_linear` undone."""
        biases = (None, None) if self.bias is None else self.bias
        gate, value = (linear(*half) for half in zip(self.weight, biases, strict=True))
        return gate, value

    def to_packed(self, *, gate_first: bool = True) -> torch.nn.Linear:
        """One torch.nn.Linear with copies of the parameters of both halves: `from_packed` undone."""
        order = [0, 1] if gate_first else [1, 0]
        bias = None if self.bias is None else self.bias[order].flatten()
        return linear(self.weight[order].flatten(0, 1), bias)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._weight_and_bias()
        return _C.linear_gated(input, weight, bias, self.activation, tuple(self.params.values()))


def _stacked(layers: Sequence[torch.nn.Linear]) -> tuple[Tensor, Tensor | None]:
    weight = torch.stack([layer.weight.detach() for layer in layers])
    if layers[0].bias is None:
        return weight, None
    return weight, torch.stack([layer.bias.detach() for layer in layers])


def linear(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    """A torch.nn.Linear with copies."""
    layer = torch.nn.Linear(weight.size(1), weight.size(0), bias is not None, device="meta")
    layer.weight = Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = Parameter(bias.detach().clone())
    return layer
