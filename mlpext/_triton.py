"""linear_maxout's forward on CUDA as one kernel, in Triton: z = x W' + b stays in registers.

csrc/cuda/triton.cpp imports this when it has a first call to serve.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS, DEPTH = 128, 64  # of a tile
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}


def tiling(pieces: int, capability: int) -> dict[str, int]:
    """How many pieces a tile takes at a time, side by side in one product, and the columns of its output.

    Of two pieces nothing is left between products, and 256 columns of z fit Hopper's and Blackwell's
    registers and shared memory. Otherwise the winner so far takes registers too.
    """
    wide = pieces == 2 and capability in (9, 10)
    return {"PIECES": pieces, "TOGETHER": 2 - pieces % 2, "COLUMNS": 128 if wide else 64}


def linear_maxout(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, index: Tensor | None, capability: int
) -> None:
    """y = max over pieces of x W' + b, and the index of the winner, on the current device and stream.

    x (rows, in_features), weight (pieces, out_features, in_features) and bias (pieces, out_features) with
    any strides; y and index (rows, out_features), contiguous, index of bytes. The order of sums depends on
    the sizes and the GPU alone.
    """
    rows, depth = x.shape
    pieces, columns, _ = weight.shape
    tile = tiling(pieces, capability)
    grid = (triton.cdiv(rows, ROWS) * triton.cdiv(columns, tile["COLUMNS"]),)
    strides = (*x.stride(), *weight.stride(), *((0, 0) if bias is None else bias.stride()))
    linear_maxout_kernel[grid](x, weight, bias, y, index, rows, columns, depth, *strides, **tile, **OPTIONS)


@triton.jit
def wins(piece, best):
    """As in csrc/activations.h: the first of equals stays, a NaN wins."""
    return ~(piece <= best) & (best == best)


@triton.jit(do_not_specialize=["rows"])
def linear_maxout_kernel(
    x, weight, bias, y, index,
    rows, columns, depth,
    x_row, x_in, weight_piece, weight_out, weight_in, bias_piece, bias_out,
    PIECES: tl.constexpr, TOGETHER: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr = ROWS, DEPTH: tl.constexpr = DEPTH,
):  # fmt: skip
    """A tile of ROWS x COLUMNS outputs; bias and index may be None."""
    # Down eight tiles of rows, then to the next columns: what runs at a time shares rows and weights in L2.
    down, across = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    band, tile = tl.program_id(0) // (8 * across), tl.program_id(0) % (8 * across)
    height = min(down - 8 * band, 8)
    row_tile, column_tile = 8 * band + tile % height, tile // height
    # 64 bits wide, as what strides are multiplied with has to be.
    i = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = column_tile.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    k = tl.arange(0, DEPTH).to(tl.int64)
    beside = tl.arange(0, TOGETHER * COLUMNS)[None, :]
    unit = column_tile.to(tl.int64) * COLUMNS + beside % COLUMNS

    best = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    winner = tl.full((ROWS, COLUMNS), 0, tl.int32)
    for first in range(0, PIECES, TOGETHER):
        piece = first + (beside // COLUMNS).to(tl.int64)
        z = tl.full((ROWS, TOGETHER * COLUMNS), 0, tl.float32)
        for start in range(0, depth, DEPTH):
            at = start + k
            a = tl.load(x + i * x_row + at[None, :] * x_in, (i < rows) & (at[None, :] < depth), 0.0)
            b = tl.load(
                weight + piece * weight_piece + unit * weight_out + at[:, None] * weight_in,
                (unit < columns) & (at[:, None] < depth),
                0.0,
            )
            z = tl.dot(a, b, z, input_precision="ieee")
        if bias is not None:
            z += tl.load(bias + piece * bias_piece + unit * bias_out, unit < columns, 0.0).to(tl.float32)
        number = first
        if TOGETHER == 2:
            z, second = z.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
            better = wins(second, z)
            z = tl.where(better, second, z)
            number += better.to(tl.int32)
        better = wins(z, best)
        best = tl.where(better, z, best)
        winner = tl.where(better, number, winner)

    inside = (i < rows) & (j < columns)
    tl.store(y + i * columns + j, best.to(y.dtype.element_ty), inside)
    if index is not None:
        tl.store(index + i * columns + j, winner.to(tl.uint8), inside)
