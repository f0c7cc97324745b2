"""scikit-learn's multilayer perceptrons, trained by `mlpext.training.fit`.

    from mlpext.sklearn import MLPClassifier

    classifier = MLPClassifier((64, 32), "gelu", max_iter=50, random_state=0).fit(X, y)

Needs scikit-learn, `pip install mlpext[sklearn]`. docs/scikit-learn.md says what is as there, what not.
"""

from mlpext.sklearn._estimators import MLPClassifier, MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
