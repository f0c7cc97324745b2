"""Linear + activation and linear + maxout on CPU beside their peers, forward and training.

One case for each peer, because each has a target of its own. The targets were set on a machine (Zen 5) whose
torch's float32 product runs at 37 % of the multiply-add peak. Where it runs at 85 %, as on Zen 4, nothing can
be 2.5 times as fast: there, read the share of the peak.

    python benchmarks/linear.py                 the table
    python benchmarks/linear.py --compile       torch.compile as a peer too (minutes)

JAX (with XLA_FLAGS=--xla_cpu_multi_thread_eigen=false) and zentorch (forward only) are peers where they are
installed.
"""

import argparse
import importlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as TF
from torch import Tensor

import mlpext.functional as MF
from harness import OURS, Case, run

Shape = tuple[int, int, int]  # batch, in, out
Call = Callable[..., Tensor]

# Targets by peer.
FORWARD: dict[Shape, dict[str, float]] = {
    (1, 64, 64): {"eager": 5},
    (32, 64, 64): {"eager": 4},
    (256, 784, 256): {"eager": 2.6, "oneDNN": 1.35, "JAX": 1.6},
    (4096, 1024, 1024): {"eager": 2.5, "oneDNN": 1.2, "JAX": 1.6},
}
TRAINING: dict[Shape, dict[str, float]] = {
    (1, 64, 64): {"eager": 1},
    (32, 64, 64): {"eager": 2, "JAX": 1.3},
    (256, 784, 256): {"eager": 2.5, "JAX": 1.4},
    (4096, 1024, 1024): {"eager": 2.5, "JAX": 1.5},
    (8192, 512, 2048): {"eager": 2.5, "JAX": 1.6},
}
HALF_FORWARD: dict[Shape, dict[str, float]] = {
    (256, 784, 256): {"eager": 1.5, "zentorch": 1.2},
    (4096, 1024, 1024): {"eager": 1.3, "zentorch": 1.1},
}
HALF_TRAINING: dict[Shape, dict[str, float]] = {
    (256, 784, 256): {"eager": 1.5},
    (4096, 1024, 1024): {"eager": 1.4},
}
FORWARD_ONLY = ("oneDNN", "zentorch")
MAXOUT_TRAINING = {2: 3.0, 4: 4.0}
MAXOUT_SHAPE = (256, 784, 256)


def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return MF.linear_activation(x, w, b, "elu")


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return TF.elu(TF.linear(x, w, b))


def onednn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return TF.elu_(torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""))


def zentorch(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return TF.elu_(torch.ops.zentorch.zentorch_linear_unary(x, w, b))


def maxout_peers(pieces: int) -> dict[str, Call]:
    def net(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return TF.linear(x, w.flatten(0, 1), b.flatten())

    def maximum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        first, *others = net(x, w, b).chunk(pieces, -1)
        for other in others:
            first = torch.maximum(first, other)
        return first

    return {
        "max(dim)": lambda x, w, b: net(x, w, b).unflatten(-1, (pieces, -1)).max(-2).values,
        "amax": lambda x, w, b: net(x, w, b).unflatten(-1, (pieces, -1)).amax(-2),
        "maximum of chunks": maximum,
    }


def tensors(shape: Shape, dtype: torch.dtype, pieces: tuple[int, ...] = ()) -> list[Tensor]:
    rows, n_in, n_out = shape
    x, w, b = torch.randn(rows, n_in), torch.randn(*pieces, n_out, n_in), torch.randn(*pieces, n_out)
    return [t.to(dtype) for t in (x, w / math.sqrt(n_in), b)]


def training(call: Call, inputs: list[Tensor]) -> Callable[[], object]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    cotangent = torch.randn_like(call(*leaves))
    return lambda: torch.autograd.grad(call(*leaves), leaves, cotangent)


def jax_calls(inputs: list[Tensor]) -> tuple[Callable[[], object], Callable[[], object]]:
    import jax

    x, w, b = (jax.numpy.asarray(t.numpy()) for t in inputs)
    forward = jax.jit(lambda x, w, b: jax.nn.elu(x @ w.T + b))
    ones = jax.numpy.ones((x.shape[0], w.shape[0]), x.dtype)
    both = jax.jit(lambda x, w, b: (lambda y, pull: (y, pull(ones)))(*jax.vjp(forward, x, w, b)))
    return (
        lambda: forward(x, w, b).block_until_ready(),
        lambda: jax.block_until_ready(both(x, w, b)),
    )


def table(compiled: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    for dtype, forward, train in (
        (torch.float32, FORWARD, TRAINING),
        (torch.bfloat16, HALF_FORWARD, HALF_TRAINING),
    ):
        peers: dict[str, Call] = {"eager": eager, "oneDNN": onednn}
        if find_spec("zentorch"):
            importlib.import_module("zentorch")
            peers["zentorch"] = zentorch
        if compiled:
            peers["torch.compile"] = torch.compile(eager)
        for trains, targets in ((False, forward), (True, train)):
            for shape, wanted in targets.items():
                inputs = tensors(shape, dtype)
                make = (
                    (lambda call, i=inputs: training(call, i))
                    if trains
                    else (lambda call, i=inputs: partial(call, *i))
                )
                contenders = {
                    name: make(call) for name, call in peers.items() if not (trains and name in FORWARD_ONLY)
                }
                if find_spec("jax") and dtype == torch.float32:
                    contenders["JAX"] = jax_calls(inputs)[trains]
                mine = make(ours)
                flops = (6 if trains else 2) * math.prod(shape)
                work = f"{str(dtype).removeprefix('torch.')} {'training' if trains else 'forward'} {shape}"
                for name, call in contenders.items():
                    yield Case(f"{work}, {name}", {name: call, OURS: mine}, wanted.get(name), flops=flops)
    for pieces, target in MAXOUT_TRAINING.items():
        inputs = tensors(MAXOUT_SHAPE, torch.float32, (pieces,))
        calls = {**maxout_peers(pieces), OURS: MF.linear_maxout}
        yield Case(
            f"float32 training {MAXOUT_SHAPE}, maxout of {pieces}",
            {name: training(call, inputs) for name, call in calls.items()},
            target,
            flops=6 * pieces * math.prod(MAXOUT_SHAPE),
        )


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--compile", action="store_true")
    options, rest = parser.parse_known_args()
    run(table(options.compile), "Linear", rest)


if __name__ == "__main__":
    main()
