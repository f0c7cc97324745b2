"""Forwards that `fuse` replaces, each in the module where it stands.

A gated unit multiplies, and an activation function is called, in the forward of a module, so that no exchange
of parts can fuse them. The module gets a subclass of its class, whose forward is the traced one with such
units fused. It finds the layers by their names, as the forward before did: what is put in their place later,
an adapter for one, is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import fx
from torch.nn import Module

from mlpext.fusion._calls import Calls
from mlpext.fusion._source import changes, other_numbers, reads
from mlpext.fusion._trace import OtherWay, class_before, expect, operations, steady_graph, trace
from mlpext.fusion._units import Gate, Unit, find_units

WAS = "_class_before_fuse"  # the attribute of a fused module that keeps the class it had


class FusedForward(Module):
    """A module whose forward is of `fuse`'s making. Where something is set that decided on that forward, it
    goes back to the one before, in silence: nothing but time is lost."""

    class_before: ClassVar[type[Module]]
    decided_by: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.decided_by:
            _restore(self)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Nobody finds the class by its name. The forward is made again from what the module holds.
        made: Any = super().__reduce_ex__(protocol)
        if type(self).__reduce__ is not object.__reduce__:  # the class before has its own way to be made
            make = self.class_before if made[0] is type(self) else made[0]
            return make, *made[1:]
        return _without_state, (self.class_before,), *made[2:]

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _restore(self)
        if new := _fused_forward(self):
            vars(self)[WAS] = type(self)
            set_class(self, new[0])


def _without_state(cls: type[Module]) -> Any:
    return object.__new__(_subclass(cls, cls.forward, frozenset()))


def _restore(module: FusedForward) -> None:
    vars(module).pop(WAS, None)
    set_class(module, module.class_before)


def set_class(module: Module, cls: type[Module]) -> None:
    """Make it one of `cls`, whatever its class does where an attribute is set."""
    object.__setattr__(module, "__class__", cls)


def find_forwards(calls: Calls) -> dict[Module, tuple[type[Module], list[Unit]]]:
    """The modules of a model whose forward has units that can be fused, each with its new class and those
    units."""
    without = set(calls.owner.values()) - {m for graph, m in calls.owner.items() if find_units(graph)}
    may = (m for m in calls.paths if isinstance(m, FusedForward) or not (WAS in vars(m) or m in without))
    found = ((module, _fused_forward(module)) for module in may)
    return {module: new for module, new in found if new is not None}


def _fused_forward(module: Module) -> tuple[type[Module], list[Unit]] | None:
    read: set[str] = set()
    graph = steady_graph(module, read=read, wanted=find_units)
    units = [] if graph is None else [unit for unit in find_units(graph) if _is_own(unit)]
    if graph is None or not units or not _always_holds(module, graph):
        return None
    for unit in units:
        unit.fuse()
    cls = class_before(module)
    traced = fx.GraphModule(module, graph)
    forward = type(traced).forward
    if any(node.target is expect for node in graph.nodes):
        forward = _or_before(forward, cls.forward)
    parts = {str(n.target).partition(".")[0] for n in graph.nodes if n.op in ("call_module", "get_attr")}
    fixed = {str(unit.call.target) for unit in units if isinstance(unit, Gate)}
    read -= {*dir(Module), *vars(Module())}
    decided_by = frozenset((reads(cls) | read) - (parts - fixed))
    return _subclass(cls, forward, decided_by, traced.code), units


def _is_own(unit: Unit) -> bool:
    """Whether the activation is a function or a part of the module itself, which notices when it is
    exchanged."""
    return not isinstance(unit, Gate) or unit.call.op != "call_module" or "." not in str(unit.call.target)


def _always_holds(module: Module, graph: fx.Graph) -> bool:
    """Whether the forward of `module` does what `graph` does without gradients too, under autocast, and with
    other values in the objects that it reads, none of which would be noticed later."""
    steps = list(operations(graph))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        other = steady_graph(module)
    if other is None or list(operations(other)) != steps:
        return False
    for name, change in changes(module):
        if name.count(".") > 1:  # self.config.gated, where self.gated would be noticed
            graphs, _ = trace(module, change=change, steady=True)
            if any(list(operations(each)) != steps for each in graphs):
                return False
    if change := other_numbers(module):
        graphs, _ = trace(module, change=change, steady=True)
        return bool(graphs) and all(list(operations(each)) == steps for each in graphs)
    return True


def _or_before(forward: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    def either(self: Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except OtherWay:
            return before(self, *args, **kwargs)

    return either


_SUBCLASSES: WeakValueDictionary[Any, type[Module]] = WeakValueDictionary()


def _subclass(
    cls: type[Module], forward: Callable[..., Any], decided_by: frozenset[str], code: str = ""
) -> type[Module]:
    """The subclass of `cls` with that forward, of that code: one for all modules that do the same, which
    utilities may ask for and torch.compile compiles once."""
    key = cls, decided_by, code
    if (known := _SUBCLASSES.get(key)) is not None:
        return known
    own = {
        "forward": forward,
        "class_before": cls,
        "decided_by": decided_by,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    made = type(f"Fused{cls.__name__}", (FusedForward, cls), own)
    return _SUBCLASSES.setdefault(key, made)
