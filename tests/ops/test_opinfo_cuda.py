"""PyTorch's own samples of every counterpart, on a GPU: `pytest -m cuda`."""

import pytest

pytest.importorskip("expecttest", reason="torch's samples need it")

import os

import torch

import mlpext
from common import every_float
from test_opinfo import call, compare, every_info, our_function, their_function

DEVICE = os.environ.get("MLPEXT_TEST_DEVICE", "cuda")
on_gpu = DEVICE != "cuda" or (torch.cuda.is_available() and mlpext._C.has_cuda())
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason="no GPU, or no CUDA in this build")]


@every_float
@every_info
def test_samples(info, name, dtype):
    for sample in info.sample_inputs(DEVICE, dtype, requires_grad=True):
        actual, expected = call(our_function(name), sample), call(their_function(info, name), sample)
        compare(actual, expected, f"{sample}")
