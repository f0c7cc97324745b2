"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results: `make readme`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and TABLES below says what is in it. What
was measured on several kinds of CPU, each in a folder of its own, stands side by side. No figure there is
typed by hand: tests/packaging/test_readme.py fails where the pages and the results differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md")
Record = dict[str, Any]


class Column(NamedTuple):
    """What a table says of a case; in a column for each CPU, unless it is the same on all of them."""

    head: str
    cell: Callable[[Record], str]
    everywhere: bool = False


def results(name: str) -> dict[str, Record]:
    """One record for each kind of CPU, by its name in tables."""
    return {
        path.parent.name.replace("-", " ").title(): json.loads(path.read_text())
        for path in sorted(RESULTS.glob(f"*/{name}.json"))
    }


def cases(name: str, pattern: str) -> Iterator[tuple[re.Match[str], dict[str, Record]]]:
    """The cases whose whole name the pattern matches, each by CPU."""
    found: dict[str, dict[str, Record]] = {}
    for cpu, record in results(name).items():
        for case in record["cases"]:
            found.setdefault(case["name"], {})[cpu] = case
    for label, by_cpu in found.items():
        if match := re.fullmatch(pattern, label):
            yield match, by_cpu


def ratio(peer: str, head: str = "ratio") -> Column:
    """The peer's time by ours: the median over the rounds."""
    return Column(head, lambda case: f"{case['ratios'][_full(peer, case)]['median']:.2f}")


def ratio_if(peer: str, head: str) -> Column:
    """Nothing where that peer was not measured."""
    column = ratio(peer, head)
    return column._replace(cell=lambda case: column.cell(case) if peer in case["ratios"] else "")


def target(peer: str) -> Column:
    def cell(case: Record) -> str:
        wanted: float | None = case["target"][_full(peer, case)]
        return "" if wanted is None else f"{wanted:g}"

    return Column("target", cell, everywhere=True)


def _full(peer: str, case: Record) -> str:
    """A peer by how its name begins; "": the first."""
    names: list[str] = list(case["ratios"])
    return next(name for name in names if name.startswith(peer))


def kept(who: str, head: str) -> Column:
    return Column(head, lambda case: f"{case['kept'][who] / 1024:.0f}", everywhere=True)


def kept_if(who: str, head: str) -> Column:
    """Nothing where a case keeps nothing."""
    column = kept(who, head)
    return column._replace(cell=lambda case: column.cell(case) if case["kept"] else "")


def _share(case: Record) -> str:
    return f"{case['reached']['gflops'] / (2 if 'bfloat16' in case['name'] else 1):.2f}"


# Of the multiply-add peak: that of float32, which pairs of bfloat16 double.
SHARE = Column("share of the peak", _share)
MICROSECONDS = Column("us a sample", lambda case: f"{case['contenders']['mlpext']['cpu_us']['median']:.2f}")


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)


def listed(name: str, head: str, pattern: str, *columns: Column) -> str:
    """A row for each case: what the groups of the pattern hold, then the columns."""
    cpus = list(results(name))

    def cells(column: Column, by_cpu: dict[str, Record]) -> list[str]:
        if column.everywhere:
            return [column.cell(next(iter(by_cpu.values())))]
        return [column.cell(by_cpu[cpu]) if cpu in by_cpu else "" for cpu in cpus]

    heads = head.split(" | ")
    for column in columns:
        one = column.everywhere or len(cpus) == 1
        heads += [column.head] if one else [f"{column.head}, {cpu}" for cpu in cpus]
    rows = (
        [*found.groups(), *(cell for column in columns for cell in cells(column, by_cpu))]
        for found, by_cpu in cases(name, pattern)
    )
    return f"{markdown(heads, rows)}\n\n{measured(name)}"


def crossed(name: str, head: str, pattern: str) -> str:
    """Ratios: a row for each value of the pattern's group, a column for what is left of the case's name."""
    rows: dict[str, dict[str, str]] = {}
    several = len(results(name)) > 1
    for found, by_cpu in cases(name, pattern):
        rest = found[0].replace(found[1], "").replace(", ,", ",").strip(", ")
        for cpu, case in by_cpu.items():
            column = f"{rest}, {cpu}" if several else rest
            rows.setdefault(found[1], {})[column] = ratio("").cell(case)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ([label, *(row.get(column, "") for column in columns)] for label, row in rows.items())
    return f"{markdown([head, *columns], lines)}\n\n{measured(name)}"


def everywhere() -> str:
    """For each group of cases how many are slower than torch and the lowest ratio, by CPU, instruction set
    (where it is not the best) and number of threads."""
    folders = sorted(path.parent for path in RESULTS.glob("**/everywhere.json"))
    settings = {
        folder.relative_to(RESULTS).as_posix(): json.loads((folder / "everywhere.json").read_text())
        for folder in folders
    }
    groups = list(dict.fromkeys(group for record in settings.values() for group in record["groups"]))
    rows = [[group, *(_slower(record["groups"][group]) for record in settings.values())] for group in groups]
    table = markdown(["slower than torch, lowest ratio", *settings], rows)
    return f"{table}\n\n" + "\n".join(_sentence("everywhere", *each) for each in settings.items())


def _slower(group: Record) -> str:
    return f"{group['slower']} of {group['cases']}, {min(group['lowest'].values()):.2f}"


def memory() -> str:
    kept = json.loads((RESULTS / "memory.json").read_text())["bytes_kept"].items()
    rows = [
        [f"linear + {name}", *(f"{bytes_[who]:g}" for who in ("eager", "mlpext"))]
        for name, bytes_ in kept
        if bytes_["mlpext"] < bytes_["eager"]
    ]
    return markdown(["bytes an output", "torch", "mlpext"], rows)


def measured(name: str) -> str:
    return "\n".join(_sentence(name, *each) for each in results(name).items())


def _sentence(name: str, where: str, record: Record) -> str:
    setting = record["setting"]
    cpu, threads = f"{setting['cpu']}, {setting['torch_isa']}", setting["threads"]
    load = f"{setting['load_before']:.1f} on {setting['cpus_in_machine']} CPUs"
    return (
        f"`benchmarks/{name.replace('-', '_')}.py` on {setting['date'][:10]}: {where} ({cpu}), "
        f"{'one thread' if threads == 1 else f'{threads} threads'},\n"
        f"load {load}, torch {setting['versions']['torch']}."
    )


SHAPE = r"(\(\d+, \d+, \d+\))"
EAGER = (ratio("eager"), target("eager"))
FUSE = (
    "(PPO.*|DLRM.*|3 x Linear .*(?:Tanh|ReLU)|MLP-Mixer.*|autoencoder.*|SIREN.*|Llama.*|GEGLU.*"
    "|Transformer.*|Linear 512 alone|maxout.*)"
)
TABLES: dict[str, Callable[[], str]] = {
    "overhead": partial(
        crossed, "overhead", "linear + elu",
        r"((?:linear_activation|LinearActivation) \(\d+, 64\)x\(64, 64\)), .*",
    ),
    "linear": partial(
        listed, "linear", "dtype | work | (batch, in, out)",
        rf"(\w+) (\w+) {SHAPE}, eager", *EAGER, SHARE,
    ),
    "linear peers": partial(
        listed, "linear", "work | (batch, in, out) | peer",
        rf"float32 (\w+) {SHAPE}, (oneDNN|JAX)", ratio(""), target(""),
    ),
    "linear maxout": partial(
        listed, "linear", "linear + maxout, training",
        r"float32 training (.*, maxout of \d)",
        *(ratio(peer, peer) for peer in ("amax", "max(dim)", "maximum of chunks")),
    ),
    "all activations": partial(
        crossed, "activations", "activation",
        r"(?!bf.*backward)\w+ (?:1 M|16 K), (\w+)(?:, forward \+ backward)?",
    ),
    "gated": partial(
        listed, "gated", "dtype | MLP | f | work",
        r"(\w+) (.*), (\w+), (inference|training)", *EAGER, ratio_if("torch.compile", "torch.compile"), SHARE,
        kept_if("eager", "KiB kept, torch"), kept_if("mlpext", "KiB kept, mlpext"),
    ),
    "gated units": partial(crossed, "gated-units", "values", r"(\w+ \d+ [KM]), .*"),
    "everywhere": everywhere,
    "large": partial(
        listed, "activations", "fresh output",
        r"float32 (16 M, \w+), fresh output",
        ratio("eager", "torch"), target("eager"), ratio("eager, ", "torch, huge pages"), target("eager, "),
    ),
    "fuse": partial(
        listed, "fuse", "a step of training",
        FUSE, *EAGER, kept("eager", "KiB kept, torch"), kept("mlpext", "KiB kept, mlpext"),
    ),
    "memory": memory,
    "training": partial(
        listed, "training", "network | samples a step",
        r"([\d-]+-10), (\w+) a step", MICROSECONDS,
        ratio("naive", "PyTorch loop"), target("naive"), ratio("JAX", "JAX"), target("JAX"),
    ),
    "scikit-learn": partial(
        listed, "sklearn", "network | optimizer | samples a step",
        r"([\d-]+-10), (\w+), (\d+) a step", MICROSECONDS, ratio("scikit-learn"), target("scikit-learn"),
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
