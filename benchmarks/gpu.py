"""On a GPU: what memory and the tensor cores reach, then ours beside eager and torch.compile.

Times are CUDA events around enough calls for 2 ms, medians over rounds in which every contender takes its
turn; inputs are random. Where tensors fit the L2 cache, the time is that of a loop that finds them there.
Without a GPU, or without CUDA in this build, it says so and ends.

    python benchmarks/gpu.py [--rounds 21] [--only TEXT] [--autotune]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from statistics import median
from types import MappingProxyType

import torch
import torch.nn.functional as TF

import mlpext
import mlpext.functional as F
from calls import bytes_kept
from harness import OURS, RESULTS
from mlpext.training import fit_many
from training import LR, SIZES, check_same_error, naive, network, ours, train

BF16 = torch.bfloat16


@dataclass
class Case:
    name: str
    contenders: dict[str, Callable[[], object]]
    bytes: float = 0.0  # the least that has to move
    flops: float = 0.0
    target: float | dict[str, float] | None = None  # ratio eager / ours, or of each peer
    target_tbps: float | None = None
    units: dict[str, int] = field(default_factory=dict)  # what a call does several times


def random(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype).requires_grad_(grad)


def calling(f: Callable, *arguments: torch.Tensor) -> Callable[[], object]:
    return lambda: f(*arguments)


def backward_of(y: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(y, x, g, retain_graph=True)


def training(f: Callable, leaves: list[torch.Tensor], g: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(f(*leaves), leaves, g)


def compiled(f: Callable, autotune: bool) -> dict[str, Callable]:
    """The peers that torch.compile makes of torch's operators."""
    peers = {"compile": torch.compile(f, dynamic=False)}
    if autotune:
        peers["compile max-autotune"] = torch.compile(f, dynamic=False, mode="max-autotune-no-cudagraphs")
    return peers


EAGER = {
    "relu": TF.relu,
    "sigmoid": torch.sigmoid,
    "elu": TF.elu,
    "gelu": TF.gelu,
    "gelu_tanh": partial(TF.gelu, approximate="tanh"),
    "silu": TF.silu,
    "mish": TF.mish,
}
ACTIVATIONS = [name for name in EAGER if name != "gelu_tanh"]  # mlpext's is gelu(approximate="tanh")


def elementwise(n: int) -> Iterator[Case]:
    for dtype in (BF16, torch.float32):
        x, g = random(n, dtype=dtype), random(n, dtype=dtype)
        leaf = x.detach().requires_grad_()
        for name in ACTIVATIONS:
            ours, eager = getattr(F, name), EAGER[name]
            what = f"{name}, {str(dtype)[6:]}, 2^{n.bit_length() - 1}"
            forward = {OURS: calling(ours, x), "eager": calling(eager, x)}
            large = dtype == BF16
            yield Case(f"{what}, forward", forward, 2 * x.nbytes, target_tbps=2.85 if large else None)
            backward = {k: backward_of(f(leaf), leaf, g) for k, f in ((OURS, ours), ("eager", eager))}
            yield Case(f"{what}, backward", backward, 3 * x.nbytes, target_tbps=2.85 if large else None)


def maxout(n: int) -> Iterator[Case]:
    x, g = random(n // 4096, 8192, grad=True), random(n // 4096, 4096)
    eager = lambda t: t.unflatten(-1, (2, -1)).max(-2).values  # noqa: E731
    contenders = {OURS: training(lambda t: F.maxout(t, 2), [x], g), "eager": training(eager, [x], g)}
    yield Case("maxout of 2, bfloat16, 2^28 outputs, training", contenders, 14 * g.numel(), target=2.0)


def small() -> Iterator[Case]:
    x, g = random(10_000, dtype=torch.float32, grad=True), random(10_000, dtype=torch.float32)
    for name in ACTIVATIONS:
        contenders = {OURS: calling(getattr(F, name), x.detach()), "eager": calling(EAGER[name], x.detach())}
        yield Case(f"{name}, float32, 10^4, forward", contenders, target=1.0)
        contenders = {OURS: training(getattr(F, name), [x], g), "eager": training(EAGER[name], [x], g)}
        yield Case(f"{name}, float32, 10^4, training", contenders, target=1.0)


def layer_cases(
    what: str,
    functions: dict[str, Callable],
    leaves: list[torch.Tensor],
    g: torch.Tensor,
    flops: float,
    target: float | None = None,
) -> Iterator[Case]:
    """Inference, and a step of training, which has three products of the forward's size."""
    plain = [t.detach() for t in leaves]
    forward = {name: calling(f, *plain) for name, f in functions.items()}
    yield Case(f"{what}, forward", forward, flops=flops, target=1.0)
    steps = {name: training(f, leaves, g) for name, f in functions.items()}
    yield Case(f"{what}, training", steps, flops=3 * flops, target=target)


# rows, out_features, in_features; the ratio computed from the memory that an elementwise kernel saves
SHAPES = {
    (8192, 4096, 4096): 1.02,
    (8192, 4096, 1024): 1.06,
    (65536, 256, 256): 1.09,
    (8192, 1024, 1024): 1.06,
    (32, 256, 256): 1.0,
}


def linear(autotune: bool) -> Iterator[Case]:
    """relu and gelu_tanh have torch's fused product in the forward, the others an elementwise kernel."""
    for (rows, n_out, n_in), target in SHAPES.items():
        leaves = [random(rows, n_in, grad=True), random(n_out, n_in, grad=True), random(n_out, grad=True)]
        for name in ("relu", "gelu_tanh", "elu", "gelu"):
            eager = lambda x, w, b, f=EAGER[name]: f(TF.linear(x, w, b))  # noqa: E731
            ours = lambda x, w, b, name=name: F.linear_activation(x, w, b, activation=name)  # noqa: E731
            peers = compiled(eager, autotune and name in ("relu", "elu")) if rows > 32 else {}
            what = f"linear + {name}, bfloat16, {rows} x {n_out} x {n_in}"
            functions = {OURS: ours, "eager": eager, **peers}
            yield from layer_cases(
                what, functions, leaves, random(rows, n_out), 2.0 * rows * n_out * n_in, target
            )


def linear_maxout(autotune: bool) -> Iterator[Case]:
    """Several linear layers and their maximum."""

    def eager(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return TF.linear(x, w.flatten(0, 1), b.flatten()).unflatten(-1, w.shape[:2]).max(-2).values

    for rows, n_out, n_in, pieces in ((8192, 1024, 4096, 2), (8192, 4096, 1024, 2), (8192, 4096, 1024, 4)):
        leaves = [random(rows, n_in, grad=True), random(pieces, n_out, n_in, grad=True)]
        leaves.append(random(pieces, n_out, grad=True))
        functions = {OURS: F.linear_maxout, "eager": eager, **compiled(eager, autotune and pieces == 2)}
        what = f"linear + maxout of {pieces}, bfloat16, {rows} x {n_out} x {n_in}"
        yield from layer_cases(
            what, functions, leaves, random(rows, n_out), 2.0 * rows * pieces * n_out * n_in
        )


def narrow() -> Iterator[Case]:
    """Networks of 64 wide and 4 layers as one kernel, which is off unless asked for."""

    def switched(choice: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            os.environ["MLPEXT_CUDA_NARROW"] = choice
            return call()

        return run

    net = mlpext.nn.MLP([64] * 5, "relu", device="cuda", dtype=BF16)
    peer = torch.nn.Sequential(
        *[m for _ in range(4) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())][:-1]
    )
    peer = peer.to("cuda", BF16)
    functions = {OURS: (net, "1"), "layer by layer": (net, "0"), "eager": (peer, "0")}
    functions["compile"] = (torch.compile(peer, dynamic=False), "0")
    products = 4 * 64 * 64
    for rows, target in ((2**14, 5.0), (2**20, 2.0)):
        x, g = random(rows, 64), random(rows, 64)
        what = f"MLP 64 wide, 4 layers, bfloat16, 2^{rows.bit_length() - 1}"
        contenders = {
            name: switched(choice, torch.no_grad()(calling(f, x))) for name, (f, choice) in functions.items()
        }
        yield Case(f"{what}, inference", contenders, 2 * x.nbytes, 2.0 * rows * products)
        contenders = {
            name: switched(choice, training(lambda *_, f=f, x=x: f(x), list(f.parameters()), g))
            for name, (f, choice) in functions.items()
        }
        # Forward reads x and writes four outputs; backward reads x, three of them and g, and makes no dx.
        flops = 2.0 * rows * (3 * products - 64 * 64)
        yield Case(f"{what}, training", contenders, 10 * x.nbytes, flops, target=target)
    os.environ.pop("MLPEXT_CUDA_NARROW", None)


def graphed(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, d: torch.Tensor, batch: int
) -> Callable[[], None]:
    """An epoch of `naive`, its step in a CUDA graph as PyTorch's notes have it; it leaves the weights as they
    are."""
    inputs, wanted = x[:batch].clone(), d[:batch].clone()
    before = [weight.detach().clone() for weight in model.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            naive(model, optimizer, inputs, wanted, batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        naive(model, optimizer, inputs, wanted, batch)
    with torch.no_grad():
        for weight, value in zip(model.parameters(), before, strict=True):
            weight.copy_(value)

    def epoch() -> None:
        for next_inputs, next_wanted in zip(x.split(batch), d.split(batch), strict=True):
            inputs.copy_(next_inputs)
            wanted.copy_(next_wanted)
            graph.replay()

    return epoch


def training_epochs(batch: int = 32, epochs: int = 50) -> Iterator[Case]:
    """The native engine, by whole calls of fit, beside the loop that people write, plain and in a graph."""
    for name, sizes in SIZES.items():
        count = {"digits": 1792, "synthetic": 9984}[name]
        x, d = random(count, sizes[0], dtype=torch.float32), random(count, sizes[-1], dtype=torch.float32)
        start = network(sizes).cuda()
        loops = {"loop": deepcopy(start), "graphed loop": deepcopy(start)}
        sgd = {peer: torch.optim.SGD(model.parameters(), lr=LR) for peer, model in loops.items()}
        nets = [ours(start, sizes).cuda() for _ in range(64)]
        calls: dict[str, Callable[[], object]] = {
            OURS: partial(train, nets[0], x, d, batch, 1),
            "loop": partial(naive, loops["loop"], sgd["loop"], x, d, batch),
            "graphed loop": graphed(loops["graphed loop"], sgd["graphed loop"], x, d, batch),
        }
        for call in calls.values():
            call()
        check_same_error({OURS: nets[0], **loops}, x, d)
        calls[OURS] = partial(train, nets[0], x, d, batch, epochs)
        title = f"an epoch of {'-'.join(map(str, sizes))}, tanh, float32, {batch} a step"
        targets = {"loop": 20.0, "graphed loop": 3.0}
        yield Case(title, calls, target=targets, units={OURS: epochs})
        options = {"batch_size": batch, "lr": LR, "epochs": 5, "shuffle": False, "seed": 0}
        together = partial(fit_many, nets, x, d, engine="native", **options)
        yield Case(f"{title}, of 64 networks", calls | {OURS: together}, units={OURS: 5 * len(nets)})


def kept() -> dict[str, dict[str, float]]:
    """Bytes an output kept for backward, beside the inputs."""
    rows = {}
    for name in ("relu", "elu", "sigmoid", "gelu", "silu"):
        leaves = [random(256, 128, grad=True), random(512, 128, grad=True), random(512, grad=True)]
        layers = {
            OURS: lambda x, w, b, name=name: F.linear_activation(x, w, b, activation=name),
            "eager": lambda x, w, b, name=name: EAGER[name](TF.linear(x, w, b)),
        }
        rows[name] = {who: bytes_kept(partial(f, *leaves), leaves) / (256 * 512) for who, f in layers.items()}
    return rows


def microseconds(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in itertools.repeat(None, repeats):
        call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


def measure(
    contenders: dict[str, Callable[[], object]], rounds: int, units: Mapping[str, int] = MappingProxyType({})
) -> dict[str, list[float]]:
    names, repeats = list(contenders), {}
    for name, call in contenders.items():
        microseconds(call, 3)
        repeats[name] = max(1, min(2000, round(2e3 / max(microseconds(call, 3), 1.0))))
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(rounds):
        start = round_ % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(microseconds(contenders[name], repeats[name]) / units.get(name, 1))
    return times


def ceilings(rounds: int) -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of a large bfloat16 product."""
    source, target = random(2**30), random(2**30)
    a, b = random(8192, 8192), random(8192, 8192)
    contenders = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    fastest = {name: median(times) for name, times in measure(contenders, rounds).items()}
    return {
        "tbps": 2 * source.nbytes / fastest["copy"] / 1e6,
        "tflops": 2 * 8192**3 / fastest["product"] / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--autotune", action="store_true", help="torch.compile's max-autotune too (minutes)")
    options = parser.parse_args()
    if not torch.cuda.is_available() or not mlpext._C.has_cuda():
        print("cuda benchmark: skipped, there is no GPU or no CUDA in this build")
        return
    torch.manual_seed(0)
    gpu = torch.cuda.get_device_name()
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "versions": {"torch": torch.__version__, "mlpext": mlpext.__version__},
        "rounds": options.rounds,
        "ceilings": ceilings(options.rounds),
        "kept_bytes_per_output": kept(),
        "cases": [],
    }
    stem = RESULTS / f"cuda-{gpu.lower().replace(' ', '-')}"
    limits = record["ceilings"]
    print(f"{gpu}: copy {limits['tbps']:.2f} TB/s, product {limits['tflops']:.0f} TFLOP/s", flush=True)
    n = 2**28
    groups = (
        *(small(), narrow(), training_epochs(), linear(options.autotune), linear_maxout(options.autotune)),
        *(maxout(n), elementwise(n)),
    )
    for case in itertools.chain(*groups):
        if options.only not in case.name:
            continue
        times = measure(case.contenders, options.rounds, case.units)
        ours = median(times[OURS])
        row = {"name": case.name, "us": {name: sorted(values) for name, values in times.items()}}
        row["median_us"] = {name: median(values) for name, values in times.items()}
        row["ratio"] = {
            name: median(t / o for t, o in zip(values, times[OURS], strict=True))
            for name, values in times.items()
            if name != OURS
        }
        row["tbps"], row["tflops"] = case.bytes / ours / 1e6, case.flops / ours / 1e6
        row["target"], row["target_tbps"] = case.target, case.target_tbps
        record["cases"].append(row)
        print(line(row), flush=True)
        # At every case: tools/gpu_check.sh may run out of time.
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table(record))
    print(f"written: {stem}.json, .md")


def line(row: dict) -> str:
    peers = ", ".join(f"{ratio:.2f} against {name}" for name, ratio in row["ratio"].items())
    return f"  {row['name']}: {row['median_us'][OURS]:.1f} us, {peers}"


def table(record: dict) -> str:
    limits, versions = record["ceilings"], ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [
        "# CUDA",
        "",
        f"{record['date']}, {record['gpu']}; copy {limits['tbps']:.2f} TB/s read and written,",
        f"bfloat16 product {limits['tflops']:.0f} TFLOP/s; {versions}.",
        f"Medians of {record['rounds']} rounds; ratio: peer / mlpext.",
        "",
        "| case | mlpext us | TB/s | TFLOP/s | ratio | target |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        ratios = ", ".join(f"{name} **{ratio:.2f}**" for name, ratio in row["ratio"].items())
        wanted = row["target"] or row["target_tbps"]
        if isinstance(wanted, dict):
            target = ", ".join(f"{name} {ratio:g}" for name, ratio in wanted.items())
        else:
            target = f"{wanted:g}{'' if row['target'] else ' TB/s'}" if wanted else "-"
        rates = [f"{row[unit]:.2f}" if row[unit] else "-" for unit in ("tbps", "tflops")]
        lines.append(
            f"| {row['name']} | {row['median_us'][OURS]:.1f} | {' | '.join(rates)} | {ratios} | {target} |"
        )
    lines += ["", "| kept for backward, bytes an output | mlpext | eager |", "|---|---|---|"]
    for name, bytes_ in record["kept_bytes_per_output"].items():
        lines.append(f"| linear + {name} | {bytes_[OURS]:g} | {bytes_['eager']:g} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
