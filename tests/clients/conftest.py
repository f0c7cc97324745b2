"""Real clients in an environment of their own: `make test-clients`."""

import os
import sys
import types

os.environ.setdefault("DDE_BACKEND", "pytorch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

import mlpext

if torch.version.cuda is None:
    # PyPI's torchvision is compiled for a CUDA torch; beside another its Python part works, once nobody asks
    # for the shapes of operators that did not load.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def fused():
    """fuse(), and how many linear layers it took: a client that is not fused at all proves nothing."""

    def fuse(model, at_least=1, **kwargs):
        result = mlpext.fuse(model, **kwargs)
        layers = [m for m in result.modules() if type(m) is mlpext.nn.LinearActivation]
        assert len(layers) >= at_least, mlpext.fuse(model, report=True)[1]
        return result

    return fuse
