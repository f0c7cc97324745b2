"""Large outputs: made in huge pages, kept in a bounded pool, written around the cache; the same bits."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlpext
import mlpext.functional as F
from common import assert_same_bits

LARGE, STREAMED = 16 << 20, 32 << 20  # bytes, csrc/cpu/huge_pages.h
HUGE_PAGE = 2 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pool is for Linux")


@pytest.fixture
def pool():
    """An empty pool of 128 MiB, and afterwards the one that was."""
    limit = mlpext._C.pool_limit()
    mlpext._C.set_pool_limit(0)
    mlpext._C.set_pool_limit(128 << 20)
    yield
    mlpext._C.set_pool_limit(0)
    mlpext._C.set_pool_limit(limit)


def many(dtype, bytes=STREAMED, extra=13):
    return torch.linspace(-9, 9, bytes // dtype.itemsize + extra).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_bits_of_small_pieces(dtype, threads):
    torch.set_num_threads(threads)
    x = many(dtype)
    y = F.elu(x)
    grad_input = torch.ops.mlpext.activation_backward(x, x, "mish", (), False)
    torch.set_num_threads(1)
    pieces = x.split(1 << 20)
    assert_same_bits(y, torch.cat([F.elu(piece) for piece in pieces]))
    backward = [torch.ops.mlpext.activation_backward(piece, piece, "mish", (), False) for piece in pieces]
    assert_same_bits(grad_input, torch.cat(backward))


@pytest.mark.parametrize("offset", [1, 7])
def test_any_alignment(offset):
    x = many(torch.float32)
    assert_same_bits(F.tanh(x[offset:]), F.tanh(x)[offset:])


def test_in_place_and_transposed():
    x = many(torch.float32, extra=0).view(2048, -1)
    expected = F.relu(x)
    assert_same_bits(F.relu(x.t()), expected.t())
    assert F.relu(x.t()).stride() == x.t().stride()
    assert F.relu(x, inplace=True) is x
    assert_same_bits(x, expected)


def test_the_next_output_takes_the_memory_of_the_last(pool):
    x = many(torch.float32, LARGE)
    y = F.relu(x)
    assert y.data_ptr() % HUGE_PAGE == 0 and mlpext._C.pool_bytes() == 0
    where, expected = y.data_ptr(), y.clone()
    del y
    assert mlpext._C.pool_bytes() == LARGE + HUGE_PAGE
    again = F.relu(x)
    assert again.data_ptr() == where and mlpext._C.pool_bytes() == 0
    assert_same_bits(again, expected)


def test_the_pool_is_bounded(pool):
    mlpext._C.set_pool_limit(40 << 20)
    x = many(torch.float32, LARGE, 0)
    outputs = [F.relu(x) for _ in range(4)]
    del outputs
    assert 0 < mlpext._C.pool_bytes() <= 40 << 20
    mlpext._C.set_pool_limit(0)
    assert mlpext._C.pool_bytes() == 0
    y = F.relu(x)
    del y
    assert mlpext._C.pool_bytes() == 0


def test_small_outputs_leave_it_alone(pool):
    y = F.relu(torch.ones(LARGE // 4 - 1))
    del y
    assert mlpext._C.pool_bytes() == 0


def test_the_memory_is_a_tensors_like_any_other(pool):
    x = many(torch.float32, LARGE)
    y = F.relu(x).resize_(8 << 20)
    assert len(y) == 8 << 20 and y[:100].equal(F.relu(x[:100]))
    kept = F.relu(x).numpy()[5:10]
    gc.collect()
    assert torch.from_numpy(kept).equal(F.relu(x[5:10]))
    shared = F.relu(x).share_memory_()
    assert shared.is_shared() and shared.equal(F.relu(x))


def test_a_copy_is_made_only_where_it_is_written_to(pool):
    x = many(torch.float32, LARGE)
    y, expected = F.relu(x), torch.relu(x)
    lazy = torch._lazy_clone(y)
    lazy.add_(1)
    assert y.equal(expected) and lazy.equal(expected + 1)


def test_more_than_there_is():
    """2^47 bytes: more than a process can have."""
    x, weight = torch.zeros(1, 4).expand(1 << 44, 4), torch.zeros(2, 4)
    for f in (F.linear_activation, torch.nn.functional.linear):
        with pytest.raises(
            RuntimeError, match="can't allocate memory: you tried to allocate 140737488355328"
        ):
            f(x, weight)


@pytest.mark.launch
@pytest.mark.parametrize("mib, limit", [("0", 0), ("3", 3 << 20), ("", None), ("many", None)])
def test_the_environment_sets_the_limit(mib, limit):
    program = "import mlpext; print(mlpext._C.pool_limit())"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MLPEXT_POOL_MIB": mib},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if limit is None:
        assert run.returncode != 0 and "ValueError: MLPEXT_POOL_MIB" in run.stderr, run.stderr
    else:
        assert run.stdout.strip() == str(limit), run.stderr
