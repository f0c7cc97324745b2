"""Is anything slower than torch on this machine? Every activation, products of random shapes, fused models.

A census, not a table of targets: many cases with few rounds, and at the end how many of each group are slower
than torch by more than 3 %, and which are the slowest.

    python benchmarks/everywhere.py                 10 minutes; --only to look at some (by a part of the name)
    MLPEXT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/everywhere.py     what a laptop has
    python benchmarks/everywhere.py --threads 2
"""

import functools
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import mlpext
import mlpext.functional as MF
from calls import eager, ours
from fuse import models, training_step
from harness import OURS, Case, measure
from linear import eager as eager_linear
from linear import tensors
from mlpext import _choices

SIZES = {"100": 100, "20 K": 20_000, "1 M": 1 << 20, "16 M": 16 << 20}
SHAPES = 200


def activations() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for size, n in SIZES.items():
            x = 2 * torch.randn(n).to(dtype)
            for name in mlpext.activations()[1:]:
                calls = {"eager": eager(name), OURS: ours(name)}
                label = f"{name}, {str(dtype)[6:]}, {size}"
                yield Case(f"activation, forward: {label}", {who: partial(f, x) for who, f in calls.items()})
                yield Case(
                    f"activation, backward: {label}", {who: gradient(f, [x], 0) for who, f in calls.items()}
                )


def products() -> Iterator[Case]:
    """linear + elu of SHAPES shapes, sides 1 to 8192: forward, then the gradients of x and of W alone."""
    rng = random.Random(0)
    calls: dict[str, Callable[..., Tensor]] = {"eager": eager_linear, OURS: linear_elu}
    for _ in range(SHAPES):
        while True:
            shape = rows, n_in, n_out = [int(2 ** rng.uniform(0, 13)) for _ in range(3)]
            if math.prod(shape) <= 2e9 and max(rows * n_in, n_in * n_out, rows * n_out) <= 2e7:
                break
        inputs = tensors((rows, n_in, n_out), torch.float32)
        flops = 2.0 * math.prod(shape)
        yield Case(
            f"linear, forward: {shape}", {who: partial(f, *inputs) for who, f in calls.items()}, flops=flops
        )
        for which, of in enumerate(("dx", "dW")):
            steps = {who: gradient(f, inputs, which) for who, f in calls.items()}
            yield Case(f"linear, {of}: {shape}", steps, flops=flops)


def linear_elu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return MF.linear_activation(x, w, b, "elu")


def gradient(f: Callable[..., Tensor], inputs: list[Tensor], which: int) -> Callable[[], object]:
    """The gradient of one input alone, of a graph that the first call makes."""

    @functools.cache
    def graph() -> tuple[Tensor, Tensor, Tensor]:
        leaves = [t.detach().requires_grad_(i == which) for i, t in enumerate(inputs)]
        y = f(*leaves)
        return y, leaves[which], torch.randn_like(y)

    def call() -> object:
        y, leaf, cotangent = graph()
        return torch.autograd.grad(y, leaf, cotangent, retain_graph=True)

    return call


def fused() -> Iterator[Case]:
    for each in models():
        model, x = each.module, torch.randn(*each.shape)
        nets = {"eager": model, OURS: mlpext.fuse(model, graph=each.graph)}
        yield Case(f"model: {each.name}", {who: training_step(net, x) for who, net in nets.items()})


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from activations()
    yield from products()
    yield from fused()


def main() -> None:
    argv = sys.argv[1:]
    rounds = [] if "--rounds" in argv else ["--rounds", "9"]
    record, stem, _ = measure(cases(), "Everywhere", [*rounds, *argv])
    groups: dict[str, dict[str, float]] = {}
    for case in record.pop("cases"):
        group, _, label = case["name"].partition(": ")
        groups.setdefault(group, {})[label] = case["ratios"]["eager"]["median"]
    record["groups"] = {group: summary(ratios) for group, ratios in groups.items()}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    for group, found in record["groups"].items():
        print(
            f"{group}: {found['slower']} of {found['cases']} slower than torch, median {found['median']:.2f}"
        )
        for label, ratio in found["lowest"].items():
            print(f"  {ratio:.2f} {label}")


def summary(ratios: dict[str, float]) -> dict[str, Any]:
    """How many cases there are, how many are slower than torch, the median and the twelve lowest ratios."""
    lowest = sorted(ratios, key=lambda label: ratios[label])[:12]
    return {
        "cases": len(ratios),
        "slower": sum(ratio < _choices.SLOWER for ratio in ratios.values()),
        "median": median(ratios.values()),
        "lowest": {label: ratios[label] for label in lowest},
    }


if __name__ == "__main__":
    main()
