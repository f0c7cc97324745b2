"""What x and target may be: every kind of array, class numbers and desired outputs, memory maps."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fit_helpers import classes, network, numbers, same_weights, train
from mlpext.training._samples import Samples, to_storage


def test_class_numbers_are_one_hot_d():
    x, labels = classes()
    numbered, one_hot = network(), network()
    train(numbered, x, labels)
    train(one_hot, x, F.one_hot(labels, 3).float())
    assert same_weights(numbered, one_hot)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_integer_dtypes_number_classes(dtype):
    x, labels = classes()
    labels = labels % 2
    expected, model = network(), network()
    train(expected, x, labels)
    train(model, x, labels.to(dtype))
    assert same_weights(model, expected)


def test_cross_entropy_of_classes_and_of_probabilities():
    x, labels = classes()
    by_number, by_probability, by_callable = network(), network(), network()
    first = train(by_number, x, labels, loss="cross_entropy")
    second = train(by_probability, x, F.one_hot(labels, 3).float(), loss="cross_entropy")
    third = train(by_callable, x, labels, loss=nn.CrossEntropyLoss())
    for history in (second, third):
        assert history["loss"] == pytest.approx(first["loss"])
        assert history["accuracy"] == first["accuracy"]


def test_a_loss_of_ones_own_per_sample_or_mean():
    x, d = numbers()
    builtin, each, mean = network(), network(), network()
    train(builtin, x, d, mode="batch")
    train(each, x, d, mode="batch", loss=lambda o, d: 0.5 * (d - o).square().sum(1))
    train(mean, x, d, mode="batch", loss=lambda o, d: 0.5 * (d - o).square().sum(1).mean())
    for other in (each, mean):
        for a, b in zip(builtin.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_one_output_takes_a_plain_column():
    x, d = numbers(outputs=1)
    flat, column = network((6, 5, 1)), network((6, 5, 1))
    train(flat, x, d[:, 0])
    train(column, x, d)
    assert same_weights(flat, column)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.float64),
        lambda x: x.numpy().astype(">f4"),
        lambda x: x.numpy()[::-1].copy()[::-1],
        lambda x: np.lib.stride_tricks.as_strided(x.numpy(), x.shape, writeable=False),
        lambda x: x.double(),
        lambda x: x.t().contiguous().t(),
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["numpy", "float64", "big-endian", "reversed", "read-only", "double", "strided", "requires-grad"],
)
def test_arrays_and_tensors_of_any_kind(convert):
    x, d = numbers()
    expected, model = network(), network()
    train(expected, x, d)
    train(model, convert(x), convert(d))
    assert same_weights(model, expected)


def test_memory_mapped_arrays_are_read_in_blocks(tmp_path):
    x, d = numbers(3000)
    for name, data in (("x", x), ("d", d)):
        data.numpy().astype(np.float64).tofile(tmp_path / name)

    class Watched(np.memmap):
        largest = 0

        def __getitem__(self, index):
            part = super().__getitem__(index)
            Watched.largest = max(Watched.largest, len(part) if part.ndim == self.ndim else 0)
            return part

    expected, model = network(), network()
    mapped = [
        Watched(tmp_path / name, np.float64, "r", shape=tuple(data.shape))
        for name, data in (("x", x), ("d", d))
    ]
    options = {"validation": 0.1, "epochs": 2}
    history = train(expected, x, d, **options)
    assert train(model, *mapped, **options)["val_loss"] == history["val_loss"]
    assert same_weights(model, expected)
    assert 0 < Watched.largest <= 1024


def test_the_inputs_are_left_as_they_are():
    x, d = numbers()
    kept = x.clone(), d.clone()
    train(network(), x, d)
    assert torch.equal(x, kept[0]) and torch.equal(d, kept[1])


@pytest.mark.parametrize("kind", ["float64", "int32", ">f4", "bool"])
def test_data_are_held_once_for_several(kind):
    device = torch.device("cpu")
    x, d = np.ones((7, 3)), np.ones((7, 2)[: 1 if kind in ("int32", "bool") else 2]).astype(kind)
    stored = [to_storage(data, device, torch.float32) for data in (x, d)]
    samples = Samples(*stored, dtype=torch.float32, device=device)
    assert [part.data_ptr() for part in samples.dense_tensors(torch.float32)[:2]] == [
        s.data_ptr() for s in stored
    ]
    assert to_storage([1.0], device, torch.float32) == [1.0]  # for fit to refuse
