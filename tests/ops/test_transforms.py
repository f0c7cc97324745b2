"""torch.func, forward mode and all else that looks at tensors from above: the same as eager operators."""

import copy
import math
import threading

import mpmath
import pytest
import torch
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import accuracy
import mlpext
from common import (
    MLP_OPS,
    activation_op,
    all_ops,
    eager,
    every_finite,
    every_float,
    every_functional_case,
    every_inplace_case,
    few_ops,
    gradients_of_ones,
    linear_op,
    ours,
    outcome,
    points,
    reference_of,
    values_of,
    worst,
)

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning"),  # from torch 2.14 on
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),  # by torch.func.linearize
]
close = torch.testing.assert_close


def both(op, transform, *args, **kwargs):
    """The transform of ours equals the transform of eager."""
    actual, expected = transform(op.ours)(*args, **kwargs), transform(op.eager)(*args, **kwargs)
    close(actual, expected)
    return actual


def plain(op, seed=0):
    return op.inputs(seed=seed, requires_grad=False)


def scalar(f):
    return lambda *tensors: f(*tensors).square().sum()


@all_ops
def test_grad(op):
    tensors = plain(op)
    both(op, lambda f: grad(scalar(f), argnums=tuple(range(len(tensors)))), *tensors)


@few_ops
def test_grad_and_value(op):
    both(op, lambda f: grad_and_value(scalar(f)), *plain(op))


@all_ops
def test_grad_of_grad(op):
    both(op, lambda f: grad(lambda *t: grad(scalar(f))(*t).square().sum()), *plain(op))


@all_ops
def test_vmap(op):
    """Over the first input, as autograd functions are: no warning of a slow fallback either."""
    tensors = plain(op)
    both(
        op,
        lambda f: vmap(f, in_dims=(0, *[None] * (len(tensors) - 1))),
        torch.stack([tensors[0]] * 3),
        *tensors[1:],
    )


@few_ops
def test_vmap_over_every_input(op):
    tensors = [torch.stack([t, 2 * t, -t], dim=1) for t in plain(op)]
    both(op, lambda f: vmap(f, in_dims=1, out_dims=1), *tensors)
    for mapped in range(len(tensors)):
        in_dims = tuple(1 if i == mapped else None for i in range(len(tensors)))
        arguments = [t if i == mapped else t[:, 0] for i, t in enumerate(tensors)]
        both(op, lambda f: vmap(f, in_dims=in_dims, out_dims=-1), *arguments)  # noqa: B023


@few_ops
def test_vmap_nested_and_with_inputs_that_require_grad(op):
    tensors = op.inputs()
    stack = lambda: [torch.stack([torch.stack([t, 2 * t])] * 3) for t in tensors]  # noqa: E731
    f = lambda g: vmap(vmap(g))  # noqa: E731
    both(op, f, *stack())
    actual, expected = (
        torch.autograd.grad(f(g)(*stack()).square().sum(), tensors) for g in (op.ours, op.eager)
    )
    close(actual, expected)


@all_ops
def test_per_sample_gradients(op):
    tensors = plain(op)
    in_dims = (0, *[None] * (len(tensors) - 1))
    arguments = torch.stack([tensors[0]] * 3) * torch.tensor([1.0, 0.9, -1.0]).view(3, 1, 1), *tensors[1:]
    both(op, lambda f: vmap(grad(scalar(f), argnums=tuple(range(len(tensors)))), in_dims=in_dims), *arguments)


@few_ops
def test_grad_of_vmap(op):
    tensors = plain(op)
    in_dims = (0, *[None] * (len(tensors) - 1))
    both(op, lambda f: grad(scalar(vmap(f, in_dims=in_dims))), torch.stack([tensors[0]] * 3), *tensors[1:])


@all_ops
def test_vjp(op):
    tensors = plain(op)

    def pull_back(f):
        def run(*tensors):
            y, back = vjp(f, *tensors)
            return y, back(torch.cos(y.detach()))

        return run

    both(op, pull_back, *tensors)


@all_ops
def test_jvp(op):
    tensors = plain(op)
    both(op, lambda f: lambda *t: jvp(f, t, tuple(torch.cos(x) for x in t)), *tensors)


@few_ops
def test_linearize(op):
    def pushed(f):
        def run(*tensors):
            y, push = linearize(f, *tensors)
            return y, push(*(torch.cos(t) for t in tensors))

        return run

    both(op, pushed, *plain(op))


@all_ops
def test_jacrev_and_jacfwd(op):
    tensors = plain(op)
    every = tuple(range(len(tensors)))
    reverse = both(op, lambda f: jacrev(f, argnums=every), *tensors)
    forward = both(op, lambda f: jacfwd(f, argnums=every), *tensors)
    close(reverse, forward)


@few_ops
def test_jacobians_of_jacobians(op):
    tensors = plain(op)
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            both(op, lambda f: outer(inner(f)), *tensors)  # noqa: B023


@all_ops
def test_hessian(op):
    both(op, lambda f: hessian(scalar(f)), *plain(op))


@few_ops
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_autograd_functional(op, strategy):
    tensors = tuple(plain(op))
    vectorize = strategy == "forward-mode"
    jacobian = torch.autograd.functional.jacobian
    close(*(jacobian(f, tensors, vectorize=vectorize, strategy=strategy) for f in (op.ours, op.eager)))
    of_scalar = torch.autograd.functional.hessian
    close(
        *(
            of_scalar(scalar(f), tensors, vectorize=vectorize, outer_jacobian_strategy=strategy)
            for f in (op.ours, op.eager)
        )
    )


@few_ops
@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalize(op, remove):
    both(
        op,
        lambda f: functionalize(lambda *t: f(*(x.clone().mul_(1.5) for x in t)), remove=remove),
        *plain(op),
    )
    both(op, lambda f: functionalize(grad(scalar(f)), remove=remove), *plain(op))


@pytest.mark.parametrize(
    "module", [mlpext.nn.LinearActivation(4, 5, "gelu"), mlpext.nn.Maxout(4, 5, 3)], ids=["layer", "maxout"]
)
def test_functional_call_and_ensembles(module):
    """functional_call with other parameters, under grad, and vmapped over a stack of models."""
    models = [copy.deepcopy(module).double() for _ in range(3)]
    for i, m in enumerate(models):
        torch.manual_seed(i)
        m.reset_parameters()
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    for m in models:
        parameters = {k: p.detach() for k, p in m.named_parameters()}
        close(functional_call(module, parameters, (x,)), m(x))
        m.zero_grad()
        m(x).square().sum().backward()
        close(grad(loss)(parameters, x), {k: p.grad for k, p in m.named_parameters()})
    stacked, buffers = torch.func.stack_module_state(models)
    together = vmap(lambda p, b: functional_call(module, (p, b), (x,)))(stacked, buffers)
    close(together, torch.stack([m(x) for m in models]))
    per_model = vmap(grad(loss), in_dims=(0, None))(stacked, x)
    close(per_model["weight"], torch.stack([m.weight.grad for m in models]))
    per_sample = vmap(grad(loss), in_dims=(None, 0))(
        {k: p.detach() for k, p in models[0].named_parameters()}, x
    )
    close(per_sample["weight"].sum(0), models[0].weight.grad)


@few_ops
def test_forward_mode_by_dual_numbers(op):
    fwAD = torch.autograd.forward_ad
    tensors = plain(op)
    with fwAD.dual_level():
        for which in range(len(tensors)):
            results = []
            for f in (op.ours, op.eager):
                dual = [fwAD.make_dual(t, torch.cos(t)) if i == which else t for i, t in enumerate(tensors)]
                results.append(tuple(fwAD.unpack_dual(f(*dual))))
            close(*results)
            assert results[0][1] is not None and results[0][1].abs().sum() > 0, "the tangent was dropped"


@every_inplace_case
def test_forward_mode_in_place(name, parameters):
    def run(f):
        fwAD = torch.autograd.forward_ad
        x = torch.linspace(-2.1, 2, 12, dtype=torch.float64)
        with fwAD.dual_level():
            dual = fwAD.make_dual(x, torch.cos(x)).clone()
            f(dual)
            return tuple(fwAD.unpack_dual(dual))

    actual, expected = (
        outcome(run, ours(name, parameters, True)),
        outcome(run, eager(name, parameters, True)),
    )
    if isinstance(expected, type):  # a negative slope
        assert actual is expected
    else:
        close(actual, expected)


@pytest.mark.parametrize("name", ["relu", "elu", "leaky_relu", "silu", "hardtanh"])
def test_in_place_under_transforms(name):
    f, theirs = getattr(mlpext.functional, name), getattr(torch.nn.functional, name)
    x = torch.linspace(-2.1, 2, 12, dtype=torch.float64).view(3, 4)
    for transform in (
        lambda g: grad(lambda x: g(x * 1, inplace=True).square().sum()),
        lambda g: vmap(lambda x: g(x * 1, inplace=True)),
        lambda g: functionalize(lambda x: g(x * 1, inplace=True)),
        lambda g: lambda x: jvp(lambda x: g(x * 1, inplace=True), (x,), (torch.cos(x),)),
    ):
        close(transform(f)(x), transform(theirs)(x))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@all_ops
def test_dispatch_mode_sees_native_operators(op):
    tensors = op.inputs()
    with Seen() as seen:
        y = op(*tensors)
        grads = torch.autograd.grad(y.square().sum(), tensors)
    assert seen.operators and all(o.namespace in ("aten", "prims") for o in seen.operators), seen.operators
    close(grads, torch.autograd.grad(op.eager(*tensors).square().sum(), tensors))


@few_ops
def test_backward_under_a_dispatch_mode(op):
    """The mode starts after the fast forward: its backward is eager too."""
    tensors = op.inputs()
    y = op(*tensors).square().sum()
    with Seen() as seen:
        grads = torch.autograd.grad(y, tensors)
    assert all(o.namespace == "aten" for o in seen.operators), seen.operators
    close(grads, torch.autograd.grad(op.eager(*tensors).square().sum(), tensors))


@few_ops
def test_function_mode_sees_the_call(op):
    class Count(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    tensors = op.inputs()
    with Count() as mode:
        y = op(*tensors)
    assert mode.seen > 0
    close(y, op.eager(*tensors))


@all_ops
def test_function_subclass_is_kept(op):
    class Tagged(torch.Tensor):
        pass

    tensors = plain(op)
    y = op(tensors[0].as_subclass(Tagged), *tensors[1:])
    assert type(y) is Tagged
    close(y.as_subclass(torch.Tensor), op.eager(*tensors))
    last = op(*tensors[:-1], tensors[-1].as_subclass(Tagged))
    assert type(last) is Tagged


def test_parameters_are_plain_tensors():
    layer = mlpext.nn.LinearActivation(3, 2)
    assert type(layer(torch.nn.Parameter(torch.randn(1, 3)))) is torch.Tensor
    assert type(mlpext.functional.elu(torch.nn.Parameter(torch.randn(1, 3)))) is torch.Tensor


@all_ops
def test_wrapper_subclass(op):
    """Two tensors in one: every operator is seen and runs on both."""
    from torch.testing._internal.two_tensor import TwoTensor

    def run(f):
        tensors = [TwoTensor(t.detach(), 2 * t.detach()).requires_grad_() for t in op.inputs()]
        y = f(*tensors)
        assert isinstance(y, TwoTensor)
        grads = torch.autograd.grad(y.sum(), tensors)
        assert all(isinstance(g, TwoTensor) for g in grads)
        return [half.detach() for t in (y, *grads) for half in (t.a, t.b)]

    close(run(op.ours), run(op.eager))


@few_ops
def test_flop_counter_sees_the_product(op):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for f in (op.ours, op.eager):
        tensors = op.inputs()
        with FlopCounterMode(display=False) as counter:
            f(*tensors).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert (counts[0] > 0) == (len(op.shapes) > 1)


@all_ops
def test_meta_and_fake(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def described(y):
        return y.shape, y.dtype, y.stride(), y.device, y.requires_grad

    tensors = op.inputs()
    meta = [t.detach().to("meta").requires_grad_() for t in tensors]
    assert described(op(*meta)) == described(op.eager(*meta))
    grads = torch.autograd.grad(op(*meta).sum(), meta)
    assert [g.shape for g in grads] == [t.shape for t in meta]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        y = op(*fake)
        assert described(y) == described(op.eager(*fake))
        assert [g.shape for g in torch.autograd.grad(y.sum(), fake)] == [t.shape for t in fake]


@few_ops
def test_distributed_tensor(op):
    """One rank suffices to see that every operator has a sharding rule."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = plain(op)
        spread = [
            distribute_tensor(t, mesh, [Shard(0) if i == 0 else Replicate()]) for i, t in enumerate(tensors)
        ]
        spread = [t.requires_grad_() for t in spread]
        y = op(*spread)
        grads = torch.autograd.grad(y.square().sum(), spread)
        leaves = [t.requires_grad_() for t in tensors]
        expected = op.eager(*leaves)
        close(y.full_tensor().detach(), expected.detach())
        close([g.full_tensor() for g in grads], list(torch.autograd.grad(expected.square().sum(), leaves)))
    finally:
        dist.destroy_process_group()


@all_ops
def test_batched_cotangents(op):
    tensors = op.inputs()
    y, y_eager = op(*tensors), op.eager(*tensors)
    g = torch.randn(4, *y.shape, dtype=y.dtype)
    actual = torch.autograd.grad(y, tensors, g, is_grads_batched=True)
    close(actual, torch.autograd.grad(y_eager, tensors, g, is_grads_batched=True))


@all_ops
def test_inference_mode_and_no_grad(op):
    tensors = op.inputs()
    expected = op(*tensors).detach()
    with torch.inference_mode():
        y = op(*tensors)
        assert y.is_inference() and not y.requires_grad
    close(y, expected)
    with torch.no_grad():
        y = op(*tensors)
    assert not y.requires_grad and y.grad_fn is None
    close(y, expected)
    with torch.inference_mode():
        inference = [t.clone() for t in plain(op)]
    assert op(*inference).requires_grad is False
    if len(tensors) > 1:  # saved for backward: refused, as eager
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            op(inference[0], *tensors[1:])


@few_ops
def test_anomaly_mode(op):
    tensors = op.inputs()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
        y = op(*tensors)
        torch.autograd.grad(y.sum(), tensors)
        y = op(*tensors)
        with (
            pytest.raises(RuntimeError, match="nan values"),
            pytest.warns(UserWarning, match="Error detected"),
        ):
            torch.autograd.grad(y, tensors, torch.full_like(y, float("nan")))


@few_ops
def test_node_hooks_and_names(op):
    tensors = op.inputs()
    y = op(*tensors)
    assert isinstance(y.grad_fn.name(), str) and "Backward" in y.grad_fn.name()
    calls = []
    y.grad_fn.register_hook(lambda grad_in, grad_out: calls.append(("post", len(grad_out))))
    y.grad_fn.register_prehook(
        lambda grad_out: (
            calls.append(("pre", len(grad_out))) or tuple(2 * g if g is not None else g for g in grad_out)
        )
    )
    y.register_hook(lambda g: calls.append("tensor"))
    y.retain_grad()
    grads = torch.autograd.grad(y.sum(), tensors)
    assert [c if isinstance(c, str) else c[0] for c in calls] == ["tensor", "pre", "post"]
    close(grads, torch.autograd.grad(2 * op.eager(*tensors).sum(), tensors))


@all_ops
def test_second_backward_raises(op):
    tensors = op.inputs()
    y = op(*tensors)
    torch.autograd.grad(y.sum(), tensors)
    expected = op.eager(*tensors)
    torch.autograd.grad(expected.sum(), tensors)

    def again(y):
        try:
            torch.autograd.grad(y.sum(), tensors)
        except RuntimeError as error:
            return "second time" in str(error)
        return False

    if again(expected):  # what keeps nothing can be run again
        assert again(y)


@few_ops
def test_retain_graph_accumulates(op):
    results = []
    for f in (op.ours, op.eager):
        tensors = op.inputs()
        y = f(*tensors).square().sum()
        for _ in range(3):
            y.backward(retain_graph=True)
        results.append([t.grad for t in tensors])
    close(*results)


@pytest.mark.parametrize("op", [linear_op(n, {}) for n in ("tanh", "gelu", "identity")], ids=lambda op: op.id)
def test_the_same_tensor_as_every_input(op):
    """A square weight fed with itself: gradients add up."""
    results = []
    for f in (op.ours, op.eager):
        w = torch.randn(
            4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
        )
        results.append(torch.autograd.grad(f(w, w).square().sum(), w))
    close(*results)


@pytest.mark.native
@few_ops
def test_backward_from_many_threads(op):
    """One graph, backward from eight threads at once; then eight graphs that add to the same leaves."""
    tensors = op.inputs()
    y = op(*tensors).square().sum()
    expected = torch.autograd.grad(y, tensors, retain_graph=True)
    failures = []

    def shared():
        for _ in range(50):
            for a, e in zip(torch.autograd.grad(y, tensors, retain_graph=True), expected, strict=True):
                if not torch.equal(a, e):
                    failures.append("another gradient")

    def own():
        for _ in range(25):
            op(*tensors).square().sum().backward()

    for work in (shared, own):
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not failures
    close([t.grad for t in tensors], [200 * e for e in expected])


@few_ops
def test_freeing_a_graph_in_two_threads(op):
    """Exactly one of two backwards without retain_graph wins, and the other is refused; nothing crashes."""
    tensors = op.inputs()
    for _ in range(50):
        y, refused = op(*tensors).sum(), []

        def free(y=y, refused=refused):
            try:
                torch.autograd.grad(y, tensors)
            except RuntimeError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=free) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert all("second time" in r for r in refused)


def _recomputed(reentrant):
    return lambda f: lambda *t: checkpoint(f, *t, use_reentrant=reentrant)


def _selective(f):
    def policy(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        policies = torch.utils.checkpoint.CheckpointPolicy
        return policies.MUST_SAVE if op in products else policies.PREFER_RECOMPUTE

    return lambda *t: checkpoint(
        f, *t, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )


@all_ops
@pytest.mark.parametrize(
    "how", [_recomputed(False), _recomputed(True), _selective], ids=["plain", "reentrant", "selective"]
)
def test_checkpoint(op, how):
    tensors = op.inputs()
    results = []
    for f in (how(op.ours), op.eager):
        leaves = [t.detach().requires_grad_() for t in tensors]
        f(*leaves).square().sum().backward()  # the reentrant kind knows only .backward()
        results.append([t.grad for t in leaves])
    close(*results)


@all_ops
def test_jit_trace(op):
    if op in MLP_OPS and mlpext._extension.missing:
        pytest.skip("torch.jit.trace refuses functional_call, and there is no operator")
    tensors = plain(op)
    traced = torch.jit.trace(lambda *t: op(*t), tuple(tensors))
    other = plain(op, seed=1)
    close(traced(*other), op.eager(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@all_ops
def test_autocast(op, dtype):
    """The same dtype and, to the precision of that type, the same numbers as eager's composition."""
    results = []
    for f in (op.ours, op.eager):
        tensors = op.inputs(torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            y = f(*tensors)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in tensors)])
    tolerance = (
        30.0 if "omega=30" in op.id else 0.05
    )  # sin(30 x) of a rounded x: only the dtype says something
    for a, e in zip(*results, strict=True):
        assert a.dtype == e.dtype
        close(a, e, rtol=0.05, atol=tolerance)


@few_ops
def test_autocast_under_transforms(op):
    tensors = op.inputs(torch.float32, requires_grad=False)
    results = []
    for f in (op.ours, op.eager):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(grad(scalar(f))(*tensors))
    assert results[0].dtype == results[1].dtype
    close(*results, rtol=0.05, atol=0.05)


def test_autocast_caches_the_weight():
    """Twice the same weight in one block: one gradient, summed."""
    op = linear_op("tanh", {})
    results = []
    for f in (op.ours, op.eager):
        tensors = op.inputs(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(*tensors) + f(tensors[0] * 2, *tensors[1:])
        y.float().sum().backward()
        results.append([t.grad for t in tensors])
    close(*results, rtol=0.05, atol=0.05)


def test_fx_traces_through():
    """torch.fx records one call, and the traced model computes the same."""
    model = torch.nn.Sequential(
        mlpext.nn.LinearActivation(4, 5, "elu"), mlpext.nn.GELU(), mlpext.nn.Maxout(5, 3)
    )
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 4)
    close(traced(x), model(x))


def test_activation_of_a_view_of_an_expanded_leaf():
    op = activation_op("elu", {})
    results = []
    for f in (op.ours, op.eager):
        x = torch.linspace(-1, 1, 4, requires_grad=True)
        f(x.expand(3, 4).t()[1:]).square().sum().backward()
        results.append(x.grad)
    close(*results)


def composites(f, theirs, name, parameters, x):
    """By each way into the composite of an activation: whether it is the value, ours, eager's."""

    def backward(x):
        return torch.ops.mlpext.activation_backward(
            torch.ones_like(x), x, name, values_of(name, parameters), False
        )

    def with_graph(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)[0].detach()

    def both(way):
        return way(f), way(theirs)

    return {
        "vmap": (True, vmap(f)(x[None])[0], theirs(x)),
        "vmap of backward": (False, vmap(backward)(x[None])[0], gradients_of_ones(theirs, x)),
        "create_graph": (False, *both(with_graph)),
        "grad": (False, *both(lambda f: grad(lambda x: f(x).sum())(x))),
        "jvp": (False, *both(lambda f: jvp(f, (x,), (torch.ones_like(x),))[1])),
    }


@pytest.mark.native
@every_float
@every_functional_case
def test_composites_are_as_exact_as_the_kernels(name, parameters, dtype):
    """Or as eager, by the same way."""
    half = dtype in (torch.bfloat16, torch.float16)
    x = every_finite(dtype)[::7] if half else points(name, parameters, dtype, 1000)
    at = x.double().numpy()
    value, slope = reference_of(name, parameters, x)
    theirs = eager(name, parameters)
    for what, (is_value, actual, eagers) in composites(
        ours(name, parameters), theirs, name, parameters, x
    ).items():
        error_of = accuracy.value_error if is_value else accuracy.derivative_error
        error, bound = error_of(name, parameters, actual, at, value if is_value else slope)
        if name in ("sine", "squareplus"):  # torch has none
            assert error.max() <= bound, f"{what}: {worst(error, at)}"
        elif error.max() > bound:
            other, _ = error_of(name, parameters, eagers, at, value if is_value else slope)
            assert error.max() <= 1.01 * other.max(), f"{what}: {worst(error, at)}, eager {worst(other, at)}"


@pytest.mark.parametrize("b", [4.0, 0.25, 1e-300, 1e300, math.inf])
def test_squareplus_far_out_and_at_its_corner(b):
    """x, 0 and b where each alone shows; every derivative at 0, where both sides meet."""
    x = torch.tensor([-1e20, -1e4, -300.0, 0.0, 300.0, 1e4, 1e20], dtype=torch.float64)
    with mpmath.workdps(700):
        roots = [mpmath.sqrt(mpmath.mpf(v) ** 2 + b) for v in x.tolist()]
        value = x.new_tensor([float((v + r) / 2) for v, r in zip(x.tolist(), roots, strict=True)])
        slope = x.new_tensor([float((v / r + 1) / 2) for v, r in zip(x.tolist(), roots, strict=True)])
    f = ours("squareplus", {"b": b})
    for dtype in (torch.float64, torch.float32):
        t = x.to(dtype)
        for way in (f, vmap(f), torch.compile(f, backend="aot_eager")):
            close(way(t), value.to(dtype), rtol=1e-6, atol=1e-44)
        leaf = t.clone().requires_grad_()
        plain = torch.autograd.grad(f(leaf).sum(), leaf)[0]
        for derivative in (vmap(grad(f))(t), plain, jvp(f, (t,), (torch.ones_like(t),))[1]):
            close(derivative, slope.to(dtype), rtol=1e-6, atol=1e-44)
    zero = torch.zeros((), dtype=torch.float64)
    if math.isfinite(b):
        close(grad(grad(f))(zero), torch.tensor(1 / math.sqrt(b) / 2, dtype=torch.float64))
