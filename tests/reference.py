"""What every operator should compute: written from the definitions, independently of the C++ formulas.

Each activation is one function of a number system `m` and a point `x`; it returns its value and derivative.
With `Exact` the point is one number of 80 digits (mpmath), with `Fast` a NumPy array of float64. At a kink
the derivative is PyTorch's choice. `test_activations.py` compares this list with `mlpext.activations()`: a
name in only one of the two is a failure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import numpy as np

DIGITS = 80


class Exact:
    """One number at a time, 80 digits."""

    exp, expm1, log1p, tanh, cosh = mpmath.exp, mpmath.expm1, mpmath.log1p, mpmath.tanh, mpmath.cosh
    sqrt, sin, cos, pi = mpmath.sqrt, mpmath.sin, mpmath.cos, mpmath.pi
    absolute = abs

    @staticmethod
    def where(condition, yes, no):
        return yes if condition else no

    @staticmethod
    def erfc(x):
        return mpmath.erfc(x) if abs(x) < 1e6 else mpmath.mpf(2 if x < 0 else 0)  # e^-10^12 is no number

    @staticmethod
    def tanh_gap(x):
        return x - mpmath.tanh(x)


class Fast:
    """Arrays of float64."""

    exp, expm1, log1p, tanh, cosh = np.exp, np.expm1, np.log1p, np.tanh, np.cosh
    sqrt, sin, cos, pi = np.sqrt, np.sin, np.cos, math.pi
    absolute, where = np.abs, np.where
    erfc = np.vectorize(math.erfc, otypes=[np.float64])

    @staticmethod
    def tanh_gap(x):  # x - tanh(x) has no digits left near 0: the series has
        s = np.where(np.abs(x) < 0.05, x, 0.0)
        series = s**3 * (1 / 3 - s**2 * (2 / 15 - s**2 * (17 / 315 - s**2 * 62 / 2835)))
        return np.where(np.abs(x) < 0.05, series, x - np.tanh(x))


@dataclass(frozen=True)
class Activation:
    """`formula(m, x, **parameters)` -> (value, derivative). `variants` are the parameters that tests try."""

    name: str
    formula: Callable
    variants: tuple[dict, ...]
    kinks: Callable  # parameters -> points where the derivative jumps (or the formula changes branch)


ACTIVATIONS: dict[str, Activation] = {}


def activation(*variants: dict, kinks: Callable = lambda **_: ()):
    """Adds the decorated formula to the list. The default parameters are always the first variant."""

    def add(formula: Callable) -> Callable:
        ACTIVATIONS[formula.__name__] = Activation(formula.__name__, formula, ({}, *variants), kinks)
        return formula

    return add


def _logistic(m, x):
    return 1 / (1 + m.exp(-x))


def _normal(m, x):
    """The normal distribution: its cdf and density."""
    return m.erfc(-x / m.sqrt(2)) / 2, m.exp(-x * x / 2) / m.sqrt(2 * m.pi)


@activation()
def identity(m, x):
    return x, x * 0 + 1


@activation()
def sigmoid(m, x):
    return _logistic(m, x), _logistic(m, x) * _logistic(m, -x)


@activation()
def tanh(m, x):
    return m.tanh(x), 1 / m.cosh(x) ** 2


@activation(kinks=lambda: (0.0,))
def relu(m, x):
    return m.where(x > 0, x, x * 0), m.where(x > 0, 1, x * 0)


@activation(
    {"negative_slope": 0.1},
    {"negative_slope": 0.0},
    {"negative_slope": 1.5},
    {"negative_slope": -0.3},
    kinks=lambda negative_slope=0.01: (0.0,),
)
def leaky_relu(m, x, negative_slope=0.01):
    return m.where(x > 0, x, negative_slope * x), m.where(x > 0, 1, x * 0 + negative_slope)


@activation({"alpha": 0.3}, {"alpha": 2.5}, {"alpha": -0.5}, kinks=lambda alpha=1.0: (0.0,))
def elu(m, x, alpha=1.0):
    return m.where(x > 0, x, alpha * m.expm1(x)), m.where(x > 0, 1, alpha * m.exp(x))


@activation()
def gelu(m, x):
    cdf, density = _normal(m, x)
    return x * cdf, cdf + x * density


@activation()
def gelu_tanh(m, x):
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh u) / 2 = logistic(2 u)."""
    c = m.sqrt(2 / m.pi)
    u, slope = c * (x + 0.044715 * x**3), c * (1 + 3 * 0.044715 * x**2)
    gate, anti_gate = _logistic(m, 2 * u), _logistic(m, -2 * u)
    bend = m.where(gate * anti_gate > 0, 2 * x * gate * anti_gate * slope, x * 0)
    return x * gate, gate + bend


@activation()
def silu(m, x):
    gate, anti_gate = _logistic(m, x), _logistic(m, -x)
    return x * gate, gate * (1 + x * anti_gate)


@activation()
def mish(m, x):
    """x tanh(softplus(x)); tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2)."""
    softplus_x = m.where(x > 0, x + m.log1p(m.exp(-m.absolute(x))), m.log1p(m.exp(x)))
    gate = m.tanh(softplus_x)
    return x * gate, gate + x * _logistic(m, x) / m.cosh(softplus_x) ** 2


@activation(
    {"beta": 2.0, "threshold": 5.0},
    {"beta": 0.5},
    {"beta": 1.0, "threshold": 1.0},
    kinks=lambda beta=1.0, threshold=20.0: (threshold / beta,) if beta else (),
)
def softplus(m, x, beta=1.0, threshold=20.0):
    z = beta * x
    return m.where(z > threshold, x, m.log1p(m.exp(z)) / beta), m.where(z > threshold, 1, _logistic(m, z))


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@activation(kinks=lambda: (0.0,))
def selu(m, x):
    negative = SELU_SCALE * SELU_ALPHA
    return (
        m.where(x > 0, SELU_SCALE * x, negative * m.expm1(x)),
        m.where(x > 0, SELU_SCALE, negative * m.exp(x)),
    )


@activation({"alpha": 0.5}, {"alpha": 2.0}, {"alpha": -2.0}, kinks=lambda alpha=1.0: (0.0,))
def celu(m, x, alpha=1.0):
    return m.where(x > 0, x, alpha * m.expm1(x / alpha)), m.where(x > 0, 1, m.exp(x / alpha))


@activation(kinks=lambda: (0.0, 6.0))
def relu6(m, x):
    return m.where(x <= 0, x * 0, m.where(x >= 6, x * 0 + 6, x)), m.where((x > 0) & (x < 6), 1, x * 0)


@activation(
    {"min_val": -0.5, "max_val": 2.0},
    {"min_val": 0.25, "max_val": 0.75},
    kinks=lambda min_val=-1.0, max_val=1.0: (min_val, max_val),
)
def hardtanh(m, x, min_val=-1.0, max_val=1.0):
    value = m.where(x <= min_val, x * 0 + min_val, m.where(x >= max_val, x * 0 + max_val, x))
    return value, m.where((x > min_val) & (x < max_val), 1, x * 0)


@activation(kinks=lambda: (-3.0, 3.0))
def hardsigmoid(m, x):
    value = m.where(x <= -3, x * 0, m.where(x >= 3, x * 0 + 1, (x + 3) / 6))
    return value, m.where((x > -3) & (x < 3), (x * 0 + 1) / 6, x * 0)


@activation(kinks=lambda: (-3.0, 3.0))
def hardswish(m, x):
    value = m.where(x <= -3, x * 0, m.where(x >= 3, x, x * (x + 3) / 6))
    return value, m.where(x <= -3, x * 0, m.where(x >= 3, 1, (2 * x + 3) / 6))


@activation()
def logsigmoid(m, x):
    value = m.where(x > 0, -m.log1p(m.exp(-x)), x - m.log1p(m.exp(-m.absolute(x))))
    return value, _logistic(m, -x)


@activation(kinks=lambda: (0.0,))  # of the derivative
def softsign(m, x):
    return x / (1 + m.absolute(x)), 1 / (1 + m.absolute(x)) ** 2


@activation()
def tanhshrink(m, x):
    return m.tanh_gap(x), m.tanh(x) ** 2


@activation({"lambd": 0.0}, {"lambd": 1.25}, kinks=lambda lambd=0.5: (-lambd, lambd))
def softshrink(m, x, lambd=0.5):
    value = m.where(x > lambd, x - lambd, m.where(x < -lambd, x + lambd, x * 0))
    return value, m.where(m.absolute(x) > lambd, 1, x * 0)


@activation({"lambd": 0.0}, {"lambd": 1.25}, {"lambd": -0.5}, kinks=lambda lambd=0.5: (-lambd, lambd))
def hardshrink(m, x, lambd=0.5):
    outside = (x > lambd) | (x < -lambd)
    return m.where(outside, x, x * 0), m.where(outside, 1, x * 0)


@activation({"omega": 30.0}, {"omega": -0.5}, {"omega": 0.0})
def sine(m, x, omega=1.0):
    return m.sin(omega * x), omega * m.cos(omega * x)


@activation({"b": 1.0}, {"b": 0.25})
def squareplus(m, x, b=4.0):
    """(x + sqrt(x^2 + b)) / 2; left of 0 the sum cancels, and b / (root - x) / 2 is the same number."""
    root = m.sqrt(x * x + b)
    value = m.where(x > 0, (x + root) / 2, b / (root + m.absolute(x)) / 2)
    return value, value / root


@activation(kinks=lambda: (0.0,))
def relu_squared(m, x):
    return m.where(x > 0, x * x, x * 0), m.where(x > 0, 2 * x, x * 0)


@activation({"alpha": 1.0}, {"alpha": 0.25}, {"alpha": 30.0})
def quick_gelu(m, x, alpha=1.702):
    gate, anti_gate = _logistic(m, alpha * x), _logistic(m, -alpha * x)
    return x * gate, gate * (1 + alpha * x * anti_gate)


@activation(
    {"threshold": 1.0, "value": 0.0},
    {"threshold": 0.5, "value": -2.0},
    {"threshold": -0.25, "value": 2.0},
    kinks=lambda threshold=0.0, value=0.0: (threshold,),
)
def threshold(m, x, threshold=0.0, value=0.0):
    return m.where(x > threshold, x, x * 0 + value), m.where(x > threshold, 1, x * 0)


CASES = tuple((name, parameters) for name, a in ACTIVATIONS.items() for parameters in a.variants)


def case_id(case: tuple[str, dict]) -> str:
    name, parameters = case
    return name + ("(" + ",".join(f"{k}={v}" for k, v in parameters.items()) + ")" if parameters else "")


@functools.cache
def _exact(name: str, parameters: tuple, points: tuple[float, ...]) -> np.ndarray:
    out = np.empty((2, 2, len(points)))  # value | derivative, leading | rest, points
    with mpmath.workdps(DIGITS):
        exact_parameters = {k: mpmath.mpf(v) for k, v in parameters}
        for i, point in enumerate(points):
            for k, v in enumerate(ACTIVATIONS[name].formula(Exact, mpmath.mpf(point), **exact_parameters)):
                out[k, 0, i] = float(v)
                out[k, 1, i] = float(v - mpmath.mpf(out[k, 0, i])) if math.isfinite(out[k, 0, i]) else 0.0
    return out


def exact(name: str, parameters: dict, points: np.ndarray) -> np.ndarray:
    """[value | derivative, leading | rest, points]: two float64 whose sum has about 32 digits."""
    return _exact(name, tuple(parameters.items()), tuple(points.tolist()))


def fast(name: str, parameters: dict, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative in float64 arithmetic, right to a few of its last digits."""
    with np.errstate(all="ignore"):
        value, derivative = ACTIVATIONS[name].formula(Fast, points.astype(np.float64), **parameters)
    return np.broadcast_to(value, points.shape), np.broadcast_to(derivative, points.shape)


def limits(name: str, parameters: dict) -> np.ndarray:
    """[value | derivative, -inf | +inf]: the limits at both ends, NaN where there is none (sine, 0 * inf)."""
    far = exact(name, parameters, np.array([-1e30, 1e30]))[:, 0]
    if name == "sine":
        return np.full((2, 2), np.nan)
    far = np.where(np.abs(far) > 1e20, np.copysign(np.inf, far), far)
    far = np.where(np.abs(far) < 1e-20, np.copysign(0.0, far), far)
    if parameters.get("negative_slope") == 0:
        far[0, 0] = np.nan
    if name == "squareplus":  # a b of 1e18 still shows at -1e30
        far[:] = ((0, np.inf), (0, 1))
    return far


def kinks(name: str, parameters: dict) -> tuple[float, ...]:
    return tuple(ACTIVATIONS[name].kinks(**parameters))


def maxout(x: np.ndarray, pieces: int, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
    """The largest of `pieces` consecutive blocks of `axis`, and the number of the block that it comes from.

    The first of equals wins; a NaN beats every number, and the first NaN beats the others.
    """
    blocks = np.stack(np.split(x, pieces, axis=axis))
    value, winner = blocks[0].copy(), np.zeros(blocks[0].shape, dtype=np.int64)
    for k in range(1, pieces):
        better = (blocks[k] > value) | (np.isnan(blocks[k]) & ~np.isnan(value))
        value, winner = np.where(better, blocks[k], value), np.where(better, k, winner)
    return value, winner


def maxout_gradient(g: np.ndarray, x: np.ndarray, pieces: int, axis: int = -1) -> np.ndarray:
    """The whole gradient goes to the piece that won."""
    _, winner = maxout(x, pieces, axis)
    return np.concatenate([np.where(winner == k, g, 0.0) for k in range(pieces)], axis=axis)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    net = x @ weight.T
    return net if bias is None else net + bias


def linear_activation(x, weight, bias, name, parameters):
    """One layer of the lecture: o = f(W x + b)."""
    return fast(name, parameters, linear(x, weight, bias))[0]


def linear_activation_gradient(g, x, weight, bias, name, parameters):
    """d/dx, d/dW, d/db of sum(g * f(x W^T + b)) for a two-dimensional x."""
    delta = g * fast(name, parameters, linear(x, weight, bias))[1]
    return delta @ weight, delta.T @ x, delta.sum(0)


def linear_gated(x, weight, bias, name, parameters):
    """f(x W1' + b1) (x W2' + b2)."""
    gate, value = (linear(x, weight[k], None if bias is None else bias[k]) for k in range(2))
    return fast(name, parameters, gate)[0] * value


def linear_gated_gradient(g, x, weight, bias, name, parameters):
    gate, value = (linear(x, weight[k], None if bias is None else bias[k]) for k in range(2))
    f, slope = fast(name, parameters, gate)
    deltas = [g * value * slope, g * f]
    d_x = sum(delta @ w for delta, w in zip(deltas, weight, strict=True))
    return d_x, np.stack([delta.T @ x for delta in deltas]), np.stack([delta.sum(0) for delta in deltas])


def linear_maxout(x, weight, bias):
    """max over k of (W_k x + b_k), and the k that wins."""
    nets = [linear(x, weight[k], None if bias is None else bias[k]) for k in range(len(weight))]
    return maxout(np.concatenate(nets, axis=-1), len(weight))


def linear_maxout_gradient(g, x, weight, bias):
    _, winner = linear_maxout(x, weight, bias)
    deltas = [np.where(winner == k, g, 0.0) for k in range(len(weight))]
    d_x = sum(delta @ w for delta, w in zip(deltas, weight, strict=True))
    return d_x, np.stack([delta.T @ x for delta in deltas]), np.stack([delta.sum(0) for delta in deltas])
