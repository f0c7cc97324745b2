"""What `mlpext.fuse` does for a model: a step of training before and after, in time and in bytes kept.

Batch 256, float32. The target is 1.5 for multilayer perceptrons of three layers with tanh and relu, and 1
(never slower) elsewhere. With `--compiled`, both through torch.compile, where the target is 1.

A picture and a table of the time come from the harness; `fuse-memory.md` has the bytes that autograd keeps
between forward and backward.
"""

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import nn

import mlpext
from harness import RESULTS, Case, run

BATCH = 256
BYTES: dict[str, tuple[int, int]] = {}


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), act())]
    return nn.Sequential(*layers[:-1])


class MixerBlock(nn.Module):
    def __init__(self, tokens: int = 16, channels: int = 128):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = mlp(tokens, 64, tokens, act=nn.GELU)
        self.channels = mlp(channels, 512, channels, act=nn.GELU)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


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


class Maxout(nn.Module):
    def __init__(self, width: int = 256, pieces: int = 4):
        super().__init__()
        self.linear, self.pieces = nn.Linear(width, pieces * width), pieces

    def forward(self, x):
        return self.linear(x).unflatten(-1, (self.pieces, -1)).max(-2).values


def cases(compiled: bool) -> Iterator[Case]:
    target = 1.0 if compiled else 1.5
    for act in (nn.Tanh, nn.ReLU):
        for width in (256, 512, 1024):
            model = mlp(width, width, width, width, act=act)
            model.append(act())
            yield case(f"3 x Linear {width}, {act.__name__}", model, (BATCH, width), target, compiled)
    for act in (nn.ELU, nn.GELU, nn.SiLU):
        model = mlp(512, 512, 512, 512, act=act)
        yield case(f"3 x Linear 512, {act.__name__}", model, (BATCH, 512), 1, compiled)
    normed = nn.Sequential(
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()
    )
    dropout = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 256))
    siren = nn.Sequential(SirenLayer(2, 256), SirenLayer(256, 256), nn.Linear(256, 3))
    for name, model, shape, graph in (
        ("autoencoder 784-256-32-256-784, ELU", mlp(784, 256, 32, 256, 784, act=nn.ELU), (BATCH, 784), False),
        ("MLP-Mixer block, 16 tokens of 128", MixerBlock(), (16, 16, 128), False),
        ("PPO policy, 64 wide", Policy(), (BATCH, 8), False),
        ("PPO policy, 64 wide, batch 1", Policy(), (1, 8), False),
        ("DLRM tower 13-512-256-64", mlp(13, 512, 256, 64, act=nn.ReLU), (BATCH, 13), False),
        ("residual with y += skip, 256", Residual(), (BATCH, 256), False),
        ("batch norm between, 256", normed, (BATCH, 256), False),
        ("dropout after, 256-512-256", dropout, (BATCH, 256), False),
        ("SIREN 256, graph=True", siren, (BATCH, 2), True),
        ("functional elu, silu 256, graph=True", Functional(), (BATCH, 256), True),
        ("maxout of 4 pieces 256, graph=True", Maxout(), (BATCH, 256), True),
        ("digits 64-32-10, batch 32", mlp(64, 32, 10), (32, 64), False),
    ):
        yield case(name, model, shape, 1, compiled, graph)


def case(
    name: str, model: nn.Module, shape: tuple[int, ...], target: float, compiled: bool, graph: bool = False
) -> Case:
    fused, x = mlpext.fuse(model, graph=graph), torch.randn(*shape)
    BYTES[name] = kept(model, x), kept(fused, x)
    if compiled:
        model, fused = torch.compile(model), torch.compile(fused)
    return Case(name, {"native": training_step(model, x), "mlpext": training_step(fused, x)}, target=target)


def training_step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    parameters = list(model.parameters())
    cotangent = torch.randn_like(model(x))
    return lambda: torch.autograd.grad(model(x), parameters, cotangent)


def kept(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes kept for backward: every storage once, parameters and the input aside."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), x]}
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storages.values())


def write_bytes(path: Path) -> None:
    lines = [
        "# Bytes kept for backward",
        "",
        "Every storage once, parameters and the input aside.",
        "",
        "| case | before | after fuse | ratio |",
        "|---|---|---|---|",
    ]
    lines += [f"| {name} | {a:,} | {b:,} | {b / a:.2f} |" for name, (a, b) in BYTES.items()]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    compiled = "--compiled" in sys.argv
    arguments = [word for word in sys.argv[1:] if word != "--compiled"]
    torch.manual_seed(0)
    run(cases(compiled), "Fuse compiled" if compiled else "Fuse", arguments)
    if not compiled:
        write_bytes(RESULTS / "fuse-memory.md")
