"""A network as scikit-learn keeps it, in NumPy arrays, and the same network as an `mlpext.nn.MLP`.

Of a layer from n to m units, `coefs_` has (n, m) and `intercepts_` (m,); of a maxout layer (pieces, n, m) and
(pieces, m). The modules' weights are (m, n), so that the arrays are transposed views of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from mlpext import functional as F
from mlpext._checks import PARAMETERS
from mlpext._names import LayerActivation
from mlpext.nn import MLP, LinearActivation, Maxout

Array: TypeAlias = "np.ndarray[Any, Any]"
Arrays: TypeAlias = "tuple[list[Array], list[Array]]"  # coefs, intercepts

# scikit-learn's names of activations that have another one here.
SYNONYMS = {"logistic": "sigmoid"}


def known(activation: str) -> LayerActivation:
    """The package's name of an activation of scikit-learn's."""
    return cast(LayerActivation, SYNONYMS.get(activation, activation))


def glorot(
    random: np.random.RandomState, sizes: Sequence[int], activation: str, pieces: int, dtype: Any
) -> Arrays:
    """Uniform within sqrt(6 / (n + m)), sqrt(2 / (n + m)) for the logistic function: the numbers that
    scikit-learn draws, in its order. Glorot and Bengio, 2010."""
    factor = 2.0 if known(activation) == "sigmoid" else 6.0
    coefs, intercepts = [], []
    for k, (n, m) in enumerate(pairwise(sizes), start=2):
        several = (pieces,) if activation == "maxout" and k < len(sizes) else ()
        bound = math.sqrt(factor / (n + m))
        coefs.append(random.uniform(-bound, bound, (*several, n, m)).astype(dtype))
        intercepts.append(random.uniform(-bound, bound, (*several, m)).astype(dtype))
    return coefs, intercepts


def tensor(array: Array) -> Tensor:
    """The array's own memory, or a copy of what torch does not take: strided, or not to be written to."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def weight(coef: Array) -> Tensor:
    """A layer's weights as the modules have them, (m, n)."""
    return tensor(coef.swapaxes(-1, -2))


def as_module(coefs: list[Array], intercepts: list[Array], activation: str, dropout: float) -> MLP:
    """The network as a module, on the arrays' memory where `tensor` can have it. Draws no random numbers."""
    sizes = [coefs[0].shape[-2], *(coef.shape[-1] for coef in coefs)]
    several: dict[str, Any] = {"pieces": len(coefs[0])} if activation == "maxout" and len(coefs) > 1 else {}
    with torch.inference_mode(False):
        module = MLP(sizes, known(activation), device="meta", dropout=dropout, **several)
        for layer, coef, intercept in zip(module, coefs, intercepts, strict=True):
            layer.weight, layer.bias = Parameter(weight(coef)), Parameter(tensor(intercept))
    return module


def of_module(module: MLP) -> Arrays:
    """The parameters' own memory, as `coefs_` and `intercepts_` have it."""
    weights, biases = ([getattr(layer, n).detach().numpy() for layer in module] for n in ("weight", "bias"))
    return [array.swapaxes(-1, -2) for array in weights], biases


def outputs(coefs: list[Array], intercepts: list[Array], activation: str, x: Array) -> Tensor:
    """What the network gives for x (rows, features), computed in the dtype of its weights."""
    hidden = [known(activation)] * (len(coefs) - 1)
    names: list[Any] = [*hidden, "identity"]
    with torch.no_grad():
        y = tensor(x.astype(coefs[0].dtype, copy=False))
        for coef, intercept, name in zip(coefs, intercepts, names, strict=True):
            if name == "maxout":
                y = F.linear_maxout(y, weight(coef), tensor(intercept))
            else:
                y = F.linear_activation(y, weight(coef), tensor(intercept), name)
    return y


def arguments(module: MLP) -> dict[str, Any]:
    """The estimators' arguments that describe a module. ValueError where none do."""
    *hidden, last = module
    if not isinstance(last, LinearActivation) or last.activation != "identity":
        raise ValueError(f"module: the last layer is {last}, an estimator's has no activation but its loss's")
    kinds = set()
    for layer in module:
        if not isinstance(layer, (LinearActivation, Maxout)):
            raise ValueError(f"module: it has {layer}, an estimator's has LinearActivation and Maxout layers")
        if layer.weight.dtype not in (torch.float32, torch.float64) or layer.weight.device.type != "cpu":
            where = f"{layer.weight.dtype} on {layer.weight.device}"
            raise ValueError(f"module: weights of {where}, an estimator's are float32 or float64 on the CPU")
        if layer.bias is None:
            raise ValueError(f"module: {layer} has no bias, as every layer of an estimator has")
        if isinstance(layer, LinearActivation) and layer.params != PARAMETERS[layer.activation]:
            usual = PARAMETERS[layer.activation]
            raise ValueError(f"module: {layer} has other parameters than an estimator's, {usual}")
    for layer in hidden:
        kinds.add(("maxout", layer.pieces) if isinstance(layer, Maxout) else (layer.activation, 2))
    if len(kinds) > 1:
        raise ValueError(f"module: its hidden layers are of several kinds, {kinds}, an estimator's of one")
    activation, pieces = kinds.pop() if kinds else ("relu", 2)
    sizes = tuple(layer.out_features for layer in hidden)
    return {
        "hidden_layer_sizes": sizes,
        "activation": activation,
        "pieces": pieces,
        "dropout": module.dropout,
    }
