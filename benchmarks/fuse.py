"""What `mlpext.fuse` does for a model: a step of training before and after, in time and in bytes kept.

Batch 256 unless a case says otherwise, float32. The target is 1.5 for multilayer perceptrons of three layers
with tanh and relu, and 1 (never slower) elsewhere. Bytes kept are those that autograd holds between forward
and backward: every storage once, parameters and the input aside.

    python benchmarks/fuse.py               a minute
    python benchmarks/fuse.py --compiled    both through torch.compile, target 1; then the fused model alone
                                            beside the compiled one, no target (four minutes)
    python benchmarks/fuse.py --sweep       widths 16 to 1024, batches 1 to 4096, target 1 (three minutes)
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import nn

import mlpext
from calls import bytes_kept
from harness import OURS, Case, run

BATCH = 256


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), act())]
    return nn.Sequential(*layers[:-1])


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, channels: int, token_hidden: int, channel_hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = mlp(tokens, token_hidden, tokens, act=nn.GELU)
        self.channels = mlp(channels, channel_hidden, channels, act=nn.GELU)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer S/32 (Tolstikhin et al., 2021): 49 patches of 32 x 32 pixels, 512 channels, 8 blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 512, 32, 32)
        self.blocks = nn.Sequential(*(MixerBlock(49, 512, 256, 2048) for _ in range(8)))
        self.norm, self.head = nn.LayerNorm(512), nn.Linear(512, 1000)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class DLRM(nn.Module):
    """The dense part of MLPerf's recommender (Naumov et al., 2019): 26 embeddings of 128 come as an input."""

    pairs: torch.Tensor

    def __init__(self):
        super().__init__()
        self.bottom = mlp(13, 512, 256, 128, act=nn.ReLU)
        self.bottom.append(nn.ReLU())
        self.top = mlp(479, 1024, 1024, 512, 256, 1, act=nn.ReLU)
        self.register_buffer("pairs", torch.tril_indices(27, 27, -1))

    def forward(self, x):
        dense, embedded = x[:, :13], x[:, 13:]
        dense = self.bottom(dense)
        vectors = torch.cat([dense, embedded], 1).unflatten(1, (27, 128))
        products = vectors @ vectors.transpose(1, 2)
        return self.top(torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1))


class Residual(nn.Module):
    def __init__(self, width: int = 256):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.ELU()

    def forward(self, x):
        y = self.act(self.fc1(x))
        y += x
        return self.act(self.fc2(y)) + y


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.critic = mlp(8, 64, 64, 4), mlp(8, 64, 64, 1)

    def forward(self, x):
        return torch.cat([self.actor(x), self.critic(x)], -1)


class SirenLayer(nn.Module):
    def __init__(self, i: int, o: int):
        super().__init__()
        self.linear = nn.Linear(i, o)

    def forward(self, x):
        return torch.sin(30 * self.linear(x))


class Functional(nn.Module):
    def __init__(self, width: int = 256):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.c(TF.silu(self.b(TF.elu(self.a(x)))))


class SwiGLU(nn.Module):
    """As in Llama, cut to a CPU."""

    def __init__(self, dim: int = 512, hidden: int = 1376):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down, self.act = nn.Linear(hidden, dim, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class GEGLU(nn.Module):
    """Both halves in one layer, as in diffusers."""

    def __init__(self, dim: int = 256, hidden: int = 1024):
        super().__init__()
        self.packed, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        value, gate = self.packed(x).chunk(2, -1)
        return self.down(value * TF.gelu(gate))


class Maxout(nn.Module):
    def __init__(self, width: int = 256, pieces: int = 4):
        super().__init__()
        self.linear, self.pieces = nn.Linear(width, pieces * width), pieces

    def forward(self, x):
        return self.linear(x).unflatten(-1, (self.pieces, -1)).max(-2).values


class Model(NamedTuple):
    name: str
    module: nn.Module
    shape: tuple[int, ...]
    target: float = 1
    graph: bool = False


def models() -> Iterator[Model]:
    smooth: tuple[type[nn.Module], ...] = (nn.ELU, nn.GELU, nn.SiLU)
    for act in (nn.Tanh, nn.ReLU):
        for width in (256, 512, 1024):
            model = mlp(width, width, width, width, act=act)
            model.append(act())
            yield Model(f"3 x Linear {width}, {act.__name__}", model, (BATCH, width), target=1.5)
    for each in smooth:
        yield Model(f"3 x Linear 512, {each.__name__}", mlp(512, 512, 512, 512, act=each), (BATCH, 512))
    normed = nn.Sequential(
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
    )
    dropout = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 256))
    encoder = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    siren = nn.Sequential(SirenLayer(2, 256), SirenLayer(256, 256), nn.Linear(256, 3))
    yield Model("autoencoder 784-256-32-256-784, ELU", mlp(784, 256, 32, 256, 784, act=nn.ELU), (BATCH, 784))
    yield Model("MLP-Mixer S/32, 2 images", Mixer(), (2, 3, 224, 224))
    yield Model("DLRM of MLPerf, dense part", DLRM(), (BATCH, 13 + 26 * 128))
    yield Model("PPO policy, 64 wide", Policy(), (BATCH, 8))
    yield Model("PPO policy, 64 wide, batch 1", Policy(), (1, 8))
    yield Model("residual with y += skip, 256", Residual(), (BATCH, 256))
    yield Model("batch norm between, 256", normed, (BATCH, 256))
    yield Model("dropout after, 256-512-256", dropout, (BATCH, 256))
    yield Model("SIREN 256", siren, (BATCH, 2))
    yield Model("functional elu, silu 256", Functional(), (BATCH, 256))
    yield Model("Llama's MLP 512-1376-512, 512 tokens", SwiGLU(), (512, 512))
    yield Model("Llama's MLP 512-1376-512, 64 tokens", SwiGLU(), (64, 512))
    yield Model("GEGLU 256-1024-256, packed", GEGLU(), (BATCH, 256))
    yield Model("TransformerEncoderLayer 256, 8 x 64 tokens", encoder, (8, 64, 256))
    yield Model("Linear 512 alone", nn.Linear(512, 512), (BATCH, 512))
    yield Model("maxout of 4 pieces 256, graph=True", Maxout(), (BATCH, 256), graph=True)
    yield Model("digits 64-32-10, batch 32", mlp(64, 32, 10), (32, 64))


def sweep() -> Iterator[Model]:
    for act, width, batch in product((nn.Tanh, nn.ReLU, nn.GELU), (16, 64, 256, 1024), (1, 8, 64, 512, 4096)):
        model = mlp(width, width, width, width, act=act)
        yield Model(f"3 x Linear {width}, {act.__name__}, batch {batch}", model, (batch, width))


def case(each: Model, compiled: bool) -> Iterator[Case]:
    model, x = each.module, torch.randn(*each.shape)
    fused = mlpext.fuse(model, graph=each.graph)
    steps = {"eager": training_step(model, x), OURS: training_step(fused, x)}
    if not compiled:
        known = [*model.parameters(), x]
        memory = {name: bytes_kept(partial(net, x), known) for name, net in (("eager", model), (OURS, fused))}
        yield Case(each.name, steps, each.target, kept=memory)
        return
    torch.compiler.reset()  # else the ninth model would run uncompiled
    by_inductor = {
        name: training_step(torch.compile(net, dynamic=False), x)
        for name, net in (("eager", model), (OURS, fused))
    }
    yield Case(each.name, by_inductor, target=1)
    yield Case(f"{each.name}, not compiled", {"compiled": by_inductor["eager"], OURS: steps[OURS]})


def training_step(model: Any, x: torch.Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())
    cotangent = torch.randn_like(model(x))
    return lambda: torch.autograd.grad(model(x), parameters, cotangent)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options, rest = parser.parse_known_args()
    title = "Fuse sweep" if options.sweep else "Fuse compiled" if options.compiled else "Fuse"
    torch.manual_seed(0)
    chosen = sweep() if options.sweep else models()
    run((each for model in chosen for each in case(model, options.compiled)), title, rest)


if __name__ == "__main__":
    main()
