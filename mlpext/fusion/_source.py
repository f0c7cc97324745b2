"""What torch.fx cannot see of a class, read from its source and its bytecode.

Two questions. Which attributes do its methods use, and how (`methods`, from the syntax tree)? A method beside
`forward` may call a layer alone. Which attributes may its forward read (`reads`, from the bytecode), and with
which values would it take another way (`changes`)? Someone may set `model.return_pre = True` later.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch.nn import Module

from mlpext.fusion._trace import class_before


@dataclass
class Uses:
    """Names of the attributes that a function uses.

    `called`: self.fc(x), or handed on to be called. `opened`: taken apart or kept, `for layer in self.net`;
    "self" stands for the module itself. `foreign`: either of them, on another object than `self`.
    """

    called: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    foreign: set[str] = field(default_factory=set)

    @property
    def touched(self) -> set[str]:
        return self.called | self.opened


# Functions that take a container apart, and attributes of a module that give its parts.
_TAKE_APART = {"enumerate", "filter", "getattr", "iter", "len", "list", "map", "reversed", "tuple", "zip"}
_PARTS = {"_modules", "children", "forward", "get_submodule", "modules", "named_children", "named_modules"}


def _uses(function: types.FunctionType) -> Uses:
    """The uses in the source of `function`."""
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
    """Which set of `Uses` the name belongs to, by what stands around it; None where it is only tested."""
    match parent:
        case ast.Attribute(attr=attr):  # `self.fc.weight` does not call fc; `self.net.children()` opens net
            return "opened" if attr in _PARTS else None
        case ast.Call(func=func) if func is node:
            return "called"
        case ast.Call(func=ast.Name(id=name)) if name in _TAKE_APART:
            return "opened"
        case ast.Call(func=ast.Name(id="hasattr" | "isinstance")):
            return None
        case ast.Call() | ast.keyword():  # `checkpoint(self.net, x)` calls it
            return "called"
        case ast.Compare() | ast.If() | ast.UnaryOp() | ast.Return(value=ast.Name()):
            return None
        case _:
            return "opened"


# Packages whose base classes call no layer of a model by its name. Lightning's look hooks up by the name that
# a trainer gives, which in anyone else's class could be that of a layer.
_NAME_NO_CHILD = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "peft"}


def methods(cls: type) -> dict[str, Uses]:
    """The uses of each method of `cls` by its name, those of base classes too; `__init__` runs before."""
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


def _code_objects(cls: type) -> Iterator[types.CodeType]:
    """The code of `forward`, and of every method that it may reach by name, functions within included."""
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
    names = {name for code in _code_objects(cls) for name in (*code.co_names, *_words(code))}
    return names - {*dir(Module), *vars(Module())}


def _function(member: Any) -> types.FunctionType | None:
    """The Python function behind a method, a property or a decorator; None if there is none."""
    if isinstance(member, property):
        member = member.fget
    member = getattr(member, "__func__", member)
    if callable(member):
        member = inspect.unwrap(member)
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


# Instances of classes with one of these `__new__` can be made anew without arguments.
_PLAIN: tuple[Any, ...] = (object.__new__, types.SimpleNamespace.__new__)


def changes(module: Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """The plain attributes that the forward of `module` may read, and those of plain objects in them, each
    with other values: `model.return_pre = True` takes another way through the same forward."""
    cls = class_before(module)
    names = sorted(reads(cls))
    words = sorted({"", *(word for code in _code_objects(cls) for word in _words(code))})
    for name in names:
        value = inspect.getattr_static(module, name, ...)
        for other in _other_values(value, words):
            yield f"self.{name}", {name: other}
        for inner in sorted(vars(value).keys() & set(names)) if _is_plain(value) else ():
            for other in _other_values(vars(value)[inner], words):
                changed = _blank(value)  # copy.copy may give back the same, a logger for one
                vars(changed).update(vars(value) | {inner: other})
                yield f"self.{name}.{inner}", {name: changed}


def other_numbers(module: Module) -> dict[str, Any]:
    """The lists, dicts and plain objects that the forward of `module` may read, each with other numbers in
    it."""
    names = reads(class_before(module))

    def other(value: Any) -> Any:
        return value + 1 if type(value) in (int, float) else value

    found: dict[str, Any] = {}
    for name in names & vars(module).keys():
        value = vars(module)[name]
        if type(value) is list:
            found[name] = [other(each) for each in value]
        elif type(value) is dict:
            found[name] = {key: other(each) for key, each in value.items()}
        elif _is_plain(value):
            found[name] = _blank(value)
            vars(found[name]).update((key, other(each)) for key, each in vars(value).items())
    return found


def _blank(value: Any) -> Any:
    make: Any = type(value).__new__
    return make(type(value))


def _is_plain(value: Any) -> bool:
    """Whether `value` is an object with attributes of which another can be made."""
    new: Any = type(value).__new__
    is_known = isinstance(value, (Module, torch.Tensor)) or callable(value)
    return new in _PLAIN and not is_known and hasattr(value, "__dict__")


def _other_values(value: Any, words: list[str]) -> list[Any]:
    """Values to put in the place of `value`, so that a test of it turns out in another way. None for modules,
    tensors and functions: replacing one is another model."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, Enum):
        return [other for other in type(value) if other is not value]
    if isinstance(value, str):
        return [word for word in words if word != value]
    if value is None:  # set, but not called: an optional layer that is not there stays away
        value = ()
    return [_turned(value)] if type(value) in (int, float, tuple, list, set, frozenset, dict) else []


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "contains")


def _turned(value: Any) -> Any:
    """A number or a container equal to `value` whose every comparison comes out the other way, and so every
    test of it."""
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
