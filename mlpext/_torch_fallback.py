"""What `mlpext._C` and torch.compile take torch's own operators for: those of `_C_in_torch`.

`mlpext._C` calls them when an argument is not a plain tensor (a subclass, a proxy of torch.fx, something that
is no tensor at all), for torch to take or refuse it. torch.compile traces them in place of the compiled
functions, so that Inductor fuses an activation with its neighbours. Behind the dispatcher,
csrc/ops/composites.cpp has the same in C++.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from mlpext import _C
from mlpext._C_in_torch import activation, gated, linear_activation, linear_gated, linear_maxout, maxout, mlp

# The compiled functions as they are now, whatever somebody puts in their place before Dynamo comes.
_SUBSTITUTES = {
    getattr(_C, function.__name__): function
    for function in (activation, maxout, gated, linear_activation, linear_maxout, linear_gated, mlp)
}


def register() -> None:
    """Tells the compiled library and, as soon as it is imported, Dynamo."""
    for function in _SUBSTITUTES.values():
        _C.register_fallback(function.__name__, function)
    if "torch._dynamo" in sys.modules:
        _tell_dynamo()
    else:
        sys.meta_path.insert(0, _WhenDynamoComes())


def _tell_dynamo() -> None:
    """Dynamo cannot look into a C++ function; it is told what to trace in its place."""
    for compiled, function in _SUBSTITUTES.items():
        torch.compiler.substitute_in_graph(compiled, skip_signature_check=True)(function)


class _WhenDynamoComes(importlib.abc.MetaPathFinder):
    """Tells Dynamo once it is imported: to import it here would take as long as torch itself, 0.9 s."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != "torch._dynamo":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def run_and_tell(module: ModuleType) -> None:
            run(module)
            _tell_dynamo()

        spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec
