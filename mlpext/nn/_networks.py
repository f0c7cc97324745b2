"""Networks of these layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter

from mlpext import _C
from mlpext._checks import PARAMETERS, activation_parameters
from mlpext._names import Activation, LayerActivation
from mlpext.nn._layers import GatedLinear, LinearActivation, Maxout, linear
from mlpext.nn._sequential import to_layers, to_modules


class GatedMLP(Module):
    """The MLP of today's transformers: down(f(gate(x)) * up(x)). x (*, dim) -> (*, dim).

    `gated` is a `GatedLinear` from dim to hidden, `down` a `LinearActivation` with "identity" from hidden to
    dim. Both run as one operator. For backward it keeps two values a hidden unit, z of the gate and of the
    value, where torch's operators keep four, with most activations; the product of the two is formed again
    from them. Shazeer, 2020, arXiv:2002.05202.

    Args:
        activation: f, one of `mlpext.activations()`.
        bias: of all three layers; Llama has none.

    Raises:
        ValueError: `activation` is no known name.
        RuntimeError: a size is negative.

    >>> mlpext.nn.GatedMLP(64, 172)(torch.randn(8, 64)).shape
    torch.Size([8, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Activation = "silu",
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        super().__init__()
        self.gated = GatedLinear(dim, hidden, activation, bias, device, dtype, **params)
        self.down = LinearActivation(hidden, dim, "identity", bias, device, dtype)

    @classmethod
    def from_linear(
        cls, gate: Linear, up: Linear, down: Linear, activation: Activation = "silu", **params: float
    ) -> GatedMLP:
        """The module of Llama's gate_proj, up_proj and down_proj, with copies of their parameters.

        >>> gate, up, down = torch.nn.Linear(4, 8), torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        >>> mlp = mlpext.nn.GatedMLP.from_linear(gate, up, down)
        """
        module = cls(down.out_features, down.in_features, device="meta")
        module.gated = GatedLinear.from_linear(gate, up, activation, **params)
        module.down.weight = Parameter(down.weight.detach().clone())
        module.down.bias = None if down.bias is None else Parameter(down.bias.detach().clone())
        return module

    def to_linear(self) -> tuple[Linear, Linear, Linear]:
        """gate, up and down as torch.nn.Linear, with copies of the parameters: `from_linear` undone."""
        return (*self.gated.to_linear(), linear(self.down.weight, self.down.bias))

    def forward(self, input: Tensor) -> Tensor:
        # The operator takes all submodules there are, in their order.
        output: Any = _C.mlp(self, input) if [*self._modules] == ["gated", "down"] else NotImplemented
        return self.down(self.gated(input)) if output is NotImplemented else output  # type: ignore[no-any-return]


def _parameter_names(activation: Any) -> list[str]:
    """The parameters of a layer of an MLP; an error for what is no activation and not "maxout"."""
    if activation == "maxout":
        return ["pieces"]
    activation_parameters(activation, {}, others=("maxout",))
    return list(PARAMETERS[activation])


class MLP(torch.nn.Sequential):
    """A multilayer perceptron: LinearActivation and Maxout layers in a row. x (*, n0) -> (*, n_last).

    Its parameters are W1, b1, W2, b2, ..., under the keys 0.weight, 0.bias, ... (docs/lecture.md, row 4). A
    `GatedLinear` may be appended, or put in the place of a layer.

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

    @classmethod
    def from_sequential(cls, layers: torch.nn.Sequential) -> MLP:
        """The network of Linear layers with activations, and dropout, between them, with copies of their
        parameters; the keys 0.weight, 2.weight, ... become 0.weight, 1.weight, ...

        Raises:
            ValueError: a module that has no place in an MLP, or dropout of different strengths.

        >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> mlpext.nn.MLP.from_sequential(layers)[0].activation
        'tanh'
        """
        parts, dropout = to_layers(layers)
        network = cls([1, 1], device="meta", dropout=dropout)
        network._modules.clear()
        network.extend(parts)
        return network.train(layers.training)

    def to_sequential(self) -> torch.nn.Sequential:
        """torch.nn.Linear layers and torch.nn's activations (ours where it has none) with copies of the
        parameters: `from_sequential` undone. Maxout and GatedLinear layers stay as they are."""
        return to_modules(self)

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
