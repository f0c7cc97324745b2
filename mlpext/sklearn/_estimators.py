"""`MLPClassifier` and `MLPRegressor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d, compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
from sklearn.utils.validation import validate_data
from torch import Tensor
from torch.nn.functional import logsigmoid

from mlpext.nn import MLP
from mlpext.sklearn._arrays import Array
from mlpext.sklearn._base import DTYPES, BaseMLP

C = TypeVar("C", bound="MLPClassifier")
R = TypeVar("R", bound="MLPRegressor")


class MLPClassifier(ClassifierMixin, BaseMLP):  # type: ignore[misc]
    """scikit-learn's MLPClassifier, trained by `mlpext.training.fit`.

    X is dense, (n, features), float32 or float64 (anything else becomes float64), and gives the dtype of the
    weights. y is (n,), labels of any kind, or (n, labels) of 0 and 1, several labels a sample. Two classes
    have one logistic output, more have softmax; each of several labels has a logistic output of its own.

    Arguments and attributes that scikit-learn's class has too mean what they mean there, but that there is no
    solver "lbfgs" and that X is never sparse. docs/scikit-learn.md tells where numbers differ. Beyond it:

    Args:
        activation: also any of `mlpext.activations()`, and "maxout".
        mode: "stochastic" takes steps of one sample, "mini-batch" of `batch_size`, "batch" of all.
        pieces: of each maxout unit; a hidden layer's `coefs_[i]` is (pieces, n_in, n_out) there,
            `intercepts_[i]` (pieces, n_out).
        dropout: the share of the hidden units that a step leaves out.
        class_weight: by class label, or "balanced", n / (classes * count of the class); times sample_weight.
            Several labels: a list of these, one for each.
        engine: "auto", "native" or "autograd", as in `fit`.
        callbacks: functions of the `Epoch`, or of (epoch, model, optimizer); True or "stop" ends training.

    Raises:
        ValueError: an argument out of range, named; no class given to the first partial_fit; weights that
            training made infinite or NaN.
        TypeError: X is sparse.

    >>> X, y = torch.randn(100, 4).numpy(), torch.arange(100).numpy() % 3
    >>> mlpext.sklearn.MLPClassifier(8, "gelu", max_iter=5, tol=9).fit(X, y).predict_proba(X).shape
    (100, 3)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseMLP._parameter_constraints,
        "class_weight": [StrOptions({"balanced"}), dict, list, None],
    }

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
        tol: float = 1e-4,
        verbose: bool | int = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        mode: str = "mini-batch",
        pieces: int = 2,
        dropout: float = 0.0,
        class_weight: dict[Any, float] | str | list[Any] | None = None,
        engine: str = "auto",
        callbacks: Sequence[Callable[..., object]] = (),
    ) -> None:
        self._store(locals())

    def fit(self: C, X: Any, y: Any, sample_weight: Any = None) -> C:
        """Train until the loss, or with early_stopping the accuracy, ceases to improve.

        sample_weight: (n,), 0 or more each; a step minimises the weighted mean of E.
        """
        self._check_parameters()
        return self._fit(X, y, sample_weight, incremental=False)

    def partial_fit(self: C, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> C:
        """Train for one epoch over these samples; the first call needs all `classes` that there will be."""
        self._check_parameters()
        if _check_partial_fit_first_call(self, classes):
            several = type_of_target(y).startswith("multilabel")
            self._label_binarizer = LabelBinarizer().fit(y if several else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Array:
        """The class of each sample, (n,), or its labels as 0 and 1, (n, labels)."""
        return self._predictions(self._outputs(X))

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class in the order of `classes_`, or of each label: (n, classes)."""
        p = self._probabilities(self._outputs(X))
        return (p if self.n_outputs_ > 1 else torch.cat([1 - p, p], 1)).numpy()

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of the probabilities, finite also where these round to 0."""
        outputs = self._outputs(X)
        if self.out_activation_ == "softmax":
            return outputs.log_softmax(1).numpy()
        return logsigmoid(outputs if self.n_outputs_ > 1 else torch.cat([-outputs, outputs], 1)).numpy()

    @classmethod
    def from_module(
        cls: type[C], module: MLP, classes: Sequence[Any] | None = None, *, multilabel: bool = False
    ) -> C:
        """A classifier with copies of the weights of an `mlpext.nn.MLP` on the CPU, ready to predict or to be
        trained on by partial_fit.

        Args:
            module: from features to one output a class, one output for two classes, or one a label. Its
                hidden layers are of one kind, with its usual parameters. Two outputs, of two classes, become
                one, their difference.
            classes: the labels in the order of the outputs, sorted; None: 0, 1, ...
            multilabel: the outputs stand for labels, of which a sample may have several.

        Raises:
            TypeError, ValueError: a module that no estimator describes, or not as many classes as it has.

        >>> classifier = mlpext.sklearn.MLPClassifier.from_module(mlpext.nn.MLP([4, 8, 3]), ["a", "b", "c"])
        >>> classifier.predict([[0, 0, 0, 0]]).shape
        (1,)
        """
        self = cls()
        outputs = self._take(module)
        if outputs == 2 and not multilabel:
            # Softmax of two is the logistic function of their difference, which is what an estimator has.
            self.coefs_[-1], self.intercepts_[-1] = np.diff(self.coefs_[-1]), np.diff(self.intercepts_[-1])
            self.n_outputs_ = outputs = 1
        count = 2 if outputs == 1 else outputs
        labels = np.arange(count) if classes is None else np.asarray(classes)
        self._label_binarizer = LabelBinarizer().fit(np.eye(outputs, dtype=int) if multilabel else labels)
        self.classes_ = self._label_binarizer.classes_
        if len(labels) != count or not np.array_equal(self.classes_, labels):
            raise ValueError(
                f"classes: expected {count} different labels in order for {outputs} outputs, got {classes}"
            )
        self.out_activation_ = self._output_activation()
        return self

    def _validate(self, X: Any, y: Any, incremental: bool, first: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, multi_output=True, dtype=DTYPES, reset=first)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
        else:
            classes = unique_labels(y)
            if self.warm_start and not incremental and set(classes) != set(self.classes_):
                raise ValueError(
                    "warm_start can only be used where `y` has the same classes as in the previous call to "
                    f"fit. Previously got {self.classes_}, `y` has {classes}"
                )
            if len(unknown := np.setdiff1d(classes, self.classes_)):
                raise ValueError(f"y has the classes {unknown}, which are none of classes_, {self.classes_}")
        return X, self._label_binarizer.transform(y).astype(bool)

    def _output_activation(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _loss_and_target(self, y: Array) -> tuple[str, Array]:
        if self.out_activation_ == "softmax":
            return "cross_entropy", y.argmax(1)
        return "binary_cross_entropy", y.astype(self.coefs_[0].dtype)

    def _strata(self, y: Array) -> Array | None:
        return y if self.n_outputs_ == 1 else None  # as scikit-learn: two classes alone

    def _labels(self, y: Array) -> Array:
        """Of indicators or probabilities (n, outputs)."""
        labels: Array = self._label_binarizer.inverse_transform(y.ravel() if self.n_outputs_ == 1 else y)
        return labels

    def _class_weights(self, y: Array, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return None
        if incremental and self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all samples, and partial_fit sees a part of them: give a "
                "dict, as of sklearn.utils.compute_class_weight"
            )
        weights: Array = compute_sample_weight(self.class_weight, self._labels(y))
        return weights

    def _probabilities(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(1) if self.out_activation_ == "softmax" else outputs.sigmoid()

    def _predictions(self, outputs: Tensor) -> Array:
        return self._labels(self._probabilities(outputs).numpy())

    def _metric(self, y: Array, predicted: Array, sample_weight: Array | None) -> float:
        return float(accuracy_score(self._labels(y), predicted, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, BaseMLP):  # type: ignore[misc]
    """scikit-learn's MLPRegressor, trained by `mlpext.training.fit`.

    X is dense, (n, features), float32 or float64 (anything else becomes float64), and gives the dtype of the
    weights; y is (n,), or (n, targets). A step minimises half the squared error, summed over a sample's
    targets; as in scikit-learn, `loss_` has their mean instead.

    The arguments, beyond scikit-learn's and `MLPClassifier`'s, are as there; loss has one value here.

    Raises:
        ValueError: an argument out of range, named; weights that training made infinite or NaN.
        TypeError: X is sparse.

    >>> X = torch.randn(100, 4).numpy()
    >>> mlpext.sklearn.MLPRegressor(hidden_layer_sizes=8, max_iter=5, tol=9).fit(X, X @ X[0]).predict(X).shape
    (100,)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **BaseMLP._parameter_constraints,
        "loss": [StrOptions({"squared_error"})],
    }

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: int | np.random.RandomState | None = None,
        tol: float = 1e-4,
        verbose: bool | int = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        mode: str = "mini-batch",
        pieces: int = 2,
        dropout: float = 0.0,
        engine: str = "auto",
        callbacks: Sequence[Callable[..., object]] = (),
    ) -> None:
        self._store(locals())

    def fit(self: R, X: Any, y: Any, sample_weight: Any = None) -> R:
        """Train until the loss, or with early_stopping R2, ceases to improve.

        sample_weight: (n,), 0 or more each; a step minimises the weighted mean of E.
        """
        self._check_parameters()
        return self._fit(X, y, sample_weight, incremental=False)

    def partial_fit(self: R, X: Any, y: Any, sample_weight: Any = None) -> R:
        """Train for one epoch over these samples."""
        self._check_parameters()
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Array:
        """The targets of each sample, (n,) or (n, targets)."""
        return self._predictions(self._outputs(X))

    @classmethod
    def from_module(cls: type[R], module: MLP) -> R:
        """A regressor with copies of the weights of an `mlpext.nn.MLP` on the CPU, from features to targets,
        ready to predict or to be trained on by partial_fit. Its hidden layers are of one kind, with its usual
        parameters.

        Raises:
            TypeError, ValueError: a module that no estimator describes.

        >>> regressor = mlpext.sklearn.MLPRegressor.from_module(mlpext.nn.MLP([4, 8, 1]))
        >>> regressor.predict([[0, 0, 0, 0], [1, 1, 1, 1]]).shape
        (2,)
        """
        self = cls()
        self._take(module)
        self.out_activation_ = self._output_activation()
        return self

    def _validate(self, X: Any, y: Any, incremental: bool, first: bool) -> tuple[Array, Array]:
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=DTYPES, reset=first)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, y.reshape(len(y), -1)

    def _output_activation(self) -> str:
        return "identity"

    def _loss_and_target(self, y: Array) -> tuple[str, Array]:
        return "squared_error", y.astype(self.coefs_[0].dtype)

    def _loss_divisor(self) -> int:
        return int(self.n_outputs_)

    def _strata(self, y: Array) -> None:
        return None

    def _class_weights(self, y: Array, incremental: bool) -> None:
        return None

    def _predictions(self, outputs: Tensor) -> Array:
        values = outputs.numpy()
        return values.ravel() if self.n_outputs_ == 1 else values

    def _metric(self, y: Array, predicted: Array, sample_weight: Array | None) -> float:
        return float(r2_score(y, predicted, sample_weight=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
