"""Every bad argument of `fit` is refused by its name."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fit_helpers import classes, network, numbers
from mlpext.training import evaluate, fit

X, LABELS = classes()
D = numbers()[1]


def nan_at(row, column):
    x = X.clone()
    x[row, column] = math.nan
    return x


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": print}, TypeError, "model must be a torch.nn.Module"),
        ({"model": nn.Flatten(), "target": X}, ValueError, "no parameter that requires a gradient"),
        ({"x": {1, 2}}, TypeError, "x must be a tensor, a numpy array, a DataFrame, .* got set"),
        ({"x": [[1.0, 2.0], [3.0]]}, ValueError, "x: its rows are not of one length"),
        ({"x": X.to(torch.complex64)}, TypeError, "x must hold real numbers, got torch.complex64"),
        ({"x": np.array([["1", "a"]])}, TypeError, r"x\[0, 1\] is .*'a'.*; x must hold numbers"),
        ({"x": X[0]}, ValueError, r"x must have shape \(N, ...\), one row per sample"),
        ({"x": X[:0], "target": LABELS[:0]}, ValueError, r"x is empty: its shape is \(0, 6\)"),
        ({"x": X[:, :0]}, ValueError, r"x is empty: its shape is \(50, 0\)"),
        ({"x": X[:9]}, ValueError, "x has 9 samples but target has 50"),
        ({"x": nan_at(33, 2)}, ValueError, r"x\[33, 2\] is nan; training needs finite numbers"),
        ({"x": X.double() * 1e300}, ValueError, r"x\[0, 0\] is -?inf"),
        ({"target": "labels"}, TypeError, "target must be a tensor, a numpy array, .* got str"),
        ({"target": np.array(["a", 1] * 25, object)}, TypeError, "target must hold labels that are all text"),
        ({"target": LABELS.to(torch.complex64)}, TypeError, "target must hold class numbers"),
        ({"target": D.index_fill(0, torch.tensor(3), math.inf)}, ValueError, r"target\[3, 0\] is inf"),
        ({"target": LABELS[:, None]}, ValueError, r"class numbers, which have shape \(N,\), got \(50, 1\)"),
        ({"target": LABELS + 1}, ValueError, r"class numbers up to 3, which needs 4 outputs .* are \(n, 3\)"),
        ({"target": LABELS - 1}, ValueError, r"target\[\d+\] is -1; classes are numbered from 0"),
        ({"target": D[:, :2]}, ValueError, r"target has shape \(n, 2\), but the model's outputs \(n, 3\)"),
        ({"target": D[:, 0]}, ValueError, r"target has shape \(n,\), but the model's outputs \(n, 3\)"),
        ({"model": nn.Linear(6, 1)}, ValueError, "for one output give target as floating point"),
        ({"model": nn.Flatten(0), "target": X}, ValueError, "one row of outputs per sample"),
        ({"mode": "online"}, ValueError, "mode must be one of stochastic, mini-batch, batch, got 'online'"),
        ({"mode": "minibatch"}, ValueError, "got 'minibatch'; did you mean mini-batch?"),
        ({"loss": "mse"}, ValueError, "got 'mse'; did you mean squared_error?"),
        ({"progress": 1}, TypeError, "progress must be True, False or a tqdm bar, got 1"),
        ({"mode": 1}, ValueError, "mode must be one of .*, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
        ({"lr": math.nan}, ValueError, "lr must be finite and 0 or more, got nan"),
        ({"lr": math.inf}, ValueError, "lr must be finite and 0 or more, got inf"),
        ({"lr": -0.1}, ValueError, "lr must be finite and 0 or more, got -0.1"),
        ({"lr": "0.1"}, TypeError, "lr must be a number, got '0.1'"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, got -1"),
        ({"epochs": None}, TypeError, "epochs must be an integer, got a NoneType"),
        ({"momentum": -1}, ValueError, "momentum must be finite and 0 or more"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite"),
        (
            {"loss": "mse"},
            ValueError,
            "loss must be one of squared_error, .*, or a function .*, got 'mse'",
        ),
        ({"loss": 3}, TypeError, "loss must be a name or a function"),
        (
            {"loss": lambda o, d: o},
            ValueError,
            r"loss must return a tensor of shape \(\) or \(32,\).*got \(32, 3\)",
        ),
        ({"loss": lambda o, d: 1.0}, ValueError, "loss must return a tensor .* got float"),
        (
            {"loss": "cross_entropy", "model": nn.Unflatten(1, (2, 3)), "target": X.view(50, 2, 3)},
            ValueError,
            "classes",
        ),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
        ({"engine": "jax"}, ValueError, "engine must be one of auto, native, autograd, got 'jax'"),
        ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer or a function"),
        ({"optimizer": lambda p: None}, TypeError, "optimizer must return a torch.optim.Optimizer"),
        (
            {"optimizer": torch.optim.Adam(nn.Linear(1, 1).parameters())},
            ValueError,
            "none of the model's parameters",
        ),
        ({"optimizer": torch.optim.Adam, "momentum": 0.9}, ValueError, "belong to the optimizer"),
        (
            {"validation": 1.0},
            ValueError,
            "validation must be .* a fraction between 0 and 1, or None, got 1.0",
        ),
        ({"validation": math.nan}, ValueError, "validation must be"),
        ({"validation": True}, ValueError, "validation must be"),
        ({"validation": (X,)}, ValueError, "validation must be"),
        ({"validation": 1e-6}, ValueError, "validation=1e-06 of 50 samples leaves none"),
        (
            {"validation": (X, LABELS[:3])},
            ValueError,
            "validation x has 50 samples but validation target has 3",
        ),
        ({"validation": (X, LABELS + 9)}, ValueError, "validation target has class numbers up to 11"),
        ({"validation": (nan_at(0, 0), LABELS)}, ValueError, r"validation x\[0, 0\] is nan"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, at most 18446744073709551615, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"early_stopping": 3}, ValueError, "early_stopping watches the validation loss"),
        ({"early_stopping": 0, "validation": 0.2}, ValueError, "early_stopping must be 1 or more"),
        ({"callbacks": ["print"]}, TypeError, r"callbacks must be functions of \(epoch\)"),
        ({"callbacks": [lambda epoch, model: None]}, TypeError, r"callbacks must take \(epoch\)"),
        ({"l2": -1}, ValueError, "l2 must be finite and 0 or more, got -1"),
        ({"clip_grad_norm": 0}, ValueError, "clip_grad_norm must be above 0"),
        ({"clip_grad_norm": "1"}, TypeError, "clip_grad_norm must be a number, got '1'"),
        ({"schedule": "steps"}, ValueError, "schedule must be one of cosine, linear, plateau, or make"),
        ({"schedule": 3}, TypeError, "schedule must be a name, a class .* got int"),
        ({"schedule": torch.optim.lr_scheduler.StepLR}, TypeError, "StepLR cannot be made of the optimizer"),
        ({"schedule": lambda optimizer: 3}, TypeError, "it made a int"),
        ({"sample_weight": [1.0]}, ValueError, r"sample_weight must have shape \(50,\), .* got \(1,\)"),
        ({"sample_weight": -torch.ones(50)}, ValueError, r"sample_weight\[0\] is -1.0; weights are finite"),
        ({"sample_weight": torch.zeros(50)}, ValueError, "sample_weight is 0 for every sample"),
        ({"class_weight": "equal"}, ValueError, "class_weight must be weights or 'balanced', got 'equal'"),
        ({"class_weight": {7: 1.0}}, ValueError, "class_weight: 7 is no class"),
        ({"class_weight": [1.0]}, ValueError, r"class_weight must have shape \(3,\), one number a class"),
        ({"class_weight": "balanced", "target": D}, ValueError, "class_weight needs class numbers"),
        ({"metrics": ["f2"]}, ValueError, "metrics must be among accuracy, .*, got 'f2'"),
        ({"metrics": ["f1", "f1"]}, ValueError, "has a name twice"),
        ({"metrics": ["mse"]}, ValueError, "mse needs numbers of the outputs' shape"),
        ({"metrics": [3]}, TypeError, "metrics must be names, or objects with update, compute and reset"),
        ({"loss": "binary_cross_entropy", "target": D * 9}, ValueError, r"target\[.*\] is .*; binary_cross"),
        ({"loss": "binary_cross_entropy"}, ValueError, r"target has shape \(n,\), but the model's outputs"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint"),
        ({"device": "nowhere"}, RuntimeError, "nowhere"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"model": network(), "x": X, "target": LABELS, "progress": False, **changes}
    with pytest.raises(error, match=message):
        fit(**arguments)


def test_evaluate_checks_as_fit_does():
    with pytest.raises(ValueError, match="loss must be one of"):
        evaluate(network(), X, LABELS, loss="mse")
    with pytest.raises(ValueError, match="x has 9 samples"):
        evaluate(network(), X[:9], LABELS)
