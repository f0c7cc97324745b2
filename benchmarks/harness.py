"""Measures contenders side by side, in one process, so that their ratio survives a busy machine.

A benchmark file says what to compare; this module does the rest:

    from harness import Case, run

    run([Case("elu, 64 values", {"eager": lambda: F.elu(x), "mlpext": lambda: ours.elu(x)})], "Overhead")

How it measures. One pinned thread unless told otherwise. Every contender takes one sample a round, in an
order that rotates from round to round, with the garbage collector off. A sample repeats the call until it
lasts `--sample-us`. Times are CPU times of the process (preemption does not count; shared caches and clocks
still do), with wall times beside them in the JSON. The ratio is peer / ours, taken within each round, where
both met the same weather; the table has its median and, as spread, the middle half. A target is met when
the median reaches it, and missed when the whole middle half lies below; between the two it is level: the
difference is smaller than the noise. The machine's limits (multiply-adds of a compiled loop in registers,
speed of Tensor.copy_ in memory) are measured in the same run.

Results go to benchmarks/results/CPU: JSON with everything, a table in Markdown, a picture.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from mlpext import _C, _choices

OURS = "mlpext"
RESULTS = Path(__file__).parent / "results"


# How a CPU is called in folders and tables, by vendor, family and model; another one is called by these.
CPUS = {
    "zen-2": ("AuthenticAMD", 23, (49, 96, 104, 113, 144)),
    "zen-3": ("AuthenticAMD", 25, (1, 8, 33, 64, 68, 80)),
    "zen-4": ("AuthenticAMD", 25, (17, 24, 97, 116, 117, 120, 160)),
    "zen-5": ("AuthenticAMD", 26, range(256)),
    "cascade-lake": ("GenuineIntel", 6, (85,)),
    "ice-lake": ("GenuineIntel", 6, (106, 108)),
    "sapphire-rapids": ("GenuineIntel", 6, (143,)),
}


@dataclass
class Case:
    """One question: a name, the contenders (ours is called "mlpext"), and the ratio that is wanted of ours,
    or one for each peer.

    `flops` and `bytes`, those of one call, add what ours reaches of the machine's limits; `kept`, bytes by
    contender, adds a column. Where contenders do different amounts of work a call, `units` has them (samples,
    steps), and times are those of a unit. Cases may come from a generator, so that only one case's tensors
    are alive at a time.
    """

    name: str
    contenders: Mapping[str, Callable[[], Any]]
    target: float | Mapping[str, float] | None = None
    _: KW_ONLY
    units: Mapping[str, int] | None = None
    flops: float | None = None
    bytes: float | None = None
    kept: Mapping[str, int] | None = None


class Elsewhere:
    """A contender in another process, which times itself: `measure(repeats)` calls it so many times, and
    returns CPU and wall time in ns."""

    def __init__(self, measure: Callable[[int], tuple[int, int]]) -> None:
        self.measure = measure

    def __call__(self) -> None:
        self.measure(1)


def run(cases: Iterable[Case], title: str, argv: Sequence[str] | None = None) -> None:
    """Measure the cases, print and write the results; with `--gate`, a missed target is exit status 1."""
    record, stem, gate = measure(cases, title, argv)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(_table(record))
    _picture(record, stem.with_suffix(".png"))
    verdicts = [
        _verdict(ratio, case["target"].get(name))
        for case in record["cases"]
        for name, ratio in case["ratios"].items()
    ]
    met, level, missed = (verdicts.count(word) for word in ("met", "level", "missed"))
    print(f"targets: {met} met, {level} level, {missed} missed; written: {stem}.json, .md, .png")
    if gate and missed:
        sys.exit(1)


def measure(
    cases: Iterable[Case], title: str, argv: Sequence[str] | None = None
) -> tuple[dict[str, Any], Path, bool]:
    """What was measured; the file to write it to, without a suffix; whether `--gate` was given."""
    options = _options(title, argv)
    cpus = _pin(options.threads)
    setting = _setting(cpus)
    print(f"{title}: {_setting_in_words(setting)}", flush=True)
    measured = []
    for case in cases:
        if options.only in case.name:
            measured.append(_measure(case, options, setting["limits"]))
            _print_progress(measured[-1])
    setting["load_after"] = os.getloadavg()[0]
    record = {"title": title, "rounds": options.rounds, "setting": setting, "cases": measured}
    stem = Path(options.out or folder(options.threads)) / (title.lower().replace(" ", "-"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    return record, stem, options.gate


def folder(threads: int = 1) -> Path:
    """Results of one kind of CPU, instruction set (where it is not the best) and number of threads."""
    cpu = _choices.cpu()
    unnamed = f"{cpu.vendor}-{cpu.family}-{cpu.model}"
    known = (name for name, (*kind, models) in CPUS.items() if [*cpu[:2]] == kind and cpu.model in models)
    name = next(known, unnamed if cpu.vendor else "unknown")
    other = "" if _C.cpu_isa() == _C.cpu_isas()[-1] else _C.cpu_isa()
    return RESULTS / name / other / (f"{threads}-threads" if threads > 1 else "")


def _options(title: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Benchmark: {title}")
    parser.add_argument("--rounds", type=int, default=41, help="samples of each contender (default 41)")
    parser.add_argument("--sample-us", type=float, default=200, help="shortest sample (default 200)")
    parser.add_argument("--threads", type=int, default=1, help="threads, each on its own CPU (default 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--out", metavar="FOLDER", help="where the results go (results/CPU)")
    parser.add_argument("--gate", action="store_true", help="fail if a target is missed")
    return parser.parse_args(argv)


# Measuring.


def _measure(case: Case, options: argparse.Namespace, limits: Mapping[str, float | None]) -> dict[str, Any]:
    names = list(case.contenders)
    repeats = {name: _repeats(case.contenders[name], options.sample_us * 1e3) for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(options.rounds):
            start = round_ % len(names)
            for name in names[start:] + names[:start]:
                cpu_ns, wall_ns = sample(case.contenders[name], repeats[name])
                done = repeats[name] * (case.units[name] if case.units else 1)
                cpu[name].append(cpu_ns / done / 1e3)
                wall[name].append(wall_ns / done / 1e3)
    finally:
        gc.enable()

    ratios = {
        name: _summary([theirs / ours for theirs, ours in zip(cpu[name], cpu[OURS], strict=True)])
        for name in names
        if name != OURS and OURS in names
    }
    reached = {}
    for work, limit in ((case.flops, "gflops"), (case.bytes, "copy_gbps")):
        if work and (most := limits[limit]) and OURS in names:
            reached[limit] = work / median(cpu[OURS]) / 1e3 / most
    return {
        "name": case.name,
        "target": case.target if isinstance(case.target, Mapping) else dict.fromkeys(ratios, case.target),
        "ratios": ratios,
        "reached": reached,
        "kept": case.kept,
        "contenders": {
            name: {"cpu_us": _summary(cpu[name]), "wall_us": _summary(wall[name]), "repeats": repeats[name]}
            for name in names
        },
    }


def sample(call: Callable[[], Any], repeats: int) -> tuple[int, int]:
    if isinstance(call, Elsewhere):
        return call.measure(repeats)
    turns = itertools.repeat(None, repeats)
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    for _ in turns:
        call()
    return time.process_time_ns() - cpu, time.perf_counter_ns() - wall


def _repeats(call: Callable[[], Any], sample_ns: float) -> int:
    """How many calls make a sample long enough; finding out also warms the call up."""
    call()
    repeats = 1
    while (took := min(sample(call, repeats)[0] for _ in range(2))) < sample_ns:
        repeats = max(repeats + 1, min(4 * repeats, round(1.1 * repeats * sample_ns / max(took, 1))))
    return repeats


def _summary(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "min": min(values), "q1": low, "q3": high}


def _verdict(ratio: Mapping[str, float], target: float | None) -> str:
    if target is None:
        return "-"
    if ratio["median"] >= target:
        return "met"
    return "level" if ratio["q3"] >= target else "missed"


# The machine.


def _pin(threads: int) -> list[int]:
    """Threads of their own on the last CPUs: the first one is where interrupts tend to land."""
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return []
    cpus = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, cpus)
    return cpus


def _setting(cpus: list[int]) -> dict[str, Any]:
    load = os.getloadavg()[0]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "mlpext", "jax", "zentorch", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _choices.cpu().name or platform.processor() or "unknown",
        "isa": _C.cpu_isa(),
        "torch_serves": _choices.in_use.source,
        "cpus_in_machine": os.cpu_count(),
        "pinned_to": cpus,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "limits": {"gflops": _fma_peak(), "copy_gbps": _copy_speed()},
        "load_before": load,
    }


# Twelve independent chains of vector multiply-adds, enough to keep two pipes of latency four to five full.
_FMA = """
#ifdef __AVX512F__
typedef float lanes __attribute__((vector_size(64)));
#else
typedef float lanes __attribute__((vector_size(32)));
#endif
enum { chains = 12 };
float fma_loop(long turns) {
  lanes a[chains], x = {0}, y = {0};
  x += 0.999f; y += 0.001f;
  for (int k = 0; k < chains; k++) a[k] = y + (float)k;
  for (long t = 0; t < turns; t++) {
    _Pragma("GCC unroll 12") for (int k = 0; k < chains; k++) a[k] = a[k] * x + y;
  }
  for (int k = 1; k < chains; k++) a[0] += a[k];
  return a[0][0];
}
long fma_flops(void) { return 2L * chains * (long)(sizeof(lanes) / sizeof(float)); }
"""


def _fma_peak() -> float | None:
    """Float32 multiply-adds of one core, in 1e9 operations a second, by a compiled loop in registers."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fma.so"
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", library]
        command = [os.environ.get("CC", "cc"), *flags, "-x", "c", "-"]
        try:
            subprocess.run(command, input=_FMA.encode(), check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        code = ctypes.CDLL(library)
    code.fma_loop.restype, code.fma_loop.argtypes = ctypes.c_float, [ctypes.c_long]
    code.fma_flops.restype = ctypes.c_long
    turns = 1_000_000
    fastest = min(sample(lambda: code.fma_loop(turns), 1)[0] for _ in range(20))
    return float(turns * code.fma_flops() / fastest)


def _copy_speed() -> float:
    """Bytes read and written by Tensor.copy_ of 128 MiB, in 1e9 a second."""
    source, target = torch.ones(32 << 20), torch.zeros(32 << 20)
    fastest = min(sample(lambda: target.copy_(source), 1)[0] for _ in range(10))
    return 2 * source.nbytes / fastest


# The results.


def _setting_in_words(setting: Mapping[str, Any]) -> str:
    limits = setting["limits"]
    peak = f"{limits['gflops']:.0f} GFLOP/s" if limits["gflops"] else "not measured (no C compiler)"
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    load = f"{setting['load_before']:.1f}"
    if "load_after" in setting:
        load += f" before, {setting['load_after']:.1f} after"
    return (
        f"{setting['date']}, {setting['cpu']} ({setting['torch_isa']}), "
        f"torch serves {setting['torch_serves']}, "
        f"{setting['threads']} pinned thread(s) of {setting['cpus_in_machine']} CPUs, load {load}; "
        f"float32 multiply-add peak of one core {peak}, copy {limits['copy_gbps']:.0f} GB/s; {versions}"
    )


def _print_progress(case: Mapping[str, Any]) -> None:
    ours = case["contenders"].get(OURS)
    figures = [f"{ours['cpu_us']['median']:.2f} us"] if ours else []
    for name, ratio in case["ratios"].items():
        verdict = _verdict(ratio, case["target"].get(name))
        figures.append(f"{ratio['median']:.2f} against {name}" + ("" if verdict == "-" else f" ({verdict})"))
    if not case["ratios"]:
        figures += [f"{name} {c['cpu_us']['median']:.2f} us" for name, c in case["contenders"].items()]
    print(f"  {case['name']}: {', '.join(figures)}", flush=True)


def _table(record: Mapping[str, Any]) -> str:
    kept = any(case["kept"] for case in record["cases"])
    columns = "| case | mlpext | peer | peer's time | ratio | target | |" + " bytes kept, peer's |" * kept
    lines = [
        f"# {record['title']}",
        "",
        f"{_setting_in_words(record['setting'])}.",
        "",
        "CPU time of one call, sample or step in us: median (minimum; middle half). Ratio: peer / mlpext,",
        f"median and middle half over {record['rounds']} rounds; above 1, mlpext is faster.",
        "",
        columns,
        "|---" * (columns.count("|") - 1) + "|",
    ]
    for case in record["cases"]:
        contenders = case["contenders"]
        ours = _figure(contenders[OURS]["cpu_us"]) if OURS in contenders else "-"
        words = {"gflops": "multiply-add peak", "copy_gbps": "copy speed"}
        ours += "".join(f", {part:.0%} of {words[limit]}" for limit, part in case["reached"].items())
        for name in [name for name in contenders if name != OURS] or ["-"]:
            figure = target = verdict = "-"
            if name in case["ratios"]:
                ratio, wanted = case["ratios"][name], case["target"].get(name)
                figure = f"**{ratio['median']:.2f}** ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
                target = "-" if wanted is None else f"{wanted:g}"
                verdict = _verdict(ratio, wanted)
            theirs = _figure(contenders[name]["cpu_us"]) if name in contenders else "-"
            cells = [case["name"], ours, name, theirs, figure, target, verdict]
            if case["kept"]:
                cells.append(f"{case['kept'][OURS]:,}, {case['kept'][name]:,}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(us: Mapping[str, float]) -> str:
    middle, least, low, high = (f"{us[key]:#.3g}" if us[key] < 1000 else f"{us[key]:.0f}" for key in us)
    return f"{middle} ({least}; {low}-{high})"


def _picture(record: Mapping[str, Any], path: Path) -> None:
    """One bar for each case and peer, with the target as a line across its bar."""
    bars = [(case, name) for case in record["cases"] for name in case["ratios"]]
    if not bars:
        return
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.17 * len(bars)), layout="constrained")
    for y, (case, name) in enumerate(bars):
        ratio = case["ratios"][name]
        middle = ratio["median"]
        target = case["target"].get(name)
        color = "#c44e52" if _verdict(ratio, target) == "missed" else "#4c72b0"
        spread = [[middle - ratio["q1"]], [ratio["q3"] - middle]]
        axes.barh(y, middle, xerr=spread, color=color, ecolor="#888888", height=0.7)
        if target is not None:
            axes.plot([target] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1)
    labels = [case["name"] if name in case["name"] else f"{case['name']} / {name}" for case, name in bars]
    axes.set_yticks(range(len(bars)), labels, fontsize=7)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlabel("peer's CPU time / mlpext's (longer: mlpext faster; black line: target)")
    setting = record["setting"]
    axes.set_title(f"{record['title']}: {setting['threads']} thread(s), {setting['cpu']}", fontsize=9)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
