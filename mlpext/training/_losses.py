"""What training minimises, E, and what it reports: accuracy for classes, R2 for numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpext.training._samples import Samples

Loss: TypeAlias = "str | Callable[[Tensor, Tensor], Tensor]"
LOSSES = ("squared_error", "cross_entropy")


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """The lecture's E = 1/2 ||d - o||^2, summed over the samples; both (n, ...), the result 0-d."""
    return 0.5 * F.mse_loss(_wide(output), _wide(target), reduction="sum")


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """-log softmax(o)[target], summed over the samples; o (n, C), target (n,) or probabilities (n, C)."""
    if target.is_floating_point():
        target = _wide(target)
    return F.cross_entropy(_wide(output), target, reduction="sum")


def gradient(total: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> Tensor:
    """dE/do of each output under squared_error or cross_entropy, in two to five kernels on a GPU; outputs may
    have dimensions more."""
    if total is squared_error:
        return output - target
    softmax = output.softmax(-1)
    if target.is_floating_point():
        return softmax * target.sum(-1, keepdim=True) - target
    return softmax - F.one_hot(target, output.shape[-1])


class OfFunction:
    """A function of (outputs, targets) that gives E per sample, (n,), or its mean, 0-d, as their sum."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def value(self, output: Tensor, target: Tensor) -> Tensor:
        """What the function gives. ValueError for a shape that is neither (n,) nor ()."""
        value = self._loss(output, target)
        if not isinstance(value, Tensor) or value.shape not in ((), (len(output),)):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss must return a tensor of shape () or ({len(output)},), one value per sample, got {got}"
            )
        return value

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = self.value(output, target)
        return _wide(value).sum() if value.ndim else _wide(value) * len(output)


def total_loss(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """The function (outputs, targets) -> sum of E over the samples, 0-d, that `loss` stands for.

    Raises ValueError for an unknown name, TypeError for what is neither a name nor callable.
    """
    if loss == "squared_error":
        return squared_error
    if loss == "cross_entropy":
        return cross_entropy
    if isinstance(loss, str):
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, or a function of (outputs, targets), got {loss!r}"
        )
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function of (outputs, targets), got {type(loss).__name__}")
    return OfFunction(loss)


def check_parts(
    model: nn.Module, samples: Samples, total: Callable[[Tensor, Tensor], Tensor], rows: int, parts: str
) -> None:
    """Refuses a mean that cannot be had from the means of parts: weighted by class, over what is not ignored,
    over pairs. Looks at up to `rows` samples, as a whole and in parts.

    Raises ValueError, which says that it is `parts` whose means would be added up.
    """
    if not isinstance(total, OfFunction):
        return
    chosen = torch.linspace(0, len(samples) - 1, min(rows, len(samples)), dtype=torch.float64, device="cpu")
    with torch.no_grad(), in_mode(model, training=False):
        x, target = samples[chosen.long()]
        output = model(x)
        value, count = total.value(output, target), len(output)
        if value.ndim or count < 4:
            return
        whole = value.item() * count
        if not math.isfinite(whole):
            return
        # Parts that differ in what they hold whether the classes are sorted, alternate or come as they like.
        places = torch.arange(count, device=output.device)
        for split in (
            places.tensor_split(max(count // 8, 2)),
            (places[: count // 3], places[count // 3 :]),
            (places[::2], places[1::2]),
        ):
            sums = [total(output[part], target[part]).item() for part in split]
            if not abs(sum(sums) - whole) <= math.sqrt(torch.finfo(value.dtype).eps) * sum(map(abs, sums)):
                raise ValueError(
                    f"loss: {count} samples give {whole / count:.6g}, their parts {sum(sums) / count:.6g}: "
                    f"it is no plain mean over the samples, and the means of {parts} are to be added up. "
                    'Return one value per sample, shape (n,) (reduction="none"), or take mini-batches in one '
                    "process"
                )


def _wide(values: Tensor) -> Tensor:
    """16-bit values as float32: their sums are long."""
    return values.float() if values.is_floating_point() and values.element_size() < 4 else values


class Metric(Protocol):
    """A figure of merit that adds up over blocks of samples."""

    name: str

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """What these samples add."""

    def value(self, score: Tensor, samples: int) -> float:
        """The metric of so many samples from the sum of their scores."""


class Accuracy:
    """The share of samples whose largest output is that of their class (or of the largest entry of d)."""

    name = "accuracy"

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        labels = target if target.ndim == 1 else target.argmax(1)
        return (output.argmax(1) == labels).sum()

    def value(self, score: Tensor, samples: int) -> float:
        return score.item() / samples


class R2:
    """1 - sum (d - o)^2 / sum (d - mean d)^2, averaged over the outputs (scikit-learn's r2_score).

    An output whose d is constant counts 1 where it is met exactly, else 0.
    """

    name = "r2"

    def __init__(self, samples: Samples) -> None:
        # Deviations from the first sample: sums of squares of the targets themselves would cancel.
        origin = _flat(samples.targets(torch.tensor([0], device="cpu")))
        total = squares = torch.zeros_like(origin[0])
        for rows in samples.blocks():
            deviation = _flat(samples.targets(rows)) - origin
            total = total + deviation.sum(0)
            squares = squares + deviation.square().sum(0)
        self._spread = (squares - total.square() / len(samples)).clamp_min(0).cpu()
        self._has_constant = bool((self._spread == 0).any())

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return _flat(target - output).square().sum(0)

    def value(self, score: Tensor, samples: int) -> float:
        explained = 1 - score / self._spread
        if self._has_constant:
            explained = torch.where(self._spread > 0, explained, torch.where(score == 0, 1.0, 0.0))
        return explained.mean().item()


def prepare(model: nn.Module, samples: Samples, loss: Loss, name: str = "") -> None:
    """Shape the targets as the model's outputs and `loss` need them: one-hot d, or (N,) as a column.

    Raises ValueError for targets that do not go with the outputs; `name` ("validation ") begins the message.
    """
    with torch.no_grad(), in_mode(model, training=False):
        output = model(samples[torch.tensor([0], device="cpu")][0])
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != 1:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model must give one row of outputs per sample; for x of one sample it gave {got}")
    outputs, shape = list(output.shape[1:]), samples.shapes[1]
    if samples.has_classes and isinstance(loss, str):
        largest = samples.largest_class()
        if len(outputs) != 1 or largest >= outputs[0]:
            raise ValueError(
                f"{name}target has class numbers up to {largest}, which needs {largest + 1} outputs or more, "
                f"but the model's are {_shape(outputs)}; for one output give {name}target as floating point"
            )
        if loss == "squared_error":
            samples.one_hot = outputs[0]
    elif not samples.has_classes:
        if outputs == [1] and len(shape) == 1:
            samples.as_column()
        elif isinstance(loss, str) and shape[1:] != outputs:
            raise ValueError(
                f"{name}target has shape {_shape(shape[1:])}, but the model's outputs {_shape(outputs)}"
            )
        if loss == "cross_entropy" and len(outputs) != 1:
            raise ValueError(
                f"cross_entropy needs outputs of shape (n, classes), the model's are {_shape(outputs)}"
            )
    if outputs == [1] and (
        loss in ("cross_entropy", F.cross_entropy) or isinstance(loss, nn.CrossEntropyLoss)
    ):
        raise ValueError(
            "cross_entropy of one output is 0 whatever the output, and so teaches nothing: give the model an "
            "output a class, or take loss=torch.nn.functional.binary_cross_entropy_with_logits or "
            'loss="squared_error" with a floating-point target'
        )
    samples.outputs = outputs


def metric_for(samples: Samples, loss: Loss) -> Metric | None:
    """Accuracy for classes, R2 for numbers of the outputs' shape, None for anything else."""
    if samples.has_classes or loss == "cross_entropy":
        return Accuracy() if len(samples.outputs) == 1 and samples.outputs[0] > 1 else None
    return R2(samples) if samples.shapes[1][1:] == samples.outputs else None


def measure(
    model: nn.Module, samples: Samples, total: Callable[[Tensor, Tensor], Tensor], metric: Metric | None
) -> dict[str, float]:
    """Mean E ("loss") and metric of the samples under the model as it is, in eval() mode."""
    error, score = 0.0, torch.zeros((), dtype=torch.float64, device="cpu")
    averaged: list[tuple[Tensor, Tensor]] = []  # by a function, whose mean of all need not be that of blocks
    with torch.no_grad(), in_mode(model, training=False):
        for rows in samples.blocks():
            x, target = samples[rows]
            output = model(x)
            if metric is not None:
                score = score + metric.score(output, target).cpu()
            value = (total.value if isinstance(total, OfFunction) else total)(output, target)
            if isinstance(total, OfFunction) and value.ndim == 0:
                averaged.append((output, target))
            else:
                error += _wide(value).sum().item()
        if averaged:
            output, target = (torch.cat(parts) for parts in zip(*averaged, strict=True))
            error = total(output, target).item()
    result = {"loss": error / len(samples)}
    return result if metric is None else result | {metric.name: metric.value(score, len(samples))}


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in train() or eval() mode, and afterwards each of its modules in the mode that it had."""
    flags = [(module, module.training) for module in model.modules()]
    set_mode(model, training=training)
    try:
        yield
    finally:
        _set_mode(flags)


def set_mode(model: nn.Module, *, training: bool) -> None:
    """The model in train() or eval() mode from now on."""
    modules = list(model.modules())
    if all(type(module).train is nn.Module.train for module in modules):
        _set_mode((module, training) for module in modules)
    else:
        model.train(training)


def _set_mode(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        if module.training != flag:  # an attribute of a module costs 2 us to set
            module.training = flag


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1).double()


def _shape(sizes: list[int]) -> str:
    return f"(n, {', '.join(map(str, sizes))})" if sizes else "(n,)"
