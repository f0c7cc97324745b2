"""DeepXDE: a physics-informed network whose activations are ours, and one that is fused."""

import deepxde as dde
import numpy as np
import pytest
import torch

import mlpext


def poisson():
    """-u'' = pi^2 sin(pi x) on [-1, 1], u = 0 at the ends."""
    geometry = dde.geometry.Interval(-1, 1)

    def residual(x, u):
        return -dde.grad.hessian(u, x) - np.pi**2 * torch.sin(np.pi * x)

    boundary = dde.icbc.DirichletBC(geometry, lambda x: 0, lambda x, on: on)
    return dde.data.PDE(
        geometry, residual, boundary, 32, 2, solution=lambda x: np.sin(np.pi * x), num_test=50
    )


@pytest.mark.parametrize("activation", ["native", mlpext.functional.tanh], ids=["native", "ours"])
def test_poisson(activation):
    dde.config.set_random_seed(1)
    net = dde.nn.FNN([1, 32, 32, 1], "tanh" if activation == "native" else activation, "Glorot uniform")
    model = dde.Model(poisson(), net)
    model.compile("adam", lr=2e-3, metrics=["l2 relative error"])
    history, _ = model.train(iterations=1500, verbose=0, display_every=1500)
    assert history.metrics_test[-1][0] < 0.1


def test_fused_network_has_the_same_residual():
    """FNN keeps its activation as a function: fused under graph=True where it can be traced, else left."""
    dde.config.set_random_seed(1)
    net = dde.nn.FNN([1, 16, 16, 1], "tanh", "Glorot uniform")
    fused, report = mlpext.fuse(net, graph=True, report=True)
    x = torch.rand(8, 1, requires_grad=True)
    torch.testing.assert_close(fused(x), net(x))
    for f in (fused, net):
        (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        f.second = second
    torch.testing.assert_close(fused.second, net.second)
    assert len(report) >= 3
