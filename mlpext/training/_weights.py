"""What each sample counts: `sample_weight` times the weight of its class, for `fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mlpext.training._samples import Samples
from mlpext.training._tables import as_inputs

# A weight for each class, by its label or in the order of the class numbers; or "balanced".
ClassWeight: TypeAlias = "Mapping[Any, float] | Sequence[float] | str"


def weights_for(
    samples: Samples, sample_weight: Any, class_weight: ClassWeight | None, classes: Sequence[str] | None
) -> Tensor | None:
    """The weight of every sample, (N,), of the model's dtype; None where all count 1.

    ValueError for weights that are not one finite number of 0 or more a sample, or a class.
    """
    weights: Tensor | None = None
    if sample_weight is not None:
        weights = _checked("sample_weight", sample_weight, len(samples))
    if class_weight is not None:
        numbers = class_numbers(samples)
        count = samples.output_shape[0] if samples.has_classes else 2
        own = _of_classes(class_weight, torch.bincount(numbers, minlength=count), classes)[numbers]
        weights = own if weights is None else weights * own
    return None if weights is None else weights.to(samples.device, samples.dtype)


def class_numbers(samples: Samples) -> Tensor:
    """The class of every sample, int64 (N,): their class numbers, or those of one output of 0 and 1."""
    target = samples.all_targets()
    if not samples.has_classes:
        if samples.output_shape != [1] or not bool(((target == 0) | (target == 1)).all()):
            raise ValueError("class_weight needs class numbers as the target, one for each sample")
        target = target.reshape(-1).long()
    return target.cpu()


def _of_classes(class_weight: ClassWeight, counts: Tensor, classes: Sequence[str] | None) -> Tensor:
    """The weight of each class number, (C,) float64, of classes that so many samples have."""
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f"class_weight must be weights or 'balanced', got {class_weight!r}")
        balanced: Tensor = counts.sum().double() / (counts.count_nonzero() * counts)
        return balanced
    if isinstance(class_weight, Mapping):
        labels: Sequence[Any] = range(len(counts)) if classes is None else classes
        if unknown := [label for label in class_weight if label not in labels]:
            raise ValueError(f"class_weight: {unknown[0]!r} is no class; the classes are {list(labels)}")
        class_weight = [class_weight.get(label, 1.0) for label in labels]
    return _checked("class_weight", class_weight, len(counts), "class")


def _checked(name: str, given: Any, count: int, of: str = "sample") -> Tensor:
    numbers: Tensor = torch.as_tensor(as_inputs(given, name))
    weights = numbers.detach().double().cpu()
    if weights.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one number a {of}, got {tuple(weights.shape)}")
    wrong = (~(weights.isfinite() & (weights >= 0))).nonzero()
    if len(wrong):
        place = int(wrong[0])
        raise ValueError(f"{name}[{place}] is {weights[place].item()}; weights are finite and 0 or more")
    if not bool(weights.any()):
        raise ValueError(f"{name} is 0 for every {of}: there is nothing to train on")
    return weights
