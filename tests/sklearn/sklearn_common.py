"""The same network, data and options in scikit-learn's class and in ours."""

import warnings

import numpy as np
import sklearn.neural_network as theirs
from sklearn.datasets import make_classification, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning

import mlpext.sklearn as ours

KINDS = ("binary", "multiclass", "multilabel", "regression", "regression of 3")


def data(kind, samples=90, features=6, seed=0, dtype=np.float64):
    """X (samples, features), y."""
    if kind == "multilabel":
        X, y = make_multilabel_classification(samples, features, n_classes=4, random_state=seed)
        X = X / 10
    elif kind.startswith("regression"):
        targets = 3 if kind.endswith("3") else 1
        X, y = make_regression(samples, features, n_targets=targets, noise=5, random_state=seed)
        y = y / y.std()
    else:
        classes = 2 if kind == "binary" else 3
        X, y = make_classification(
            samples,
            features,
            n_informative=4,
            n_redundant=0,
            n_classes=classes,
            random_state=seed,
            flip_y=0.1,
        )
    return X.astype(dtype), y


def estimator(package, kind, **options):
    name = "MLPRegressor" if kind.startswith("regression") else "MLPClassifier"
    return getattr(package, name)(**options)


def fitted(package, kind, X, y, sample_weight=None, **options):
    """An estimator of `ours` or `theirs` after fit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator(package, kind, **options).fit(X, y, sample_weight=sample_weight)


def both(kind, X, y, sample_weight=None, **options):
    """Ours and scikit-learn's, fitted."""
    return tuple(fitted(package, kind, X, y, sample_weight, **options) for package in (ours, theirs))
