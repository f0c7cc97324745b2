"""torch's own surroundings: optimizers, averaging, norms, pruning, functional calls, third derivatives."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, vmap
from torch.nn.utils import parametrizations, prune

import mlpext

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}


def mlp(activation=nn.Tanh, dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 1))
    return net.to(dtype)


def assert_same_parameters(model, other, tolerance=1e-9):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def train(model, optimizer, steps=5, sparse=False):
    torch.manual_seed(1)
    x, target = torch.randn(16, 4, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        if sparse:
            for p in model.parameters():
                p.grad = p.grad.to_sparse()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, fused):
    model = mlp()
    twin = copy.deepcopy(model)

    def make(net):
        matrices = [p for p in net.parameters() if p.dim() == 2 or name != "Muon"]
        return OPTIMIZERS[name](matrices, lr=0.01)

    optimizer = make(model)  # made before
    train(fused(model, 2), optimizer, sparse=name == "SparseAdam")
    train(twin, make(twin), sparse=name == "SparseAdam")
    assert_same_parameters(model, twin, 1e-4 if name == "Muon" else 1e-9)  # Muon computes in bfloat16


def test_averaged_models(fused):
    model, twin = fused(mlp(), 2), mlp()
    averages = []
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        swa = torch.optim.swa_utils.AveragedModel(net)
        schedule = torch.optim.swa_utils.SWALR(optimizer, 0.05)
        for _ in range(4):
            train(net, optimizer)
            swa.update_parameters(net)
            schedule.step()
        averages.append(swa)
    assert_same_parameters(*averages)
    assert type(averages[0].module[0]) is mlpext.nn.LinearActivation


@pytest.mark.parametrize(
    "change",
    [
        *(parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal),
        *(torch.nn.utils.weight_norm, torch.nn.utils.spectral_norm),
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.random_structured(layer, "weight", 0.25, dim=0),
    ],
    ids=[
        "weight_norm",
        "spectral_norm",
        "orthogonal",
        "old_weight_norm",
        "old_spectral_norm",
        "l1",
        "structured",
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_norms_and_pruning(change, when, fused):
    """Before: the layer is left alone, its neighbour fused. After: it finds the weight of a fused layer."""
    nets = []
    for ours in (True, False):
        net = mlp()
        if ours and when == "after":
            net = fused(net, 2)
        torch.manual_seed(2)
        change(net[0])
        if ours and when == "before":
            net = fused(net, 1)
        torch.manual_seed(3)
        train(net, torch.optim.SGD(net.parameters(), 0.1))
        nets.append(net)
    assert_same_parameters(*nets)


def test_functional_call(fused):
    model = mlp()
    net = fused(model, 2)
    other = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    x = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(functional_call(net, other, x), functional_call(model, other, x))

    def loss(parameters, x):
        return functional_call(net, parameters, x).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(other, x)
    summed = grad(loss)(other, x)
    for name in other:
        torch.testing.assert_close(per_sample[name].sum(0), summed[name])


@pytest.mark.parametrize(
    "activation", [nn.Tanh, nn.SiLU, lambda: mlpext.nn.Sine(3.0)], ids=["tanh", "silu", "sine"]
)
def test_pinn_with_third_derivatives_in_training(activation, fused):
    """Korteweg-de Vries: u_t + 6 u u_x + u_xxx = 0, the residual trained through torch.func."""

    def make():
        torch.manual_seed(0)
        hidden = nn.Linear(2, 16), activation(), nn.Linear(16, 16), activation()
        return nn.Sequential(*hidden, nn.Linear(16, 1)).double()

    native, net = make(), fused(make(), 2)
    points = torch.rand(32, 2, dtype=torch.float64)
    losses = [korteweg_de_vries(each, points) for each in (native, net)]
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same_parameters(native, net)


def korteweg_de_vries(net, points, steps=5):
    def u(t, x):
        return net(torch.stack([t, x])).squeeze(-1)

    u_t, u_x, u_xxx = grad(u, 0), grad(u, 1), jacfwd(grad(grad(u, 1), 1), 1)

    def residual(point):
        t, x = point
        return u_t(t, x) + 6 * u(t, x) * u_x(t, x) + u_xxx(t, x)

    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = vmap(residual)(points).square().mean() + (net(points) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class SirenLayer(nn.Module):
    def __init__(self, i, o, omega=30.0):
        super().__init__()
        self.linear, self.omega = nn.Linear(i, o), omega
        with torch.no_grad():
            self.linear.weight.uniform_(-((6 / i) ** 0.5) / omega, (6 / i) ** 0.5 / omega)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


def test_siren_fits_an_image():
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 16)] * 2)
    image = (torch.sin(5 * grid[:, :1]) * torch.cos(4 * grid[:, 1:])).detach()
    torch.manual_seed(0)
    model = nn.Sequential(SirenLayer(2, 32), SirenLayer(32, 32), nn.Linear(32, 1))
    net, report = mlpext.fuse(model, graph=True, report=True)
    assert [row.action for row in report] == ["fused", "fused", "fused", "fused", "replaced"]
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(grid) - image).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    torch.testing.assert_close(model(grid), net(grid), rtol=1e-3, atol=1e-3)
