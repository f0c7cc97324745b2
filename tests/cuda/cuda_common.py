"""What the tests of a GPU share. Without one, or without CUDA built in, all of them are skipped.

MLPEXT_TEST_DEVICE=cpu runs them on a CPU: with the package as it is, to see that the tests are right, and
with csrc/cuda in the place of csrc/cpu (test_cuda_tensors_emulated.py).
"""

import contextlib
import os

import pytest
import torch

from common import ON_GPU

DEVICE = os.environ.get("MLPEXT_TEST_DEVICE", "cuda")
needs_gpu = ON_GPU if DEVICE == "cuda" else pytest.mark.cuda
gpu_only = pytest.mark.skipif(DEVICE == "cpu", reason="streams, graphs and profiles of kernels are CUDA's")
OPERATORS = torch.ops.mlpext


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_a_side_stream(step):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = step()
    torch.cuda.synchronize()
    return results


def in_a_graph(step):
    """The graph, which keeps its memory, and the results of its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    return graph, captured


def here(tensors, **kwargs):
    return [t.detach().to(DEVICE, **kwargs).requires_grad_(t.requires_grad) for t in tensors]


def inputs(op, dtype=torch.float64, seed=0):
    return here(op.inputs(dtype, seed))


def gradients(f, tensors):
    y = f(*tensors)
    g = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [t for t in tensors if t.requires_grad], g)]
