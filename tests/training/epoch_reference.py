"""An epoch of gradient descent in NumPy, in float64, and the same epoch by the native engine's C++."""

import dataclasses
import math

import numpy as np
import torch

import fit_reference
import reference
from fit_reference import error, mask
from mlpext import _C
from mlpext.training.engines._support import LayerRecord


@dataclasses.dataclass
class Layer:
    W: np.ndarray  # (out, in), of maxout (pieces, out, in), of a gated layer (2, out, in)
    b: np.ndarray | None
    activation: str
    dropout: float = 0.0
    trained: tuple = (True, True)  # W, b


ACTIVATIONS = ("tanh", "silu", "identity", "sigmoid")


def forward(layer, x):
    """y, and a function from dy to (dx, dW, db)."""
    if layer.W.ndim == 3:
        z = np.einsum("ni,koi->kno", x, layer.W) + (0 if layer.b is None else layer.b[:, None])
        if layer.activation == "maxout":
            y, slope = z.max(0), z.argmax(0) == np.arange(len(z))[:, None, None]
        else:
            gate, gate_slope = reference.fast(layer.activation, {}, z[0])
            y, slope = gate * z[1], np.stack([gate_slope * z[1], gate])

        def back(dy):
            dz = dy * slope
            return np.einsum("kno,koi->ni", dz, layer.W), np.einsum("kno,ni->koi", dz, x), dz.sum(1)

        return y, back
    z = x @ layer.W.T + (0 if layer.b is None else layer.b)
    y, slope = reference.fast(layer.activation, {}, z)

    def back(dy):
        dz = dy * slope
        return dz @ layer.W, dz.T @ x, dz.sum(0)

    return y, back


def loss_of(name, y, d):
    """E of each sample, (n,), and dE/dy."""
    return error(name, y, np.eye(y.shape[1])[d] if d.ndim == 1 else d)


def parameters(layers):
    """(layer, "W" or "b") of what is trained."""
    for layer in layers:
        for name, trained in zip("Wb", layer.trained, strict=True):
            if trained and getattr(layer, name) is not None:
                yield layer, name


def gradient(layers, loss, mean, x, d, w, l2, masks):
    """What a step minimises, as a mean; and its gradient, one for each of `parameters`."""
    y, backs = x, []
    for layer, m in zip(layers, masks, strict=True):
        y, back = forward(layer, y)
        y = y if m is None else y * m
        backs.append(back)
    errors, dy = loss_of(loss, y, d)
    total = w.sum()
    share = (1 / total if total > 0 else 0.0) if mean else 1.0
    dy = dy * w[:, None] * share
    found = {}
    for layer, back, m in reversed(list(zip(layers, backs, masks, strict=True))):
        dy, found[id(layer), "W"], found[id(layer), "b"] = back(dy if m is None else dy * m)
    weights = [layer for layer, name in parameters(layers) if name == "W"]
    for layer in weights:
        found[id(layer), "W"] = found[id(layer), "W"] + share * l2 * layer.W
    penalty = l2 / 2 * sum((layer.W**2).sum() for layer in weights)
    value = ((w * errors).sum() + penalty) / total if total > 0 else 0.0
    return value, [found[id(layer), name] for layer, name in parameters(layers)]


def numpy_epoch(layers, rule, loss, mean, step_size, order, x, d, w, seed, epoch):
    losses = []
    moved = [fit_reference.Parameter(getattr(layer, name)) for layer, name in parameters(layers)]
    for first in range(0, len(order), step_size):
        rows = order[first : first + step_size]
        samples = np.arange(first, first + len(rows))
        masks = [
            mask(layer.dropout, seed, epoch, number, samples, layer.W.shape[-2]) if layer.dropout else None
            for number, layer in enumerate(layers)
        ]
        weights = np.ones(len(rows)) if w is None else w[rows]
        value, found = gradient(layers, loss, mean, x[rows], d[rows], weights, rule.l2, masks)
        if rule.clip_grad_norm:
            norm = math.sqrt(sum((g**2).sum() for g in found))
            found = [g * min(1.0, rule.clip_grad_norm / (norm + 1e-6)) for g in found]
        for (layer, name), g, parameter in zip(parameters(layers), found, moved, strict=True):
            parameter.gradient = g
            fit_reference.Rule.step(rule, parameter)  # whose fields have the same names
            setattr(layer, name, parameter.value)
        losses.append(value)
    return np.array(losses)


def native_epoch(layers, rule, loss, mean, step_size, order, x, d, w, seed, epoch, dtype, block=None):
    """Changes the layers as numpy_epoch does, and returns the losses. With `block` rows are fetched."""
    kinds = 2 if rule.kind != "descent" else 1 if rule.momentum else 0

    def tensor(value, trained=False):
        return torch.tensor(value, dtype=dtype, requires_grad=trained)

    def zeros(value, trained):
        if value is None or not trained:
            return ()
        return tuple(torch.zeros(value.shape, dtype=dtype) for _ in range(kinds))

    records = [
        LayerRecord(
            tensor(layer.W, layer.trained[0]),
            None if layer.b is None else tensor(layer.b, layer.trained[1]),
            layer.activation,
            (),
            zeros(layer.W, layer.trained[0]),
            zeros(layer.b, layer.trained[1]),
            layer.dropout,
            gated=layer.W.ndim == 3 and layer.activation != "maxout",
        )
        for layer in layers
    ]
    rows = tensor(x), torch.tensor(d) if d.ndim == 1 else tensor(d), *(() if w is None else (tensor(w),))
    count, places = len(order), torch.tensor(order)

    def fetch(first, size):
        return tuple(part[places[first : first + size]] for part in rows)

    losses = torch.empty(-(-count // step_size), dtype=torch.float64)
    outputs = torch.empty((block or count, layers[-1].W.shape[-2]), dtype=dtype)
    steps, stopped = _C.run_epoch(
        layers=records,
        rule=rule,
        loss=loss,
        mean=mean,
        samples=count,
        step_size=step_size,
        x=None if block else rows[0],
        d=None if block else rows[1],
        order=None if block else places,
        fetch=fetch if block else None,
        block_size=block or count,
        losses=losses,
        outputs=outputs,
        poll=lambda done, error: True,
        sample_weight=None if block or w is None else rows[2],
        seed=seed,
        epoch=epoch,
    )
    assert (steps, stopped) == (len(losses), False)
    for layer, record in zip(layers, records, strict=True):
        layer.W = record.weight.detach().double().numpy()
        layer.b = None if layer.b is None else record.bias.detach().double().numpy()
    return losses.numpy()


def compare(layers, rule, loss, mean, step_size, order, x, d, w, seed, epoch, dtype, blocks):
    def copies():
        return [dataclasses.replace(layer) for layer in layers]

    expected, theirs = copies(), (rule, loss, mean, step_size, order, x, d, w, seed, epoch)
    losses = numpy_epoch(expected, *theirs)
    bound = 1e-9 if dtype == torch.float64 else 2e-3
    for block in blocks:
        got = copies()
        measured = native_epoch(got, *theirs, dtype, block)
        np.testing.assert_allclose(measured, losses, rtol=bound, atol=bound, err_msg=f"block {block}")
        for ours, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(ours.W, other.W, rtol=bound, atol=bound, err_msg=f"W, block {block}")
            if other.b is not None:
                np.testing.assert_allclose(
                    ours.b, other.b, rtol=bound, atol=bound, err_msg=f"b, block {block}"
                )
    return losses, expected
