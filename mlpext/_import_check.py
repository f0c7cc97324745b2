"""Refuses, in one line, a torch that this build does not match; without it the loader names a mangled symbol.

mlpext._C is written against torch's C++ interface, which holds within one minor version of torch only.
"""

from importlib.util import find_spec

import torch

_BUILD = "in mlpext's source folder, run: pip install --no-build-isolation --force-reinstall --no-deps ."

try:
    from mlpext import _build
except ImportError:
    raise ImportError(f"mlpext is not built; {_BUILD}") from None
if find_spec("mlpext._C") is None:
    raise ImportError(f"mlpext is not built for this Python; {_BUILD}")

_same_minor = torch.__version__.split(".")[:2] == _build.torch_version.split(".")[:2]
if not _same_minor or (_build.cuda and torch.version.cuda is None):
    raise ImportError(
        f"mlpext was built against torch {_build.torch_version}, but torch {torch.__version__} is installed; "
        f"rebuild it: {_BUILD}"
    )

__version__ = _build.version
