"""Epochs of gradient descent under jax.jit and lax.scan, for benchmarks/training.py, which runs this file
with an interpreter that has JAX. One JSON object a line on stdin, one answer a line on stdout:

    {"arrays": FILE.npz, "batch": 32, "unroll": 4, "lr": 0.1, "weights": OUT.npz}   builds the epoch, runs it
                    once and writes the weights that came of it; answers {"version": ...}
    {"repeats": n}  answers {"cpu": ns, "wall": ns} of n epochs
"""

import json
import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np


def build(arrays, batch, unroll, lr):
    def forward(params, x):
        *hidden, last = params
        for weight, bias in hidden:
            x = jnp.tanh(x @ weight.T + bias)
        return x @ last[0].T + last[1]

    def loss(params, x, d):
        return 0.5 * jnp.sum((forward(params, x) - d) ** 2) / batch

    def step(params, sample):
        slopes = jax.grad(loss)(params, *sample)
        return jax.tree.map(lambda p, g: p - lr * g, params, slopes), None

    epoch = jax.jit(lambda params, data: jax.lax.scan(step, params, data, unroll=unroll)[0], donate_argnums=0)
    layers = sum(name.startswith("w") for name in arrays)
    params = [(jnp.array(arrays[f"w{i}"]), jnp.array(arrays[f"b{i}"])) for i in range(layers)]
    data = tuple(jnp.array(arrays[name]).reshape(-1, batch, arrays[name].shape[1]) for name in "xd")
    return epoch, params, data


def main():
    for line in sys.stdin:
        request = json.loads(line)
        if "arrays" in request:
            with np.load(request["arrays"]) as arrays:
                epoch, params, data = build(arrays, request["batch"], request["unroll"], request["lr"])
            params = epoch(params, data)
            reached = {f"w{i}": weight for i, (weight, _) in enumerate(params)}
            reached |= {f"b{i}": bias for i, (_, bias) in enumerate(params)}
            np.savez(request["weights"], **reached)
            answer = {"version": jax.__version__}
        else:
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            for _ in range(request["repeats"]):
                params = epoch(params, data)
            jax.block_until_ready(params)
            answer = {"cpu": time.process_time_ns() - cpu, "wall": time.perf_counter_ns() - wall}
        print(json.dumps(answer), flush=True)


main()
