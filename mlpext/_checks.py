"""Arguments of functions and modules as plain Python values, or an error that names the argument."""

from __future__ import annotations

import operator
from typing import Any

from mlpext import _C
from mlpext._names import did_you_mean

# Activation -> its parameters and their defaults, from the compiled list.
PARAMETERS = _C.activations()


def activation_parameters(
    activation: str, given: dict[str, float], others: tuple[str, ...] = ()
) -> tuple[float, ...]:
    """The parameters of `activation` in order: those given, and defaults.

    TypeError for what is no name and for a parameter that it lacks, ValueError for an unknown name, whose
    message has the names of all activations and `others`.
    """
    if not isinstance(activation, str):
        raise TypeError(f"activation: expected a name (str), got {activation!r}")
    defaults = PARAMETERS.get(activation)
    if defaults is None:
        known = [*PARAMETERS, *others]
        raise ValueError(
            f"activation: unknown name {activation!r}, expected one of {', '.join(known)}"
            + did_you_mean(activation, known)
        )
    for name in given:
        if name not in defaults:
            accepted = ", ".join(defaults) or "no parameters"
            raise TypeError(f"{name}: not a parameter of activation {activation!r}, which takes {accepted}")
    return tuple({**defaults, **{name: number(name, value) for name, value in given.items()}}.values())


def number(name: str, value: Any) -> float:
    """A plain int or float; of a number of NumPy's or a tensor of one, its value."""
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if _is_bool(value) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return float(value)


def integer(name: str, value: Any) -> int:
    """What operator.index makes of it, but for a bool."""
    try:
        if not _is_bool(value):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: expected an integer, got {value!r}")


def plain_sizes(**given: Any) -> list[int]:
    """Sizes as plain integers; RuntimeError for a negative one, as torch raises."""
    plain = [integer(name, size) for name, size in given.items()]
    for name, size in zip(given, plain, strict=True):
        if size < 0:
            raise RuntimeError(f"{name}: {size} is negative, expected 0 or more")
    return plain


def _is_bool(value: object) -> bool:
    """Also NumPy's, and a tensor of one."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
