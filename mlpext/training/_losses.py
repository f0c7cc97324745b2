"""What training minimises: E, the error of one sample, and its sum over the samples of a step.

`LOSSES` are the losses that go by a name, which every engine knows. Any other loss is a function of the
user's, which the PyTorch loop alone can call. All of them are handled as sums, because the mean over a step
that is taken in parts (chunks of rows, several ranks) follows from the sums of the parts, and not from their
means.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpext._names import did_you_mean
from mlpext.training._modules import in_mode
from mlpext.training._samples import FIRST_ROW, Samples

# As a user gives it: a name, or a function of (outputs, targets) to E per sample, (n,), or their mean, ().
LossName: TypeAlias = Literal["squared_error", "cross_entropy", "binary_cross_entropy"]
Loss: TypeAlias = "LossName | Callable[[Tensor, Tensor], Tensor]"


class LossSum(Protocol):
    """The sum of E over samples: of outputs and targets (n, ...), and weights (n,) or None, shape ()."""

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None, /) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class NamedLoss:
    """A loss that every engine knows. `function` is torch's, to be called with `reduction` "sum" or "none";
    `gradient` gives dE/do of each output, for CUDA graphs: two to five kernels."""

    name: str
    function: Callable[..., Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None, /) -> Tensor:
        if weight is None:
            return self.function(output, target, reduction="sum")
        each = self.function(output, target, reduction="none").reshape(len(output), -1).sum(1)
        return weighted_sum(each, weight)


def weighted_sum(each: Tensor, weight: Tensor | None) -> Tensor:
    """The sum of a value of each sample, (n,), times its weight, 1 where there are none."""
    return widened(each if weight is None else each * weight).sum()


def squared_error(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The lecture's E = 1/2 ||d - o||^2; both (n, ...)."""
    return 0.5 * F.mse_loss(widened(output), widened(target), reduction=reduction)


def cross_entropy(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """E = -log softmax(o)[target]; o (n, C), target (n,) or probabilities (n, C)."""
    if target.is_floating_point():
        target = widened(target)
    return F.cross_entropy(widened(output), target, reduction=reduction)


def binary_cross_entropy(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """E = sum over the outputs of log(1 + e^o) - d o, so of logits o and probabilities d; both (n, ...)."""
    return F.binary_cross_entropy_with_logits(widened(output), widened(target), reduction=reduction)


def _squared_error_gradient(output: Tensor, target: Tensor) -> Tensor:
    return output - target


def _cross_entropy_gradient(output: Tensor, target: Tensor) -> Tensor:
    softmax = output.softmax(-1)
    if target.is_floating_point():
        return softmax * target.sum(-1, keepdim=True) - target
    return softmax - F.one_hot(target, output.shape[-1])


def _binary_cross_entropy_gradient(output: Tensor, target: Tensor) -> Tensor:
    return output.sigmoid() - target


BY_NAME: dict[str, NamedLoss] = {
    loss.name: loss
    for loss in (
        NamedLoss("squared_error", squared_error, _squared_error_gradient),
        NamedLoss("cross_entropy", cross_entropy, _cross_entropy_gradient),
        NamedLoss("binary_cross_entropy", binary_cross_entropy, _binary_cross_entropy_gradient),
    )
}
LOSSES = tuple(BY_NAME)


class FunctionSum:
    """The sum of E for a user's function, whether it gives E per sample, (n,), or the samples' mean, ()."""

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

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None, /) -> Tensor:
        value = self.value(output, target)
        if value.ndim:
            return weighted_sum(value, weight)
        if weight is not None:
            raise ValueError(
                f"loss must return one value per sample, shape ({len(output)},), for sample_weight and "
                "class_weight to count, got their mean"
            )
        return widened(value) * len(output)


def loss_sum_of(loss: Loss) -> LossSum:
    """The sum of E over the samples that `loss` stands for.

    Raises ValueError for an unknown name, TypeError for what is neither a name nor callable.
    """
    if isinstance(loss, str):
        if loss in BY_NAME:
            return BY_NAME[loss]
        raise ValueError(
            f"loss must be one of {', '.join(LOSSES)}, or a function of (outputs, targets), got {loss!r}"
            + did_you_mean(loss, LOSSES)
        )
    if not callable(loss):
        raise TypeError(f"loss must be a name or a function of (outputs, targets), got {type(loss).__name__}")
    return FunctionSum(loss)


def check_parts(model: nn.Module, samples: Samples, loss_sum: LossSum, rows: int, parts: str) -> None:
    """Refuses a user's mean that cannot be had from the means of parts, such as one that weighs classes,
    leaves samples out or compares pairs. Looks at up to `rows` samples, as a whole and in parts.

    Raises ValueError, which says that it is `parts` whose means would be added up.
    """
    if not isinstance(loss_sum, FunctionSum):
        return
    chosen = torch.linspace(0, len(samples) - 1, min(rows, len(samples)), dtype=torch.float64, device="cpu")
    with torch.no_grad(), in_mode(model, training=False):
        x, target = samples[chosen.long()]
        output = model(x)
        value, count = loss_sum.value(output, target), len(output)
        if value.ndim or count < 4:
            return
        whole = value.item() * count
        if not math.isfinite(whole):
            return
        # One of these splits gives parts of different content whether the classes are sorted, alternate, or
        # come in any other order.
        places = torch.arange(count, device=output.device)
        for split in (
            places.tensor_split(max(count // 8, 2)),
            (places[: count // 3], places[count // 3 :]),
            (places[::2], places[1::2]),
        ):
            sums = [loss_sum(output[part], target[part]).item() for part in split]
            if not abs(sum(sums) - whole) <= math.sqrt(torch.finfo(value.dtype).eps) * sum(map(abs, sums)):
                raise ValueError(
                    f"loss: {count} samples give {whole / count:.6g}, their parts {sum(sums) / count:.6g}: "
                    f"it is no plain mean over the samples, and the means of {parts} are to be added up. "
                    'Return one value per sample, shape (n,) (reduction="none"), or take mini-batches in one '
                    "process"
                )


def shape_targets(model: nn.Module, samples: Samples, loss: Loss, name: str = "") -> None:
    """Shape the targets as the model's outputs and `loss` need them: one-hot d, or (N,) as a column (N, 1).
    Learns the outputs' shape from one sample, and notes it as `samples.output_shape`.

    Raises ValueError for targets that do not go with the outputs; `name` ("validation ") begins the message.
    """
    with torch.no_grad(), in_mode(model, training=False):
        output = model(samples.inputs(FIRST_ROW))
    if not isinstance(output, Tensor) or output.ndim < 1 or len(output) != 1:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model must give one row of outputs per sample; for x of one sample it gave {got}")
    outputs, shape = list(output.shape[1:]), samples.shapes[1]
    if samples.has_classes and isinstance(loss, str):
        largest = samples.largest_class()
        if len(outputs) != 1 or largest >= outputs[0]:
            raise ValueError(
                f"{name}target has class numbers up to {largest}, which needs {largest + 1} outputs or more, "
                f"but the model's are {_shape(outputs)}; for one output give {name}target as floating point, "
                'or with two classes take loss="binary_cross_entropy"'
            )
        if loss != "cross_entropy":
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
        if loss == "binary_cross_entropy":
            _check_probabilities(samples, name)
    if outputs == [1] and (
        loss in ("cross_entropy", F.cross_entropy) or isinstance(loss, nn.CrossEntropyLoss)
    ):
        raise ValueError(
            "cross_entropy of one output is 0 whatever the output, and so teaches nothing: give the model an "
            'output a class, or take loss="binary_cross_entropy", or loss="squared_error" with a '
            "floating-point target"
        )
    samples.output_shape = outputs


def _check_probabilities(samples: Samples, name: str) -> None:
    for rows in samples.blocks():
        target = samples.targets(rows)
        wrong = ((target < 0) | (target > 1)).nonzero()
        if len(wrong):
            place = wrong[0].tolist()
            value = target[tuple(place)].item()
            place[0] += int(rows[0])
            raise ValueError(
                f"{name}target{place} is {value:g}; binary_cross_entropy takes 0, 1 and what lies between"
            )


def widened(values: Tensor) -> Tensor:
    """16-bit floating-point values as float32, because a sum over many samples needs more digits."""
    return values.float() if values.is_floating_point() and values.element_size() < 4 else values


def _shape(sizes: list[int]) -> str:
    return f"(n, {', '.join(map(str, sizes))})" if sizes else "(n,)"
