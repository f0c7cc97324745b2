"""Activations on CPU: arithmetic (1 M values), in cache (16 K), forward + backward, and large fresh outputs.

Targets were set on another machine (Zen 5, whose 512-bit units are twice as wide as those of Zen 4).
Everything that has no target of its own has 1: never slower than torch.

    python benchmarks/activations.py               peers: torch ("eager"), and JAX where it is installed
    python benchmarks/activations.py --compile     torch.compile too (minutes)
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

import mlpext
from calls import eager, ours, with_backward
from harness import OURS, Case, Elsewhere, run, sample

NAMES: list[str] = [name for name in mlpext.activations() if name != "identity"]
MILLION = 1 << 20
FORWARD = {"tanh": 12, "elu": 7, "mish": 12, "gelu_tanh": 6, "sigmoid": 1.5, "silu": 1.8}
JAX = {"tanh": 2, "mish": 10, "gelu_tanh": 3}
COMPILED = {"elu": 2}
HALF = {"tanh": 12, "sigmoid": 3, "elu": 8, "relu": 3}
BOTH = {"tanh": 3, "elu": 2, "mish": 6}
LARGE = {"relu": (12, 2), "elu": (16, 6), "tanh": (24, 14)}
HUGE_PAGES = "eager, THP_MEM_ALLOC_ENABLE=1"


def cases(compiled: bool) -> Iterator[Case]:
    torch.manual_seed(0)
    for dtype, targets in ((torch.float32, FORWARD), (torch.bfloat16, HALF)):
        x = 2 * torch.randn(MILLION).to(dtype)
        for name in NAMES:
            calls: dict[str, Callable[[], object]] = {
                "eager": partial(eager(name), x),
                OURS: partial(ours(name), x),
            }
            wanted = {"eager": targets.get(name, 1)}
            if dtype == torch.float32 and name in JAX and find_spec("jax"):
                calls["JAX"], wanted["JAX"] = jax_call(name, x), JAX[name]
            if dtype == torch.float32 and name in COMPILED and compiled:
                calls["torch.compile"] = partial(torch.compile(eager(name)), x)
                wanted["torch.compile"] = COMPILED[name]
            yield Case(f"{short(dtype)} 1 M, {name}", calls, wanted, bytes=2 * x.nbytes)
    for dtype in (torch.float32, torch.bfloat16):
        x = 2 * torch.randn(1 << 14).to(dtype)
        for name in NAMES:
            calls = {"eager": partial(eager(name), x), OURS: partial(ours(name), x)}
            yield Case(f"{short(dtype)} 16 K, {name}", calls, 1)
        leaf = x.clone().requires_grad_()
        for name in NAMES:
            steps = {
                "eager": with_backward(eager(name), [leaf]),
                OURS: with_backward(ours(name), [leaf]),
            }
            target = BOTH.get(name, 1) if dtype == torch.float32 else 1
            yield Case(f"{short(dtype)} 16 K, {name}, forward + backward", steps, target)
    x = torch.randn(16 * MILLION)
    with WithHugePages(len(x)) as elsewhere:
        for name, large in LARGE.items():
            calls = {
                "eager": partial(eager(name), x),
                HUGE_PAGES: elsewhere(name),
                OURS: partial(ours(name), x),
            }
            wanted = dict(zip(("eager", HUGE_PAGES), large, strict=True))
            yield Case(f"float32 16 M, {name}, fresh output", calls, wanted, bytes=2 * x.nbytes)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def jax_call(name: str, x: Tensor) -> Callable[[], object]:
    import jax

    functions = {
        "tanh": jax.numpy.tanh,
        "mish": jax.nn.mish,
        "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    }
    call, array = jax.jit(functions[name]), jax.numpy.asarray(x.numpy())
    return lambda: call(array).block_until_ready()


class WithHugePages:
    """torch in a process whose allocator is told to use huge pages."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> Callable[[str], Elsewhere]:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        self.process = context.Process(target=_serve, args=(theirs, self.size), daemon=True)
        self.process.start()
        del os.environ["THP_MEM_ALLOC_ENABLE"]
        return lambda name: Elsewhere(partial(self.measure, name))

    def measure(self, name: str, repeats: int) -> tuple[int, int]:
        self.pipe.send((name, repeats))
        return self.pipe.recv()

    def __exit__(self, *_: object) -> None:
        self.pipe.send(None)
        self.process.join()


def _serve(pipe, size: int) -> None:
    torch.set_num_threads(1)
    x = torch.randn(size)
    while request := pipe.recv():
        name, repeats = request
        pipe.send(sample(partial(eager(name), x), repeats))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--compile", action="store_true")
    options, rest = parser.parse_known_args()
    run(cases(options.compile), "Activations", rest)
