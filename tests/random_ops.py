"""Random calls of every operator beside torch's own: test_random_ops.py draws some, `make fuzz` as many as
one likes.

A case is an operator, its inputs, and a way to call it. The same way is gone with torch's operators: in the
case's dtype for what is to happen (exception, shape, dtype, strides, whether a gradient is wanted), and in
float64 for the numbers. What may differ stands in DIFFERENCES.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as TF
from torch.func import functional_call, grad, jvp, vmap

import accuracy
import common
import mlpext
import mlpext.functional as F
import random_fits
import reference
from random_fits import GRID, short

Tensors = list[torch.Tensor]
Params = tuple[tuple[str, float], ...]
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
OTHER_DTYPES = {
    name: getattr(torch, name) for name in ("int64", "uint8", "bool", "complex64", "float8_e4m3fn")
}


@dataclass(frozen=True, repr=False)
class Layer:
    """Maxout of `pieces`, or an activation."""

    width: int = 0
    name: str = "tanh"
    params: Params = ()
    pieces: int = 2
    gated: bool = False  # the activation is that of a gate

    __repr__ = short

    @property
    def stack(self) -> tuple[int, ...]:
        """How many matrices its weight has."""
        return (self.pieces,) if self.name == "maxout" else (2,) if self.gated else ()


@dataclass(frozen=True, repr=False)
class Case:
    """One call. The numbers follow from `seed`. `layouts` are those of the inputs, the last the gradient's;
    `masks` says which inputs want a gradient; `wrong` is what does not fit."""

    family: str = "activation"
    layers: tuple[Layer, ...] = (Layer(),)
    shape: tuple[int, ...] = (5,)
    dim: int = -1  # of maxout alone
    bias: bool = True
    entry: str = "function"
    dtype: str = "float32"
    values: str = "normal"
    layouts: tuple[str, ...] = ("contiguous",)
    masks: tuple[bool, ...] = (True,)
    way: str = "backward"
    wrong: str = ""
    seed: int = 0

    __repr__ = short

    @property
    def layer(self) -> Layer:
        return self.layers[0]

    @property
    def params(self) -> dict[str, float]:
        return dict(self.layer.params)

    @property
    def usual(self) -> bool:
        """Whether the kernels take these parameters; else torch's operators do."""
        if any(dict(layer.params).get("beta") == 0 for layer in self.layers):
            return False  # softplus is then infinite, as torch's is, but reference.py cannot divide
        return all(common.usual(layer.name, dict(layer.params)) for layer in self.layers)

    @property
    def exact(self) -> bool:
        """Whether every number on the way is one that float32 holds."""
        plain = all(layer.name in GRID and not layer.params for layer in self.layers)
        return (
            plain and self.values == "grid" and self.dtype in ("float32", "float64") and self.way in ORDINARY
        )


def _native_layer(layer: Layer, x: Any, weight: Any, bias: Any) -> Any:
    if layer.name == "maxout":
        return common.eager_linear_maxout(x, weight, bias)
    torchs = common.differentiable if x.is_floating_point() else common.eager
    f = torchs(layer.name, dict(layer.params))
    if layer.gated:
        gate, value = _halves(x, weight, bias)
        return f(gate) * value
    return f(TF.linear(x, weight, bias))


def _halves(x: Any, weight: Any, bias: Any) -> Any:
    """z of the gate and of the value."""
    z = TF.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return z.unflatten(-1, (2, -1)).unbind(-2)


def _module(layer: Layer, weight: Any, bias: Any) -> torch.nn.Module:
    """Of the sizes of `weight`, without parameters of its own."""
    sizes = {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
    if layer.name == "maxout":
        return mlpext.nn.Maxout(weight.shape[-1], weight.shape[1], weight.shape[0], **sizes)
    sizes |= dict(layer.params)
    if layer.gated:
        return mlpext.nn.GatedLinear(weight.shape[-1], weight.shape[1], layer.name, **sizes)
    return mlpext.nn.LinearActivation(weight.shape[-1], weight.shape[0], layer.name, **sizes)


def _our_layer(layer: Layer, module: Any, x: Any, weight: Any, bias: Any) -> Any:
    if module is not None:
        given = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return functional_call(module, given, (x,))
    if layer.name == "maxout":
        return F.linear_maxout(x, weight, bias)
    if layer.gated:
        return F.linear_gated(x, weight, bias, layer.name, **dict(layer.params))
    return F.linear_activation(x, weight, bias, layer.name, **dict(layer.params))


def functions(case: Case, tensors: Tensors) -> tuple[Callable, Callable]:
    """Of the inputs as `inputs` makes them."""
    layer, count = case.layer, len(case.layers)
    if case.family == "activation":
        return _activations(case)
    if case.family == "gated":
        f = (common.differentiable if case.dtype in DTYPES else common.eager)(layer.name, case.params)
        return (
            lambda gate, value: F.gated(gate, value, layer.name, **case.params),
            lambda gate, value: f(gate) * value,
        )
    if case.family == "maxout":
        below = case.dim if case.dim >= 0 else case.dim - 1
        return (
            lambda x: F.maxout(x, layer.pieces, case.dim),
            lambda x: x.unflatten(case.dim, (layer.pieces, -1)).max(below).values,
        )
    bias_of = (lambda rest, i: rest[count + i]) if case.bias else (lambda rest, i: None)
    modules: list[Any] = [None] * count
    if case.entry == "module" and not case.wrong and case.dtype in DTYPES:
        rest = tensors[1:]
        modules = [_module(each, rest[i], bias_of(rest, i)) for i, each in enumerate(case.layers)]
    if case.family == "layer":
        return (
            lambda x, w, b=None: _our_layer(layer, modules[0], x, w, b),
            lambda x, w, b=None: _native_layer(layer, x, w, b),
        )

    def eager(x: Any, *rest: Any) -> Any:
        for i, each in enumerate(case.layers):
            x = _native_layer(each, x, rest[i], bias_of(rest, i))
        return x

    if modules[0] is None:
        activations = common.indices(each.name for each in case.layers)
        params = [
            value
            for each in case.layers
            if each.name != "maxout"
            for value in common.values_of(each.name, dict(each.params))
        ]
        mlp = torch.ops.mlpext.mlp
        return lambda x, *rest: mlp(x, rest[:count], rest[count:], activations, params), eager
    net = mlpext.nn.MLP([1] * (count + 1), bias=case.bias)
    for i, module in enumerate(modules):
        net[i] = module
    keys = [f"{i}.{kind}" for kind in ("weight", "bias")[: 1 + case.bias] for i in range(count)]
    return lambda x, *rest: functional_call(net, dict(zip(keys, rest, strict=True)), (x,)), eager


def _activations(case: Case) -> tuple[Callable, Callable]:
    name, params = case.layer.name, case.params
    if name == "identity":
        return common.ours(name, params), torch.clone
    inplace = case.way in IN_PLACE
    extra = {"inplace": True} if inplace else {}
    torchs = common.eager if inplace or case.dtype not in DTYPES else common.differentiable
    ours, eager = common.ours(name, params, inplace), torchs(name, {**params, **extra})
    if case.entry == "module":
        ours = lambda x: common.module(mlpext.nn, name, params, **extra)(x)  # noqa: E731
        if name not in {*common.TORCH_LACKS, "hardsigmoid"}:
            eager = lambda x: common.module(torch.nn, name, params, **extra)(x)  # noqa: E731
    return ours, eager


def _permuted(t: torch.Tensor) -> torch.Tensor:
    back = tuple(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


def _padded(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Every second along `dim` of a larger tensor."""
    return torch.stack([t, torch.full_like(t, 7)], dim % t.dim() + 1).flatten(
        dim % t.dim(), dim % t.dim() + 1
    )[(slice(None),) * (dim % t.dim()) + (slice(None, None, 2),)]


def _overlapping(t: torch.Tensor) -> torch.Tensor:
    base = torch.cat([t.flatten(), t.flatten()[:1]])
    return base.as_strided(t.shape, [1 if size > 1 else 0 for size in t.shape]) if t.numel() else t


# Some change the values: what is drawn is then only where they come from.
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "transposed": _permuted,
    "columns apart": lambda t: _padded(t, -1) if t.dim() else t,
    "rows apart": lambda t: _padded(t, 0) if t.dim() else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "one number": lambda t: t.flatten()[0].expand(t.shape) if t.numel() else t,
    "overlapping": _overlapping,
    "negative": lambda t: torch._neg_view(-t) if t.is_floating_point() and t.element_size() > 1 else t,
}
SPECIALS = (math.nan, math.inf, -math.inf, -0.0)


class Numbers:
    """The tensors of a case, drawn one after the other."""

    def __init__(self, case: Case, stream: int = 0) -> None:
        self.case, self.dtype = case, (DTYPES | OTHER_DTYPES)[case.dtype]
        self.random = np.random.default_rng([case.seed, stream])

    def draw(self, shape: tuple[int, ...], layout: str, scale: float = 1.0) -> torch.Tensor:
        kind = self.case.values
        if kind == "grid":
            values = self.random.integers(-4, 5, size=shape) / (2 if scale == 1 else 4)
        else:
            values = self.random.normal(size=shape) * scale
        if kind == "wide" and self.dtype.is_floating_point:
            # In float64 as far as squares go: reference.py takes some.
            reach = min(math.log(torch.finfo(self.dtype).max) * 1.05, 340)
            with np.errstate(over="ignore"):
                values = np.asarray(values * np.exp(self.random.uniform(-reach, reach, size=shape)))
        t = torch.as_tensor(values)
        t = (t * 3 if not self.dtype.is_floating_point else t).to(self.dtype)
        if kind == "special" and t.numel() and t.is_floating_point():
            for _ in range(self.random.integers(0, 3)):
                t.view(-1)[self.random.integers(t.numel())] = self.random.choice(SPECIALS)
        return LAYOUTS[layout](t)


def inputs(case: Case) -> Tensors:
    """x, the weights, the biases; detached."""
    numbers = Numbers(case)
    layouts = [*case.layouts, *["contiguous"] * 9]
    tensors = [numbers.draw(case.shape, layouts[0])]
    if case.family in ("activation", "maxout"):
        return tensors
    if case.family == "gated":
        last = [size + (case.wrong == "in_features") for size in case.shape[-1:]]
        value = numbers.draw((*case.shape[:-1], *last), layouts[1])
        return [*tensors, value.double() if case.wrong == "dtype" else value]
    sizes = [case.shape[-1] if case.shape else 1, *(layer.width for layer in case.layers)]
    stacks = [layer.stack for layer in case.layers]
    if case.wrong == "in_features":
        sizes[0] += 1
    for i, stack in enumerate(stacks):
        scale = 1 / math.sqrt(max(sizes[i], 1))
        tensors.append(numbers.draw((*stack, sizes[i + 1], sizes[i]), layouts[len(tensors)], scale))
    for i, stack in enumerate(stacks if case.bias else []):
        size = sizes[i + 1] + (case.wrong == "bias")
        tensors.append(numbers.draw((*stack, size), layouts[len(tensors)], 0.5))
    if case.wrong == "dtype":
        k = case.seed % len(tensors)
        tensors[k] = tensors[k].to(torch.float64 if case.dtype != "float64" else torch.float32)
    if case.wrong == "dim":
        tensors[1] = tensors[1].unsqueeze(0).unsqueeze(0)
    return tensors


class Call:
    """One way gone with one function: `record` notes what has to be the same of each tensor."""

    def __init__(self, case: Case, tensors: Tensors, cotangent: Callable[[Any], torch.Tensor]) -> None:
        self.case, self.cotangent = case, cotangent
        masks = [*case.masks, *[True] * len(tensors)]
        self.inputs = [
            t.detach().requires_grad_(masks[i] and (t.is_floating_point() or t.is_complex()))
            for i, t in enumerate(tensors)
        ]
        self.wanted = [t for t in self.inputs if t.requires_grad]
        self.facts: list[Any] = []

    def record(self, y: torch.Tensor) -> None:
        self.facts.append((y.requires_grad, y.is_leaf, y.is_inference()))

    def gradients(self, y: torch.Tensor, **options: Any) -> Tensors:
        self.record(y)
        if not self.wanted or not y.requires_grad:
            return [y]
        return [y, *torch.autograd.grad(y, self.wanted, self.cotangent(y), **options)]

    def along(self) -> tuple[Tensors, tuple[int | None, ...]]:
        """Some of the inputs three times, along a dimension of their own; x is always one."""
        dims = [self.case.seed % (self.inputs[0].dim() + 1)]
        dims += [0 if self.case.seed >> k & 1 else None for k in range(1, len(self.inputs))]
        detached = [t.detach() for t in self.inputs]
        stacked = [
            t if d is None else torch.stack([t, 2 * t, -t], d) for t, d in zip(detached, dims, strict=True)
        ]
        return stacked, tuple(dims)

    def scalar(self, f: Callable) -> Callable:
        return lambda *tensors: (y := f(*tensors)).mul(self.cotangent(y)).sum()

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(len(self.inputs)))

    def tangents(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.detach().flip(0) / 2 if t.dim() else t.detach() / 2 for t in self.inputs)

    def primals(self) -> tuple[torch.Tensor, ...]:
        return tuple(t.detach() for t in self.inputs)


def _no_grad(call: Call, f: Callable) -> Tensors:
    with torch.no_grad():
        y = f(*call.inputs)
    call.record(y)
    return [y]


def _inference(call: Call, f: Callable) -> Tensors:
    with torch.inference_mode():
        y = f(*call.inputs)
    call.record(y)
    return [y]


def _autocast(call: Call, f: Callable, dtype: torch.dtype) -> Tensors:
    with torch.autocast("cpu", dtype=dtype):
        y = f(*call.inputs)
    return call.gradients(y)


def _hooks(call: Call, f: Callable) -> Tensors:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = f(*call.inputs)
    return call.gradients(y)


def _twice(call: Call, f: Callable) -> Tensors:
    """A gradient of the sum of gradients, each weighted with its own input."""
    y, *first = call.gradients(f(*call.inputs), create_graph=True)
    total = sum((g * t.detach()).sum() for g, t in zip(first, call.wanted, strict=False))
    if not first or not total.requires_grad:
        return [y, *first]
    second = torch.autograd.grad(total, call.wanted, allow_unused=True, materialize_grads=True)
    return [y, *first, *second]


def _batched(call: Call, f: Callable) -> Tensors:
    y = f(*call.inputs)
    call.record(y)
    if not call.wanted or not y.requires_grad:
        return [y]
    several = torch.stack([g := call.cotangent(y), 2 * g])
    return [y, *torch.autograd.grad(y, call.wanted, several, is_grads_batched=True)]


def _vmap(call: Call, f: Callable) -> Tensors:
    stacked, dims = call.along()
    return [vmap(f, dims)(*stacked)]


def _per_sample(call: Call, f: Callable) -> Tensors:
    stacked, dims = call.along()
    return [*vmap(grad(call.scalar(f), call.all), dims)(*stacked)]


def _jvp(call: Call, f: Callable) -> Tensors:
    return [*jvp(f, call.primals(), call.tangents())]


def _hessian_product(call: Call, f: Callable) -> Tensors:
    first, second = jvp(grad(call.scalar(f), call.all), call.primals(), call.tangents())
    return [*first, *second]


def _compiled(call: Call, f: Callable) -> Tensors:
    torch.compiler.reset()
    return call.gradients(torch.compile(f, backend="aot_eager", fullgraph=True)(*call.inputs))


def _in_place(call: Call, f: Callable) -> Tensors:
    base = call.inputs[0] * 1
    f(base)
    return call.gradients(base)


def _in_place_of_a_view(call: Call, f: Callable) -> Tensors:
    base = call.inputs[0] * 1
    f(base[..., ::2] if base.dim() else base.view(1))
    return call.gradients(base)


def _in_place_of_a_leaf(call: Call, f: Callable) -> Tensors:
    leaf = call.inputs[0].clone().detach().requires_grad_(call.inputs[0].requires_grad)
    y = f(leaf)
    assert y is leaf
    return call.gradients(y)


WAYS: dict[str, Callable[[Call, Callable], Tensors]] = {
    "backward": lambda call, f: call.gradients(f(*call.inputs)),
    "no_grad": _no_grad,
    "inference_mode": _inference,
    "autocast bfloat16": functools.partial(_autocast, dtype=torch.bfloat16),
    "autocast float16": functools.partial(_autocast, dtype=torch.float16),
    "saved tensors hooks": _hooks,
    "twice": _twice,
    "is_grads_batched": _batched,
    "vmap": _vmap,
    "per sample": _per_sample,
    "jvp": _jvp,
    "hessian product": _hessian_product,
    "in place": _in_place,
    "in place of a view": _in_place_of_a_view,
    "in place of a leaf": _in_place_of_a_leaf,
    "compile": _compiled,  # as slow as hundreds of the others: drawn only where it is asked for
}
# Where every result is a value or a first derivative.
ORDINARY = ("backward", "no_grad", "inference_mode", "saved tensors hooks", "in place", "in place of a view")
FUNCTORCH = ("vmap", "per sample", "jvp", "hessian product")
IN_PLACE = tuple(way for way in WAYS if way.startswith("in place"))


@dataclass(frozen=True)
class Problem:
    """Where ours is not torch's: `what` is "exception", "facts", "shape", "dtype", "strides" or "numbers",
    `result` the tensor's number, `ours` and `eager` one example."""

    what: str
    ours: Any
    eager: Any
    result: int = 0
    text: str = ""

    def __str__(self) -> str:
        return self.text or f"{self.what} of result {self.result}: {self.ours} instead of {self.eager}"


def _of_a_gradient(case: Case, problem: Problem) -> bool:
    every = case.family in ("layer", "mlp") and case.way == "per sample"
    return problem.what == "strides" and (problem.result > 0 or every)


DIFFERENCES: dict[str, Callable[[Case, Problem], bool]] = {
    "a layer's gradients are contiguous; torch's are transposed where its product is": (
        lambda case, problem: case.family in ("layer", "mlp") and _of_a_gradient(case, problem)
    ),
    "a gradient has the layout of x; relu's, leaky_relu's, threshold's, a second one, and torch's of a "
    "gradient that is not contiguous, may have another": (
        lambda case, problem: (
            case.family in ("activation", "gated")
            and (
                case.layer.name in ("relu", "leaky_relu", "threshold")
                or case.layouts[-1] != "contiguous"
                or case.way not in ORDINARY
            )
            and _of_a_gradient(case, problem)
        )
    ),
    "torch has no such function; out of several operators come other strides, and refusals": (
        lambda case, problem: (
            (case.layer.name in {"identity", *common.TORCH_LACKS} or not case.usual)
            and problem.what in ("strides", "exception")
        )
    ),
    "torch's forward mode makes float64 tangents of a 0-d tensor and a number": (
        lambda case, problem: case.shape == () and problem.what == "dtype" and problem.eager == torch.float64
    ),
    "torch's logsigmoid is contiguous; here it has the layout of x, as every other function has": (
        lambda case, problem: case.layer.name == "logsigmoid" and problem.what == "strides"
    ),
    "a bias of another size or dtype is refused here; torch's linear adds what it can broadcast": (
        lambda case, problem: (
            case.wrong in ("bias", "dtype")
            and problem.what in ("exception", "dtype", "shape")
            and (problem.eager == "None" or case.way in FUNCTORCH)
        )
    ),
    "elu: the exponential far below 0 is 2^-1100 times alpha, not 0, and a subnormal alpha has few digits": (
        lambda case, problem: (
            problem.what == "numbers"
            and problem.result > 0
            and case.layer.name == "elu"
            and not 1e-300 < abs(case.params.get("alpha", 1)) < 1e20
        )
    ),
    "torch's gelu fails where elements of the gradient share memory": (
        lambda case, problem: "memory descriptor" in str(problem.eager)
    ),
    "the derivative at NaN is torch's or NaN, the same everywhere; torch's depends on the place": (
        lambda case, problem: (
            problem.what == "numbers"
            and problem.result > 0
            and not all(t.isfinite().all() for t in inputs(case))
        )
    ),
    "nobody knows the sine of an angle whose rounding is more than a turn": (
        lambda case, problem: (
            problem.what == "numbers"
            and any(
                layer.name == "sine" and abs(dict(layer.params).get("omega", 1)) > 1e3
                for layer in case.layers
            )
        )
    ),
}


@dataclass
class Outcome:
    """Tensors and facts of a call, or its exception."""

    tensors: Tensors
    facts: list[Any]
    error: Exception | None = None


def outcome(case: Case, f: Callable, tensors: Tensors, cotangent: Callable) -> Outcome:
    call = Call(case, tensors, cotangent)
    try:
        results = WAYS[case.way](call, f)
    except Exception as error:
        return Outcome([], call.facts, error)
    return Outcome([t.detach() for t in results], call.facts)


def _kind(t: torch.Tensor) -> torch.Tensor:
    """0 of a finite number, 1 of inf, -1 of -inf, 2 of NaN."""
    return torch.where(t.isnan(), 2, torch.where(t.isinf(), t.sign().nan_to_num(), 0))


def _margins(case: Case, tensors: Tensors) -> float:
    """How near a kink or a tie the layers come, in units of the largest number there; inf if nowhere near.

    Next to one, rounding chooses the side. On one that is met exactly everyone takes the same side.
    """
    nearest, exact, x = math.inf, case.values == "grid", tensors[0]
    count = len(case.layers)
    for i, layer in enumerate(case.layers):
        weight, bias = tensors[1 + i], tensors[1 + count + i] if case.bias else None
        if layer.name == "maxout":
            z = TF.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
            z = z.unflatten(-1, weight.shape[:2])
            top = z.topk(min(2, layer.pieces), -2).values
            gaps = top[..., 0, :] - top[..., -1, :] if layer.pieces > 1 else torch.full((), math.inf)
            x = z.amax(-2)
        else:
            z, value = _halves(x, weight, bias) if layer.gated else (TF.linear(x, weight, bias), 1)
            kinks = reference.kinks(layer.name, dict(layer.params))
            gaps = torch.stack([(z - k).abs() for k in kinks or (math.inf,)])
            x = common.eager(layer.name, dict(layer.params))(z) * value
        gaps = gaps[gaps > 0] if exact else gaps
        gaps = gaps[~gaps.isnan()] / (1 + z[z.isfinite()].abs().amax() if z.isfinite().any() else 1)
        nearest = min(nearest, float(gaps.amin()) if gaps.numel() else math.inf)
        exact = exact and layer.name in GRID
        if i + 1 < count and not tensors[2 + i].isfinite().all():  # inf y has the sign of y
            nearest = min(nearest, *x.abs()[x != 0].flatten().tolist(), math.inf)
    return nearest


def _variants(case: Case, tensors: Tensors, cotangent: Callable) -> list[Tensors]:
    """The inputs of each call that a vmap makes."""
    if case.way not in ("vmap", "per sample"):
        return [tensors]
    stacked, dims = Call(case, tensors, cotangent).along()
    return [
        [t if d is None else t.select(d, k) for t, d in zip(stacked, dims, strict=True)] for k in range(3)
    ]


def precision(case: Case) -> torch.dtype:
    """The narrowest type on the way."""
    if case.way.startswith("autocast") and case.family not in ("activation", "gated"):
        return DTYPES[case.way.split()[1]]
    return DTYPES[case.dtype]


def check(case: Case) -> str | None:
    """Make the call both ways and compare. Returns why it proves nothing, or the difference that is meant."""
    tensors = inputs(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, eager = functions(case, tensors)
    layout = case.layouts[-1] if len(case.layouts) > 1 else "contiguous"

    def cotangent(y: torch.Tensor) -> torch.Tensor:
        """The same numbers each time, in the type of y."""
        g = Numbers(case, 1).draw(tuple(y.shape), layout)
        return g.to(precision(case)).to(y.dtype) if case.dtype in DTYPES else g.to(y.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = outcome(case, eager, tensors, cotangent)
        got = outcome(case, ours, tensors, cotangent)
        problem = _behaviour(case, got, theirs)
        reason = None if problem is None else _reason(case, problem)
        if got.error is None and (problem is None or problem.what == "strides"):
            if case.wrong:
                return "taken by both, where other operators would not"
            if case.dtype not in DTYPES:
                for actual, expected in zip(got.tensors, theirs.tensors, strict=True):
                    torch.testing.assert_close(actual, expected, equal_nan=True)
                return None
            wide = [t.double().contiguous() for t in tensors]
            if case.family in ("layer", "mlp"):
                each = [_margins(case, variant) for variant in _variants(case, wide, cotangent)]
                if min(each) < 64 * torch.finfo(precision(case)).eps:
                    return "too near a kink to tell"
            problem = _numbers(case, got, theirs, _exact(case, eager, wide, cotangent))
            if problem is not None:
                meant = _reason(case, problem)  # raises where it is not
                reason = reason or meant
    return reason


def _reason(case: Case, problem: Problem) -> str:
    for reason, meant in DIFFERENCES.items():
        if meant(case, problem):
            return reason
    raise AssertionError(str(problem))


def _behaviour(case: Case, got: Outcome, theirs: Outcome) -> Problem | None:
    if got.error or theirs.error:
        same = type(got.error) is type(theirs.error)
        return None if same else Problem("exception", repr(got.error)[:300], repr(theirs.error)[:300])
    if got.facts != theirs.facts:
        return Problem("facts", got.facts, theirs.facts)
    for k, (actual, expected) in enumerate(zip(got.tensors, theirs.tensors, strict=True)):
        if actual.shape != expected.shape:
            return Problem("shape", actual.shape, expected.shape, k)
        if actual.dtype != expected.dtype:
            return Problem("dtype", actual.dtype, expected.dtype, k)
        # The stride of a dimension of size 1, and of an empty tensor, means nothing.
        if all(size > 1 for size in actual.shape) and actual.stride() != expected.stride():
            return Problem("strides", actual.stride(), expected.stride(), k)
    return None


def _exact(case: Case, eager: Callable, tensors: Tensors, cotangent: Callable) -> Tensors:
    """In float64, of values and derivatives of the activations by reference.py."""
    formula = case.usual or case.params.get("b", 0) > 0  # squareplus by torch's operators loses digits
    own = case.way in ORDINARY and formula
    if own and case.way == "in place of a view":
        eager = lambda view: view.copy_(_referenced(case, view))  # noqa: E731
    elif own:
        eager = functools.partial(_referenced, case)
    if case.way.startswith("autocast") or (own and case.way == "in place"):
        case = dataclasses.replace(case, way="backward")
    wide = outcome(case, eager, tensors, cotangent)
    if wide.error:
        raise wide.error
    return wide.tensors


def _referenced(case: Case, x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """With the activations of reference.py."""
    if case.family == "maxout":
        return common.eager_maxout(x, case.layer.pieces, case.dim)
    if case.family == "activation":
        return Referenced.apply(x, case.layer)
    if case.family == "gated":
        return Referenced.apply(x, case.layer) * rest[0]
    for i, layer in enumerate(case.layers):
        bias = rest[len(case.layers) + i] if case.bias else None
        if layer.name == "maxout":
            x = common.eager_linear_maxout(x, rest[i], bias)
        elif layer.gated:
            gate, value = _halves(x, rest[i], bias)
            x = Referenced.apply(gate, layer) * value
        else:
            x = Referenced.apply(TF.linear(x, rest[i], bias), layer)
    return x


# Where the gradient of what is cut off is 0 even for an infinite gradient from above, in torch too.
BLOCKS = {"relu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "softshrink", "hardshrink"}
BLOCKS |= {"relu_squared", "threshold"}


class Referenced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        values = _reference(layer, x.detach().resolve_neg().flatten().numpy())
        value, ctx.slope = (torch.from_numpy(v).view(x.shape) for v in values)
        ctx.blocks = layer.name in BLOCKS
        return value

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = g * ctx.slope
        return torch.where(ctx.slope == 0, 0.0, gradient) if ctx.blocks else gradient, None


def _reference(layer: Layer, x: np.ndarray) -> list[np.ndarray]:
    """Value and derivative; where float64 overflows on the way, of 80 digits."""
    params = dict(layer.params)
    results = [v.copy() for v in reference.fast(layer.name, params, x)]
    for k, result in enumerate(results):
        if np.isinf(x).any():
            low, high = reference.limits(layer.name, params)[k]
            result[:] = np.where(np.isinf(x), np.where(x > 0, high, low), result)
        lost = ~np.isfinite(result) & np.isfinite(x)
        if lost.any():
            result[lost] = reference.exact(layer.name, params, x[lost])[k, 0]
    return results


def _numbers(case: Case, got: Outcome, theirs: Outcome, exact: Tensors) -> Problem | None:
    eps = torch.finfo(precision(case)).eps
    for k, (actual, eager) in enumerate(zip(got.tensors, theirs.tensors, strict=True)):
        wanted = exact[k]
        if not actual.numel():
            continue
        same_kind = (_kind(actual) == _kind(wanted.to(actual.dtype))) | (_kind(actual) == _kind(eager))
        if case.way not in ORDINARY:  # where one intermediate result overflows, the next is what it may be
            same_kind |= ~actual.isfinite() & ~eager.isfinite()
            # At the largest number roundings decide whether the result is one or inf.
            same_kind |= (wanted.abs() / torch.finfo(precision(case)).max - 1).abs() < 4 * eps
        if not same_kind.all():
            return _worst(k, ~same_kind, actual, wanted, eager)
        finite = actual.isfinite() & wanted.isfinite()
        error = torch.where(finite, (actual.double() - wanted).abs(), 0)
        eagers = torch.where(finite & eager.isfinite(), (eager.double() - wanted).abs(), 0)
        if case.exact:
            bound = torch.zeros(())
        elif case.family == "maxout":
            bound = 4 * eps * (wanted.abs().nan_to_num(0, 0, 0) + torch.finfo(precision(case)).tiny)
        elif case.family == "activation" and case.way in ORDINARY:
            bound = _bound(case, k, actual, wanted) + 2 * eagers
        else:
            size = wanted[wanted.isfinite()].abs()
            scale = max(1.0, float(size.max()) if size.numel() else 1.0)
            for layer in case.layers:  # an error before a steep layer is a larger one behind it
                scale *= max(1.0, abs(dict(layer.params).get("omega", 1.0))) * (8 if layer.gated else 1)
            units = CLOSE[precision(case)] * len(case.layers) * (1 if case.way in ORDINARY else 2)
            same = ("expanded", "one number")  # what is the same has the same errors, which add up
            if case.layouts[0] in same:
                units *= max(1.0, math.prod(case.shape[:-1]) / 16)
            if {*same} & {*case.layouts[1 : 1 + len(case.layers)]}:
                units *= max(1.0, max(layer.width for layer in case.layers) / 4)
            bound = units * eps * scale + 4 * eagers.max()
        if (error > bound).any():
            return _worst(k, error > bound, actual, wanted, eager)
    return None


# Roundings of the largest number of a result that a layer may cost, with products of a hundred terms.
CLOSE = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 2, torch.float16: 2}


def _bound(case: Case, k: int, actual: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What accuracy.py allows of an activation's value (k = 0) or of the gradient."""
    x = inputs(case)[0].double().resolve_neg().numpy()
    dtype = actual.dtype
    narrow = dtype in accuracy.WIDE
    unit = torch.from_numpy(np.asarray(common.ulp(wanted.numpy(), dtype)))
    spare = 32 if dtype == torch.float64 else 0  # reference.py's own roundings there
    wide = accuracy.WIDE.get(dtype, dtype)
    slack = accuracy.unavoidable(case.layer.name, case.params, x, wide, derivative=k > 0)
    slack = torch.from_numpy(np.asarray(slack)) + torch.finfo(torch.float64).tiny
    # x / alpha and beta x are rounded, and alpha and beta before, which e^ makes relative to the result.
    # quick_gelu's alpha x has two parts, but in reference.py and in torch.
    alpha = case.params.get("alpha")
    rate = {"celu": 1 / (alpha or 1), "softplus": case.params.get("beta", 1), "quick_gelu": alpha or 1.702}
    exponent = np.minimum(np.abs(x * rate.get(case.layer.name, 0)), 1000)
    slack = slack + torch.as_tensor(np.nan_to_num(exponent)) * torch.finfo(dtype).eps * wanted.abs()
    bounds = accuracy.bounds(case.layer.name, case.params)
    if k == 0:
        return unit * (accuracy.value_bound(case.layer.name, case.params, dtype) + spare) + slack
    # One rounding more, by the gradient from above; its largest number stands for it.
    finite = wanted[wanted.isfinite()].abs()
    largest = max(8.0, float(finite.max()) if finite.numel() else 0.0)
    from_output = case.way in IN_PLACE
    if narrow or from_output or "absolute" in bounds:
        units = bounds.get("absolute", from_output) + narrow
        return unit + units * torch.finfo(dtype).eps * largest + slack
    return unit * (bounds["derivative"] + 1 + spare) + slack


def _worst(k: int, where: torch.Tensor, *tensors: torch.Tensor) -> Problem:
    place = tuple(where.nonzero()[0].tolist())
    ours, exact, eager = (float(t[place]) for t in tensors)
    text = f"result {k} at {place}: {ours!r} instead of {exact!r}, torch's is {eager!r}"
    return Problem("numbers", ours, eager, k, f"{text}; {int(where.sum())} of {where.numel()} are wrong")


SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 130)
EXTREMES = (
    *(0.0, -0.0, 0.2, -0.2, 1 / 3, 1.7, 1e-9, 1e5, 1e30, -1e30, 1e39, 1e300, 10**18, 10**25, 1e-46, 1e-320),
    *(math.inf, -math.inf, math.nan),
)
WRONG = ("in_features", "dtype", "dim", "bias")
NAMES = [name for name, _ in reference.CASES]


def _shape(r: random.Random, least: int) -> tuple[int, ...]:
    dims = r.choice((least, 1, 2, 2, 2, 3, 3, 4, 5, 6))
    top = len(SIZES) if dims < 3 else 11 if dims < 4 else 6
    return tuple(SIZES[r.randrange(top)] for _ in range(max(dims, least)))


def _layer(r: random.Random, width: int, extremes: bool) -> Layer:
    if r.random() < 0.15:
        return Layer(width, "maxout", pieces=r.choice((1, 2, 2, 3, 4, 5)))
    return Layer(width, *_activation(r, extremes))


def _activation(r: random.Random, extremes: bool) -> tuple[str, Params]:
    name, params = r.choice(reference.CASES)
    if extremes and r.random() < 0.3:
        params = {key: r.choice(EXTREMES) for key in mlpext._C.activations()[name]}
    return name, tuple(params.items())


def draw(r: random.Random, compiled: bool = False) -> Case:
    """A case of any kind; of those that torch.compile takes, if it is to be compiled."""
    family = r.choice(("activation",) * 9 + ("maxout",) * 2 + ("gated",) * 2 + ("layer",) * 6 + ("mlp",) * 3)
    ways = [way for way in WAYS if way != "compile" and way not in IN_PLACE]
    case = Case(family, seed=r.randrange(2**31), way="compile" if compiled else r.choice(ways))
    case = dataclasses.replace(case, dtype=r.choice([*DTYPES, "float32"]))
    if family in ("activation", "gated"):
        name, params = _activation(r, extremes=case.way in ORDINARY)
        case = dataclasses.replace(case, layers=(Layer(0, name, params),), shape=_shape(r, 0))
        if family == "activation" and common.has_inplace(name) and not compiled and r.random() < 0.2:
            case = dataclasses.replace(case, way=r.choice(IN_PLACE))
        if family == "gated" and r.random() < 0.1:
            case = dataclasses.replace(case, wrong=r.choice(("in_features", "dtype")))
    elif family == "maxout":
        shape, pieces = list(_shape(r, 0)), r.choice((1, 2, 2, 3, 4, 5, 9))
        dim = r.randrange(-len(shape), len(shape)) if shape else r.choice((-1, 0, 1))
        if shape:
            shape[dim] *= pieces
        if r.random() < 0.05:
            dim, pieces = r.choice((dim, 7, -8)), r.choice((0, -1, pieces, 11))
        layer = Layer(0, "maxout", pieces=pieces)
        case = dataclasses.replace(case, layers=(layer,), shape=tuple(shape), dim=dim)
    else:
        count = 1 if family == "layer" else r.choice((1, 2, 2, 3, 4))
        shape = _shape(r, 1)
        widths = [r.choice(SIZES if family == "layer" else SIZES[1:24]) for _ in range(count)]
        extremes = family == "layer" and case.way in ORDINARY and r.random() < 0.2
        layers = tuple(_layer(r, width, extremes) for width in widths)
        if family == "mlp":  # an alpha below 0 makes e^-x, of which the next layers make anything
            layers = tuple(
                Layer(each.width, each.name) if dict(each.params).get("alpha", 1) < 0 else each
                for each in layers
            )
        layers = tuple(
            dataclasses.replace(each, gated=each.name != "maxout" and r.random() < 0.3) for each in layers
        )
        case = dataclasses.replace(case, layers=layers, shape=shape, bias=r.random() < 0.8)
        if r.random() < 0.03 and not compiled:
            case = dataclasses.replace(case, wrong=r.choice(WRONG[: 3 + case.bias]))
    common_ones = all(
        layer.name == "maxout" or (layer.name, dict(layer.params)) in reference.CASES for layer in case.layers
    )
    if r.random() < 0.06 and case.way in ORDINARY and not case.wrong and common_ones:
        case = dataclasses.replace(case, dtype=r.choice([*OTHER_DTYPES]))
    values = ["normal", "normal", "grid"]
    if case.way in ORDINARY:
        values += ["special"] + ["wide"] * (family in ("activation", "maxout"))
    alone = {"activation": 1, "maxout": 1, "gated": 2}
    count = alone.get(family) or 1 + (1 + case.bias) * len(case.layers)
    # A tangent has the layout of its tensor, so that it cannot be drawn where elements share memory.
    tangents = case.way in ("jvp", "hessian product")
    layouts = [name for name in LAYOUTS if name != "overlapping" or not tangents]
    return dataclasses.replace(
        case,
        values=r.choice(values),
        entry=r.choice(("function", "module")),
        layouts=tuple(r.choice(layouts) if r.random() < 0.4 else "contiguous" for _ in range(count + 1)),
        masks=tuple(r.random() < 0.8 for _ in range(count)),
    )


class Tally(random_fits.Tally):
    """How many cases agree, and how many differ for which reason."""

    def add(self, case: Case, reason: str | None) -> None:
        self.counts[reason or "agree"] += 1
