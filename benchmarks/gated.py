"""The MLPs of today's models on CPU, gated, down(f(gate(x)) * up(x)), and plain, beside PyTorch's: inference,
and training with the bytes that it keeps for backward, hidden activations included.

`--compile` adds torch.compile of PyTorch's in float32, which takes some minutes.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

import mlpext
from calls import bytes_kept, eager, module, with_backward
from harness import OURS, Case, run
from mlpext._names import Activation

# Rows, dim, hidden, and f: Llama's cut to a CPU, T5's, FT-Transformer's ReGLU, one row of a decoder.
SHAPES = {
    "Llama, 512 tokens": (512, 512, 1376, "silu"),
    "Llama, 64 tokens": (64, 2048, 5504, "silu"),
    "Llama, 1 token": (1, 512, 1376, "silu"),
    "T5, 512 tokens": (512, 512, 1024, "gelu_tanh"),
    "FT-Transformer, 256 rows of 20 columns": (5120, 192, 256, "relu"),
    "a layer of a policy": (32, 64, 172, "silu"),
}
# Plain: both MLPs of a block of MLP-Mixer S/16 and that of ViT-S, of one image.
PLAIN = {
    "MLP-Mixer, tokens": (512, 196, 256, "gelu"),
    "MLP-Mixer, channels": (196, 512, 2048, "gelu"),
    "ViT-S": (197, 384, 1536, "gelu"),
}
TRAINING = {"silu": 1.25, "gelu_tanh": 1.25, "relu": 1, "gelu": 1}


class Eager(nn.Module):
    def __init__(self, dim: int, hidden: int, name: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False) for sizes in ((dim, hidden), (dim, hidden), (hidden, dim))
        )
        self.f = eager(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.f(self.gate(x)) * self.up(x))


def pair(dim: int, hidden: int, name: str, gated: bool) -> tuple[nn.Module, nn.Module]:
    """PyTorch's network and ours, of the same weights."""
    if not gated:
        layers = nn.Sequential(nn.Linear(dim, hidden), module(nn, name), nn.Linear(hidden, dim))
        return layers, mlpext.nn.MLP.from_sequential(layers)
    theirs = Eager(dim, hidden, name)
    own = (theirs.gate, theirs.up, theirs.down)
    return theirs, mlpext.nn.GatedMLP.from_linear(*own, activation=cast(Activation, name))


def cases(compiled: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for title, (rows, dim, hidden, name) in (SHAPES | PLAIN).items():
            theirs, ours = pair(dim, hidden, name, gated=title in SHAPES)
            networks: dict[str, Callable[..., Tensor]] = {"eager": theirs.to(dtype), OURS: ours.to(dtype)}
            if compiled and dtype == torch.float32:
                torch.compiler.reset()  # after 8 networks Dynamo would leave the next ones uncompiled
                networks["torch.compile"] = torch.compile(theirs)
            x = torch.randn(rows, dim, dtype=dtype)
            label = f"{str(dtype).removeprefix('torch.')} {title}, {name}"
            flops = 2.0 * rows * dim * hidden * (3 if title in SHAPES else 2)
            yield Case(
                f"{label}, inference",
                {peer: without_gradient(network, x) for peer, network in networks.items()},
                {"eager": 1},
                flops=flops,
            )
            leaf = x.requires_grad_()
            kept = {
                peer: bytes_kept(partial(network, leaf), [leaf, *theirs.parameters(), *ours.parameters()])
                for peer, network in networks.items()
            }
            yield Case(
                f"{label}, training",
                {peer: with_backward(network, [leaf]) for peer, network in networks.items()},
                {"eager": TRAINING[name] if dtype == torch.float32 else 1},
                flops=3 * flops,
                kept=kept,
            )


def without_gradient(network: Callable[..., Tensor], x: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.no_grad():
            return network(x)

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--compile", action="store_true")
    options, rest = parser.parse_known_args()
    run(cases(options.compile), "Gated", rest)
