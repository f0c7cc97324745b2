"""Modules: torch.nn's names, signatures, defaults and repr, on the functions of mlpext.functional.

An activation maps (*) to (*), keeps the dtype, and has the formula, errors and source of its function. It
inherits from its counterpart in torch.nn, so that `isinstance`, `extra_repr` and its attributes are the same;
like it, it reads its parameters (`alpha`, `inplace`, ...) at each call. A layer is one call of an operator.
"""

from mlpext import _C
from mlpext.nn._activations import (
    CELU,
    ELU,
    GELU,
    GLU,
    SELU,
    Hardshrink,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    QuickGELU,
    ReLU,
    ReLU6,
    ReLUSquared,
    Sigmoid,
    SiLU,
    Sine,
    Softplus,
    Softshrink,
    Softsign,
    Squareplus,
    Tanh,
    Tanhshrink,
    Threshold,
)
from mlpext.nn._layers import GatedLinear, Linear, LinearActivation, Maxout
from mlpext.nn._networks import MLP, GatedMLP

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "GLU",
    "MLP",
    "SELU",
    "GatedLinear",
    "GatedMLP",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "Linear",
    "LinearActivation",
    "LogSigmoid",
    "Maxout",
    "Mish",
    "QuickGELU",
    "ReLU",
    "ReLU6",
    "ReLUSquared",
    "SiLU",
    "Sigmoid",
    "Sine",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Squareplus",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]

# What C++ takes for layers when it runs an MLP as one operator: these classes themselves.
_C.register_layers(LinearActivation, Maxout, GatedLinear)
