"""Builds csrc/cuda's kernels for the CPU, by what stands in emulator/ for CUDA, and asks them for results."""

import concurrent.futures
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from common import FLOATS, values_of

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
OF_OUTPUT = ("identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "selu", "celu")
KERNELS = ("float64.cu", "float32.cu", "bfloat16.cu", "float16.cu")
COMPILER = [
    *os.environ.get("CXX", "c++").split(),
    *("-std=c++20", "-fno-strict-aliasing", "-ffp-contract=off", f"-I{EMULATOR}"),
]
SANITIZED = (
    "-O1",
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=all",
)
RACES = ("-O1", "-fsanitize=thread")


def build(name, *flags, activations=None, plant=None, sources=KERNELS):
    """The program; with some activations only, or with a fault in the place of a text in a file."""
    folder = ROOT / "build" / "cuda_emulator" / name
    folder.mkdir(parents=True, exist_ok=True)
    everything = sorted(p for top in (ROOT / "csrc", EMULATOR) for p in top.rglob("*") if p.is_file())
    key = hashlib.sha256(repr((COMPILER, flags, activations, plant, sources)).encode())
    for path in everything:
        key.update(path.read_bytes())
    with open(folder / "lock", "w") as lock:  # several workers run these tests: one builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / "stamp"
        if not stamp.exists() or stamp.read_text() != key.hexdigest():
            compile_and_link(folder, flags, activations, plant, sources)
            stamp.write_text(key.hexdigest())
    return Emulator(folder / "emulator")


def compile_and_link(folder, flags, activations, plant, sources):
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    source = shutil.copytree(ROOT / "csrc", folder / "csrc")
    if activations:
        edit(
            source / "formulas" / "activations.h",
            r"using Activations =[^;]+;",
            f"using Activations = {activations};",
        )
    if plant:
        file, text, fault = plant
        edit(source / file, re.escape(text), fault)
    files = [*(source / "cuda" / name for name in sources), EMULATOR / "main.cpp"]
    objects = [str(folder / f"{file.parent.name}-{file.stem}.o") for file in files]
    compile_ = [*COMPILER, *flags, f"-I{source}", "-x", "c++", "-c"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [[*compile_, str(f), "-o", o] for f, o in zip(files, objects, strict=True)]
        list(pool.map(command, jobs))
    command([*COMPILER, *flags, "-pthread", *objects, "-o", str(folder / "emulator")])


def edit(path, pattern, text):
    new, count = re.subn(pattern, lambda _: text, path.read_text())
    assert count == 1, f"{pattern} stands {count} times in {path.name}"
    path.write_text(new)


def command(words):
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


class Emulator:
    """One process for each request: a sanitizer ends it at the first fault."""

    def __init__(self, program):
        self.program = program

    def __call__(self, request, dtype, words, tensors, offset=0):
        """What the tensors hold afterwards; None is a null pointer, `offset` elements misalign each, or a
        list misaligns one by one."""
        offsets = offset if isinstance(offset, list) else [offset] * len(tensors)
        pairs = zip(tensors, offsets, strict=True)
        shapes = [(0, 0) if t is None else (t.nbytes, o * t.element_size()) for t, o in pairs]
        head = [request, FLOATS.index(dtype), *words, len(tensors), *(n for pair in shapes for n in pair)]
        data = b"".join(raw(t) for t in tensors if t is not None)
        data = " ".join(map(str, head)).encode() + b"\n" + data
        run = self.run([self.program], data)
        if b"unexpected memory mapping" in run.stderr:  # TSan, where the kernel scatters addresses widely
            run = self.run(["setarch", "-R", self.program], data)
        if run.returncode != 0:
            raise Fault(run.stderr.decode(errors="replace"))
        results, at = [], 0
        for t in tensors:
            size = 0 if t is None else t.nbytes
            part = (
                torch.frombuffer(bytearray(run.stdout[at : at + size]), dtype=torch.uint8) if size else None
            )
            results.append(None if t is None else t if not size else part.view(t.dtype).view(t.shape))
            at += size
        return results

    @staticmethod
    def run(command, data):
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
        return subprocess.run(command, input=data, capture_output=True, env={**os.environ, **options})

    def elementwise(
        self, name, kind, parameters, x, g=None, *, bias=None, layout=None, output=None, offset=0
    ):
        """`kind` 0: f(x + bias); 1: g f'(x); 2: g f' from y = x."""
        dims = [] if layout is None else [*layout[0], *(s for strides in layout[1] for s in strides)]
        output = poison(x) if output is None else output
        n = x.numel() if layout is None else int(np.prod(layout[0]))
        words = [name, kind, *two(name, parameters), n, 1 if bias is None else len(bias)]
        words += [0 if layout is None else len(layout[0]), *dims]
        inputs = (x, None) if g is None else (g, x)
        return self("elementwise", x.dtype, words, [output, *inputs, bias], offset)[0]

    def rows(self, name, kind, parameters, g, saved, pieces=1, g_strides=None, offset=0):
        rows, columns = saved.shape
        strides = [*(g_strides or (columns, 1)), columns, 1]
        dz, db = poison(g.new_empty(rows, pieces * columns)), poison(g.new_empty(pieces * columns))
        words = [name, kind, *two(name, parameters), rows, columns, pieces, *strides, g.element_size()]
        return self("rows", g.dtype, words, [g, saved, dz, db], offset)[2:]


class Fault(Exception):
    pass


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def poison(like):
    """Uninitialised memory, so to say: what no kernel writes stays recognisable."""
    return (
        torch.full((like.numel() * like.element_size(),), 0xA5, dtype=torch.uint8)
        .view(like.dtype)
        .view(like.shape)
    )


def two(name, parameters):
    values = [] if name == "maxout" else values_of(name, parameters)
    return [repr(float(v)) for v in (*values, 0.0, 0.0)][:2]
