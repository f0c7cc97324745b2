"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json: `make readme`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and TABLES below says what is in it.
tests/packaging/test_readme.py fails where the pages and the results differ: no figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md")
Case = dict[str, Any]


def results(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return read


def cases(name: str, pattern: str) -> Iterator[tuple[re.Match[str], Case]]:
    """The cases whose whole name the pattern matches."""
    for case in results(name)["cases"]:
        if found := re.fullmatch(pattern, case["name"]):
            yield found, case


def ratio(peer: str, case: Case) -> str:
    """The peer's time by ours: the median over the rounds."""
    return f"{case['ratios'][_full(peer, case)]['median']:.2f}"


def target(peer: str, case: Case) -> str:
    wanted: float | None = case["target"][_full(peer, case)]
    return "" if wanted is None else f"{wanted:g}"


def _full(peer: str, case: Case) -> str:
    """A peer by how its name begins; "": the first."""
    names: list[str] = list(case["ratios"])
    return next(name for name in names if name.startswith(peer))


def share(case: Case) -> str:
    """Of the multiply-add peak: that of float32, which pairs of bfloat16 double."""
    return f"{case['reached']['gflops'] / (2 if 'bfloat16' in case['name'] else 1):.2f}"


def kept(who: str, case: Case) -> str:
    return f"{case['kept'][who] / 1024:.0f}"


def microseconds(case: Case) -> str:
    return f"{case['contenders']['mlpext']['cpu_us']['median']:.2f}"


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)


def listed(name: str, head: str, pattern: str, *cells: Callable[[Case], str]) -> str:
    """A row for each case: what the groups of the pattern hold, then the cells."""
    rows = ([*found.groups(), *(cell(case) for cell in cells)] for found, case in cases(name, pattern))
    return f"{markdown(head.split(' | '), rows)}\n\n{measured(name)}"


def crossed(name: str, head: str, pattern: str) -> str:
    """Ratios: a row for each value of the pattern's group, a column for what is left of the case's name."""
    rows: dict[str, dict[str, str]] = {}
    for found, case in cases(name, pattern):
        rest = case["name"].replace(found[1], "").replace(", ,", ",").strip(", ")
        rows.setdefault(found[1], {})[rest] = ratio("", case)
    columns = [head, *next(iter(rows.values()))]
    return f"{markdown(columns, ([row, *cells.values()] for row, cells in rows.items()))}\n\n{measured(name)}"


def slower() -> str:
    """The activations on which torch is faster by more than the noise."""
    text = [
        f"at {size} "
        + ", ".join(
            f"{found[1]} {ratio('eager', case)}"
            for found, case in cases("activations", rf"float32 {size}, (\w+)")
            if case["ratios"]["eager"]["q3"] < 1
        )
        for size in ("1 M", "16 K")
    ]
    return textwrap.fill(f"Where torch is faster (ratio): {'; '.join(text)}.", 110)


def memory() -> str:
    kept = results("memory")["bytes_kept"].items()
    rows = [
        [f"linear + {name}", *(f"{bytes_[who]:g}" for who in ("eager", "mlpext"))]
        for name, bytes_ in kept
        if bytes_["mlpext"] < bytes_["eager"]
    ]
    return markdown(["bytes an output", "torch", "mlpext"], rows)


def measured(name: str) -> str:
    setting = results(name)["setting"]
    return (
        f"`benchmarks/{name}.py` on {setting['date'][:10]}: {setting['cpu']} ({setting['torch_isa']}), "
        f"one thread,\nload {setting['load_before']:.1f} on {setting['cpus_in_machine']} CPUs, "
        f"torch {setting['versions']['torch']}."
    )


SHAPE = r"(\(\d+, \d+, \d+\))"
EAGER = (partial(ratio, "eager"), partial(target, "eager"))
FUSE = "(PPO.*|DLRM.*|3 x Linear .*(?:Tanh|ReLU)|MLP-Mixer.*|autoencoder.*|SIREN.*|maxout.*)"
TABLES: dict[str, Callable[[], str]] = {
    "overhead": partial(
        crossed, "overhead", "linear + elu",
        r"((?:linear_activation|LinearActivation) \(\d+, 64\)x\(64, 64\)), .*",
    ),
    "linear": partial(
        listed, "linear", "dtype | work | (batch, in, out) | ratio | target | share of the peak",
        rf"(\w+) (\w+) {SHAPE}, eager", *EAGER, share,
    ),
    "linear, large": partial(
        listed, "linear", "linear + elu | (batch, in, out) | ratio | share of the peak",
        r"(\w+ \w+) (\(\d+, (?!64)\d+, \d+\)), eager", partial(ratio, "eager"), share,
    ),
    "linear peers": partial(
        listed, "linear", "work | (batch, in, out) | peer | ratio | target",
        rf"float32 (\w+) {SHAPE}, (oneDNN|JAX)", partial(ratio, ""), partial(target, ""),
    ),
    "linear maxout": partial(
        listed, "linear", "linear + maxout, training | amax | max(dim) | maximum of chunks",
        r"float32 training (.*, maxout of \d)",
        *(partial(ratio, peer) for peer in ("amax", "max(dim)", "maximum of chunks")),
    ),
    "activations": partial(
        listed, "activations", "1 M float32 values | ratio",
        r"float32 1 M, (tanh|mish|elu|gelu_tanh|sigmoid|silu)", partial(ratio, "eager"),
    ),
    "all activations": partial(
        crossed, "activations", "activation",
        r"(?!bf.*backward)\w+ (?:1 M|16 K), (\w+)(?:, forward \+ backward)?",
    ),
    "slower": slower,
    "large": partial(
        listed, "activations", "fresh output | torch | target | torch, huge pages | target",
        r"float32 (16 M, \w+), fresh output",
        *EAGER, partial(ratio, "eager, "), partial(target, "eager, "),
    ),
    "fuse": partial(
        listed, "fuse", "a step of training | ratio | target | KiB kept, torch | KiB kept, mlpext",
        FUSE, *EAGER, partial(kept, "eager"), partial(kept, "mlpext"),
    ),
    "memory": memory,
    "training": partial(
        listed, "training", "network | samples a step | us a sample | PyTorch loop | target | JAX | target",
        r"([\d-]+-10), (\w+) a step", microseconds,
        *(cell for peer in ("naive", "JAX") for cell in (partial(ratio, peer), partial(target, peer))),
    ),
}  # fmt: skip


def filled(page: str) -> str:
    """The text of a page with every table made anew."""
    return re.sub(
        r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text()))
