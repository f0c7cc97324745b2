"""`train --search`: networks of several widths, activations and learning rates, side by side."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch

from mlpext.cli._defaults import EPOCHS
from mlpext.cli._steps import METRICS, Data, learning_rate, steps_of
from mlpext.nn import MLP
from mlpext.training import evaluate, fit_many
from mlpext.training._losses import LossName

HIDDEN = ([16], [64], [64, 64])
ACTIVATIONS = ("relu", "tanh", "gelu")
RATES = (0.3, 1.0, 3.0)  # times the mode's own
ROW = "{:<12}{:<14}{:>9}{:>11}{:>10}"


def search(data: Data, loss: LossName, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Train a network of each kind, print them, the best first, draw them, and give `options` what
    the best has. Returns that, for config.json.

    What the command line says of width, activation or learning rate is not searched. The best is the one with
    the best metric on the held-out data; of equal ones the lower loss decides.
    """
    mode = "mini-batch" if options.mode == "all" else options.mode
    options.mode = mode
    own_rate = learning_rate(mode, data, options)
    kinds = list(
        itertools.product(
            [options.hidden] if "hidden" in options.given else HIDDEN,
            [options.activation] if "activation" in options.given else ACTIVATIONS,
            [own_rate] if "lr" in options.given else [factor * own_rate for factor in RATES],
        )
    )
    models, each = [], []
    for hidden, activation, lr in kinds:
        torch.manual_seed(options.seed[0])
        sizes = [data.training[0].shape[1], *hidden, len(data.source.names)]
        own = options.parameters if activation == options.activation else {}
        models.append(MLP(sizes, activation, options.output_activation, dropout=options.dropout, **own))
        each.append(steps_of(mode, lr, loss, options.seed[0], options))
    epochs = EPOCHS[mode] if options.epochs is None else options.epochs
    fit_many(models, *data.training, each=each, epochs=epochs, threads=options.threads)

    metric = METRICS[data.kind]
    results = []
    for (hidden, activation, lr), model in zip(kinds, models, strict=True):
        measured = evaluate(model, *data.testing, loss=loss)
        results.append((measured[metric], -measured["loss"], hidden, activation, lr))
    results.sort(key=lambda result: result[:2], reverse=True)
    print(f"{len(kinds)} networks of {mode} mode, {epochs} epochs, on the held-out data:")
    print(ROW.format("hidden", "activation", "lr", metric, "E"))
    for reached, negative, hidden, activation, lr in results:
        shown = f"{reached:.1%}" if metric == "accuracy" else f"{reached:.3f}"
        print(ROW.format("-".join(map(str, hidden)), activation, f"{lr:.3g}", shown, f"{-negative:.5f}"))
    from mlpext.plots import plot_learning_rates

    rows = [
        ("hidden " + "-".join(map(str, hidden)), activation, lr, reached)
        for reached, _, hidden, activation, lr in results
    ]
    plot_learning_rates(rows, metric, out / "search.png")
    print(f"{out / 'search.png'}; the first is trained:")
    _, _, options.hidden, options.activation, options.lr = results[0]
    if options.activation != "maxout" and "activation" not in options.given:
        options.parameters = {}
    return {"found": {"hidden": options.hidden, "activation": options.activation, "lr": options.lr}}
