"""Accuracy and R2, of `evaluate` and of a run's epochs."""

import pytest
import torch
from sklearn.metrics import r2_score
from torch.nn import functional as F

from fit_helpers import classes, network, numbers, train
from mlpext import _C
from mlpext.training import evaluate


def test_metrics_of_classes():
    x, labels = classes(120)
    model = network()
    history = train(model, x, labels, validation=(x[:30], labels[:30]))
    measured = evaluate(model, x[:30], labels[:30])
    output = model(x[:30]).detach()
    assert measured["accuracy"] == (output.argmax(1) == labels[:30]).double().mean()
    assert measured["loss"] == pytest.approx(
        0.5 * (F.one_hot(labels[:30], 3) - output).square().sum(1).mean().item()
    )
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (measured["loss"], measured["accuracy"])


def test_training_metrics_are_those_that_the_steps_met():
    x, labels = classes(3000)
    model = network()
    before = evaluate(model, x, labels)
    history = train(model, x, labels, mode="batch", epochs=1)
    assert (
        history["loss"][0] == pytest.approx(before["loss"]) and history["accuracy"][0] == before["accuracy"]
    )


@pytest.mark.parametrize("outputs", [1, 3])
def test_r2_is_scikit_learns(outputs):
    x, d = numbers(2000, outputs=outputs)
    d = d * 1e-3 + 100
    model = network((6, 5, outputs), dtype=torch.float64)
    expected = r2_score(d.double(), model(x.double()).detach())
    assert evaluate(model, x, d)["r2"] == pytest.approx(expected, rel=1e-9)


def test_r2_of_a_constant():
    x, d = torch.zeros(4, 6), torch.ones(4, 3)
    model = network()
    assert evaluate(model, x, d)["r2"] == 0
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(1)
    assert evaluate(model, x, d)["r2"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [None, torch.tensor([4, 0, 4, 2])])
def test_sums_over_rows_are_torchs(dtype, order):
    all_d, labels = torch.randn(5, 3).to(dtype), torch.tensor([0, 2, 1, 1, 0])
    output = torch.randn(5 if order is None else 4, 3).to(dtype)
    d, own = (all_d, labels) if order is None else (all_d[order], labels[order])
    errors = (d.double() - output.double()).square().sum(0)
    assert torch.allclose(_C.squared_errors(output, all_d, order), errors, rtol=1e-12)
    for target in (labels, F.one_hot(labels, 3).to(dtype)):
        assert _C.count_correct(output, target, order) == (output.argmax(1) == own).sum()


def test_mismatched_rows_are_torchs_error():
    output, d = torch.randn(4, 3), torch.randn(4, 2)
    for target, order in ((d, None), (torch.randn(5, 3), None), (d, torch.tensor([0]))):
        with pytest.raises(RuntimeError):
            _C.squared_errors(output, target, order)


def test_ties_nan_and_labels_beyond_the_outputs():
    output = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, torch.nan], [2.0, 1.0]])
    for label, correct in ((0, 1), (1, 0)):
        assert _C.count_correct(output[:1], torch.tensor([label]), None) == correct
    assert _C.count_correct(output, torch.tensor([0, 1, 0, 255]), None) == 1
