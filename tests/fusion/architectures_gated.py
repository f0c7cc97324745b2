"""Models with gated units, which multiply what two layers make of one input, or both halves of one layer."""

import torch
import torch.nn.functional as TF
from torch import nn

from fusion_common import LAST, Architecture, randn


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class SwiGLU(nn.Module):  # Llama's, and each of Mixtral's experts
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    def __init__(self, width, heads=2, context=None):
        super().__init__()
        self.heads = heads
        self.q_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(context or width, width, bias=False) for _ in range(2))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None, *, causal=False):
        context = x if context is None else context
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(context)), self.v_proj(context)
        y = TF.scaled_dot_product_attention(q, k, self.split(v), is_causal=causal)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LlamaBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.self_attn, self.mlp = Attention(width), SwiGLU(width, 12)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, x, *args, **kwargs):
        x = x + self.self_attn(self.input_layernorm(x), causal=True)
        return x + self.mlp(self.post_attention_layernorm(x))


class T5FeedForward(nn.Module):
    """The last layer may be kept in float32 where the others are not."""

    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.layer_norm, self.act = RMSNorm(width), nn.GELU("tanh")
        self.wi_0, self.wi_1 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.wo, self.dropout = nn.Linear(hidden, width, bias=False), nn.Dropout(0.1)

    def forward(self, x):
        y = self.layer_norm(x)
        y = self.dropout(self.act(self.wi_0(y)) * self.wi_1(y))
        weight = self.wo.weight
        if isinstance(weight, torch.Tensor) and y.dtype != weight.dtype and weight.dtype != torch.int8:
            y = y.to(weight.dtype)
        return x + self.dropout(self.wo(y))


class GEGLU(nn.Module):  # as in diffusers
    def __init__(self, width, hidden):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def gelu(self, gate):
        return TF.gelu(gate)

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return hidden_states * self.gelu(gate)


class DiffusersFeedForward(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 16), nn.Dropout(0.1), nn.Linear(16, width)])

    def forward(self, x):
        for module in self.net:
            x = module(x)
        return x


class GluMlp(nn.Module):  # as in timm
    def __init__(self, width=6, hidden=16, act=nn.Sigmoid, gate_last=True):
        super().__init__()
        self.chunk_dim, self.gate_last = -1, gate_last
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), act(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.LayerNorm(8), nn.Linear(8, width), nn.Dropout(0.1)

    def forward(self, x):
        x1, x2 = self.fc1(x).chunk(2, dim=self.chunk_dim)
        x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
        return self.drop2(self.fc2(self.norm(self.drop1(x))))


def reglu(x):
    a, b = x.chunk(2, dim=-1)
    return a * TF.relu(b)


class FTTransformerBlock(nn.Module):
    """A token for each number of a row, attention between them, and a feed-forward part with ReGLU."""

    def __init__(self, features=6, width=8):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(features, width)) for _ in range(2))
        self.layers = nn.ModuleDict({"attention": Attention(width), "linear0": nn.Linear(width, 24)})
        self.layers["norm"], self.layers["linear1"] = nn.LayerNorm(width), nn.Linear(12, width)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x):
        x = x.unsqueeze(-1) * self.weight + self.bias
        x = x + self.layers["attention"](x)
        x = x + self.layers["linear1"](reglu(self.layers["linear0"](self.layers["norm"](x))))
        return self.head(x[:, 0])


class Mixture(nn.Module):
    """Each token goes to its two best experts."""

    def __init__(self, width=6, experts=3):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, 8) for _ in range(experts))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            result = result.index_add(0, row, expert(x[row]) * weights[row, place, None])
        return result


def projections(path):
    """Of attention: its heads come between."""
    return {f"{path}.{name}_proj": "goes to unflatten" for name in "qkv"} | {f"{path}.o_proj": LAST}


GATED = {
    "Llama block": Architecture(
        LlamaBlock,
        lambda: (randn(2, 5, 8),),
        gated={"mlp": ("gate_proj", "up_proj")},
        left=projections("self_attn") | {"mlp.down_proj": LAST},
    ),
    "T5 feed-forward": Architecture(
        T5FeedForward,
        lambda: (randn(2, 5, 8),),
        gated={"": ("wi_0", "wi_1")},
        left={"wo": "goes to dropout (Dropout)"},
        graph=False,
    ),
    "diffusers GEGLU": Architecture(
        DiffusersFeedForward, lambda: (randn(2, 5, 8),), gated={"net.0": ("proj",)}, left={"net.2": LAST}
    ),
    "GluMlp": Architecture(GluMlp, gated={"": ("fc1",)}, left={"fc2": "goes to drop2 (Dropout)"}),
    "FT-Transformer block": Architecture(
        FTTransformerBlock,
        gated={"": ("layers.linear0",)},
        left=projections("layers.attention") | {"layers.linear1": "goes to add", "head.1": LAST},
    ),
    "mixture of experts": Architecture(
        Mixture,
        gated={f"experts.{i}": ("gate_proj", "up_proj") for i in range(3)},
        left={"router": "goes to softmax"} | {f"experts.{i}.down_proj": LAST for i in range(3)},
    ),
}
