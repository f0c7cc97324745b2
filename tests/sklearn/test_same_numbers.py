"""Loss curves, weights and predictions beside scikit-learn's, where both take the samples in one order.

They do without shuffling, and where a step takes all samples. scikit-learn adds Adam's epsilon to sqrt(v)
before the correction of v, torch after it: updates differ by about epsilon / |gradient|, which is why epsilon
is 1e-14 here, but where it is what is tested.
"""

import numpy as np
import pytest
import torch

from mlpext.training import fit
from sklearn_common import KINDS, both, data, fitted, ours, theirs

TOLERANCE = 1e-5
OF_ALL = {"batch_size": 90}
SOLVERS = {
    "sgd": {"solver": "sgd", "momentum": 0, "learning_rate_init": 0.1},
    "momentum": {"solver": "sgd", "nesterovs_momentum": False, "learning_rate_init": 0.02},
    "nesterov": {"solver": "sgd", "learning_rate_init": 0.02},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1, "power_t": 0.3},
    "adaptive": {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "learning_rate_init": 0.1,
        "tol": 0.005,
        "n_iter_no_change": 2,
    },
    "adam": {"solver": "adam", "learning_rate_init": 0.01, "epsilon": 1e-14},
}


def assert_same(mine, other, tolerance=TOLERANCE):
    assert mine.n_iter_ == other.n_iter_ and mine.t_ == other.t_
    np.testing.assert_allclose(mine.loss_curve_, other.loss_curve_, rtol=tolerance, atol=tolerance)
    assert mine.best_loss_ == pytest.approx(other.best_loss_, tolerance, tolerance)
    for name in ("coefs_", "intercepts_"):
        for own, reference in zip(getattr(mine, name), getattr(other, name), strict=True):
            np.testing.assert_allclose(own, reference, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic", "identity"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_full_batch(solver, kind, activation):
    X, y = data(kind)
    options = {**OF_ALL, **SOLVERS[solver], "alpha": 0.5, "max_iter": 30, "random_state": 1}
    assert_same(*both(kind, X, y, hidden_layer_sizes=(7, 5), activation=activation, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_unshuffled_mini_batches(solver, kind):
    """90 samples in steps of 40, 40 and 10. Of several targets the reported penalty is interpolated between
    the epochs, so that alpha is small there."""
    X, y = data(kind)
    options = {**SOLVERS[solver], "max_iter": 15, "random_state": 1, "batch_size": 40, "shuffle": False}
    assert_same(*both(kind, X, y, alpha=1e-4 if kind.endswith("3") else 0.5, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_weights(kind):
    X, y = data(kind)
    weight = np.random.default_rng(0).integers(0, 4, len(X)).astype(float)
    options = {"alpha": 0.5, "max_iter": 20, "random_state": 0, "epsilon": 1e-14}
    assert_same(*both(kind, X, y, weight, **OF_ALL, **options))
    options |= {"batch_size": 45, "shuffle": False, "alpha": 1e-4}
    assert_same(*both(kind, X, y, weight, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    X, y = data(kind, dtype=np.float32)
    mine, other = both(kind, X, y, **OF_ALL, **SOLVERS["nesterov"], max_iter=20, random_state=0)
    assert {array.dtype for array in mine.coefs_ + mine.intercepts_} == {np.dtype("float32")}
    assert_same(mine, other, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adams_epsilon(kind):
    X, y = data(kind)
    mine, other = both(kind, X, y, **OF_ALL, max_iter=50, random_state=1)
    np.testing.assert_allclose(mine.loss_curve_, other.loss_curve_, rtol=TOLERANCE, atol=TOLERANCE)


def random_case(seed):
    rng = np.random.default_rng(seed)
    samples = int(rng.choice([2, 3, 9, 17, 33, 90, 201]))
    kind = str(rng.choice(KINDS)) if samples > 30 else str(rng.choice(KINDS[2:]))
    options = {
        "hidden_layer_sizes": rng.choice([1, 3, 7, 8, 9, 15, 16, 17], rng.integers(0, 4)).tolist(),
        "activation": str(rng.choice(["relu", "tanh", "logistic", "identity"])),
        "solver": str(rng.choice(["sgd", "adam"])),
        "alpha": float(rng.choice([0, 1e-4, 1.0])) if not kind.endswith("3") else 1e-6,
        "batch_size": int(min(samples, rng.choice([1, 7, 8, 9, 64]))),
        "learning_rate": str(rng.choice(["constant", "invscaling", "adaptive"])),
        "learning_rate_init": float(rng.choice([1e-4, 1e-3])),
        "power_t": float(rng.choice([0.1, 0.5])),
        "max_iter": int(rng.integers(1, 12)),
        "shuffle": False,
        "tol": float(rng.choice([0, 1e-4, 0.05])),
        "momentum": float(rng.choice([0, 0.5, 0.9])),
        "nesterovs_momentum": bool(rng.integers(2)),
        "beta_1": float(rng.choice([0, 0.9])),
        "beta_2": float(rng.choice([0.9, 0.999])),
        "n_iter_no_change": int(rng.integers(1, 4)),
        "epsilon": 1e-14,
        "random_state": seed,
    }
    features = int(rng.choice([5, 8, 17]))
    return kind, *data(kind, samples, features, seed), options


@pytest.mark.parametrize("seed", range(40))
def test_random_options(seed):
    kind, X, y, options = random_case(seed)
    assert_same(*both(kind, X, y, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_first_weights_are_the_same_numbers(kind):
    X, y = data(kind)
    for activation in ("relu", "logistic"):
        options = {"max_iter": 1, "random_state": 3, "learning_rate_init": 1e-300, "activation": activation}
        mine, other = both(kind, X, y, **options)
        for own, reference in zip(mine.coefs_, other.coefs_, strict=True):
            assert np.array_equal(own, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained, given", [(ours, theirs), (theirs, ours)])
def test_weights_copied_into_the_other_class(trained, given, kind):
    """They score the same, and give the same outputs."""
    X, y = data(kind, samples=300)
    first = fitted(trained, kind, X, y, max_iter=10, random_state=0)
    second = fitted(given, kind, X, y, max_iter=1, random_state=1)
    second.coefs_, second.intercepts_ = first.coefs_, first.intercepts_
    assert second.score(X, y) == pytest.approx(first.score(X, y), abs=1e-5)
    method = "predict" if kind.startswith("regression") else "predict_proba"
    np.testing.assert_allclose(getattr(second, method)(X), getattr(first, method)(X), rtol=1e-9, atol=1e-12)


def test_shuffled_steps_agree_as_a_sample_of_runs():
    """The order is another than scikit-learn's, so that loss curves agree but for what the order makes."""
    X, y = data("multiclass", samples=400)
    runs = [both("multiclass", X, y, max_iter=20, batch_size=20, random_state=seed) for seed in range(4)]
    mine, other = (np.mean([run.loss_curve_ for run in of_one], axis=0) for of_one in zip(*runs, strict=True))
    np.testing.assert_allclose(mine, other, rtol=0.01)


def test_it_is_fit_that_trains():
    """The weights of `mlpext.training.fit` called by hand."""
    X, y = data("multiclass")
    own = {"solver": "sgd", "momentum": 0, "random_state": 0}
    start = fitted(ours, "multiclass", X, y, max_iter=1, learning_rate_init=1e-300, **own).module_
    own |= {"shuffle": False, "batch_size": 30, "alpha": 0.1, "learning_rate_init": 0.1}
    mine = fitted(ours, "multiclass", X, y, max_iter=5, **own)
    options = {"batch_size": 30, "lr": 0.1, "epochs": 5, "l2": 0.1, "shuffle": False, "progress": False}
    fit(start, X, y, loss="cross_entropy", **options)
    for own, reference in zip(mine.module_.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-12, atol=1e-12)
