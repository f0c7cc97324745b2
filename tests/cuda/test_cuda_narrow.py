"""Narrow networks on CUDA (csrc/cuda/experimental/narrow), run on the CPU by the emulator, tensor cores too.

The reference is float64, from the numbers that the kernel itself has in memory: each layer from the rounded y
of the one before, each gradient from the rounded one behind.
"""

import itertools
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import reference
from common import assert_same_bits, values_of
from cuda_emulator import OF_OUTPUT, RACES, SANITIZED, Fault, build, poison, two

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator is made for Linux"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_narrow_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
FILES = tuple(f"experimental/narrow/narrow_{str(dtype)[6:]}.cu" for dtype in DTYPES)
H100 = (132, 227 << 10)  # multiprocessors, bytes of shared memory for a block
UNOPTIMISED = SANITIZED[1:]  # a third of the time to compile
FEW = "std::tuple<Identity, ReLU, ELU, SiLU>"


@pytest.fixture(scope="module")
def plain():
    """Every activation, no sanitizer."""
    return build("narrow", sources=FILES)


@pytest.fixture(scope="module")
def checked():
    """A few activations, under ASan and UBSan."""
    return build("narrow_checked", *UNOPTIMISED, activations=FEW, sources=FILES)


@pytest.fixture(scope="module")
def raced():
    """A few activations, under TSan."""
    return build("narrow_raced", *RACES, activations=FEW, sources=FILES[:2])


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
        words += [*reversed(layer.weight.shape), layer.name, *two(layer.name, layer.parameters)]
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


def double(t):
    return t.double().numpy()


FLOAT = 2.0**-20  # what a float sum may lose of the sum of its terms' sizes


def assert_near(actual, expected, allowed):
    """Rounded to the dtype once, beside what is allowed. A NaN, as in unwritten memory, is near nothing."""
    info = torch.finfo(actual.dtype)
    error = np.abs(double(actual) - expected)
    allowed = allowed + 0.51 * info.eps * np.abs(expected) + info.tiny * info.eps
    assert (error <= allowed).all(), (np.fmax(error - allowed, 0).max(), np.isnan(error).sum())


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
    for i in reversed(range(len(layers))):
        layer, y, z = layers[i], ys[i], zs[i]
        if layer.name == "identity":
            slope = 1.0
        elif z is not None:
            slope = layer.reference(double(z))[1]
        else:
            slope = slope_from_output(layer, double(y))
        exact = gradient * slope
        dz = round_to(x.dtype, exact)
        blurred = blurred * np.abs(slope) + eps * np.abs(exact) + FLOAT * np.abs(gradient)
        inner = double(ys[i - 1] if i else x)
        if dws[i] is not None:
            allowed = blurred.T @ np.abs(inner) + FLOAT * np.abs(dz).T @ np.abs(inner)
            assert_near(dws[i], dz.T @ inner, allowed)
        if dbs[i] is not None:
            assert_near(dbs[i], dz.sum(0), blurred.sum(0) + FLOAT * np.abs(dz).sum(0))
        weight = double(layer.weight)
        gradient = dz @ weight
        blurred = blurred @ np.abs(weight) + FLOAT * np.abs(dz) @ np.abs(weight)
    if dx is not None:
        assert_near(dx, gradient, blurred)


def slope_from_output(layer, y):
    """f' from y, written independently of the C++ formulas."""
    a = next(iter(values_of(layer.name, layer.parameters)), 1.0)
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


@every_narrow_dtype
@pytest.mark.parametrize("case", reference.CASES, ids=reference.case_id)
def test_every_activation(plain, dtype, case):
    """In the first layer and in the last."""
    check(plain, network(dtype, (7, 18, 16, 5), [case, "softsign", case]), 20)


MIXED = ("elu", "relu", "identity", "silu")


@every_narrow_dtype
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 131])
def test_batches(checked, dtype, rows):
    check(checked, network(dtype, (20, 33, 24, 17, 9), MIXED, bias=rows != 17), rows)


@every_narrow_dtype
def test_widths(checked, dtype):
    """Every width before others and behind others."""
    for widths in ((128, 1, 100, 17), (2, 127, 16, 15), (33, 64, 128, 2), (5, 3)):
        check(checked, network(dtype, widths, MIXED[: len(widths) - 1]), 19)


@every_narrow_dtype
def test_memory_that_is_not_aligned(checked, dtype):
    """Widths that would go in 16 bytes at a time, at addresses that do not."""
    check(checked, network(dtype, (16, 32, 24), MIXED[1:3]), 40, offset=1)


# Bytes of shared memory for which (20, 33, 24, 17, 9) runs backward in each way: (resident, shared_sums).
PLANS = {
    2: {30 << 10: (0, 0), 45 << 10: (0, 1), H100[1]: (1, 1)},
    4: {40 << 10: (0, 0), 48 << 10: (0, 1), H100[1]: (1, 1)},
}


@every_narrow_dtype
def test_every_plan_gives_the_same_bits(checked, dtype):
    layers = network(dtype, (20, 33, 24, 17, 9), MIXED)
    x, g = inputs(dtype, 131, 20, 9)
    first = None
    for shared_bytes, wanted in PLANS[dtype.itemsize].items():
        device = (132, shared_bytes)
        _, ys, zs = forward(checked, layers, x, device=device)
        plan, dx, dws, dbs = backward(checked, layers, x, ys, zs, g, device=device)
        assert (plan["resident"], plan["shared_sums"]) == wanted
        results = [*ys, *(z for z in zs if z is not None), dx, *dws, *dbs]
        first = first or results
        for a, b in zip(results, first, strict=True):
            assert_same_bits(a, b, wanted)
    assert_forward(layers, x, ys, zs)
    assert_backward(layers, x, ys, zs, g, dx, dws, dbs)


@every_narrow_dtype
def test_blocks_that_take_several_tiles(checked, dtype):
    layers = network(dtype, (12, 24, 20, 3), MIXED[:3])
    for shared_bytes in (H100[1], 26 << 10):
        plan, back = check(checked, layers, 600, device=(1, shared_bytes))
        assert plan["blocks"] <= 4 and back["blocks"] <= 4


MASKS = {
    "only dx": (True, [(False, False)] * 4),
    "no dx": (False, [(True, True)] * 4),
    "weights alone": (True, [(True, False)] * 4),
    "biases alone": (False, [(False, True)] * 4),
    "the last layers": (False, [(False, False), (False, False), (True, False), (True, True)]),
    "some": (True, [(False, True), (True, False), (False, False), (False, True)]),
}


@every_narrow_dtype
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_frozen(checked, dtype, mask):
    needs_dx, learns = MASKS[mask]
    layers = network(dtype, (20, 33, 24, 17, 9), MIXED)
    x, g = inputs(dtype, 35, 20, 9)
    _, ys, zs = forward(checked, layers, x)
    for shared_bytes in (min(PLANS[dtype.itemsize]), H100[1]):
        device = (132, shared_bytes)
        _, dx, dws, dbs = backward(checked, layers, x, ys, zs, g, learns, needs_dx, device=device)
        assert_backward(layers, x, ys, zs, g, dx, dws, dbs)


@every_narrow_dtype
def test_a_last_layer_given_by_z(checked, dtype):
    """As when the output has been changed in place: f' comes from z, whatever forward keeps."""
    layers = network(dtype, (6, 12, 5), ["relu", "relu"])
    x, g = inputs(dtype, 20, 6, 5)
    _, ys, _ = forward(checked, layers, x)
    z = torch.from_numpy(double(ys[0]) @ double(layers[1].weight).T + double(layers[1].bias)).to(dtype)
    _, dx, dws, dbs = backward(checked, layers, x, [ys[0], None], [None, z], g)
    assert_backward(layers, x, [ys[0], None], [None, z], g, dx, dws, dbs)


@every_narrow_dtype
def test_what_is_not_finite_stays_where_it_belongs(checked, dtype):
    layers = network(dtype, (20, 33, 5), ["relu", "identity"])
    x, g = inputs(dtype, 40, 20, 5)
    _, (_, clean), _ = forward(checked, layers, x)
    x[3, 2], x[17, 19] = float("nan"), float("inf")
    _, ys, zs = forward(checked, layers, x)
    others = [row for row in range(40) if row not in (3, 17)]
    assert_same_bits(ys[-1][others], clean[others])
    assert ys[-1][3].isnan().all() and not ys[-1][17].isfinite().any()
    g[5, 1] = float("inf")
    _, dx, _, dbs = backward(checked, layers, x, ys, zs, g)
    assert dx[others].isfinite().sum() >= 37 * 20 and not dx[5].isfinite().all()
    assert not dbs[1][1].isfinite() and dbs[1][[0, 2, 3, 4]].isfinite().all()
    assert_infinite_weight(checked, dtype)


def assert_infinite_weight(emulator, dtype):
    """The rows that fill up a tile of one must not make a NaN of 0 * inf."""
    layers = network(dtype, (16, 16, 16), ["identity", "identity"])
    layers[1].weight[2, 4] = float("inf")
    x, g = inputs(dtype, 1, 16, 16)
    _, ys, zs = forward(emulator, layers, x)
    _, _, dws, _ = backward(emulator, layers, x, ys, zs, g)
    assert dws[0][4].isinf().all() and dws[0][[*range(4), *range(5, 16)]].isfinite().all()


def test_no_races(raced):
    """Two tiles a block, weights by the layer; then all of it in shared memory."""
    for dtype, shared_bytes in ((torch.float32, 48 << 10), (torch.bfloat16, H100[1])):
        layers, device = network(dtype, (20, 33, 9), ["elu", "silu"]), (1, shared_bytes)
        x, g = inputs(dtype, 67 if dtype.itemsize == 4 else 280, 20, 9)
        _, ys, zs = forward(raced, layers, x, device=device)
        plan, dx, dws, dbs = backward(raced, layers, x, ys, zs, g, device=device)
        assert plan["blocks"] * (64 if dtype.itemsize == 2 else 32) < len(x)
        assert_backward(layers, x, ys, zs, g, dx, dws, dbs)


ONE = {"activations": "std::tuple<Identity, ReLU>", "sources": ("experimental/narrow/narrow_bfloat16.cu",)}
# text of narrow.cuh, what stands there instead; the sanitizer and its message
FAULTS = {
    "a write behind the last row": (
        ("i < rows * across;", "i < tile_rows * across;"),
        (UNOPTIMISED, "heap-buffer-overflow(.|\n)*WRITE"),
    ),
    "a read behind the last row": (
        ("if (row < rows && column < width) copy", "if (column < width) copy"),
        (UNOPTIMISED, "heap-buffer-overflow(.|\n)*READ"),
    ),
    "a copy in 16 bytes from anywhere": (
        ("return width % values == 0 && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;", "return true;"),
        (UNOPTIMISED, "misaligned address"),
    ),
    "a missing barrier": (
        ("      __syncthreads();\n      if (!to && job.dx)", "      if (!to && job.dx)"),
        (RACES, "data race"),
    ),
    "a lane that is missing": (
        ("load_matrices<!b_along_k>(", "if (lane() != 5) load_matrices<!b_along_k>("),
        ((), "not every lane of a warp"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    (text, instead), (sanitizer, message) = FAULTS[fault]
    plant = ("cuda/experimental/narrow/narrow.cuh", text, instead)
    emulator = build(f"narrow {fault}".replace(" ", "_"), *sanitizer, **ONE, plant=plant)
    with pytest.raises(Fault, match=message):
        for offset in (1, 0) * 4:  # on a busy machine threads that race may happen to take turns
            check(emulator, network(torch.bfloat16, (16, 24, 8), ["relu", "identity"]), 70, offset=offset)


# Nothing is out of bounds: numbers are wrong, and the comparison shows it.
WRONG = {
    "copies that nobody waits for": (
        "      copies_done();\n      __syncthreads();\n      const Pieces",
        "      __syncthreads();\n      const Pieces",
    ),
    "sums that begin with anything": (
        "i < job.sums; i += threads) sums[i] = 0;",
        "i < 0; i += threads) sums[i] = 0;",
    ),
    "gradients of rows that are not there": ("x = row < rows && column", "x = column"),
    "a factor along the wrong index": ("product<false, false>({dz", "product<true, false>({dz"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_numbers_are_caught(fault):
    plant = ("cuda/experimental/narrow/narrow.cuh", *WRONG[fault])
    emulator = build(f"narrow {fault}".replace(" ", "_"), **ONE, plant=plant)
    with pytest.raises(AssertionError):
        check(emulator, network(torch.bfloat16, (16, 24, 8), ["relu", "identity"]), 70)
        assert_infinite_weight(emulator, torch.bfloat16)
