"""The blocked product on CPU: every path, shapes around each boundary of its blocks, strides, threads."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as TF

import mlpext.functional as F
from common import FLOATS, assert_same_bits, eager, eager_linear_maxout, every_float

# Relative to the largest value: rounding of inputs is not counted, that of sums and of the results is.
TOLERANCE = {torch.float64: 3e-14, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# (rows, in, out): one value, few rows (dot products, up to 48 on AVX-512, 12 on AVX2), strips of 6 rows and
# 16 columns, panels of 64 columns, 4 and 16 of them together, blocks of 512 terms (1024 in pairs of bfloat16)
# and of 252 rows (half of an L2 cache of 1 MiB; 126 in float64), more than 4 of these, A packed from 128
# columns on, groups of 1020 rows, wide strips for 6 rows (2048 columns, 16 terms) and for 8 terms (8192
# values), weights of 2, 4 and 8 columns, nothing at all.
SHAPES = [
    *((1, 1, 1), (1, 64, 64), (2, 1, 3), (3, 17, 5), (4, 100, 16), (5, 8, 15), (6, 6, 17), (7, 129, 31)),
    *((8, 513, 33), (11, 66, 63), (12, 65, 64), (13, 64, 65), (59, 31, 127), (60, 32, 128), (61, 33, 129)),
    *((64, 511, 20), (65, 512, 21), (66, 513, 22), (67, 1023, 6), (90, 1024, 7), (121, 1025, 8)),
    *((1019, 9, 66), (1020, 10, 16), (1021, 11, 1), (2049, 3, 2), (3, 2, 700), (70, 200, 3)),
    *((6, 2049, 17), (18, 2049, 6), (7, 2731, 3), (8, 1025, 9), (9, 1030, 7), (1, 8200, 7)),
    *((3, 2, 37), (2, 4, 70), (5, 8, 39), (7, 16, 33), (2, 3, 40), (27, 40, 2), (40, 33, 2)),
    *((70, 127, 251), (71, 128, 252), (72, 129, 253), (515, 130, 258), (1030, 131, 259), (513, 255, 126)),
    *((63, 129, 520), (64, 128, 513), (65, 130, 496), (66, 127, 512), (1, 854, 555)),
    *((20, 1023, 256), (21, 1024, 257), (22, 1025, 255), (23, 40, 1023), (24, 40, 1024), (25, 40, 1025)),
    *((1008, 513, 129), (1009, 512, 128), (1009, 513, 129), (1010, 20, 1024), (1011, 21, 1025)),
    *((12, 192, 20), (13, 208, 21), (12, 191, 22), (48, 768, 70), (49, 784, 71), (48, 767, 72)),
    *((504, 513, 129), (505, 514, 130), (1261, 514, 130), (0, 3, 4), (3, 0, 5), (4, 5, 0), (0, 0, 0)),
]


def tensors(rows, n_in, n_out, dtype=torch.float64, pieces=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outer = (pieces,) if pieces else ()
    shapes = ((rows, n_in), (*outer, n_out, n_in), (*outer, n_out), (rows, n_out))
    x, w, b, g = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [t.to(dtype) for t in (x, w / math.sqrt(max(n_in, 1)), b, g)]


def assert_near(actual, expected, dtype, what):
    assert actual.shape == expected.shape and actual.dtype == dtype, what
    if not expected.numel():
        return
    # An absolute error for 16 bits: near 1 a tanh has few digits left for 1 - y^2, and sums of them cancel.
    least = 1e-3 if dtype in (torch.float64, torch.float32) else 2
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp_min(least)
    assert error <= TOLERANCE[dtype], f"{what}: {float(error):.3g}"


def results(f, inputs, g, wanted=(True, True, True)):
    """Output and gradients of those wanted."""
    leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=False)]
    y = f(*leaves)
    asked = [t for t in leaves if t.requires_grad]
    return [y.detach(), *(torch.autograd.grad(y, asked, g) if asked else ())]


def compare(f, reference, inputs, g, dtype, what, wanted=(True, True, True)):
    got = results(f, inputs, g, wanted)
    exact = results(reference, [t.double() for t in inputs], g.double(), wanted)
    for i, (a, e) in enumerate(zip(got, exact, strict=True)):
        assert_near(a, e, dtype, f"{what}, result {i}")


def layer(name):
    return lambda x, w, b=None: F.linear_activation(x, w, b, activation=name)


def eager_layer(name):
    return lambda x, w, b=None: eager(name, {})(TF.linear(x, w, b))


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_around_the_blocks(shape, dtype):
    for name in ("identity", "tanh", "silu"):  # keeps nothing, y, z
        for bias in (True, False):
            x, w, b, g = tensors(*shape, dtype)
            inputs = [x, w, b] if bias else [x, w]
            compare(layer(name), eager_layer(name), inputs, g, dtype, f"{name} {shape} bias={bias}")


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 9, 64, 65, 300])
def test_maxout_around_the_blocks(pieces, dtype):
    shapes = [(1, 8, 5), (7, 65, 33), (0, 3, 4), (3, 0, 2)]
    if pieces <= 9:
        shapes += [(61, 513, 17), (65, 130, 50), (130, 129, 49), (300, 97, 70), (49, 48, 3)]
    for shape in shapes:
        x, w, b, g = tensors(*shape, dtype, pieces)
        for inputs in ([x, w, b], [x, w]):
            # Which piece wins is decided in the dtype at hand; after that, only sums differ.
            y, *gradients = results(F.linear_maxout, inputs, g)
            z = [t.double() for t in inputs]
            exact = eager_linear_maxout(*z)
            assert_near(y, exact, dtype, f"{shape}, {pieces} pieces")
            _, winner = torch.ops.mlpext.linear_maxout_forward(*inputs, *[None] * (3 - len(inputs)))
            exact = gradients_of_the_winners(*z[:2], g.double(), winner)
            for i, (a, e) in enumerate(zip(gradients, exact, strict=False)):
                assert_near(a, e, dtype, f"{shape}, {pieces} pieces, gradient {i}")
            if dtype in (torch.float64, torch.float32):
                compare(F.linear_maxout, eager_linear_maxout, inputs, g, dtype, f"{shape}, {pieces} pieces")


def gradients_of_the_winners(x, w, g, winner):
    """dx, dW and db where it is known which piece won."""
    dz = torch.stack([torch.where(winner == k, g, 0.0) for k in range(len(w))])
    return (dz @ w).sum(0), dz.transpose(1, 2) @ x, dz.sum(1)


@pytest.mark.parametrize("shape", [(5, 40, 3), (70, 66, 65)], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
def test_every_combination_of_gradients(wanted, shape):
    x, w, b, g = tensors(*shape, torch.float32)
    for name in ("identity", "elu", "gelu"):
        compare(layer(name), eager_layer(name), [x, w, b], g, torch.float32, f"{name} {wanted}", wanted)
    x, w, b, g = tensors(*shape, torch.float32, pieces=3)
    compare(F.linear_maxout, eager_linear_maxout, [x, w, b], g, torch.float32, f"maxout {wanted}", wanted)


def layouts(t):
    """The same values at other strides."""
    yield "transposed", t.t().contiguous().t()
    wide = torch.zeros(t.shape[0], 2 * t.shape[1] + 3, dtype=t.dtype)
    wide[:, 1 : 2 * t.shape[1] : 2] = t
    yield "every second column", wide[:, 1 : 2 * t.shape[1] : 2]
    odd = torch.zeros(2 * t.shape[0], t.shape[1] + 1, dtype=t.dtype)
    odd[::2, : t.shape[1]] = t
    yield "every second row, odd stride", odd[::2, : t.shape[1]]
    yield "reversed twice", t.flip(0, 1).contiguous().flip(0, 1)


@pytest.mark.isa
@every_float
@pytest.mark.parametrize("shape", [(3, 40, 5), (70, 66, 68), (33, 7, 70)], ids=str)
def test_layouts(shape, dtype):
    x, w, b, g = tensors(*shape, dtype)
    for name in ("identity", "tanh"):
        for i, tensor in enumerate((x, w, g)):
            for what, other in layouts(tensor):
                assert torch.equal(other, tensor)
                inputs = [x, w, b]
                cotangent = g
                if i == 2:
                    cotangent = other
                else:
                    inputs[i] = other
                compare(layer(name), eager_layer(name), inputs, cotangent, dtype, f"{name}: {what} {i}")
    *pieces, g = tensors(*shape, dtype, pieces=2)
    expected = results(F.linear_maxout, pieces, g)
    for what, other in layouts(g):
        for a, e in zip(results(F.linear_maxout, pieces, other), expected, strict=True):
            torch.testing.assert_close(a, e, msg=what)
    for what, other in layouts(pieces[0]):
        for a, e in zip(results(F.linear_maxout, [other, *pieces[1:]], g), expected, strict=True):
            torch.testing.assert_close(a, e, msg=what)
    for axes in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        other = pieces[1].permute(axes).contiguous().permute([axes.index(i) for i in range(3)])
        for a, e in zip(results(F.linear_maxout, [pieces[0], other, pieces[2]], g), expected, strict=True):
            torch.testing.assert_close(a, e, msg=str(axes))


@every_float
def test_expanded_gradients_are_not_read_as_dense(dtype):
    x, w, b, _ = tensors(50, 30, 20, dtype)
    for g in (torch.ones((), dtype=dtype).expand(50, 20), torch.randn(20).to(dtype).expand(50, 20)):
        for name in ("identity", "tanh", "silu"):
            compare(layer(name), eager_layer(name), [x, w, b], g, dtype, f"{name} {g.stride()}")
        x3, w3, b3, _ = tensors(50, 30, 20, dtype, pieces=2)
        for a, e in zip(
            results(F.linear_maxout, [x3, w3, b3], g),
            results(F.linear_maxout, [x3, w3, b3], g.contiguous()),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


@pytest.mark.thorough
def test_many_rows_are_taken_in_chunks():
    """More rows than the memory for dz holds: 8 MiB."""
    for dtype, name in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ("identity", "tanh")
    ):
        x, w, b, g = tensors(5000, 6, 901, dtype)
        compare(layer(name), eager_layer(name), [x, w, b], g, dtype, f"{name} {dtype}")
    for shape in ((5000, 50, 901), (70, 50, 7001)):
        x, w, b, g = tensors(*shape, torch.float32, pieces=2)
        compare(F.linear_maxout, eager_linear_maxout, [x, w, b], g, torch.float32, f"maxout, {shape}")


@pytest.mark.isa
def test_an_index_beyond_the_pieces_has_no_gradient():
    x, w, _, g = tensors(70, 60, 50, torch.float32, pieces=3)
    index = torch.randint(0, 3, g.shape, dtype=torch.uint8)
    operator = torch.ops.mlpext.linear_maxout_backward
    expected = operator(g.where(index < 2, 0), x, w, index, 3, (True, True, True))
    beyond = index.where(index < 2, torch.tensor(200, dtype=torch.uint8))
    for a, e in zip(operator(g, x, w, beyond, 3, (True, True, True)), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.isa
@every_float
def test_random_shapes(dtype):
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        shape = [int(2 ** (8.5 * torch.rand((), generator=generator))) for _ in range(3)]
        x, w, b, g = tensors(*shape, dtype)
        compare(layer("tanh"), eager_layer("tanh"), [x, w, b], g, dtype, f"{shape}")


@pytest.mark.isa
@every_float
def test_the_same_bits_again_and_with_two_threads(dtype):
    shapes = ((4, 1200, 1100), (300, 130, 700), (3000, 70, 40), (2500, 1100, 4))
    cases = [(layer("silu"), shape, 0) for shape in shapes]
    cases += [(F.linear_maxout, shape, 3) for shape in ((300, 130, 200), (1500, 100, 30), (30, 500, 150))]
    for call, shape, pieces in cases:
        x, w, b, g = tensors(*shape, dtype, pieces)
        first = results(call, [x, w, b], g)
        again = results(call, [x, w, b], g)
        torch.set_num_threads(2)
        threads = results(call, [x, w, b], g)
        torch.set_num_threads(1)
        for one, two, three in zip(first, again, threads, strict=True):
            assert_same_bits(two, one, f"{shape} again")
            if "avx" in os.environ.get("MLPEXT_CPU_ISA", "avx"):  # eager's product is not held to this
                assert_same_bits(three, one, f"{shape}, {pieces} pieces, with two threads")


@every_float
def test_nan_and_infinity_stay_where_they_are(dtype):
    for shape in ((3, 40, 20), (70, 41, 67)):
        x, w, b, g = tensors(*shape, dtype)
        x[1, 3], x[2, 5], w[4, 2], b[7] = math.nan, math.inf, math.inf, math.nan
        g[0, 9] = math.inf
        for name in ("identity", "tanh"):
            got, exact = results(layer(name), [x, w, b], g), results(eager_layer(name), [x, w, b], g)
            for i, (a, e) in enumerate(zip(got, exact, strict=True)):
                assert torch.equal(a.isnan(), e.isnan()), f"{shape} {name} {dtype}, result {i}"


def test_not_less_exact_than_eager():
    for shape in ((32, 64, 64), (256, 784, 256), (64, 4096, 64), (4096, 64, 64)):
        x, w, b, g = tensors(*shape, torch.float32)
        exact = results(eager_layer("tanh"), [t.double() for t in (x, w, b)], g.double())
        ours, eagers = (results(f("tanh"), [x, w, b], g) for f in (layer, eager_layer))
        for i, (a, n, e) in enumerate(zip(ours, eagers, exact, strict=True)):
            error, theirs = ((t.double() - e).norm() / e.norm() for t in (a, n))
            assert error <= 1.6e-6 and error <= 1.5 * theirs + 1e-7, f"{shape}, result {i}: {error}, {theirs}"


def test_weights_changed_in_any_way_are_seen():
    x, w, b, _ = tensors(70, 64, 64, torch.float32)
    change = {
        "in place": lambda w: w.mul_(2),
        "copy_": lambda w: w.copy_(torch.ones_like(w)),
        ".data": lambda w: setattr(w, "data", torch.full_like(w, 0.5)),
        "set_": lambda w: w.set_(torch.full_like(w, 0.25)),
    }
    for what, f in change.items():
        layer("tanh")(x, w, b)
        f(w)
        assert_near(
            layer("tanh")(x, w, b), torch.tanh(TF.linear(x.double(), w.double(), b.double())), x.dtype, what
        )


def test_a_frozen_weight_leaves_the_bias_its_sum():
    x, w, b, g = tensors(9, 5, 4)
    b.requires_grad_()
    layer("identity")(x, w, b).backward(g)
    torch.testing.assert_close(b.grad, g.sum(0))


def test_backward_twice_sees_the_same():
    x, w, b, g = tensors(70, 65, 66)
    x.requires_grad_()
    y = layer("silu")(x, w, b)
    first = torch.autograd.grad(y, x, g, retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, x, g)[0], first[0])


@pytest.mark.launch
def test_without_mkldnn_the_results_are_the_same():
    program = (
        "import torch, mlpext.functional as F\n"
        "x, w = torch.linspace(-1, 1, 70 * 65).view(70, 65), torch.linspace(1, -1, 66 * 65).view(66, 65)\n"
        "print([F.linear_activation(x.to(d), w.to(d), None, 'tanh').double().sum().item()\n"
        f"       for d in ({', '.join(map(str, FLOATS))})])\n"
    )
    outputs = set()
    for isa in ("", "SSE41", "AVX2"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa or "DEFAULT"}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.add(run.stdout)
    assert len(outputs) == 1 or "avx" not in os.environ.get("MLPEXT_CPU_ISA", "avx")
    with torch.backends.mkldnn.flags(enabled=False):
        x, w, b, g = tensors(70, 65, 66, torch.float32)
        compare(layer("tanh"), eager_layer("tanh"), [x, w, b], g, torch.float32, "mkldnn disabled")
