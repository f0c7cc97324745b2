"""Networks, data and a short run, for the tests of `fit`."""

import torch

from mlpext.nn import MLP
from mlpext.training import fit


def network(sizes=(6, 5, 3), seed=1, dtype=torch.float32, **kwargs):
    torch.manual_seed(seed)
    return MLP(list(sizes), "tanh", dtype=dtype, **kwargs)


def classes(count=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.randint(0, 3, (count,), generator=generator)


def numbers(count=50, seed=0, outputs=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randn(count, outputs, generator=generator)


def train(model, x, d, **kwargs):
    return fit(model, x, d, **{"progress": False, "seed": 0, "epochs": 3, "lr": 0.05, **kwargs})


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
