"""Activations, maxout and fused MLP layers for PyTorch, with a trainer for the modes of gradient descent."""

from mlpext._import_check import __version__  # isort: skip  (before the extension is loaded)
from mlpext import _C, _build, functional, nn, training
from mlpext.functional import activations
from mlpext.fusing import fuse, unfuse

if _build.cutlass:  # kernels that _C does without otherwise
    from mlpext import _cutlass

    _C.set_cutlass_kernels(_cutlass.table)

__all__ = ["__version__", "activations", "functional", "fuse", "nn", "training", "unfuse"]
