"""What the products of a linear layer move between the caches, on CPUs that need not be at hand.

Valgrind simulates the caches of a CPU and counts what misses them (its callgrind, with the simulator of
cachegrind). It knows no AVX-512, so that AVX2's loops run, on the blocks that both have in common. The last
level simulated is L2, so that its misses are what L3 and memory must bring. One thread; prefetching is not
simulated.

    python benchmarks/cache_traffic.py [--shape 2048,1000,1000]   needs valgrind and a C compiler
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# L1 and L2 of a core: bytes, ways, bytes of a line.
CPUS = {
    "Cascade Lake": ("32768,8,64", "1048576,16,64"),
    "Zen 4": ("32768,8,64", "1048576,8,64"),
    "Zen 5": ("49152,12,64", "1048576,16,64"),
}
PRODUCTS = ("forward", "dx", "dW")

# The program under valgrind sees the sizes of valgrind's own CPU: here it is told of those simulated.
REQUESTS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <unistd.h>
#include <valgrind/callgrind.h>
long sysconf(int name) {
  if (name == _SC_LEVEL2_CACHE_SIZE) return atol(getenv("SIMULATED_L2"));
  return ((long (*)(int))dlsym(RTLD_NEXT, "sysconf"))(name);
}
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2048,1000,1000", help="rows,in,out (2048,1000,1000)")
    parser.add_argument("--cpu", choices=CPUS, help="that one alone")
    parser.add_argument("--simulated", metavar="LIBRARY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = [int(side) for side in options.shape.split(",")]
    if options.simulated:
        multiply(shape, options.simulated)
        return
    rows, n_in, n_out = shape
    forward = rows * n_in + n_in * n_out + rows * n_out  # values of the operands and the result
    backward = forward + rows * n_out  # dy and y, W or x, and the result
    once = {"forward": 4e-6 * forward, "dx": 4e-6 * backward, "dW": 4e-6 * backward}
    print(f"{rows} x {n_in} x {n_out}, float32, elu: MB that miss, reading + writing")
    print("| CPU | product | operands, once | miss L1 | miss L2 |\n| --- | --- | --- | --- | --- |")
    for cpu in [options.cpu] if options.cpu else CPUS:
        l1, l2 = CPUS[cpu]
        for product, (d1, ll) in simulate(options.shape, l1, l2).items():
            print(f"| {cpu} | {product} | {once[product]:.0f} | {d1:.0f} | {ll:.0f} |", flush=True)


def simulate(shape: str, l1: str, l2: str) -> dict[str, tuple[float, float]]:
    """MB that miss L1 and L2, by product."""
    with tempfile.TemporaryDirectory() as folder:
        library, out = f"{folder}/requests.so", f"{folder}/out"
        compile_ = ["cc", "-O1", "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"]
        subprocess.run(compile_, input=REQUESTS.encode(), check=True)
        command = ["valgrind", "--tool=callgrind", "--cache-sim=yes", "--instr-atstart=no", f"--D1={l1}"]
        command += [f"--LL={l2}", f"--callgrind-out-file={out}", sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLPEXT_TUNE": "0"}
        environment |= {"LD_PRELOAD": library, "SIMULATED_L2": l2.partition(",")[0]}
        subprocess.run(
            [*command, "--shape", shape, "--simulated", library],
            env=environment,
            check=True,
            capture_output=True,
        )
        return {product: misses(Path(f"{out}.{part}")) for part, product in enumerate(PRODUCTS, 1)}


def misses(path: Path) -> tuple[float, float]:
    """MB that miss L1 and L2 in a dump of callgrind's."""
    lines = dict(line.partition(": ")[::2] for line in path.read_text().splitlines() if ": " in line)
    events = dict(zip(lines["events"].split(), map(int, lines["totals"].split()), strict=True))
    d1, ll = (64e-6 * (events[f"{level}mr"] + events[f"{level}mw"]) for level in ("D1", "DL"))
    return d1, ll


def multiply(shape: list[int], library: str) -> None:
    """The part that runs under valgrind: each product twice, of which the second is simulated."""
    import torch

    import mlpext

    assert mlpext._C.cpu_isa() == "avx2"
    rows, n_in, n_out = shape
    x, w, b = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
    y, g, elu = torch.randn(rows, n_out), torch.randn(rows, n_out), ("elu", (1.0,))
    linear: Any = torch.ops.mlpext.linear_activation
    backward: Any = torch.ops.mlpext.linear_activation_backward
    calls: list[Callable[[], object]] = [
        lambda: linear(x, w, b, *elu),
        lambda: backward(g, x, w, y, *elu, True, [True, False, False]),
        lambda: backward(g, x, w, y, *elu, True, [False, True, False]),
    ]
    requests = ctypes.CDLL(library)
    for call in calls:
        call()
        requests.start()
        call()
        requests.stop()


if __name__ == "__main__":
    main()
