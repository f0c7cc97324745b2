"""The estimators inside what scikit-learn builds of estimators, and saved, copied and loaded."""

import copy
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import VotingClassifier
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_common import KINDS, data, estimator, fitted, ours

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
QUICK = {"hidden_layer_sizes": 8, "max_iter": 30, "learning_rate_init": 0.02, "random_state": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_of_a_frame(kind):
    """A frame goes through as pandas' and its columns' names are known, and missed where they are others."""
    X, y = data(kind)
    X = pd.DataFrame(X, columns=list("abcdef"))
    model = make_pipeline(StandardScaler(), estimator(ours, kind, **QUICK)).set_output(transform="pandas")
    model.fit(X, y)
    assert list(model[-1].feature_names_in_) == list("abcdef")
    assert model.score(X, y) > 0.4
    with pytest.raises(ValueError, match="feature names"):
        model[-1].predict(X.rename(columns={"a": "z"}))


@pytest.mark.parametrize(
    "kind, n_jobs", [("regression", 1), pytest.param("multiclass", 2, marks=pytest.mark.launch)]
)
def test_grid_search(kind, n_jobs):
    X, y = data(kind)
    grid = {"activation": ["relu", "gelu", "maxout"], "alpha": [1e-4, 1e-1]}
    search = GridSearchCV(estimator(ours, kind, **QUICK), grid, n_jobs=n_jobs, cv=2).fit(X, y)
    assert len(search.cv_results_["params"]) == 6 and search.best_score_ > 0.4
    alone = clone(search.best_estimator_).fit(X, y)
    assert all(map(np.array_equal, alone.coefs_, search.best_estimator_.coefs_))


@pytest.mark.parametrize("kind", KINDS)
def test_cross_val_score(kind):
    X, y = data(kind)
    assert cross_val_score(estimator(ours, kind, **QUICK), X, y, cv=3).mean() > 0.2


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_calibration_and_voting(kind):
    X, y = data(kind)
    model = estimator(ours, kind, **QUICK)
    for outer in (CalibratedClassifierCV(model, cv=2), VotingClassifier([("mlp", model)], voting="soft")):
        proba = outer.fit(X, y).predict_proba(X)
        np.testing.assert_allclose(proba.sum(1), 1)
        assert outer.score(X, y) > 0.6


def test_permutation_importance():
    """A feature that is noise is worth nothing, the one that is y is worth the most."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 3))
    model = fitted(ours, "regression", X, 3 * X[:, 1] + X[:, 0], **QUICK)
    worth = permutation_importance(model, X, 3 * X[:, 1] + X[:, 0], random_state=0).importances_mean
    assert worth[1] > worth[0] > worth[2] and abs(worth[2]) < 0.1


def by_joblib(model, folder, mmap_mode=None):
    joblib.dump(model, folder / "model")
    return joblib.load(folder / "model", mmap_mode=mmap_mode)


COPIES = {
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "joblib": by_joblib,
    "joblib, read-only arrays": lambda model, folder: by_joblib(model, folder, "r"),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_a_copy_goes_on_as_the_original(solver, kind, how, tmp_path):
    """It predicts the same bits, and so does what partial_fit makes of it; the original stays as it is."""
    X, y = data(kind)
    model = fitted(ours, kind, X, y, solver=solver, activation="maxout", **QUICK)
    before = model.predict(X)
    other = COPIES[how](model, tmp_path)
    assert np.array_equal(other.predict(X), before)
    other.partial_fit(X, y)
    assert np.array_equal(model.predict(X), before)
    model.partial_fit(X, y)
    for own, copied in zip(model.coefs_, other.coefs_, strict=True):
        assert np.array_equal(own, copied)


def everything_in(value):
    """The values of a nest of lists, dicts and objects."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from everything_in(each)
    elif isinstance(value, dict):
        yield from everything_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from everything_in(vars(value))
    else:
        yield value


def test_the_state_is_numpy_arrays_and_plain_values():
    """No tensor and no module is in it, so that a safe format can take it."""
    X, y = data("multilabel")
    model = fitted(ours, "multilabel", X, y, solver="adam", **QUICK)
    kinds = {type(value) for value in everything_in(vars(model))}
    assert kinds <= {np.ndarray, np.float64, np.int64, float, int, bool, str, type(None)}
    assert sum(array.size for array in everything_in(model._optimizer) if isinstance(array, np.ndarray)) == (
        2 * sum(array.size for array in model.coefs_ + model.intercepts_) + 4  # two moments, four step counts
    )


def test_results_repeat_and_leave_the_random_generators_alone():
    X, y = data("binary")
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    one, two = (
        fitted(ours, "binary", X, y, dropout=0.3, batch_size=16, max_iter=5, random_state=7) for _ in range(2)
    )
    assert all(map(np.array_equal, one.coefs_, two.coefs_))
    assert (torch.rand(1), np.random.rand()) == expected


def test_no_random_state_takes_numpys_global_one():
    X, y = data("binary")
    models = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        models.append(fitted(ours, "binary", X, y, batch_size=16, max_iter=3))
    one, same, other = (model.coefs_[0] for model in models)
    assert np.array_equal(one, same) and not np.array_equal(one, other)
