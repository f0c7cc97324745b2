"""Models as people write them, each with what is fused in it, and why the rest is not."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as TF
from torch import nn
from torch.nn.utils import parametrizations

from architectures_gated import GATED
from architectures_today import TODAY
from fusion_common import LAST, Architecture, mlp, randn


class MixerBlock(nn.Module):
    def __init__(self, tokens=4, channels=6):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = mlp(tokens, 8, tokens, act=nn.GELU)
        self.channels = mlp(channels, 8, channels, act=nn.GELU)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class ViTMlp(nn.Module):  # as in timm
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, width), nn.Dropout(0.1)

    def forward(self, x):
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))


class ViTBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(width), ViTMlp(width, 16)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DLRM(nn.Module):
    """Towers that are called whole, beside lookups in a loop that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 4) for _ in range(2))
        self.bottom, self.top = mlp(6, 8, 4, act=nn.ReLU), mlp(7, 8, 1, act=nn.ReLU)
        self.top.append(nn.Sigmoid())

    def forward(self, dense, sparse):
        rows = [self.bottom(dense)] + [t(s) for t, s in zip(self.tables, sparse.T, strict=True)]
        pairs = [(a * b).sum(-1, keepdim=True) for i, a in enumerate(rows) for b in rows[:i]]
        return self.top(torch.cat([rows[0], *pairs], -1))


class Policy(nn.Module):
    """An actor and a critic, with a method of its own and an `if`, as in PPO."""

    def __init__(self):
        super().__init__()
        self.policy_net, self.value_net = mlp(4, 8, 8), mlp(4, 8, 8)
        self.action, self.value = nn.Linear(8, 2), nn.Linear(8, 1)
        self.policy_net.append(nn.Tanh())
        self.value_net.append(nn.Tanh())

    def forward(self, x, deterministic=False):
        logits = self.action(self.policy_net(x))
        if deterministic:
            logits = logits.softmax(-1)
        return torch.cat([logits, self.predict_values(x)], -1)

    def predict_values(self, x):
        return self.value(self.value_net(x))


class SirenLayer(nn.Module):
    def __init__(self, i, o, omega=30.0):
        super().__init__()
        self.linear, self.omega = nn.Linear(i, o), omega
        with torch.no_grad():  # as published; from torch's range sin(30 z) would lose two digits
            self.linear.weight.uniform_(-((6 / i) ** 0.5) / omega, (6 / i) ** 0.5 / omega)

    def forward(self, x):
        return torch.sin(self.omega * self.linear(x))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = mlp(8, 6, 3, act=nn.ELU), mlp(3, 6, 8, act=nn.ELU)

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.decoder(self.encode(x))


class Residual(nn.Module):
    def __init__(self, width=6, act=nn.ELU):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.act1, self.act2 = act(), act()

    def forward(self, x):
        y = self.act1(self.fc1(x))
        y += x
        return self.act2(self.fc2(y)) + y


class Tied(nn.Module):
    """Two layers with the same weight, and a decoder with its transpose."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.Tanh()
        self.b.weight = self.a.weight

    def forward(self, x):
        y = self.act(self.b(self.act(self.a(x))))
        return TF.linear(y, self.a.weight.T)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = TF.elu(self.a(x), 0.5)
        x = torch.tanh(self.b(x))
        return self.d(self.c(x).relu())


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.act = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.SiLU()

    def forward(self, x):
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class LoRA(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class TextClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=TF.silu, batch_first=True)
        self.tokens, self.encoder = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, tokens):
        return self.head(self.encoder(self.tokens(tokens)).mean(1))


class DeepSets(nn.Module):
    def __init__(self):
        super().__init__()
        self.phi, self.rho = mlp(6, 8, 8, act=nn.ELU), mlp(8, 8, 2, act=nn.ELU)

    def forward(self, x):
        return self.rho(self.phi(x).sum(1))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.sigmoid = nn.Linear(6, 6), nn.Linear(6, 6), nn.Sigmoid()
        self.left, self.right = mlp(6, 8, 6, act=nn.ReLU), mlp(6, 4, 6, act=nn.Mish)

    def forward(self, x):
        z = self.stem(x)
        return (self.left(z) + self.right(z)) * self.sigmoid(self.gate(z))


UNTRACED = "Policy.forward cannot be traced"
ARCHITECTURES = {
    "MLP": Architecture(lambda: mlp(6, 8, 8, 3), fused=("0", "2"), left={"4": LAST}),
    "MLP-Mixer": Architecture(
        MixerBlock,
        lambda: (randn(2, 4, 6),),
        fused=("tokens.0", "channels.0"),
        left={"tokens.2": "transpose", "channels.2": "add"},
    ),
    "ViT block": Architecture(
        ViTBlock,
        lambda: (randn(2, 5, 8),),
        fused=("mlp.fc1",),
        left={"mlp.fc2": "drop2 (Dropout)", "attn.out_proj": "NonDynamicallyQuantizableLinear"},
    ),
    "DLRM": Architecture(
        DLRM,
        lambda: (randn(5, 6), torch.randint(5, (5, 2))),
        fused=("bottom.0", "top.0", "top.2"),
        left={"bottom.2": LAST},
        graph=False,
    ),
    "PPO policy": Architecture(
        Policy,
        lambda: (randn(5, 4),),
        fused=("policy_net.0", "policy_net.2", "value_net.0", "value_net.2"),
        left={"action": UNTRACED, "value": UNTRACED},
        graph=False,
    ),
    "SIREN": Architecture(
        lambda: nn.Sequential(SirenLayer(6, 8), SirenLayer(8, 8), nn.Linear(8, 2)),
        left={"2": LAST},
        functions=("0.linear", "1.linear"),
    ),
    "autoencoder": Architecture(
        Autoencoder,
        lambda: (randn(5, 8),),
        fused=("encoder.0", "decoder.0"),
        left={"encoder.2": "goes to decoder.0", "decoder.2": LAST},
    ),
    "residual": Architecture(Residual, fused=("fc1", "fc2")),
    "weight-tied": Architecture(Tied, fused=("a", "b")),
    "weight-normed": Architecture(
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 6), nn.ReLU()
        ),
        fused=("2",),
        left={"0": "parametrized"},
    ),
    "with dropout": Architecture(
        lambda: nn.Sequential(
            *(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU()),
            *(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.3)),
        ),
        fused=("0", "3"),
        left={"6": "7 (Dropout) comes before its activation 8 (Tanh)", "9": "goes to 10 (Dropout)"},
    ),
    "with batch-norm": Architecture(
        lambda: nn.Sequential(
            *(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.ReLU6())
        ),
        fused=("3",),
        left={"0": "goes to 1 (BatchNorm1d)"},
    ),
    "functional activations": Architecture(
        Functional,
        left={"d": LAST},
        functions=("a", "b", "c"),
    ),
    "in-place activations": Architecture(
        lambda: mlp(6, 8, 8, 3, act=nn.LeakyReLU, inplace=True), fused=("0", "2"), left={"4": LAST}
    ),
    "shared activation": Architecture(SharedActivation, fused=("layers.0", "layers.1", "layers.2")),
    "LoRA": Architecture(
        lambda: nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()),
        fused=("2",),
        left={"0.base": "goes to add", "0.down": "goes to up (Linear)", "0.up": "goes to add"},
    ),
    "branches": Architecture(
        Branches,
        fused=("left.0", "right.0", "gate"),
        left={"stem": "used more than once", "left.2": "goes to add", "right.2": "goes to add"},
    ),
    "TransformerEncoderLayer": Architecture(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, activation=nn.GELU(), batch_first=True),
        lambda: (randn(2, 5, 8),),
        fused=("linear1",),
        left={"self_attn.out_proj": "NonDynamicallyQuantizableLinear", "linear2": "dropout2 (Dropout)"},
        graph=False,
    ),
    "nn.Transformer": Architecture(
        lambda: nn.Transformer(8, 2, 1, 1, 16, activation="gelu", norm_first=True, batch_first=True),
        lambda: (randn(2, 5, 8), randn(2, 4, 8)),
        fused=("encoder.layers.0.linear1", "decoder.layers.0.linear1"),
        left=dict.fromkeys(
            [f"{part}.layers.0.self_attn.out_proj" for part in ("encoder", "decoder")]
            + ["decoder.layers.0.multihead_attn.out_proj"],
            "NonDynamicallyQuantizableLinear",
        )
        | {
            "encoder.layers.0.linear2": "dropout2 (Dropout)",
            "decoder.layers.0.linear2": "dropout3 (Dropout)",
        },
        graph=False,
    ),
    "text classifier": Architecture(  # tokens, TransformerEncoder, mean, head
        TextClassifier,
        lambda: (torch.randint(9, (2, 5)),),
        fused=("encoder.layers.0.linear1", "head.0"),
        left={
            "encoder.layers.0.self_attn.out_proj": "NonDynamicallyQuantizableLinear",
            "encoder.layers.0.linear2": "dropout2 (Dropout)",
            "head.3": LAST,
        },
    ),
    "DeepSets": Architecture(
        DeepSets,
        lambda: (randn(2, 5, 6),),
        fused=("phi.0", "rho.0"),
        left={"phi.2": "goes to sum", "rho.2": LAST},
    ),
    "tabular MLP": Architecture(  # BatchNorm, then blocks of Linear, BatchNorm, ReLU, Dropout
        lambda: nn.Sequential(
            *(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Linear(8, 8), nn.Dropout(0.3), nn.LeakyReLU(), nn.Linear(8, 1)),
        ),
        fused=("5",),
        left={"1": "goes to 2 (BatchNorm1d): see inference=True", "8": LAST},
    ),
    "lazy": Architecture(
        lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh()),
        fused=("2",),
        left={"0": "LazyLinear is not torch.nn.Linear itself"},
    ),
    "scripted part": Architecture(
        lambda: nn.Sequential(
            torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh())), nn.Linear(8, 4), nn.Softplus()
        ),
        fused=("1",),
        left={"0": "scripted"},
    ),
}
ARCHITECTURES |= GATED | TODAY
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def build(name, seed=0):
    torch.manual_seed(seed)
    architecture = ARCHITECTURES[name]
    return architecture.make().double(), architecture.inputs()


def table():
    """How many layers are fused, and why others are not, as docs/fuse.md has it."""
    lines = [
        "| model | with a module | with a function | in gated units | alone |",
        "|---|---|---|---|---|",
    ]
    for name, each in ARCHITECTURES.items():
        counts = len(each.fused), len(each.functions), sum(map(len, each.gated.values()))
        reasons = ", ".join(
            f"{why} ({n})" if n > 1 else why for why, n in Counter(each.left.values()).items()
        )
        lines.append(f"| {name} | {' | '.join(str(count or '') for count in counts)} | {reasons} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
