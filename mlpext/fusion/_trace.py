"""Which module calls feed which: what `fuse` has to know of a model before it may change it.

A module's own `forward` is run on torch.fx proxies, with its children as leaves, in train and in eval mode,
with and without the arguments whose default is None, with one and two for `*args`, and again with other
values of the attributes that it may test: what holds in all of them does not hang on the mode. What torch.fx
cannot see (methods beside `forward`, a forward that does not trace) is read as source.
"""

from __future__ import annotations

import ast
import copy
import inspect
import io
import operator
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import fx
from torch.nn import Identity, Linear, Module, Sequential

_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"),
    "_load_state_dict_post_hooks",
)


def has_hooks(module: Module) -> bool:
    """Whether anything watches the calls, the gradients or the state of `module`."""
    return any(vars(module).get(name) for name in _HOOKS)


def is_chain(module: Module) -> bool:
    """Whether a call of `module` is a call of its children in a row, and nothing else."""
    return (
        isinstance(module, Sequential)
        and type(module).forward is Sequential.forward
        and type(module).__call__ is Module.__call__
        and "forward" not in vars(module)
    )


def is_list(module: Module) -> bool:
    """Whether `module` only holds others: ModuleList, ModuleDict."""
    cls = type(module)
    scripted = isinstance(module, torch.jit.ScriptModule)
    return is_torchs(cls) and not scripted and cls.forward is Module.forward


def is_identity(module: Module) -> bool:
    """Whether a call of `module` gives back what it is given, and nobody watches: Identity, or what `fuse`
    has put in the place of an activation."""
    untouched = type(module).forward is Identity.forward and "forward" not in vars(module)
    return untouched and not has_hooks(module)


def is_torchs(cls: type) -> bool:
    """Whether `cls` is torch's own."""
    return cls.__module__.partition(".")[0] == "torch"


class Untraceable(Exception):
    """Why torch.fx cannot follow a forward."""


def modes() -> tuple[bool, ...]:
    """Whether autograd, inference mode and autocast are on: torch.fx records none of them."""
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class Tracer(fx.Tracer):
    """Notes in each node's `meta` the module it calls, and whether autograd and autocast are on there."""

    def __init__(self, inline: Callable[[Module], bool], several: int) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # else `self.count += 1` would count the tracing too
        self.inline = inline
        self.several = several
        self.inlined: set[Module] = set()

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or not (is_chain(m) or self.inline(m)):
            return True
        self.inlined.add(m)
        return False

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """`*args` as that many arguments, where torch.fx has one proxy for all of them."""
        function, proxies = super().create_args_for_root(*args, **kwargs)
        for index, proxy in enumerate(proxies):
            name = str(proxy.node.target) if isinstance(proxy, fx.Proxy) else ""
            if name.startswith("*") and not name.startswith("**"):
                each = (self.create_proxy("placeholder", f"{name}_{i}", (), {}) for i in range(self.several))
                proxies[index] = tuple(each)
                self.graph.erase_node(proxy.node)
        return function, proxies

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if len(self.graph.nodes) > 10_000:  # `while self.flag:`, with the flag set for once
            raise Untraceable("it has no end")
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = modes()
        if node.op == "call_module":
            node.meta["module"] = self.root.get_submodule(str(node.target))
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._last_use(bool, super().to_bool, obj)  # type: ignore[no-any-return]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return self._last_use(iter, super().iter, obj)  # type: ignore[no-any-return]

    def _last_use(self, function: Any, method: Callable[[fx.Proxy], Any], obj: fx.Proxy) -> Any:
        """What tracing ends with is in the graph, as one more use of `obj`."""
        try:
            return method(obj)
        except fx.proxy.TraceError:
            self.create_node("call_function", function, (obj.node,), {})
            raise


def trace(
    module: Module,
    inline: Callable[[Module], bool] = lambda module: False,
    change: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[list[fx.Graph], set[Module]]:
    """The graphs of `module` in every mode, and the modules whose forward is part of them. The module, and
    the random numbers to come, stay untouched.

    `change` are attributes with another value than they have. Where a forward fails with it, as it does on
    tensors, there is no graph; where it cannot be followed to its end, the graph is what came before."""
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    if type(module).__call__ is not Module.__call__ and not isinstance(module, fx.GraphModule):
        raise Untraceable("its class has a __call__ of its own")
    parameters = inspect.signature(type(module).forward).parameters.values()
    absent = {p.name: None for p in parameters if p.default is None}
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    graphs, inlined = [], set()
    for training, concrete, many in product(
        (True, False), [{}, absent] if absent else [{}], (1, 2) if several else (1,)
    ):
        # What a forward assigns to `self`, or appends to a list there, goes to a copy.
        twin = object.__new__(type(module))
        for name, value in vars(module).items():
            vars(twin)[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
        vars(twin).update(change)
        twin.training = training
        tracer = Tracer(inline, many)
        try:
            with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()), catch_warnings():
                simplefilter("ignore")
                graphs.append(tracer.trace(twin, concrete))
        except Exception as error:  # whatever a forward does with a proxy
            if change:
                graphs += [tracer.graph] if _is_tracings(error) else []
                continue
            first = str(error).partition("\n")[0].partition(". ")[0]
            raise Untraceable(f"{type(error).__name__}: {first}") from error
        inlined |= tracer.inlined
    return graphs, inlined


def _is_tracings(error: Exception) -> bool:
    """Whether `error` came of a proxy, where a tensor may have done."""
    known = isinstance(error, (fx.proxy.TraceError, Untraceable))
    return known or any(word in str(error) for word in ("Proxy", "'Attribute'", "symbolic"))


def follower(node: fx.Node) -> fx.Node | str:
    """The one call that takes the output of `node` and nothing else; Identity is looked through."""
    if len(node.users) != 1:
        return "its output is used more than once" if node.users else "its output is not used"
    (user,) = node.users
    if user.op == "output":
        return "no activation follows it: its output is a result"
    if user.meta["modes"] != node.meta["modes"]:
        return f"{describe(user)} runs in another autograd or autocast mode"
    if user.op == "call_module":
        if user.args != (node,) or user.kwargs:
            return f"its output goes to {describe(user)} among other arguments"
        if is_identity(user.meta["module"]):
            return follower(user)
    return user


def source(node: fx.Node) -> Any:
    """What a call's first argument comes from; Identity is looked through."""
    came = node.args[0] if node.args else None
    if isinstance(came, fx.Node) and came.op == "call_module" and is_identity(came.meta["module"]):
        return source(came)
    return came


def describe(node: fx.Node) -> str:
    """A call, for the report."""
    if node.op == "call_module":
        return f"{node.target} ({type(node.meta['module']).__name__})"
    return str(getattr(node.target, "__name__", node.target))


# ---------------------------------------------------------------- what source says


@dataclass
class Uses:
    """Names of the attributes that a function calls, those that it takes apart or hands on, and those of
    either kind that are not `self`'s."""

    called: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)

    @property
    def touched(self) -> set[str]:
        return self.called | self.opened


_TAKE_APART = {"enumerate", "filter", "getattr", "iter", "len", "list", "map", "reversed", "tuple", "zip"}
_PARTS = {"_modules", "children", "forward", "get_submodule", "modules", "named_children", "named_modules"}


def _uses(function: types.FunctionType) -> Uses:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source: every name may be used in every way
        return Uses(*(set(function.__code__.co_names) for _ in range(3)))
    uses = Uses()
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Name) and node.id == "self" and _kind_of_use(node, parent) == "opened":
                uses.opened.add("self")  # `for layer in self`
            if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            kind = _kind_of_use(node, parent)
            if kind is None:
                continue
            getattr(uses, kind).add(node.attr)
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                uses.foreign.add(node.attr)
    return uses


def _kind_of_use(node: ast.expr, parent: ast.AST) -> str | None:
    match parent:
        case ast.Attribute(attr=attr):  # `self.fc.weight` does not call fc; `self.net.children()` opens net
            return "opened" if attr in _PARTS else None
        case ast.Call(func=func) if func is node:
            return "called"
        case ast.Call(func=ast.Name(id=name)) if name in _TAKE_APART:
            return "opened"
        case ast.Call() | ast.keyword():  # `checkpoint(self.net, x)` calls it
            return "called"
        case ast.Compare() | ast.If() | ast.UnaryOp() | ast.Return(value=ast.Name()):
            return None
        case _:
            return "opened"


# Packages whose base classes call no layer of a model by its name. Lightning's look hooks up by the name that
# a trainer gives, which in anyone else's class could be that of a layer.
_NAME_NO_CHILD = {"torch", "lightning", "pytorch_lightning", "lightning_fabric"}


def methods(cls: type) -> dict[str, Uses]:
    """What the methods of `cls` do with attributes, down to those base classes; `__init__` runs before."""
    found: dict[str, Uses] = {}
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] in _NAME_NO_CHILD:
            continue
        for name, member in vars(base).items():
            function = _function(member)
            if function is None or name == "__init__":
                continue
            uses, known = _uses(function), found.setdefault(name, Uses())
            for kind in ("called", "opened", "foreign"):
                getattr(known, kind).update(getattr(uses, kind))
    return found


def codes(cls: type) -> Iterator[types.CodeType]:
    """The code of `forward`, and of all below Module that it may reach by name, functions within included."""
    todo, seen = ["forward"], set(dir(Module)) - {"forward"}
    bases = [base for base in cls.__mro__ if base not in Module.__mro__]
    while todo:
        name = todo.pop()
        functions = [_function(vars(base).get(name)) for base in bases] if name not in seen else []
        seen.add(name)
        within = [function.__code__ for function in functions if function is not None]
        while within:
            code = within.pop()
            yield code
            todo += _words(code) | set(code.co_names)
            within += [const for const in code.co_consts if isinstance(const, types.CodeType)]


def _words(code: types.CodeType) -> set[str]:
    """The strings in `code` that may be a name or the value of an attribute."""
    parts = [part for const in code.co_consts if isinstance(const, (tuple, frozenset)) for part in const]
    return {each for each in [*code.co_consts, *parts] if isinstance(each, str) and len(each.split()) < 2}


def reads(cls: type) -> set[str]:
    """Names of attributes that a forward of class `cls` may read, beside those of every module."""
    names = {name for code in codes(cls) for name in (*code.co_names, *_words(code))}
    return names - {*dir(Module), *vars(Module())}


def _function(member: Any) -> types.FunctionType | None:
    if isinstance(member, property):
        member = member.fget
    member = (
        inspect.unwrap(getattr(member, "__func__", member))
        if callable(member) or hasattr(member, "__func__")
        else member
    )
    return member if isinstance(member, types.FunctionType) else None


def reachable(uses: dict[str, Uses], start: str = "forward") -> set[str]:
    """Methods that `start` may call."""
    found: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in uses and name not in found:
            found.add(name)
            todo += uses[name].touched
    return found


# ---------------------------------------------------------------- what attributes decide


def changes(module: Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plain attributes that the forward of `module` may read, and those of plain objects in them, each
    with other values: `model.return_pre = True` takes another way through the same forward."""
    names = sorted(reads(type(module)))
    words = sorted({"", *(word for code in codes(type(module)) for word in _words(code))})
    for name in names:
        value = inspect.getattr_static(module, name, ...)
        for other in _others(value, words):
            yield f"self.{name}", {name: other}
        new: Any = type(value).__new__
        if new not in _PLAIN or isinstance(value, (Module, torch.Tensor)) or callable(value):
            continue
        for inner in sorted(getattr(value, "__dict__", {}).keys() & set(names)):
            for other in _others(vars(value)[inner], words):
                changed = new(type(value))  # copy.copy may give back the same, a logger for one
                vars(changed).update(vars(value) | {inner: other})
                yield f"self.{name}.{inner}", {name: changed}


_PLAIN: tuple[Any, ...] = (object.__new__, types.SimpleNamespace.__new__)


def _others(value: Any, words: list[str]) -> list[Any]:
    """Values to put in the place of `value`, so that a test of it turns out in another way. None for modules,
    tensors and functions: replacing one is another model."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Enum):
        return [other for other in type(value) if other is not value]
    if isinstance(value, str):
        return [word for word in words if word != value]
    if value is None:  # set, but not called: an optional layer that is not there stays away
        return [_contrary(())]
    return [_contrary(value)] if type(value) in (int, float, tuple, list, set, frozenset, dict) else []


def _contrary(value: Any) -> Any:
    """A number or a container like `value` that answers every comparison with the opposite."""
    rest = iter(range(10_000))  # `while self.limit > n:` has to end

    def contrary(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(_: Any, *other: Any) -> Any:
            next(rest)
            truth = ask(value, *other)
            return not truth if isinstance(truth, bool) else truth

        return answer

    asked = {f"__{name}__": contrary(getattr(operator, name)) for name in _COMPARISONS}
    asked |= {"__bool__": contrary(bool), "__hash__": type(value).__hash__}
    return type(type(value).__name__, (type(value),), asked)(value)


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "contains")


# ---------------------------------------------------------------- a whole model


def _branches(module: Module, name: str) -> str:
    return f"{type(module).__name__}.forward branches on {name}, which may change"


class Calls:
    """The calls that a model's forwards make of its modules.

    `nodes[module]` are all calls of it, in every graph; `untraced[module]` says why its forward could not be
    followed. `decided[graph]` is the attribute that has another value there than in the model.
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
            if (reason := self._closed(module)) is None:
                try:
                    graphs[module], parts = trace(module)
                    inlined |= parts
                except Untraceable as error:
                    reason = f"{type(module).__name__}.forward cannot be traced ({error})"
            if reason:
                self.untraced[module] = reason
        for module in list(graphs):
            graphs[module] += self._changed(module)
        for module in graphs:
            # A chain is in the graphs of its parents, between what comes before it and after.
            if module in inlined and all(parent in graphs for parent, _ in self.parents[module]):
                continue
            for graph in graphs[module]:
                self.owner[graph] = module
                for node in graph.nodes:
                    if node.op == "call_module":
                        self.nodes[node.meta["module"]].append(node)

    def _closed(self, module: Module) -> str | None:
        """Why there is no use in tracing `module`; empty if there is nothing to know of it."""
        cls = type(module)
        if not any(module.children()) or is_list(module):
            return ""
        if isinstance(module, torch.jit.ScriptModule):
            return "it is scripted"
        if is_torchs(cls) and not is_chain(module) and not isinstance(module, fx.GraphModule):
            return f"torch.nn.{cls.__name__} may read its parts directly"
        if cls not in self.methods:
            self.methods[cls] = methods(cls)
        return f"{cls.__name__} has no forward" if cls.forward is Module.forward else None

    def _changed(self, module: Module) -> list[fx.Graph]:
        """The graphs of `module` for other values of its attributes, if a pair may hang on them: it holds a
        linear layer, or what others hold too."""
        parts = set(module.modules()) - {module}
        if is_chain(module) or not any(isinstance(m, Linear) or len(self.parents[m]) > 1 for m in parts):
            return []
        found: dict[fx.Graph, str] = {}
        for name, change in changes(module):
            found |= dict.fromkeys(trace(module, change=change)[0], name)
        self.decided |= found
        return list(found)

    def decided_by(self, node: fx.Node) -> str | None:
        """The attribute without whose change there would be no such call, for the report."""
        name = self.decided.get(node.graph)
        return name and _branches(self.owner[node.graph], name)

    def unseen(self, module: Module) -> str | None:
        """Why there may be calls of `module` that are not in `nodes`: someone who holds it was not traced."""
        for parent, _ in self.parents[module]:
            if is_list(parent):
                if reason := self.unseen(parent):
                    return reason
            elif parent in self.untraced:
                return f"in {self.paths[parent] or 'the model'}: {self.untraced[parent]}"
        return None

    def used_by_a_method(self, first: fx.Node, second: fx.Node) -> str | None:
        """Why the calls `first` and `second`, one after the other, may not be all there is: a method that
        calls one alone. None if there is no such method."""
        owner = self.owner[first.graph]
        names = {str(node.target).partition(".")[0] for node in (first, second)}
        return self._alone(owner, names) or self._from_elsewhere(owner, first, second)

    def _alone(self, owner: Module, names: set[str]) -> str | None:
        uses = self.methods[type(owner)]
        if isinstance(owner, Sequential):  # whoever holds it may take it apart
            for parent, name in self.parents[owner]:
                if type(parent) in self.methods and (reason := self._alone(parent, {name})):
                    return reason
        seen = set() if owner in self.untraced else reachable(uses)
        for method, use in uses.items():
            if method not in seen and "self" in use.opened:
                return f"{type(owner).__name__}.{method} takes it apart"
            if len(names) == 1:
                bad = method not in seen and names <= use.opened
            else:
                touched = names & use.touched
                bad = len(touched) == 1 if method in seen else bool(touched)
            if bad:
                what = " and ".join(sorted(names & use.touched))
                return f"{type(owner).__name__}.{method} uses {what} in a way that cannot be followed"
        return None

    def _from_elsewhere(self, owner: Module, first: fx.Node, second: fx.Node) -> str | None:
        names = {str(node.target).rpartition(".")[2] for node in (first, second)}
        for cls, uses in self.methods.items():
            if cls is type(owner):
                continue
            followed = not any(type(module) is cls for module in self.untraced)
            seen = reachable(uses) if followed else set()
            for method, use in uses.items():
                if method not in seen and names & use.foreign:
                    return f"{cls.__name__}.{method} reaches into {type(owner).__name__}"
        return None
