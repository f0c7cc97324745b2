"""Schedules, metrics by name, callbacks, tables and labels as `fit` takes them. Weights, l2, clipping and
dropout are held against NumPy's in the random fits."""

import csv
import importlib.util

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
import torch
from torch import nn
from torch.optim import lr_scheduler

from fit_helpers import classes, network, numbers, same_weights, train
from mlpext.nn import MLP
from mlpext.training import CSV, TensorBoard, evaluate
from mlpext.training._fit import Context, fit_beside
from mlpext.training._schedule import Schedule

X, LABELS = classes()


def step_lr(optimizer):
    return lr_scheduler.StepLR(optimizer, 2, 0.1)


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_a_resumed_schedule_goes_on_where_it_was(tmp_path, engine):
    """The learning rates of epochs 4 to 6 were those of a schedule that began anew."""
    options = {"schedule": step_lr, "lr": 0.1, "engine": engine}
    whole, part, resumed = network(), network(), network(seed=2)
    expected = train(whole, X, LABELS, epochs=6, **options)
    train(part, X, LABELS, epochs=3, checkpoint=tmp_path, **options)
    history = train(resumed, X, LABELS, epochs=6, checkpoint=tmp_path, resume=True, **options)
    assert history["lr"] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert history["lr"] == expected["lr"] and history["loss"] == expected["loss"]
    assert same_weights(whole, resumed)


SCHEDULES = {
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 5]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.2),
    "cosine": "cosine",
    "linear": "linear",
    "plateau": "plateau",
}


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_resumes(tmp_path, name, optimizer):
    """Each is interrupted by its callback after three of seven epochs."""

    def stop(epoch):
        return epoch.epoch == 3

    options = {"schedule": SCHEDULES[name], "optimizer": optimizer, "epochs": 7}
    whole, part, resumed = network(), network(), network(seed=2)
    expected = train(whole, X, LABELS, **options)
    train(part, X, LABELS, checkpoint=tmp_path, callbacks=[stop], **options)
    history = train(resumed, X, LABELS, checkpoint=tmp_path, resume=True, **options)
    assert history["lr"] == expected["lr"] and len({*history["lr"]}) > (name != "plateau")
    assert same_weights(whole, resumed)


def test_a_schedule_is_torchs_own():
    """The learning rates are those of a loop with torch's scheduler."""
    for name, make in SCHEDULES.items():
        if isinstance(make, str):
            continue
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.05)
        scheduler, rates = make(optimizer), []
        history = train(network(), X, LABELS, schedule=make, epochs=7, validation=0.2)
        for loss in history["val_loss"]:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(*([loss] if name == "ReduceLROnPlateau" else []))
        assert history["lr"] == pytest.approx(rates), name


def test_schedules_by_name_go_from_lr_to_nothing():
    assert train(network(), X, LABELS, lr=0.1, schedule="linear", epochs=4)["lr"] == pytest.approx(
        [0.1, 0.08125, 0.0625, 0.04375]
    )
    assert train(network(), X, LABELS, lr=0.1, schedule="cosine", epochs=4)["lr"][2] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="schedule must be one of cosine, linear, plateau"):
        Schedule("cosinus", torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), 3)


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_an_inner_callback_sets_the_learning_rate(engine):
    """Context.after_epoch: without a look at all layers after each epoch."""

    def halve(epoch, run):
        run.state.optimizer.lr /= 2
        return epoch.epoch == 3

    options = {"lr": 0.1, "seed": 0, "epochs": 9, "engine": engine, "progress": False}
    inner = network()
    history = fit_beside(Context(after_epoch=halve), inner, X, LABELS, options)
    assert history["lr"] == [0.1, 0.05, 0.025]
    scheduled = network()
    train(
        scheduled, X, LABELS, schedule=lambda o: lr_scheduler.ExponentialLR(o, 0.5), **options | {"epochs": 3}
    )
    assert same_weights(inner, scheduled)


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_metrics_by_name_are_scikit_learns(engine):
    """Of validation data, which the final weights give again; and of training, without a move."""
    model = network()
    names = ["accuracy", "f1", "balanced_accuracy"]
    options = {"metrics": names, "validation": (X, LABELS), "engine": engine, "loss": "cross_entropy"}
    history = train(model, X, LABELS, epochs=1, lr=0.0, **options)
    taken = model(X).argmax(1)
    expected = [
        sklearn.metrics.accuracy_score(LABELS, taken),
        sklearn.metrics.f1_score(LABELS, taken, average="macro"),
        sklearn.metrics.balanced_accuracy_score(LABELS, taken),
    ]
    for name, value in zip(names, expected, strict=True):
        assert history[name] == history[f"val_{name}"] == [pytest.approx(value)]
    assert evaluate(model, X, LABELS, loss="cross_entropy", metrics=names)["f1"] == history["f1"][0]


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_metrics_of_numbers_are_scikit_learns(engine):
    x, d = numbers()
    model = network()
    history = train(model, x, d, epochs=1, lr=0.0, metrics=("r2", "mae", "mse"), engine=engine)
    y = model(x).detach()
    assert history["r2"] == [pytest.approx(sklearn.metrics.r2_score(d, y), abs=1e-6)]
    assert history["mae"] == [pytest.approx(sklearn.metrics.mean_absolute_error(d, y))]
    assert history["mse"] == [pytest.approx(sklearn.metrics.mean_squared_error(d, y))]


def test_metrics_of_one_logit_and_of_labels():
    x, bits = X, (LABELS > 0).int()
    model = network((6, 5, 1))
    options = {"loss": "binary_cross_entropy", "lr": 0.0, "epochs": 1}
    history = train(model, x, bits, metrics=["accuracy", "f1"], **options)
    taken = model(x)[:, 0] > 0
    assert history["accuracy"] == [pytest.approx(sklearn.metrics.accuracy_score(bits, taken))]
    assert history["f1"] == [pytest.approx(sklearn.metrics.f1_score(bits, taken, average="macro"))]
    labels = torch.stack([LABELS == 0, LABELS == 1, LABELS > 0], 1).int()
    model = network()
    expected = sklearn.metrics.accuracy_score(labels, model(x) > 0)
    assert train(model, x, labels, **options)["accuracy"] == [pytest.approx(expected)]
    with pytest.raises(ValueError, match="f1 takes one class a sample"):
        train(model, x, labels, metrics=["f1"], **options)


class Largest:
    """As torchmetrics' objects are: the largest output so far."""

    def reset(self):
        self.value = -torch.inf

    def update(self, outputs, targets):
        assert outputs.shape[0] == targets.shape[0]
        self.value = max(self.value, outputs.max().item())

    def compute(self):
        return torch.tensor(self.value)


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_an_object_as_a_metric(engine):
    model = network()
    metrics = {"largest": Largest(), "accuracy": "accuracy"}
    history = train(
        model, X, LABELS, epochs=2, lr=0.0, metrics=metrics, validation=(X, LABELS), engine=engine
    )
    largest = model(X).max().item()
    assert history["largest"] == history["val_largest"] == [pytest.approx(largest)] * 2
    assert history.columns[3:5] == ["largest", "accuracy"]


def test_callbacks_of_one_and_of_three_arguments():
    seen = []
    model = network()

    class Method:
        def look(self, epoch, model, optimizer):
            seen.append((epoch.epoch, model, type(optimizer).__name__))

    train(model, X, LABELS, epochs=2, callbacks=[Method().look, lambda epoch, more=3: seen.append(more)])
    assert seen == [(1, model, "GradientDescent"), 3, (2, model, "GradientDescent"), 3]


def test_csv_has_the_columns_of_the_history(tmp_path):
    path = tmp_path / "deep" / "epochs.csv"
    history = train(network(), X, LABELS, callbacks=[CSV(path)], validation=0.2)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == history.columns and len(rows) == 3
    assert [float(row["val_loss"]) for row in rows] == history["val_loss"]


def test_tensorboard_says_what_it_needs(tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ImportError, match="TensorBoard needs the package tensorboard"):
            TensorBoard(tmp_path)
        return
    train(network(), X, LABELS, callbacks=[TensorBoard(tmp_path)])
    assert list(tmp_path.glob("events*"))


NAMES = np.array(["setosa", "versicolor", "virginica"])


@pytest.mark.parametrize(
    "given",
    [
        (X.tolist(), LABELS.tolist()),
        (pd.DataFrame(X.numpy()), pd.Series(LABELS.numpy())),
        (pd.DataFrame(X.numpy()).astype(object), pd.DataFrame({"class": LABELS.numpy()})),
        (X.numpy(), NAMES[LABELS]),
        (pd.DataFrame(X.numpy()), pd.Series(NAMES[LABELS])),
        (X, NAMES[LABELS].tolist()),
        (X.double().numpy()[:, ::-1][:, ::-1], pd.Categorical(NAMES[LABELS])),
    ],
    ids=["lists", "DataFrame", "objects", "text", "Series of text", "list of text", "categories"],
)
def test_tables_and_labels_train_as_tensors_do(given):
    expected, model = network(), network()
    train(expected, X, LABELS, validation=(X, LABELS))
    history = train(model, *given, validation=given)
    assert same_weights(expected, model)
    assert evaluate(model, *given) == evaluate(model, X, LABELS)
    if history.config.get("classes"):
        assert history.config["classes"] == NAMES.tolist()
        few = [number for number, label in enumerate(LABELS) if label != 0][:9]
        first = [NAMES[LABELS[number]] for number in few]  # without the first class
        assert evaluate(model, X[few], first) == evaluate(model, X[few], LABELS[few])


def test_evaluate_takes_the_loss_that_the_model_was_trained_with():
    """It took squared_error after cross_entropy."""
    model = network()
    squared = evaluate(model, X, LABELS)
    assert squared == evaluate(model, X, LABELS, loss="squared_error")
    train(model, X, LABELS, lr=0.0, loss="cross_entropy")
    assert evaluate(model, X, LABELS) == evaluate(model, X, LABELS, loss="cross_entropy") != squared
    train(model, X, LABELS, lr=0.0, loss=nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="loss: the model was trained with a function"):
        evaluate(model, X, LABELS)


def test_integers_are_inputs_too():
    expected, model = network(), network()
    x = (X * 10).round()
    train(expected, x, LABELS)
    train(model, x.int(), LABELS)
    assert same_weights(expected, model)


@pytest.mark.parametrize(
    ("x", "target", "error", "message"),
    [
        (pd.DataFrame({"a": [1, 2], "town": ["Rome", "Oslo"]}), [0, 1], TypeError, "column 'town'.*'Rome'"),
        (pd.DataFrame({"a": [1.0, None]}), [0, 1], ValueError, r"x\[1, 0\] is nan"),
        ([[1.0], [2.0]], [["a", "b"], ["b", "a"]], TypeError, "labels that are all text, shape"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(x, target, error, message):
    with pytest.raises(error, match=message):
        train(MLP([np.shape(x)[1], 2]), x, target)


def test_an_unknown_label_of_the_validation_data_is_named():
    with pytest.raises(ValueError, match=r"validation target\[1\] is 'lily'; the classes are 'setosa'"):
        train(network(), X, NAMES[LABELS], validation=(X[:2], ["setosa", "lily"]))


def test_class_weights_are_sample_weights_by_class():
    weights = torch.tensor([0.5, 2.0, 1.0])
    nets = [network() for _ in range(4)]
    train(nets[0], X, LABELS, sample_weight=weights[LABELS])
    train(nets[1], X, LABELS, class_weight={0: 0.5, 1: 2.0})
    train(nets[2], X, NAMES[LABELS], class_weight={"setosa": 0.5, "versicolor": 2.0})
    train(nets[3], X, LABELS, class_weight=[0.25, 1.0, 0.5], sample_weight=[2.0] * 50)
    assert all(same_weights(nets[0], net) for net in nets[1:])
    balanced, by_hand = network((6, 5, 1)), network((6, 5, 1))
    bits = LABELS == 0
    train(balanced, X, bits, loss="binary_cross_entropy", class_weight="balanced")
    share = bits.double().mean()
    weights = torch.where(bits, 0.5 / share, 0.5 / (1 - share))
    train(by_hand, X, bits.float(), loss="binary_cross_entropy", sample_weight=weights)
    assert same_weights(balanced, by_hand)


def test_weights_need_a_loss_of_each_sample():
    with pytest.raises(ValueError, match=r"one value per sample, shape \(\d+,\), for sample_weight"):
        train(network(), X, LABELS, loss=nn.functional.cross_entropy, sample_weight=[1.0] * 50)


def test_dropout_outside_of_fit_is_torchs():
    model = MLP([6, 8, 7, 3], "tanh", dropout=0.4)
    torch.manual_seed(3)
    y = model(X)
    torch.manual_seed(3)
    hidden = nn.functional.dropout(model[1](nn.functional.dropout(model[0](X), 0.4)), 0.4)
    assert torch.equal(y, model[2](hidden))
    assert torch.equal(model.eval()(X), model[2](model[1](model[0](X))))
    assert "dropout=0.4" in repr(model)
    with pytest.raises(ValueError, match=r"dropout: 1, expected at least 0 and below 1"):
        MLP([6, 3], dropout=1)


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("mode", ["stochastic", "mini-batch", "batch"])
def test_resumed_with_dropout_weights_penalty_and_clipping(tmp_path, engine, optimizer, mode):
    """A run that its callback ends after two of five epochs, and one that nothing disturbs."""

    def make(seed):
        return network((6, 9, 7, 3), seed=seed, dropout=0.4)

    options = {"optimizer": optimizer, "mode": mode, "engine": engine, "epochs": 5, "batch_size": 16}
    options |= {"class_weight": "balanced", "l2": 0.1, "clip_grad_norm": 0.5, "schedule": "cosine"}
    options |= {"loss": "cross_entropy"}
    whole, part, resumed = make(1), make(1), make(2)
    expected = train(whole, X, LABELS, **options)
    stop = {"checkpoint": tmp_path, "callbacks": [lambda epoch: epoch.epoch == 2]}
    train(part, X, LABELS, **options, **stop)
    history = train(resumed, X, LABELS, **options, checkpoint=tmp_path, resume=True)
    assert history["loss"] == expected["loss"] and history["lr"] == expected["lr"]
    assert same_weights(whole, resumed)
    assert not same_weights(whole, part)


@pytest.mark.parametrize("mode", ["stochastic", "mini-batch", "batch"])
@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_a_penalty_where_biases_alone_are_trained_is_none(engine, mode):
    """The PyTorch loop added up no squares at all, an error."""
    with_penalty, without = network(), network()
    for model, l2 in ((with_penalty, 0.5), (without, 0.0)):
        for layer in model:
            layer.weight.requires_grad_(False)
        train(model, X, LABELS, l2=l2, engine=engine, mode=mode)
    assert not same_weights(with_penalty, network())
    for got, expected in zip(with_penalty.parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
