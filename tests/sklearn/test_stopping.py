"""When training ends, what it records until then, and what it prints: beside scikit-learn's."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from sklearn_common import KINDS, both, data, estimator, fitted, ours, theirs

FULL = {"batch_size": 1000, "solver": "sgd", "learning_rate_init": 0.1, "random_state": 0}
ENDINGS = {
    "max_iter": {"max_iter": 7},
    "no improvement": {"tol": 0.02, "n_iter_no_change": 3},
    "never": {"tol": 1e9, "n_iter_no_change": np.inf, "max_iter": 12},
    "adaptive": {"tol": 0.02, "n_iter_no_change": 2, "learning_rate": "adaptive", "max_iter": 400},
    "as good as before": {
        "shuffle": False,
        "tol": 0,
        "learning_rate_init": 1e-300,
        "n_iter_no_change": 2,
        "max_iter": 9,
    },
    "invscaling": {"tol": 1e-3, "n_iter_no_change": 2, "learning_rate": "invscaling"},
    "held out": {"early_stopping": True, "n_iter_no_change": 3, "tol": 0.01, "max_iter": 100},
    "held out, adaptive": {
        "early_stopping": True,
        "n_iter_no_change": 2,
        "tol": 0.01,
        "learning_rate": "adaptive",
        "max_iter": 400,
        "validation_fraction": 0.3,
    },
}
ATTRIBUTES = ("n_iter_", "t_", "loss_", "best_loss_", "best_validation_score_", "n_layers_", "n_outputs_")


@pytest.mark.filterwarnings("ignore:batch_size", "ignore:Got `batch_size`")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_as_scikit_learn(ending, kind, capsys):
    """The same epochs, records, and words on stdout."""
    X, y = data(kind, samples=120)
    written = []
    for package in (ours, theirs):
        model = fitted(package, kind, X, y, verbose=True, **{**FULL, **ENDINGS[ending]})
        written.append((model, capsys.readouterr().out))
    (mine, own_words), (other, words) = written
    assert own_words == words and "Iteration 1, loss = " in words
    for name in ATTRIBUTES:
        value = getattr(other, name)
        assert getattr(mine, name) == (value if value is None else pytest.approx(value, rel=1e-9)), name
    assert mine.out_activation_ == other.out_activation_
    for name in ("loss_curve_", "validation_scores_"):
        if getattr(other, name) is None:
            assert getattr(mine, name) is None
        else:
            np.testing.assert_allclose(getattr(mine, name), getattr(other, name), rtol=1e-9)
    for own, reference in zip(mine.coefs_, other.coefs_, strict=True):  # of the best epoch, held out
        np.testing.assert_allclose(own, reference, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_samples_count_in_the_held_out_score(kind):
    X, y = data(kind, samples=120)
    weight = np.random.default_rng(0).integers(1, 5, len(X)).astype(float)
    options = {"early_stopping": True, "batch_size": 108, "max_iter": 8, "random_state": 0, "solver": "sgd"}
    mine, other = both(kind, X, y, weight, **options)
    np.testing.assert_allclose(mine.validation_scores_, other.validation_scores_, rtol=1e-9)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_it_says_when_max_iter_ends_it(kind):
    X, y = data(kind)
    with pytest.warns(ConvergenceWarning, match="max_iter=3 epochs") as caught:
        estimator(ours, kind, max_iter=3).fit(X, y)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator(ours, kind, max_iter=3).partial_fit(
            X, y, **({"classes": [0, 1]} if kind == "binary" else {})
        )
        estimator(ours, kind, tol=1e9, n_iter_no_change=1).fit(X, y)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learning_rate", ["constant", "invscaling", "adaptive"])
def test_warm_start(learning_rate, kind):
    """A second fit goes on from the weights, t_ and records of the first, with a new optimizer."""
    X, y = data(kind)
    options = {**FULL, "batch_size": 90, "learning_rate": learning_rate, "warm_start": True, "max_iter": 4}
    mine, other = (estimator(package, kind, **options) for package in (ours, theirs))
    for model in (mine, other):
        for _ in range(3):
            assert model.fit(X, y).n_iter_ == 4
    np.testing.assert_allclose(mine.loss_curve_, other.loss_curve_, rtol=1e-9)
    assert len(mine.loss_curve_) == 12 and mine.t_ == other.t_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_warm_start_leaves_the_best_weights_of_all_fits(kind):
    """(scikit-learn's, from the second fit on, leaves those of the last epoch.)"""
    X, y = data(kind, samples=120)
    model = estimator(ours, kind, **{**FULL, "batch_size": 84, "learning_rate_init": 0.5, "max_iter": 4})
    model.set_params(warm_start=True, early_stopping=True, validation_fraction=0.3)
    scores = []
    for _ in range(4):
        model.fit(X, y)
        # The weights whose score is the best are the weights with which the next fit begins.
        scores.append((model.best_validation_score_, [array.copy() for array in model.coefs_]))
    for (score, coefs), (next_score, next_coefs) in pairwise(scores):
        if next_score == score:
            assert all(map(np.array_equal, coefs, next_coefs))
        assert next_score >= score
    assert len({score for score, _ in scores}) < 4, "the case is of no use: every fit found better weights"


def test_warm_start_may_turn_to_early_stopping():
    X, y = data("binary")
    model = fitted(ours, "binary", X, y, warm_start=True, max_iter=2)
    with pytest.warns(ConvergenceWarning):
        model.set_params(early_stopping=True).fit(X, y)
    assert len(model.validation_scores_) == 2 and model.best_loss_ is None


def test_partial_fit_keeps_the_solvers_state():
    """Calls of partial_fit over all samples are the epochs of fit, also where the rate changes, which scales
    the velocity in torch's form."""
    X, y = data("regression")
    for options in (
        {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1},
        {
            "solver": "sgd",
            "learning_rate": "adaptive",
            "learning_rate_init": 0.1,
            "tol": 9,
            "n_iter_no_change": 1,
        },
        {"solver": "adam"},
    ):
        options |= {"batch_size": len(X), "random_state": 0}
        at_once = fitted(ours, "regression", X, y, max_iter=6, **options)
        in_parts = estimator(ours, "regression", **options)
        for _ in range(6):
            in_parts.partial_fit(X, y)
        np.testing.assert_allclose(in_parts.loss_curve_, at_once.loss_curve_, rtol=1e-12)
        other = estimator(theirs, "regression", **options)
        for _ in range(6):
            other.partial_fit(X, y)
        np.testing.assert_allclose(in_parts.loss_curve_, other.loss_curve_, rtol=1e-5)


def test_partial_fit_shuffles_anew():
    """Its orders are not all the same one, though random_state is."""
    X, y = data("regression")
    curves = set()
    for calls in range(2):
        model = fitted(ours, "regression", X, y, random_state=0, max_iter=1, batch_size=8)
        start = [array.copy() for array in model.coefs_]
        for _ in range(calls + 1):
            model.coefs_ = [array.copy() for array in start]
            model.intercepts_ = [0 * array for array in model.intercepts_]
            del model._optimizer
            model.partial_fit(X, y)
        curves.add(model.loss_)
    assert len(curves) == 2


@pytest.mark.filterwarnings("ignore:overflow")
def test_divergence():
    """With held-out data the best weights stay; without, scikit-learn's error."""
    X, y = data("regression")
    options = {"solver": "sgd", "learning_rate_init": 1e3, "activation": "identity", "random_state": 0}
    model = fitted(ours, "regression", X, y, early_stopping=True, **options)
    assert math.isnan(model.loss_) and math.isnan(model.validation_scores_[-1])
    assert all(np.isfinite(array).all() for array in model.coefs_)
    assert model.n_iter_ == len(model.loss_curve_) < 20
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        fitted(ours, "regression", X, y, **options)


def test_interrupt_keeps_the_epochs_so_far():
    X, y = data("binary")

    def interrupt(epoch):
        if epoch.epoch == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted by user"):
        model = estimator(ours, "binary", callbacks=[interrupt]).fit(X, y)
    assert len(model.loss_curve_) == 2 and model.predict(X).shape == (90,)


def test_callbacks_stop():
    X, y = data("binary")
    seen = []

    def stop(epoch, model, optimizer):
        seen.append((epoch.loss, epoch.lr, type(model).__name__, type(optimizer).__name__))
        return epoch.epoch == 3

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = estimator(ours, "binary", callbacks=[stop]).fit(X, y)
    assert model.n_iter_ == 3 and [loss for loss, *_ in seen] == model.loss_curve_
    assert seen[0][1:] == (0.001, "MLP", "Adam")


def test_partial_fit_after_early_stopping():
    X, y = data("binary")
    model = fitted(ours, "binary", X, y, early_stopping=True, max_iter=2)
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping"):
        model.partial_fit(X, y)
    model.set_params(early_stopping=False).partial_fit(X, y)
    assert model.best_loss_ == model.loss_curve_[-1] and len(model.loss_curve_) == 3
