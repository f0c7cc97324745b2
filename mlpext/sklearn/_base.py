"""What the two estimators share: arguments, initial weights, training, and the way from and to modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from mlpext._checks import integer
from mlpext.functional import activations
from mlpext.nn import MLP
from mlpext.sklearn import _arrays
from mlpext.sklearn._arrays import Array
from mlpext.sklearn._rules import Rules, make_optimizer, state_of
from mlpext.training import ENGINES, MODES
from mlpext.training._fit import Context, fit_beside

Self = TypeVar("Self", bound="BaseMLP")

DTYPES = (np.float64, np.float32)
# The words by which scikit-learn's users know it.
DIVERGED = (
    "Solver produced non-finite parameter weights. The input data may contain large values and need to be "
    "preprocessed."
)


class BaseMLP(BaseEstimator):  # type: ignore[misc]
    """A multilayer perceptron with scikit-learn's arguments and attributes."""

    # scikit-learn's own checks: its messages and its types of exception.
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions({*activations(), *_arrays.SYNONYMS, "maxout"})],
        "solver": [StrOptions({"sgd", "adam"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate": [StrOptions({"constant", "invscaling", "adaptive"})],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "power_t": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="both")],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "beta_1": [Interval(Real, 0, 1, closed="left")],
        "beta_2": [Interval(Real, 0, 1, closed="left")],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), Options(Real, {np.inf})],
        "pieces": [Interval(Integral, 1, None, closed="left")],
        "mode": [StrOptions(set(MODES))],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "engine": [StrOptions(set(ENGINES))],
        "callbacks": ["array-like"],
    }

    @property
    def module_(self) -> MLP:
        """The network as an `mlpext.nn.MLP` of its own, in eval() mode. Its outputs are those before softmax
        or the logistic function."""
        check_is_fitted(self)
        module = _arrays.as_module(self.coefs_, self.intercepts_, self.activation, self.dropout)
        return copy.deepcopy(module).eval()

    def _store(self, given: dict[str, Any]) -> None:
        """The arguments of __init__, each in the attribute of its name."""
        for name in self._get_param_names():
            setattr(self, name, given[name])

    def _take(self, module: MLP) -> int:
        """Copies of a module's weights, and the arguments that describe it. Returns the number of outputs."""
        if not isinstance(module, MLP):
            raise TypeError(f"module must be an mlpext.nn.MLP, got {type(module).__name__}")
        self.set_params(**_arrays.arguments(module))
        self._begin(*([array.copy() for array in arrays] for arrays in _arrays.of_module(module)))
        self.n_features_in_ = self.coefs_[0].shape[-2]
        return int(self.n_outputs_)

    def _begin(self, coefs: list[Array], intercepts: list[Array]) -> None:
        """A network that has seen no sample yet."""
        self.coefs_, self.intercepts_ = coefs, intercepts
        self.n_layers_ = len(coefs) + 1
        self.n_outputs_ = coefs[-1].shape[-1]
        self.n_iter_ = self.t_ = 0
        self.loss_curve_: list[float] = []
        self._no_improvement_count = 0
        self._forget_best()

    def _forget_best(self) -> None:
        """No best epoch yet, of that which decides: the score on held-out data, or the loss."""
        self.best_loss_ = None if self.early_stopping else np.inf
        self.validation_scores_: list[float] | None = [] if self.early_stopping else None
        self.best_validation_score_ = -np.inf if self.early_stopping else None

    def _check_parameters(self) -> None:
        if self.solver == "lbfgs":
            raise ValueError(
                "solver='lbfgs': there is no L-BFGS in mlpext.sklearn; take 'adam' or 'sgd', or "
                "scikit-learn's own class"
            )
        self._validate_params()

    def _layer_sizes(self) -> list[int]:
        """Of the hidden layers."""
        given = self.hidden_layer_sizes
        given = given if isinstance(given, Iterable) else [given]
        sizes = [integer("hidden_layer_sizes", size) for size in given]
        if any(size < 1 for size in sizes):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return sizes

    def _fit(self: Self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Self:
        """Train for one epoch, or until the rules say stop. y of `_validate` is (n, outputs)."""
        sizes = self._layer_sizes()
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y = self._validate(X, y, incremental, first)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        random = check_random_state(self.random_state)
        if first:
            sizes = [X.shape[1], *sizes, y.shape[1]]
            self._begin(*_arrays.glorot(random, sizes, self.activation, self.pieces, X.dtype))
        self.out_activation_ = self._output_activation()
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")

        held_out = None
        if self.early_stopping:
            X, y, sample_weight, held_out = self._hold_out(X, y, sample_weight, random)
        if self.early_stopping == (getattr(self, "validation_scores_", None) is None):
            self._forget_best()
        if (class_weights := self._class_weights(y, incremental)) is not None:
            sample_weight = class_weights * (1 if sample_weight is None else sample_weight)
        self._train(X, y, sample_weight, held_out, incremental, int(random.randint(2**31)))
        return self

    def _hold_out(self, X: Array, y: Array, weight: Array | None, random: Any) -> Any:
        """X, y and weights to train on, and the three to score with: the rows that scikit-learn takes."""
        arrays = [X, y] if weight is None else [X, y, weight]
        parts = train_test_split(
            *arrays, random_state=random, test_size=self.validation_fraction, stratify=self._strata(y)
        )
        train, test = ([*parts[k::2], None][:3] for k in (0, 1))
        if len(test[0]) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        return *train, tuple(test)

    def _train(
        self, X: Array, y: Array, sample_weight: Array | None, held_out: Any, incremental: bool, seed: int
    ) -> None:
        module = _arrays.as_module(self.coefs_, self.intercepts_, self.activation, self.dropout)
        self.coefs_, self.intercepts_ = _arrays.of_module(module)  # which are trained in place
        state = getattr(self, "_optimizer", None) if incremental else None
        optimizer = make_optimizer(self, list(module.parameters()), state)
        total_weight = len(X) if sample_weight is None else float(sample_weight.sum())
        rules = Rules(self, len(X), total_weight, held_out)
        mode, batch_size = self._step(len(X))
        options = {
            "mode": mode,
            "batch_size": batch_size,
            "epochs": 1 if incremental else self.max_iter,
            "optimizer": optimizer,
            "shuffle": bool(self.shuffle),
            # Each epoch of partial_fit has an order and dropout masks of its own, whatever random_state is.
            "seed": seed + self.t_,
            "callbacks": self.callbacks,
            "metrics": None if self.callbacks else [],  # which nobody else looks at
            "l2": float(self.alpha),
            "sample_weight": sample_weight,
            "progress": False,
            "engine": self.engine,
        }
        self.n_iter_ = 0
        try:
            loss, target = self._loss_and_target(y)
            fit_beside(Context(after_epoch=rules), module, X, target, {**options, "loss": loss})
        except KeyboardInterrupt:
            warnings.warn("Training interrupted by user.", stacklevel=4)
        except FloatingPointError as error:
            if held_out is None:
                raise ValueError(DIVERGED) from error
            rules.diverged()
        self._optimizer = state_of(optimizer)
        self.coefs_, self.intercepts_ = _arrays.of_module(module) if held_out is None else rules.best
        if not incremental and self.n_iter_ == self.max_iter and not rules.stopped:
            warnings.warn(
                f"max_iter={self.max_iter} epochs are over, and the optimization has not converged yet",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _step(self, samples: int) -> tuple[str, int]:
        """`fit`'s mode and batch_size."""
        size = {"stochastic": 1, "batch": samples}.get(self.mode)
        if size is None and self.batch_size != "auto" and self.batch_size > samples:
            warnings.warn(
                f"batch_size={self.batch_size} is clipped to the number of samples, {samples}",
                stacklevel=5,
            )
        if size is None:
            size = min(200 if self.batch_size == "auto" else self.batch_size, samples)
        return ("batch" if size == samples else "mini-batch"), size

    def _outputs(self, X: Any) -> Tensor:
        """The network's outputs for data as a user gives them."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=DTYPES, reset=False)
        return _arrays.outputs(self.coefs_, self.intercepts_, self.activation, X)

    def _score_held_out(self, X: Array, y: Array, sample_weight: Array | None) -> float:
        outputs = _arrays.outputs(self.coefs_, self.intercepts_, self.activation, X)
        if not bool(outputs.isfinite().all()):
            return np.nan
        return float(self._metric(y, self._predictions(outputs), sample_weight=sample_weight))

    def _loss_divisor(self) -> int:
        """By what E is divided where it is reported."""
        return 1
