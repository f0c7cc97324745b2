"""Narrow networks on CUDA (csrc/cuda/narrow.cuh), run on the CPU by tests/cuda_emulator: tensor cores included.

The reference is float64, from the numbers that the kernel itself has in memory: each layer from the rounded y
of the one before, each gradient from the rounded one behind.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import reference
from common import assert_same_bits, values_of
from test_cuda_emulated import OF_OUTPUT, RACES, SANITIZED, Fault, build, poison, two

pytestmark = pytest.mark.skipif(
    __import__("sys").platform != "linux", reason="the emulator is made for Linux"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_narrow_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
FILES = tuple(f"narrow_{str(dtype)[6:]}" for dtype in DTYPES)
H100 = (132, 227 << 10)  # multiprocessors, bytes of shared memory for a block
FEW = "std::tuple<Identity, ReLU, ELU, SiLU>"


@pytest.fixture(scope="module")
def plain():
    """Every activation, no sanitizer."""
    return build("narrow", "-O1", files=FILES)


@pytest.fixture(scope="module")
def checked():
    """A few activations, under ASan and UBSan."""
    return build("narrow_checked", *SANITIZED, activations=FEW, files=FILES)


@pytest.fixture(scope="module")
def raced():
    """A few activations, under TSan."""
    return build("narrow_raced", *RACES, activations=FEW, files=FILES[:2])


@dataclass
class Layer:
    weight: torch.Tensor
    bias: torch.Tensor | None
    name: str
    parameters: dict

    @property
    def keeps_z(self):
        """As Network::Layer::keep: z where y does not determine f', or has too few digits for it."""
        coarse = self.weight.dtype.itemsize == 2 and self.name in ("elu", "selu", "celu")
        values = values_of(self.name, self.parameters)
        return self.name not in OF_OUTPUT or coarse or any(v < 0 for v in values)

    def reference(self, z):
        return reference.fast(self.name, self.parameters, z)


def network(dtype, widths, activations, bias=True, seed=0):
    """Layers of these widths; an activation is a name, or a name and its parameters."""
    random = torch.Generator().manual_seed(seed)
    layers = []
    for (n_in, n_out), activation in zip(itertools.pairwise(widths), activations, strict=True):
        name, parameters = (activation, {}) if isinstance(activation, str) else activation
        weight = torch.randn(n_out, n_in, generator=random) / n_in**0.5
        vector = torch.randn(n_out, generator=random).to(dtype) if bias else None
        layers.append(Layer(weight.to(dtype), vector, name, parameters))
    return layers


def inputs(dtype, rows, *widths):
    random = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, width, generator=random).to(dtype) for width in widths]


def request(emulator, backward, layers, x, g, dx, of_layer, *, device=H100, lowest=0, offset=0):
    """What the plan was, and the tensors afterwards: x, g, dx, and (y, z, dw, db) of each layer."""
    words = [int(backward), *device, len(x), lowest, len(layers)]
    for layer in layers:
        words += [
            layer.weight.shape[1],
            layer.weight.shape[0],
            layer.name,
            *two(layer.name, layer.parameters),
        ]
    tensors = [torch.zeros(3, dtype=torch.int64), x, g, dx]
    for layer, more in zip(layers, of_layer, strict=True):
        tensors += [layer.weight, layer.bias, *more]
    plan, *results = emulator("narrow", x.dtype, words, tensors, offset)
    each = [results[i + 2 : i + 6] for i in range(3, len(results), 6)]
    return dict(zip(("resident", "shared_sums", "blocks"), plan.tolist(), strict=True)), results[2], each


def forward(emulator, layers, x, keep=True, **options):
    """The plan, every y, and z where it is kept; without `keep` the last y alone."""
    wanted = []
    for layer in layers:
        empty = poison(x.new_empty(len(x), len(layer.weight)))
        stored = keep or layer is layers[-1]
        wanted.append((empty if stored else None, empty if keep and layer.keeps_z else None, None, None))
    plan, _, each = request(emulator, False, layers, x, None, None, wanted, **options)
    return plan, [y for y, *_ in each], [z for _, z, *_ in each]


def backward(emulator, layers, x, ys, zs, g, mask=None, needs_dx=True, **options):
    """The plan, dx, every dw and every db. `mask`: for each layer, whether weight and bias learn."""
    mask = mask or [(True, layer.bias is not None) for layer in layers]
    wanted = [
        (y, z, poison(layer.weight) if dw else None, poison(layer.weight[:, 0]) if db else None)
        for layer, y, z, (dw, db) in zip(layers, ys, zs, mask, strict=True)
    ]
    lowest = 0 if needs_dx else next(i for i, pair in enumerate(mask) if any(pair))
    dx = poison(x) if needs_dx else None
    plan, dx, each = request(emulator, True, layers, x, g, dx, wanted, lowest=lowest, **options)
    return plan, dx, [dw for *_, dw, _ in each], [db for *_, db in each]


# ---------------------------------------------------------------- the reference


def double(t):
    return t.double().numpy()


FLOAT = 2.0**-20  # what a float sum may lose of the sum of its terms' sizes


def assert_near(actual, expected, allowed):
    """Rounded to the dtype once, beside what is allowed. A NaN, as unwritten memory has it, is near nothing."""
    info = torch.finfo(actual.dtype)
    error = np.abs(double(actual) - expected)
    allowed = allowed + 0.51 * info.eps * np.abs(expected) + info.tiny * info.eps
    assert (error <= allowed).all(), (np.nanmax(error - allowed), np.isnan(error).sum())


def assert_forward(layers, x, ys, zs):
    for layer, y, z in zip(layers, ys, zs, strict=True):
        bias = 0.0 if layer.bias is None else double(layer.bias)
        exact = double(x) @ double(layer.weight).T + bias
        terms = np.abs(double(x)) @ np.abs(double(layer.weight)).T + np.abs(bias)
        if z is not None:
            assert_near(z, exact, FLOAT * terms)
        value, slope = layer.reference(exact)
        # Approximations in 16 bits, and kinks that rounding z may cross.
        assert_near(y, value, FLOAT * ((np.abs(slope) + 1) * terms + 4))
        x = y


def round_to(dtype, x):
    return double(torch.from_numpy(np.ascontiguousarray(x)).to(dtype))


def assert_backward(layers, x, ys, zs, g, dx, dws, dbs):
    """Each gradient that is there, from dz rounded as the kernel rounds it. A value may be rounded the other
    way than here: `blurred` follows what that does to those behind it."""
    gradient, blurred = double(g), np.zeros_like(double(g))
    eps = torch.finfo(x.dtype).eps
    for l in reversed(range(len(layers))):
        layer, y, z = layers[l], ys[l], zs[l]
        if layer.name == "identity":
            slope = 1.0
        elif z is not None:
            slope = layer.reference(double(z))[1]
        else:
            slope = slope_from_output(layer, double(y))
        exact = gradient * slope
        dz = round_to(x.dtype, exact)
        blurred = blurred * np.abs(slope) + eps * np.abs(exact) + FLOAT * np.abs(gradient)
        inner = double(ys[l - 1] if l else x)
        if dws[l] is not None:
            allowed = blurred.T @ np.abs(inner) + FLOAT * np.abs(dz).T @ np.abs(inner)
            assert_near(dws[l], dz.T @ inner, allowed)
        if dbs[l] is not None:
            assert_near(dbs[l], dz.sum(0), blurred.sum(0) + FLOAT * np.abs(dz).sum(0))
        weight = double(layer.weight)
        gradient = dz @ weight
        blurred = blurred @ np.abs(weight) + FLOAT * np.abs(dz) @ np.abs(weight)
    if dx is not None:
        assert_near(dx, gradient, blurred)


def slope_from_output(layer, y):
    """f' from y, written independently of the C++ formulas."""
    values = dict(zip(("a",), values_of(layer.name, layer.parameters), strict=False))
    a = values.get("a", 1.0)
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return {
        "sigmoid": lambda: y * (1 - y),
        "tanh": lambda: 1 - y * y,
        "relu": lambda: (y > 0) * 1.0,
        "leaky_relu": lambda: np.where(y > 0, 1, a),
        "elu": lambda: np.where(y > 0, 1, y + a),
        "celu": lambda: np.where(y > 0, 1, 1 + y / a),
        "selu": lambda: np.where(y > 0, scale, y + scale * alpha),
    }[layer.name]()


def check(emulator, layers, rows, keep=True, **options):
    """Forward, inference and backward of a network; the plans."""
    dtype = layers[0].weight.dtype
    x, g = inputs(dtype, rows, layers[0].weight.shape[1], len(layers[-1].weight))
    plan, ys, zs = forward(emulator, layers, x, **options)
    assert_forward(layers, x, ys, zs)
    _, (*_, alone), _ = forward(emulator, layers, x, keep=False, **options)
    assert_same_bits(alone, ys[-1], "inference as training")
    plan_back, dx, dws, dbs = backward(emulator, layers, x, ys, zs, g, **options)
    assert_backward(layers, x, ys, zs, g, dx, dws, dbs)
    return plan, plan_back


# ---------------------------------------------------------------- the numbers


@every_narrow_dtype
@pytest.mark.parametrize("case", reference.CASES, ids=reference.case_id)
def test_every_activation(plain, dtype, case):
    """In the first layer and in the last; 70 rows are two tiles, or three."""
    check(plain, network(dtype, (7, 18, 16, 5), [case, "softsign", case]), 70)


# ---------------------------------------------------------------- shapes and plans, under ASan and UBSan


MIXED = ("elu", "relu", "identity", "silu")
WIDTHS = (1, 2, 15, 16, 17, 33, 64, 100, 127, 128)


@every_narrow_dtype
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 131])
def test_batches(checked, dtype, rows):
    for bias in (True, False):
        check(checked, network(dtype, (20, 33, 24, 17, 9), MIXED, bias), rows)


@every_narrow_dtype
def test_widths(checked, dtype):
    """Every width beside every other, as inputs and as outputs; and all of them in one network."""
    for i in range(5):
        widths = (*WIDTHS[i::5], *WIDTHS[i + 1 :: 4])
        activations = [MIXED[l % 4] for l in range(len(widths) - 1)]
        check(checked, network(dtype, widths, activations), 19)
    check(checked, network(dtype, (5, 3), ["relu"]), 3)


# What a device must offer (multiprocessors, bytes) for a plan: (resident, shared_sums) forward, backward.
PLANS = {
    "all in shared memory": (H100, (33, 24, 24), (1, 0), (1, 1)),
    "a layer's weights at a time": ((132, 100 << 10), (128,) * 5, (0, 0), (0, 0)),
    "weights that stay, sums in device memory": (H100, (128, 128, 8), (1, 0), None),
}


@every_narrow_dtype
@pytest.mark.parametrize("plan", PLANS)
def test_plans(checked, dtype, plan):
    pass
