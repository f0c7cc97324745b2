"""`fit` on several ranks: gloo processes against one process."""

import inspect
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from mlpext.nn import MLP
from mlpext.training import fit, fit_many
from mlpext.training.checkpoint import Checkpoint

pytestmark = pytest.mark.launch

CASES = {
    f"{mode}, {loss}, {name}": {"mode": mode, "loss": loss, **options}
    for mode in ("mini-batch", "batch")
    for loss in ("squared_error", "cross_entropy")
    for name, options in {
        "descent": {},
        "momentum, sum": {"momentum": 0.5, "reduction": "sum", "lr": 1e-4},
        "held out": {"validation": 0.25, "early_stopping": 2},
    }.items()
}


def data(numbers=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1100, 6, generator=generator, dtype=torch.float64)  # more than a block
    labels = torch.randint(3, (1100,), generator=generator)
    return x, torch.randn(1100, 3, generator=generator, dtype=x.dtype) if numbers else labels


def train(seed=0, numbers=False, rows=1100, **options):
    torch.manual_seed(seed)
    model = MLP([6, 5, 3], "tanh", dtype=torch.float64)
    x, d = data(numbers)
    # 16 a step: the last of 1089 samples is a step of one, of which the second rank has nothing.
    options = {"batch_size": 16, "lr": 0.05, "epochs": 3, "seed": 0, "progress": True, **options}
    return model, fit(model, x[:rows], d[:rows], **options)


class Margin(torch.nn.Module):
    """A loss with a parameter of its own, which the optimizer holds; each rank's is another at first."""

    def __init__(self, seed):
        super().__init__()
        self.margin = torch.nn.Parameter(torch.full((3,), 0.1 * (1 + seed), dtype=torch.float64))

    def forward(self, output, target):
        logits = output - self.margin.abs() * torch.nn.functional.one_hot(target, 3)
        return torch.nn.functional.cross_entropy(logits, target, reduction="none") - self.margin.sum()


def train_with_margin(mode, seed=0):
    torch.manual_seed(seed)
    model, loss = MLP([6, 5, 3], "tanh", dtype=torch.float64), Margin(seed)
    options = {"batch_size": 16, "epochs": 3, "seed": 0, "mode": mode, "engine": "autograd"}
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], 0.05, momentum=0.5)
    x, d = data()
    history = fit(model, x[:1089], d[:1089], loss=loss, optimizer=optimizer, **options)
    return torch.nn.ModuleList([model, loss]), history


def step_in_bfloat16():
    """b after a step of lr 1 from zero, with x = 0 and d = 1: 1."""
    model = MLP([1, 1], dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.zero_()
    options = {"mode": "batch", "lr": 1.0, "epochs": 1, "progress": False}
    fit(model, torch.zeros(2**14, 1), torch.ones(2**14, 1), **options)
    return model[0].bias.item()


def lbfgs(parameters):
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3)


def result(model, history):
    return {
        "weights": [weight.detach().to("cpu", copy=True) for weight in model.parameters()],
        "steps": history.step_losses,
        "rows": [dict(row.metrics, loss=row.loss, updates=row.updates) for row in history.epochs],
    }


def as_rank(folder):
    """What each rank of a launch does: every case, and what came of it into a file of its own."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    # Each has weights of its own at first; rank 0's count.
    results = {name: result(*train(seed=rank, rows=1089, **options)) for name, options in CASES.items()}
    results["numbers"] = result(*train(seed=rank, rows=1089, numbers=True))
    for mode in ("mini-batch", "batch"):
        results[f"margin, {mode}"] = result(*train_with_margin(mode, rank))
    results["lbfgs"] = result(*train(seed=rank, rows=1089, mode="batch", optimizer=lbfgs))
    results["bfloat16"] = step_in_bfloat16()
    files = {"checkpoint": f"{folder}/rank {rank}/checkpoint", "log_dir": f"{folder}/rank {rank}"}
    train(**files)
    results["stopped"] = result(*train(callbacks=[lambda epoch: rank == 1 and epoch.epoch == 2]))
    errors = {}
    weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10, 1], dtype=torch.float64))
    for name, options in {
        "native": {"engine": "native"},
        "stochastic": {"mode": "stochastic"},
        "weighted": {"loss": weighted},
        "weighted batch": {"loss": weighted, "mode": "batch"},
    }.items():
        with pytest.raises(ValueError) as caught:
            train(**options)
        errors[name] = str(caught.value)
    with pytest.raises(ValueError, match=r"one of 2 ranks"):
        fit_many([], *data())
    torch.save({"results": results, "errors": errors}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def as_nccl_rank(folder):
    """Each rank on a GPU of its own."""
    rank = int(os.environ["RANK"])
    results = {
        name: result(*train(seed=rank, rows=1089, device="cuda", **options))
        for name, options in CASES.items()
    }
    assert torch.distributed.get_backend() == "nccl"
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def as_killed_rank(folder):
    """The second rank dies in the third epoch."""
    rank = int(os.environ["RANK"])
    killing = folder.endswith("kill")

    def kill(epoch):
        if killing and rank == 1 and epoch.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        model, _ = train(callbacks=[kill], epochs=5, checkpoint=f"{folder[:-5]}/saved", resume=not killing)
    except RuntimeError as error:
        sys.exit(str(error))
    torch.save(result(model, _), f"{folder[:-5]}/{rank}.pt")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(function, folder, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += [inspect.getfile(function), function.__name__, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return folder, torchrun(as_rank, folder)


def assert_like_one_process(ranks, one, bound=1e-12):
    first, second = ranks
    assert all(map(torch.equal, first["weights"], second["weights"]))
    assert first["rows"] == second["rows"] and torch.equal(first["steps"], second["steps"])
    for ours, theirs in zip(first["weights"], one["weights"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=0.01 * bound)
    torch.testing.assert_close(first["steps"], one["steps"], rtol=bound, atol=0.01 * bound)
    for ours, theirs in zip(first["rows"], one["rows"], strict=True):
        assert ours == pytest.approx(theirs, rel=bound)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(launched, name):
    one = result(*train(rows=1089, engine="autograd", **CASES[name]))
    assert_like_one_process([rank["results"][name] for rank in launched[1]], one)


def test_two_ranks_on_numbers(launched):
    one = result(*train(rows=1089, numbers=True, engine="autograd"))
    assert_like_one_process([rank["results"]["numbers"] for rank in launched[1]], one)


def test_rank_0_alone_writes(launched):
    folder, _ = launched
    assert (folder / "rank 0" / "checkpoint" / "checkpoint.json").exists()
    assert len((folder / "rank 0" / "log.jsonl").read_text().splitlines()) == 3
    assert not (folder / "rank 1").exists()


def test_a_callback_of_any_rank_stops_all(launched):
    assert [len(rank["results"]["stopped"]["rows"]) for rank in launched[1]] == [2, 2]


@pytest.mark.native
def test_what_several_ranks_cannot_do(launched):
    for rank in launched[1]:
        assert "2 ranks add up their gradients" in rank["errors"]["native"]
        assert "mode='stochastic' takes 1 samples a step" in rank["errors"]["stochastic"]
        for name in ("weighted", "weighted batch"):
            assert "no plain mean over the samples, and the means of the ranks" in rank["errors"][name]


@pytest.mark.parametrize("mode", ["mini-batch", "batch"])
def test_a_loss_with_parameters_is_one_on_all_ranks(launched, mode):
    ranks = [rank["results"][f"margin, {mode}"] for rank in launched[1]]
    assert_like_one_process(ranks, result(*train_with_margin(mode)))


def test_lbfgs_on_two_ranks(launched):
    one = result(*train(rows=1089, mode="batch", optimizer=lbfgs))
    assert_like_one_process([rank["results"]["lbfgs"] for rank in launched[1]], one, 1e-9)


def test_ranks_add_up_in_full(launched):
    assert [rank["results"]["bfloat16"] for rank in launched[1]] == [1.0, 1.0]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_ranks_on_gpus_are_one_process(tmp_path):
    ranks = torchrun(as_nccl_rank, tmp_path, min(2, torch.cuda.device_count()))
    for name, options in CASES.items():
        one = result(*train(rows=1089, engine="autograd", **options))
        assert_like_one_process([rank[name] for rank in (ranks * 2)[:2]], one, 1e-9)


def launch(folder):
    variables = {
        **environment(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, __file__, "as_killed_rank", str(folder)]
    both = [
        subprocess.Popen(command, env={**variables, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    messages = [process.communicate(timeout=120)[1] for process in both]
    return [process.returncode for process in both], messages


def test_a_killed_rank_is_named_and_the_run_resumes(tmp_path):
    codes, messages = launch(tmp_path / "kill")
    assert codes == [1, -signal.SIGKILL]
    assert "another rank has ended" in messages[0] and "resume=True" in messages[0]
    assert len(Checkpoint(tmp_path / "saved").load()["log"]) == 2
    codes, messages = launch(tmp_path / "next")
    assert codes == [0, 0], messages
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert_like_one_process(ranks, result(*train(epochs=5, engine="autograd")))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
