"""scikit-learn's checks of an estimator: all of them pass, none is expected to fail."""

from unittest import SkipTest

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from mlpext.sklearn import MLPClassifier, MLPRegressor

# Those that ask for what scikit-learn's own classes do not have either, or for an environment variable.
NOT_FOR_US = {
    "check_array_api_input": "SCIPY_ARRAY_API is not set",
    "check_classifiers_multilabel_output_format_decision_function": "does not have a decision_function",
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([MLPClassifier(max_iter=100), MLPRegressor(max_iter=100)])
def test_check(estimator, check):
    try:
        check(estimator)
    except SkipTest as reason:
        assert NOT_FOR_US.get(check.func.__name__, "no reason") in str(reason)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [
        MLPClassifier((9, 5), "maxout", max_iter=100, pieces=3, learning_rate_init=0.01),
        MLPRegressor("squared_error", (9,), "gelu", max_iter=100, learning_rate_init=0.02),
    ]
)
def test_check_of_other_options(estimator, check):
    test_check(estimator, check)
