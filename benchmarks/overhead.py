"""What a call costs where the arithmetic is nearly nothing: small layers and 64 values, on one thread.

The target is 1 everywhere: what replaces a function or module of torch must not be slower even here.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import mlpext
import mlpext.functional as MF
from calls import eager, modes, module, ours
from harness import Case, run


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for batch in (1, 32):
        yield from linear_activation(batch)
    for name in mlpext.activations():
        if name != "identity":
            yield from activation(name)
    for batch in (1, 32):
        yield from maxout(batch)


def linear_activation(batch: int) -> Iterator[Case]:
    x, (weight, bias) = torch.randn(batch, 64), nn.Linear(64, 64).parameters()
    functions = {
        "F.elu(F.linear)": lambda x, w, b: TF.elu(TF.linear(x, w, b)),
        "mlpext": lambda x, w, b: MF.linear_activation(x, w, b, "elu"),
    }
    modules: dict[str, Callable[..., Tensor]] = {
        "nn.Sequential(Linear, ELU)": nn.Sequential(nn.Linear(64, 64), nn.ELU()),
        "mlpext": mlpext.nn.LinearActivation(64, 64, activation="elu"),
    }
    yield from modes(f"linear_activation ({batch}, 64)x(64, 64)", functions, x, weight, bias)
    yield from modes(f"LinearActivation ({batch}, 64)x(64, 64)", modules, x)


def activation(name: str) -> Iterator[Case]:
    x = torch.randn(64)
    functions = {
        "eager": eager(name),
        "mlpext": ours(name),
    }
    yield from modes(name, functions, x, backward=False)
    if hasattr(TF, name.removesuffix("_tanh")):
        modules: dict[str, Callable[..., Tensor]] = {
            "eager": module(nn, name),
            "mlpext": module(mlpext.nn, name),
        }
        yield from modes(f"{name} module", modules, x, backward=False)


def maxout(batch: int) -> Iterator[Case]:
    pieces, x = 2, torch.randn(batch, 64)
    values = torch.randn(batch, pieces * 64)
    layer = mlpext.nn.Maxout(64, 64, pieces=pieces)
    weight, bias = (parameter.detach() for parameter in layer.parameters())
    functions = {
        "unflatten.amax": lambda x: x.unflatten(-1, (pieces, -1)).amax(-2),
        "unflatten.max": lambda x: x.unflatten(-1, (pieces, -1)).max(-2).values,
        "maximum(chunk)": lambda x: torch.maximum(*x.chunk(pieces, -1)),
        "mlpext": lambda x: MF.maxout(x, pieces),
    }
    layers = {
        "F.linear, unflatten.amax": lambda x, w, b: (
            TF.linear(x, w.flatten(0, 1), b.flatten()).unflatten(-1, (pieces, -1)).amax(-2)
        ),
        "maximum of two F.linear": lambda x, w, b: torch.maximum(
            TF.linear(x, w[0], b[0]), TF.linear(x, w[1], b[1])
        ),
        "mlpext": lambda x, w, b: MF.linear_maxout(x, w, b),
    }
    yield from modes(f"maxout ({batch}, {pieces}*64)", functions, values)
    yield from modes(f"linear_maxout ({batch}, 64)x({pieces}, 64, 64)", layers, x, weight, bias)


if __name__ == "__main__":
    run(cases(), "Overhead")
