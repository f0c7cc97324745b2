"""Activations, maxout and fused MLP layers for PyTorch, with a trainer for the modes of gradient descent."""

from mlpext import _extension as _extension  # isort: skip  (it loads mlpext._C, which the others import)
from mlpext import _choices, functional, nn, training
from mlpext._artefact import load, save
from mlpext._version import __version__
from mlpext.functional import activations
from mlpext.fusion import fuse, unfuse

__all__ = ["__version__", "activations", "functional", "fuse", "load", "nn", "save", "training", "unfuse"]

_choices.use(_choices.choose())
