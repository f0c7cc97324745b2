"""Maxout on a plain tensor: the winning piece, its gradient, ties and NaNs, layouts, bits."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import mlpext.functional as F
import reference
from common import (
    assert_same_bits,
    assert_same_outcome,
    eager_maxout,
    every_float,
    outcome,
)

pytestmark = pytest.mark.filterwarnings("error")


def values(shape, dtype, seed=0):
    """Few distinct numbers, so that ties are common."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-6, 7, shape, generator=generator) / 4).to(dtype)


def gradient(f, x, g):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, g)[0]


def assert_is_reference(x, pieces, dim, what=""):
    """Selection does not round: the values and the gradient are exact."""
    y = F.maxout(x, pieces, dim)
    expected, _ = reference.maxout(x.double().numpy(), pieces, dim)
    assert_same_bits(y + 0.0, torch.from_numpy(np.ascontiguousarray(expected)).to(x.dtype) + 0.0, what)
    g = torch.arange(1.0, y.numel() + 1).view(y.shape).to(x.dtype)
    expected = reference.maxout_gradient(g.double().numpy(), x.double().numpy(), pieces, dim)
    actual = gradient(lambda x: F.maxout(x, pieces, dim), x, g)
    assert_same_bits(actual, torch.from_numpy(np.ascontiguousarray(expected)).to(x.dtype), f"{what} gradient")


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 8, 17])
def test_values_and_gradient(pieces, dtype):
    for length in [*range(1, 36), 64, 67, 129]:
        assert_is_reference(values((3, pieces * length), dtype, length), pieces, -1, length)
        assert_is_reference(values((pieces * length,), dtype, length), pieces, 0, length)


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("pieces", [1, 2, 6])
def test_every_dimension(pieces, dim, dtype):
    assert_is_reference(values((6, 12, 6, 18), dtype), pieces, dim)


@pytest.mark.native
@pytest.mark.parametrize("pieces", [255, 256, 257, 300, 1000])
def test_many_pieces(pieces):
    """The index is a byte up to 256 pieces and 32 bits beyond."""
    x = torch.randperm(pieces * 5, generator=torch.Generator().manual_seed(3)).float()
    assert_is_reference(x.view(1, -1), pieces, -1)
    last_wins = torch.arange(pieces * 2.0)
    assert_is_reference(last_wins, pieces, 0)
    index = torch.ops.mlpext.maxout_forward(last_wins, pieces, 0)[1]
    assert index.dtype == (torch.uint8 if pieces <= 256 else torch.int32)
    assert (index.long() == pieces - 1).all()


@pytest.mark.isa
@every_float
def test_a_tie_goes_to_the_first_piece(dtype):
    x = torch.zeros(4 * 35, dtype=dtype)
    g = torch.arange(1.0, 36).to(dtype)
    expected = torch.cat([g, torch.zeros(3 * 35, dtype=dtype)])
    assert_same_bits(gradient(lambda x: F.maxout(x, 4), x, g), expected)


@pytest.mark.native
@pytest.mark.thorough
@pytest.mark.isa
@every_float
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, -0.0])
def test_specials_at_every_position_of_every_length(special, dtype):
    """Also shows that no result depends on its neighbours or on the length."""
    for length in range(1, 68):
        rows = values((2 * length, 2 * length), dtype, length)
        rows.fill_diagonal_(special)  # every position of either piece
        expected, winner = (torch.from_numpy(a) for a in reference.maxout(rows.double().numpy(), 2))
        one_by_one = torch.stack([F.maxout(row, 2) for row in rows])
        assert_same_bits(one_by_one + 0.0, expected.to(dtype) + 0.0, length)
        assert_same_bits(F.maxout(rows, 2) + 0.0, expected.to(dtype) + 0.0, length)
        index = torch.stack([torch.ops.mlpext.maxout_forward(row, 2, -1)[1] for row in rows])
        assert (index.long() == winner).all(), length


@pytest.mark.native
@pytest.mark.isa
@every_float
def test_specials_in_every_pair(dtype):
    specials = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]
    pairs = torch.tensor(list(itertools.product(specials, repeat=2)), dtype=dtype)
    x = pairs.t().repeat(1, 5).flatten()
    assert_is_reference(x, 2, 0)
    nan_of = torch.ops.mlpext.maxout_forward(torch.tensor([math.nan, math.nan], dtype=dtype), 2, 0)[1]
    assert nan_of.item() == 0, "the first of two NaNs"


@pytest.mark.isa
@every_float
def test_minus_infinity_everywhere(dtype):
    """A piece must win even so: the gradient is not lost."""
    assert_is_reference(torch.full((3 * 21,), -math.inf, dtype=dtype), 3, 0)


LAYOUTS = {
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, 2:14],
    "every second column": lambda x: x[:, ::2],
    "every third row": lambda x: x[::3],
    "expanded": lambda x: x[:1].expand(6, -1),
    "expanded along dim": lambda x: x[:, :1].expand(-1, 12),
    "three dimensions permuted": lambda x: x.view(12, 4, 6).permute(2, 0, 1),
    "channels last": lambda x: x.view(1, 12, 2, 12).contiguous(memory_format=torch.channels_last),
    "odd offset": lambda x: x.flatten()[1 : 1 + 12 * 6],
}


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = LAYOUTS[layout](values((12, 24), dtype))
    for dim, pieces in itertools.product(range(x.dim()), (1, 2, 3, 6)):
        if x.size(dim) % pieces:
            continue
        what = f"dim {dim}, {pieces} pieces"
        assert_is_reference(x, pieces, dim, what)
        y = F.maxout(x, pieces, dim)
        dense = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
        cotangents = {
            "expanded number": dense.flatten()[0].expand(y.shape),
            "every second": torch.stack([dense, dense + 9], -1)[..., 0],
            "transposed": dense.movedim(0, -1).contiguous().movedim(-1, 0),
        }
        for which, g in cotangents.items():
            f = lambda x: F.maxout(x, pieces, dim)  # noqa: E731, B023
            expected = gradient(f, x.contiguous(), g.contiguous())
            assert_same_bits(gradient(f, x, g), expected, f"{what}, gradient {which}")


def test_empty():
    for shape, dim, pieces in [((0,), 0, 3), ((3, 0), 1, 2), ((0, 4), 1, 2), ((0, 4), 0, 5)]:
        x = torch.zeros(shape, requires_grad=True)
        y = F.maxout(x, pieces, dim)
        expected = list(shape)
        expected[dim] //= pieces
        assert list(y.shape) == expected
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.native
@pytest.mark.isa
def test_bits_do_not_depend_on_threads():
    x = values((257, 3 * 333), torch.float32)
    y, index = torch.ops.mlpext.maxout_forward(x, 3, -1)
    back = torch.ops.mlpext.maxout_backward(y, index, 3, -1)
    torch.set_num_threads(2)
    y_2, index_2 = torch.ops.mlpext.maxout_forward(x, 3, -1)
    assert_same_bits(y_2, y)
    assert_same_bits(torch.ops.mlpext.maxout_backward(y, index_2, 3, -1), back)


@hypothesis.given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    pieces=st.integers(1, 9),
    data=st.data(),
)
def test_any_shape(shape, pieces, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= pieces
    order = data.draw(st.permutations(range(len(shape))))
    base = values([shape[i] for i in order], torch.float32, seed=len(shape))
    x = base.permute([order.index(i) for i in range(len(shape))])
    assert list(x.shape) == shape
    assert_is_reference(x, pieces, dim)


def test_what_other_types_do():
    """Integers work as eager's amax does; complex numbers have no maximum."""
    for x in (torch.arange(12), torch.arange(12, dtype=torch.uint8), torch.ones(12, dtype=torch.bool)):
        assert torch.equal(F.maxout(x, 3), x.unflatten(0, (3, -1)).amax(0))
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        F.maxout(torch.zeros(4, dtype=torch.complex64), 2)
    meta = F.maxout(torch.zeros(2, 6, device="meta"), 3)
    assert meta.shape == (2, 2) and meta.is_meta


@pytest.mark.parametrize(
    "shape, pieces, dim, exception, message",
    [
        ((7,), 2, -1, (ValueError, RuntimeError), "pieces"),
        ((6,), 0, -1, (ValueError, RuntimeError), "pieces"),
        ((6,), -2, -1, (ValueError, RuntimeError), "pieces"),
        ((6,), 2, 1, IndexError, "[Dd]im"),
        ((6,), 2, -2, IndexError, "[Dd]im"),
        ((), 1, 0, RuntimeError, "input"),
        ((), 1, 1, IndexError, "[Dd]im"),
        ((), 1, -2, IndexError, "[Dd]im"),
        ((6,), True, -1, (TypeError, RuntimeError), None),
        ((6,), 2.5, -1, TypeError, None),
        ((6,), "2", -1, TypeError, None),
    ],
)
def test_bad_arguments(shape, pieces, dim, exception, message):
    for requires_grad in (False, True):
        with pytest.raises(exception, match=message):
            F.maxout(torch.zeros(shape, requires_grad=requires_grad), pieces, dim)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor], ids=lambda i: i.__name__)
def test_integers_of_numpy_and_torch(integer):
    x = torch.randn(3, 6)
    assert_same_bits(F.maxout(x, integer(2), dim=integer(1)), F.maxout(x, 2, dim=1))
    assert_same_bits(F.maxout(x, integer(3), dim=-integer(1) if integer is np.int64 else -1), F.maxout(x, 3))


@pytest.mark.parametrize("wrong", [None, 1.0, [1.0, 2.0], "x"], ids=repr)
def test_no_tensor(wrong):
    with pytest.raises(TypeError):
        F.maxout(wrong, 2)


def test_the_value_is_torchs():
    x = torch.randn(5, 4, 12)
    for pieces, dim in [(2, -1), (3, 2), (2, 1), (5, 0)]:
        actual = outcome(F.maxout, x, pieces, dim)
        assert_same_outcome(actual, outcome(eager_maxout, x, pieces, dim), (pieces, dim))


def test_backward_twice_and_the_input_stays():
    """A backward that reused its buffers would give another result the second time."""
    x = torch.randn(4, 9, requires_grad=True)
    before = x.detach().clone()
    y = F.maxout(x, 3)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    assert_same_bits(first, second)
    assert_same_bits(x.detach(), before)


def test_neither_input_nor_output_is_kept():
    """Both may be overwritten before backward."""
    x = torch.randn(4, 6, requires_grad=True)
    expected = gradient(lambda x: F.maxout(x, 2), x, torch.ones(4, 3))
    doubled = x * 1
    y = F.maxout(doubled, 2)
    with torch.no_grad():
        doubled.zero_()
        y.zero_()
    assert_same_bits(torch.autograd.grad(y, x, torch.ones(4, 3))[0], expected)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_pieces_side_by_side_as_other_packages_have_them(dim):
    x = torch.randn(6, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = x.unflatten(dim, (-1, 3)).amax(dim + 1 if dim >= 0 else dim)
    actual = F.maxout(x, 3, dim, interleaved=True)
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
    assert torch.equal(*gradients)
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert F.maxout(flat, 2).tolist() == [3, 4] and F.maxout(flat, 2, interleaved=True).tolist() == [2, 4]


@pytest.mark.parametrize("pieces", [0, -1, 4])
def test_interleaved_pieces_that_do_not_fit(pieces):
    with pytest.raises(RuntimeError, match=f"pieces: {pieces} does not divide dimension -1 of input, 6"):
        F.maxout(torch.randn(2, 6), pieces, interleaved=True)
