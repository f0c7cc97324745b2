"""The devices that the tests of CUDA graphs run on."""

import pytest

from graph_recorder import CUDA, counted, graphs, recorded
from mlpext.training import _samples, engines
from mlpext.training.engines import cuda_graphs
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine


@pytest.fixture(params=["calls", "recorded", CUDA])
def device(request, monkeypatch):
    """Where the models of a test are, with captured steps: several blocks an epoch, in batch mode of several
    chunks, none of which divides 67 samples."""
    where = "cuda" if request.param == "cuda" else "cpu"
    monkeypatch.setitem(engines.NATIVE, "cpu", CudaGraphsEngine)
    if request.param != "calls":
        monkeypatch.setitem(cuda_graphs.CAPTURE, where, recorded if where == "cpu" else counted)
    graphs.clear()
    monkeypatch.setattr(cuda_graphs, "STEPS", 2)
    monkeypatch.setattr(_samples, "BLOCK", 20)
    return where
