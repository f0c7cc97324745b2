"""Activations: the same bits at every position, layout and number of threads."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from activation_inputs import SPECIALS, derivative, forward, layouts
from common import (
    NAMES,
    assert_same_bits,
    eager,
    every_case,
    every_float,
    every_functional_case,
    gradients_of_ones,
    ours,
)

pytestmark = pytest.mark.filterwarnings("error")


@functools.cache
def special_tensors(dtype, longest=67):
    """Every length, each special value at every position, at several offsets from an aligned address."""
    return tuple(_special_tensors(dtype, longest))


def _special_tensors(dtype, longest):
    base = torch.linspace(-3, 3, longest, dtype=torch.float64).to(dtype)
    for length, special in itertools.product(range(1, longest + 1), SPECIALS):
        rows = base[:length].repeat(length, 1)
        rows.fill_diagonal_(special)
        yield from rows


def _together(f, tensors):
    """f on each tensor alone, and on all of them as one long tensor."""
    return torch.cat([f(x) for x in tensors]), f(torch.cat(tensors))


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.isa
@pytest.mark.usefixtures("own_loops")
@every_float
@every_case
def test_specials_at_every_position_of_every_length(name, parameters, dtype):
    tensors = special_tensors(dtype)
    assert_same_bits(*_together(lambda x: forward(name, parameters, x), tensors), "value")
    if name != "identity":
        assert_same_bits(*_together(lambda x: derivative(name, parameters, x), tensors), "derivative")


@pytest.mark.native
@pytest.mark.usefixtures("own_loops")
@pytest.mark.isa
@every_float
@every_functional_case
def test_specials_through_autograd(name, parameters, dtype):
    """The same with what autograd keeps (y or x), at lengths around the widths of the vectors."""
    tensors = [x for x in special_tensors(dtype, longest=35) if len(x) in (1, 2, 7, 8, 9, 15, 16, 17, 33, 35)]
    f = ours(name, parameters)
    assert_same_bits(*_together(lambda x: gradients_of_ones(f, x), tensors))


@pytest.mark.native
@pytest.mark.isa
@every_float
@every_functional_case
def test_layouts(name, parameters, dtype):
    f, f_eager = ours(name, parameters), eager(name, parameters)
    for layout, x in layouts(dtype).items():
        y = f(x)
        like_eager = "logsigmoid" not in name  # eager's makes everything contiguous
        assert y.stride() == (f_eager(x) if like_eager else torch.empty_like(x)).stride(), layout
        assert_same_bits(y, f(x.contiguous().flatten()).view(x.shape), layout)
        for gradient_layout, g in cotangents(x).items():
            what = f"{layout}, gradient {gradient_layout}"
            leaf = x.detach().requires_grad_()
            (actual,) = torch.autograd.grad(f(leaf), leaf, g)
            flat = x.contiguous().flatten().requires_grad_()
            (expected,) = torch.autograd.grad(f(flat), flat, g.contiguous().flatten())
            assert_same_bits(actual, expected.view(x.shape), what)
            if gradient_layout == "as the output":
                (eagers,) = torch.autograd.grad(f_eager(leaf), leaf, g)
                assert actual.stride() == eagers.stride(), what


def cotangents(x):
    dense = (
        torch.linspace(-1, 2, max(x.numel(), 1), dtype=torch.float64).to(x.dtype)[: x.numel()].view(x.shape)
    )
    several = {
        "as the output": torch.empty_like(x).copy_(dense),
        "dense": dense,
        "one number expanded": x.new_ones(()).mul(1.5).expand(x.shape),
    }
    if x.dim() >= 2:
        several["transposed"] = dense.transpose(0, 1).contiguous().transpose(0, 1)
        several["expanded"] = dense[:1].expand(x.shape)
        several["every second"] = torch.stack([dense, dense + 9], -1)[..., 0]
    return several


@pytest.mark.native
@pytest.mark.isa
@pytest.mark.usefixtures("own_loops")
@every_functional_case
def test_bits_do_not_depend_on_threads(name, parameters):
    x = torch.linspace(-9, 9, 2**18 + 3)
    once = torch.cat([forward(name, parameters, x), derivative(name, parameters, x)])
    torch.set_num_threads(2)
    again = torch.cat([forward(name, parameters, x), derivative(name, parameters, x)])
    assert_same_bits(again, once)
    half = len(x) // 3
    assert_same_bits(
        torch.cat([forward(name, parameters, x[:half]), forward(name, parameters, x[half:])]), once[: len(x)]
    )


SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=4)


@st.composite
def strided(draw):
    """A view of a random base: permuted, sliced with steps, expanded, at an offset."""
    shape = draw(SHAPES)
    steps = [draw(st.integers(1, 3)) for _ in shape]
    offset = draw(st.integers(0, 3))
    base = torch.linspace(-4, 4, 1 + math.prod(s * k + 1 for s, k in zip(shape, steps, strict=True)) + offset)
    x = base[offset : offset + math.prod(s * k for s, k in zip(shape, steps, strict=True))]
    x = x.view([s * k for s, k in zip(shape, steps, strict=True)])
    for d, k in enumerate(steps):
        x = x[(slice(None),) * d + (slice(None, None, k),)]
    x = x.permute(draw(st.permutations(range(x.dim()))))
    if draw(st.booleans()):
        x = x.unsqueeze(-1).expand(*x.shape, draw(st.integers(1, 3)))
    return x


@pytest.mark.native
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("identity", "gelu_tanh")])
@hypothesis.settings(max_examples=25)
@hypothesis.given(x=strided())
def test_any_view(name, x):
    f, f_eager = ours(name, {}), eager(name, {})
    y = f(x)
    # The stride of a dimension of size 1 means nothing; eager's logsigmoid makes everything contiguous.
    if all(s > 1 for s in x.shape) and name != "logsigmoid":
        assert y.stride() == f_eager(x).stride()
    assert_same_bits(y, f(x.reshape(-1).contiguous()).view(x.shape))
    torch.testing.assert_close(y, f_eager(x))
