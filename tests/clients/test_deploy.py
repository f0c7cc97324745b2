"""Compiled and exported: Inductor, AOTInductor, ONNX in onnxruntime."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import mlpext

NAMES = [name for name in mlpext.activations() if name != "identity"]


def mlp(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 4))


class Everything(nn.Module):
    """Every activation there is, each after a linear layer, and a maxout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(mlpext.nn.LinearActivation(8, 8, name) for name in NAMES)
        self.maxout = mlpext.nn.Maxout(8, 3, pieces=4)

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers]), self.maxout(x)


def run_onnx(model, path, *inputs):
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=[{0: batch} for _ in inputs])
    program.save(str(path))
    domains = {node.op_type: node.domain for node in program.model_proto.graph.node}
    assert set(domains.values()) <= {""}, domains  # standard operators only
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    bigger = [torch.cat([x, x]) for x in inputs]
    feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), bigger, strict=True)}
    return bigger, session.run(None, feeds)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graph", [False, True], ids=["modules", "graph"])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.ELU, nn.GELU])
def test_onnx(activation, graph, tmp_path, fused):
    model = mlp(activation).eval()
    net = mlpext.fuse(model, graph=graph)
    inputs, (output,) = run_onnx(net, tmp_path / "model.onnx", torch.randn(4, 8))
    np.testing.assert_allclose(output, model(*inputs).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_onnx_has_every_activation(tmp_path):
    model = Everything().eval()
    inputs, outputs = run_onnx(model, tmp_path / "all.onnx", torch.randn(4, 8))
    for ours, theirs in zip(outputs, model(*inputs), strict=True):
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_compiled_by_inductor(activation, fused):
    model = mlp(activation)
    net = torch.compile(fused(model, 2), fullgraph=True, dynamic=True)
    for batch in (5, 9):
        x = torch.randn(batch, 8)
        torch.testing.assert_close(net(x), model(x))
        ours = torch.autograd.grad(net(x).square().sum(), list(model.parameters()))
        theirs = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(ours, theirs)


def test_aot_inductor(tmp_path, fused):
    model = mlp(nn.Tanh).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused(model, 2), (torch.randn(4, 8),), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    runner = torch._inductor.aoti_load_package(package)
    x = torch.randn(9, 8)
    torch.testing.assert_close(runner(x), model(x))
