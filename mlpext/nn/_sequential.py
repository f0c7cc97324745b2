"""An MLP of a torch.nn.Sequential, and back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn import Dropout, Flatten, Identity, Linear, Module, Parameter, Sequential

from mlpext._names import Activation
from mlpext.nn._activations import class_of, name_and_parameters
from mlpext.nn._layers import GatedLinear, LinearActivation, Maxout, linear


def to_layers(modules: Sequential) -> tuple[list[Module], float]:
    """Layers of an MLP with copies of the parameters, and the probability of dropout.

    ValueError for a module that has no place in an MLP.
    """
    layers: list[Any] = []
    dropouts: list[float] = []
    ended = True  # whether the last layer has its activation
    for key, module in modules.named_children():
        if isinstance(module, Linear):
            layers.append(_copied(module))
            ended = False
        elif isinstance(module, (Maxout, LinearActivation, GatedLinear)):
            layers.append(_copied(module))
            ended = True
        elif type(module) is Identity and layers:
            pass
        elif isinstance(module, Dropout) and layers:
            dropouts.append(module.p)
            ended = True
        elif not ended and (activation := name_and_parameters(module)) is not None:
            layers[-1].activation, layers[-1].params = activation
            ended = True
        else:
            flat = "; give the network flat inputs" if isinstance(module, Flatten) else ""
            raise ValueError(
                f"layers[{key}]: {module} has no place in an MLP: Linear layers, an activation after each, "
                f"and dropout{flat}"
            )
    if not layers:
        raise ValueError("layers: there is no Linear layer")
    if dropouts and (len(dropouts) != len(layers) - 1 or len({*dropouts}) > 1):
        raise ValueError(f"layers: dropout of {dropouts}, expected the same after each layer but the last")
    return layers, dropouts[0] if dropouts else 0.0


def _copied(module: Any) -> Module:
    sizes = (module.in_features, module.out_features)
    like: dict[str, Any] = {"bias": module.bias is not None, "device": "meta"}
    if isinstance(module, Maxout):
        layer: Any = Maxout(*sizes, module.pieces, **like)
    elif isinstance(module, (LinearActivation, GatedLinear)):
        kind = GatedLinear if isinstance(module, GatedLinear) else LinearActivation
        layer = kind(*sizes, cast(Activation, module.activation), **{**like, **module.params})
    else:
        layer = LinearActivation(*sizes, "identity", **like)
    for name, parameter in module.named_parameters():
        setattr(layer, name, Parameter(parameter.detach().clone(), parameter.requires_grad))
    return layer.train(module.training)  # type: ignore[no-any-return]


def to_modules(network: Any) -> Sequential:
    """torch.nn's modules with copies of the network's parameters; ours where it has none."""
    modules: list[Module] = []
    *_, last = network
    for layer in network:
        if isinstance(layer, (Maxout, GatedLinear)):
            modules.append(_copied(layer))
        else:
            modules.append(linear(layer.weight, layer.bias))
            if layer.activation != "identity":
                modules.append(_activation(layer.activation, layer.params))
        if network.dropout and layer is not last:
            modules.append(Dropout(network.dropout))
    return Sequential(*modules).train(network.training)


def _activation(name: str, params: dict[str, float]) -> Module:
    if name == "gelu_tanh":
        return torch.nn.GELU("tanh")
    cls = class_of(name)
    module: Module = getattr(torch.nn, cls.__name__, cls)(**params)
    return module
