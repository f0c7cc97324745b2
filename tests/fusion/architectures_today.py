"""Blocks of tables, of physics, of flows and of graphs."""

import torch
import torch.nn.functional as TF
from torch import nn

from architectures_gated import Attention, projections
from fusion_common import LAST, Architecture, mlp, randn


class GMLPBlock(nn.Module):
    """Its gate is one half of the channels, mixed over the tokens, with no function of its own."""

    def __init__(self, tokens=5, width=6, hidden=16):
        super().__init__()
        self.norm, self.fc1, self.act = nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU()
        self.gate_norm, self.spatial = nn.LayerNorm(hidden // 2), nn.Linear(tokens, tokens)
        self.fc2 = nn.Linear(hidden // 2, width)

    def forward(self, x):
        u, v = self.act(self.fc1(self.norm(x))).chunk(2, dim=-1)
        v = self.spatial(self.gate_norm(v).transpose(-1, -2)).transpose(-1, -2)
        return x + self.fc2(u * v)


class DCNv2(nn.Module):
    """Crosses of the features beside a deep network."""

    def __init__(self, width=6):
        super().__init__()
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.deep, self.head = mlp(width, 8, 8, act=nn.ReLU), nn.Linear(width + 8, 1)

    def forward(self, x0):
        x = x0
        for layer in self.cross:
            x = x0 * layer(x) + x
        return torch.sigmoid(self.head(torch.cat([x, self.deep(x0)], -1)))


class NeRF(nn.Module):
    """Density from a position, colour from a direction too; the position comes in again half-way."""

    def __init__(self, skip=2):
        super().__init__()
        self.skip = skip
        self.layers = nn.ModuleList(nn.Linear(i, 8) for i in (6, 8, 14, 8))
        self.sigma, self.feature, self.view, self.rgb = (
            nn.Linear(*s) for s in ((8, 1), (8, 8), (11, 4), (4, 3))
        )
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, position, direction):
        x = position
        for i, layer in enumerate(self.layers):
            x = self.relu(layer(torch.cat([position, x], -1) if i == self.skip else x))
        y = self.relu(self.view(torch.cat([self.feature(x), direction], -1)))
        return {"rgb": self.sigmoid(self.rgb(y)), "sigma": TF.softplus(self.sigma(x))}


class ModifiedMLP(nn.Module):
    """Wang, Teng and Perdikaris (2021): every layer mixes two encodings of the input."""

    def __init__(self):
        super().__init__()
        self.u, self.v, self.act = nn.Linear(6, 8), nn.Linear(6, 8), nn.Tanh()
        self.hidden, self.last = nn.ModuleList(nn.Linear(i, 8) for i in (6, 8, 8)), nn.Linear(8, 1)

    def forward(self, x):
        u, v = self.act(self.u(x)), self.act(self.v(x))
        for layer in self.hidden:
            z = self.act(layer(x))
            x = (1 - z) * u + z * v
        return self.last(x)


class DeepONet(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.trunk = mlp(6, 8, 8), mlp(2, 8, 8, act=nn.SiLU)
        self.trunk.append(nn.SiLU())
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, function, places):
        return torch.einsum("bi,pi->bp", self.branch(function), self.trunk(places)) + self.bias


class Highway(nn.Module):
    def __init__(self, width=6, layers=2):
        super().__init__()
        self.plain, self.gates = (nn.ModuleList(nn.Linear(width, width) for _ in range(layers)) for _ in "ab")
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, x):
        for plain, gate in zip(self.plain, self.gates, strict=True):
            t = self.sigmoid(gate(x))
            x = t * self.relu(plain(x)) + (1 - t) * x
        return x


class SqueezeExcite(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.fc(self.pool(x).flatten(1))[..., None, None]


class RealNVP(nn.Module):
    """Coupling layers, forth and back: what a sample becomes, and the logarithm of the volume's change."""

    def __init__(self, layers=2):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Sequential(mlp(3, 8, 3, act=nn.ReLU), nn.Tanh()) for _ in range(layers)
        )
        self.shifts = nn.ModuleList(mlp(3, 8, 3, act=nn.ReLU) for _ in range(layers))

    def forward(self, x, reverse=False):
        a, b, total = *x.chunk(2, -1), 0.0
        steps = list(zip(self.scales, self.shifts, strict=True))
        for scale, shift in reversed(steps) if reverse else steps:
            s, t = scale(a), shift(a)
            a, b = ((b - t) * torch.exp(-s), a) if reverse else (b * torch.exp(s) + t, a)
            total = total + s.sum(-1)
        return torch.cat([a, b], -1), total

    def inverse(self, y):
        return self(y, reverse=True)[0]


class MixtureDensity(nn.Module):
    def __init__(self, parts=3):
        super().__init__()
        self.body, self.pi, self.mu = mlp(6, 8, 8), nn.Linear(8, parts), nn.Linear(8, parts)
        self.body.append(nn.Tanh())
        self.sigma = nn.Sequential(nn.Linear(8, parts), nn.Softplus())

    def forward(self, x):
        x = self.body(x)
        return self.pi(x).log_softmax(-1), self.mu(x), self.sigma(x)


class GRU(nn.Module):
    """Cell and loop by hand: what is squashed is a sum of two layers."""

    def __init__(self, inputs=6, width=4):
        super().__init__()
        self.x, self.h = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width)

    def cell(self, x, h):
        (xr, xz, xn), (hr, hz, hn) = self.x(x).chunk(3, -1), self.h(h).chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        return z * h + (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn)

    def forward(self, xs):
        h = xs.new_zeros(xs.shape[0], self.h.in_features)
        for x in xs.unbind(1):
            h = self.cell(x, h)
        return h


class ResNetBlock(nn.Module):  # of the tabular ResNet
    def __init__(self, width=6, hidden=8):
        super().__init__()
        self.norm, self.linear1, self.linear2 = (
            nn.BatchNorm1d(width),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )
        self.relu, self.dropout1, self.dropout2 = nn.ReLU(), nn.Dropout(0.2), nn.Dropout(0.2)

    def forward(self, x):
        y = self.dropout1(self.relu(self.linear1(self.norm(x))))
        return x + self.dropout2(self.linear2(y))


class GIN(nn.Module):
    def __init__(self):
        super().__init__()
        self.epsilon = nn.Parameter(torch.tensor(0.1))
        self.nets = nn.ModuleList(nn.Sequential(mlp(6, 8, 6, act=nn.ReLU), nn.ReLU()) for _ in range(2))

    def forward(self, x, edges):
        for net in self.nets:
            neighbours = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
            x = net((1 + self.epsilon) * x + neighbours)
        return x.mean(0)


class Conv1D(nn.Module):
    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs)),
            nn.Parameter(torch.zeros(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class GPT2Block(nn.Module):
    """No Linear in the feed-forward part, and an activation written out."""

    def __init__(self, width=8):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(Conv1D(16, width), NewGELU(), Conv1D(width, 16), nn.Dropout(0.1))
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        x = x + self.attn(self.ln_1(x), causal=True)
        return self.pooler((x + self.mlp(self.ln_2(x)))[:, 0])


class Perceiver(nn.Module):
    """A few learned latents look at a long input, twice with the same weights."""

    def __init__(self, width=8):
        super().__init__()
        self.latents, self.attention = nn.Parameter(torch.randn(3, width)), Attention(width, context=6)
        self.norm, self.mlp = nn.LayerNorm(width), mlp(width, 16, width, act=nn.GELU)

    def forward(self, x):
        latents = self.latents.expand(x.shape[0], -1, -1)
        for _ in range(2):
            latents = latents + self.attention(self.norm(latents), context=x)
            latents = latents + self.mlp(self.norm(latents))
        return latents.mean(1)


COUPLING = (("scales", "0.0"), ("scales", "0.2"), ("shifts", "0"))
TODAY = {
    "gMLP block": Architecture(
        GMLPBlock,
        lambda: (randn(2, 5, 6),),
        fused=("fc1",),
        left={"spatial": "goes to transpose", "fc2": "goes to add"},
    ),
    "DCNv2": Architecture(
        DCNv2,
        fused=("deep.0",),
        left={"cross.0": "goes to mul", "cross.1": "goes to mul", "deep.2": "goes to cat"},
        functions=("head",),
    ),
    "NeRF": Architecture(
        NeRF,
        lambda: (randn(5, 6), randn(5, 3)),
        fused=("layers.0", "layers.1", "layers.2", "layers.3", "view", "rgb"),
        left={"feature": "goes to cat"},
        functions=("sigma",),
    ),
    "modified MLP": Architecture(
        ModifiedMLP, fused=("u", "v", "hidden.0", "hidden.1", "hidden.2"), left={"last": LAST}
    ),
    "DeepONet": Architecture(
        DeepONet,
        lambda: (randn(5, 6), randn(7, 2)),
        fused=("branch.0", "trunk.0", "trunk.2"),
        left={"branch.2": "goes to einsum"},
    ),
    "highway": Architecture(Highway, fused=("plain.0", "plain.1", "gates.0", "gates.1")),
    "squeeze and excite": Architecture(SqueezeExcite, lambda: (randn(2, 3, 8, 8),), fused=("fc.0", "fc.2")),
    "RealNVP": Architecture(
        RealNVP,
        fused=tuple(f"{net}.{i}.{layer}" for i in "01" for net, layer in COUPLING),
        left={"shifts.0.2": LAST, "shifts.1.2": LAST},
        graph=False,
    ),
    "mixture density": Architecture(
        MixtureDensity,
        fused=("body.0", "body.2", "sigma.0"),
        left={"pi": "goes to log_softmax", "mu": LAST},
    ),
    "GRU by hand": Architecture(
        GRU,
        lambda: (randn(3, 4, 6),),
        left=dict.fromkeys("xh", "GRU.forward cannot be traced"),
        graph=False,
    ),
    "tabular ResNet block": Architecture(
        ResNetBlock, fused=("linear1",), left={"linear2": "goes to dropout2 (Dropout)"}
    ),
    "GIN": Architecture(
        GIN,
        lambda: (randn(5, 6), torch.randint(5, (2, 9))),
        fused=("nets.0.0.0", "nets.0.0.2", "nets.1.0.0", "nets.1.0.2"),
    ),
    "GPT-2 block": Architecture(
        GPT2Block, lambda: (randn(2, 5, 8),), fused=("pooler.0",), left=projections("attn")
    ),
    "Perceiver": Architecture(
        Perceiver,
        lambda: (randn(2, 9, 6),),
        fused=("mlp.0",),
        left=projections("attention") | {"mlp.2": "goes to add"},
    ),
}
