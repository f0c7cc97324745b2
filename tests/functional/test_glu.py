"""functional.glu and nn.GLU beside torch's."""

import pytest
import torch

import mlpext
from common import assert_close

# torch rounds twice in 16 bits.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-5, "atol": 1e-3},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape, dim",
    [((4, 10), -1), ((4, 10), 0), ((2, 6, 5), 1), ((0, 4), 1), ((4, 0), 1), ((130,), 0)],
    ids=str,
)
def test_values_and_gradients(shape, dim, dtype):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    results = []
    for glu in (mlpext.functional.glu, torch.nn.functional.glu):
        y = glu(x, dim)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert_close(ours.double(), theirs.double(), **TOLERANCE[dtype])


def test_second_derivatives():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(mlpext.functional.glu, x)


def test_module():
    x = torch.randn(3, 8)
    assert isinstance(mlpext.nn.GLU(), torch.nn.GLU) and repr(mlpext.nn.GLU(0)) == repr(torch.nn.GLU(0))
    assert_close(mlpext.nn.GLU()(x), torch.nn.GLU()(x))


@pytest.mark.parametrize("x", [torch.randn(3, 5), torch.tensor(1.0)], ids=["odd", "0-d"])
def test_errors_are_torchs(x):
    with pytest.raises(RuntimeError) as ours:
        mlpext.functional.glu(x)
    with pytest.raises(RuntimeError) as theirs:
        torch.nn.functional.glu(x)
    assert str(ours.value) == str(theirs.value)
