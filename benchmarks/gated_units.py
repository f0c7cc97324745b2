"""The product inside a gated unit on CPU, f(gate) * value, by `functional.gated` and by PyTorch's operators:
forward, and forward + backward with the bytes kept besides gate and value."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor

import mlpext.functional as MF
from calls import bytes_kept, eager, with_backward
from harness import OURS, Case, run
from mlpext._names import Activation

NAMES = ("silu", "gelu", "relu", "sigmoid")
ROWS = {"4 K": 2, "64 K": 32, "1 M": 512}  # of 2048 columns


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for size, rows in ROWS.items():
            gate, value = torch.randn(2, rows, 2048).to(dtype)
            for name in NAMES:
                yield from both(f"{str(dtype).removeprefix('torch.')} {size}, {name}", name, gate, value)
            halves = torch.randn(rows, 4096).to(dtype).chunk(2, -1)
            yield from both(f"{str(dtype).removeprefix('torch.')} {size}, silu of halves", "silu", *halves)


def both(label: str, name: str, gate: Tensor, value: Tensor) -> Iterator[Case]:
    f = eager(name)
    calls: dict[str, Callable[..., Tensor]] = {
        "eager": lambda gate, value: f(gate) * value,
        OURS: partial(MF.gated, activation=cast(Activation, name)),
    }
    yield Case(f"{label}, forward", {peer: partial(call, gate, value) for peer, call in calls.items()}, 1)
    leaves = [t.detach().requires_grad_() for t in (gate, value)]
    yield Case(
        f"{label}, forward + backward",
        {peer: with_backward(call, leaves) for peer, call in calls.items()},
        1,
        kept={peer: bytes_kept(partial(call, *leaves), leaves) for peer, call in calls.items()},
    )


if __name__ == "__main__":
    run(cases(), "Gated units")
