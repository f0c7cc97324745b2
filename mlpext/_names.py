"""Names as type checkers and editors read them, and what a name that nobody knows was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

# The lecture's modes of gradient descent.
Mode: TypeAlias = Literal["stochastic", "mini-batch", "batch"]
MODES: tuple[str, ...] = get_args(Mode)

# Those of `mlpext.activations()`, which a test compares.
# fmt: off
Activation: TypeAlias = Literal[
    "identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "mish",
    "softplus", "selu", "celu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "logsigmoid",
    "softsign", "tanhshrink", "softshrink", "hardshrink", "sine", "squareplus", "relu_squared",
    "quick_gelu", "threshold"
]
# fmt: on
# Of a layer of an MLP.
LayerActivation: TypeAlias = Activation | Literal["maxout"]

# Other names that people know things by.
KNOWN_AS = {
    "swish": "silu",
    "logistic": "sigmoid",
    "linear": "identity",
    "relu2": "relu_squared",
    "leakyrelu": "leaky_relu",
    "mse": "squared_error",
    "bce": "binary_cross_entropy",
    "ce": "cross_entropy",
    "minibatch": "mini-batch",
    "sgd": "stochastic",
    "full": "batch",
}


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The end of a message: the choice that is near, if one is.

    >>> from mlpext._names import did_you_mean
    >>> did_you_mean("ReLU", ["relu", "tanh"]), did_you_mean("swish", ["silu"]), did_you_mean(7, ["silu"])
    ('; did you mean relu?', '; did you mean silu?', '')
    """
    choices = list(choices)
    meant = str(given).lower()
    meant = KNOWN_AS.get(meant, meant)
    near = [meant] if meant in choices else difflib.get_close_matches(meant, choices, 1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""
