"""What the tests of activations share: the operators, special values, and tensors of many layouts."""

import math

import torch

import mlpext
from common import values_of

SPECIALS = (math.nan, math.inf, -math.inf, -0.0)


def forward(name, parameters, x):
    return mlpext._C.activation(x, name, tuple(values_of(name, parameters)))


def derivative(name, parameters, x, g=None):
    """By the backward operator on the input, without a graph."""
    g = torch.ones_like(x) if g is None else g
    return torch.ops.mlpext.activation_backward(g, x, name, values_of(name, parameters), False)


def layouts(dtype):
    """Tensors of many layouts with ordinary values."""
    base = torch.linspace(-3, 3, 2 * 3 * 20 * 6, dtype=torch.float64).to(dtype)
    cube = base.view(2, 3, 20, 6)
    return {
        "contiguous": cube,
        "empty": base[:0],
        "empty with shape": base[:0].view(0, 3, 0),
        "scalar": base[77],
        "one": base[5:6],
        "odd offset": base[3:70],
        "every third": base[::3],
        "columns": cube.view(36, 20)[:, 3:14],
        "odd columns": cube.view(36, 20)[:, 1::2],
        "transposed": cube.view(36, 20).t(),
        "permuted": cube.permute(3, 1, 0, 2),
        "channels last": cube.contiguous(memory_format=torch.channels_last),
        "expanded": base[:20].expand(7, 20),
        "expanded inside": base[:20, None].expand(20, 5),
        "expanded scalar": base[9].expand(3, 4),
        "overlapping": base.as_strided((10, 8), (3, 1)),
        "sliced channels last": cube.contiguous(memory_format=torch.channels_last)[:, :2, ::2],
    }
