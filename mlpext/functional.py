"""Activations, maxout and fused linear layers as functions, with torch.nn.functional's names, signatures and
errors.

What holds for every function that does not say otherwise. `input` has any shape, written (*); the result has
its shape, dtype and memory format. float64, float32, bfloat16 and float16 tensors on the CPU, and on CUDA in
a build that has it, take the package's kernels; whatever else torch accepts takes torch's operators.
Derivatives of every order, forward mode, torch.func, torch.compile and autocast work as for torch's
functions. `inplace=True` writes the result to `input`; with `out`, a tensor to write it to, torch's own
function runs. TypeError and RuntimeError are raised as torch raises them.

"To 1.5 ULP" is the largest error found of a float32 result on the CPU, with default parameters, in units of
the last place of the exact value; at 0.5 the result is the nearest float32. docs/accuracy.md says over which
inputs, and has the derivatives. In bfloat16 and float16 at least 99.9 % of the results are the nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mlpext import _C, _extension, _torch_fallback
from mlpext._checks import PARAMETERS, activation_parameters
from mlpext._names import Activation

if _extension.missing is None:
    _torch_fallback.register()

_DEFAULTS = {name: tuple(defaults.values()) for name, defaults in PARAMETERS.items()}


def activations() -> list[Activation]:
    """Names of the elementwise activations that the compiled list holds, `identity` first.

    >>> mlpext.activations()[:3]
    ['identity', 'sigmoid', 'tanh']
    """
    return cast(list[Activation], list(PARAMETERS))


def _into(out: Tensor, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """`function` of torch, whose stubs leave `out` away."""
    return function(*args, out=out, **kwargs)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + e^-x), to 2.41 ULP, below -88 too.

    docs/lecture.md, row 3.

    >>> mlpext.functional.sigmoid(torch.tensor([-1.0, 2.0]))
    tensor([0.2689, 0.8808])
    """
    return _C.activation(input, "sigmoid")


def tanh(input: Tensor) -> Tensor:
    """tanh(x), to 1.45 ULP.

    docs/lecture.md, row 3.

    >>> mlpext.functional.tanh(torch.tensor([-1.0, 2.0]))
    tensor([-0.7616,  0.9640])
    """
    return _C.activation(input, "tanh")


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(0, x), exact.

    docs/lecture.md, row 3.

    >>> mlpext.functional.relu(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """
    return _C.activation(input, "relu", (), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x, and negative_slope x below 0, to 0.9 ULP.

    docs/lecture.md, row 3: max(0.1 x, x) is negative_slope=0.1. Maas et al., 2013.

    >>> mlpext.functional.leaky_relu(torch.tensor([-1.0, 2.0]), 0.1)
    tensor([-0.1000,  2.0000])
    """
    return _C.activation(input, "leaky_relu", (negative_slope,), inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x, and alpha (e^x - 1) below 0, to 1.0 ULP.

    docs/lecture.md, row 3; Clevert et al., 2015, arXiv:1511.07289.

    >>> mlpext.functional.elu(torch.tensor([-1.0, 2.0]))
    tensor([-0.6321,  2.0000])
    """
    return _C.activation(input, "elu", (alpha,), inplace)


def gelu(input: Tensor, approximate: str = "none", *, out: Tensor | None = None) -> Tensor:
    """x P(X <= x) for a normal X, to 2.9 ULP, in the negative tail too, where 1 + erf(x) cancels.

    approximate="tanh": x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), to 2.1 ULP of that. Hendrycks and
    Gimpel, 2016, arXiv:1606.08415.

    >>> mlpext.functional.gelu(torch.tensor([-1.0, 2.0]))
    tensor([-0.1587,  1.9545])
    """
    if out is not None:
        return _into(out, F.gelu, input, approximate=approximate)
    if approximate == "none":
        return _C.activation(input, "gelu")
    if approximate == "tanh":
        return _C.activation(input, "gelu_tanh")
    return F.gelu(input, approximate=approximate)  # raises


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x), to 2.4 ULP.

    Elfwing et al., 2017, arXiv:1702.03118; as swish, Ramachandran et al., 2017, arXiv:1710.05941.

    >>> mlpext.functional.silu(torch.tensor([-1.0, 2.0]))
    tensor([-0.2689,  1.7616])
    """
    return _C.activation(input, "silu", (), inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x tanh(log(1 + e^x)), to 2.9 ULP.

    Misra, 2019, arXiv:1908.08681.

    >>> mlpext.functional.mish(torch.tensor([-1.0, 2.0]))
    tensor([-0.3034,  1.9440])
    """
    return _C.activation(input, "mish", (), inplace)


def softplus(
    input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, out: Tensor | None = None
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold, to 1.7 ULP.

    Dugas et al., 2000.

    >>> mlpext.functional.softplus(torch.tensor([-1.0, 2.0]))
    tensor([0.3133, 2.1269])
    """
    if out is not None:
        return _into(out, F.softplus, input, beta, threshold)
    return _C.activation(input, "softplus", (beta, threshold))


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """scale x, and scale alpha (e^x - 1) below 0, scale = 1.0507, alpha = 1.6733, to 1.7 ULP.

    Klambauer et al., 2017, arXiv:1706.02515.

    >>> mlpext.functional.selu(torch.tensor([-1.0, 2.0]))
    tensor([-1.1113,  2.1014])
    """
    return _C.activation(input, "selu", (), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x, and alpha (e^(x / alpha) - 1) below 0, to 1.0 ULP.

    Barron, 2017, arXiv:1704.07483.

    >>> mlpext.functional.celu(torch.tensor([-1.0, 2.0]), 2.0)
    tensor([-0.7869,  2.0000])
    """
    return _C.activation(input, "celu", (alpha,), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(0, x), 6), exact.

    Howard et al., 2017, arXiv:1704.04861.

    >>> mlpext.functional.relu6(torch.tensor([-1.0, 9.0]))
    tensor([0., 6.])
    """
    return _C.activation(input, "relu6", (), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """x held between min_val and max_val, exact. ValueError where min_val > max_val.

    Collobert, 2004.

    >>> mlpext.functional.hardtanh(torch.tensor([-3.0, 0.5]))
    tensor([-1.0000,  0.5000])
    """
    return _C.activation(input, "hardtanh", (min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6, to 1.0 ULP.

    Howard et al., 2019, arXiv:1905.02244.

    >>> mlpext.functional.hardsigmoid(torch.tensor([-1.0, 2.0]))
    tensor([0.3333, 0.8333])
    """
    return _C.activation(input, "hardsigmoid", (), inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6, to 1.9 ULP.

    Howard et al., 2019, arXiv:1905.02244.

    >>> mlpext.functional.hardswish(torch.tensor([-1.0, 2.0]))
    tensor([-0.3333,  1.6667])
    """
    return _C.activation(input, "hardswish", (), inplace)


def logsigmoid(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """log(1 / (1 + e^-x)), to 1.7 ULP.

    >>> mlpext.functional.logsigmoid(torch.tensor([-1.0, 2.0]))
    tensor([-1.3133, -0.1269])
    """
    if out is not None:
        return _into(out, F.logsigmoid, input)
    return _C.activation(input, "logsigmoid")


def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|), to 1.5 ULP.

    Bergstra et al., 2009.

    >>> mlpext.functional.softsign(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  0.6667])
    """
    return _C.activation(input, "softsign")


def tanhshrink(input: Tensor) -> Tensor:
    """x - tanh(x), to 2.9 ULP.

    >>> mlpext.functional.tanhshrink(torch.tensor([-1.0, 2.0]))
    tensor([-0.2384,  1.0360])
    """
    return _C.activation(input, "tanhshrink")


def softshrink(input: Tensor, lambd: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """x moved towards 0 by lambd >= 0, and 0 where |x| <= lambd, to 0.5 ULP.

    >>> mlpext.functional.softshrink(torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  1.5000])
    """
    if out is not None:
        return _into(out, F.softshrink, input, lambd)
    return _C.activation(input, "softshrink", (lambd,))


def hardshrink(input: Tensor, lambd: float = 0.5, *, out: Tensor | None = None) -> Tensor:
    """x, and 0 where |x| <= lambd, exact.

    >>> mlpext.functional.hardshrink(torch.tensor([-0.2, 2.0]))
    tensor([0., 2.])
    """
    if out is not None:
        return _into(out, F.hardshrink, input, lambd)
    return _C.activation(input, "hardshrink", (lambd,))


def sine(input: Tensor, omega: float = 1.0) -> Tensor:
    """sin(omega x), the activation of SIREN networks (their omega is 30), to 2.4 ULP.

    Sitzmann et al., 2020, arXiv:2006.09661.

    >>> mlpext.functional.sine(torch.tensor([-1.0, 2.0]), omega=30.0)
    tensor([ 0.9880, -0.3048])
    """
    return _C.activation(input, "sine", (omega,))


def squareplus(input: Tensor, b: float = 4.0) -> Tensor:
    """(x + sqrt(x^2 + b)) / 2: a ReLU with a smooth corner, b > 0, to 2.8 ULP.

    Barron, 2021, arXiv:2112.11687.

    >>> mlpext.functional.squareplus(torch.tensor([-1.0, 2.0]))
    tensor([0.6180, 2.4142])
    """
    return _C.activation(input, "squareplus", (b,))


def relu_squared(input: Tensor) -> Tensor:
    """max(0, x)^2, to 0.5 ULP; transformers' "relu2".

    So et al., 2021, arXiv:2109.08668 (Primer).

    >>> mlpext.functional.relu_squared(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """
    return _C.activation(input, "relu_squared")


def quick_gelu(input: Tensor, alpha: float = 1.702) -> Tensor:
    """x sigmoid(alpha x), to 2.2 ULP: near gelu, and what CLIP was trained with.

    Radford et al., 2021, arXiv:2103.00020; Hendrycks and Gimpel, 2016, arXiv:1606.08415.

    >>> mlpext.functional.quick_gelu(torch.tensor([-1.0, 2.0]))
    tensor([-0.1542,  1.9357])
    """
    return _C.activation(input, "quick_gelu", (alpha,))


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x where x > threshold, else value, exact.

    As in torch a NaN stays one, with derivative 1. As the name of a layer's activation, as in
    `MLP([4, 8, 2], "threshold")`, both numbers are 0 unless they are given.

    >>> mlpext.functional.threshold(torch.tensor([0.5, 2.0]), 1.0, -7.0)
    tensor([-7.,  2.])
    """
    return _C.activation(input, "threshold", (threshold, value), inplace)


def maxout(input: Tensor, pieces: int, dim: int = -1, interleaved: bool = False) -> Tensor:
    """Maximum over `pieces` groups of the slices of `dim`, exact.

    Values as of `input.unflatten(dim, (pieces, -1)).amax(dim)`. In a tie the first piece takes the whole
    gradient; a NaN wins. Backward keeps the index of the winner, one byte an output up to 256 pieces, and
    neither input nor output. docs/lecture.md, row 3; Goodfellow et al., 2013, arXiv:1302.4389.

    Args:
        input: `dim` holds piece 0 of every output, then piece 1, and so on.
        pieces: how many inputs each output is the maximum of.
        dim: the dimension that holds the pieces.
        interleaved: `dim` holds all pieces of output 0, then those of output 1, and so on, as in Paddle,
            Chainer and Lasagne. A copy of the input is put in order then.

    Shape:
        (..., pieces * n, ...) -> (..., n, ...)

    Raises:
        RuntimeError: `pieces` does not divide the size of `dim`.

    >>> x = torch.tensor([1.0, 5.0, 3.0, 2.0])
    >>> mlpext.functional.maxout(x, pieces=2), mlpext.functional.maxout(x, pieces=2, interleaved=True)
    (tensor([3., 5.]), tensor([5., 3.]))
    """
    if interleaved:
        size = input.size(dim)
        if pieces < 1 or size % pieces:
            raise RuntimeError(f"pieces: {pieces} does not divide dimension {dim} of input, {size}")
        dim %= input.dim()
        input = torch.unflatten(input, dim, (-1, pieces)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return _C.maxout(input, pieces, dim)


def gated(gate: Tensor, value: Tensor, /, activation: Activation = "silu", **params: float) -> Tensor:
    """f(gate) * value in one pass over memory: the product inside a gated unit.

    Backward keeps gate and value, where torch's operators keep f(gate) too. Both may be halves of one tensor,
    of `z.chunk(2, -1)`, which are not copied. What torch broadcasts or promotes takes torch's operators.
    Shazeer, 2020, arXiv:2002.05202; Dauphin et al., 2017, arXiv:1612.08083 (sigmoid).

    Args:
        activation: f, one of `mlpext.activations()`: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU),
            "sigmoid" (GLU).
        params: its parameters, as of `linear_activation`.

    Shape:
        gate (*), value (*), both of one dtype -> (*)

    Raises:
        ValueError: `activation` is no known name.
        TypeError: it lacks one of `params`, or `gate` or `value` is no tensor.
        RuntimeError: the shapes of `gate` and `value` do not broadcast.

    >>> mlpext.functional.gated(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 0.5]), "relu")
    tensor([0., 1.])
    """
    values = (
        activation_parameters(activation, params)
        if params or activation not in _DEFAULTS
        else _DEFAULTS[activation]
    )
    return _C.gated(gate, value, activation, values)


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """The first half of `dim` times the sigmoid of the second: torch.nn.functional.glu, by `gated`.

    Shape:
        (..., 2 n, ...) -> (..., n, ...). Dauphin et al., 2017, arXiv:1612.08083.

    Raises:
        RuntimeError: the size of `dim` is odd, or `input` has no dimension.

    >>> mlpext.functional.glu(torch.tensor([3.0, 0.0]))
    tensor([1.5000])
    """
    if input.dim() == 0 or input.size(dim) % 2:
        return torch.nn.functional.glu(input, dim)  # which says what is wrong
    value, gate = torch.chunk(input, 2, dim)
    return _C.gated(gate, value, "sigmoid")


def linear_activation(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "relu",
    **params: float,
) -> Tensor:
    """f(x W' + b) as one operator: o = f(w1 x1 + ... + wn xn + b) for every neuron of a layer.

    Where the derivative follows from the output, backward keeps only the output. docs/lecture.md, rows 2
    and 4.

    Args:
        activation: one of `mlpext.activations()`.
        params: its parameters, `alpha=0.5`; those left out have torch's defaults.

    Shape:
        input (*, in_features), weight (out_features, in_features), bias (out_features,), all of one dtype
        -> (*, out_features)

    Raises:
        ValueError: `activation` is no known name.
        TypeError: it lacks one of `params`.

    >>> mlpext.functional.linear_activation(x, weight, bias, "elu", alpha=0.5).shape
    torch.Size([2, 3])
    """
    values = (
        activation_parameters(activation, params)
        if params or activation not in _DEFAULTS
        else _DEFAULTS[activation]
    )
    return _C.linear_activation(input, weight, bias, activation, values)


def linear_maxout(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """max over k of x W[k]' + b[k] as one operator, for any number of pieces k.

    docs/lecture.md, row 3, has it for two: max(w1'x + b1, w2'x + b2). Ties, NaN and what backward keeps are
    as of `maxout`.

    Shape:
        input (*, in_features), weight (pieces, out_features, in_features), bias (pieces, out_features), all
        of one dtype -> (*, out_features)

    >>> mlpext.functional.linear_maxout(x, torch.randn(2, 3, x.size(-1))).shape
    torch.Size([2, 3])
    """
    return _C.linear_maxout(input, weight, bias)


def linear_gated(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    **params: float,
) -> Tensor:
    """f(x W1' + b1) * (x W2' + b2) as one operator, a layer whose one half gates the other.

    weight[0] and bias[0] are W1 and b1, of the gate. Without gradients z = x W' + b is never stored; with
    them backward keeps z, two values an output, where torch's operators keep three. Shazeer, 2020,
    arXiv:2002.05202; Dauphin et al., 2017, arXiv:1612.08083 (sigmoid).

    Args:
        activation: f, one of `mlpext.activations()`: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU),
            "sigmoid" (GLU), "identity" (bilinear).
        params: its parameters, as of `linear_activation`.

    Shape:
        input (*, in_features), weight (2, out_features, in_features), bias (2, out_features), all of one
        dtype -> (*, out_features)

    Raises:
        ValueError: `activation` is no known name.
        TypeError: it lacks one of `params`.

    >>> mlpext.functional.linear_gated(x, torch.randn(2, 3, x.size(-1)), activation="gelu").shape
    torch.Size([2, 3])
    """
    values = (
        activation_parameters(activation, params)
        if params or activation not in _DEFAULTS
        else _DEFAULTS[activation]
    )
    return _C.linear_gated(input, weight, bias, activation, values)
