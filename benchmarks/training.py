"""Gradient descent: `mlpext.training.fit` beside the loops that people write, in time a sample.

Two networks and data sets, 64-64-64-10 on the digits and 784-256-128-10 on 10,000 random samples, tanh,
float32, plain descent, in steps of 1, 32, 256 and all samples. Peers: the naive PyTorch loop (zero_grad,
forward, loss, backward, torch.optim.SGD.step); the same step written by hand without autograd; and, where
`--jax PYTHON` names an interpreter that has JAX, an epoch under jax.jit and lax.scan (best JAX is the better
of the two). Every peer makes the same steps from the same weights; unless all reach the same E after one
epoch, there is no comparison.

Besides: `nn.MLP` beside nn.Sequential, `fit_many` of 64 networks, and what one `fit` call costs before the
first sample (target: 100 us).
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mlpext
from harness import Case, Elsewhere, run
from mlpext import data
from mlpext.training import fit, fit_many

LR = 1e-3
SIZES = {"digits": (64, 64, 64, 10), "synthetic": (784, 256, 128, 10)}
# Ratios wanted of the naive loop and of the best JAX, by samples an update (0: all).
TARGETS = {
    "digits": {1: (450, 5), 32: (20, 2), 256: (7.5, 1.9), 0: (5, 2)},
    "synthetic": {1: (45, 5.6), 32: (4.6, 1.45), 256: (3.4, 1.28), 0: (3, 1.5)},
}


def samples(name: str) -> tuple[Tensor, Tensor]:
    """Inputs and one-hot d, in random order."""
    if name == "digits":
        digits = data.load("digits")
        x, labels = digits.x.float(), digits.target
    else:
        x = torch.rand(10_000, 784)
        labels = (x @ torch.randn(784, 10)).argmax(1)
    order = torch.randperm(len(x))
    return x[order], nn.functional.one_hot(labels[order], 10).float()


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def ours(model: nn.Sequential, sizes: tuple[int, ...]) -> mlpext.nn.MLP:
    net = mlpext.nn.MLP(sizes, "tanh")
    with torch.no_grad():
        for to, value in zip(net.parameters(), model.parameters(), strict=True):
            to.copy_(value)
    return net


def train(net: mlpext.nn.MLP, x: Tensor, d: Tensor, batch: int, epochs: int = 1) -> None:
    options: dict = {
        "mode": "stochastic" if batch == 1 else "batch" if batch == len(x) else "mini-batch",
        "epochs": epochs,
        "shuffle": False,
        "seed": 0,
        "progress": False,
        "engine": "native",
    }
    fit(net, x, d, batch_size=batch, lr=LR, **options)


def naive(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, d: Tensor, batch: int) -> None:
    for inputs, wanted in zip(x.split(batch), d.split(batch), strict=True):
        optimizer.zero_grad()
        loss = 0.5 * ((model(inputs) - wanted) ** 2).sum() / batch
        loss.backward()
        optimizer.step()


@torch.no_grad()
def by_hand(model: nn.Sequential, x: Tensor, d: Tensor, batch: int) -> None:
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
    for y, wanted in zip(x.split(batch), d.split(batch), strict=True):
        outputs = [y]
        for weight, bias in weights[:-1]:
            outputs.append(torch.addmm(bias, outputs[-1], weight.t()).tanh_())
        dz = torch.addmm(weights[-1][1], outputs[-1], weights[-1][0].t()).sub_(wanted).mul_(1 / batch)
        for k in reversed(range(len(weights))):
            weight, bias = weights[k]
            dy = dz @ weight if k else None
            weight.addmm_(dz.t(), outputs[k], alpha=-LR)
            bias.sub_(dz.sum(0), alpha=LR)
            if dy is not None:
                dz = torch.ops.aten.tanh_backward(dy, outputs[k])


class Jax:
    """The process that has JAX, or none."""

    def __init__(self, python: str | None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = None
        if python is not None:
            script = Path(__file__).parent / "peers" / "jax_sgd.py"
            self.process = subprocess.Popen(
                [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def ask(self, **request: object) -> dict:
        assert self.process is not None and self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("the process that has JAX ended; its message is above")
        return json.loads(answer)

    def prepare(self, model: nn.Sequential, x: Tensor, d: Tensor, batch: int, unroll: int) -> None:
        """Build an epoch, run it once, and give `model` the weights that came of it."""
        arrays, weights = (str(Path(self.folder.name) / f"{name}.npz") for name in ("arrays", "weights"))
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        own: dict[str, Any] = {f"w{i}": layer.weight.detach().numpy() for i, layer in enumerate(layers)}
        own |= {f"b{i}": layer.bias.detach().numpy() for i, layer in enumerate(layers)}
        np.savez(arrays, x=x.numpy(), d=d.numpy(), **own)
        self.ask(arrays=arrays, batch=batch, unroll=unroll, lr=LR, weights=weights)
        with np.load(weights) as reached, torch.no_grad():
            for i, layer in enumerate(layers):
                layer.weight.copy_(torch.from_numpy(reached[f"w{i}"]))
                layer.bias.copy_(torch.from_numpy(reached[f"b{i}"]))

    def epochs(self, repeats: int) -> tuple[int, int]:
        times = self.ask(repeats=repeats)
        return times["cpu"], times["wall"]


def check_same_error(models: dict[str, nn.Module], x: Tensor, d: Tensor) -> float:
    with torch.no_grad():
        reached = {peer: 0.5 * ((model(x) - d) ** 2).sum(1).mean().item() for peer, model in models.items()}
    least, most = min(reached.values()), max(reached.values())
    if not most - least <= 1e-4 * most:
        sys.exit(f"void: after one epoch the peers have different E: {reached}")
    return reached["mlpext"]


def training(name: str, batch: int, jax: Jax) -> Iterator[Case]:
    x, d = samples(name)
    count = len(x) - len(x) % (batch or len(x))
    x, d, step = x[:count], d[:count], batch or count
    start = network(SIZES[name])
    initial = copy.deepcopy(start)
    models: dict[str, Any] = {peer: copy.deepcopy(start) for peer in ("naive loop", "by hand")}
    optimizer = torch.optim.SGD(models["naive loop"].parameters(), lr=LR)
    loops: dict[str, Callable[[Tensor, Tensor], None]] = {
        "naive loop": lambda x, d: naive(models["naive loop"], optimizer, x, d, step),
        "by hand": lambda x, d: by_hand(models["by hand"], x, d, step),
    }
    for loop in loops.values():
        loop(x, d)
    models["mlpext"] = ours(start, SIZES[name])
    train(models["mlpext"], x, d, step)

    # A peer is given as many samples as take some tens of milliseconds.
    most = {1: 100, 32: 640, 256: 2560}.get(batch, count)
    few = min(most, count - count % step)
    contenders: dict[str, Callable[[], object]] = {
        peer: partial(loop, x[:few], d[:few]) for peer, loop in loops.items()
    }
    units = dict.fromkeys(contenders, few)
    naive_target, jax_target = TARGETS[name][batch]
    targets: dict[str, float] = {"naive loop": naive_target}
    if jax.process is not None:
        for unroll in (1, 4):
            peer = "JAX scan" if unroll == 1 else f"JAX scan, unroll {unroll}"
            models[peer] = copy.deepcopy(initial)
            jax.prepare(models[peer], x, d, step, unroll)
            times = [jax.epochs(1)[0] for _ in range(3)]
            if unroll == 1:
                scan, fastest = peer, min(times)
            elif min(times) >= fastest:
                jax.prepare(copy.deepcopy(initial), x, d, step, 1)
            else:
                scan = peer
        contenders[scan] = Elsewhere(jax.epochs)
        units[scan], targets[scan] = count, jax_target
    epochs = 10 if name == "digits" else 1
    contenders["mlpext"] = lambda: train(models["mlpext"], x, d, step, epochs)
    units["mlpext"] = epochs * count
    error = check_same_error(models, x, d)
    title = f"{'-'.join(map(str, SIZES[name]))}, {batch or 'all'} a step"
    print(f"  {title}: E = {error:.6f} after one epoch of {count} samples, the same for {', '.join(models)}")
    yield Case(title, contenders, targets, units=units)


def modules() -> Iterator[Case]:
    plain = network(SIZES["digits"])
    calls = {"nn.Sequential": plain, "mlpext": ours(plain, SIZES["digits"])}
    frozen = {peer: copy.deepcopy(call).requires_grad_(False) for peer, call in calls.items()}
    for batch in (1, 32):
        x = torch.randn(batch, 64)
        title = f"nn.MLP 64-64-64-10, batch {batch}"
        target = 6.0 if batch == 1 else None
        yield Case(f"{title}, inference", {p: partial(call, x) for p, call in frozen.items()}, target)
        target = 4.0 if batch == 32 else None
        steps = {peer: gradients(call, x) for peer, call in calls.items()}
        yield Case(f"{title}, forward + backward", steps, target)


def gradients(model: nn.Module, x: Tensor) -> Callable[[], object]:
    parameters, cotangent = list(model.parameters()), torch.randn_like(model(x))
    return lambda: torch.autograd.grad(model(x), parameters, cotangent)


def fixed_cost() -> Iterator[Case]:
    net, x, d = mlpext.nn.MLP([4, 4, 1], "tanh"), torch.randn(2, 4), torch.randn(2, 1)
    for epochs in (0, 1, 2):
        title = f"one fit call, 2 samples, {epochs} epochs"
        yield Case(title, {"mlpext": partial(train, net, x, d, 1, epochs)})


def many(count: int = 64) -> Iterator[Case]:
    """Networks at once on as many threads as the benchmark has (--threads 2), and as many naive loops."""
    x, d = samples("digits")
    x, d = x[:1792], d[:1792]
    nets = [ours(network(SIZES["digits"]), SIZES["digits"]) for _ in range(count)]
    model = network(SIZES["digits"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    options: dict = {
        "batch_size": 32,
        "lr": LR,
        "epochs": 2,
        "shuffle": False,
        "seed": 0,
        "engine": "native",
    }
    title = f"fit_many of {count} networks 64-64-64-10, 32 a step, a sample of each"
    contenders = {
        "naive loop": lambda: naive(model, optimizer, x[:640], d[:640], 32),
        "mlpext": lambda: fit_many(nets, x, d, **options),
    }
    units = {"naive loop": 640, "mlpext": count * 2 * len(x)}
    yield Case(title, contenders, 30.0, units=units)


def cases(jax: Jax) -> Iterator[Case]:
    torch.manual_seed(0)
    yield from fixed_cost()
    yield from modules()
    for name in TARGETS:
        for batch in TARGETS[name]:
            yield from training(name, batch, jax)
    yield from many()
    if jax.process is None:
        print("  JAX: not measured (--jax names no interpreter that has it)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--jax", metavar="PYTHON")
    own, others = parser.parse_known_args()
    run(cases(Jax(own.jax)), "Training", ["--rounds", "9", *others])
