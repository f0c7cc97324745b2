"""Model libraries: timm, transformers, peft, PyTorch Geometric."""

import copy

import pytest
import torch
from torch import nn

import mlpext
from mlpext.fusion import FusedForward


def same(model, net, *inputs, tolerance=1e-4, **more):
    """Outputs and gradients."""
    outputs, gradients = [], []
    for each in (model.eval(), net.eval()):
        output = each(*inputs, **more)
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


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}


def tokens():
    return torch.randint(3, 50, (2, 7))


def gated_units(model):
    return sum(isinstance(module, FusedForward) for module in model.modules())


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.mark.parametrize(
    "name, options, gated, pairs",
    [
        ("Llama", {}, 2, 0),
        ("Gemma", {"head_dim": 16, "num_key_value_heads": 2, "pad_token_id": 0}, 2, 0),
        ("Phi3", {"pad_token_id": 0}, 2, 0),
        ("ModernBert", {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}, 2, 0),
        ("T5", {"feed_forward_proj": "gated-gelu"}, 4, 0),
        ("T5", {"feed_forward_proj": "gated-silu"}, 4, 0),
        ("T5", {"feed_forward_proj": "relu"}, 0, 4),
        ("Bert", {}, 0, 3),  # and the pooler
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}, 0, 0),  # Conv1D, not Linear
    ],
)
def test_transformers(name, options, gated, pairs, fused):
    import transformers

    sizes = {"T5": T5, "GPT2": {"vocab_size": 50}}.get(name, SIZES)
    config = getattr(transformers, f"{name}Config")(**sizes, **options)
    model = getattr(transformers, f"{name}Model")(config).eval()
    net = fused(model, pairs)
    assert gated_units(net) == gated
    inputs = tokens()
    more = {"decoder_input_ids": inputs} if name == "T5" else {}
    same(model, net, inputs, **more)
    twin = getattr(transformers, f"{name}Model")(config).eval()
    twin.load_state_dict(net.state_dict())
    same(twin, net, inputs, **more)


def test_transformers_generate():
    model = llama()
    net = mlpext.fuse(model)
    for cached in (True, False):
        options = {"max_new_tokens": 8, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
        inputs = tokens()
        assert torch.equal(net.generate(inputs, **options), model.generate(inputs, **options))


def test_transformers_activation_checkpointing():
    model, inputs = llama(), tokens()
    net = mlpext.fuse(model)
    gradients = []
    for each in (model, net):
        if each is net:
            each.activation_checkpointing_enable()
        loss = each.train()(inputs, labels=inputs).loss
        gradients.append(torch.autograd.grad(loss, list(each.parameters())))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transformers_save_pretrained(tmp_path):
    """What a fused model saves is the model's own: another program loads it, without this package."""
    model, inputs = llama(), tokens()
    net = mlpext.fuse(model)
    net.save_pretrained(tmp_path)
    assert gated_units(net) == 2
    for path in tmp_path.iterdir():
        assert b"Fused" not in path.read_bytes() and b"mlpext" not in path.read_bytes()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and gated_units(loaded) == 0
    same(loaded, net, inputs)


def test_peft_lora_on_llama():
    """Adapters on the layers of a gated unit, put there before and after it is fused."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(target_modules=["gate_proj", "down_proj", "q_proj"], init_lora_weights=False)
    model, inputs = llama(), tokens()
    before = mlpext.fuse(get_peft_model(copy.deepcopy(model), adapters))
    after = get_peft_model(mlpext.fuse(copy.deepcopy(model)), adapters)
    plain = get_peft_model(model, adapters)
    for net in (before, after):
        net.load_state_dict(plain.state_dict())
        assert gated_units(net) == 2
        same(plain, net, inputs)
        for each in (plain, net):
            each.merge_adapter()
        torch.testing.assert_close(net(inputs).logits, plain(inputs).logits)
        with net.disable_adapter(), plain.disable_adapter():
            torch.testing.assert_close(net(inputs).logits, plain(inputs).logits)
        for each in (plain, net):
            each.unmerge_adapter()
    merged = after.merge_and_unload()
    assert gated_units(merged) == 2
    torch.testing.assert_close(merged(inputs).logits, plain.merge_and_unload()(inputs).logits)


@pytest.mark.parametrize("layer", ["SwiGLU", "GluMlp", "SwiGLUPacked"])
def test_timm_gated_layers(layer):
    import timm.layers.mlp as layers

    model = getattr(layers, layer)(16, hidden_features=32)
    net = mlpext.fuse(model)
    assert gated_units(net) == 1
    same(model, net, torch.randn(2, 5, 16))


@pytest.mark.parametrize("name, gated", [("eva02_tiny_patch14_224", 2), ("vit_giant_patch14_reg4_dinov2", 2)])
def test_timm_gated_models(name, gated):
    import timm

    sizes = {"img_size": 28, "num_classes": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model(name, **sizes)
    net = mlpext.fuse(model)
    assert gated_units(net) == gated
    same(model, net, torch.randn(1, 3, 28, 28))


def test_torch_transformer():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    whole = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 16)
    for model, inputs in ((encoder, (x,)), (whole, (x, x[:, :3]))):
        net = mlpext.fuse(model)
        same(model, net, *inputs)
        gradients = [
            torch.autograd.grad(each.train()(*inputs).square().mean(), list(each.parameters()))
            for each in (model, net)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_peft_lora():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", LoraConfig(target_modules=["0"], r=4, init_lora_weights=False))
    net, report = mlpext.fuse(wrapped, report=True)
    left = {row.path: row.reason for row in report if row.action in ("left", "replaced")}
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
