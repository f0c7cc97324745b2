"""One epoch in C++ with weights, l2, dropout and a bounded gradient, against NumPy in float64."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from epoch_reference import ACTIVATIONS, Layer, compare, native_epoch
from fit_reference import mask, philox
from mlpext import _C
from mlpext.training import LOSSES
from mlpext.training.engines.optimizer import Rule

pytestmark = [pytest.mark.native, pytest.mark.isa]

# One below, at and above the lanes of a register, twice and four times as many.
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
# And of the 96 rows of a chunk.
STEPS = (1, 1, 2, 7, 33, 95, 96, 97, 193, 1000)


ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_generator_here_gives_the_published_words(counter, key, expected):
    """The known answers that come with the authors' own implementation (Random123)."""
    assert tuple(int(word) for word in philox(counter, key)) == expected


@pytest.mark.parametrize("units", WIDTHS)
def test_masks_are_the_generators(units):
    for p, seed, epoch, layer, first in (
        (0.5, 0, 1, 0, 0),
        (0.1, 2**63 + 12345, 7, 3, 2**32 - 2),
        (1 - 2**-33, 2**64 - 1, 2**32 - 1, 2, 5),
        (2**-32, 1, 1, 1, 1),
        (0.0, 1, 1, 1, 1),
    ):
        samples = [(first + i) % 2**32 for i in range(5)]
        expected = mask(p, seed, epoch, layer, samples, units)
        for dtype in (torch.float64, torch.float32):
            got = _C.dropout_mask(p, seed, epoch, layer, first, 5, units, dtype)
            assert torch.equal(got, torch.from_numpy(expected).to(dtype))


def test_share_of_units_that_a_mask_drops():
    got = _C.dropout_mask(0.3, 5, 1, 0, 0, 1000, 1000, torch.float32) == 0
    assert abs(got.double().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 1e6)
    assert got.double().mean(0).std().item() == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.1)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_probabilities_of_dropout_that_are_none(p):
    with pytest.raises(ValueError, match="dropout"):
        _C.dropout_mask(p, 0, 1, 0, 0, 2, 2, torch.float32)


def blocks_for(step_size, count):
    """Below a step, a step, several steps, everything; and None, for no fetch."""
    below = {1, step_size // 2, step_size - 1} - {0}
    return [None, *(below if step_size > 1 else ()), step_size, 3 * step_size, count + 5]


RULES = {
    "descent": Rule(lr=0.05),
    "decay": Rule(lr=0.05, weight_decay=0.1),
    "momentum": Rule(lr=0.02, momentum=0.9, weight_decay=0.01),
    "nesterov": Rule(lr=0.02, momentum=0.8, nesterov=True),
    "adam": Rule("adam", lr=0.01, weight_decay=0.02, betas=(0.9, 0.99), eps=1e-3),
    "adamw": Rule("adamw", lr=0.01, weight_decay=0.02, betas=(0.8, 0.99), eps=1e-3),
}


def random_layers(rng, widths):
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        last = number == len(widths) - 2
        activation = str(rng.choice([*ACTIVATIONS, "maxout"]))
        pieces = (int(rng.integers(1, 4)),) if activation == "maxout" else (2,) * (rng.random() < 0.3)
        layers.append(
            Layer(
                rng.normal(size=(*pieces, outputs, inputs)) / math.sqrt(inputs),
                rng.normal(size=(*pieces, outputs)) if rng.random() < 0.8 else None,
                activation,
                0.0 if last else float(rng.choice([0.0, 0.1, 0.5, 0.9])),
                (bool(rng.random() < 0.85), bool(rng.random() < 0.85)),
            )
        )
    layers[-1].trained = (True, True)
    return layers


def random_weights(rng, count, step_size, order):
    kind = rng.choice(["none", "positive", "some zero", "a step of zeros"])
    if kind == "none":
        return None
    w = rng.exponential(size=count) * 10 ** rng.uniform(-3, 3)
    if kind == "some zero":
        w[rng.random(count) < 0.5] = 0
    if kind == "a step of zeros":
        w[order[step_size : 2 * step_size]] = 0
        if len(order) <= step_size:
            w[:] = 0
    return w


def random_case(seed):
    rng = np.random.default_rng(seed)
    widths = [int(width) for width in rng.choice(WIDTHS, size=rng.integers(2, 5))]
    step_size = int(rng.choice(STEPS))
    count = int(rng.integers(1, 40 if step_size < 4 else 3 * min(step_size, 150)))
    loss = str(rng.choice(LOSSES))
    rule = dataclasses.replace(
        RULES[str(rng.choice(list(RULES)))],
        l2=float(rng.choice([0.0, 0.0, 0.3])),
        clip_grad_norm=float(rng.choice([0.0, 0.0, 0.01, 1.0])),
    )
    mean = bool(rng.random() < 0.7)
    rows = count + int(rng.integers(0, 3))
    order = rng.permutation(rows)[:count]
    x = rng.normal(size=(rows, widths[0]))
    d = rng.random(size=(rows, widths[-1]))
    if loss != "binary_cross_entropy" and rng.random() < 0.5:
        d = rng.integers(widths[-1], size=rows)
    w = random_weights(rng, rows, step_size, order)
    if not mean:
        rule = dataclasses.replace(rule, lr=rule.lr / (step_size * (1 if w is None else max(w.mean(), 1))))
    return {
        "layers": random_layers(rng, widths),
        "rule": rule,
        "loss": loss,
        "mean": mean,
        "step_size": step_size,
        "order": order,
        "x": x,
        "d": d,
        "w": w,
        "seed": int(rng.integers(2**63)),
        "epoch": int(rng.integers(1, 100)),
        "dtype": torch.float64 if rng.random() < 0.7 else torch.float32,
        "blocks": blocks_for(step_size, count),
    }


@pytest.mark.parametrize("seed", range(120))
def test_random_epochs(seed):
    compare(**random_case(seed))


OPTIONS = {
    "weights": {"w": True},
    "l2": {"rule": {"l2": 0.5}},
    "clipping": {"rule": {"clip_grad_norm": 0.05}},
    "l2 and clipping": {"rule": {"l2": 0.5, "clip_grad_norm": 0.05}, "w": True},
    "dropout": {"dropout": 0.4},
}


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("step_size", [1, 3, 96, 97])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_with_each_rule(option, rule, step_size, mean):
    """And it does something: without it the weights are others. (Of the mean over one sample the sample's
    weight is no part.)"""
    rng = np.random.default_rng(1)
    chosen = OPTIONS[option]
    layers = [
        Layer(rng.normal(size=(17, 5)), rng.normal(size=17), "tanh"),
        Layer(rng.normal(size=(2, 9, 17)) / 4, rng.normal(size=(2, 9)), "maxout"),
        Layer(rng.normal(size=(2, 8, 9)) / 3, rng.normal(size=(2, 8)), "silu"),
        Layer(rng.normal(size=(3, 8)) / 3, rng.normal(size=3), "identity"),
    ]
    count = 13 if step_size < 96 else 2 * step_size + 1
    case = {
        "rule": dataclasses.replace(RULES[rule], lr=RULES[rule].lr / (1 if mean else step_size)),
        "loss": "binary_cross_entropy",
        "mean": mean,
        "step_size": step_size,
        "order": rng.permutation(count),
        "x": rng.normal(size=(count, 5)),
        "d": rng.random(size=(count, 3)),
        "w": None,
        "seed": 3,
        "epoch": 2,
        "dtype": torch.float64,
        "blocks": blocks_for(step_size, count),
    }
    _, plain = compare(layers, **{**case, "blocks": []})
    case["rule"] = dataclasses.replace(case["rule"], **chosen.get("rule", {}))
    if chosen.get("w"):
        case["w"] = rng.random(size=count) * (rng.random(size=count) < 0.7)
    for layer in layers[:-1]:
        layer.dropout = chosen.get("dropout", 0.0)
    _, changed = compare(layers, **case)
    if option != "weights" or step_size > 1 or not mean:
        for layer, other in zip(plain, changed, strict=True):
            assert np.abs(layer.W - other.W).max() > 1e-6


def one_layer(y, d, loss, dtype, step_size):
    """E, and dE/dy as a bias of 0 has moved by it, where the outputs are the inputs y."""
    outputs = y.shape[1]
    layers = [Layer(np.eye(outputs), np.zeros(outputs), "identity", trained=(False, True))]
    rows = np.arange(len(y))
    losses = native_epoch(layers, Rule(lr=1.0), loss, False, step_size, rows, y, d, None, 0, 1, dtype)
    return losses[0], -layers[0].b


@pytest.mark.parametrize("step_size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("outputs", WIDTHS)
def test_binary_cross_entropy_of_large_logits(outputs, dtype, step_size):
    """Neither E nor dE/dy overflows, or loses its digits where it is small."""
    rng = np.random.default_rng(outputs)
    extremes = np.array([0.0, 1e-3, 1.0, 5.0, 17.0, 40.0, 80.0, 1e3, 1e30])
    for _ in range(10):
        y = rng.choice([*extremes, *-extremes], size=(1, outputs))
        y = torch.tensor(y, dtype=dtype).double().numpy()
        d = rng.integers(2, size=(1, outputs)).astype(float)
        away = np.where(d == 1, y, -y)  # E = log(1 + e^-away), dE/dy = -+1 / (1 + e^away)
        error, gradient = one_layer(y, d, "binary_cross_entropy", dtype, step_size)
        digits = {"rtol": 1e-6 if dtype == torch.float32 else 1e-14}
        np.testing.assert_allclose(error, np.logaddexp(0, -away).sum(), **digits)
        expected = (1 - 2 * d) * np.exp(-np.logaddexp(0, away))
        tiny = 1e-37 if dtype == torch.float32 else 1e-307
        np.testing.assert_allclose(gradient, expected[0], **digits, atol=tiny)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 16, 17])
def test_nan_in_any_output_is_one_of_the_loss(outputs, loss):
    for dtype in (torch.float32, torch.float64):
        for place in range(outputs):
            y = np.zeros((1, outputs))
            y[0, place] = math.nan
            assert math.isnan(one_layer(y, np.full((1, outputs), 0.5), loss, dtype, 1)[0])


def test_padding_of_a_weight_stays_zero_without_eps():
    """0 / 0 of Adam's averages would be in the norms of weights and gradient."""
    rng = np.random.default_rng(5)
    layers = [
        Layer(rng.normal(size=(5, 3)), rng.normal(size=5), "tanh"),
        Layer(rng.normal(size=(1, 5)), rng.normal(size=1), "identity"),
    ]
    rule = Rule("adam", lr=0.01, betas=(0.9, 0.99), eps=0.0, l2=0.1, clip_grad_norm=0.1)
    x, d = rng.normal(size=(40, 3)), rng.random(size=(40, 1))
    rest = "squared_error", True, 10, np.arange(40), x, d, None, 0, 1, torch.float64
    compare(layers, rule, *rest, blocks=[None])


def test_names_of_the_losses():
    assert sorted(_C.losses()) == sorted(LOSSES)


def test_seeds_are_taken_by_their_lowest_64_bits():
    def of(seed):
        return _C.dropout_mask(0.5, seed, 1, 0, 0, 3, 50, torch.float32)

    assert torch.equal(of(-1), of(2**64 - 1))
    assert torch.equal(of(2**64 + 7), of(7))
    assert not torch.equal(of(7), of(7 + 2**32))


def test_what_is_refused():
    def run(w=None, dropout=0.0, loss="squared_error", block=None):
        layers = [Layer(np.ones((2, 2)), None, "identity", dropout), Layer(np.ones((1, 2)), None, "identity")]
        x, d = np.ones((4, 2)), np.ones((4, 1))
        order = np.arange(4)
        return native_epoch(layers, Rule(), loss, True, 2, order, x, d, w, 0, 1, torch.float32, block)

    assert run(np.ones(4)).shape == (2,)
    for block in (None, 2):
        with pytest.raises(ValueError, match=r"sample_weight: expected .* shape \[[42]\]"):
            run(np.ones((4, 1)), block=block)
    with pytest.raises(ValueError, match=r"dropout: expected 0 <= p < 1, got 1"):
        run(dropout=1.0)
    with pytest.raises(ValueError, match="loss: unknown name huber"):
        run(loss="huber")
