"""The training data: inputs x and targets d, checked once, and handed out by row numbers.

For `fit`, `evaluate` and the engines. A memory-mapped array is never copied whole, so everything that visits
all rows does so in blocks of BLOCK rows.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpext import _C

Array: TypeAlias = "Tensor | np.ndarray[Any, Any]"

# Rows read at once where all of them are visited: to check the data, to evaluate a model, and as the chunks
# of a step in batch mode. Read it as `_samples.BLOCK`, so that it can be changed in one place.
BLOCK = 1024
# The row numbers of the first sample alone.
FIRST_ROW = torch.tensor([0], device="cpu")


class Samples:
    """N inputs x (N, ...) and targets (N,) or (N, ...), cast to one floating dtype and kept on one device.

    A tensor or an array is cast and moved once. A memory-mapped array stays where it is: only the rows of a
    block are read, cast and moved. Integer (or bool) targets are class numbers, one per sample, int64, or
    with `classes=False` numbers; `one_hot=C` hands class numbers out as rows of d with a 1 in the class's
    column. `weights` are those of all N, or None, and can be set.

    Raises TypeError for anything but dense tensors and numpy arrays without masked values, and for data that
    are not numbers; ValueError for empty data, different lengths, NaN or infinity (naming the row) and class
    numbers below 0. `name` ("validation ") begins the messages. `output_shape` is the shape of one sample's
    outputs, once the model is known (see _losses.shape_targets).

        samples = Samples(x, target, dtype=torch.float32, device=torch.device("cpu"))
        inputs, targets = samples[torch.tensor([3, 1])]
    """

    def __init__(
        self,
        x: Array,
        target: Array,
        *,
        dtype: torch.dtype,
        device: torch.device,
        name: str = "",
        classes: bool = True,
    ) -> None:
        for label, data in ((f"{name}x", x), (f"{name}target", target)):
            if not isinstance(data, (Tensor, np.ndarray)):
                raise TypeError(f"{label} must be a tensor or a numpy array, got {type(data).__name__}")
            if (layout := _unusual(data)) is not None:
                raise TypeError(f"{label} must be dense, every value given, got {layout}")
        if not (_is_float(x) or _is_integer(x)):
            raise TypeError(f"{name}x must hold real numbers, got {x.dtype}")
        if not (_is_float(target) or _is_integer(target)):
            raise TypeError(
                f"{name}target must hold class numbers (integer) or desired outputs (floating point), "
                f"got {target.dtype}"
            )
        if x.ndim < 2 or target.ndim < 1:
            raise ValueError(
                f"{name}x must have shape (N, ...), one row per sample, and {name}target (N,) or (N, ...); "
                f"got {tuple(x.shape)} and {tuple(target.shape)}"
            )
        if len(x) != len(target):
            raise ValueError(
                f"{name}x has {len(x)} samples but {name}target has {len(target)}; they must be as many"
            )
        if len(x) == 0 or 0 in x.shape:
            raise ValueError(f"{name}x is empty: its shape is {tuple(x.shape)}")
        self.has_classes = classes and _is_integer(target)
        if self.has_classes and target.ndim != 1:
            raise ValueError(
                f"{name}target of dtype {target.dtype} means class numbers, which have shape (N,), "
                f"got {tuple(target.shape)}; desired outputs must be floating point"
            )
        self.one_hot: int | None = None
        self.output_shape: list[int] = []
        self._name = name
        self._dtype = dtype
        self._target_dtype = torch.int64 if self.has_classes else dtype
        self._device = device
        self._x: Array = x if isinstance(x, np.memmap) else self._convert(x, dtype)
        self._target: Array = (
            target if isinstance(target, np.memmap) else self._convert(target, self._target_dtype)
        )
        self._rows: Tensor | None = None
        self.weights: Tensor | None = None
        self._check_values()

    def __len__(self) -> int:
        return len(self._x) if self._rows is None else len(self._rows)

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the inputs and targets of `rows`, int64 row numbers. With these on the data's device the
        host waits for nothing, but a memory map."""
        return self.inputs(rows), self.targets(rows)

    def inputs(self, rows: Tensor) -> Tensor:
        """Copies of the inputs alone."""
        return self._take(self._x, self._own(rows), self._dtype)

    def targets(self, rows: Tensor) -> Tensor:
        """Copies of the targets alone."""
        target = self._take(self._target, self._own(rows), self._target_dtype)
        if self.one_hot is not None:
            target = torch.nn.functional.one_hot(target, self.one_hot).to(self._dtype)
        return target

    def weights_of(self, rows: Tensor) -> Tensor | None:
        """The weights of `rows`, (n,), or None where all count the same."""
        return None if self.weights is None else self._take(self.weights, self._own(rows), self._dtype)

    def dense_tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All inputs and targets (class numbers as they are) and which of their rows count (None: all), or
        None where they are not dense tensors of `dtype` in memory."""
        for part, types in ((self._x, (dtype,)), (self._target, (dtype, torch.int64))):
            if not isinstance(part, Tensor) or not part.is_contiguous() or part.dtype not in types:
                return None
        assert isinstance(self._x, Tensor) and isinstance(self._target, Tensor)
        return self._x, self._target, self._rows

    def blocks(self) -> Iterator[Tensor]:
        """The row numbers of all samples in order, a block at a time."""
        for first in range(0, len(self), BLOCK):
            yield torch.arange(first, min(first + BLOCK, len(self)), device="cpu")

    def to(self, dtype: torch.dtype, device: torch.device) -> Samples:
        """The same samples, cast and moved; these themselves where nothing changes."""
        if (dtype, device) == (self._dtype, self._device):
            return self
        other = copy.copy(self)
        other._dtype, other._device = dtype, device
        other._target_dtype = torch.int64 if self.has_classes else dtype
        if isinstance(self._x, Tensor):
            other._x = _convert(self._x, device, dtype)
        if isinstance(self._target, Tensor):
            other._target = _convert(self._target, device, other._target_dtype)
        other.weights = None if self.weights is None else self.weights.to(device, dtype)
        other._rows = None if self._rows is None else self._rows.to(device)
        return other

    def subset(self, rows: Tensor) -> Samples:
        """Samples of these rows alone, which share the memory of all of them."""
        part = copy.copy(self)
        part._rows = self._own(rows).to(self._device)
        return part

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and of targets that are numbers, as they are handed out."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where they are, as the model."""
        return self._device

    @property
    def shapes(self) -> tuple[list[int], list[int]]:
        """The shapes of inputs and targets, as given."""
        return list(self._x.shape), list(self._target.shape)

    def as_column(self) -> None:
        """Hand out targets of shape (N,) as (N, 1)."""
        self._target = self._target[:, None]

    def largest_class(self) -> int:
        """The largest class number."""
        return int(self._target.max())

    def all_targets(self) -> Tensor:
        """Every target, class numbers as they are."""
        parts = [self._take(self._target, self._own(rows), self._target_dtype) for rows in self.blocks()]
        return torch.cat(parts)

    def fingerprint(self) -> str:
        """A hash of inputs, targets and weights, of 16,384 rows where there are more."""
        rows = torch.linspace(
            0, len(self) - 1, min(len(self), 16384), dtype=torch.float64, device="cpu"
        ).long()
        content = hashlib.sha256()
        for part in torch.split(rows, BLOCK):
            x, target = self.inputs(part), self._take(self._target, self._own(part), self._target_dtype)
            for values in (x, target, self.weights_of(part)):
                if values is not None:
                    content.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16]

    def _own(self, rows: Tensor) -> Tensor:
        return rows if self._rows is None else self._rows.index_select(0, rows.to(self._rows.device))

    def _take(self, data: Array, rows: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(data, Tensor):
            return data.index_select(0, rows.to(data.device))
        return self._convert(data[rows.cpu().numpy()], dtype)

    def _convert(self, data: Array, dtype: torch.dtype) -> Tensor:
        return _convert(data, self._device, dtype)

    def _check_values(self) -> None:
        if isinstance(self._x, Tensor) and isinstance(self._target, Tensor):
            # All at once where all is in memory; what is wrong is then looked for by blocks.
            numbered = not self.has_classes or bool(self._target.min() >= 0)
            if numbered and _C.all_finite([self._x, self._target]):
                return
        for rows in self.blocks():
            x, target = self[rows]
            _check_finite(f"{self._name}x", x, int(rows[0]))
            if not self.has_classes:
                _check_finite(f"{self._name}target", target, int(rows[0]))
            elif int(target.min()) < 0:
                row = int(rows[0]) + int(target.argmin())
                raise ValueError(
                    f"{self._name}target[{row}] is {int(target.min())}; classes are numbered from 0"
                )


def _unusual(data: Array) -> str | None:
    """What keeps data from being read value by value: a layout, or values that are masked out."""
    if isinstance(data, np.ma.MaskedArray):
        return "a masked array with masked values" if np.ma.is_masked(data) else None
    if not isinstance(data, Tensor):
        return None
    if data.is_nested:
        return "a nested tensor"
    if data.layout != torch.strided:
        return f"a tensor of layout {data.layout}"
    if isinstance(data, torch.masked.MaskedTensor):
        return "a MaskedTensor"
    return f"a tensor on the device {data.device}, which has no values" if data.is_meta else None


def to_storage(data: Array, device: torch.device, dtype: torch.dtype) -> Array:
    """`data` as Samples of this device and dtype store it, for several of them to share."""
    if not isinstance(data, (Tensor, np.ndarray)) or isinstance(data, np.memmap):
        return data  # of the wrong type, or read where it is
    if _unusual(data) is not None or not (_is_float(data) or _is_integer(data)):
        return data
    return _convert(data, device, dtype if _is_float(data) else torch.int64)


def _convert(data: Array, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(data, Tensor):
        # torch takes neither foreign byte order nor negative strides, and warns of read-only memory.
        data = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))
        data = torch.from_numpy(data if data.flags.writeable else data.copy())
    # resolve_neg: a view of negated memory reads wrong where pointers are taken.
    return data.detach().to(device, dtype).resolve_neg()


def _check_finite(name: str, data: Tensor, first_row: int) -> None:
    if not _C.all_finite([data]):
        place = (~data.isfinite()).nonzero()[0].tolist()
        value = data[tuple(place)].item()
        place[0] += first_row
        raise ValueError(f"{name}{place} is {value}; training needs finite numbers")


def _is_float(data: Array) -> bool:
    if isinstance(data, Tensor):
        return data.is_floating_point()
    return bool(data.dtype.kind == "f" and data.dtype.itemsize <= 8)


def _is_integer(data: Array) -> bool:
    if isinstance(data, Tensor):
        return not data.is_floating_point() and not data.is_complex()
    return bool(data.dtype.kind in "iub")
