"""The activations as modules."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from mlpext import functional as F
from mlpext._checks import PARAMETERS, number


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


class ReLUSquared(Module):
    """max(0, x)^2; see `mlpext.functional.relu_squared`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_squared(input)


class QuickGELU(Module):
    """x sigmoid(alpha x); see `mlpext.functional.quick_gelu`."""

    def __init__(self, alpha: float = 1.702) -> None:
        super().__init__()
        self.alpha = number("alpha", alpha)

    def forward(self, input: Tensor) -> Tensor:
        return F.quick_gelu(input, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class Threshold(torch.nn.Threshold):
    """x where x > threshold, else value; see `mlpext.functional.threshold`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.threshold(input, self.threshold, self.value, self.inplace)


class GLU(torch.nn.GLU):
    """One half of `dim` times the sigmoid of the other; see `mlpext.functional.glu`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.glu(input, self.dim)


def class_of(name: str) -> type[Module]:
    """The module of an activation, by its name in the list."""
    wanted = "gelu" if name == "gelu_tanh" else name.replace("_", "")
    cls: type[Module] = next(cls for word, cls in globals().items() if word.lower() == wanted)
    return cls


# Class -> name of its activation, for ours and torch.nn's, none derived from them; torch's -> ours. identity
# has no module, and gelu_tanh is a GELU of another `approximate`.
NAME_OF = {class_of(name): name for name in PARAMETERS if name not in ("identity", "gelu_tanh")}
OURS = {getattr(torch.nn, cls.__name__): cls for cls in NAME_OF if hasattr(torch.nn, cls.__name__)}
NAME_OF |= {theirs: NAME_OF[ours] for theirs, ours in OURS.items()}
OURS[torch.nn.GLU] = GLU


def name_and_parameters(module: Module) -> tuple[str, dict[str, float]] | None:
    """The activation that a module of one of these classes is; None for any other."""
    name = NAME_OF.get(type(module))
    if name is None:
        return None
    if name == "gelu" and getattr(module, "approximate", "none") != "none":
        name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
    params = {param: getattr(module, param) for param in PARAMETERS[name]}
    return (name, params) if all(type(value) in (int, float) for value in params.values()) else None
