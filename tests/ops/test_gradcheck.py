"""Derivatives of every order against finite differences, in float64."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from common import FEW_OPS, all_ops, assert_close, few_ops, linear_op, outcome

pytestmark = [
    pytest.mark.gradcheck,
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@all_ops
def test_first_order(op):
    """Reverse and forward mode, each also batched (over cotangents or tangents), undefined cotangents."""
    assert gradcheck(
        op,
        op.inputs(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@all_ops
def test_second_order(op):
    """Reverse over reverse, forward over reverse, reverse over forward."""
    assert gradgradcheck(
        op, op.inputs(), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@all_ops
def test_third_order(op):
    def slope(*tensors):
        return torch.autograd.grad(op(*tensors).square().sum(), tensors, create_graph=True)

    assert gradgradcheck(slope, op.inputs(), check_fwd_over_rev=False, fast_mode=True, atol=1e-4)


@few_ops
def test_reverse_over_forward(op):
    tensors = op.inputs()

    def tangent(*tensors):
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(t, torch.full_like(t, 0.7)) for t in tensors]
            return torch.autograd.forward_ad.unpack_dual(op(*dual)).tangent

    assert gradcheck(tangent, tensors, fast_mode=True)


@few_ops
def test_some_inputs_frozen(op):
    tensors = op.inputs()
    for free in range(len(tensors)):
        with_frozen = [t if i == free else t.detach() for i, t in enumerate(tensors)]
        assert gradcheck(op, with_frozen, check_forward_ad=True, check_batched_grad=True), free
        assert gradgradcheck(op, with_frozen, check_fwd_over_rev=True), free


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in FEW_OPS if len(op.shapes) > 1])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_leading_dimensions(op, batch):
    tensors = op.inputs()
    x = tensors[0].detach()[0].expand(*batch, -1).clone().requires_grad_()
    assert gradcheck(op, (x, *tensors[1:]), check_forward_ad=True)
    assert gradgradcheck(op, (x, *tensors[1:]))


@all_ops
def test_transposed_inputs(op):
    strided = [
        t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in op.inputs()
    ]
    assert gradcheck(op, strided, fast_mode=True)


def test_a_wrong_gradient_is_noticed():
    """The checks themselves: a gradient that is 1 % off does not pass."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, g):
            return 1.01 * g

    op = linear_op("tanh", {})
    with pytest.raises(GradcheckError):
        gradcheck(lambda *t: Wrong.apply(op(*t)), op.inputs())


@all_ops
def test_derivatives_of_native_to_third_order(op):
    """Differences cannot see a wrong gradient whose own derivative is consistent: each equals eager's."""

    def derivatives(f):
        tensors = op.inputs()
        scalar, all_orders = f(*tensors).square().sum(), []
        for _ in range(3):
            if not scalar.requires_grad:
                break
            grads = torch.autograd.grad(scalar, tensors, create_graph=True, allow_unused=True)
            all_orders.append([None if g is None else g.detach() for g in grads])
            scalar = sum(g.square().sum() for g in grads if g is not None)
        return all_orders

    actual, expected = derivatives(op.ours), derivatives(op.eager)
    assert len(actual) == len(expected)
    for order, (ours, eagers) in enumerate(zip(actual, expected, strict=True), start=1):
        for which, (a, e) in enumerate(zip(ours, eagers, strict=True)):
            if a is None or e is None:  # "no gradient" and a gradient of zeros are the same
                assert not any(t is not None and t.any() for t in (a, e)), (order, which)
            else:
                scale = 1e-8 * max(1.0, e.abs().max().item())
                assert_close(a, e, f"order {order}, input {which}", rtol=1e-8, atol=scale)


@all_ops
def test_a_gradient_depends_on_what_natives_depends_on(op):
    """Of a constant cotangent only f' can depend on an input: zeros where it is piecewise constant, and an
    error only where eager's gradient has no graph either."""

    def second(f):
        tensors = op.inputs()
        first = torch.autograd.grad(f(*tensors).sum(), tensors, create_graph=True)
        for gradient in first:
            yield outcome(
                torch.autograd.grad, gradient.sum(), tensors, retain_graph=True, materialize_grads=True
            )

    for which, (actual, expected) in enumerate(zip(second(op.ours), second(op.eager), strict=True)):
        if isinstance(expected, type):
            assert actual is expected, which
        else:
            assert_close(actual, expected, which)
