"""Blocks of steps without a GPU: recorded operator by operator, as a CUDA graph is, and played again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mlpext
from mlpext.training.engines import cuda_graphs


def tensors_in(nest):
    return [leaf for leaf in tree_flatten(nest)[0] if isinstance(leaf, torch.Tensor)]


def storages(nest):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_in(nest)}


class Recorder(TorchDispatchMode):
    """Notes each operator with its tensors, for good, as a graph does: numbers stay those of the recording,
    memory is where it was."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema.arguments
        named = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in schema if a.alias_info and a.alias_info.is_write]
        for tensor in tensors_in(written):
            if tensor.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.made |= storages(result) - storages([args, kwargs])  # not of views
        self.calls.append((function, args, kwargs, tensors_in(result)))
        return result

    def undo(self):
        with torch._C._AutoDispatchBelowAutograd():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                for old, new in zip(results, tensors_in(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Counter:
    """A CUDA graph and how often it was replayed."""

    def __init__(self, replay):
        self.graph, self.replays = replay, 0

    def replay(self):
        self.replays += 1
        self.graph()


graphs: list[Recorder | Counter] = []


def recorded(function, inputs):
    """cuda_graphs.capture without a GPU."""
    with Recorder() as recorder:
        outputs = function(*inputs)
    recorder.undo()
    graphs.append(recorder)
    return recorder.replay, outputs


def counted(function, inputs):
    replay, outputs = cuda_graphs.capture(function, inputs)
    graphs.append(Counter(replay))
    return graphs[-1].replay, outputs


on_gpu = torch.cuda.is_available() and mlpext._C.has_cuda()
ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason="no GPU, or no CUDA in this build")]
CUDA = pytest.param("cuda", marks=ON_GPU)
