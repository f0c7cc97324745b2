"""The calls in the forward of one module, as graphs of torch.fx.

A module's own `forward` is run on torch.fx proxies, with its children as leaves, once for each mode: train
and eval, with and without the arguments that have a default, with none to two for `*args`. What holds in
every graph does not hang on the mode. A `Sequential` is no leaf: its children's calls stand in the graph.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, redirect_stdout
from itertools import count, product
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch import fx
from torch.nn import Identity, Module, Sequential, TransformerDecoderLayer, TransformerEncoderLayer

from mlpext import _C
from mlpext.fusion._observe import Untraceable, held, observed, parameters_are_tensors, same_random_numbers

# Who watches the calls and gradients of a module, and who watches its state_dict.
HOOKS = (
    *_C.MODULE_HOOKS,
    *("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"),
    "_load_state_dict_post_hooks",
)


def has_hooks(module: Module) -> bool:
    """Whether `module` has a hook of any kind: fused, it would see another tensor, or none."""
    return any(vars(module).get(name) for name in HOOKS)


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
    return is_from_torch(cls) and not scripted and cls.forward is Module.forward


def is_identity(module: Module) -> bool:
    """Whether a call of `module` gives back what it is given, and nobody watches: Identity, or what `fuse`
    has put in the place of an activation."""
    untouched = type(module).forward is Identity.forward and "forward" not in vars(module)
    return untouched and not has_hooks(module)


def is_from_torch(cls: type) -> bool:
    """Whether torch defines `cls`."""
    return cls.__module__.partition(".")[0] == "torch"


def class_before(module: Module) -> type[Module]:
    """The class that wrote the forward of `module`: its own, or, where `fuse` has replaced that, the one
    before."""
    return getattr(type(module), "class_before", type(module))


def is_transformer_layer(module: Module) -> bool:
    """Whether `module` has the forward of one of torch's transformer layers. It branches on tensors, but only
    the method `_ff_block`, which it calls, uses layers that may be fused."""
    layers = (TransformerEncoderLayer, TransformerDecoderLayer)
    return any(isinstance(module, cls) and type(module).forward is cls.forward for cls in layers)


def followed(module: Module) -> Module:
    """What is traced in the place of `module`: a transformer layer as if `_ff_block` were all it did."""
    if not is_transformer_layer(module) or {"forward", "_ff_block"} & vars(module).keys():
        return module
    cls: Any = type(module)
    twin: Module = object.__new__(type(cls.__name__, (cls,), {"forward": cls._ff_block}))
    vars(twin).update(vars(module))
    return twin


class OtherWay(Exception):
    """A forward would go another way than its graph, because dtypes differ."""


def expect(answer: bool, expected: bool) -> None:
    """In the graph: what a forward asks of dtypes. OtherWay where the answer is not the expected one."""
    if answer is not expected:
        raise OtherWay


def modes() -> tuple[bool, ...]:
    """Whether autograd, inference mode and autocast are on: torch.fx records none of them."""
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class Tracer(fx.Tracer):
    """Notes in each node's `meta` the module it calls, and whether autograd and autocast are on there.

    `inline` says of a module in the traced one whether its calls stand in the graph, or it is called as a
    whole; `arity` is how many arguments `*args` stands for, `given` are values of other arguments, by name.
    With `steady`, `*args` stays one proxy, a forward that compares dtypes is followed as if all were that of
    the parameters, and the graph calls `expect` there.
    """

    def __init__(
        self, inline: Callable[[Module], bool], given: Mapping[str, Any], arity: int, steady: bool
    ) -> None:
        super().__init__()
        self.given = given
        self.steady = steady
        self.proxy_buffer_attributes = True  # else `self.count += 1` would count the tracing too
        self.inline = inline
        self.arity = arity
        self.inlined: set[Module] = set()

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        if has_hooks(m) or not (is_chain(m) or self.inline(m)):
            return True
        self.inlined.add(m)
        return False

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        """`*args` as that many arguments, where torch.fx has one proxy for all; those given, as they are."""
        function, proxies = super().create_args_for_root(*args, **kwargs)
        for index, proxy in enumerate(proxies):
            name = str(proxy.node.target) if isinstance(proxy, fx.Proxy) else ""
            if name.startswith("*") and not name.startswith("**") and not self.steady:
                each = (self.create_proxy("placeholder", f"{name}_{i}", (), {}) for i in range(self.arity))
                proxies[index] = tuple(each)
                self.graph.erase_node(proxy.node)
            elif name in self.given:
                proxies[index] = self.given[name]
                self.graph.erase_node(proxy.node)
        return function, proxies

    def call_module(
        self, m: Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if class_before(m) is not type(m):
            forward = functools.partial(class_before(m).forward, m)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if len(self.graph.nodes) > 10_000:  # `while self.flag:`, with the flag set for once
            raise Untraceable("it has no end")
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = modes()
        if node.op == "call_module":
            node.meta["module"] = self.root.get_submodule(str(node.target))
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.steady and (expected := self._on_dtypes(obj.node)) is not None:
            self.create_node("call_function", expect, (obj.node, expected), {})
            return expected
        return self._last_use(bool, super().to_bool, obj)  # type: ignore[no-any-return]

    def _on_dtypes(self, node: fx.Node) -> bool | None:
        """The answer of `x.dtype == y.dtype`, or `!=`, where tensors have the dtype of the parameters; None
        for any other question."""
        if node.target not in (operator.eq, operator.ne):
            return None
        own = next((p.dtype for p in self.root.parameters()), torch.get_default_dtype())
        is_dtype = [
            isinstance(a, fx.Node) and (a.target, *a.args[1:]) == (getattr, "dtype") for a in node.args
        ]
        sides = [own if of_tensor else a for a, of_tensor in zip(node.args, is_dtype, strict=True)]
        known = any(is_dtype) and all(isinstance(side, torch.dtype) for side in sides)
        return bool(node.target(*sides)) if known else None

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
    *,
    steady: bool = False,
    read: set[str] | None = None,
    wanted: Callable[[fx.Graph], object] = lambda graph: True,
) -> tuple[list[fx.Graph], set[Module]]:
    """The graphs of `module` in every mode, and the modules whose forward is part of them. The module, and
    the random numbers to come, stay untouched. Untraceable where the forward cannot be followed.

    `change` gives attributes other values than they have. Where a forward fails with them, as it would on
    tensors, there is no graph; where it only cannot be followed to its end, the graph is what came before.
    With `steady`, Untraceable is one that draws random numbers of its own, which could decide on it, and one
    that does more than compute: assigns to `self`, prints. So is one whose first graph is not `wanted`.
    `read` gets the names of the attributes that are read on the way, by functions outside the class too."""
    if "forward" in vars(module):
        raise Untraceable("its forward was replaced on the instance")
    cls = class_before(module)
    if cls.__call__ is not Module.__call__ and not isinstance(module, fx.GraphModule):
        raise Untraceable("its class has a __call__ of its own")
    parameters = inspect.signature(cls.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    ways = [{}, defaults] if defaults else [{}]  # `if mask is None:` is never true of a proxy
    several = not steady and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    graphs, inlined = [], set()
    for training, given, arity in product((True, False), ways, (1, 0, 2) if several else (1,)):
        # What a forward assigns to `self`, or appends to a list there, goes to a copy.
        twin = object.__new__(cls if read is None else observed(cls, read))
        for name, value in vars(module).items():
            vars(twin)[name] = copy.copy(value) if isinstance(value, (list, dict, set)) else value
        vars(twin).update(change)
        twin.training = training
        tracer = Tracer(inline, given, arity, steady)
        try:
            with ExitStack() as stack:
                drawn = stack.enter_context(same_random_numbers())
                said = stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(catch_warnings())
                if steady:
                    stack.enter_context(parameters_are_tensors())
                simplefilter("ignore")
                before = held(twin) if steady else []
                graphs.append(tracer.trace(twin))
                if len(graphs) == 1 and not wanted(graphs[0]):
                    raise Untraceable("there is nothing in it")
                whole = "*" if steady else "**"  # of what there is one proxy for any number of arguments
                if any(n.users for n in tracer.graph.nodes if str(n.target).startswith(whole)):
                    raise Untraceable("it reads its **kwargs")
                if steady:
                    after = held(twin)
                    if drawn():
                        raise Untraceable("it draws random numbers")
                    if len(before) != len(after) or any(map(operator.is_not, before, after)):
                        raise Untraceable("it keeps something")
                    if said.getvalue():
                        raise Untraceable("it prints something")
        except Exception as error:  # whatever a forward does with a proxy
            if change or not arity:
                graphs += [tracer.graph] if _came_of_a_proxy(error) else []
                continue
            first = str(error).partition("\n")[0].partition(". ")[0]
            raise Untraceable(f"{type(error).__name__}: {first}") from error
        inlined |= tracer.inlined
    return graphs, inlined


def _came_of_a_proxy(error: Exception) -> bool:
    """Whether `error` came of a proxy, where a tensor may have done."""
    known = isinstance(error, (fx.proxy.TraceError, Untraceable))
    return known or any(word in str(error) for word in ("Proxy", "'Attribute'", "symbolic"))


def steady_graph(
    module: Module,
    inline: Callable[[Module], bool] = lambda module: False,
    read: set[str] | None = None,
    wanted: Callable[[fx.Graph], object] = lambda graph: True,
) -> fx.Graph | None:
    """The graph of `module`, if one says all: the same in train and in eval mode, with and without the
    arguments that have a default, all of it in one mode of autograd and autocast. `inline` says of a module
    in it whether its calls stand in the graph too, or it is called. Where the forward compares dtypes, the
    graph calls `expect`. `read` and `wanted` are those of `trace`."""
    cls = class_before(module)
    is_leaf = (is_from_torch(cls) or cls.__module__.startswith("mlpext.")) and not is_chain(module)
    if isinstance(module, torch.jit.ScriptModule) or is_leaf:
        return None
    try:
        graphs, _ = trace(module, inline, steady=True, read=read, wanted=wanted)
    except Untraceable:
        return None
    graph, *others = graphs
    known = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    for node in graph.nodes:
        if node.meta["modes"] != modes() or (node.op == "get_attr" and node.target not in known):
            return None
    steps = list(operations(graph))
    return graph if all(list(operations(other)) == steps for other in others) else None


def operations(graph: fx.Graph) -> Iterator[str]:
    """What a graph does, whatever its nodes are called and whichever of its arguments it ignores."""
    names: dict[fx.Node, Any] = {}
    numbers = count()
    for node in graph.nodes:
        if node.op == "placeholder":  # as its default, by which it may stand in the other graph
            names[node] = node.args[0] if node.args else str(node.target)
        else:
            names[node] = str(next(numbers))
            args = fx.node.map_arg((node.args, node.kwargs), names.__getitem__)
            yield f"{node.op} {node.target} {args}"


def sole_user(node: fx.Node) -> fx.Node | str:
    """The one call that takes the output of `node` and nothing else, or why there is none. Identity is looked
    through."""
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
            return sole_user(user)
    return user


def producer(node: fx.Node) -> Any:
    """What a call's first argument comes from; Identity is looked through."""
    came = node.args[0] if node.args else None
    if isinstance(came, fx.Node) and came.op == "call_module" and is_identity(came.meta["module"]):
        return producer(came)
    return came


def describe(node: fx.Node) -> str:
    """A call, in the words of the report."""
    if node.op == "call_module":
        return f"{node.target} ({type(node.meta['module']).__name__})"
    return str(getattr(node.target, "__name__", node.target))
