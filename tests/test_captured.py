"""Captured steps against the PyTorch loop: the same weights after the same epochs.

Blocks run as calls, and recorded operator by operator in the way of a CUDA graph; tests/test_cuda_training.py
runs the same tests with graphs on a GPU.
"""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mlpext
from mlpext import captured, descent, nn, training
from mlpext.training import fit, fit_many
from test_native_engine import DTYPES, MODES, TARGETS, assert_engines_agree, trained


class Recorder(TorchDispatchMode):
    """Notes each operator with its tensors, for good, as a graph does: numbers stay those of the recording,
    memory is where it was."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [a.name for a in function._schema.arguments if a.alias_info and a.alias_info.is_write]
        named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        for tensor in tree_flatten([named.get(name) for name in written])[0]:
            if tensor.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        if not written:
            self.made.update(t.untyped_storage().data_ptr() for t in tree_flatten(result)[0])
        self.calls.append((function, args, kwargs, tree_flatten(result)[0]))
        return result

    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tree_flatten(function(*args, **kwargs))[0], strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(function, inputs):
    """captured.capture without a GPU: records, and undoes what recording has done."""
    with Recorder() as recorder:
        outputs = function(*inputs)
    for tensor, value in recorder.before.values():
        tensor.copy_(value)
    replays.append(recorder)
    return recorder.replay, outputs


replays = []


def small_blocks(monkeypatch):
    """Several blocks an epoch, and chunks in batch mode, that divide nothing."""
    monkeypatch.setattr(captured, "STEPS", 2)
    monkeypatch.setattr(descent, "BLOCK", 20)


@pytest.fixture(params=["calls", "recorded"])
def device(request, monkeypatch):
    monkeypatch.setitem(training.NATIVE, "cpu", captured)
    if request.param == "recorded":
        monkeypatch.setitem(captured.CAPTURE, "cpu", recorded)
    small_blocks(monkeypatch)
    return "cpu"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*mlpext.activations(), "maxout"])
def test_every_activation(activation, mode, dtype, device):
    params = {"pieces": 3} if activation == "maxout" else {}
    model = nn.MLP([9, 7, 5, 4], activation, dtype=dtype, device=device, **params)
    assert_engines_agree(model, "numbers", mode=mode)
