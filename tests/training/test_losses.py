"""E over the samples of a step: how losses are summed, in which precision, and which cannot be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlpext.nn import MLP
from mlpext.training import evaluate, fit

MODES = ("stochastic", "mini-batch", "batch")


def train(model, x, d, **options):
    return fit(model, x, d, **{"seed": 0, "epochs": 1, "progress": False, **options})


def by_class(count=3000, order="sorted"):
    """x, and three classes: in a row, in turn, or as they come."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    labels = torch.arange(count)
    labels = {
        "sorted": labels * 3 // count,
        "in turn": labels % 3,
        "shuffled": torch.randperm(count, generator=generator) % 3,
    }[order]
    return x, labels


def network(outputs=3, **options):
    torch.manual_seed(2)
    return MLP([4, outputs], **options)


# Losses that are no plain mean over the samples


class PairwiseRank(nn.Module):
    """Of a survival model's kind: every sample is compared with the others of the call."""

    def forward(self, output, target):
        return F.softplus(output[:, :1] - output[:, :1].t()).mean()


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 1.0]))
NO_MEAN = {
    "weights": WEIGHTED,
    "ignore_index": nn.CrossEntropyLoss(ignore_index=1),
    "pairs": PairwiseRank(),
    "a sum": nn.CrossEntropyLoss(reduction="sum"),
    "root": lambda output, target: F.cross_entropy(output, target).sqrt(),
}


@pytest.mark.parametrize("order", ["sorted", "in turn", "shuffled"])
@pytest.mark.parametrize("name", NO_MEAN)
def test_a_loss_that_is_no_mean_is_refused_where_it_would_be_taken_in_parts(name, order):
    """Added up by chunks, weights 1, 10, 1 on sorted classes gave 1.288 for 1.156, and a bias moved back."""
    x, labels = by_class(order=order)
    model = network()
    with pytest.raises(ValueError, match=r"no plain mean over the samples.*1024.*reduction=\"none\""):
        train(model, x, labels, mode="batch", loss=NO_MEAN[name])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network().parameters(), strict=True))
    assert len(train(model, x, labels, loss=NO_MEAN[name])) == 1  # a step of mini-batches is no part


@pytest.mark.parametrize("name", NO_MEAN)
def test_a_step_that_is_taken_at_once_takes_any_loss(name):
    x, labels = by_class(1024)
    model, expected = network(), network()
    loss = NO_MEAN[name]
    history = train(model, x, labels, mode="batch", loss=loss, lr=0.1)
    own = loss(expected(x), labels)
    own.backward()
    assert history["loss"] == [pytest.approx(own.item(), rel=1e-6)]
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 1.0]), reduction="none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_and_values_per_sample_are_taken_in_parts(loss, dtype):
    x, labels = by_class(3001, "shuffled")
    model, expected = network(dtype=dtype), network(dtype=dtype).double()
    loss = loss.to(dtype)
    history = train(model, x, labels, mode="batch", loss=loss, lr=0.1)
    own = loss.double()(expected(x.to(dtype).double()), labels).mean()
    own.backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert history["loss"] == [pytest.approx(own.item(), rel=tolerance)]
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        stepped = theirs - 0.1 * theirs.grad
        torch.testing.assert_close(ours.double(), stepped, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("count", [1023, 1024, 1025, 3000])
@pytest.mark.parametrize("name", NO_MEAN)
def test_evaluate_takes_a_mean_of_all_samples(name, count):
    """Not the mean of the means of blocks of 1024."""
    if name == "a sum":
        pytest.skip("no mean")
    x, labels = by_class(count)
    model, loss = network(), NO_MEAN[name]
    expected = loss(model(x), labels).item()
    assert evaluate(model, x, labels, loss=loss)["loss"] == pytest.approx(expected, rel=1e-5)
    history = train(model, x, labels, loss=loss, lr=0.0, validation=(x, labels))
    assert history["val_loss"] == [pytest.approx(expected, rel=1e-5)]


# Sums in 16 bits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("exponent", [9, 10, 11, 14, 20])
def test_batch_mode_adds_up_its_chunks_in_full(exponent, dtype, reduction):
    """At zero with x = 0 and d = 1 one step of lr 1 makes b = 1. Added up in bfloat16 it was 0.25."""
    count = 2**exponent
    if reduction == "sum" and dtype == torch.float16 and exponent > 15:
        pytest.skip("2^16 is infinite in float16")
    model = network_of_zeros(dtype)
    lr = 1.0 if reduction == "mean" else 2.0**-exponent
    history = train(
        model, torch.zeros(count, 1), torch.ones(count, 1), mode="batch", lr=lr, reduction=reduction
    )
    assert model[0].bias.item() == 1 and history["loss"] == [0.5]


def network_of_zeros(dtype):
    model = MLP([1, 1], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy", nn.MSELoss(reduction="none")], ids=str)
@pytest.mark.parametrize("mode", MODES[1:])
def test_losses_of_16_bits_neither_overflow_nor_lose_digits(mode, loss, dtype):
    """1000 samples of E = 200 are more than float16 holds; in bfloat16 a sum of 1000 has 3 digits."""
    torch.manual_seed(0)
    model = MLP([4, 2], dtype=dtype)
    x = torch.randn(1500, 4).to(dtype)
    d = (20 + torch.rand(1500, 2)).to(dtype)
    own = (lambda o, t: loss(o, t).mean(1)) if isinstance(loss, nn.Module) else loss
    if loss == "cross_entropy":
        d = d.softmax(1) * 400  # "probabilities", of a sum that makes E large
    total = train(model, x, d, mode=mode, batch_size=1500, loss=own, lr=0.0)["loss"][0]
    o, t = (values.double() for values in (torch.cat([model(part) for part in x.split(1024)]), d))
    if loss == "squared_error":
        expected = 0.5 * (o - t).square().sum(1).mean()
    elif loss == "cross_entropy":
        expected = -(t * o.log_softmax(1)).sum(1).mean()
    else:
        expected = (o - t).square().mean()
    assert total == pytest.approx(expected.item(), rel=2e-3)
    assert evaluate(model, x, d, loss=own)["loss"] == pytest.approx(expected.item(), rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_too_small_for_16_bits_by_itself(dtype):
    """1 / N of one sample is subnormal in float16 from N = 2^14 on: chunks are added first."""
    count = 2**15 + 1
    model = network_of_zeros(dtype)
    d = torch.full((count, 1), 1 / 64)
    train(model, torch.zeros(count, 1), d, mode="batch", lr=1.0)
    assert model[0].bias.item() == pytest.approx(1 / 64, rel=2**-8)


# Losses that cannot teach


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), F.cross_entropy])
@pytest.mark.parametrize("target", ["classes", "probabilities"])
def test_cross_entropy_of_one_output_is_refused(target, loss, mode):
    """softmax of one output is 1: E was 0 at every step, and nothing said so."""
    x = torch.randn(50, 4)
    d = torch.zeros(50, dtype=torch.int64) if target == "classes" else torch.rand(50, 1)
    for run in (
        lambda: train(network(1), x, d, loss=loss, mode=mode),
        lambda: evaluate(network(1), x, d, loss=loss),
    ):
        with pytest.raises(ValueError, match="binary_cross_entropy.*squared_error"):
            run()


def test_what_the_refusal_names_works():
    x = torch.randn(200, 4)
    d = (x[:, :1] > 0).float()
    history = train(network(1), x, d, loss=F.binary_cross_entropy_with_logits, epochs=30, lr=1.0)
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    assert train(network(1), x, d, epochs=30)["loss"][-1] < 0.1
