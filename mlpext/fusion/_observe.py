"""What a forward does while it is traced, beside what its graph shows: attributes that it reads, what it
keeps, random numbers that it draws, and questions whether something is a tensor."""

from __future__ import annotations

import builtins
import pickle
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.nn import Module


class Untraceable(Exception):
    """Why torch.fx cannot follow a forward."""


def observed(cls: type[Module], read: set[str]) -> type[Module]:
    """A subclass that notes the names of the attributes that are read."""

    def observe(self: Module, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    return type(cls.__name__, (cls,), {"__getattribute__": observe})


def held(module: Module) -> list[object]:
    """The attributes of `module` and of its parts, and what is in those that are containers."""
    found: list[object] = []
    for each in module.modules():
        for name, value in vars(each).items():
            within = value.values() if isinstance(value, dict) else value
            found += [name, value, *(within if isinstance(value, (list, dict, set)) else ())]
    return found


@contextmanager
def same_random_numbers() -> Iterator[Callable[[], bool]]:
    """The random numbers to come are the same after it; what it gives says whether any were drawn within."""
    numpy = sys.modules.get("numpy")

    def states() -> bytes:
        of_numpy = numpy.random.get_state(legacy=False) if numpy else None
        return pickle.dumps((torch.get_rng_state().numpy(), random.getstate(), of_numpy))

    before, of_random = states(), random.getstate()
    of_numpy = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield lambda: states() != before
        finally:
            random.setstate(of_random)
            if numpy:
                numpy.random.set_state(of_numpy)


_TENSOR = torch.empty(0)
_LOCK = threading.RLock()


@contextmanager
def parameters_are_tensors() -> Iterator[None]:
    """Within, isinstance(self.weight, Tensor) is true of the proxy of a parameter or a buffer. What another
    proxy stands for is not known: Untraceable where that is asked. torch's own code gets plain answers."""
    here = threading.get_ident()

    # Not by a proxy's __class__: torch's C++ code would take it for a tensor, and crash.
    def answer(value: Any, cls: Any) -> bool:
        if type(value) is not fx.Proxy or threading.get_ident() != here or not plain(_TENSOR, cls):
            return plain(value, cls)
        if _is_asked_by_torch(sys._getframe(1)):
            return False
        if value.node.op != "get_attr":
            raise Untraceable("it asks whether something is a tensor")
        return True

    with _LOCK:  # each thread puts back what it has found
        plain = builtins.isinstance
        builtins.isinstance = answer
        try:
            yield
        finally:
            builtins.isinstance = plain


def _is_asked_by_torch(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "torch"
