"""The calls that the forwards of a whole model make of its modules, and who else may make some.

For `_pairs`, which asks why a call of a linear layer and the call that follows may not be made one. Methods
that return `str | None` give such a reason, for the report, or None where there is none.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import Linear, Module, Sequential

from mlpext.fusion._observe import Untraceable
from mlpext.fusion._source import Uses, changes, methods, reachable
from mlpext.fusion._trace import (
    class_before,
    followed,
    is_chain,
    is_from_torch,
    is_list,
    is_transformer_layer,
    trace,
)


class Calls:
    """The calls in a model.

    `nodes[module]` are all calls of it, in every graph; `owner[graph]` is the module whose forward that is.
    `decided[graph]` is the attribute that has another value there than in the model. `untraced[module]` says
    why its forward could not be followed. `parents[module]` are those that hold it, each with its name there,
    `paths[module]` is its name in the model, `methods[cls]` what the methods of a class use.
    """

    def __init__(self, model: Module) -> None:
        self.paths: dict[Module, str] = {module: path for path, module in model.named_modules()}
        self.parents: dict[Module, list[tuple[Module, str]]] = {module: [] for module in self.paths}
        self.nodes: dict[Module, list[fx.Node]] = {module: [] for module in self.paths}
        self.owner: dict[fx.Graph, Module] = {}
        self.untraced: dict[Module, str] = {}
        self.decided: dict[fx.Graph, str] = {}
        self.methods: dict[type, dict[str, Uses]] = {}
        graphs: dict[Module, list[fx.Graph]] = {}
        inlined: set[Module] = set()
        for module in self.paths:
            for name, child in module.named_children():
                self.parents[child].append((module, name))
            if (reason := self._why_not_traced(module)) is None:
                try:
                    graphs[module], parts = trace(followed(module))
                    inlined |= parts
                except Untraceable as error:
                    reason = f"{type(module).__name__}.forward cannot be traced ({error})"
            if reason:
                self.untraced[module] = reason
        for module in list(graphs):
            graphs[module] += self._other_graphs(module)
        for module in graphs:
            # A chain is in the graphs of its parents, between what comes before it and after.
            if module in inlined and all(parent in graphs for parent, _ in self.parents[module]):
                continue
            for graph in graphs[module]:
                self.owner[graph] = module
                for node in graph.nodes:
                    if node.op == "call_module":
                        self.nodes[node.meta["module"]].append(node)

    def _why_not_traced(self, module: Module) -> str | None:
        """Why there is no use in tracing `module`; empty if there is nothing to know of it."""
        cls = class_before(module)
        if not any(module.children()) or is_list(module):
            return ""
        if isinstance(module, torch.jit.ScriptModule):
            return "it is scripted"
        if cls.__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            return "an adapter of peft comes before the activation, until merge_and_unload()"
        known = is_chain(module) or is_transformer_layer(module) or isinstance(module, fx.GraphModule)
        if is_from_torch(cls) and not known:
            return f"torch.nn.{cls.__name__} may read its parts directly"
        if cls not in self.methods:
            self.methods[cls] = methods(cls)
        return f"{cls.__name__} has no forward" if cls.forward is Module.forward else None

    def _other_graphs(self, module: Module) -> list[fx.Graph]:
        """The graphs of `module` for other values of its attributes, if a pair may hang on them: it holds a
        linear layer, or what others hold too."""
        parts = set(module.modules()) - {module}
        if is_chain(module) or not any(isinstance(m, Linear) or len(self.parents[m]) > 1 for m in parts):
            return []
        found: dict[fx.Graph, str] = {}
        traced = followed(module)
        for name, change in changes(traced):
            found |= dict.fromkeys(trace(traced, change=change)[0], name)
        self.decided |= found
        return list(found)

    def decided_by(self, node: fx.Node) -> str | None:
        """The attribute without whose change there would be no such call, for the report."""
        name = self.decided.get(node.graph)
        cls = class_before(self.owner[node.graph]).__name__
        return name and f"{cls}.forward branches on {name}, which may change"

    def why_unseen(self, module: Module) -> str | None:
        """Why there may be calls of `module` that are not in `nodes`: someone who holds it was not traced."""
        for parent, _ in self.parents[module]:
            if is_list(parent):
                if reason := self.why_unseen(parent):
                    return reason
            elif parent in self.untraced:
                return f"in {self.paths[parent] or 'the model'}: {self.untraced[parent]}"
        return None

    def why_used_apart(self, first: fx.Node, second: fx.Node) -> str | None:
        """Why the calls `first` and `second`, one after the other, may not be all there is: a method that
        calls one alone. None if there is no such method."""
        owner = self.owner[first.graph]
        names = {str(node.target).partition(".")[0] for node in (first, second)}
        return self._used_apart_inside(owner, names) or self._used_from_outside(owner, first, second)

    def _used_apart_inside(self, owner: Module, names: set[str]) -> str | None:
        """The same of methods of `owner` itself, for its attributes `names`: a pair, or the chain of both."""
        uses = self.methods[class_before(owner)]
        if isinstance(owner, Sequential):  # whoever holds it may take it apart
            for parent, name in self.parents[owner]:
                if class_before(parent) in self.methods and (
                    reason := self._used_apart_inside(parent, {name})
                ):
                    return reason
        seen = set() if owner in self.untraced else reachable(uses)
        for method, use in uses.items():
            if method not in seen and "self" in use.opened:
                return f"{class_before(owner).__name__}.{method} takes it apart"
            if len(names) == 1:
                bad = method not in seen and names <= use.opened
            else:
                touched = names & use.touched
                bad = len(touched) == 1 if method in seen else bool(touched)
            if bad:
                what = " and ".join(sorted(names & use.touched))
                return f"{class_before(owner).__name__}.{method} uses {what} in a way that cannot be followed"
        return None

    def _used_from_outside(self, owner: Module, first: fx.Node, second: fx.Node) -> str | None:
        """The same of methods of other classes: `self.block.fc(x)`."""
        names = {str(node.target).rpartition(".")[2] for node in (first, second)}
        for cls, uses in self.methods.items():
            if cls is class_before(owner):
                continue
            followed = not any(class_before(module) is cls for module in self.untraced)
            seen = reachable(uses) if followed else set()
            for method, use in uses.items():
                if method not in seen and names & use.foreign:
                    return f"{cls.__name__}.{method} reaches into {class_before(owner).__name__}"
        return None
