"""What training asks of any nn.Module: where its weights are, and whether it is in train() or eval() mode."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Of the model's first floating-point parameter or buffer."""
    weights = itertools.chain(model.parameters(), model.buffers())
    weight = next((weight for weight in weights if weight.is_floating_point()), torch.empty(0, device="cpu"))
    return weight.dtype, weight.device


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train() or eval() mode, and afterwards each of its modules in the mode that it had."""
    flags = [(module, module.training) for module in model.modules()]
    set_mode(model, training=training)
    try:
        yield
    finally:
        _set_flags(flags)


def set_mode(model: nn.Module, *, training: bool) -> None:
    """The model in train() or eval() mode from now on."""
    modules = list(model.modules())
    if all(type(module).train is nn.Module.train for module in modules):
        _set_flags((module, training) for module in modules)
    else:
        model.train(training)


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        if module.training != flag:  # to set an attribute of a module takes 2 us
            module.training = flag


def copy_all(values: list[Tensor], tensors: list[Tensor]) -> None:
    """Each of `values` into the tensor at its place."""
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
