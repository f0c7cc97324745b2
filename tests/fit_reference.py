"""Gradient descent in NumPy's float64, written from the definitions: what `mlpext.training.fit` should do.

A network is a row of `Layer`s that hold `Parameter`s; the same layer, or the same parameter, may stand at
several places, and its gradients add. Activations are those of reference.py. No code of the package is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

import reference


@dataclass(eq=False)
class Parameter:
    """A weight or a bias, and what the rule keeps of it. `reach` adds up how far each update would be off if
    the gradient's entries were off by as much as the largest of them."""

    value: np.ndarray
    trained: bool = True
    gradient: np.ndarray | None = None
    state: list[np.ndarray] = field(default_factory=list)
    steps: int = 0
    reach: np.ndarray | float = 0.0

    def __post_init__(self) -> None:
        self.start = self.value.copy()


@dataclass(eq=False)
class Layer:
    """gain f(x (W mask)' + b) with W (out, in), or maxout of W (pieces, out, in), where the first of equals
    wins."""

    activation: str
    weight: Parameter
    bias: Parameter | None = None
    params: dict[str, float] = field(default_factory=dict)
    gain: float = 1.0
    mask: np.ndarray | float = 1.0

    def __post_init__(self) -> None:
        if self.activation != "maxout" and self.activation not in reference.ACTIVATIONS:
            raise NotImplementedError(f"tests/reference.py has no formula of {self.activation}: add it there")

    @property
    def parameters(self) -> list[Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], float]:
        """The outputs; dE/dy -> dE/dx, which adds dE/dW and dE/db to the gradients; and how near the nets
        come to a kink or a tie without being there, in units of their size."""
        W, b = self.weight.value * self.mask, None if self.bias is None else self.bias.value
        if self.activation == "maxout":
            nets = np.matmul(x, W.swapaxes(1, 2))
            nets = nets if b is None else nets + b[:, None]
            wins = np.arange(len(W))[:, None, None] == nets.argmax(0)
            y, slope = nets.max(0), wins
            ranked = np.sort(nets, axis=0)
            gaps = ranked[-1] - ranked[-2] if len(W) > 1 else np.ones(1)
        else:
            nets = x @ W.T if b is None else x @ W.T + b
            y, slope = reference.fast(self.activation, self.params, nets)
            kinks = reference.kinks(self.activation, self.params)
            gaps = np.abs(np.subtract.outer(kinks, nets)) if kinks else np.ones(1)

        def backward(dy: np.ndarray) -> np.ndarray:
            delta = self.gain * dy * slope
            flat = W if W.ndim == 3 else W[None]
            deltas = delta if W.ndim == 3 else delta[None]
            self._add(self.weight, (deltas.swapaxes(1, 2) @ x).reshape(W.shape) * self.mask)
            if self.bias is not None:
                self._add(self.bias, deltas.sum(1).reshape(self.bias.value.shape))
            return np.matmul(deltas, flat).sum(0)

        nearest = float(gaps[gaps > 0].min(initial=np.inf))
        return self.gain * y, backward, nearest / max(1.0, float(np.abs(nets).max()))

    @staticmethod
    def _add(parameter: Parameter, gradient: np.ndarray) -> None:
        if parameter.trained:
            parameter.gradient = gradient if parameter.gradient is None else parameter.gradient + gradient


@dataclass
class Rule:
    """The update, as torch.optim.SGD ("descent"), Adam ("adam") and AdamW ("adamw") document it."""

    kind: str = "descent"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def step(self, p: Parameter) -> None:
        """Move a parameter that has a gradient, and take the gradient away."""
        if p.gradient is None:
            return
        g, before = p.gradient, p.value
        p.steps += 1
        if self.kind == "adamw":
            p.value = p.value * (1 - self.lr * self.weight_decay)
        else:
            g = g + self.weight_decay * p.value
        if self.kind == "descent":
            if self.momentum:
                p.state = [self.momentum * p.state[0] + g if p.state else g]
                g = g + self.momentum * p.state[0] if self.nesterov else p.state[0]
        else:
            b1, b2 = self.betas
            m, v = p.state or (np.zeros_like(g), np.zeros_like(g))
            p.state = [b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g]
            m, v = p.state[0] / (1 - b1**p.steps), p.state[1] / (1 - b2**p.steps)
            # Where an entry is far smaller than the largest, its error is divided by as small a number.
            p.reach = p.reach + 2 * self.lr * np.abs(g).max() / (np.sqrt(v) + self.eps)
            g = m / (np.sqrt(v) + self.eps)
        p.value = p.value - self.lr * g
        p.reach = p.reach + np.abs(p.value - before).max()
        p.gradient = None


@dataclass
class Trained:
    """What came of it. `unsure` are the rows of each epoch whose two largest outputs are within `margin`, and
    `nearest` says how near any net came to a kink or a tie."""

    losses: list[float] = field(default_factory=list)
    metrics: list[float | None] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    validation: list[tuple[float, float | None, int]] = field(default_factory=list)
    updates: int = 0
    nearest: float = np.inf


def forward(layers: Sequence[Layer], x: np.ndarray) -> tuple[np.ndarray, list[Callable], float]:
    backwards, nearest = [], np.inf
    for layer in layers:
        x, backward, near = layer.forward(x)
        backwards.append(backward)
        nearest = min(nearest, near)
    return x, backwards, nearest


def error(loss: str, o: np.ndarray, d: np.ndarray) -> tuple[float, np.ndarray]:
    """The sum of E over the rows, and dE/do. d has the outputs' shape: numbers, one-hot or probabilities."""
    if loss == "squared_error":
        return 0.5 * float(((d - o) ** 2).sum()), o - d
    shifted = o - o.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -float((d * log_softmax).sum()), np.exp(log_softmax) * d.sum(1, keepdims=True) - d


def metric(kind: str | None, o: np.ndarray, d: np.ndarray, margin: float) -> tuple[float | None, int]:
    """Accuracy or R2 of these outputs, and how many rows' largest two are too near one another to tell."""
    if kind is None:
        return None, 0
    if kind == "accuracy":
        first, second = np.sort(o, axis=1)[:, :-3:-1].T
        return float((o.argmax(1) == d.argmax(1)).mean()), int((first - second <= margin).sum())
    rest, spread = ((d - o) ** 2).sum(0), ((d - d.mean(0)) ** 2).sum(0)
    constant = (d == d[0]).all(0)
    met = np.where(rest == 0, 1.0, 0.0)
    return float(np.where(constant, met, 1 - rest / np.where(constant, 1.0, spread)).mean()), 0


def fit(
    layers: list[Layer],
    x: np.ndarray,
    d: np.ndarray,
    *,
    loss: str,
    mean: bool,
    rule: Rule,
    step_size: int,
    orders: Iterable[np.ndarray],
    kind: str | None,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    gradient_factor: float = 1.0,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    margin: float = 0.0,
) -> Trained:
    """Train `layers` in place: an epoch for each of `orders`, in which the steps of `step_size` rows take
    them. `kind` is the metric, "accuracy", "r2" or None."""
    trained = Trained()
    for number, order in enumerate(orders, 1):
        total, outputs = 0.0, []
        for first in range(0, len(order), step_size):
            rows = order[first : first + step_size]
            o, backwards, nearest = forward(layers, x[rows])
            value, gradient = error(loss, o, d[rows])
            outputs.append(o)
            total += value
            trained.nearest = min(trained.nearest, nearest)
            gradient = gradient * (gradient_factor / len(rows) if mean else gradient_factor)
            for backward in reversed(backwards):
                gradient = backward(gradient)
            for parameter in {id(p): p for layer in layers for p in layer.parameters}.values():
                rule.step(parameter)
            trained.updates += 1
        value, unsure = metric(kind, np.concatenate(outputs), d[order], margin)
        trained.losses.append(total / len(order))
        trained.metrics.append(value)
        trained.unsure.append(unsure)
        if held_out is not None:
            o, _, nearest = forward(layers, held_out[0])
            trained.nearest = min(trained.nearest, nearest)
            value = error(loss, o, held_out[1])[0] / len(o)
            trained.validation.append((value, *metric(kind, o, held_out[1], margin)))
        after_epoch(number)
    return trained
