"""PyTorch's own samples of every counterpart, on a GPU: `pytest -m cuda`."""

import pytest

pytest.importorskip("expecttest", reason="torch's samples need it")

from common import every_float
from test_cuda import DEVICE, pytestmark  # noqa: F401
from test_opinfo import call, compare, every_info, our_function, their_function


@every_float
@every_info
def test_samples(info, name, dtype):
    for sample in info.sample_inputs(DEVICE, dtype, requires_grad=True):
        actual, expected = call(our_function(name), sample), call(their_function(info, name), sample)
        compare(actual, expected, f"{sample}")
