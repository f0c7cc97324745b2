"""What training asks of any nn.Module: where its weights are, and whether it is in train() or eval() mode."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    for weight in model.parameters():
        return weight.device
    return torch.device("cpu")


def dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Of the model's first floating-point parameter or buffer."""
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.is_floating_point():
            return weight.dtype, weight.device
    return torch.get_default_dtype(), torch.device("cpu")


def layer_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters of two dimensions or more, without biases (that of a maxout or gated layer has
    two)."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim >= 2 and name.rpartition(".")[2] != "bias"
    ]


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train() or eval() mode, and afterwards each of its modules in the mode that it had."""
    flags = set_mode(model, training=training)
    try:
        yield
    finally:
        for module, flag in flags:
            _set_flag(module, flag)


def set_mode(model: nn.Module, *, training: bool) -> list[tuple[nn.Module, bool]]:
    """The model in train() or eval() mode from now on. Gives its modules, each with the mode that it had."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        if type(module).train is not nn.Module.train:
            model.train(training)
            return flags
    for module, _ in flags:
        _set_flag(module, training)
    return flags


def _set_flag(module: nn.Module, flag: bool) -> None:
    if module.training != flag:
        # nn.Module.__setattr__ takes 2 us, to look for a parameter of that name.
        plain = type(module).__setattr__ is nn.Module.__setattr__
        (object.__setattr__ if plain else setattr)(module, "training", flag)


def copy_all(values: list[Tensor], tensors: list[Tensor]) -> None:
    """Each of `values` into the tensor at its place."""
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
