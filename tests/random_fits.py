"""Random fits against fit_reference.py: test_random_fit.py draws some, `make fuzz` as many as one likes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import random
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils import prune
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fit_reference
import mlpext
import reference
from common import usual
from mlpext import nn
from mlpext.training import ENGINES, MODES, REDUCTIONS, evaluate, fit, fit_many

EPS = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8}
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
CLAMP = 0.25


def short(self: Any) -> str:
    """Only what is not the default, so that a failing case can be read, and pasted back."""
    own = [(f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self)]
    shown = ", ".join(f"{name}={value!r}" for name, value, default in own if value != default)
    return f"{type(self).__name__}({shown})"


@dataclass(frozen=True, repr=False)
class Place:
    """A layer: its outputs, its function, and what is unusual about it. A `gated` one has two pieces. `again`
    is the place whose module stands here once more, `weight_of` that whose weight does."""

    width: int
    activation: str = "tanh"
    params: tuple[tuple[str, float], ...] = ()
    pieces: int = 0
    gated: bool = False
    bias: bool = True
    frozen: str = ""
    again: int | None = None
    weight_of: int | None = None

    __repr__ = short


@dataclass(frozen=True, repr=False)
class Case:
    """One training run, complete: data and weights follow from `seed`."""

    inputs: int
    places: tuple[Place, ...]
    rows: int
    seed: int = 0
    dtype: str = "float64"
    engine: str = "auto"
    container: str = "MLP"
    values: str = "normal"
    x_layout: str = "contiguous"
    d_layout: str = "contiguous"
    target: str = "numbers"
    loss: str = "squared_error"
    reduction: str = "mean"
    mode: str = "mini-batch"
    batch_size: int = 8
    epochs: int = 2
    lr: float = 0.02
    optimizer: str = ""
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    eps: float = 1e-3
    weighed: str = ""
    l2: float = 0.0
    clip_grad_norm: float | None = None
    dropout: float = 0.0
    schedule: str = ""
    validation: float | None = None
    shuffle: bool = True
    callback: str = ""
    halved_by: str = ""
    resumed_after: int = 0
    together: int = 1
    threads: int = 1

    __repr__ = short

    @property
    def outputs(self) -> int:
        return self.places[-1].width

    @property
    def held_out(self) -> int:
        return round((self.validation or 0) * self.rows)

    @property
    def step_size(self) -> int:
        return {"stochastic": 1, "mini-batch": self.batch_size, "batch": self.rows - self.held_out}[self.mode]

    @property
    def weights(self) -> int:
        sizes = [self.inputs, *(place.width for place in self.places)]
        pieces = [2 if place.gated else max(place.pieces, 1) for place in self.places]
        return sum(a * b * k for a, b, k in zip(sizes, sizes[1:], pieces, strict=False))

    @property
    def gates(self) -> int:
        return sum(place.gated for place in self.places)

    @property
    def refused(self) -> bool:
        """Whether the native engine has to say no, at the start or once a callback has been called."""
        later = self.epochs > 1 and self.callback in ("double", "prune")
        # Adam's parameters have then made different numbers of steps.
        uneven = self.optimizer in ("Adam", "AdamW") and self.callback == "alternate" and self.epochs > 2
        return (
            (later or uneven or self.halved_by != "" or self.dtype == "bfloat16")
            or any(place.again is not None or place.weight_of is not None for place in self.places)
            or any(not usual(place.activation, dict(place.params)) for place in self.places)
        )


class Net:
    """The same network twice, the model and the reference's layers, with `pairs` of their parameters."""

    def __init__(self, case: Case) -> None:
        self.dtype = getattr(torch, case.dtype)
        self.random = np.random.default_rng(case.seed)
        self.modules: list[Any] = []
        self.layers: list[fit_reference.Layer] = []
        self.pairs: list[tuple[torch.nn.Parameter, fit_reference.Parameter]] = []
        self.values = case.values
        width = case.inputs
        for place in case.places:
            self.add(width, place)
            width = place.width
        if case.container == "layer":
            self.model = self.modules[0]
        elif case.container == "Sequential":
            self.model = torch.nn.Sequential(*self.modules)
        else:
            sizes = [case.inputs, *(place.width for place in case.places)]
            self.model = nn.MLP(sizes, dtype=self.dtype, dropout=case.dropout)
            for k, module in enumerate(self.modules):
                self.model[k] = module

    def add(self, inputs: int, place: Place) -> None:
        if place.again is not None:
            self.modules.append(self.modules[place.again])
            self.layers.append(self.layers[place.again])
            return
        if place.activation == "maxout":
            module = nn.Maxout(inputs, place.width, place.pieces, place.bias, dtype=self.dtype)
        else:
            kind = nn.GatedLinear if place.gated else nn.LinearActivation
            module = kind(
                inputs, place.width, place.activation, place.bias, dtype=self.dtype, **dict(place.params)
            )
        new = {"weight": module.weight, "bias": module.bias} if place.bias else {"weight": module.weight}
        ours = {}
        if place.weight_of is not None:
            module.weight = self.modules[place.weight_of].weight
            ours["weight"] = self.layers[place.weight_of].weight
            del new["weight"]
        for name, parameter in new.items():
            trained = place.frozen not in (name, "both")
            with torch.no_grad():
                # Scaled, so that no layer makes the numbers grow.
                scale = 1 / math.sqrt(max(inputs, place.width)) if name == "weight" else 0.5
                parameter.copy_(torch.tensor(self.draw(parameter.shape, scale)))
            parameter.requires_grad_(trained)
            ours[name] = fit_reference.Parameter(parameter.detach().double().numpy().copy(), trained)
            self.pairs.append((parameter, ours[name]))
        self.modules.append(module)
        self.layers.append(fit_reference.Layer(place.activation, **ours, params=dict(place.params)))

    def draw(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        if self.values == "zero":
            return np.zeros(shape)
        if self.values == "grid":  # so coarse that float32 computes exactly, and meets kinks and ties
            return self.random.integers(-2, 3, size=tuple(shape)) / 4
        return self.random.normal(size=tuple(shape)) * scale


def data(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, the target as fit gets it, and d as the reference does; rounded to the case's dtype."""
    rng = np.random.default_rng([case.seed, 1])
    shape, outputs = (case.rows, case.inputs), case.outputs
    if case.values == "zero":
        x = np.zeros(shape)
    elif case.values == "grid":
        x = rng.integers(-4, 5, size=shape) / 4
    else:
        x = rng.normal(size=shape)
    if case.target == "classes":
        target = rng.integers(outputs, size=case.rows)
    elif case.target == "probabilities":
        target = np.exp(rng.normal(size=(case.rows, outputs)))
        target /= target.sum(1, keepdims=True)
    elif case.target == "bits":
        target = rng.integers(2, size=(case.rows, outputs)).astype(float)
    elif case.target == "shares":
        target = rng.random(size=(case.rows, outputs))
    elif case.values == "zero":
        target = np.ones((case.rows, outputs))
    else:
        target = rng.normal(size=(case.rows, outputs))
    if case.x_layout == "expanded":
        x[:] = x[0]
    if case.d_layout == "expanded":
        target[:] = target[0]
    x = _rounded(x, case.dtype)
    target = target if case.target == "classes" else _rounded(target, case.dtype)
    return x, target, np.eye(outputs)[target] if case.target == "classes" else target


def weights_of(case: Case, d: np.ndarray) -> tuple[dict[str, Any], np.ndarray | None]:
    """The arguments of `fit`, and what each sample then counts."""
    rng = np.random.default_rng([case.seed, 2])
    if case.weighed == "":
        return {}, None
    if case.weighed == "balanced":
        counts = d.sum(0)
        balanced = case.rows / np.maximum((counts > 0).sum() * counts, 1)
        return {"class_weight": "balanced"}, balanced[d.argmax(1)]
    weights = rng.uniform(0.2, 3, size=case.rows)
    if case.weighed == "zeros":
        weights *= rng.integers(2, size=case.rows)
        weights[rng.integers(case.rows)] = 1.0
    weights = _rounded(weights, case.dtype)
    return {"sample_weight": weights}, weights


# By name: what `fit` takes, and the learning rate of epoch k of n, the first at k = 0.
SCHEDULES: dict[str, tuple[Any, Any]] = {
    "cosine": ("cosine", lambda k, n: (1 + math.cos(math.pi * k / n)) / 2),
    "linear": ("linear", lambda k, n: 1 - k / n * (1 - 1 / n)),
    "step": (
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1),
        lambda k, n: 0.1 ** (k // 2),
    ),
}


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """To float32 first: the layout "cast" passes through it."""
    return torch.tensor(values).float().to(getattr(torch, dtype)).double().numpy()


def _tensor(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(values, dtype=getattr(torch, dtype) if values.dtype.kind == "f" else None)


def _array(values: np.ndarray, dtype: str) -> np.ndarray:
    narrow = {"bfloat16": np.float32}.get(dtype, dtype)
    return values.astype(narrow) if values.dtype.kind == "f" else values


def _padded(t: torch.Tensor, *steps: int) -> torch.Tensor:
    """The same values in a tensor whose neighbours in memory are others."""
    big = torch.full([size * step for size, step in zip(t.shape, steps, strict=False)], 7, dtype=t.dtype)
    view = big[tuple(slice(None, None, step) for step, _ in zip(steps, t.shape, strict=False))]
    return view.copy_(t)


def _offset(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.mT.contiguous().mT if t.ndim > 1 else t


def _memmap(values: np.ndarray, folder: str) -> np.memmap:
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(np.ascontiguousarray(values).tobytes())
    return np.memmap(file.name, values.dtype, "r", shape=values.shape)


LAYOUTS: dict[str, Any] = {
    "contiguous": lambda v, dtype, folder: _tensor(v, dtype),
    "rows apart": lambda v, dtype, folder: _padded(_tensor(v, dtype), 2, 1),
    "columns apart": lambda v, dtype, folder: _padded(_tensor(v, dtype), 1, 3),
    "transposed": lambda v, dtype, folder: _transposed(_tensor(v, dtype)),
    "expanded": lambda v, dtype, folder: _tensor(v[:1], dtype).expand(v.shape),
    "offset": lambda v, dtype, folder: _offset(_tensor(v, dtype)),
    "numpy": lambda v, dtype, folder: np.ascontiguousarray(_array(v, dtype)),
    "Fortran": lambda v, dtype, folder: np.asfortranarray(_array(v, dtype)),
    "reversed": lambda v, dtype, folder: np.ascontiguousarray(_array(v, dtype)[::-1])[::-1],
    "cast": lambda v, dtype, folder: _array(v, "float32" if dtype == "float64" else "float64"),
    "memmap": lambda v, dtype, folder: _memmap(_array(v, dtype), folder),
}


def callback(case: Case, net: Net, optimizer: torch.optim.Optimizer | None) -> Any:
    """What the model's side does after an epoch; `mirrored` does it to the reference."""

    def change(epoch: mlpext.training.Epoch) -> None:
        first, number = net.modules[0], epoch.epoch
        if case.callback == "halve lr":
            optimizer.param_groups[0]["lr"] *= 0.5
        elif case.callback == "clamp":
            with torch.no_grad():
                for parameter in net.model.parameters():
                    parameter.clamp_(-CLAMP, CLAMP)
        elif case.callback == "freeze":
            first.requires_grad_(False)
        elif case.callback == "alternate":
            first.requires_grad_(number % 2 == 0)
        elif case.callback == "double" and number == 1:
            first.register_forward_hook(lambda module, inputs, output: 2 * output)
        elif case.callback == "prune" and number == 1:
            prune.custom_from_mask(first, "weight", torch.from_numpy(_mask(net)))
        elif case.callback == "append" and number == 1:
            net.add(case.outputs, Place(case.outputs, "tanh"))
            net.model.append(net.modules[-1])

    return change


def mirrored(case: Case, net: Net, rule: fit_reference.Rule) -> Any:
    def change(number: int) -> None:
        first = net.layers[0]
        if case.callback == "halve lr":
            rule.lr *= 0.5
        elif case.callback == "clamp":
            for _, parameter in net.pairs:
                parameter.value = parameter.value.clip(-CLAMP, CLAMP)
        elif case.callback in ("freeze", "alternate"):
            for parameter in first.parameters:
                parameter.trained = case.callback == "alternate" and number % 2 == 0
        elif case.callback == "double":
            first.gain = 2.0
        elif case.callback == "prune":
            first.mask = _mask(net)
        elif case.callback == "append" and number == 1:
            net.add(case.outputs, Place(case.outputs, "tanh"))

    return change


def _mask(net: Net) -> np.ndarray:
    """Every third weight of the first layer goes."""
    shape = net.layers[0].weight.value.shape
    return (np.arange(math.prod(shape)).reshape(shape) % 3 > 0).astype(float)


def optimizer_of(case: Case, parameters: Any) -> torch.optim.Optimizer:
    own: dict[str, Any] = {"momentum": case.momentum, "nesterov": case.nesterov}
    if case.optimizer != "SGD":
        own = {"eps": case.eps}
    return OPTIMIZERS[case.optimizer](parameters, lr=case.lr, weight_decay=case.weight_decay, **own)


@contextlib.contextmanager
def halving(case: Case, net: Net, optimizer: Any) -> Any:
    """Half of each gradient, by one of the ways to put a function between backward and step."""

    def halve(*_: object) -> None:
        for parameter in net.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5

    if case.halved_by == "a step of its own":
        step = optimizer.step

        def halved_step(closure: Any = None) -> Any:
            halve()
            return step(closure)

        optimizer.step = halved_step
    elif case.halved_by == "step hook":
        optimizer.register_step_pre_hook(halve)
    elif case.halved_by == "gradient hooks":
        for parameter, ours in net.pairs:
            if ours.trained:
                parameter.register_hook(lambda gradient: 0.5 * gradient)
    hook = register_optimizer_step_pre_hook(halve) if case.halved_by == "global hook" else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def options_of(case: Case) -> dict[str, Any]:
    names = ("mode", "batch_size", "epochs", "loss", "reduction", "validation", "shuffle", "seed")
    options = {name: getattr(case, name) for name in names} | {"progress": False}
    options |= {name: getattr(case, name) for name in ("l2", "clip_grad_norm")}
    options |= weights_of(case, data(case)[2])[0]
    if case.schedule:
        options["schedule"] = SCHEDULES[case.schedule][0]
    if not case.optimizer:
        options |= {name: getattr(case, name) for name in ("lr", "momentum", "weight_decay", "nesterov")}
    return options


def train(case: Case, x: Any, target: Any, **changes: Any) -> tuple[Net, mlpext.training.History]:
    net = Net(case)
    optimizer = optimizer_of(case, net.model.parameters()) if case.optimizer else None
    options = options_of(case) | {"optimizer": optimizer, "engine": case.engine} | changes
    callbacks = [callback(case, net, optimizer)] if case.callback else []
    with halving(case, net, optimizer):
        return net, fit(net.model, x, target, callbacks=callbacks, **options)


def expected(case: Case, x: np.ndarray, d: np.ndarray, margin: float) -> tuple[Net, fit_reference.Trained]:
    """What the reference gives, of the samples that are not held out, in the orders that fit documents."""
    generator = torch.Generator().manual_seed(case.seed)
    held_out, weights = None, weights_of(case, d)[1]
    if case.validation is not None:
        rows = torch.randperm(case.rows, generator=generator).numpy()
        chosen, rows = (np.sort(part) for part in np.split(rows, [case.held_out]))
        held_out, x, d = (x[chosen], d[chosen]), x[rows], d[rows]
        weights = None if weights is None else weights[rows]
    shuffled = case.shuffle and case.mode != "batch"
    orders = [
        torch.randperm(len(x), generator=generator).numpy() if shuffled else np.arange(len(x))
        for _ in range(case.epochs)
    ]
    kind: str | None = "r2" if case.target == "numbers" else "accuracy"
    if case.target in ("bits", "shares"):
        kind = "labels"
    elif kind == "accuracy" and case.outputs == 1:
        kind = None
    elif case.target == "probabilities" and case.loss == "squared_error":
        kind = "r2"
    kinds = {"Adam": "adam", "AdamW": "adamw"}
    rule = fit_reference.Rule(kinds.get(case.optimizer, "descent"), case.lr, eps=case.eps)
    rule.momentum, rule.weight_decay, rule.nesterov = case.momentum, case.weight_decay, case.nesterov
    net = Net(case)
    trained = fit_reference.fit(
        net.layers,
        x,
        d,
        loss=case.loss,
        mean=case.reduction == "mean",
        rule=rule,
        step_size=case.step_size,
        weights=weights,
        l2=case.l2,
        clip_grad_norm=case.clip_grad_norm or 0.0,
        dropout=case.dropout,
        seed=case.seed,
        rates=[case.lr * SCHEDULES[case.schedule][1](k, case.epochs) for k in range(case.epochs)]
        if case.schedule
        else (),
        orders=orders,
        kind=kind,
        held_out=held_out,
        gradient_factor=0.5 if case.halved_by else 1.0,
        after_epoch=mirrored(case, net, rule) if case.callback else lambda number: None,
        margin=margin,
    )
    return net, trained


# In roundings of one operation: what sums of a few hundred terms through four layers come to, and what the
# descent makes of it. In 10,000 fits it came to a fifth of LOSS and a tenth of WEIGHTS.
LOSS = {"float64": 1000, "float32": 1000, "bfloat16": 20}
WEIGHTS = {"float64": 100, "float32": 100, "bfloat16": 20}


def check(case: Case, ranks: int = 1) -> dict[str, float] | None:
    """Train the case and compare losses, metrics and weights with the reference's. Returns the worst
    differences; None where a net came so near a kink that rounding chooses the derivative."""
    bound = LOSS[case.dtype] * EPS[case.dtype]
    values, given, d = data(case)
    theirs, wanted = expected(case, values, d, bound)
    assert np.isfinite(wanted.losses).all(), "the reference diverges: the case needs a smaller lr"
    if wanted.nearest < bound:
        return None
    with _folder(case) as folder, _threads(case.threads):
        x = LAYOUTS[case.x_layout](values, case.dtype, folder)
        target = LAYOUTS[case.d_layout](given, case.dtype, folder)
        refused, changes = case.refused or ranks > 1, {}
        if refused and case.engine == "native":
            _assert_refused(case, x, target)
            changes = {"engine": "auto"}
        net, history = train(case, x, target, **changes)
        worst = {
            "loss": _loss_difference(case, history, wanted, bound),
            "weights": _weight_difference(case, net, theirs, wanted.updates),
        }
        # After its one step a net of "grid" has sums next to a kink, where rounding chooses the side.
        if not refused and case.engine != "autograd" and case.values != "grid" and not case.dropout:
            _assert_measured_as_trained(case, net, x, target, bound)
        if case.resumed_after:
            _assert_resumes(case, net, x, target, folder, changes)
        if case.together > 1:
            _assert_many_are_each_alone(case, x, target, changes)
    return worst


def _folder(case: Case) -> contextlib.AbstractContextManager[str]:
    needed = case.resumed_after or "memmap" in (case.x_layout, case.d_layout)
    return tempfile.TemporaryDirectory() if needed else contextlib.nullcontext("")


@contextlib.contextmanager
def _threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _assert_refused(case: Case, x: Any, target: Any) -> None:
    try:
        train(case, x, target)
    except ValueError as error:
        assert "engine='native' cannot train this" in str(error), error
    else:
        raise AssertionError("the native engine trained what it does not serve")


def _weight_difference(case: Case, net: Net, theirs: Net, updates: int) -> float:
    """The worst difference, relative to the largest entry of the parameter or to its movement if that is
    larger. What is compared are the movements."""
    eps, worst = EPS[case.dtype], 0.0
    # Where the terms of a gradient cancel, what is left is wrong by as much as what they come of.
    cancelled = 64 * eps * max(np.max(ours.reach) for _, ours in theirs.pairs)
    for number, ((parameter, _), (_, ours)) in enumerate(zip(net.pairs, theirs.pairs, strict=True)):
        got, moved = parameter.detach().double().numpy(), ours.value - ours.start
        largest = max(np.abs(got).max(), np.abs(ours.start).max())
        # Each update rounds the weight, twice with decay, and so does the reference in float64; what is added
        # is wrong by as much as its gradient. A parameter that is not trained keeps its bits.
        rounding = 4 * eps * updates * largest if ours.steps or case.callback == "clamp" else 0.0
        error = np.abs((got - ours.start) - moved)
        if ours.trained:
            rounding += cancelled
        assert (error <= rounding + WEIGHTS[case.dtype] * eps * ours.reach).all(), (
            f"parameter {number} is off by {error.max():.3g}, of a movement of {np.abs(moved).max():.3g}"
        )
        worst = max(worst, float(error.max() / (max(largest, np.max(ours.reach)) or 1)))
    return worst


def _loss_difference(case: Case, history: Any, wanted: fit_reference.Trained, bound: float) -> float:
    """The worst relative difference of the losses of all epochs; metrics are compared on the way."""
    assert history.epochs[-1].updates == wanted.updates
    pairs = list(zip(history["loss"], wanted.losses, strict=True))
    names = [name for name in ("accuracy", "r2") if name in history.columns]
    metrics = list(zip(wanted.metrics, wanted.unsure, strict=True))
    assert bool(names) == (metrics[0][0] is not None), history.columns
    for name in names:
        for got, (value, unsure) in zip(history[name], metrics, strict=True):
            _assert_metric(name, got, value, unsure, history.config["samples"], bound)
    if wanted.validation:
        pairs += list(zip(history["val_loss"], (row[0] for row in wanted.validation), strict=True))
        for name in names:
            for got, (_, value, unsure) in zip(history[f"val_{name}"], wanted.validation, strict=True):
                _assert_metric(name, got, value, unsure, history.config["validation_samples"], bound)
    worst, floor = 0.0, 1.0 if case.dtype == "bfloat16" else 1e-2
    for got, value in pairs:
        difference = abs(got - value) / max(abs(value), floor)
        assert difference <= bound, f"a loss is {got!r} instead of {value!r}"
        worst = max(worst, difference)
    return worst


def _assert_metric(name: str, got: float, value: float, unsure: int, samples: int, bound: float) -> None:
    allowed = unsure / samples + 1e-12 if name == "accuracy" else bound * (1 + abs(value))
    assert abs(got - value) <= allowed, f"{name} is {got!r} instead of {value!r}"


def _assert_measured_as_trained(case: Case, net: Net, x: Any, target: Any, bound: float) -> None:
    """Another forward of the same weights: a native epoch that moves nothing has the loss of `evaluate`."""
    measured = evaluate(net.model, x, target, loss=case.loss)["loss"]
    for parameter in net.model.parameters():
        parameter.requires_grad_(True)
    options = {"mode": "batch", "lr": 0.0, "epochs": 1, "progress": False, "engine": "native"}
    loss = fit(net.model, x, target, loss=case.loss, **options)["loss"][0]
    assert abs(loss - measured) <= bound * max(abs(measured), 1e-2), f"{loss!r} instead of {measured!r}"


def _assert_resumes(case: Case, net: Net, x: Any, target: Any, folder: str, changes: dict) -> None:
    files = {"checkpoint": f"{folder}/checkpoint"} | changes
    train(case, x, target, **files, epochs=case.resumed_after)
    other, history = train(case, x, target, **files, resume=True)
    assert len(history) == case.epochs
    assert _same_bits(net.model, other.model), "a resumed run has other weights"


def _assert_many_are_each_alone(case: Case, x: Any, target: Any, changes: dict) -> None:
    nets = [Net(case) for _ in range(case.together)]
    each = [{"seed": case.seed + k} for k in range(case.together)]
    options = options_of(case) | {"engine": case.engine} | changes
    if case.optimizer:
        options["optimizer"] = functools.partial(optimizer_of, case)
    histories = fit_many([net.model for net in nets], x, target, each=each, threads=2, **options)
    for net, history, own in zip(nets, histories, each, strict=True):
        alone, expected = train(case, x, target, **changes, **own)
        assert history["loss"] == expected["loss"], "fit_many has other losses"
        assert _same_bits(net.model, alone.model), "fit_many has other weights"


def _same_bits(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    return all(map(torch.equal, ours.parameters(), theirs.parameters()))


SMALL = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17)
WIDTHS = (*SMALL, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257)
FEW = (1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 33, 48, 64, 95, 96, 97)
ROWS = (*FEW, 127, 128, 129, 191, 193, 500, 1023, 1024)
MANY = (1025, 1026, 1087, 1119, 1120, 1121, 1536, 2047, 2048, 2049, 3073)
STEPS = (1, 2, 3, 7, 8, 11, 12, 13, 16, 17, 32, 33, 48, 95, 96, 97, 100, 128, 1023, 1024, 1025, 1500, 4096)
NAMES = (*mlpext.activations(), *("maxout",) * 6)
SMOOTH = tuple(name for name in mlpext.activations() if not reference.kinks(name, {}))  # for bfloat16
GRID = ("identity", "relu", "hardtanh", "relu6", "softshrink", "hardshrink", "maxout")  # exact in float32
WORK = 300_000  # multiplications of one sweep over all samples, times epochs
UPDATES = 48  # more where a draw says so: they cost Python


def draw(r: random.Random) -> Case:
    """Any case that fit takes, most of them small. Simple choices come first, for those who shrink them."""
    dtype = r.choice((*("float64", "float32") * 5, "bfloat16"))
    many = r.random() > 0.87
    depth = r.choice((1, 2, 2, 3, 3, 4))
    few = many or dtype == "bfloat16"
    widths = [r.choice(SMALL if few or r.random() < 0.6 else WIDTHS) for _ in range(depth + 1)]
    values = "normal" if r.random() < 0.9 or dtype == "bfloat16" else "grid"
    names = GRID if values == "grid" else SMOOTH if dtype == "bfloat16" else NAMES
    places = [_place(r, width, names) for width in widths[1:]]
    if values == "normal":  # products of two nets are not exact in float32
        places = _with_gates(r, places)
    container = r.choice(("MLP", "MLP", "Sequential", "layer") if depth == 1 else ("MLP", "Sequential"))
    epochs = 1 if values == "grid" else r.choice((1, 2, 2, 3, 4))
    case = Case(widths[0], tuple(places), 1, r.randrange(10_000), dtype, container=container, values=values)
    repeats = _repeats(r, case)
    if repeats is not None and values == "normal":
        case = dataclasses.replace(case, places=repeats)
    tied = repeats is not None and values == "normal"
    mode = "batch" if values == "grid" else r.choice(MODES)
    case = dataclasses.replace(case, epochs=epochs, engine=r.choice(ENGINES), mode=mode)
    fitting = [rows for rows in (MANY if many else ROWS) if rows * case.weights * epochs <= WORK]
    rows = r.choice(fitting or (MANY if many else FEW)[:3])
    case = dataclasses.replace(case, rows=rows, shuffle=r.random() < 0.8)
    if rows >= 8 and values == "normal" and r.random() < 0.25:
        case = dataclasses.replace(case, validation=r.choice((0.25, 0.1, 0.5, 0.37)))
        if case.held_out < 1:
            case = dataclasses.replace(case, validation=None)
    case = _steps(r, case)
    case = _objective(r, case)
    case = _rule(r, case)
    x_layouts = [name for name in LAYOUTS if name != "expanded" or r.random() < 0.5]
    case = dataclasses.replace(
        case,
        x_layout=r.choice(x_layouts) if r.random() < 0.6 else "contiguous",
        d_layout=r.choice(list(LAYOUTS)) if r.random() < 0.4 else "contiguous",
        threads=1 if r.random() < 0.96 else 2,
    )
    if case.values == "normal":
        case = _extras(r, _options(r, case, tied), tied)
    return case


def _place(r: random.Random, width: int, names: tuple[str, ...]) -> Place:
    name = "identity" if r.random() < 0.2 else r.choice(names)
    if name == "maxout":
        return Place(width, name, pieces=r.randint(1, 5), bias=r.random() < 0.8)
    # A slope of 30 makes the descent chaotic.
    variants = [v for v in reference.ACTIVATIONS[name].variants if v.get("omega") != 30.0]
    params = r.choice(variants) if names is not GRID else {}
    return Place(width, name, tuple(params.items()), bias=r.random() < 0.8)


def _grows(place: Place) -> bool:
    return place.activation == "relu_squared" or (
        place.activation == "celu" and dict(place.params).get("alpha", 1.0) < 0
    )


def _with_gates(r: random.Random, places: list[Place]) -> list[Place]:
    """At most two of the layers are gated, and none beside a function that grows faster than a line: outputs
    of degree 8 and more in the weights diverge, and products in an exponential do."""
    count = 0 if any(map(_grows, places)) else r.choice((0, 0, 0, 1, 1, 2))
    gated = r.sample(range(len(places)), min(len(places), count))
    return [
        dataclasses.replace(place, gated=k in gated and place.activation != "maxout")
        for k, place in enumerate(places)
    ]


def _repeats(r: random.Random, case: Case) -> tuple[Place, ...] | None:
    """A place that stands again right behind itself, or whose weight does; None where none is drawn."""
    places, sizes = list(case.places), [case.inputs, *(place.width for place in case.places)]
    if r.random() < 0.9 or case.container == "layer" or case.gates == 2:
        return None
    k = r.randrange(len(places))
    width = sizes[k]
    first = dataclasses.replace(places[k], width=width)
    if r.random() < 0.6:
        second = dataclasses.replace(first, again=k)
    elif first.activation == "maxout":
        return None
    else:
        second = dataclasses.replace(_place(r, width, SMOOTH), weight_of=k, gated=first.gated)
    tail = places[k + 1 :]
    return (*places[:k], first, second, *tail)


def _steps(r: random.Random, case: Case) -> Case:
    """Steps of a size that does not make too many of them."""
    rows = case.rows - case.held_out
    most = UPDATES if r.random() < 0.97 else 20 * UPDATES
    if case.dtype == "bfloat16":  # small updates are lost
        most = 2 * case.epochs
    if case.mode == "stochastic" and rows * case.epochs > most:
        case = dataclasses.replace(case, mode=r.choice(("mini-batch", "batch")))
    sizes = [size for size in (*STEPS, rows, rows + 1) if -(-rows // size) * case.epochs <= most]
    return dataclasses.replace(case, batch_size=r.choice(sizes))


def _objective(r: random.Random, case: Case) -> Case:
    reduction = r.choice(REDUCTIONS)
    if case.values == "normal" and r.random() < 0.2:
        target = r.choice(("bits", "shares"))
        return dataclasses.replace(case, target=target, loss="binary_cross_entropy", reduction=reduction)
    if case.outputs == 1:
        return dataclasses.replace(case, reduction=reduction)
    target = r.choice(("numbers", "classes", "probabilities"))
    loss = "squared_error" if target == "numbers" else r.choice(("squared_error", "cross_entropy"))
    return dataclasses.replace(case, target=target, loss=loss, reduction=reduction)


def _rule(r: random.Random, case: Case) -> Case:
    """An optimizer, and a step size with which the weights move well and float32's errors do not grow."""
    rows = case.rows - case.held_out
    updates = -(-rows // case.step_size) * case.epochs
    widest = max(case.inputs, *(place.width for place in case.places[:-1]), 1)
    widest *= 10 ** (case.gates + sum(place.activation == "relu_squared" for place in case.places))
    # Gradients of coarse numbers cancel, and Adam divides what rounding leaves of them by itself.
    plain = case.dtype == "bfloat16" or case.values == "grid"
    names = ("", "", "SGD") if plain else ("", "", "SGD", "Adam", "AdamW")
    name = r.choice(names)
    decay = r.choice((0.0, 0.0, 0.01, 0.1))
    case = dataclasses.replace(case, optimizer=name, weight_decay=decay)
    if name in ("Adam", "AdamW"):
        # Smaller ones divide what rounding leaves of a gradient near 0 by itself.
        eps = r.choice((1e-2, 1e-3) if case.dtype == "float32" else (1e-3, 1e-5))
        lr = r.choice((0.1, 0.3, 1.0)) / ((widest + 2) * min(updates, 10))
        return dataclasses.replace(case, eps=eps, lr=_digits(lr))
    momentum = r.choice((0.0, 0.0, 0.5, 0.9))
    lr = r.choice((0.1, 0.3, 1.0)) * (1 - momentum) / ((widest + 2) * min(updates, 10))
    if case.reduction == "sum":
        lr /= min(case.step_size, rows)
    if updates > 100:
        lr *= 50 / updates
    return dataclasses.replace(
        case, lr=_digits(lr), momentum=momentum, nesterov=momentum > 0 and r.random() < 0.4
    )


def _options(r: random.Random, case: Case, tied: bool) -> Case:
    """Weights, a penalty, clipping, dropout and a schedule, a few of them at a time."""
    if r.random() < 0.2:
        names = ["random", "zeros"] + ["balanced"] * (case.target == "classes")
        case = dataclasses.replace(case, weighed=r.choice(names))
    if r.random() < 0.2:
        case = dataclasses.replace(case, l2=r.choice((1e-3, 0.1, 1.0)))
    if r.random() < 0.15:
        case = dataclasses.replace(case, clip_grad_norm=r.choice((1e-2, 0.3, 100.0)))
    if r.random() < 0.2 and case.container == "MLP" and not tied:
        case = dataclasses.replace(case, dropout=r.choice((0.1, 0.5, 0.5 if case.gates else 0.8)))
    if r.random() < 0.15 and case.epochs > 1:
        case = dataclasses.replace(case, schedule=r.choice(list(SCHEDULES)))
    return case


def _digits(value: float) -> float:
    return float(f"{value:.2g}")


def _extras(r: random.Random, case: Case, tied: bool) -> Case:
    """Frozen parameters, callbacks, hooks, interruption, company: a few of them at a time, where they go
    together."""
    if r.random() < 0.2:
        places = list(case.places)
        for k, place in enumerate(places[:-1] if not tied else ()):
            if r.random() < 0.6:
                places[k] = dataclasses.replace(place, frozen=r.choice(("weight", "bias", "both")))
        case = dataclasses.replace(case, places=tuple(places))
    if case.epochs > 1 and r.random() < 0.3:
        names = ["look", "clamp"]
        if case.optimizer and not case.schedule:
            names.append("halve lr")
        elif case.container != "layer" and case.outputs <= 17 and not case.schedule:
            names.append("append")
        if len(case.places) > 1 and not tied:
            names += [] if case.places[0].frozen else ["freeze", "alternate"]
            names += ["double", "prune"]
        case = dataclasses.replace(case, callback=r.choice(names))
    options = case.l2 or case.clip_grad_norm or case.schedule
    if r.random() < 0.05 and case.callback in ("", "look", "clamp") and not options:
        ways = ["gradient hooks"]
        if case.optimizer:
            ways += ["a step of its own", "step hook", "global hook"]
        case = dataclasses.replace(case, halved_by=r.choice(ways))
    if case.epochs > 1 and case.callback in ("", "look", "clamp", "halve lr") and r.random() < 0.06:
        if case.schedule:
            case = dataclasses.replace(case, schedule="step")
        return dataclasses.replace(case, resumed_after=r.randrange(1, case.epochs))
    if not (case.callback or case.halved_by) and r.random() < 0.05:
        return dataclasses.replace(case, together=r.choice((2, 3)))
    return case


class Tally:
    """What came of the cases so far: how many, and the worst differences by dtype and engine."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.worst: dict[tuple[str, str], dict[str, float]] = {}

    def add(self, case: Case, differences: dict[str, float] | None) -> None:
        if differences is None:
            self.counts["too near a kink to tell"] += 1
            return
        self.counts["N > 1024" if case.rows > 1024 else "N <= 1024"] += 1
        engine = "autograd" if case.engine == "autograd" or case.refused else "native"
        entry = self.worst.setdefault((case.dtype, engine), dict.fromkeys(differences, 0.0))
        for name, value in differences.items():
            entry[name] = max(entry[name], value)

    def __str__(self) -> str:
        rows = [f"{count:8} {what}" for what, count in self.counts.most_common()]
        for (dtype, engine), entry in sorted(self.worst.items()):
            rows += [f"{dtype:9} {engine:9}" + "".join(f" {name} {v:.1e}" for name, v in entry.items())]
        return "\n".join(rows)
