"""PyTorch's own samples: OpInfo and ModuleInfo for the counterparts, all of them, on every CPU dtype listed.

Compared: outputs, gradients, dtypes, strides, in-place behaviour and exception types. What has no samples is
in `LEFT_OUT`; what differs on purpose says why where it is compared.
"""

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import mlpext
import mlpext.functional as F
from common import NAMES, TORCH_LACKS, assert_close, class_name, every_device, has_inplace

pytestmark = pytest.mark.thorough

COUNTERPARTS = {
    n.rsplit(".")[-1]: n
    for n in (*(f"nn.functional.{name}" for name in NAMES), *NAMES, "nn.functional.linear")
    if any(o.name == n for o in op_db)
}
# gelu_tanh is among the samples of gelu, and identity is linear's.
LEFT_OUT = {*TORCH_LACKS, "gelu_tanh", "identity"}


def linear_of_ours(input, weight, bias=None):
    return F.linear_activation(input, weight, bias, activation="identity")


def once_rounded(f):
    """In 16 bits eager rounds after each of several operators; in float32 and rounded once it is nearer."""

    def run(x):
        half = x.dtype in (torch.bfloat16, torch.float16)
        return f(x.float()).to(x.dtype) if half else f(x)

    return run


def their_function(info, name):
    return once_rounded(info.op) if name in ("softsign", "tanhshrink") else info.op


def our_function(name):
    return linear_of_ours if name == "linear" else getattr(F, name)


INFOS = [
    pytest.param(o, name, id=o.name + (f"_{o.variant_test_name}" if o.variant_test_name else ""))
    for name, full in COUNTERPARTS.items()
    for o in op_db
    if o.name == full
]
every_info = pytest.mark.parametrize("info, name", INFOS)
INFOS_AND_DTYPES = [
    pytest.param(*p.values, dtype, id=f"{p.id}-{str(dtype).removeprefix('torch.')}")
    for p in INFOS
    for dtype in sorted(p.values[0].dtypes | p.values[0].backward_dtypes, key=str)
]
every_info_and_dtype = pytest.mark.parametrize("info, name, dtype", INFOS_AND_DTYPES)
inplace_infos_and_dtypes = pytest.mark.parametrize(
    "info, name, dtype", [p for p in INFOS_AND_DTYPES if has_inplace(p.values[1])]
)
error_infos = pytest.mark.parametrize("info, name", [p for p in INFOS if p.values[0].error_inputs_func])


def test_every_counterpart_has_its_samples():
    assert set(NAMES) - LEFT_OUT == set(COUNTERPARTS) - {"linear"}
    assert len(INFOS) >= 20


def call(f, sample, *, requires_grad=False, inplace=False):
    """The result or exception of f on a copy of the sample, with the gradients of what is differentiable."""

    def fresh(value):
        if isinstance(value, torch.Tensor):
            return (
                value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
            )
        return value

    sample = sample.transform(lambda t: t)  # a new SampleInput, so that the original stays
    inputs, args = fresh(sample.input), [fresh(a) for a in sample.args]
    kwargs = {k: fresh(v) for k, v in sample.kwargs.items()}
    leaves = [t for t in (inputs, *args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    try:
        if inplace:
            target = inputs.clone(memory_format=torch.preserve_format)
            y = f(target, *args, **kwargs, inplace=True)
            if y is not target:
                return "another tensor came back"
            observed = [y.detach(), target._version]
        else:
            y = f(inputs, *args, **kwargs)
            observed = [y.detach()]
        if y.requires_grad:
            seed = torch.Generator().manual_seed(1)
            g = torch.randn(y.shape, generator=seed, dtype=torch.float64).to(y)
            observed += torch.autograd.grad(y, leaves, g, allow_unused=True)
        return observed
    except Exception as error:
        return type(error)


def compare(actual, expected, what, strides=True):
    if not isinstance(expected, list) or not isinstance(actual, list):
        assert actual == expected, f"{what}: {actual} instead of {expected}"
        return
    assert len(actual) == len(expected), what
    for a, e in zip(actual, expected, strict=True):
        if not isinstance(e, torch.Tensor):
            assert a == e, what
            continue
        assert (a.dtype, a.shape) == (e.dtype, e.shape), what
        assert a.stride() == e.stride() or e.numel() == 0 or not strides, what
        finite = (
            e.isfinite()
            if e.dtype.is_floating_point or e.dtype.is_complex
            else torch.ones_like(e, dtype=torch.bool)
        )
        assert_close(a[finite], e[finite], what)
        # Where eager gives NaN or infinity, ours may have the limit (test_activations says which).
        neither = ~finite & ~a.isfinite()
        assert_close(a[neither], e[neither], what, equal_nan=True)


@every_device
@every_info_and_dtype
def test_samples(info, name, dtype, device):
    count = 0
    for requires_grad in (False, True) if dtype.is_floating_point or dtype.is_complex else (False,):
        for sample in info.sample_inputs(device, dtype, requires_grad=requires_grad):
            actual, expected = call(our_function(name), sample), call(their_function(info, name), sample)
            compare(actual, expected, f"sample {count}: {sample}")
            count += 1
    assert count > 0


@every_info_and_dtype
def test_reference_samples(info, name, dtype):
    """More shapes, strides, values and, for sigmoid and tanh, the extremes."""
    for count, sample in enumerate(info.reference_inputs("cpu", dtype, requires_grad=False)):
        actual, expected = call(our_function(name), sample), call(their_function(info, name), sample)
        # Parameters are floats here; torch takes threshold's integer -9 for 247 in uint8.
        if actual is RuntimeError and (name, dtype) == ("threshold", torch.uint8):
            continue
        # Torch's logsigmoid alone makes everything contiguous; ours keeps the layout as all others do.
        compare(actual, expected, f"sample {count}: {sample}", strides=name != "logsigmoid")


@error_infos
def test_error_samples(info, name):
    for wrong in info.error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            info.op(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            our_function(name)(sample.input, *sample.args, **sample.kwargs)


@inplace_infos_and_dtypes
def test_inplace_samples(info, name, dtype):
    for requires_grad in (False, True) if dtype.is_floating_point else (False,):
        for count, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=requires_grad)):
            actual = call(our_function(name), sample, inplace=True)
            expected = call(getattr(torch.nn.functional, name), sample, inplace=True)
            compare(actual, expected, f"sample {count}: {sample}")


@every_info
def test_samples_under_vmap(info, name):
    """As eager's own tests do: a batch dimension in front."""
    for sample in info.sample_inputs("cpu", torch.float32):
        if not isinstance(sample.input, torch.Tensor):
            continue
        batch = torch.stack([sample.input, sample.input * 0.5])
        run = lambda f: torch.func.vmap(lambda x: f(x, *sample.args, **sample.kwargs))(batch)  # noqa: E731, B023
        assert_close(run(our_function(name)), run(info.op), str(sample))


OUR_CLASSES = {class_name(n): n for n in NAMES if n not in ("identity", "gelu_tanh")}
MODULE_INFOS = [m for m in module_db if m.name.removeprefix("nn.") in (*OUR_CLASSES, "Linear")]


def our_class(info):
    short = info.name.removeprefix("nn.")
    if short == "Linear":
        return lambda *a, **k: mlpext.nn.LinearActivation(*a, **{"activation": "identity", **k})
    return getattr(mlpext.nn, short)


@pytest.mark.parametrize(
    "info, dtype",
    [
        pytest.param(m, d, id=f"{m.name}-{str(d).removeprefix('torch.')}")
        for m in MODULE_INFOS
        for d in sorted({*m.dtypes, torch.bfloat16, torch.float16}, key=str)
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_modules(info, dtype, training):
    count = 0
    for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
        if sample.forward_input is None:
            continue
        build, what = sample.constructor_input, f"{sample.desc}"
        outcomes = []
        for make in (our_class(info), info.module_cls):
            torch.manual_seed(3)
            module = make(*build.args, **build.kwargs).to(dtype).train(training)
            inputs = [t.detach().clone().requires_grad_() for t in sample.forward_input.args]
            several_roundings = make is info.module_cls and info.name in ("nn.Softsign", "nn.Tanhshrink")
            forward = once_rounded(module) if several_roundings else module
            y = forward(*inputs, **sample.forward_input.kwargs)
            grads = torch.autograd.grad(y.sum(), [*inputs, *module.parameters()])
            outcomes.append([y.detach(), *grads])
        compare(*outcomes, what)
        count += 1
    assert count > 0


def test_module_infos_are_there():
    assert len(MODULE_INFOS) >= 15
