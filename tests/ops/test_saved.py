"""What is kept for backward: how many bytes, through saved-tensor hooks, and how long."""

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as TF

import mlpext.functional as F
from common import (
    ACTIVATION_OPS,
    NAMES,
    TORCH_LACKS,
    Kept,
    all_ops,
    assert_close,
    eager,
    every_float,
    every_functional_case,
    few_ops,
    has_inplace,
    ours,
)

pytestmark = pytest.mark.filterwarnings("error")
KEEP_Y = ["relu", "leaky_relu", "elu", "sigmoid", "tanh", "selu", "celu", "threshold"]


def layer_inputs(dtype=torch.float32, needs=(True, True, True)):
    shapes = ((32, 16), (64, 16), (64,))
    return [torch.randn(s).to(dtype).requires_grad_(n) for s, n in zip(shapes, needs, strict=True)]


def kept_by(f, *tensors):
    with Kept(*tensors) as kept:
        y = f(*tensors)
    del y
    return kept


@pytest.mark.parametrize("name", KEEP_Y)
def test_a_fused_layer_keeps_its_output_only(name):
    """4 bytes an output in float32; eager keeps 8 for leaky_relu and elu."""
    x, w, b = layer_inputs()
    kept = kept_by(lambda x, w, b: F.linear_activation(x, w, b, name), x, w, b)
    assert kept.bytes == 4 * 32 * 64
    eagers = kept_by(lambda x, w, b: eager(name, {})(TF.linear(x, w, b)), x, w, b)
    assert kept.bytes <= eagers.bytes


@pytest.mark.parametrize("name", [n for n in NAMES if n not in KEEP_Y])
def test_other_fused_layers_keep_no_more_than_eager(name):
    x, w, b = layer_inputs()
    kept = kept_by(lambda x, w, b: F.linear_activation(x, w, b, name), x, w, b)
    eagers = kept_by(lambda x, w, b: eager(name, {})(TF.linear(x, w, b)), x, w, b)
    assert kept.bytes <= max(eagers.bytes, 4 * 32 * 64 if name != "identity" else 0)
    if name == "identity":
        assert kept.bytes == 0


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("name", ["gelu", "identity", "relu", "elu", "tanh"])
def test_tensors_kept_when_some_are_frozen(name, needs):
    """No more than eager, which hooks would copy: x only for dW, W only for dx, never b, nothing without a
    gradient."""
    tensors = layer_inputs(needs=needs)
    counts = [
        kept_by(lambda x, w, b: F.linear_activation(x, w, b, name), *tensors).tensors,
        kept_by(lambda x, w, b: eager(name, {})(TF.linear(x, w, b)), *tensors).tensors,
    ]
    assert counts[0] <= counts[1]
    if not any(needs):
        assert counts[0] == 0


@pytest.mark.native
@every_functional_case
def test_a_bare_activation_keeps_what_native_keeps(name, parameters):
    x = torch.randn(32, 64, requires_grad=True)
    actual, expected = kept_by(ours(name, parameters), x), kept_by(eager(name, parameters), x)
    if name in TORCH_LACKS:  # eager needs several operators for these
        assert actual.bytes == 0, "the input is all they need"
    else:
        assert (actual.bytes, actual.tensors) == (
            expected.bytes,
            expected.tensors,
        ) or actual.bytes < expected.bytes


@pytest.mark.parametrize("name", [n for n in NAMES if has_inplace(n)])
def test_in_place_keeps_no_more_than_eager(name):
    def on_copy(f):
        return lambda x: f(x * 1)

    x = torch.randn(32, 64, requires_grad=True)
    kept = [kept_by(on_copy(f), x).bytes for f in (ours(name, {}, True), eager(name, {}, True))]
    assert kept[0] <= kept[1]


@pytest.mark.native
@pytest.mark.parametrize("pieces", [2, 3, 256])
def test_maxout_keeps_a_byte_an_output(pieces):
    x = torch.randn(8, 64 * pieces, requires_grad=True)
    kept = kept_by(lambda x: F.maxout(x, pieces), x)
    assert kept.bytes == 8 * 64 and kept.tensors == 1
    weight, bias = torch.randn(pieces, 64, 16), torch.randn(pieces, 64)
    tensors = [t.requires_grad_() for t in (torch.randn(8, 16), weight, bias)]
    assert kept_by(F.linear_maxout, *tensors).bytes == 8 * 64


@pytest.mark.native
@every_float
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "sigmoid"])
def test_a_gated_layer_keeps_two_values_an_output(name, dtype):
    tensors = [
        torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((8, 16), (2, 64, 16), (2, 64))
    ]
    kept = kept_by(lambda x, w, b: F.linear_gated(x, w, b, name), *tensors)
    assert kept.bytes == 2 * 8 * 64 * tensors[0].element_size()


@pytest.mark.native
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "relu", "sigmoid"])
def test_a_gate_keeps_its_inputs_alone(name, needs):
    """Without a gradient of the gate not even the value."""
    tensors = [torch.randn(8, 64, requires_grad=need) for need in needs]
    kept = kept_by(lambda gate, value: F.gated(gate, value, name), *tensors)
    eagers = kept_by(lambda gate, value: eager(name, {})(gate) * value, *tensors)
    assert (kept.bytes, kept.tensors) == (0, 1 + needs[0])
    assert kept.tensors <= eagers.tensors


@pytest.mark.native
def test_maxout_keeps_four_bytes_beyond_256_pieces():
    x = torch.randn(8, 4 * 257, requires_grad=True)
    assert kept_by(lambda x: F.maxout(x, 257), x).bytes == 4 * 8 * 4


@every_float
def test_nothing_is_kept_without_grad(dtype):
    tensors = layer_inputs(dtype)
    with torch.no_grad():
        for name in NAMES:
            assert kept_by(lambda x, w, b: F.linear_activation(x, w, b, name), *tensors).tensors == 0  # noqa: B023


@all_ops
def test_hooks_carry_everything(op):
    """What is packed is what is unpacked: the gradients come from the hooks' copies."""
    tensors = op.inputs()
    packed = []

    def pack(t):
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        y = op(*tensors)
    actual = torch.autograd.grad(y.square().sum(), tensors)
    assert_close(actual, torch.autograd.grad(op.eager(*tensors).square().sum(), tensors))


@few_ops
def test_hooks_that_change_a_tensor_are_noticed(op):
    tensors = op.inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.zeros_like(t)):
        y = op(*tensors)
    actual = torch.autograd.grad(y.sum(), tensors)
    plain = torch.autograd.grad(op(*tensors).sum(), tensors)
    assert op.id.startswith("linear_identity") or any(
        not torch.equal(a, p) for a, p in zip(actual, plain, strict=True)
    )


@few_ops
def test_save_on_cpu(op):
    tensors = op.inputs()
    with torch.autograd.graph.save_on_cpu():
        y = op(*tensors)
    assert_close(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad(op.eager(*tensors).square().sum(), tensors),
    )


@few_ops
def test_saving_may_be_forbidden(op):
    tensors = op.inputs()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        y = op(*tensors)
    torch.autograd.grad(y.sum(), tensors)


@few_ops
def test_saved_tensors_may_be_changed_under_allow_mutation(op):
    if op.id.endswith("_halves"):
        pytest.skip("torch's mode loses the second of two views of one tensor, in its own operators too")
    tensors = op.inputs()
    expected = torch.autograd.grad(op.eager(*tensors).square().sum(), tensors)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = op(*tensors)
        loss = y.square().sum()
        with torch.no_grad():
            for t in tensors:
                t.mul_(0.0)
        actual = torch.autograd.grad(loss, tensors)
    assert_close(actual, expected)


@pytest.mark.native
@pytest.mark.parametrize("needs", [n for n in itertools.product([True, False], repeat=3) if any(n)])
@pytest.mark.parametrize("name", ["elu", "leaky_relu", "celu"])
def test_an_output_changed_in_place_is_computed_again(name, needs):
    """From x, W and b, whichever of them are frozen; an error if one of those has been changed too."""
    tensors = layer_inputs(torch.float64, needs)
    wanted = [t for t in tensors if t.requires_grad]

    def through(f, change=None):
        y = f(*tensors)
        y += 1
        if change is not None:
            with torch.no_grad():
                change.add_(1)
        return torch.autograd.grad(y.square().sum(), wanted)

    def ours(x, w, b):
        return F.linear_activation(x, w, b, name)

    assert_close(through(ours), through(lambda x, w, b: eager(name, {})(TF.linear(x, w, b))))
    for tensor in tensors:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            through(ours, tensor)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in ACTIVATION_OPS])
def test_changes_after_forward_are_noticed_where_native_notices(op):
    """The input, then the output, changed in place before backward: an error where eager gives one."""

    def change(f, which):
        x = op.inputs()[0]
        inner = x * 1.0
        y = f(inner)
        with torch.no_grad():
            (inner if which == "input" else y).mul_(3.0)
        try:
            return torch.autograd.grad(y.sum(), x)[0]
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            return "error"

    for which in ("input", "output"):
        actual, expected = change(op.ours, which), change(op.eager, which)
        if isinstance(expected, str) or isinstance(actual, str):
            if op.id.startswith((*TORCH_LACKS, "tanhshrink", "hardsigmoid")):
                continue  # `op.eager` is several operators there, which keep other things
            assert isinstance(actual, str) and isinstance(expected, str), which
        else:
            assert_close(actual, expected, which)


@pytest.mark.thorough
@all_ops
def test_nothing_leaks(op):
    """Graph, inputs and gradients are gone when the last reference is: no cycle, no cache."""
    gc.collect()
    gc.disable()
    try:
        tensors = op.inputs()
        y = op(*tensors)
        y.square().sum().backward(retain_graph=True)
        grads = torch.autograd.grad(y.sum(), tensors, create_graph=True)
        alive = [weakref.ref(t) for t in (*tensors, y, *grads)]
        del tensors, y, grads
        assert [r() is None for r in alive] == [True] * len(alive)
    finally:
        gc.enable()


@few_ops
def test_backward_frees_what_was_kept(op):
    tensors = op.inputs()
    refs = []

    def pack(t):
        box = [t]  # lists cannot be referenced weakly, tensors can
        refs.append(weakref.ref(t))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box[0]):
        y = op(*tensors)
    kept = [r for r in refs if r() is not None and all(r() is not t for t in (*tensors, y))]
    torch.autograd.grad(y.sum(), tensors)
    assert all(r() is None for r in kept)


@few_ops
def test_memory_does_not_grow(op):
    import resource

    tensors = op.inputs(torch.float32)
    big = [
        t.detach().repeat(64, *[1] * (t.dim() - 1)).requires_grad_() if i == 0 else t
        for i, t in enumerate(tensors)
    ]

    def rounds(n):
        for _ in range(n):
            torch.autograd.grad(op(*big).sum(), big)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = rounds(200)
    assert rounds(2000) - before < 8 * 1024, "KiB more after 2000 rounds"
