"""Maxout on CPU beside PyTorch's compositions: forward, forward + backward, bytes kept for backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import mlpext.functional as MF
from calls import bytes_kept, with_backward
from harness import OURS, Case, run

# Ratios wanted of max(dim), forward + backward.
TARGETS = {(64, 256): 8, (4096, 1024): 12}
PIECES = (2, 3, 4, 5)


def peers(pieces: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def maximum(x: Tensor) -> Tensor:
        first, *others = x.chunk(pieces, -1)
        for other in others:
            first = torch.maximum(first, other)
        return first

    return {
        "max(dim)": lambda x: x.unflatten(-1, (pieces, -1)).max(-2).values,
        "amax": lambda x: x.unflatten(-1, (pieces, -1)).amax(-2),
        "maximum of chunks": maximum,
    }


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for (rows, features), target in TARGETS.items():
        for pieces in PIECES:
            x = torch.randn(rows, pieces * features)
            calls: dict[str, Callable[..., Tensor]] = {
                **peers(pieces),
                OURS: partial(MF.maxout, pieces=pieces),
            }
            name = f"({rows}, {features}) of {pieces}"
            yield Case(
                f"{name}, forward",
                {peer: partial(call, x) for peer, call in calls.items()},
                {"max(dim)": 1, "amax": 1},
                bytes=x.nbytes * (1 + 1 / pieces),
            )
            leaf = x.requires_grad_()
            yield Case(
                f"{name}, forward + backward",
                {peer: with_backward(call, [leaf]) for peer, call in calls.items()},
                {"max(dim)": target},
                bytes=x.nbytes * (2 + 2 / pieces),
                kept={peer: bytes_kept(partial(call, leaf), []) for peer, call in calls.items()},
            )


if __name__ == "__main__":
    run(cases(), "Maxout")
