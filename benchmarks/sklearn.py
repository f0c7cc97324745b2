"""mlpext.sklearn's classifier beside scikit-learn's: a whole `fit` of ten epochs, in time a sample.

The same samples of the digits in float32, steps, loss (cross entropy and the penalty of alpha=1e-4), tanh,
solver at its defaults, the order drawn anew each epoch; by batch size, width and solver, smallest first.
"""

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


def import_the_package() -> None:
    """Import scikit-learn past this file, which is found by that name from every script of this folder."""
    here, path = Path(__file__).resolve().parent, sys.path[:]
    sys.path[:] = [folder for folder in path if Path(folder).resolve() != here]
    sys.modules.pop("sklearn", None)
    importlib.import_module("sklearn")
    sys.path[:] = path


import_the_package()

EPOCHS = 10
WIDTHS = ((256, 128), (100,), (16,))
SAMPLES = {200: 1600, 32: 1600, 1: 400}  # by samples a step: what takes scikit-learn tenths of a second
TARGETS = {200: 4, 32: 8, 1: 25}


def cases() -> Iterator[Any]:
    import sklearn.neural_network

    import mlpext.sklearn
    from harness import Case
    from training import samples

    inputs, d = samples("digits")
    x, labels = inputs.numpy(), d.argmax(1).numpy()
    for batch, count in SAMPLES.items():
        for hidden in WIDTHS:
            for solver in ("sgd", "adam"):
                options: dict[str, Any] = {
                    "hidden_layer_sizes": hidden,
                    "activation": "tanh",
                    "solver": solver,
                    "batch_size": batch,
                    "max_iter": EPOCHS,
                    "n_iter_no_change": EPOCHS,  # none stops before
                    "random_state": 0,
                }
                theirs = sklearn.neural_network.MLPClassifier(**options)
                ours = mlpext.sklearn.MLPClassifier(**options, engine="native")
                yield Case(
                    f"{'-'.join(map(str, (64, *hidden, 10)))}, {solver}, {batch} a step",
                    {
                        "scikit-learn": partial(theirs.fit, x[:count], labels[:count]),
                        "mlpext": partial(ours.fit, x[:count], labels[:count]),
                    },
                    TARGETS[batch],
                    units=dict.fromkeys(("scikit-learn", "mlpext"), EPOCHS * count),
                )


if __name__ == "__main__":
    import warnings

    from harness import run

    warnings.simplefilter("ignore")  # that ten epochs do not converge
    run(cases(), "sklearn", ["--rounds", "9", *sys.argv[1:]])
