"""All that changes while a run goes on, which is what a checkpoint keeps.

The keys of `State.state_dict` are the checkpoint's format: do not rename them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mlpext.nn import MLP
from mlpext.training._early_stopping import EarlyStopping
from mlpext.training._losses import Loss
from mlpext.training._modules import copy_all, in_mode, set_mode
from mlpext.training._schedule import Schedule
from mlpext.training.engines.optimizer import GradientDescent, Optimizer, held_by, with_held
from mlpext.training.history import History


class State:
    """Model, optimizer, random generator, history and early stopping of one run."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        generator: torch.Generator,
        history: History,
        stopping: EarlyStopping,
        schedule: Schedule | None = None,
    ) -> None:
        self.model = model
        self._modules = [model, loss] if isinstance(loss, nn.Module) else [model]
        self.optimizer = optimizer
        self.generator = generator
        self.history = history
        self.stopping = stopping
        self.schedule = schedule
        self.trained = self._trained()
        # What a run that resumes this one must have in common with it, once there is a checkpoint.
        self.config: dict[str, Any] = {}

    def weights(self) -> list[Tensor]:
        """All tensors that training changes: parameters and buffers of the model, then those of a loss that
        is a module, then what else the optimizer holds."""
        own = [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        return [tensor.detach() for tensor in {id(t): t for t in (*own, *held_by(self.optimizer))}.values()]

    def _beside_model(self) -> list[Tensor]:
        return self.weights()[len([*self.model.parameters(), *self.model.buffers()]) :]

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that have a gradient. ValueError where the model has none."""
        own = list(self.model.parameters())
        if not any(weight.requires_grad for weight in own):
            raise ValueError("model has no parameter that requires a gradient: there is nothing to train")
        return [weight for weight in with_held(own, self.optimizer) if weight.requires_grad]

    def buffers(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(module.buffers() for module in self._modules)

    def follow_model(self) -> None:
        """Train what the model has now, after callbacks that may have changed it."""
        self.trained = self._trained()
        set_mode(self.model, training=True)
        if isinstance(self.optimizer, GradientDescent):
            self.optimizer.follow(self.model.parameters())

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """The model in train() mode; afterwards as it was, without gradients left over."""
        with in_mode(self.model, training=True):
            try:
                yield
            finally:
                self.optimizer.zero_grad()
                for weight in self.trained:
                    weight.grad = None
                for module in self._modules[1:]:
                    module.zero_grad()
                if isinstance(self.model, MLP):
                    self.model.mask_origin = None

    @property
    def _cuda(self) -> list[torch.device]:
        return [weight.device for weight in self.model.parameters() if weight.is_cuda][:1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "model": self.model.state_dict(),
            "beside_model": self._beside_model(),
            "descent": self.optimizer.state_dict(),
            "stopping": self.stopping.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "order": self.generator.get_state(),
            # The model's own randomness (dropout) comes from torch's global generators.
            "random": torch.get_rng_state(),
            "random_cuda": [torch.cuda.get_rng_state(device) for device in self._cuda],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_entries(state["log"])
        self.model.load_state_dict(state["model"])
        copy_all(state.get("beside_model", []), self._beside_model())
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # torch numbers the parameters, and JSON knows only text as keys.
            state["descent"]["state"] = {
                int(index): entry for index, entry in state["descent"]["state"].items()
            }
        self.optimizer.load_state_dict(state["descent"])
        self.stopping.load_state_dict(state["stopping"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["order"])
        torch.set_rng_state(state["random"])
        for device, random in zip(self._cuda, state["random_cuda"], strict=False):
            torch.cuda.set_rng_state(random, device)
