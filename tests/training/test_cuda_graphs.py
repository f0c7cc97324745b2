"""Captured steps against the PyTorch loop: the same weights after the same epochs.

Blocks run as calls, recorded operator by operator in the way of a CUDA graph, and, with `pytest -m cuda`, as
CUDA graphs on a GPU.
"""

import copy
import os
import signal
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mlpext
from mlpext import nn
from mlpext.training import _samples, engines, fit, fit_many
from mlpext.training._progress import Progress
from mlpext.training._samples import Samples, to_storage
from mlpext.training.engines import _graph_group, cuda_graphs
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine
from test_native_engine import DTYPES, MODES, TARGETS, assert_engines_agree, trained


def tensors_in(nest):
    return [leaf for leaf in tree_flatten(nest)[0] if isinstance(leaf, torch.Tensor)]


def storages(nest):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors_in(nest)}


class Recorder(TorchDispatchMode):
    """Notes each operator with its tensors, for good, as a graph does: numbers stay those of the recording,
    memory is where it was."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema.arguments
        named = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
        written = [named.get(a.name) for a in schema if a.alias_info and a.alias_info.is_write]
        for tensor in tensors_in(written):
            if tensor.untyped_storage().data_ptr() not in self.made:
                self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        result = function(*args, **kwargs)
        self.made |= storages(result) - storages([args, kwargs])  # not of views
        self.calls.append((function, args, kwargs, tensors_in(result)))
        return result

    def undo(self):
        with torch._C._AutoDispatchBelowAutograd():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    def replay(self):
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for function, args, kwargs, results in self.calls:
                for old, new in zip(results, tensors_in(function(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Counter:
    """A CUDA graph and how often it was replayed."""

    def __init__(self, replay):
        self.graph, self.replays = replay, 0

    def replay(self):
        self.replays += 1
        self.graph()


graphs: list[Recorder | Counter] = []


def recorded(function, inputs):
    """cuda_graphs.capture without a GPU."""
    with Recorder() as recorder:
        outputs = function(*inputs)
    recorder.undo()
    graphs.append(recorder)
    return recorder.replay, outputs


def counted(function, inputs):
    replay, outputs = cuda_graphs.capture(function, inputs)
    graphs.append(Counter(replay))
    return graphs[-1].replay, outputs


on_gpu = torch.cuda.is_available() and mlpext._C.has_cuda()
ON_GPU = [pytest.mark.cuda, pytest.mark.skipif(not on_gpu, reason="no GPU, or no CUDA in this build")]
CUDA = pytest.param("cuda", marks=ON_GPU)


@pytest.fixture(params=["calls", "recorded", CUDA])
def device(request, monkeypatch):
    """Where the models of a test are, with captured steps: several blocks an epoch, in batch mode of several
    chunks, none of which divides 67 samples."""
    where = "cuda" if request.param == "cuda" else "cpu"
    monkeypatch.setitem(engines.NATIVE, "cpu", CudaGraphsEngine)
    if request.param != "calls":
        monkeypatch.setitem(cuda_graphs.CAPTURE, where, recorded if where == "cpu" else counted)
    graphs.clear()
    monkeypatch.setattr(cuda_graphs, "STEPS", 2)
    monkeypatch.setattr(_samples, "BLOCK", 20)
    return where


# Where the operators of a graph are those of a call: a recording has torch's.
SAME = pytest.mark.parametrize("device", ["calls", CUDA], indirect=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [*mlpext.activations(), "maxout"])
@SAME
def test_every_activation(activation, dtype, mode, device):
    params = {"pieces": 3} if activation == "maxout" else {}
    model = nn.MLP([9, 7, 5, 4], activation, dtype=dtype, device=device, **params)
    assert_engines_agree(model, "numbers", mode=mode)


RULES = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 1e-2},
    "sum": {"momentum": 0.5, "weight_decay": 1e-3, "reduction": "sum", "lr": 0.0005},
    "one step": {"shuffle": False, "batch_size": 67},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "sgd": {"optimizer": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, nesterov=True)},
    "adam": {"optimizer": lambda p: torch.optim.Adam(p, 0.001, weight_decay=1e-2)},
    "adamw": {"optimizer": lambda p: torch.optim.AdamW(p, 0.001)},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, mode, target, device):
    model = nn.MLP([9, 8, 4], ["elu"], dtype=torch.float64, device=device)
    assert_engines_agree(model, target, mode=mode, **RULES[rule])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_single_precision(rule, mode, device):
    model = nn.MLP([9, 8, 6, 4], ["tanh", "maxout"], pieces=3, device=device)
    assert_engines_agree(model, "numbers", mode=mode, **RULES[rule])


@pytest.mark.parametrize("mode", MODES)
def test_no_bias_and_frozen_parameters(mode, device):
    options = {"dtype": torch.float64, "device": device}
    assert_engines_agree(nn.MLP([9, 6, 5, 4], "gelu", bias=False, **options), "numbers", mode=mode)
    for frozen in (["0.weight"], ["1.bias"], ["0.weight", "0.bias", "1.weight"]):
        model = nn.MLP([9, 6, 5, 4], "tanh", **options)
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        assert_engines_agree(model, "numbers", mode=mode, weight_decay=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_held_out_samples_and_early_stopping(mode, device):
    model = nn.MLP([9, 6, 4], "tanh", dtype=torch.float64, device=device)
    options = {"validation": 0.3, "early_stopping": 1, "epochs": 6, "lr": 0.2}
    assert_engines_agree(model, "classes, cross_entropy", mode=mode, **options)


def test_rows_of_a_memory_map(device, tmp_path):
    x = torch.randn(67, 9, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    models = [nn.MLP([9, 6, 4], "tanh", dtype=torch.float64, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, data in zip(models, (x, np.load(tmp_path / "x.npy", mmap_mode="r")), strict=True):
        options = {"batch_size": 16, "seed": 1, "progress": False, "engine": "native", "validation": 0.2}
        fit(model, data, x[:, :4].sin(), **options)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_autocast_is_left_aside(device):
    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with torch.autocast(device, torch.bfloat16):
        trained("native", models[0], "numbers")
    trained("autograd", models[1], "numbers")
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


def test_fit_moves_model_and_data(device):
    models = [nn.MLP([9, 7, 4], "tanh") for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x, d = np.random.default_rng(1).normal(size=(67, 9)), torch.randint(4, (67,)).numpy()
    options = {"device": device, "seed": 1, "validation": (x, d), "progress": False}
    fit(models[0], x, d, engine="native", **options)
    fit_many(models[1:], x, d, engine="native", **options)
    for model in models:
        assert model[0].weight.device.type == device
        for ours, theirs in zip(model.parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("kind", ["float64", "int32", ">f4", "bool"])
def test_data_are_held_once_for_several(kind):
    device = torch.device("cpu")
    x, d = np.ones((7, 3)), np.ones((7, 2)[: 1 if kind in ("int32", "bool") else 2]).astype(kind)
    stored = [to_storage(data, device, torch.float32) for data in (x, d)]
    samples = Samples(*stored, dtype=torch.float32, device=device)
    assert [part.data_ptr() for part in samples.dense_tensors(torch.float32)[:2]] == [
        s.data_ptr() for s in stored
    ]
    assert to_storage([1.0], device, torch.float32) == [1.0]  # for fit to refuse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_a_callback_may_change_rate_and_momentum(make, dtype, device):
    models = [nn.MLP([9, 7, 4], "tanh", dtype=dtype, device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, engine in zip(models, ("native", "autograd"), strict=True):
        optimizer = make(model.parameters(), lr=0.01)

        def change(epoch, group=optimizer.param_groups[0]):
            group["lr"] *= 0.5
            if epoch.epoch == 3:
                group["weight_decay"] = 0.1

        trained(engine, model, "numbers", optimizer=optimizer, callbacks=[change], epochs=6)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=DTYPES[dtype], atol=0.01 * DTYPES[dtype])


@pytest.mark.parametrize("device", ["recorded", CUDA], indirect=True)
def test_graphs_are_replayed(device):
    """67 samples are two blocks of 32 and one of 3. Each is captured when it comes again; in float32 another
    rate goes on with the graphs, weight decay makes new ones."""
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    group = optimizer.param_groups[0]
    made = []

    def change(epoch):
        made.append(len(graphs))
        group["lr"] *= 0.5
        if epoch.epoch == 3:
            group["weight_decay"] = 0.1

    trained("native", model, "numbers", optimizer=optimizer, callbacks=[change], epochs=5)
    assert made == [1, 2, 2, 3, 4]
    assert [graph.replays for graph in graphs] == [5, 2, 3, 1]


@pytest.mark.parametrize("mode", MODES)
@SAME
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(mode, device, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, 0.01)

    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"mode": mode, "optimizer": adam}
    trained("native", models[0], "numbers", epochs=5, **options)
    trained("native", models[1], "numbers", epochs=2, checkpoint=tmp_path, **options)
    trained("native", models[1], "numbers", epochs=5, checkpoint=tmp_path, resume=True, **options)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("mode", "steps"), [("stochastic", 4), ("mini-batch", 4), ("batch", 0)])
def test_ctrl_c_completes_the_block(mode, steps, device, monkeypatch):
    """Pressed in the second block: the model has made its steps and no others; in batch mode in the first,
    and none."""
    model = nn.MLP([9, 7, 4], "tanh", dtype=torch.float64, device=device)
    other, take, calls = copy.deepcopy(model), cuda_graphs.Steps._take, []
    x = torch.randn(67, 9, dtype=torch.float64)

    def pressed(*arguments):
        calls.append(0)
        if len(calls) == (1 if mode == "batch" else 2):
            os.kill(os.getpid(), signal.SIGINT)
        return take(*arguments)

    monkeypatch.setattr(cuda_graphs.Steps, "_take", pressed)
    options = {"batch_size": 16, "mode": mode, "lr": 0.1, "epochs": 1, "shuffle": False, "progress": False}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.raises(KeyboardInterrupt):
        fit(model, x, x[:, :4].sin(), engine="native", optimizer=optimizer, **options)
    assert {int(state["step"]) for state in optimizer.state.values()} == {steps}
    rows = steps * (1 if mode == "stochastic" else 16)
    if rows:
        optimizer = torch.optim.Adam(other.parameters(), 0.01)
        fit(other, x[:rows], x[:rows, :4].sin(), engine="autograd", optimizer=optimizer, **options)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_an_infinite_loss_stops_and_weights_come_back(mode, device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LOOK", 0.0)
    model = nn.MLP([9, 7, 4], "relu", device=device)
    before = copy.deepcopy(model)
    with pytest.raises(FloatingPointError, match="of epoch [12]; try a smaller lr"):
        trained("native", model, "numbers", lr=1e30, mode=mode)
    assert len(before) == len(model)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_progress_adds_up(device, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "LOOK", 0.0)
    told = []
    monkeypatch.setattr(Progress, "on_progress", lambda self, *news: told.append(news))
    history = trained("native", nn.MLP([9, 7, 4], "tanh", device=device), "numbers", epochs=1)
    assert [rows for rows, _ in told] == [32, 32, 3]
    assert sum(rows * error for rows, error in told) / 67 == pytest.approx(history["loss"][0], rel=1e-6)


@pytest.mark.parametrize("device", [CUDA], indirect=True)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", MODES)
def test_no_synchronisation_within_an_epoch(mode, target, device, monkeypatch):
    """Once the graphs are made the host waits for the losses and for the metric, at the end."""
    reads, epochs = [], []
    read, run_epoch = cuda_graphs._read, CudaGraphsEngine.run_epoch

    def reading(values):
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(epochs))
        values = read(values)
        torch.cuda.set_sync_debug_mode(mode)
        return values

    def running(*arguments):
        epochs.append(0)
        torch.cuda.set_sync_debug_mode("error" if len(epochs) > 2 else "default")
        try:
            return run_epoch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(cuda_graphs, "_read", reading)
    monkeypatch.setattr(CudaGraphsEngine, "run_epoch", running)
    monkeypatch.setattr(cuda_graphs, "LOOK", 1e9)
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    trained("native", model, target, mode=mode, epochs=5, validation=0.2, momentum=0.9)
    assert reads == [epoch for epoch in range(1, 6) for _ in range(2)]


def test_auto_takes_the_loop_until_graphs_are_measured(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setitem(engines.NATIVE, "cpu", CudaGraphsEngine)
    calls = []
    monkeypatch.setattr(CudaGraphsEngine, "run_epoch", lambda *arguments: calls.append(arguments))
    model = nn.MLP([9, 7, 4], "tanh", device=device)
    other = copy.deepcopy(model)
    trained("auto", model, "numbers")
    trained("autograd", other, "numbers")
    assert not calls
    for ours, loops in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, loops)


# ---------------------------------------------------------------- fit_many


EACH = {
    "rates": [{"lr": 0.02 * (k + 1), "seed": k} for k in range(5)],
    "kinds": [{"momentum": 0.5 * (k % 2), "seed": k, "batch_size": 16 if k < 3 else 20} for k in range(5)],
    "epochs": [{"epochs": 2 + k % 2, "seed": k} for k in range(5)],
}


def assert_many_are_as_each_alone(device, bound, make=None, **options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(67, 9, generator=generator)
    d = x[:, :4].sin()
    ensemble = (make or (lambda: [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(5)]))()
    alone = copy.deepcopy(ensemble)
    options = {"batch_size": 16, "epochs": 3, "engine": "native", **options}
    each = options.pop("each")
    histories = fit_many(ensemble, x, d, each=each, **options)
    for model, own, history in zip(alone, each, histories, strict=True):
        expected = fit(model, x, d, progress=False, **{**options, **own})
        for column in expected.columns:
            if "seconds" not in column and "second" not in column:
                assert history[column] == pytest.approx(expected[column], rel=bound)
    for ours, theirs in zip(ensemble, alone, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.fixture
def stacks(monkeypatch):
    """How many networks go together, of each stack that is made."""
    made, init = [], _graph_group.Stack.__init__

    def counted(self, engines, *rest):
        made.append(len(engines))
        init(self, engines, *rest)

    monkeypatch.setattr(_graph_group.Stack, "__init__", counted)
    return made


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("mode", MODES)
def test_many_are_as_each_alone(mode, each, device, stacks):
    assert_many_are_as_each_alone(device, 1e-5, mode=mode, each=EACH[each], validation=0.2)
    # Those with momentum have buffers; batch_size is of mini-batches; two go on for an epoch more.
    kinds = [2] if mode == "mini-batch" else [3, 2]
    assert stacks == {"rates": [5], "kinds": kinds, "epochs": [5, 2]}[each]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": lambda p: torch.optim.AdamW(p, 0.01), "lr": 0.0},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"early_stopping": 1, "validation": 0.3, "lr": 0.5, "epochs": 8},
    ],
    ids=["adamw", "momentum", "early stopping"],
)
def test_options_of_many(options, device, stacks, tmp_path):
    def ensemble():
        torch.manual_seed(3)
        return [nn.MLP([9, 8, 6, 4], ["maxout", "elu"], pieces=3, device=device) for _ in range(5)]

    assert_many_are_as_each_alone(device, 1e-4, ensemble, each=[{"seed": k} for k in range(5)], **options)
    assert stacks[0] == 5


def test_many_classes(device, stacks):
    models = [nn.MLP([9, 7, 4], "tanh", dtype=torch.float64, device=device) for _ in range(3)]
    alone = copy.deepcopy(models)
    for model in models, alone:
        model[1][0].weight.requires_grad_(False)
    x, d = torch.randn(67, 9, dtype=torch.float64), torch.randint(4, (67,))
    for loss in ("squared_error", "cross_entropy"):
        options = {"loss": loss, "seed": 1, "engine": "native", "batch_size": 16, "progress": False}
        histories = fit_many(models, x, d, **options)
        for ours, model, history in zip(models, alone, histories, strict=True):
            assert history["accuracy"] == fit(model, x, d, **options)["accuracy"]
            for a, b in zip(ours.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert stacks == [2, 2]  # one has a frozen weight


def test_one_of_many_breaks_down(device):
    models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(3)]
    x = torch.randn(67, 9)
    each = [{"lr": 1e38, "epochs": 50}, {"epochs": 10**7}, {"epochs": 10**7}]
    with pytest.raises(FloatingPointError):
        fit_many(models, x, x[:, :4], each=each, engine="native")
    assert all(weight.isfinite().all() for model in models for weight in model.parameters())


def test_ctrl_c_stops_many(device):
    x = torch.randn(67, 9)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        models = [nn.MLP([9, 7, 4], "tanh", device=device) for _ in range(3)]
        fit_many(models, x, x[:, :4], epochs=10**7, lr=1e-3, engine="native")
