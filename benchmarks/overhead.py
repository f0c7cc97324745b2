"""What a call costs where the arithmetic is nearly nothing: small layers and 64 values, on one thread.

The target is 1 everywhere: what replaces a native function or module must not be slower even here.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

import mlpext
import mlpext.functional as MF
from harness import Case, run

# Where torch.nn.functional has no function of that name, or only a deprecated one.
NATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(TF.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "sine": lambda x: torch.sin(30.0 * x),
    "squareplus": lambda x: (x + torch.sqrt(x * x + 4.0)) / 2,
}
OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(MF.gelu, approximate="tanh"),
    "sine": partial(MF.sine, omega=30.0),
}


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
    modules = {
        "nn.Sequential(Linear, ELU)": nn.Sequential(nn.Linear(64, 64), nn.ELU()),
        "mlpext": mlpext.nn.LinearActivation(64, 64, activation="elu"),
    }
    yield from modes(f"linear_activation ({batch}, 64)x(64, 64)", functions, x, weight, bias)
    yield from modes(f"LinearActivation ({batch}, 64)x(64, 64)", modules, x)


def activation(name: str) -> Iterator[Case]:
    x = torch.randn(64)
    functions = {
        "native": NATIVE.get(name) or getattr(TF, name),
        "mlpext": OURS.get(name) or getattr(MF, name),
    }
    yield from modes(name, functions, x, backward=False)
    if hasattr(TF, name.removesuffix("_tanh")):
        modules = {"native": module(nn, name), "mlpext": module(mlpext.nn, name)}
        yield from modes(f"{name} module", modules, x, backward=False)


def module(namespace, name: str) -> nn.Module:
    if name == "gelu_tanh":
        return namespace.GELU(approximate="tanh")
    return next(
        getattr(namespace, word)() for word in dir(namespace) if word.lower() == name.replace("_", "")
    )


def maxout(batch: int) -> Iterator[Case]:
    pieces, x = 2, torch.randn(batch, 64)
    values = torch.randn(batch, pieces * 64)
    layer = mlpext.nn.Maxout(64, 64, pieces=pieces)
    weight, bias = layer.weight.detach(), layer.bias.detach()
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


def modes(
    name: str, calls: dict[str, Callable[..., Tensor]], *inputs: Tensor, backward: bool = True
) -> Iterator[Case]:
    """A case for each way of calling: nothing needs a gradient, something does, and with the backward too."""
    plain = [x.detach() for x in inputs]
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    frozen = {peer: copy.deepcopy(call) for peer, call in calls.items()}
    for call in frozen.values():
        if isinstance(call, nn.Module):
            call.requires_grad_(False)
    yield Case(f"{name}, no grad", {peer: partial(call, *plain) for peer, call in frozen.items()}, target=1)
    yield Case(f"{name}, forward", {peer: partial(call, *leaves) for peer, call in calls.items()}, target=1)
    if backward:
        steps = {peer: with_backward(call, leaves) for peer, call in calls.items()}
        yield Case(f"{name}, forward + backward", steps, target=1)


def with_backward(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    parameters = list(call.parameters()) if isinstance(call, nn.Module) else []
    wanted = [*inputs, *parameters]
    cotangent = torch.randn_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*inputs), wanted, cotangent)


if __name__ == "__main__":
    run(cases(), "Overhead")
