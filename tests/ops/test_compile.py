"""torch.compile, torch.export, AOTInductor, make_fx and compiled autograd: one graph, eager's numbers."""

import io
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import mlpext
from common import (
    MAXOUT_OPS,
    activation_op,
    all_ops,
    assert_close,
    default_ops,
    few_ops,
    gated_op,
    linear_gated_op,
    linear_maxout_op,
    linear_op,
    mlp_op,
)

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("fresh_dynamo")]
CORE_OPS = [
    activation_op("elu", {}),
    activation_op("mish", {}),
    linear_op("elu", {}),
    linear_op("gelu", {}),
    linear_gated_op("silu", {}),
    gated_op("silu", {}),
    *MAXOUT_OPS,
]
one_of_each = pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in CORE_OPS])


def plain(op, dtype=torch.float32, seed=0):
    return op.inputs(dtype, seed, requires_grad=False)


def results(f, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    y.square().sum().backward()
    return [y.detach(), *(t.grad for t in leaves)]


def grown(op, rows, dtype=torch.float32):
    """Inputs with another number of rows (for a fused layer or a bare activation)."""
    x, *rest = plain(op, dtype)
    return [t.repeat(rows, 1) if t.shape == x.shape else t for t in (x, *rest)]


@default_ops
def test_forward_and_backward_in_one_graph(op):
    compiled = torch.compile(op.ours, fullgraph=True, backend="aot_eager")
    tensors = plain(op)
    assert_close(results(compiled, tensors), results(op.eager, tensors))


@few_ops
@pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
def test_backends_without_grad(op, backend):
    tensors = plain(op)
    with torch.no_grad():
        assert_close(torch.compile(op.ours, fullgraph=True, backend=backend)(*tensors), op.eager(*tensors))


@one_of_each
def test_dynamic_shapes_compile_once(op):
    """What is compiled for one number of rows serves every other."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.ours, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows in (2, 3, 5):
        tensors = grown(op, rows)
        assert_close(results(compiled, tensors), results(op.eager, tensors), rows)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(op, dtype):
    tensors = plain(op)

    def run(f):
        def under(*tensors):
            with torch.autocast("cpu", dtype=dtype):
                return f(*tensors)

        return under

    actual = results(torch.compile(run(op.ours), fullgraph=True, backend="aot_eager"), tensors)
    expected = results(run(op.eager), tensors)
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    assert_close(actual, expected, rtol=0.05, atol=0.05)


@one_of_each
def test_transforms_inside(op):
    tensors = plain(op, torch.float64)
    in_dims = (0, *[None] * (len(tensors) - 1))
    stacked = torch.stack([tensors[0]] * 3), *tensors[1:]

    def scalar(f):
        return lambda *t: f(*t).square().sum()

    transforms = {
        "grad": (lambda f: torch.func.grad(scalar(f)), tensors),
        "per-sample": (lambda f: torch.func.vmap(torch.func.grad(scalar(f)), in_dims=in_dims), stacked),
        "jacfwd": (lambda f: torch.func.jacfwd(f), tensors),
    }
    for name, (transform, arguments) in transforms.items():
        compiled = torch.compile(transform(op.ours), fullgraph=True, backend="aot_eager")
        assert_close(compiled(*arguments), transform(op.eager)(*arguments), name)


@one_of_each
def test_with_checkpoint_inside(op):
    def run(*tensors):
        return torch.utils.checkpoint.checkpoint(op.ours, *tensors, use_reentrant=False)

    tensors = plain(op)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(results(compiled, tensors), results(op.eager, tensors))


def test_in_place_inside():
    def run(f):
        def twice(x):
            y = x * 2
            f(y, inplace=True)
            return y + 1

        return twice

    for name in ("relu", "elu", "leaky_relu", "silu", "hardtanh"):
        ours, eager = (getattr(m, name) for m in (mlpext.functional, torch.nn.functional))
        x = torch.linspace(-2, 2, 12)
        compiled = torch.compile(run(ours), fullgraph=True, backend="aot_eager")
        assert_close(results(compiled, [x]), results(run(eager), [x]), name)


MODULES = {
    "mlp": lambda: mlpext.nn.MLP([4, 8, 8, 3], "tanh"),
    "maxout mlp": lambda: mlpext.nn.MLP([4, 8, 3], "maxout", pieces=3),
    "mixed": lambda: torch.nn.Sequential(
        mlpext.nn.LinearActivation(4, 6, "elu", alpha=0.5), mlpext.nn.GELU(), torch.nn.Linear(6, 2)
    ),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules(make):
    model, x = make(), torch.randn(5, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    for m in (model, compiled):
        model.zero_grad()
        y = m(x)
        y.square().sum().backward()
        outputs.append([y.detach(), *(p.grad for p in model.parameters())])
    assert_close(*outputs)


def test_a_changed_parameter_is_seen():
    """Modules read alpha at each call: a compiled one is compiled again."""
    module = mlpext.nn.ELU(alpha=1.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.linspace(-2, 2, 9)
    for alpha in (1.0, 0.25):
        module.alpha = alpha
        assert_close(compiled(x), torch.nn.functional.elu(x, alpha))


INDUCTOR = [
    *(activation_op("elu", {}), linear_op("elu", {}), linear_gated_op("silu", {})),
    *(MAXOUT_OPS[0], MAXOUT_OPS[2]),
]


def inductor(op):
    for dynamic in (False, True):
        compiled = torch.compile(op.ours, fullgraph=True, dynamic=dynamic)
        tensors = grown(op, 3)
        assert_close(results(compiled, tensors), results(op.eager, tensors), dynamic)


@pytest.mark.parametrize("op", [pytest.param(op, id=op.id) for op in INDUCTOR[1:3]])
def test_inductor(op):
    compiled = torch.compile(op.ours, fullgraph=True)
    tensors = plain(op)
    assert_close(results(compiled, tensors), results(op.eager, tensors))


@pytest.mark.slow
@all_ops
def test_inductor_for_all(op):
    inductor(op)


class Call(torch.nn.Module):
    def __init__(self, f, tensors):
        super().__init__()
        self.f = f
        for i, t in enumerate(tensors[1:]):
            self.register_parameter(f"p{i}", torch.nn.Parameter(t))

    def forward(self, x):
        return self.f(x, *self.parameters())


def only_aten(program):
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return all(
        str(getattr(t, "namespace", "aten")) in ("aten", "prims") or not hasattr(t, "namespace")
        for t in targets
    )


@default_ops
def test_export(op):
    export(op, strict=False)


@few_ops
def test_export_strict(op):
    export(op, strict=True)


def export(op, strict):
    x, *rest = grown(op, 2)
    module = Call(op.ours, [x, *rest])
    program = torch.export.export(module, (x,), strict=strict)
    assert_close(program.module()(x), op.eager(x, *rest))
    assert only_aten(program), program.graph
    assert_close(program.run_decompositions().module()(x), op.eager(x, *rest))
    assert only_aten(program.run_decompositions())


@few_ops
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch_and_save(op, strict):
    x, *rest = grown(op, 2)
    if op.id == "maxout(pieces=2,dim=0)":
        rows = 2 * torch.export.Dim("half", min=2, max=100)
    else:
        rows = torch.export.Dim("rows", min=2, max=200)
    program = torch.export.export(Call(op.ours, [x, *rest]), (x,), dynamic_shapes=({0: rows},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 3, 5):
        other, *_ = grown(op, n)
        assert_close(loaded(other), op.eager(other, *rest), n)


@few_ops
def test_export_for_training(op):
    """The exported program is differentiated as the original."""
    x, *rest = grown(op, 2)
    program = torch.export.export(Call(op.ours, [x, *rest]), (x,)).module()
    leaf = x.clone().requires_grad_()
    program(leaf).square().sum().backward()
    expected = results(op.eager, [x, *rest])
    assert_close([leaf.grad, *(p.grad for p in program.parameters())], expected[1:])


def aot_inductor(op, tmp_path):
    x, *rest = grown(op, 2)
    batch = torch.export.Dim("rows", min=2, max=200)
    program = torch.export.export(Call(op.ours, [x, *rest]), (x,), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for n in (2, 5):
        other, *_ = grown(op, n)
        assert_close(loaded(other), op.eager(other, *rest), n)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("op", [pytest.param(INDUCTOR[1], id=INDUCTOR[1].id)])
def test_aot_inductor(op, tmp_path):
    aot_inductor(op, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "op", [pytest.param(op, id=op.id) for op in CORE_OPS if op.id != "maxout(pieces=2,dim=0)"]
)
def test_aot_inductor_for_more(op, tmp_path):
    aot_inductor(op, tmp_path)


@default_ops
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(op, mode):
    tensors = plain(op, torch.float64)
    graph = make_fx(lambda *t: op(*t), tracing_mode=mode)(*tensors)
    assert_close(graph(*tensors), op.eager(*tensors))
    other = grown(op, 2, torch.float64) if mode == "symbolic" else plain(op, torch.float64, seed=1)
    assert_close(graph(*other), op.eager(*other))


@few_ops
def test_make_fx_of_gradients(op):
    tensors = plain(op, torch.float64)

    def functional(f):
        return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=tuple(range(len(tensors))))

    def engine(f):
        def run(*tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(f(*leaves).square().sum(), leaves)

        return run

    other = plain(op, torch.float64, seed=1)
    for transform, mode in itertools.product((functional, engine), ("real", "fake", "symbolic")):
        graph = make_fx(transform(op.ours), tracing_mode=mode)(*tensors)
        assert_close(graph(*other), transform(op.eager)(*other), mode)


def accumulated(op, f, hook=False):
    leaves = op.inputs(torch.float64)
    for _ in range(2):
        y = f(*leaves)
        if hook:
            y.register_hook(lambda g: g * 2)
        y.square().sum().backward()
    return [t.grad for t in leaves]


@default_ops
def test_compiled_autograd(op):
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        actual = accumulated(op, op.ours)
    assert_close(actual, accumulated(op, op.eager))


def compiled_autograd_with_hooks(op, dynamic):
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", dynamic=dynamic), dynamic=dynamic
    ):
        actual = accumulated(op, op.ours, hook=True)
    assert_close(actual, accumulated(op, op.eager, hook=True))


@few_ops
def test_compiled_autograd_with_hooks(op):
    compiled_autograd_with_hooks(op, dynamic=False)


@pytest.mark.parametrize("op", [pytest.param(INDUCTOR[1], id=INDUCTOR[1].id)])
def test_compiled_autograd_dynamic(op):
    compiled_autograd_with_hooks(op, dynamic=True)


@pytest.mark.slow
@few_ops
def test_compiled_autograd_dynamic_for_more(op):
    compiled_autograd_with_hooks(op, dynamic=True)


@pytest.mark.parametrize("changed", [False, True], ids=["", "output changed"])
@pytest.mark.parametrize("wanted", [slice(None), slice(1), slice(1, 2)], ids=["all", "first", "second"])
@pytest.mark.parametrize(
    "op",
    [
        linear_op("elu", {"alpha": 1.3}),
        linear_op("gelu", {}),
        linear_maxout_op(3),
        mlp_op(("tanh", {}), ("elu", {})),
        mlp_op(("gated silu", {}), ("elu", {})),
    ],
    ids=lambda op: op.id,
)
def test_compiled_autograd_with_saved_tensor_hooks(op, wanted, changed):
    """Each tensor that is packed is unpacked once where the gradients asked for need it, else not at all."""

    def grads(f):
        tensors = op.inputs(torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            y = f(*tensors)
        if changed:
            y += 1
        y.square().sum().backward(inputs=tensors[wanted])
        return [t.grad for t in tensors[wanted]]

    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        actual = grads(op.ours)
    assert_close(actual, grads(op.eager))


@pytest.mark.slow
@few_ops
def test_compiled_autograd_inductor(op):
    with torch._dynamo.compiled_autograd._enable(torch.compile()):
        actual = accumulated(op, op.ours)
    assert_close(actual, accumulated(op, op.eager))
