"""Gradient descent in NumPy's float64, written from the definitions: what `mlpext.training.fit` should do.

A network is a row of `Layer`s that hold `Parameter`s; the same layer, or the same parameter, may stand at
several places, and its gradients add. Activations are those of reference.py. No code of the package is used.
"""

from __future__ import annotations

import math
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
    """gain dropped f(x (W mask)' + b) with W (out, in); with W (2, out, in) f of the first such net times the
    second, or maxout with W (pieces, out, in), where the first of equals wins."""

    activation: str
    weight: Parameter
    bias: Parameter | None = None
    params: dict[str, float] = field(default_factory=dict)
    gain: float = 1.0
    mask: np.ndarray | float = 1.0
    dropped: np.ndarray | float = 1.0  # what the outputs of a step are multiplied by

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
            nets = np.matmul(x, W.swapaxes(-1, -2))
            nets = nets if b is None else nets + b[..., None, :]
            net = nets if W.ndim == 2 else nets[0]
            y, slope = reference.fast(self.activation, self.params, net)
            kinks = reference.kinks(self.activation, self.params)
            gaps = np.abs(np.subtract.outer(kinks, net)) if kinks else np.ones(1)
            if W.ndim == 3:
                y, slope = y * nets[1], np.stack([slope * nets[1], y])

        gain = self.gain * self.dropped

        def backward(dy: np.ndarray) -> np.ndarray:
            delta = gain * dy * slope
            flat = W if W.ndim == 3 else W[None]
            deltas = delta if W.ndim == 3 else delta[None]
            self._add(self.weight, (deltas.swapaxes(1, 2) @ x).reshape(W.shape) * self.mask)
            if self.bias is not None:
                self._add(self.bias, deltas.sum(1).reshape(self.bias.value.shape))
            return np.matmul(deltas, flat).sum(0)

        nearest = float(gaps[gaps > 0].min(initial=np.inf))
        return gain * y, backward, nearest / max(1.0, float(np.abs(nets).max()))

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


def error(loss: str, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E of each row, and dE/do. d has the outputs' shape: numbers, one-hot or probabilities."""
    if loss == "squared_error":
        return 0.5 * ((d - o) ** 2).sum(1), o - d
    if loss == "binary_cross_entropy":
        return (np.logaddexp(0, o) - d * o).sum(1), 1 / (1 + np.exp(-o)) - d
    shifted = o - o.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -(d * log_softmax).sum(1), np.exp(log_softmax) * d.sum(1, keepdims=True) - d


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10: four words of 32 bits from a counter of four, as uint64 arrays (Salmon et al., 2011)."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) & low for word in counter]
    k0, k1 = (np.uint64(word) for word in key)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & low, (a >> np.uint64(32)) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c


def mask(p: float, seed: int, epoch: int, layer: int, places: np.ndarray, units: int) -> np.ndarray:
    """Dropout's: 0 or 1 / (1 - p) for each unit of the samples at these places of the epoch's order."""
    row, j = np.meshgrid(places, np.arange(units), indexing="ij")
    counter = [row, np.full_like(row, epoch), np.full_like(row, layer), j // 4]
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))
    drawn = np.take_along_axis(words, (j % 4)[None], 0)[0]
    return np.where(drawn < math.floor(p * 2**32), 0.0, 1 / (1 - p))


def metric(kind: str | None, o: np.ndarray, d: np.ndarray, margin: float) -> tuple[float | None, int]:
    """Accuracy or R2 of these outputs, and how many rows' largest two are too near one another to tell."""
    if kind is None:
        return None, 0
    if kind == "labels":
        near = (np.abs(o) <= margin).any(1)
        return float(((o > 0) == (d > 0.5)).all(1).mean()), int(near.sum())
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
    weights: np.ndarray | None = None,
    l2: float = 0.0,
    clip_grad_norm: float = 0.0,
    dropout: float = 0.0,
    seed: int = 0,
    rates: Sequence[float] = (),
    orders: Iterable[np.ndarray],
    kind: str | None,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    gradient_factor: float = 1.0,
    after_epoch: Callable[[int], object] = lambda epoch: None,
    margin: float = 0.0,
) -> Trained:
    """Train `layers` in place: an epoch for each of `orders`, in which the steps of `step_size` rows take
    them. `kind` is the metric, "accuracy", "labels", "r2" or None; `rates` the learning rate of each epoch,
    where it changes."""
    trained, weights = Trained(), np.ones(len(x)) if weights is None else weights
    for number, order in enumerate(orders, 1):
        parameters = list({id(p): p for layer in layers for p in layer.parameters}.values())
        total, outputs = 0.0, []
        rule.lr = rates[number - 1] if rates else rule.lr
        for first in range(0, len(order), step_size):
            rows = order[first : first + step_size]
            if dropout:
                places = np.arange(first, first + len(rows))
                for k, layer in enumerate(layers[:-1]):
                    layer.dropped = mask(dropout, seed, number, k, places, layer.weight.value.shape[-2])
            o, backwards, nearest = forward(layers, x[rows])
            values, gradient = error(loss, o, d[rows])
            outputs.append(o)
            w, size = weights[rows], weights[rows].sum()
            counts = [layer.weight for layer in layers if layer.weight.trained]
            counts = list({id(p): p for p in counts}.values()) if l2 else []
            penalty = l2 / 2 * sum((p.value**2).sum() for p in counts)
            if size > 0:
                total += len(rows) * ((w * values).sum() + penalty) / size
            trained.nearest = min(trained.nearest, nearest)
            share = 1 / size if mean and size > 0 else float(not mean)
            gradient = gradient * w[:, None] * share * gradient_factor
            for backward in reversed(backwards):
                gradient = backward(gradient)
            for p in counts:
                p.gradient = p.gradient + l2 * share * p.value
            if clip_grad_norm:
                norm = np.sqrt(sum((p.gradient**2).sum() for p in parameters if p.gradient is not None))
                for p in parameters:
                    if p.gradient is not None:
                        p.gradient = p.gradient * min(1.0, clip_grad_norm / (norm + 1e-6))
            for p in parameters:
                rule.step(p)
            trained.updates += 1
        for layer in layers:
            layer.dropped = 1.0
        value, unsure = metric(kind, np.concatenate(outputs), d[order], margin)
        trained.losses.append(total / len(order))
        trained.metrics.append(value)
        trained.unsure.append(unsure)
        if held_out is not None:
            o, _, nearest = forward(layers, held_out[0])
            trained.nearest = min(trained.nearest, nearest)
            value = float(error(loss, o, held_out[1])[0].mean())
            trained.validation.append((value, *metric(kind, o, held_out[1], margin)))
        after_epoch(number)
    return trained
