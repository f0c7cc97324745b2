"""Gradient descent on E = 1/2 ||d - o||^2 in the lecture's three modes.

A model gives o = model(x) for the inputs x; d is the desired output, e = d - o, and E = 1/2 ||e||^2 the error
of one sample. Each step moves every parameter against the gradient of the mean of E over the step's samples,

    W(k+1) = W(k) - eta dE/dW(k)

and the mode says which samples those are:

    mode            samples per update    updates per epoch
    "stochastic"    1                     N
    "mini-batch"    batch_size            ceil(N / batch_size)
    "batch"         N                     1

The mean, not the lecture's sum, so that one eta suits all three; `reduction="sum"` is the sum.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import numbers
import operator
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mlpext import _C
from mlpext.training import _losses as objective
from mlpext.training._losses import LOSSES, Loss
from mlpext.training._ranks import Ranks
from mlpext.training._samples import Array, Samples, as_held
from mlpext.training.checkpoint import Checkpoint
from mlpext.training.engines import autograd
from mlpext.training.engines import cuda_graphs as captured
from mlpext.training.engines import native as cpu_engine
from mlpext.training.engines.autograd import (
    Descent,
    GradientDescent,
    Plan,
    held_by,
    needs_closure,
    with_held,
)
from mlpext.training.history import Epoch, History, Log

__all__ = [
    "ENGINES",
    "LOSSES",
    "MODES",
    "REDUCTIONS",
    "Epoch",
    "GradientDescent",
    "History",
    "evaluate",
    "fit",
    "fit_many",
]

MODES = ("stochastic", "mini-batch", "batch")
REDUCTIONS = ("mean", "sum")
ENGINES = ("auto", "native", "autograd")

# engine="native" by the type of device that the model is on.
NATIVE: dict[str, Any] = {"cpu": cpu_engine, "cuda": captured}

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Function = TypeVar("Function", bound=Callable[..., Any])


def _anywhere(function: Function) -> Function:
    """`function(model, ...)`, the same wherever it is called: gradients are on, autocast is off, and tensors
    are made on the model's device, whatever the caller has set of these or of inference_mode."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"] if "model" in kwargs else next(iter(args), None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        device = torch.device(_device(model) if kwargs.get("device") is None else kwargs["device"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in {"cpu", device.type}:
                if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device() not in (torch.device("cpu"), device):
                stack.enter_context(device)
            return function(*args, **kwargs)

    return cast(Function, run)


@_anywhere
def fit(
    model: nn.Module,
    x: Array,
    target: Array,
    *,
    mode: str = "mini-batch",
    batch_size: int = 32,
    lr: float = 0.1,
    epochs: int = 10,
    loss: Loss = "squared_error",
    reduction: str = "mean",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
    validation: tuple[Array, Array] | float | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    early_stopping: int | None = None,
    callbacks: Sequence[Callable[[Epoch], object]] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    engine: str = "auto",
) -> History:
    """Train `model` in place by gradient descent and return what happened.

        model = mlpext.nn.MLP([64, 32, 10], activation="tanh")
        history = fit(model, x, labels, mode="mini-batch", lr=0.1, epochs=20, validation=0.2, seed=0)

    Under `torchrun --nproc-per-node K` (or in an initialised process group) the ranks train one model: each
    calls fit with the same arguments, takes its share of every step's samples, and adds up the gradients
    with the others (gloo; nccl on CUDA, where device="cuda" is the rank's own), so that all have the same
    weights, those of one process to rounding. They start from rank 0's weights, and a batch norm sees the
    rank's share. Rank 0 alone writes files and shows progress; callbacks run on every rank.

    Args:
        model: any module from (n, ...) to (n, ...). Trained in train() mode, measured in eval() mode, and
            left in the mode that it had.
        x: floating-point tensor or numpy array (N, ...), cast to the model's dtype and moved to its device. A
            `numpy.memmap` is read a block of rows at a time, never copied whole.
        target: what the model should give. Integer (N,): class numbers, which squared_error takes as one-hot
            d. Floating point, of the outputs' shape ((N,) will do for one output): d itself, or for
            cross_entropy the probabilities of the classes.
        mode: "stochastic", "mini-batch" or "batch". Batch mode takes the data through the model in chunks and
            adds up their gradients, so that memory does not grow with N (a batch norm sees the chunks).
        batch_size: samples per update in mini-batch mode; the last step of an epoch takes those that are
            left.
        lr: eta, the step size.
        epochs: passes over the data in all; a resumed run does those that are missing.
        loss: "squared_error", 1/2 ||d - o||^2 summed over a sample's outputs; "cross_entropy" of logits; or a
            function of (outputs, targets) that returns one value per sample, shape (n,), or their mean, a
            scalar. Where a step is taken in parts (batch mode of more than 1024 samples, several ranks) a
            scalar that is no plain mean over the samples, as with class weights or ignore_index, is refused:
            give it `reduction="none"`. A loss that is a module is kept with the model.
        reduction: what a step minimises, the "mean" over its samples or the "sum", which is the lecture's
            literal batch update. The losses reported are means either way.
        momentum, weight_decay, nesterov: as in torch.optim.SGD, see `GradientDescent`.
        optimizer: a torch.optim.Optimizer over the model's parameters, or a function that makes one from
            them (frozen ones too, which have no gradient), to use instead of lr, momentum and weight_decay.
            One that asks for E again within a step, as LBFGS, needs batch mode.
        validation: held-out data (x, d) to measure after each epoch, or a fraction of the data to hold out at
            random.
        shuffle: visit the samples in a new random order each epoch; batch mode needs none.
        seed: of the order and the hold-out; None draws one, kept in `history.config["seed"]`. fit neither
            reads nor disturbs torch's global generator; seed that too for dropout and initial weights.
        early_stopping: stop after so many epochs without a lower validation loss; the model gets the weights
            of its best epoch when the run ends.
        callbacks: functions called with the `Epoch` after each epoch; one that returns True or "stop" ends
            the run. They may change model and optimizer (freeze or free layers, prune, clamp weights), before
            the checkpoint and the best weights are taken.
        checkpoint: a folder that keeps the state after the latest epoch, so that a kill at any moment loses
            no more than the epoch under way. A run that does not resume replaces what is there.
        resume: continue from `checkpoint` if it holds a state, else start. The final weights have the same
            bits as those of a run never interrupted; torch's global generators are set to the saved state,
            for dropout.
        log_dir: a folder for `log.jsonl` and `log.csv`, one line an epoch.
        progress: show a bar on stderr where that is a terminal.
        device: move the model there first; None trains it where it is.
        engine: "native", whole epochs in C++ on the CPU, steps in CUDA graphs on a GPU: for rows of
            LinearActivation and Maxout layers (an `mlpext.nn.MLP`) in float32 or float64, a loss by name, and
            no optimizer or torch's SGD, Adam or AdamW; a ValueError says what it cannot take. "autograd", the
            PyTorch loop: any model. "auto": native where and as long as it serves, on the CPU; graphs have
            not been measured yet. Both give the same numbers, to rounding. Several ranks take autograd: an
            epoch of the native engine has no place to add up their gradients.

    An exception in the middle of an epoch, as from the model or the loss, leaves the weights that the epoch
    began with. no_grad, inference_mode, autocast and default device around the call make no difference.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named; a checkpoint of another run;
            fewer samples a step than ranks, as in stochastic mode.
        RuntimeError: another rank has ended; the checkpoint is that of the last complete epoch.
        FloatingPointError: a loss or a weight became NaN or infinite; the message names epoch and step. The
            model gets back the weights that it had when that epoch began, and the checkpoint stays that of
            the epoch before.
        KeyboardInterrupt: Ctrl-C, once the step under way is complete, in CUDA graphs those of a graph (in
            batch mode that step is dropped instead); the checkpoint is that of the last complete epoch.
    """
    _one_of("mode", mode, MODES)
    _one_of("reduction", reduction, REDUCTIONS)
    _one_of("engine", engine, ENGINES)
    batch_size = _count("batch_size", batch_size, 1)
    epochs = _count("epochs", epochs, 0)
    patience = None if early_stopping is None else _count("early_stopping", early_stopping, 1)
    if patience is not None and validation is None:
        raise ValueError("early_stopping watches the validation loss: give validation=(x, d) or a fraction")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint, the folder to continue from")
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks must be functions of an Epoch, got {type(callback).__name__}")
    total = objective.total_loss(loss)

    ranks = Ranks(_device(model) if device is None else device)
    first = ranks.rank == 0  # the one that writes and shows
    store = Checkpoint(checkpoint) if checkpoint is not None and first else None
    saved = ranks.first(store.load() if store is not None and resume and store.exists() else None)
    if seed is None:
        seed = ranks.first(torch.Generator("cpu").seed()) if saved is None else saved["config"]["seed"]
    seed = _count("seed", seed, 0, 2**64 - 1)
    generator = torch.Generator("cpu").manual_seed(seed)

    if device is not None:
        model.to(device)
    samples = _samples(model, x, target, loss)
    held_out = None
    if isinstance(validation, (tuple, list)) and len(validation) == 2:
        held_out = _samples(model, *validation, loss, "validation ")
    elif validation is not None:
        held_out, samples = _hold_out(validation, samples, generator)
    held_out_metric = None if held_out is None else objective.metric_for(held_out, loss)

    descent, descent_config = _descent(optimizer, model, lr, momentum, weight_decay, nesterov)
    if needs_closure(descent) and mode != "batch":
        raise ValueError(
            f"optimizer: {type(descent).__name__} asks for E of the same samples again within a step, and so "
            f"needs mode='batch', got {mode!r}"
        )
    plan = Plan(
        mode=mode,
        step_size={"stochastic": 1, "mini-batch": batch_size, "batch": len(samples)}[mode],
        mean=reduction == "mean",
        total=total,
        metric=objective.metric_for(samples, loss),
        ranks=ranks,
    )
    if min(plan.step_size, len(samples)) < ranks.size:
        raise ValueError(
            f"mode={mode!r} takes {min(plan.step_size, len(samples))} samples a step here, too few for "
            f"{ranks.size} ranks: each needs a share of a step, so take mini-batches of {ranks.size} or more"
        )
    native = NATIVE.get(_device(model).type, cpu_engine)
    network = None
    if engine == "native" or (engine == "auto" and native is cpu_engine):
        network = _served(engine, lambda: native.Network(model, samples, plan, descent))
    config = {
        "mode": mode,
        "samples_per_update": plan.step_size,
        "epochs": epochs,
        "loss": loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__qualname__),
        "reduction": reduction,
        **descent_config,
        "shuffle": bool(shuffle),
        "seed": seed,
        "early_stopping": patience,
        "samples": len(samples),
        "validation_samples": 0 if held_out is None else len(held_out),
        "x": samples.shapes[0],
        "target": samples.shapes[1],
        "model": re.sub(r" at 0x[0-9a-fA-F]+", "", str(model)),  # an address is another in another process
        "parameters": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "dtype": str(samples.dtype),
    }
    run = _Run(model, loss, descent, generator, History(config), _EarlyStopping(patience))
    weights = run.weights()
    ranks.copy_first(weights)
    if ranks.size > 1 or plan.chunk < plan.step_size:
        parts = "the ranks" if ranks.size > 1 else f"the chunks of {plan.chunk} samples of batch mode"
        objective.check_parts(model, samples, total, max(plan.chunk, 64), parts)
    if saved is not None:
        _check_same_run(saved["config"], config, f"the checkpoint in {checkpoint}")
        if len(saved["epochs"]) > epochs:
            raise ValueError(
                f"epochs is {epochs}, but the checkpoint in {checkpoint} is of epoch {len(saved['epochs'])}"
            )
        run.load_state_dict(saved)
        if network is not None:  # the optimizer has other buffers now
            network = _served(engine, functools.partial(network.renewed, samples))
    elif store is not None:
        store.save(run.state_dict())
    history, stopping = run.history, run.stopping
    log = Log(log_dir, history) if log_dir is not None and first else None

    count = len(samples)
    bar = _Progress(progress and first, count, epochs, len(history))
    with _training(run), bar, _Interrupts() as interrupts:
        while len(history) < epochs and not stopping.due(len(history)):
            order = torch.arange(count, device="cpu")
            if shuffle and mode != "batch":
                order = torch.randperm(count, generator=generator, device="cpu")
            if callbacks:  # they may have changed model and optimizer
                held = _dtype_and_device(model)
                samples = samples.to(*held)
                held_out = None if held_out is None else held_out.to(*held)
                run.follow_model()
                if network is not None:
                    network = _served(engine, functools.partial(network.renewed, samples))
            if callbacks or network is None:  # a module may put other buffers in place of its own
                weights = run.weights()
            before = [weight.clone() for weight in weights]
            started = time.perf_counter()
            try:
                with interrupts.held() as interrupted:
                    how = (samples, order, plan, descent, interrupted, bar.advance)
                    if network is None:
                        losses, score = autograd.run_epoch(model, *how)
                    else:
                        losses, score = native.run_epoch(network, *how)
            except BaseException as error:
                # Ctrl-C comes between two steps, and the complete ones stay; but not within a closure's step.
                if not isinstance(error, KeyboardInterrupt) or needs_closure(descent):
                    _copy(before, run.weights())
                raise
            seconds = time.perf_counter() - started
            ranks.copy_first(run.buffers())

            metrics = {} if plan.metric is None else {plan.metric.name: plan.metric.value(score, count)}
            trouble = _trouble(losses, run.trained)
            if held_out is not None and trouble is None:
                measured = ranks.first(objective.measure(model, held_out, total, held_out_metric))
                metrics |= {f"val_{name}": value for name, value in measured.items()}
                if not math.isfinite(measured["loss"]):
                    trouble = f"the validation loss became {measured['loss']} after step {len(losses)}"
            if trouble is not None:
                _copy(before, run.weights())
                raise FloatingPointError(
                    f"{trouble} of epoch {len(history) + 1}; try a smaller lr. "
                    f"The model has its weights of the end of epoch {len(history)} again"
                )
            epoch = Epoch(
                epoch=len(history) + 1,
                updates=len(losses) + (history.epochs[-1].updates if len(history) else 0),
                loss=_epoch_loss(losses, plan.step_size, count),
                metrics=metrics,
                seconds=seconds,
                samples_per_second=count / seconds,
            )
            history.append(epoch, losses)
            bar.end(epoch)
            if log is not None:
                log.append(epoch)
            answers = [callback(epoch) for callback in callbacks]
            if patience is not None:
                stopping.see(epoch, run.weights())
            if store is not None:
                store.save(run.state_dict())
            if ranks.any(any(map(_means_stop, answers))):
                break
    if stopping.weights:
        stopping.restore_best(run.weights())
    return history


def fit_many(
    models: Sequence[nn.Module],
    x: Array,
    target: Array,
    *,
    each: Sequence[Mapping[str, Any]] | None = None,
    threads: int | None = None,
    **options: Any,
) -> list[History]:
    """Train several models on the same data, each as `fit` would alone, to the same bits; several at a time.
    On CUDA, engine="native" trains those of one shape as batched products; then it is to rounding.

        nets = [mlpext.nn.MLP([64, 64, 10], "tanh") for _ in range(64)]
        histories = fit_many(nets, x, labels, epochs=5, each=[{"lr": lr} for lr in rates])

    Args:
        models: different modules, of any shapes. Epochs of the native engine run beside one another; the
            PyTorch loop of one model waits for that of another wherever it runs Python.
        x, target, options: as for `fit`. `checkpoint` and `log_dir` become a folder with one for each model:
            0, 1, ...
        each: the options of each model that are its own, one mapping a model.
        threads: models trained at a time; None takes torch.get_num_threads(). Batched products take all.

    Raises what `fit` raises, once the other models under way have stopped after the step that they were in;
    ValueError for a model given twice, a wrong number of `each`, or several ranks (`fit` takes those).
    """
    if (size := Ranks("cpu").size) > 1:
        raise ValueError(f"fit_many takes one process, and this is one of {size} ranks; fit trains on them")
    if len({id(model) for model in models}) != len(models):
        raise ValueError("models: one is given twice; each must be a module of its own")
    if each is not None and len(each) != len(models):
        raise ValueError(f"each has {len(each)} entries, expected one for each of {len(models)} models")
    threads = torch.get_num_threads() if threads is None else _count("threads", threads, 1)
    devices = {_device(model) for model in models}
    if options.get("device") is not None:
        devices = {torch.device(options["device"])}
    together = options.get("engine") == "native" and {NATIVE.get(d.type) for d in devices} == {captured}
    group = captured.Group(len(models)) if together else None
    if together:
        threads = len(models)
        dtypes = {weight.dtype for model in models for weight in model.parameters()}
        if len(devices) == len(dtypes) == 1:
            held = functools.partial(as_held, device=devices.pop(), dtype=dtypes.pop())
            x, target = held(x), held(target)
    histories: list[History | None] = [None] * len(models)
    stop: list[int] = []
    errors: list[BaseException] = []
    todo = iter(range(len(models)))

    def work(finished: threading.Event) -> None:
        _stopped_by.list = stop
        try:
            for index in todo:
                own = {"progress": False, **options, **(each[index] if each is not None else {})}
                for folder in ("checkpoint", "log_dir"):
                    if options.get(folder) is not None and own[folder] is options[folder]:
                        own[folder] = os.path.join(options[folder], str(index))
                with contextlib.nullcontext() if group is None else group.member(index):
                    if not stop:
                        histories[index] = fit(models[index], x, target, **own)
        except BaseException as error:
            errors.append(error)
            stop.append(1)
        finished.set()

    # Events, because a Thread.join that Ctrl-C interrupts takes the thread for dead (Python 3.11).
    ends = [threading.Event() for _ in range(threads)]
    workers = [threading.Thread(target=work, args=(end,), name="mlpext-fit") for end in ends]
    try:
        for worker in workers:
            worker.start()
        for end in ends:
            end.wait()
    except BaseException:  # Ctrl-C
        stop.append(1)
        for worker, end in zip(workers, ends, strict=True):
            if worker.ident is not None:
                end.wait()
        raise
    if errors:
        raise errors[0]
    return [history for history in histories if history is not None]


# Of a thread of fit_many: a list that is not empty once its run has to stop.
_stopped_by = threading.local()


@_anywhere
def evaluate(model: nn.Module, x: Array, target: Array, *, loss: Loss = "squared_error") -> dict[str, float]:
    """The samples' mean E ("loss") and their "accuracy" (classes) or "r2" (numbers), in eval() mode.

        evaluate(model, x_test, labels)["accuracy"]

    Takes x, target and loss as `fit` does, a block at a time, and raises the same errors.
    """
    total = objective.total_loss(loss)
    samples = _samples(model, x, target, loss)
    return objective.measure(model, samples, total, objective.metric_for(samples, loss))


class _EarlyStopping:
    """The best epoch by validation loss, its weights, and whether `patience` epochs have gone by since.

    Where a callback gave the model weights of other shapes, the search begins anew.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.best_epoch = 0
        self.best_loss: float | None = None
        self.weights: list[Tensor] = []

    def see(self, epoch: Epoch, weights: list[Tensor]) -> None:
        loss = epoch.metrics["val_loss"]
        other_shapes = [weight.shape for weight in weights] != [weight.shape for weight in self.weights]
        if self.best_loss is None or loss < self.best_loss or other_shapes:
            self.best_epoch, self.best_loss = epoch.epoch, loss
            self.weights = [weight.clone() for weight in weights]

    def due(self, epoch: int) -> bool:
        return self.patience is not None and epoch - self.best_epoch >= self.patience

    def restore_best(self, weights: list[Tensor]) -> None:
        _copy(self.weights, weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best_epoch": self.best_epoch, "best_loss": self.best_loss, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_epoch, self.best_loss, self.weights = (
            state["best_epoch"],
            state["best_loss"],
            state["weights"],
        )


class _Run:
    """All that changes while a run goes on, which is what a checkpoint keeps."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        descent: Descent,
        generator: torch.Generator,
        history: History,
        stopping: _EarlyStopping,
    ) -> None:
        self.model = model
        self._modules = [model, loss] if isinstance(loss, nn.Module) else [model]
        self.descent = descent
        self.generator = generator
        self.history = history
        self.stopping = stopping
        self.trained = self._trained()

    def weights(self) -> list[Tensor]:
        """All tensors that training changes: parameters and buffers of the model, then those of a loss that
        is a module, then what else the optimizer holds."""
        own = [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        return [tensor.detach() for tensor in {id(t): t for t in (*own, *held_by(self.descent))}.values()]

    def _beside_model(self) -> list[Tensor]:
        return self.weights()[len([*self.model.parameters(), *self.model.buffers()]) :]

    def _trained(self) -> list[nn.Parameter]:
        """The parameters that have a gradient. ValueError where the model has none."""
        if not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError("model has no parameter that requires a gradient: there is nothing to train")
        return [weight for weight in with_held(self.model, self.descent) if weight.requires_grad]

    def buffers(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(module.buffers() for module in self._modules)

    def follow_model(self) -> None:
        """Train what the model has now, after callbacks that may have changed it."""
        self.trained = self._trained()
        objective.set_mode(self.model, training=True)
        if isinstance(self.descent, GradientDescent):
            self.descent.follow(self.model.parameters())

    def zero_grad(self) -> None:
        self.descent.zero_grad()
        for weight in self.trained:
            weight.grad = None
        for module in self._modules[1:]:
            module.zero_grad()

    @property
    def _cuda(self) -> list[torch.device]:
        return [weight.device for weight in self.model.parameters() if weight.is_cuda][:1]

    def state_dict(self) -> dict[str, Any]:
        return {
            **self.history.record(),
            "model": self.model.state_dict(),
            "beside_model": self._beside_model(),
            "descent": self.descent.state_dict(),
            "stopping": self.stopping.state_dict(),
            "order": self.generator.get_state(),
            # The model's own randomness (dropout) comes from torch's global generators.
            "random": torch.get_rng_state(),
            "random_cuda": [torch.cuda.get_rng_state(device) for device in self._cuda],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history.load_record(state)
        self.model.load_state_dict(state["model"])
        _copy(state.get("beside_model", []), self._beside_model())
        if isinstance(self.descent, torch.optim.Optimizer):
            # torch numbers the parameters, and JSON knows only text as keys.
            state["descent"]["state"] = {
                int(index): entry for index, entry in state["descent"]["state"].items()
            }
        self.descent.load_state_dict(state["descent"])
        self.stopping.load_state_dict(state["stopping"])
        self.generator.set_state(state["order"])
        torch.set_rng_state(state["random"])
        for device, random in zip(self._cuda, state["random_cuda"], strict=False):
            torch.cuda.set_rng_state(random, device)


def _device(model: nn.Module) -> torch.device:
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def _dtype_and_device(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Of the model's first floating-point weight."""
    weights = itertools.chain(model.parameters(), model.buffers())
    weight = next((weight for weight in weights if weight.is_floating_point()), torch.empty(0, device="cpu"))
    return weight.dtype, weight.device


def _served(engine: str, make: Callable[[], Any]) -> Any:
    """What the native engine knows of the run; None, for the PyTorch loop, where it does not serve and "auto"
    was asked for."""
    try:
        return make()
    except cpu_engine.Refused as reason:
        if engine == "native":
            raise ValueError(
                f"engine='native' cannot train this: {reason}; engine='auto' falls back"
            ) from None
        return None


def _samples(model: nn.Module, x: Array, target: Array, loss: Loss, name: str = "") -> Samples:
    """The data as the model takes it: in the dtype and on the device of its first floating-point weight."""
    dtype, device = _dtype_and_device(model)
    samples = Samples(x, target, dtype=dtype, device=device, name=name)
    objective.prepare(model, samples, loss, name)
    return samples


def _hold_out(fraction: Any, samples: Samples, generator: torch.Generator) -> tuple[Samples, Samples]:
    """A random share of the samples, and the others, each in their old order."""
    if not _is_number(fraction) or not 0 < fraction < 1:
        raise ValueError(
            f"validation must be (x, d), a fraction between 0 and 1, or None, got {_brief(fraction)}"
        )
    count = round(float(fraction) * len(samples))
    if not 0 < count < len(samples):
        raise ValueError(
            f"validation={fraction} of {len(samples)} samples leaves none to validate or none to train on"
        )
    rows = torch.randperm(len(samples), generator=generator, device="cpu")
    return samples.subset(rows[:count].sort().values), samples.subset(rows[count:].sort().values)


def _descent(
    optimizer: torch.optim.Optimizer | MakeOptimizer | None,
    model: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Descent, dict[str, Any]]:
    """What updates the model's parameters, and its part of the run's configuration."""
    parameters = list(model.parameters())
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError("model was made in torch.inference_mode: its parameters can have no gradient")
    rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    rates = {name: _at_least_zero(name, value) for name, value in rates.items()}
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0")
    if optimizer is None:
        config = {"optimizer": None, **rates, **({"nesterov": True} if nesterov else {})}
        return GradientDescent(parameters, **rates, nesterov=bool(nesterov)), config
    if momentum or weight_decay:
        raise ValueError(
            "momentum and weight_decay belong to the optimizer when one is given: set them there"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        if not callable(optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer or a function that makes one from parameters, "
                f"got {type(optimizer).__name__}"
            )
        optimizer = optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must return a torch.optim.Optimizer, it returned {type(optimizer).__name__}"
            )
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if updated.isdisjoint(map(id, parameters)):
        raise ValueError("optimizer holds none of the model's parameters")
    return optimizer, {"optimizer": type(optimizer).__name__}


def _check_same_run(saved: dict[str, Any], config: dict[str, Any], where: str) -> None:
    differences = [
        f"{name} is {config.get(name)!r} here and {saved.get(name)!r} there"
        for name in dict.fromkeys([*config, *saved])
        if name != "epochs" and config.get(name) != saved.get(name)
    ]
    if differences:
        raise ValueError(f"cannot resume, because {where} is of another run: {'; '.join(differences)}")


def _trouble(losses: Tensor, parameters: Sequence[Tensor]) -> str | None:
    """What is NaN or infinite after an epoch, and at which step."""
    if not _C.all_finite([losses]):
        step = int((~losses.isfinite()).nonzero()[0])
        return f"the loss became {losses[step].item()} at step {step + 1}"
    if not _C.all_finite(parameters):
        return f"a weight became NaN or infinite at step {len(losses)} or shortly before"
    return None


def _epoch_loss(losses: Tensor, step_size: int, samples: int) -> float:
    """The mean of E over an epoch's samples, from the means over its steps; the last may have fewer."""
    means = losses.numpy()
    rest = samples - step_size * (len(means) - 1)
    return float(means[:-1].sum() * step_size + means[-1] * rest) / samples


def _means_stop(answer: object) -> bool:
    return (
        answer == "stop" if isinstance(answer, str) else isinstance(answer, (bool, np.bool_)) and bool(answer)
    )


def _copy(values: list[Tensor], weights: list[Tensor]) -> None:
    for value, weight in zip(values, weights, strict=True):
        weight.copy_(value)


@contextlib.contextmanager
def _training(run: _Run) -> Iterator[None]:
    """The model in train() mode; afterwards as it was, without gradients left over."""
    with objective.in_mode(run.model, training=True):
        try:
            yield
        finally:
            run.zero_grad()


class _Interrupts:
    """Holds Ctrl-C back while an epoch is under way, so that it cannot cut a weight update in two.

        with _Interrupts() as interrupts, interrupts.held() as pressed: ...

    Python's own handler is the only one replaced (or that of a fit whose callback this is), and only in the
    main thread, where alone signals arrive.
    """

    def __init__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        self._mine = threading.current_thread() is threading.main_thread() and (
            self._before is signal.default_int_handler
            or isinstance(getattr(self._before, "__self__", None), _Interrupts)
        )
        self._pressed: list[int] | None = None

    def __enter__(self) -> _Interrupts:
        if self._mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._mine and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self._pressed is None or self._pressed:  # between epochs, or the second time
            signal.default_int_handler(number, frame)
        else:
            self._pressed.append(number)

    @contextlib.contextmanager
    def held(self) -> Iterator[list[int]]:
        """A list that is not empty once the run has to stop: by KeyboardInterrupt, when the block ends."""
        pressed: list[int] = [] if self._mine else getattr(_stopped_by, "list", [])
        self._pressed = pressed
        try:
            yield pressed
        finally:
            self._pressed = None
        if pressed:
            raise KeyboardInterrupt


class _Progress:
    """A bar over the samples of all epochs with loss and metrics; tqdm adds the samples per second."""

    def __init__(self, show: bool, samples: int, epochs: int, done: int) -> None:
        self._bar = None
        if show:
            self._bar = tqdm(
                total=epochs * samples,
                initial=done * samples,
                unit=" samples",
                unit_scale=True,
                dynamic_ncols=True,
                disable=None,  # tqdm's word for "unless stderr is a terminal"
            )
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, samples: int, error: float) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix({"loss": error, **self._metrics}, refresh=False)
            self._bar.update(samples)

    def end(self, epoch: Epoch) -> None:
        self._metrics = epoch.metrics
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch.epoch}", refresh=False)


def _one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {_brief(value)}")


def _count(name: str, value: Any, least: int, most: float = math.inf) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {_brief(value)}")
    if not least <= number <= most:
        raise ValueError(
            f"{name} must be {least} or more{f', at most {most}' if most < math.inf else ''}, got {number}"
        )
    return number


def _at_least_zero(name: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} must be a number, got {_brief(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and 0 or more, got {value}")
    return float(value)


def _is_number(value: object) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0 and _is_number(value.item())
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _brief(value: object) -> str:
    return f"{value!r}" if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
