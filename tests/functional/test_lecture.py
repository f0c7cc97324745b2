"""The lecture's own algebra, written out in NumPy float64, against the package.

Row vectors throughout, W in x out as the lecture has it; a module's weight is its transpose.
"""

import numpy as np
import pytest
import torch

from mlpext import functional
from mlpext.nn import MLP
from mlpext.training import fit


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# f and f' as on the slides
ACTIVATIONS = {
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "relu": (lambda x: np.maximum(0, x), lambda x: np.where(x > 0, 1.0, 0.0)),
    "leaky_relu": (lambda x: np.maximum(0.1 * x, x), lambda x: np.where(x > 0, 1.0, 0.1)),
    "elu": (lambda x: np.where(x >= 0, x, np.exp(x) - 1), lambda x: np.where(x >= 0, 1.0, np.exp(x))),
}
PARAMETERS = {"leaky_relu": {"negative_slope": 0.1}, "elu": {"alpha": 1.0}, "maxout": {"pieces": 3}}
N0, N1, N2 = 5, 4, 3
HIDDEN = [*ACTIVATIONS, "maxout"]


def network(hidden):
    torch.manual_seed(3)
    return MLP([N0, N1, N2], hidden, "sigmoid", dtype=torch.float64, **PARAMETERS.get(hidden, {}))


def in_lecture_layout(w1, b1, w2, b2):
    """W1, b1, W2, b2 with W in x out; of a maxout layer one W1 and b1 for each piece."""
    w1, b1, w2, b2 = (tensor.detach().numpy().copy() for tensor in (w1, b1, w2, b2))
    return [np.swapaxes(w1, -1, -2), b1, w2.T, b2]


def weights(model):
    return in_lecture_layout(*model.parameters())


def gradients(x, d, parameters, hidden):
    """E = 1/2 ||d - o2||^2 of one sample and dE/dW1, dE/db1, dE/dW2, dE/db2 by the lecture's chain."""
    W1, b1, W2, b2 = parameters
    if hidden == "maxout":
        pieces = x @ W1 + b1[:, None, :]  # one row per piece
        o1 = pieces.max(0)
        wins = pieces == o1  # do1/dnet1 of each piece: 1 where it is the largest
        F1 = [np.diag(winner[0].astype(float)) for winner in wins]
    else:
        f, slope = ACTIVATIONS[hidden]
        net1 = x @ W1 + b1
        o1 = f(net1)
        F1 = np.diag(slope(net1)[0])
    net2 = o1 @ W2 + b2
    o2 = sigmoid(net2)
    e = d - o2
    E = 0.5 * np.sum(e**2)
    F2 = np.diag((o2 * (1 - o2))[0])  # do2/dnet2 = f'(net2), n2 x n2

    to_net2 = e @ -np.eye(N2) @ F2  # dE/de . de/do2 . do2/dnet2, 1 x n2
    to_o1 = to_net2 @ W2.T  # . dnet2/do1
    dW2 = o1.T @ to_net2  # n1 x n2
    if hidden == "maxout":
        to_net1 = np.stack([to_o1 @ piece for piece in F1])
        return E, [x.T @ to_net1, to_net1[:, 0], dW2, to_net2[0]]
    to_net1 = to_o1 @ F1
    return E, [x.T @ to_net1, to_net1[0], dW2, to_net2[0]]


def samples(count):
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, N0)), rng.random((count, N2))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_neuron(name):
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal(7), rng.standard_normal(7), rng.standard_normal()
    o = functional.linear_activation(
        torch.tensor(x), torch.tensor(w)[None], torch.tensor(np.array([b])), name, **PARAMETERS.get(name, {})
    )
    assert o.item() == pytest.approx(ACTIVATIONS[name][0](np.dot(w, x) + b), abs=1e-14)


def test_a_maxout_neuron():
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal(7), rng.standard_normal((2, 7)), rng.standard_normal(2)
    o = functional.linear_maxout(torch.tensor(x), torch.tensor(w)[:, None, :], torch.tensor(b)[:, None])
    assert o.item() == pytest.approx(max(w[0] @ x + b[0], w[1] @ x + b[1]), abs=1e-14)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_gradients_are_the_chain_of_jacobians(hidden):
    model = network(hidden)
    for x, d in zip(*samples(20), strict=True):
        E, expected = gradients(x[None], d[None], weights(model), hidden)
        model.zero_grad()
        error = 0.5 * (torch.tensor(d) - model(torch.tensor(x)[None])).square().sum()
        error.backward()
        assert error.item() == pytest.approx(E, abs=1e-12)
        actual = in_lecture_layout(*(parameter.grad for parameter in model.parameters()))
        for gradient, wanted in zip(actual, expected, strict=True):
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-12)


def descend(x, d, parameters, hidden, eta, size, reduction):
    """Weights after an epoch of W(k+1) = W(k) - eta dE/dW(k), `size` samples a step; each step's mean E."""
    errors = []
    for start in range(0, len(x), size):
        rows = range(start, min(start + size, len(x)))
        each = [gradients(x[row][None], d[row][None], parameters, hidden) for row in rows]
        errors.append(np.mean([E for E, _ in each]))
        total = [sum(parts) for parts in zip(*(dW for _, dW in each), strict=True)]
        scale = 1 / len(rows) if reduction == "mean" else 1
        parameters = [W - eta * scale * dW for W, dW in zip(parameters, total, strict=True)]
    return parameters, errors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("mode", "size"), [("stochastic", 1), ("mini-batch", 4), ("batch", 10)])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_an_epoch_is_the_update_rule(hidden, mode, size, reduction):
    x, d = samples(10)  # not a multiple of 4: the last mini-batch has 2
    model = network(hidden)
    expected, errors = descend(x, d, weights(model), hidden, 0.3, size, reduction)
    history = fit(
        model,
        x,
        d,
        mode=mode,
        batch_size=4,
        lr=0.3,
        epochs=1,
        reduction=reduction,
        shuffle=False,
        progress=False,
    )
    for actual, wanted in zip(weights(model), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(history.step_losses, errors, rtol=0, atol=1e-12)
    assert history["loss"][0] == pytest.approx(
        np.dot(errors, [min(size, 10 - k) for k in range(0, 10, size)]) / 10
    )


@pytest.mark.parametrize("mode", ["stochastic", "mini-batch", "batch"])
def test_one_sample_is_one_step(mode):
    x, d = samples(1)
    model = network("tanh")
    _, gradient = gradients(x, d, weights(model), "tanh")
    expected = [W - 0.5 * dW for W, dW in zip(weights(model), gradient, strict=True)]
    fit(model, x, d, mode=mode, lr=0.5, epochs=1, progress=False)
    for actual, wanted in zip(weights(model), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12)
