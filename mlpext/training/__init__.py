"""Gradient descent on E = 1/2 ||d - o||^2 in the lecture's three modes.

A model gives o = model(x) for the inputs x; d is the desired output, e = d - o, and E = 1/2 ||e||^2 the error
of one sample. Each step moves every parameter against the gradient of the mean of E over the step's samples,

    W(k+1) = W(k) - eta dE/dW(k)

and the mode says which samples those are:

    mode            samples per update    updates per epoch
    "stochastic"    1                     N
    "mini-batch"    batch_size            ceil(N / batch_size)
    "batch"         N                     1

The mean, not the lecture's sum, so that one eta suits all three; `reduction="sum"` is the sum.
"""

from mlpext._names import MODES
from mlpext.training._arguments import ENGINES, REDUCTIONS
from mlpext.training._callbacks import CSV, TensorBoard
from mlpext.training._evaluate import evaluate
from mlpext.training._fit import fit
from mlpext.training._fit_many import fit_many
from mlpext.training._losses import LOSSES
from mlpext.training.engines.optimizer import GradientDescent
from mlpext.training.history import Epoch, History

__all__ = [
    "CSV",
    "ENGINES",
    "LOSSES",
    "MODES",
    "REDUCTIONS",
    "Epoch",
    "GradientDescent",
    "History",
    "TensorBoard",
    "evaluate",
    "fit",
    "fit_many",
]
