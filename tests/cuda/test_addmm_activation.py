"""torch's private operator that csrc/cuda/linear.cpp builds on: a torch that changes it fails here first."""

import pytest
import torch
import torch.nn.functional as TF

from common import every_device, every_float

addmm_activation = torch.ops.aten._addmm_activation.default


def test_its_schema():
    assert str(addmm_activation._schema) == (
        "aten::_addmm_activation(Tensor self, Tensor mat1, Tensor mat2, *, Scalar beta=1, Scalar alpha=1, "
        "bool use_gelu=False) -> Tensor"
    )


@every_device
@every_float
@pytest.mark.parametrize("use_gelu", [False, True], ids=["relu", "gelu"])
def test_its_numbers(use_gelu, dtype, device):
    """act(x w' + b) with w.t() as linear.cpp gives it. gelu is the exact one on the CPU, tanh's on CUDA."""
    x, w, b = (torch.randn(shape).to(device, dtype) for shape in ((50, 30), (20, 30), (20,)))
    y = addmm_activation(b, x, w.t(), use_gelu=use_gelu)
    z = TF.linear(x.double(), w.double(), b.double())
    approximate = "none" if device == "cpu" else "tanh"
    expected = TF.gelu(z, approximate=approximate) if use_gelu else z.relu()
    # Of sums of 30 products; in 16 bits y, and on the CPU z too, is rounded. gelu's tanh in hardware: 2^-11.
    error = (y.double() - expected).abs() / z.abs().clamp(min=1)
    assert y.dtype == dtype
    assert (
        error.max() <= {8: 1e-14, 4: 1e-5 if device == "cpu" else 2e-3, 2: torch.finfo(dtype).eps}[y.itemsize]
    )
