"""Model libraries: timm, transformers, peft, PyTorch Geometric."""

import pytest
import torch
from torch import nn

import mlpext


def same(model, net, *inputs, tolerance=1e-4):
    """Outputs and gradients."""
    outputs, gradients = [], []
    for each in (model.eval(), net.eval()):
        output = each(*inputs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        outputs.append(output)
        wanted = [p for p in each.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(output.square().mean(), wanted, allow_unused=True))
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert list(net.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    "name, size, layers",
    [
        ("vit_tiny_patch16_224", 32, 12),
        ("mixer_s32_224", 64, 16),
        ("resmlp_12_224", 32, 12),
        ("resnet18", 32, 0),
        ("efficientnet_b0", 32, 0),
    ],
)
def test_timm(name, size, layers, fused):
    import timm

    sized = {} if layers == 0 else {"img_size": size}
    model = timm.create_model(name, num_classes=4, **sized)
    same(model, fused(model, layers), torch.randn(1, 3, size, size))


@pytest.mark.parametrize(
    "name, layer", [("vit_tiny_patch16_224", mlpext.nn.SiLU), ("resnet18", mlpext.nn.ELU)]
)
def test_timm_act_layer(name, layer):
    import timm

    sized = {"img_size": 32} if "vit" in name else {}
    models = []
    for each in (layer, getattr(nn, layer.__name__)):
        torch.manual_seed(0)
        models.append(timm.create_model(name, num_classes=4, act_layer=each, **sized))
    assert any(type(module) is layer for module in models[0].modules())
    same(models[1], models[0], torch.randn(1, 3, 32, 32))


def test_transformers_act2fn(fused):
    from transformers import BertConfig, BertModel
    from transformers.activations import ACT2FN

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 50}
    tokens = torch.randint(50, (2, 7))
    ACT2FN["mlpext_gelu"] = mlpext.nn.GELU
    try:
        torch.manual_seed(0)
        ours = BertModel(BertConfig(**sizes, hidden_act="mlpext_gelu"))
    finally:
        ACT2FN.pop("mlpext_gelu")
    assert any(type(module) is mlpext.nn.GELU for module in ours.modules())
    torch.manual_seed(0)
    native = BertModel(BertConfig(**sizes, hidden_act="gelu"))
    same(native, ours, tokens)
    same(native, fused(native, 3), tokens)  # two layers and the pooler


def test_transformers_mlps(fused):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokens = torch.randint(50, (2, 7))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16))
    same(gpt2, mlpext.fuse(gpt2), tokens)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
        )
    )
    same(llama, fused(llama, 2), tokens)


def test_peft_lora():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    net, report = mlpext.fuse(wrapped, report=True)
    left = {row.path: row.reason for row in report if row.action == "left"}
    layer = "base_model.model.0"
    for path in ("", ".base_layer", ".lora_A.other", ".lora_B.default"):
        assert "an adapter of peft comes before the activation" in left[layer + path]
    assert type(net.get_submodule("base_model.model.2")) is mlpext.nn.LinearActivation

    x = torch.randn(5, 8)
    outputs = []
    for name in ("default", "other"):
        for each in (wrapped, net):
            each.set_adapter(name)
        same(wrapped, net, x)
        trained = [path for path, parameter in net.named_parameters() if parameter.requires_grad]
        assert len(trained) == 2 and all(name in path for path in trained)
        outputs.append(net(x))
    with wrapped.disable_adapter(), net.disable_adapter():
        torch.testing.assert_close(net(x), wrapped(x))
        outputs.append(net(x))
    assert not any(torch.allclose(outputs[i], outputs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))

    net.merge_adapter()  # the very weights of `wrapped`
    torch.testing.assert_close(net(x), outputs[1])
    net.unmerge_adapter()
    same(wrapped, net, x)
    merged, report = mlpext.fuse(wrapped.merge_and_unload(), report=True)
    assert [row.path for row in report if row.action == "fused"] == ["0", "1", "2", "3"]
    torch.testing.assert_close(merged(x), outputs[1])


def test_pyg_mlp():
    from torch_geometric.nn import MLP, GCNConv

    for norm in (None, "batch_norm"):
        model = MLP([8, 16, 16, 2], act="elu", norm=norm)
        same(model, mlpext.fuse(model), torch.randn(5, 8))
    net = MLP([8, 16, 2], act=mlpext.nn.ELU(), norm=None)
    assert net(torch.randn(5, 8)).shape == (5, 2)

    class GCN(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = GCNConv(8, 16), nn.ReLU(), nn.Linear(16, 2)

        def forward(self, x, edges):
            return self.head(self.act(self.conv(x, edges)))

    model = GCN()
    same(model, mlpext.fuse(model), torch.randn(4, 8), torch.tensor([[0, 1, 2], [1, 2, 3]]))
