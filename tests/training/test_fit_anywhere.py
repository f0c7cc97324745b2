"""`fit` gives the same numbers whatever is set around it, takes every container that holds plain numbers, and
refuses the others by name; numbers may be NumPy's or tensors of no dimension."""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch import nn

from mlpext.functional import linear_activation
from mlpext.nn import MLP, LinearActivation, Maxout
from mlpext.training import evaluate, fit
from mlpext.training.history import History


def network():
    torch.manual_seed(1)
    return MLP([6, 7, 6], "tanh", device="cpu", dtype=torch.float32)


def data(count=50):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, (2 * x).sin()


def train(model, x, d, **options):
    return fit(model, x, d, **{"seed": 0, "epochs": 2, "progress": False, **options})


# What the caller has set


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in no_grad": lambda: _both(torch.no_grad(), torch.autocast("cpu", torch.bfloat16)),
    "default device": lambda: default_device("meta"),
    "with device": lambda: torch.device("meta"),
    "default dtype": lambda: default_dtype(torch.float64),
}


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
@pytest.mark.parametrize("name", AROUND)
def test_what_is_set_around_it_makes_no_difference(name, optimizer, engine):
    """no_grad made the loop raise, autocast made the engines differ, a default device broke index tensors."""
    options = {"engine": engine, "optimizer": optimizer, "validation": 0.2, "early_stopping": 5}
    (x, d), expected, model = data(), network(), network()
    before = train(expected, x, d, **options)
    with AROUND[name]():
        history = train(model, x, d, **options)
        measured = evaluate(model, x, d)
    if "device" not in name:
        assert history["loss"] == before["loss"] and history["val_r2"] == before["val_r2"]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    # A default device is a mode of torch, in which modules take torch's own operators: to rounding.
    for column in ("loss", "val_loss", "r2", "val_r2"):
        assert history[column] == pytest.approx(before[column], rel=1e-5)
    assert measured == pytest.approx(evaluate(expected, x, d), rel=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_data_made_in_inference_mode(engine):
    with torch.inference_mode():
        x, d = data()
    assert train(network(), x, d, engine=engine)["loss"] == train(network(), *data(), engine=engine)["loss"]


@pytest.mark.parametrize("engine", ["native", "autograd"])
def test_a_model_made_in_inference_mode_is_refused(engine):
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match="inference_mode"):
        train(model, *data(), engine=engine)


def test_a_model_sees_gradients_on_and_autocast_off():
    seen = set()

    class Looks(nn.Linear):
        def forward(self, x):
            seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.empty(0).device.type))
            return super().forward(x)

    model, (x, d) = Looks(6, 6), data()
    with torch.no_grad(), torch.autocast("cpu"), torch.device("meta"):
        train(model, x, d)
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (False, True)
    assert seen == {
        (True, False, "cpu"),
        (False, False, "cpu"),
    }  # without gradients: to learn the outputs' shape


# Containers


def masked(values, cells=()):
    mask = np.zeros(values.shape, bool)
    for cell in cells:
        mask[cell] = True
    return np.ma.MaskedArray(values.numpy(), mask=mask)


@pytest.mark.parametrize("where", ["x", "target"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: masked(v, [(3, 2)]), "a masked array with masked values"),
        (lambda v: v.to_sparse(), r"a tensor of layout torch\.sparse_coo"),
        (lambda v: v.to_sparse_csr(), r"a tensor of layout torch\.sparse_csr"),
        (lambda v: v.to_sparse_csc(), r"a tensor of layout torch\.sparse_csc"),
        (lambda v: v.to_sparse_bsr((2, 2)), r"a tensor of layout torch\.sparse_bsr"),
        (lambda v: v.to_mkldnn(), r"a tensor of layout torch\._mkldnn"),
        (lambda v: torch.nested.nested_tensor(list(v)), "a nested tensor"),
        (lambda v: torch.nested.nested_tensor(list(v), layout=torch.jagged), "a nested tensor"),
        (lambda v: torch.masked.masked_tensor(v, v > 0), "a MaskedTensor"),
        (lambda v: v.to("meta"), "a tensor on the device meta"),
    ],
    ids=["masked", "coo", "csr", "csc", "bsr", "mkldnn", "nested", "jagged", "masked tensor", "meta"],
)
@pytest.mark.filterwarnings("ignore")
def test_containers_with_values_missing_are_refused(make, message, where):
    (x, d), model = data(), network()
    with pytest.raises(TypeError, match=f"{where} must be dense.* got {message}"):
        train(model, *((make(x), d) if where == "x" else (x, make(d))))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))


@pytest.mark.parametrize("engine", ["native", "autograd"])
@pytest.mark.parametrize(
    "make",
    [
        masked,
        lambda v: v.numpy()[::-1].copy()[::-1],
        lambda v: np.asfortranarray(v.numpy()),
        lambda v: v.numpy().astype(">f4"),
        lambda v: torch._neg_view(-v),
        lambda v: torch.complex(v, -v).conj().imag,
        lambda v: v.t().contiguous().t(),
        lambda v: nn.Parameter(v),
    ],
    ids=["unmasked", "reversed", "fortran", "big endian", "negated", "imag", "transposed", "parameter"],
)
def test_containers_of_plain_numbers(make, engine):
    """A view of negated memory was trained with the other sign by the native engine."""
    x, d = data()
    expected = train(network(), x, d, engine=engine)
    assert train(network(), make(x), make(d), engine=engine)["loss"] == expected["loss"]


# Numbers of NumPy's


def test_numbers_may_be_numpys_or_tensors(tmp_path):
    expected = train(network(), *data(), lr=0.5, momentum=0.25, batch_size=16, seed=3)
    for integer, number in ((np.int64, np.float32), (np.uint8, np.float64), (torch.tensor, torch.tensor)):
        history = train(
            network(),
            *data(),
            lr=number(0.5),
            momentum=number(0.25),
            batch_size=integer(16),
            epochs=integer(2),
            seed=integer(3),
            checkpoint=tmp_path / "checkpoint",
            log_dir=tmp_path,
        )
        assert history["loss"] == expected["loss"] and history.config == expected.config
        history.to_json(tmp_path / "history.json")
        assert History.load(tmp_path / "history.json").config == json.loads(json.dumps(expected.config))


def test_a_fraction_and_a_patience_of_numpys():
    options = {"validation": np.float32(0.25), "early_stopping": np.int32(2)}
    history = train(network(), *data(), **options)
    assert history.config["validation_samples"] == 12 and history.config["early_stopping"] == 2


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [torch.ones(2), np.ones(1), "0.1", True, np.True_, 1j])
def test_what_is_no_number(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        train(network(), *data(), **{name: value})


@pytest.mark.parametrize("answer", [True, "stop", np.True_])
def test_a_callback_stops_with_numpys_true(answer):
    assert len(train(network(), *data(), epochs=9, callbacks=[lambda epoch: answer])) == 1


@pytest.mark.parametrize("answer", [None, False, np.False_, "go on", 1, torch.ones(3)])
def test_any_other_answer_goes_on(answer):
    assert len(train(network(), *data(), callbacks=[lambda epoch: answer])) == 2


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor])
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor])
def test_sizes_and_parameters_may_be_numpys_or_tensors(integer, number):
    """torch.nn takes them; a module keeps plain numbers, so that repr, copies and files are the same."""
    torch.manual_seed(1)
    expected = MLP([6, 7, 4], ["elu"], alpha=0.5), Maxout(6, 4, pieces=3), LinearActivation(6, 4, "sine")
    torch.manual_seed(1)
    modules = (
        MLP([integer(6), integer(7), integer(4)], ["elu"], alpha=number(0.5)),
        Maxout(integer(6), integer(4), pieces=integer(3)),
        LinearActivation(integer(6), integer(4), "sine", omega=number(1)),
    )
    x = torch.randn(5, 6)
    for ours, theirs in zip(modules, expected, strict=True):
        assert repr(ours) == repr(theirs) or isinstance(ours, LinearActivation)
        assert torch.equal(ours(x), theirs(x))
    assert type(modules[0][0].in_features) is int and type(modules[0][0].params["alpha"]) is float
    given = linear_activation(x, modules[2].weight, None, "elu", alpha=number(0.5))
    assert torch.equal(given, linear_activation(x, modules[2].weight, None, "elu", alpha=0.5))
    json.dumps(train(modules[0], x, torch.randn(5, 4)).config)


@pytest.mark.parametrize("size", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), "2", None])
def test_what_is_no_size(size):
    for make in (
        lambda: MLP([size, 3]),
        lambda: MLP([3, size]),
        lambda: LinearActivation(3, size),
        lambda: Maxout(3, 2, size),
    ):
        with pytest.raises(TypeError, match="expected an integer, got"):
            make()


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "0.5", None, 1j])
def test_what_is_no_parameter(value):
    with pytest.raises(TypeError, match="alpha: expected a number, got"):
        LinearActivation(3, 2, "elu", alpha=value)
