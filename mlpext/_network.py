"""A trained network as the last step of a scikit-learn pipeline, with what its outputs mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.metaestimators import available_if
from torch import Tensor

from mlpext.nn import MLP, GatedLinear, LinearActivation, Maxout

# Rows that go through the network at once.
BLOCK = 4096


class Network(BaseEstimator):  # type: ignore[misc]
    """An `mlpext.nn.MLP` that has been trained. Its state is NumPy arrays and names, for `mlpext.save`.

    Outputs are logits of "classes" or of "labels" (of which a sample may have several), or "numbers" less
    `mean_` and over `scale_`.

    >>> from mlpext._network import Network
    >>> network = Network.of(mlpext.nn.MLP([4, 8, 3]), "classes", ["a", "b", "c"])
    >>> network.predict([[0, 0, 0, 0], [1, 1, 1, 1]]).shape
    (2,)
    """

    layers_: list[dict[str, Any]]

    def __init__(self, kind: str = "classes") -> None:
        self.kind = kind

    @classmethod
    def of(
        cls,
        module: MLP,
        kind: str,
        classes: Sequence[str] | None = None,
        mean: Any = 0.0,
        scale: Any = 1.0,
        has_probabilities: bool = True,
    ) -> Network:
        """Of a module on any device; `classes` are the names of its outputs, of numbers too."""
        self = cls(kind)
        self.layers_ = []
        for layer in module._modules.values():
            assert isinstance(layer, (LinearActivation, Maxout, GatedLinear))
            weight, bias = layer.weight.detach().cpu().numpy(), layer.bias
            record = {
                "weight": weight.copy(),
                "bias": None if bias is None else bias.detach().cpu().numpy().copy(),
            }
            if isinstance(layer, Maxout):
                self.layers_.append({"activation": "maxout", "params": {}, **record})
            else:
                self.layers_.append({"activation": layer.activation, "params": {**layer.params}, **record})
        outputs = self.layers_[-1]["weight"].shape[-2]
        self.classes_ = np.asarray([f"output {k}" for k in range(outputs)] if classes is None else [*classes])
        self.mean_, self.scale_ = np.asarray(mean, float), np.asarray(scale, float)
        self.has_probabilities_ = has_probabilities
        self.n_features_in_ = self.layers_[0]["weight"].shape[-1]
        return self

    def fit(self, X: Any, y: Any = None) -> Network:
        """A pipeline asks for it; TypeError, because the network is trained already."""
        raise TypeError("a Network is trained already; mlpext.sklearn has estimators that can be fitted")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "layers_")

    @property
    def module_(self) -> MLP:
        """The network as an `mlpext.nn.MLP` of its own, in eval() mode."""
        weights = [torch.as_tensor(layer["weight"]) for layer in self.layers_]
        module = MLP(
            [weights[0].shape[-1], *(weight.shape[-2] for weight in weights)], dtype=weights[0].dtype
        )
        for k, (layer, weight) in enumerate(zip(self.layers_, weights, strict=True)):
            sizes: dict[str, Any] = {"bias": layer["bias"] is not None, "dtype": weight.dtype}
            if layer["activation"] == "maxout":
                module[k] = Maxout(weight.shape[-1], weight.shape[-2], len(weight), **sizes)
            else:
                name, params = layer["activation"], {**sizes, **layer["params"]}
                kind = LinearActivation if weight.ndim == 2 else GatedLinear
                module[k] = kind(weight.shape[-1], weight.shape[-2], name, **params)
            with torch.no_grad():
                module[k].weight.copy_(weight)
                if layer["bias"] is not None:
                    module[k].bias.copy_(torch.as_tensor(layer["bias"]))
        return module.eval()

    def outputs(self, X: Any) -> Tensor:
        """What the network gives, (n, outputs), float64."""
        module = self.module_
        x = torch.as_tensor(np.asarray(X), dtype=module[0].weight.dtype)
        with torch.no_grad():
            return torch.cat([module(rows) for rows in torch.split(x, BLOCK)]).double()

    def predict(self, X: Any) -> Any:
        """The name of the class of each sample, (n,); which labels it has, 0 or 1, (n, labels); or numbers in
        the target's unit, (n,) or (n, outputs)."""
        outputs = self.outputs(X)
        if self.kind == "classes":
            return self.classes_[outputs.argmax(1).numpy()]
        if self.kind == "labels":
            return (outputs > 0).long().numpy()
        values = outputs.numpy() * self.scale_ + self.mean_
        return values[:, 0] if values.shape[1] == 1 else values

    @available_if(lambda self: self.kind != "numbers" and self.has_probabilities_)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, or of each label, (n, classes)."""
        outputs = self.outputs(X)
        return (outputs.softmax(1) if self.kind == "classes" else outputs.sigmoid()).numpy()
