"""DDP and FSDP2 with two gloo ranks on the CPU."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mlpext


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model, x, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def work(rank, port, kind):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        model = mlpext.fuse(mlp())
        assert type(model[0]) is mlpext.nn.LinearActivation
        torch.manual_seed(1)
        x = torch.randn(2, 16, 8)
        reference = mlp()
        if kind == "ddp":
            train(nn.parallel.DistributedDataParallel(model), x[rank])
        else:
            from torch.distributed.fsdp import fully_shard

            mesh = dist.init_device_mesh("cpu", (2,))
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, x[rank])
        train(reference, x.flatten(0, 1))
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            ours = ours.full_tensor() if kind == "fsdp2" else ours
            torch.testing.assert_close(ours, theirs)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(kind):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, kind), nprocs=2)


def test_ddp_fused_inside_the_wrapper():
    """fuse() of a wrapped model leaves the wrapper as it is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        twin = copy.deepcopy(model.module)
        mlpext.fuse(model, inplace=True)
        assert type(model.module[0]) is mlpext.nn.LinearActivation
        x = torch.randn(16, 8)
        train(model, x)
        train(twin, x)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    finally:
        dist.destroy_process_group()
