"""scikit-learn's MLPClassifier beside `fit`: the same network, data, loss and steps, in time a sample.

Cross entropy, tanh, SGD without momentum and Adam at its defaults, steps of 1, 32 and 200 samples, on the
digits (64-100-10) and on 2,000 random samples (784-256-128-10), in float32 on both sides. An epoch of
scikit-learn's is a call of partial_fit.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

import mlpext
from harness import Case, run
from mlpext.training import fit
from training import SIZES, samples

TARGETS = {1: 25, 32: 8, 200: 4}  # by samples a step
FEW = {1: 200, 32: 640, 200: 1600}  # scikit-learn is given as many samples as take tens of milliseconds
LR = 1e-3


def networks() -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Sizes, inputs, class numbers."""
    for name, sizes in (("digits", (64, 100, 10)), ("synthetic", SIZES["synthetic"])):
        x, d = samples(name)
        yield sizes, x[:2000], d[:2000].argmax(1)


def adam(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR)


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for sizes, x, labels in networks():
        for solver in ("sgd", "adam"):
            for batch, few in FEW.items():
                theirs = MLPClassifier(
                    sizes[1:-1],
                    "tanh",
                    solver=solver,
                    alpha=0,
                    batch_size=batch,
                    learning_rate_init=LR,
                    momentum=0,
                    shuffle=False,
                )
                theirs.partial_fit(x[:few].numpy(), labels[:few].numpy(), classes=range(10))
                ours = partial(
                    fit,
                    mlpext.nn.MLP(sizes, "tanh"),
                    x,
                    labels,
                    mode="stochastic" if batch == 1 else "mini-batch",
                    batch_size=batch,
                    loss="cross_entropy",
                    lr=LR,
                    optimizer=adam if solver == "adam" else None,
                    epochs=1,
                    shuffle=False,
                    seed=0,
                    progress=False,
                    engine="native",
                )
                sklearn = partial(theirs.partial_fit, x[:few].numpy(), labels[:few].numpy())
                yield Case(
                    f"{'-'.join(map(str, sizes))}, {solver}, {batch} a step",
                    {"scikit-learn": sklearn, "mlpext": ours},
                    TARGETS[batch],
                    units={"scikit-learn": few, "mlpext": len(x)},
                )


if __name__ == "__main__":
    warnings.simplefilter("ignore", ConvergenceWarning)
    run(cases(), "scikit-learn", ["--rounds", "9", *sys.argv[1:]])
