"""Bytes that training keeps for backward, by output value of a layer: torch ("eager") and mlpext.

Counted are the layer's output, which the next layer reads, and what autograd holds besides the input and the
parameters. Results go to benchmarks/results: memory.json, and a table of it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as TF
from torch import Tensor

import mlpext
import mlpext.functional as MF
from calls import bytes_kept, eager
from harness import RESULTS
from mlpext._names import Activation

ROWS, WIDTH = 256, 64
# Ours, as wanted; of the others no more than torch keeps.
TARGETS = {"leaky_relu": 4, "elu": 4, "selu": 4, "celu": 4, "maxout of 2": 5, "maxout of 4": 5}


def layers() -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], int]]:
    """Name, torch's layer, ours, and the pieces."""
    for name in mlpext.activations():
        f = eager(name) if name != "identity" else lambda z: z
        yield name, lambda x, w, b, f=f: f(TF.linear(x, w, b)), partial(activation_layer, name), 0
    for pieces in (2, 4):
        yield f"maxout of {pieces}", maximum, MF.linear_maxout, pieces


def activation_layer(name: Activation, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return MF.linear_activation(x, w, b, name)


def maximum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return TF.linear(x, w.flatten(0, 1), b.flatten()).unflatten(-1, (len(w), -1)).max(-2).values


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes kept for backward")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    folder = parser.parse_args().out
    torch.manual_seed(0)
    lines = [
        "# Memory",
        "",
        "Bytes kept for backward by output value of a layer: its output, which the next layer reads, and",
        f"what autograd holds besides x, W and b; float32, ({ROWS}, {WIDTH}) x ({WIDTH}, {WIDTH}), "
        f"torch {torch.__version__}.",
        "",
        "| layer | eager | mlpext | target | |",
        "|---|---|---|---|---|",
    ]
    kept = {}
    for name, theirs, mine, pieces in layers():
        k = (pieces,) if pieces else ()
        shapes = [(ROWS, WIDTH), (*k, WIDTH, WIDTH), (*k, WIDTH)]
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        before, after = (
            bytes_kept(partial(layer, *inputs), inputs, output=True) / (ROWS * WIDTH)
            for layer in (theirs, mine)
        )
        kept[name] = {"eager": before, "mlpext": after}
        target = TARGETS.get(name, before)
        verdict = "met" if after <= target else "missed"
        lines.append(f"| linear + {name} | {before:g} | {after:g} | {target:g} | {verdict} |")
    text = "\n".join(lines) + "\n"
    (folder / "memory.md").write_text(text)
    record = {"title": "Memory", "torch": torch.__version__, "bytes_kept": kept}
    (folder / "memory.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
