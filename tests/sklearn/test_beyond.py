"""What the estimators take that scikit-learn's do not, modules, and what they refuse."""

import re
import warnings

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import NotFittedError

import mlpext
from mlpext.sklearn import MLPClassifier, MLPRegressor
from sklearn_common import KINDS, data, estimator, fitted, ours, theirs

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def sizes(model):
    return [array.shape for array in model.coefs_], [array.shape for array in model.intercepts_]


@pytest.mark.parametrize("activation", [*mlpext.activations(), "logistic", "maxout"])
def test_every_activation_learns(activation):
    """E falls by a tenth or more, and `module_` gives what predict says."""
    X, y = data("multiclass")
    model = fitted(ours, "multiclass", X, y, activation=activation, max_iter=60, learning_rate_init=0.01)
    assert model.loss_curve_[-1] < 0.9 * model.loss_curve_[0]
    logits = model.module_(torch.from_numpy(X)).detach()
    np.testing.assert_allclose(model.predict_proba(X), logits.softmax(1).numpy(), rtol=1e-9)
    assert np.array_equal(model.predict(X), model.classes_[logits.argmax(1)])


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_maxout(pieces):
    """Hidden arrays have the pieces first, drawn in a row; the last layer is a plain one."""
    X, y = data("multiclass")
    model = fitted(
        ours, "multiclass", X, y, hidden_layer_sizes=(5, 4), activation="maxout", pieces=pieces,
        max_iter=1, learning_rate_init=1e-300, random_state=3,
    )  # fmt: skip
    assert sizes(model) == ([(pieces, 6, 5), (pieces, 5, 4), (4, 3)], [(pieces, 5), (pieces, 4), (3,)])
    bound = np.sqrt(6 / 11)
    drawn = np.random.RandomState(3).uniform(-bound, bound, (pieces, 6, 5))
    assert np.array_equal(model.coefs_[0], drawn)
    by_hand = X
    for W, b in zip(model.coefs_[:-1], model.intercepts_[:-1], strict=True):
        by_hand = (by_hand @ W + b[:, None]).max(0)
    logits = by_hand @ model.coefs_[-1] + model.intercepts_[-1]
    np.testing.assert_allclose(
        np.log(model.predict_proba(X)), logits - np.logaddexp.reduce(logits, 1)[:, None]
    )


@pytest.mark.parametrize(
    "mode, batch_size, steps", [("stochastic", "auto", 90), ("mini-batch", 40, 3), ("batch", 7, 1)]
)
def test_mode_says_how_many_samples_a_step_has(mode, batch_size, steps):
    X, y = data("binary")
    seen = []
    callbacks = [lambda epoch: seen.append(epoch.updates)]
    fitted(ours, "binary", X, y, mode=mode, batch_size=batch_size, max_iter=2, callbacks=callbacks)
    assert seen == [steps, 2 * steps]


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_class_weight_is_sample_weight_by_label(kind):
    X, y = data(kind)
    names = np.array(["no", "yes", "maybe"])[y]
    weights = {"no": 3.0, "yes": 0.5}  # of another class 1
    options = {"max_iter": 5, "random_state": 0}
    by_label = fitted(ours, kind, X, names, class_weight=weights, **options)
    by_sample = fitted(
        ours, kind, X, names, np.select([names == "no", names == "yes"], [3, 0.5], 1.0), **options
    )
    assert all(map(np.array_equal, by_label.coefs_, by_sample.coefs_))
    balanced = fitted(ours, kind, X, names, class_weight="balanced", **options)
    counts = dict(zip(*np.unique(names, return_counts=True), strict=True))
    own = np.array([len(names) / len(counts) / counts[name] for name in names])
    by_sample = fitted(ours, kind, X, names, own, **options)
    np.testing.assert_allclose(balanced.loss_curve_, by_sample.loss_curve_, rtol=1e-12)
    both = fitted(ours, kind, X, names, own, class_weight=weights, **options)
    assert both.loss_curve_[0] != by_label.loss_curve_[0] != by_sample.loss_curve_[0]


def test_class_weights_of_labels_and_in_partial_fit():
    X, y = data("multilabel")
    even = [{0: 1, 1: 1}] * 4
    plain, weighted = (
        fitted(ours, "multilabel", X, y, class_weight=weight, max_iter=2, random_state=0)
        for weight in (even, [{0: 1, 1: 5}, *even[1:]])
    )
    assert plain.loss_ != weighted.loss_
    X, y = data("binary")
    MLPClassifier(class_weight={0: 2, 1: 1}).partial_fit(X, y, classes=[0, 1])
    with pytest.raises(ValueError, match="class_weight='balanced' needs all samples"):
        MLPClassifier(class_weight="balanced").partial_fit(X, y, classes=[0, 1])


def test_dropout_is_for_training_alone():
    X, y = data("multiclass", samples=300)
    options = {"max_iter": 20, "random_state": 0, "learning_rate_init": 0.01}
    with_it, without = (fitted(ours, "multiclass", X, y, dropout=p, **options) for p in (0.5, 0.0))
    assert with_it.loss_ > without.loss_ and with_it.score(X, y) > 0.6
    assert np.array_equal(with_it.predict_proba(X), with_it.predict_proba(X))
    assert with_it.module_.dropout == 0.5 and not with_it.module_.training


def test_partial_fit_drops_other_units_each_time():
    X, y = data("regression")
    model = MLPRegressor(dropout=0.5, random_state=0, learning_rate_init=1e-300)
    for _ in range(5):
        model.partial_fit(X, y)
    assert len({*model.loss_curve_}) == 5


@pytest.mark.native
@pytest.mark.parametrize("kind", KINDS)
def test_engines_agree(kind):
    X, y = data(kind)
    options = {"batch_size": 32, "max_iter": 5, "random_state": 0, "dropout": 0.2}
    one, other = (fitted(ours, kind, X, y, engine=engine, **options) for engine in ("native", "autograd"))
    np.testing.assert_allclose(one.loss_curve_, other.loss_curve_, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["tanh", "maxout"])
def test_to_a_module_and_back(activation, kind):
    X, y = data(kind)
    model = fitted(
        ours, kind, X, y, activation=activation, hidden_layer_sizes=(9, 4), max_iter=5, dropout=0.1
    )
    module = model.module_
    assert isinstance(module, mlpext.nn.MLP)
    if kind.startswith("regression"):
        back = MLPRegressor.from_module(module)
    else:
        back = MLPClassifier.from_module(module, model.classes_, multilabel=kind == "multilabel")
    assert np.array_equal(back.predict(X), model.predict(X))
    for name in ("hidden_layer_sizes", "activation", "dropout", "n_features_in_", "n_layers_", "n_outputs_"):
        assert getattr(back, name) == getattr(model, name), name
    assert back.out_activation_ == model.out_activation_
    before = [array.copy() for array in model.coefs_]
    back.partial_fit(X, y)  # which neither the module nor the first estimator sees
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(map(np.array_equal, model.coefs_, before))
    assert not np.array_equal(back.coefs_[0], before[0]) and back.n_iter_ == 1


def test_from_module_names_classes_from_0_and_goes_on_training():
    torch.manual_seed(0)
    for outputs, count in ((1, 2), (2, 2), (3, 3)):
        model = MLPClassifier.from_module(mlpext.nn.MLP([6, outputs]))
        assert model.classes_.tolist() == list(range(count)) and model.hidden_layer_sizes == ()
        X, y = data("binary" if count == 2 else "multiclass")
        start = model.partial_fit(X, y).loss_
        for _ in range(20):
            model.partial_fit(X, y)
        assert model.loss_ < start


BAD_MODULES = {
    "an activation at the end": mlpext.nn.MLP([6, 4, 3], output_activation="tanh"),
    "no bias": mlpext.nn.MLP([6, 4, 3], bias=False),
    "of several kinds": mlpext.nn.MLP([6, 4, 4, 3], activation=["relu", "tanh"]),
    "pieces of several kinds": mlpext.nn.MLP([6, 4, 4, 3], activation=["maxout", "relu"]),
    "another alpha": mlpext.nn.MLP([6, 4, 3], "elu", alpha=0.5),
    "bfloat16": mlpext.nn.MLP([6, 4, 3], dtype=torch.bfloat16),
    "a gate": mlpext.nn.MLP([6, 6]).append(mlpext.nn.GatedLinear(6, 3, "identity")),
    "a gated network": mlpext.nn.MLP([6, 6]).append(mlpext.nn.GatedMLP(6, 3)),
}


@pytest.mark.parametrize("module", BAD_MODULES.values(), ids=BAD_MODULES)
def test_modules_that_no_estimator_is(module):
    with pytest.raises(ValueError, match="module: "):
        MLPClassifier.from_module(module)
    with pytest.raises(ValueError, match="module: "):
        MLPRegressor.from_module(module)


def test_from_module_refuses():
    with pytest.raises(TypeError, match="mlpext.nn.MLP, got Linear"):
        MLPRegressor.from_module(torch.nn.Linear(6, 3))
    for classes in (["a", "b"], ["b", "a", "c"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="classes: expected 3"):
            MLPClassifier.from_module(mlpext.nn.MLP([6, 3]), classes)


def test_log_probabilities_keep_digits():
    """Where scikit-learn's are -inf: the logarithm is not taken of a probability that has become 0. Two
    outputs of a module become one."""
    module = mlpext.nn.MLP([1, 2], dtype=torch.float32)
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[200.0], [0.0]]))
        module[0].bias.zero_()
    assert MLPClassifier.from_module(module).predict_log_proba([[1.0]]).tolist() == [[0.0, -200.0]]
    binary = mlpext.nn.MLP([1, 1], dtype=torch.float32)
    with torch.no_grad():
        binary[0].weight.fill_(200.0)
        binary[0].bias.zero_()
    assert MLPClassifier.from_module(binary).predict_log_proba([[1.0]]).tolist() == [[-200.0, 0.0]]


REFUSED = [
    ({"solver": "lbfgs"}, "solver='lbfgs': there is no L-BFGS"),
    ({"solver": "newton"}, "'solver' parameter"),
    ({"activation": "swish"}, "'activation' parameter"),
    ({"mode": "online"}, "'mode' parameter"),
    ({"pieces": 0}, "'pieces' parameter"),
    ({"dropout": 1.0}, "'dropout' parameter"),
    ({"dropout": -0.1}, "'dropout' parameter"),
    ({"engine": "jit"}, "'engine' parameter"),
    ({"alpha": -1}, "'alpha' parameter"),
    ({"hidden_layer_sizes": (3, 0)}, r"hidden_layer_sizes must be > 0, got \[3, 0\]"),
    ({"early_stopping": True, "validation_fraction": 0.001}, "validation set is too small"),
]


@pytest.mark.parametrize("options, message", REFUSED)
@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_refused(kind, options, message):
    X, y = data(kind)
    with pytest.raises(ValueError, match=message):
        estimator(ours, kind, **options).fit(X, y)


def test_refused_types():
    X, y = data("binary")
    with pytest.raises(TypeError, match="hidden_layer_sizes"):
        MLPClassifier((3.5,)).fit(X, y)
    with pytest.raises(TypeError, match="callbacks must be functions"):
        MLPClassifier(callbacks=[3]).fit(X, y)
    with pytest.raises(TypeError, match="[Ss]parse"):
        MLPClassifier().fit(sparse.csr_array(X), y)
    model = MLPClassifier(max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match="[Ss]parse"):
        model.predict(sparse.csr_array(X))
    with pytest.raises(NotFittedError):
        MLPClassifier().module_  # noqa: B018


def test_batches_larger_than_the_data_are_clipped_with_a_warning():
    X, y = data("binary")
    with pytest.warns(UserWarning, match="batch_size=91 is clipped to the number of samples, 90") as caught:
        MLPClassifier(batch_size=91, max_iter=9).fit(X, y)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        MLPClassifier(batch_size=90, tol=9, n_iter_no_change=1).fit(X, y)


CASES_OF_CLASSES = {
    "text": np.array(["b", "a", "c"])[np.arange(90) % 3],
    "objects": np.array(["b", "a", "c"], object)[np.arange(90) % 3],
    "negative numbers": np.array([-3, 5, 9])[np.arange(90) % 3],
    "truth": np.arange(90) % 2 == 0,
    "one class": np.full(90, "a"),
    "a column": (np.arange(90) % 3)[:, None],
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataConversionWarning")
@pytest.mark.parametrize("y", CASES_OF_CLASSES.values(), ids=CASES_OF_CLASSES)
def test_labels_of_any_kind(y):
    X, _ = data("binary")
    options = {"max_iter": 5, "batch_size": 90, "random_state": 0, "epsilon": 1e-14}
    mine, other = (fitted(package, "binary", X, y, **options) for package in (ours, theirs))
    assert np.array_equal(mine.classes_, other.classes_)
    assert (
        np.array_equal(mine.predict(X), other.predict(X)) and mine.predict(X).dtype == other.predict(X).dtype
    )
    np.testing.assert_allclose(mine.predict_proba(X), other.predict_proba(X), rtol=1e-6)


def test_warm_start_needs_the_same_classes():
    X, y = data("multiclass")
    model = fitted(ours, "multiclass", X, y, warm_start=True, max_iter=2)
    model.fit(X, y)
    with pytest.raises(ValueError, match=re.escape("Previously got [0 1 2], `y` has [0 1]")):
        model.fit(X, y % 2)
    model.partial_fit(X, y % 2)  # a part of the classes will do
    with pytest.raises(ValueError, match=r"the classes \[7\]"):
        model.partial_fit(X, np.where(y == 1, 7, y))


def test_multilabel_probabilities():
    """Each label has its own, which need not add up to 1; labels that are the inputs' signs are learnt."""
    X = np.random.default_rng(0).normal(size=(300, 3))
    model = fitted(ours, "multilabel", X, (X > 0).astype(int), max_iter=200, learning_rate_init=0.02)
    proba = model.predict_proba(X)
    assert model.score(X, (X > 0).astype(int)) > 0.9 and proba.shape == (300, 3)
    assert np.array_equal(proba > 0.5, model.predict(X)) and np.ptp(proba.sum(1)) > 1
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(proba), rtol=1e-9, atol=1e-14)
