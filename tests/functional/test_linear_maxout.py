"""The fused layer max_k (W_k x + b_k)."""

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
    assert_close,
    assert_same_bits,
    eager_linear_maxout,
    every_float,
    outcome,
)

pytestmark = pytest.mark.filterwarnings("error")
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}
PARTS = ("y", "dx", "dW", "db")


def inputs(dtype=torch.float64, batch=(7,), n_in=5, n_out=9, pieces=3, seed=0):
    """Multiples of 1/8 small enough that every sum is exact in every type: the winner is never in doubt."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, n_in), (pieces, n_out, n_in), (pieces, n_out))
    return [(torch.randint(-4, 5, s, generator=generator, dtype=torch.float64) / 4).to(dtype) for s in shapes]


def run(f, tensors, g=None):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = f(*leaves)
    g = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) if g is None else g
    return y.detach(), *torch.autograd.grad(y, leaves, g)


def expected_of(tensors, g):
    arrays = [t.double().numpy() for t in tensors]
    return reference.linear_maxout(*arrays)[0], *reference.linear_maxout_gradient(g, *arrays)


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("pieces", [1, 2, 3, 8, 300])
def test_against_the_reference(pieces, dtype):
    """With ties in plenty: the first piece takes the whole gradient."""
    tensors = inputs(dtype, pieces=pieces)
    g = torch.linspace(-1, 2, 63, dtype=torch.float64).view(7, 9).to(dtype)
    actual = run(F.linear_maxout, tensors, g)
    for what, a, e in zip(PARTS, actual, expected_of(tensors, g.double().numpy()), strict=True):
        error = np.abs(a.double().numpy() - e).max() / max(1.0, np.abs(e).max())
        assert a.dtype == dtype and error <= TOLERANCE[dtype], f"{what}: {error}"


@pytest.mark.isa
@pytest.mark.parametrize("pieces", [2, 3])
def test_sizes(pieces):
    sizes = [
        *itertools.product((1, 2, 3, 5), repeat=3),
        (1, 64, 64),
        (32, 64, 64),
        (33, 65, 31),
        (16, 17, 129),
    ]
    for batch, n_in, n_out in sizes:
        tensors = inputs(torch.float32, (batch,), n_in, n_out, pieces)
        g = torch.linspace(-1, 2, batch * n_out).view(batch, n_out)
        expected = expected_of(tensors, g.double().numpy())
        for what, a, e in zip(PARTS, run(F.linear_maxout, tensors, g), expected, strict=True):
            assert_close(
                a.double(), torch.from_numpy(e), f"{what} at {batch}x{n_in}->{n_out}", rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [(7,), (2, 3), ()], ids=str)
def test_needs_input_grad(batch, bias, needs):
    results = []
    for f in (F.linear_maxout, eager_linear_maxout):
        x, w, b = (
            torch.randn(t.shape, generator=torch.Generator().manual_seed(2), dtype=t.dtype)
            for t in inputs(batch=batch)
        )
        leaves = [t.requires_grad_(n) for t, n in zip((x, w, b), needs, strict=True)][: 2 + bias]
        y = f(*leaves)
        assert y.requires_grad == any(t.requires_grad for t in leaves)
        if y.requires_grad:
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape))
        results.append([y.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(*results)


@every_float
@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions_and_empty_sizes(batch, dtype):
    for sizes in [(5, 4), (1, 1), (0, 4), (5, 0)]:
        tensors = inputs(dtype, batch, *sizes)
        actual = run(F.linear_maxout, tensors)
        assert actual[0].shape == (*batch, sizes[1])
        for a, t in zip(actual[1:], tensors, strict=True):
            assert a.shape == t.shape and a.dtype == dtype, sizes


def test_layouts():
    x, w, b = inputs(batch=(6,))
    dense = torch.linspace(-1, 2, 54, dtype=torch.float64).view(6, 9)
    xs = {
        "t": x.t().contiguous().t(),
        "step": x.repeat_interleave(2, -1)[:, ::2],
        "expanded": x[:1].expand(6, 5),
    }
    ws = {
        "permuted": w.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "pieces inside": w.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "step": w.repeat_interleave(2, -1)[..., ::2],
        "one piece expanded": w[:1].expand(3, 9, 5),
    }
    gs = {
        "one number": torch.tensor(1.5, dtype=torch.float64).expand(6, 9),
        "t": dense.t().contiguous().t(),
        "row": dense[:1].expand(6, 9),
    }
    bs = {"t": b.t().contiguous().t(), "expanded": b[:, :1].expand(3, 9)}
    for keys in itertools.product(xs, ws, bs, gs):
        tensors, g = [xs[keys[0]], ws[keys[1]], bs[keys[2]]], gs[keys[3]]
        expected = expected_of(tensors, g.numpy())
        for what, a, e in zip(PARTS, run(F.linear_maxout, tensors, g), expected, strict=True):
            assert_close(a, torch.from_numpy(np.ascontiguousarray(e)), f"{what} {keys}")


@pytest.mark.isa
@every_float
def test_a_tie_goes_to_the_first_piece(dtype):
    x = torch.ones(1, 3, dtype=dtype)
    weight = torch.ones(4, 37, 3, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(F.linear_maxout(x, weight).sum(), weight)
    assert (grad[0] == 1).all() and (grad[1:] == 0).all()


@pytest.mark.isa
@every_float
def test_nan_wins(dtype):
    for n_out, piece in itertools.product((1, 8, 37), range(3)):
        weight = torch.ones(3, n_out, 1, dtype=dtype)
        weight[piece, n_out // 2] = math.nan
        y = F.linear_maxout(torch.ones(2, 1, dtype=dtype), weight)
        assert y.isnan().sum() == 2 and y[:, n_out // 2].isnan().all(), (n_out, piece)


@hypothesis.given(
    batch=st.lists(st.integers(0, 4), max_size=3),
    n_in=st.integers(0, 12),
    n_out=st.integers(0, 12),
    pieces=st.integers(1, 5),
)
def test_any_size(batch, n_in, n_out, pieces):
    tensors = inputs(torch.float64, tuple(batch), n_in, n_out, pieces)
    y = F.linear_maxout(*tensors)
    expected = reference.linear_maxout(*(t.numpy() for t in tensors))[0]
    torch.testing.assert_close(y, torch.from_numpy(expected))


def test_backward_twice_and_second_time_error():
    tensors = [t.requires_grad_() for t in inputs()]
    y = F.linear_maxout(*tensors)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y.sum(), tensors), strict=True):
        assert_same_bits(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), tensors)


def test_y_may_be_changed_in_place():
    """Only the index is kept."""
    tensors = [t.requires_grad_() for t in inputs()]
    y = F.linear_maxout(*tensors)
    y *= 2
    z = F.linear_maxout(*tensors)
    for a, b in zip(
        torch.autograd.grad(y.sum(), tensors), torch.autograd.grad((2 * z).sum(), tensors), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradient_penalty_trains_as_eager():
    def penalised(f):
        tensors = [
            torch.randn(t.shape, generator=torch.Generator().manual_seed(4), dtype=t.dtype).requires_grad_()
            for t in inputs()
        ]
        (g,) = torch.autograd.grad(f(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad((g.square().sum() - 1) ** 2, tensors)

    torch.testing.assert_close(penalised(F.linear_maxout), penalised(eager_linear_maxout))


@pytest.mark.parametrize(
    "x, w, b",
    [
        ((3, 4), (2, 5, 3), (2, 5)),
        ((3, 4), (2, 5, 4), (5,)),
        ((3, 4), (2, 5, 4), (3, 5)),
        ((3, 4), (5, 4), (5,)),
        ((3, 4), (2, 2, 5, 4), (2, 5)),
        ((), (2, 5, 4), (2, 5)),
        ((3, 4), (0, 5, 4), (0, 5)),
    ],
    ids=str,
)
def test_wrong_shapes(x, w, b):
    for needs in (False, True):
        with pytest.raises((RuntimeError, ValueError), match="weight|bias|input"):
            F.linear_maxout(*(torch.zeros(s, requires_grad=needs) for s in (x, w, b)))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["x", "weight", "bias"])
def test_mixed_types_are_refused(which):
    tensors = inputs()
    tensors[which] = tensors[which].float()
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear_maxout(*tensors)


def test_other_types_and_meta():
    integers = [torch.randint(-3, 4, s) for s in ((3, 4), (2, 5, 4), (2, 5))]
    actual, expected = outcome(F.linear_maxout, *integers), outcome(eager_linear_maxout, *integers)
    assert torch.equal(actual, expected)
    assert isinstance(outcome(F.linear_maxout, *(t.to(torch.complex64) for t in integers)), type)
    assert F.linear_maxout(*(t.to("meta") for t in inputs(batch=(2, 3)))).shape == (2, 3, 9)


@pytest.mark.parametrize("wrong", [None, 1.0, np.zeros((3, 5))], ids=["none", "number", "array"])
def test_no_tensor(wrong):
    with pytest.raises(TypeError):
        F.linear_maxout(wrong, torch.zeros(2, 3, 5))
