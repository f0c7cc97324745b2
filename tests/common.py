"""What the test files share: the operators under one roof, inputs for them, and how to compare."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as TF

import mlpext
import mlpext.functional as F
import reference

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(mlpext.activations())
# Activations that torch has no function for.
TORCH_LACKS = {name for name in NAMES if not hasattr(TF, name)} - {"identity", "gelu_tanh"}
CASES = [pytest.param(*case, id=reference.case_id(case)) for case in reference.CASES]
FUNCTIONAL_CASES = [case for case in CASES if case.values[0] != "identity"]  # identity has no functional


def values_of(name: str, parameters: dict) -> list[float]:
    """The parameters as the operators take them: all, in order."""
    return list({**mlpext._C.activations()[name], **parameters}.values())


def indices(names: Iterable[str]) -> list[int]:
    """Layers as the mlp operators are told of them: places in the list, -1 for maxout. "gated silu" is a
    gated layer, which its weight tells."""
    return [-1 if name == "maxout" else NAMES.index(name.removeprefix("gated ")) for name in names]


def stack(name: str) -> tuple[int, ...]:
    """How many matrices the weight of such a layer has; a maxout's two pieces."""
    return (2,) if name == "maxout" or name.startswith("gated ") else ()


def usual(name: str, parameters: dict) -> bool:
    """Whether the formulas of C++ take these parameters; torch's operators take the others, and all where
    there is no library."""
    if mlpext._extension.missing is not None:
        return False
    return name == "maxout" or mlpext._C.has_kernel(name, tuple(values_of(name, parameters)))


def arguments(name: str, parameters: dict, inplace: bool = False) -> dict:
    """Those of the function or module: torch's threshold takes both of its parameters at every call."""
    defaults = mlpext._C.activations()[name] if name == "threshold" else {}
    return {**defaults, **parameters, **({"inplace": True} if inplace else {})}


def eager(name: str, parameters: dict, inplace: bool = False) -> Callable:
    """The same activation out of PyTorch's own operators."""
    own: dict[str, Callable] = {
        "identity": lambda x: x,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu_tanh": functools.partial(TF.gelu, approximate="tanh"),
        "sine": lambda x, omega=1.0: torch.sin(x if omega == 1 else x * omega),
        "squareplus": lambda x, b=4.0: (x + torch.sqrt(x * x + b)) / 2,
        "relu_squared": lambda x: TF.relu(x).square(),
        "quick_gelu": lambda x, alpha=1.702: x * torch.sigmoid(alpha * x),
    }
    return functools.partial(own.get(name) or getattr(TF, name), **arguments(name, parameters, inplace))


def ours(name: str, parameters: dict, inplace: bool = False) -> Callable:
    """The same activation by its function in `mlpext.functional`; identity has none, only the operator."""
    if name == "identity":
        return lambda x: mlpext._C.activation(x, "identity")
    if name == "gelu_tanh":
        return functools.partial(F.gelu, approximate="tanh")
    return functools.partial(getattr(F, name), **arguments(name, parameters, inplace))


def module(namespace, name: str, parameters: dict, **extra) -> torch.nn.Module:
    """The module of that name in torch.nn or mlpext.nn."""
    if name == "gelu_tanh":
        return namespace.GELU(approximate="tanh", **parameters, **extra)
    return getattr(namespace, class_name(name))(**arguments(name, parameters), **extra)


def class_name(name: str) -> str:
    return next(c for c in dir(mlpext.nn) if c.lower() == name.replace("_", ""))


def has_inplace(name: str) -> bool:
    return name in (
        *("relu", "leaky_relu", "elu", "silu", "mish", "selu"),
        *("celu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "threshold"),
    )


INPLACE_CASES = [case for case in CASES if has_inplace(case.values[0])]


def drawn(count: int) -> Callable:
    """A test of `count` random.Randoms `r`, as hypothesis draws and shrinks them."""
    settings = hypothesis.settings(max_examples=count, suppress_health_check=list(hypothesis.HealthCheck))
    return lambda test: settings(hypothesis.given(r=st.randoms(use_true_random=False))(test))


def examples(*cases) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=repr)


@dataclass(frozen=True)
class Op:
    """An operator beside the same one out of PyTorch's own operators, with inputs for both."""

    id: str
    ours: Callable
    eager: Callable
    shapes: tuple[tuple[int, ...], ...]
    net: Callable  # inputs -> what the piecewise part sees
    kinks: tuple[float, ...] = ()
    pieces: int = 0

    def inputs(self, dtype=torch.float64, seed: int = 0, requires_grad: bool = True) -> list[torch.Tensor]:
        """Random, but nowhere within 0.01 of a kink or a tie, so that finite differences are valid."""
        for attempt in range(1000):
            generator = torch.Generator().manual_seed(1000 * seed + attempt)
            tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in self.shapes]
            if self._smooth(self.net(*tensors)):
                return [t.to(dtype).requires_grad_(requires_grad) for t in tensors]
        raise AssertionError(f"no smooth inputs for {self.id}")

    def _smooth(self, net: torch.Tensor) -> bool:
        if self.pieces:
            top = net.topk(2, dim=0).values
            return bool(((top[0] - top[1]) > 0.01).all())
        return all(bool(((net - k).abs() > 0.01).all()) for k in self.kinks)

    def __call__(self, *tensors):
        return self.ours(*tensors)


def differentiable(name: str, parameters: dict) -> Callable:
    """Torch's, but for hardsigmoid: its backward has no derivative in PyTorch, the same by relu6 has."""
    return (lambda x: TF.relu6(x + 3) / 6) if name == "hardsigmoid" else eager(name, parameters)


def activation_op(name: str, parameters: dict) -> Op:
    return Op(
        id=reference.case_id((name, parameters)),
        ours=ours(name, parameters),
        eager=differentiable(name, parameters),
        shapes=((3, 4),),
        net=lambda x: x,
        kinks=reference.kinks(name, parameters),
    )


def linear_op(name: str, parameters: dict, bias: bool = True) -> Op:
    f = differentiable(name, parameters)
    return Op(
        id=f"linear_{reference.case_id((name, parameters))}" + ("" if bias else "_no_bias"),
        ours=lambda x, w, b=None: F.linear_activation(x, w, b, activation=name, **parameters),
        eager=lambda x, w, b=None: f(TF.linear(x, w, b)),
        shapes=((3, 4), (5, 4), (5,)) if bias else ((3, 4), (5, 4)),
        net=TF.linear,
        kinks=reference.kinks(name, parameters),
    )


def eager_maxout(x: torch.Tensor, pieces: int, dim: int = -1) -> torch.Tensor:
    dim %= x.dim()
    return x.unflatten(dim, (pieces, -1)).max(dim).values


def eager_linear_maxout(x, weight, bias=None):
    net = TF.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return net.unflatten(-1, weight.shape[:2]).max(-2).values


def maxout_op(pieces: int, dim: int) -> Op:
    return Op(
        id=f"maxout(pieces={pieces},dim={dim})",
        ours=lambda x: F.maxout(x, pieces, dim),
        eager=lambda x: eager_maxout(x, pieces, dim),
        shapes=((6, 6),),
        net=lambda x: x.unflatten(dim, (pieces, -1)).movedim(dim % 2, 0),
        pieces=pieces,
    )


def linear_maxout_op(pieces: int, bias: bool = True) -> Op:
    return Op(
        id=f"linear_maxout(pieces={pieces})" + ("" if bias else "_no_bias"),
        ours=lambda x, w, b=None: F.linear_maxout(x, w, b),
        eager=eager_linear_maxout,
        shapes=((3, 4), (pieces, 5, 4), (pieces, 5)) if bias else ((3, 4), (pieces, 5, 4)),
        net=lambda x, w, b=None: (
            TF.linear(x, w.flatten(0, 1), None if b is None else b.flatten())
            .unflatten(-1, w.shape[:2])
            .movedim(-2, 0)
        ),
        pieces=pieces,
    )


def halves(x, w, b=None):
    """z of a gated layer's gate and of its value."""
    z = TF.linear(x, w.flatten(0, 1), None if b is None else b.flatten())
    return z.unflatten(-1, (2, -1)).unbind(-2)


def linear_gated_op(name: str, parameters: dict, bias: bool = True) -> Op:
    f = differentiable(name, parameters)

    def eager(*tensors):
        gate, value = halves(*tensors)
        return f(gate) * value

    return Op(
        id=f"linear_gated_{reference.case_id((name, parameters))}" + ("" if bias else "_no_bias"),
        ours=lambda x, w, b=None: F.linear_gated(x, w, b, activation=name, **parameters),
        eager=eager,
        shapes=((3, 4), (2, 5, 4), (2, 5)) if bias else ((3, 4), (2, 5, 4)),
        net=lambda *tensors: halves(*tensors)[0],
        kinks=reference.kinks(name, parameters),
    )


def gated_op(name: str, parameters: dict, halves: bool = False) -> Op:
    """Of gate and value, or of the one tensor whose halves they are."""
    f = differentiable(name, parameters)

    def both(*tensors):
        return tensors[0].chunk(2, -1) if halves else tensors

    def ours(*tensors):
        gate, value = both(*tensors)
        return F.gated(gate, value, name, **parameters)

    def eager(*tensors):
        gate, value = both(*tensors)
        return f(gate) * value

    return Op(
        id=f"gated_{reference.case_id((name, parameters))}" + ("_halves" if halves else ""),
        ours=ours,
        eager=eager,
        shapes=((3, 8),) if halves else ((3, 4), (3, 4)),
        net=lambda *tensors: both(*tensors)[0],
        kinks=reference.kinks(name, parameters),
    )


def mlp_op(*layers: tuple[str, dict], bias: bool = True) -> Op:
    """A network of 4, 5, 5, ... units, "gated silu" for a gated layer; at most one layer may have kinks or be
    maxout (of 2 pieces)."""
    count, pieces = len(layers), 2
    names: list[Any] = [name.removeprefix("gated ") for name, _ in layers]
    net = mlpext.nn.MLP([4, *[5] * count], names[:-1], names[-1], bias)
    for i, (name, parameters) in enumerate(layers):
        if name.startswith("gated "):
            net[i] = mlpext.nn.GatedLinear(5 if i else 4, 5, names[i], bias)
        vars(net[i]).get("params", {}).update(parameters)
    weights = [(*stack(name), 5, 5 if i else 4) for i, (name, _) in enumerate(layers)]
    biases = [(*stack(name), 5) for name, _ in layers] if bias else []
    keys = [f"{i}.{kind}" for kind in ("weight", "bias")[: 1 + bias] for i in range(count)]

    def preactivations(x, *parameters):
        for i, (name, own) in enumerate(layers):
            weight, b = parameters[i], parameters[count + i] if bias else None
            if name == "maxout":
                net = linear_maxout_op(pieces, bias).net(x, weight, b)
                x = net.max(0).values
            elif name.startswith("gated "):
                net, value = halves(x, weight, b)
                x = differentiable(name.removeprefix("gated "), own)(net) * value
            else:
                net = TF.linear(x, weight, b)
                x = differentiable(name, own)(net)
            yield name, net, x

    kinked = {
        name: reference.kinks(name.removeprefix("gated "), own) for name, own in layers if name != "maxout"
    }
    rough = next((name for name, _ in layers if name == "maxout" or kinked[name]), layers[0][0])

    def ours(x, *parameters):
        if torch.jit.is_tracing():  # which refuses functional_call
            activations = indices(name for name, _ in layers)
            owns = zip(names, layers, strict=True)
            values = [v for name, (_, own) in owns if name != "maxout" for v in values_of(name, own)]
            return torch.ops.mlpext.mlp(x, parameters[:count], parameters[count:], activations, values)
        return torch.func.functional_call(net, dict(zip(keys, parameters, strict=True)), (x,))

    return Op(
        id=f"mlp_{'_'.join(name.replace(' ', '_') for name, _ in layers)}" + ("" if bias else "_no_bias"),
        ours=ours,
        eager=lambda *tensors: [x for *_, x in preactivations(*tensors)][-1],
        shapes=((3, 4), *weights, *biases),
        net=lambda *tensors: next(net for name, net, _ in preactivations(*tensors) if name == rough),
        kinks=kinked.get(rough, ()),
        pieces=pieces if rough == "maxout" else 0,
    )


def _parametrize(ops):
    return pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in ops])


ACTIVATION_OPS = [activation_op(*case.values) for case in FUNCTIONAL_CASES]
LINEAR_OPS = [linear_op(*case.values) for case in CASES]
MAXOUT_OPS = [
    *(maxout_op(3, -1), maxout_op(2, 0)),
    *(linear_maxout_op(3), linear_maxout_op(2, bias=False)),
]
MLP_OPS = [
    mlp_op(("tanh", {}), ("sigmoid", {}), ("identity", {})),
    mlp_op(("gelu", {}), ("elu", {"alpha": 0.3}), bias=False),
    mlp_op(("maxout", {}), ("softplus", {})),
    mlp_op(("gated silu", {}), ("identity", {}), bias=False),  # GatedMLP
    mlp_op(("tanh", {}), ("gated elu", {"alpha": 0.3}), ("gated identity", {}), ("sigmoid", {})),
]
# The gate is an activation like any other, and test_linear_gated.py has all of them: here are those that
# people take, one with a parameter, and one without a kernel.
GATED_OPS = [
    *(linear_gated_op(name, {}) for name in ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "identity")),
    *(linear_gated_op("elu", {"alpha": alpha}) for alpha in (0.3, -0.5)),
    linear_gated_op("silu", {}, bias=False),
    *(gated_op(name, {}) for name in ("silu", "gelu", "relu", "sigmoid", "identity")),
    *(gated_op("elu", {"alpha": alpha}) for alpha in (0.3, -0.5)),
]
ALL_OPS = [*ACTIVATION_OPS, *LINEAR_OPS, *MAXOUT_OPS, *GATED_OPS, *MLP_OPS]
# One of each way through the core: what is kept (x, y, neither, an index), a parameter, the composite path.
FEW_OPS = [
    activation_op("sigmoid", {}),
    activation_op("elu", {"alpha": 0.3}),
    activation_op("gelu_tanh", {}),
    activation_op("elu", {"alpha": -0.5}),
    linear_op("identity", {}),
    linear_op("tanh", {}),
    linear_op("leaky_relu", {"negative_slope": 0.1}),
    linear_op("elu", {"alpha": 0.3}, bias=False),
    linear_op("elu", {"alpha": -0.5}),
    linear_op("gelu", {}),
    linear_gated_op("silu", {}),
    linear_gated_op("identity", {}),
    linear_gated_op("elu", {"alpha": -0.5}, bias=False),
    gated_op("silu", {}, halves=True),
    gated_op("elu", {"alpha": -0.5}, halves=True),
    *MAXOUT_OPS,
    *MLP_OPS,
]

# Each activation once, and each way through the core: for what costs seconds.
DEFAULT_OPS = [*(op for op in ACTIVATION_OPS if "=" not in op.id and op.id != "sigmoid"), *FEW_OPS]

all_ops = _parametrize(ALL_OPS)
few_ops = _parametrize(FEW_OPS)
default_ops = _parametrize(DEFAULT_OPS)
every_case = pytest.mark.parametrize("name, parameters", CASES)
every_functional_case = pytest.mark.parametrize("name, parameters", FUNCTIONAL_CASES)
every_inplace_case = pytest.mark.parametrize("name, parameters", INPLACE_CASES)
on_gpu = torch.cuda.is_available() and mlpext._C.has_cuda()
ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason="no GPU, or no CUDA in this build")]
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of every element, all NaNs as one."""
    size = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    x = x.detach().contiguous()
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(size)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    different = bits(actual) != bits(expected)
    if different.any():
        where = different.nonzero()[:5].tolist()
        got, wanted = actual[different][:5].tolist(), expected[different][:5].tolist()
        raise AssertionError(f"{what}: bits differ at {where}: {got} instead of {wanted}")


def gradients(f: Callable, inputs, seed: int = 7, **kwargs):
    """Output and gradients for a fixed random cotangent; everything detached."""
    output = f(*inputs)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    wanted = [t for t in inputs if t.requires_grad]
    return output.detach(), *torch.autograd.grad(output, wanted, cotangent, **kwargs)


def outcome(f: Callable, *args, **kwargs):
    """What happens: the result, or the type of the exception."""
    try:
        return f(*args, **kwargs)
    except Exception as error:
        return type(error)


def assert_same_outcome(actual, expected, what: object = "") -> None:
    if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
        assert actual.layout == expected.layout, what
        if actual.is_meta:
            assert (actual.shape, actual.dtype, actual.device) == (
                expected.shape,
                expected.dtype,
                expected.device,
            ), what
            return
        torch.testing.assert_close(
            actual,
            expected,
            equal_nan=True,
            check_stride=actual.layout == torch.strided,
            msg=lambda m: f"{what}: {m}",
        )
    else:
        assert actual is expected, f"{what}: {actual} instead of {expected}"


# precision in bits and smallest normal exponent of each type
_FORMATS = {
    torch.float64: (53, -1022),
    torch.float32: (24, -126),
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
}


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` around x."""
    precision, smallest = _FORMATS[dtype]
    exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))[1] - 1
    return np.ldexp(1.0, np.maximum(np.where(x == 0, smallest, exponent), smallest) - (precision - 1))


def distance(actual: torch.Tensor, leading: np.ndarray, rest: np.ndarray | float = 0.0) -> np.ndarray:
    """|actual - (leading + rest)|; 0 where both overflow to the same infinity, inf where one is NaN."""
    got = actual.detach().to(torch.float64).numpy()
    overflows = np.abs(leading) > torch.finfo(actual.dtype).max
    with np.errstate(all="ignore"):
        error = np.abs((got - leading) - rest)
        error = np.where(overflows & np.isinf(got) & (np.sign(got) == np.sign(leading)), 0.0, error)
    return np.where(np.isnan(error), np.inf, error)


def worst(error: np.ndarray, points: np.ndarray) -> str:
    i = int(np.argmax(error))
    return f"{error[i]:.4g} at x = {points[i]!r}"


def points(name: str, parameters: dict, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Where to look: small and large magnitudes, where activations bend, each side of each kink."""
    rng = np.random.default_rng(1)
    info = torch.finfo(dtype)
    magnitudes = np.logspace(math.log10(info.tiny) - 1, math.log10(info.max) - 0.01, count // 4)
    parts = [rng.uniform(-8, 8, count // 4), rng.uniform(-110, 110, count // 4), rng.normal(0, 1, count // 8)]
    parts += [magnitudes[::2], -magnitudes[1::2], np.array([0.0, -0.0])]
    x = torch.tensor(np.concatenate(parts), dtype=torch.float64).to(dtype)
    at = torch.tensor([*reference.kinks(name, parameters)], dtype=dtype)
    inf = torch.tensor(math.inf, dtype=dtype)
    around = [at, torch.nextafter(at, inf), torch.nextafter(at, -inf)] if len(at) else []
    return torch.cat([x, *around]).clone()


def assert_close(actual, expected, what: object = "", **tolerance) -> None:
    torch.testing.assert_close(actual, expected, msg=lambda m: f"{what}: {m}", **tolerance)


def reference_of(name, parameters, x):
    """[value | derivative][leading | rest] at the points of a tensor."""
    at = x.double().numpy()
    if x.dtype == torch.float64:
        return reference.exact(name, parameters, at)
    return [(v, 0.0) for v in reference.fast(name, parameters, at)]


def gradients_of_ones(f, x):
    x = x.detach().clone().requires_grad_()
    y = f(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def every_finite(dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return x[x.isfinite()]


class Kept:
    """Counts the bytes of distinct storages that the saved-tensor hooks see, but for the given tensors."""

    def __init__(self, *known):
        self.known = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.sizes, self.tensors = {}, 0

    def __enter__(self):
        def pack(t):
            self.tensors += 1
            pointer = t.untyped_storage().data_ptr()
            if pointer not in self.known:
                self.sizes[pointer] = t.untyped_storage().nbytes()
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    @property
    def bytes(self):
        return sum(self.sizes.values())
