"""The PyTorch loop's optimizers that ask for E again within a step."""

import pytest
import torch

from test_state import Fails, data, network, same_weights, train


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=5, line_search_fn="strong_wolfe")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("count", [1, 50, 1024, 1025, 2500])
def test_lbfgs_in_batch_mode_is_torchs(count, reduction):
    """Its closure is E and its gradient over all samples, in chunks of 1024."""
    x, d = (values.double() for values in data(count))
    model, expected = network().double(), network().double()
    history = train(model, x, d, mode="batch", optimizer=lbfgs, epochs=3, reduction=reduction)
    own, first = lbfgs(expected.parameters()), []
    for _ in range(3):

        def closure():
            own.zero_grad()
            E = 0.5 * (d - expected(x)).square().sum() / (count if reduction == "mean" else 1)
            E.backward()
            return E

        first.append(own.step(closure).item() / (1 if reduction == "mean" else count))
    assert history["loss"] == pytest.approx(first, rel=1e-6)
    assert history["updates"] == [1, 2, 3]
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


class Again(torch.optim.Optimizer):
    """Another optimizer whose step needs a closure."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure):
        E = closure()
        with torch.no_grad():
            for W in self.param_groups[0]["params"]:
                W -= 0.1 * W.grad
        closure()
        return E


@pytest.mark.parametrize("mode", ["stochastic", "mini-batch"])
@pytest.mark.parametrize("make", [torch.optim.LBFGS, Again])
def test_lbfgs_is_refused_elsewhere_by_name(make, mode):
    with pytest.raises(ValueError, match=f"{make.__name__}.*mode='batch', got '{mode}'"):
        train(network(), *data(), optimizer=make, mode=mode)


def test_any_optimizer_with_a_closure_in_batch_mode():
    model, expected = network(), network()
    assert train(model, *data(), optimizer=Again, mode="batch")["r2"] == pytest.approx(
        train(expected, *data(), lr=0.1, mode="batch", engine="autograd")["r2"]
    )
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lbfgs_resumed_and_interrupted(tmp_path):
    whole, half = network(), network()
    train(whole, *data(), optimizer=lbfgs, mode="batch")
    train(network(), *data(), optimizer=lbfgs, mode="batch", epochs=2, checkpoint=tmp_path)
    train(half, *data(), optimizer=lbfgs, mode="batch", checkpoint=tmp_path, resume=True)
    assert same_weights(whole, half)

    model, started = Fails(3, KeyboardInterrupt), network()
    with pytest.raises(KeyboardInterrupt):
        train(model, *data(), optimizer=lbfgs, mode="batch")
    assert same_weights(model.inner, started)
