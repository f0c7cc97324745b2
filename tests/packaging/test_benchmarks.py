"""Every benchmark still runs: one round of a few cases, no claim about their speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.native, pytest.mark.launch]

FOLDER = Path(__file__).parents[2] / "benchmarks"
# What to measure of each: cases whose name has this text. gpu.py needs a GPU, memory.py times nothing.
CASES = {
    "activations": "16 K, elu",
    "everywhere": ": elu, float32, 100",
    "fuse": "PPO policy",
    "gated": "a layer of a policy",
    "gated_units": "bfloat16 4 K, silu",
    "linear": "(32, 64, 64)",
    "maxout": "(64, 256)",
    "overhead": "elu module",
    "sklearn": "64-100-10, sgd, 200",
    "training": "batch 1, inference",
}


def run(name, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "Agg"}
    command = [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", CASES)
def test_benchmark(name, tmp_path):
    options = ("--rounds", 1, "--sample-us", 1, "--only", CASES[name], "--out", tmp_path)
    done = run(name, *options)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("*.json")
    record = json.loads(written.read_text())
    if name == "everywhere":
        assert {group: found["cases"] for group, found in record["groups"].items()} == {
            "activation, forward": 1,
            "activation, backward": 1,
        }
        return
    cases = record["cases"]
    assert cases and all(CASES[name] in case["name"] for case in cases)
    assert all(time["cpu_us"]["median"] > 0 for case in cases for time in case["contenders"].values())


def test_memory(tmp_path):
    done = run("memory", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "missed" not in (tmp_path / "memory.md").read_text()


def test_every_benchmark_is_here():
    files = {file.stem for file in FOLDER.glob("*.py")}
    assert files - {"harness", "calls", "gpu", "cache_traffic"} == {*CASES, "memory"}
