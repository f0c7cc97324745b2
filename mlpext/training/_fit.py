"""`fit`: check the arguments, prepare the run, run the epochs, give the history back."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mlpext._names import Mode
from mlpext.training._arguments import (
    Arguments,
    EngineName,
    MakeOptimizer,
    Reduction,
    anywhere,
    check_same_run,
    count,
)
from mlpext.training._callbacks import Callback
from mlpext.training._early_stopping import EarlyStopping
from mlpext.training._evaluate import TRAINED_WITH
from mlpext.training._loop import Run, loop
from mlpext.training._losses import Loss, check_parts, loss_sum_of
from mlpext.training._metrics import MetricsArgument, metrics_for
from mlpext.training._modules import copy_all
from mlpext.training._ranks import Ranks
from mlpext.training._samples import Samples
from mlpext.training._schedule import ScheduleArgument
from mlpext.training._state import State
from mlpext.training._tables import Data
from mlpext.training._weights import ClassWeight
from mlpext.training.checkpoint import DAMAGE, Checkpoint
from mlpext.training.engines import choose
from mlpext.training.engines.cuda_graphs import RunJob
from mlpext.training.engines.optimizer import Optimizer, needs_closure
from mlpext.training.engines.plan import StepPlan
from mlpext.training.history import Epoch, History, Log


def fit(
    model: nn.Module,
    x: Data,
    target: Data,
    *,
    mode: Mode = "mini-batch",
    batch_size: int = 32,
    lr: float = 0.1,
    epochs: int = 10,
    loss: Loss = "squared_error",
    reduction: Reduction = "mean",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    l2: float = 0.0,
    clip_grad_norm: float | None = None,
    schedule: ScheduleArgument | None = None,
    sample_weight: Data | None = None,
    class_weight: ClassWeight | None = None,
    optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
    validation: tuple[Data, Data] | float | None = None,
    metrics: MetricsArgument | None = None,
    shuffle: bool = True,
    seed: int | None = None,
    early_stopping: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool | Sequence[str] = False,
    log_dir: str | os.PathLike[str] | None = None,
    progress: bool | tqdm = True,
    device: torch.device | str | None = None,
    engine: EngineName = "auto",
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
        x: numbers (N, ...), a tensor, a numpy array, a DataFrame or a list, cast to the model's dtype and
            moved to its device. A `numpy.memmap` is read a block of rows at a time, never copied whole.
        target: what the model should give. Integer (N,): class numbers, which squared_error takes as one-hot
            d. Text (N,): labels, whose class numbers are their places in sorted order, kept in
            `history.config["classes"]`. Floating point, of the outputs' shape ((N,) will do for one output):
            d itself, or for cross_entropy the probabilities of the classes. For binary_cross_entropy 0, 1 or
            what lies between, of the outputs' shape or (N,) for one output, integers too.
        mode: "stochastic", "mini-batch" or "batch". Batch mode takes the data through the model in chunks and
            adds up their gradients, so that memory does not grow with N (a batch norm sees the chunks).
        batch_size: samples per update in mini-batch mode; the last step of an epoch takes those that are
            left.
        lr: eta, the step size.
        epochs: passes over the data in all; a resumed run does those that are missing.
        loss: "squared_error", 1/2 ||d - o||^2 summed over a sample's outputs; "cross_entropy" of logits;
            "binary_cross_entropy" of logits, summed over a sample's outputs; or a function of (outputs,
            targets) that returns one value per sample, shape (n,), or their mean, a scalar. Where a step is
            taken in parts (batch mode of more than 1024 samples, several ranks) a scalar that is no plain
            mean over the samples, as with class weights or ignore_index, is refused: give it
            `reduction="none"`. A loss that is a module is kept with the model.
        reduction: what a step minimises, the "mean" over its samples or the "sum", which is the lecture's
            literal batch update. The losses reported are means either way.
        momentum: the share of a step that the next one repeats, as in torch.optim.SGD.
        weight_decay: what is added to the gradient, times the weight, as in torch.optim.SGD; biases too.
        nesterov: Nesterov's momentum, as in torch.optim.SGD. `GradientDescent` has the formulas.
        l2: the weight of a penalty on large weights, as scikit-learn's alpha: l2 / 2 ||W||^2 is added to the
            sum of E over the samples of a step, before it is divided by their number. Biases are left out.
            The losses reported contain it, those of validation do not.
        clip_grad_norm: the longest that the gradient of all parameters together may be; a longer one is
            scaled down to it (torch.nn.utils.clip_grad_norm_).
        schedule: how the learning rate changes after each epoch: "cosine" or "linear" from lr to 0 over the
            epochs, "plateau" (a tenth once the validation loss, or the loss, has not fallen for ten epochs),
            or a function that makes a scheduler of torch.optim.lr_scheduler of the optimizer, which without
            `optimizer` is a torch.optim.SGD. Its state is in the checkpoint.
        sample_weight: how much each sample counts, (N,), 0 or more; a step's mean is the sum of w E divided
            by the sum of w. Validation and metrics count every sample once.
        class_weight: how much the samples of each class count: a mapping of labels or class numbers (1 where
            there is none), a list in their order, or "balanced", N / (classes * samples of the class).
        optimizer: a torch.optim.Optimizer over the model's parameters, or a function that makes one from them
            (frozen ones too, which have no gradient), to use instead of lr, momentum and weight_decay. One
            that asks for E again within a step, as LBFGS, needs batch mode.
        validation: held-out data (x, d) to measure after each epoch, or a fraction of the data to hold out at
            random.
        metrics: what is measured beside E: "accuracy", "balanced_accuracy", "f1" (the classes' mean), "r2",
            "mae", "mse", or objects with update(outputs, targets), compute and reset, as torchmetrics has
            them; a list, or a mapping that gives them names. By default accuracy for classes, r2 for numbers.
        shuffle: visit the samples in a new random order each epoch; batch mode needs none.
        seed: of the order and the hold-out; None draws one, kept in `history.config["seed"]`. fit neither
            reads nor disturbs torch's global generator. The dropout of an MLP follows from this seed, that of
            other modules and initial weights from torch's.
        early_stopping: stop after so many epochs without a lower validation loss; the model gets the weights
            of its best epoch when the run ends.
        callbacks: functions called with the `Epoch`, or with (epoch, model, optimizer), after each epoch; one
            that returns True or "stop" ends the run. They may change model and optimizer (freeze or free
            layers, prune, clamp weights), before the checkpoint and the best weights are taken.
        checkpoint: a folder that keeps the state after the latest epoch. It is written once every two
            seconds, and at the end, Ctrl-C and errors too; a kill at any moment loses these two seconds and
            the epoch under way. A run that does not resume replaces what is there; one at a time may write
            there.
        resume: continue from `checkpoint` if it holds a state, else start. What it was trained with must be
            the same, data too; ["lr"] instead of True names settings that may be others from now on. The
            final weights have the same bits as those of a run never interrupted; torch's global generators
            are set to the saved state, for dropout.
        log_dir: a folder for `log.jsonl` and `log.csv`, one line an epoch.
        progress: show a bar on stderr where that is a terminal; or a tqdm bar of one's own, which goes on by
            the samples that are done: one bar over several runs.
        device: move the model there first; None trains it where it is.
        engine: "native", whole epochs in C++ on the CPU, steps in CUDA graphs on a GPU: for rows of
            LinearActivation, Maxout and GatedLinear layers and GatedMLPs (an `mlpext.nn.MLP`, a
            torch.nn.Sequential, or one alone) in float32 or float64, a loss by name, and no optimizer or
            torch's SGD, Adam or AdamW; a ValueError says what it cannot take. "autograd", the PyTorch loop:
            any model. "auto": native where and as long as it serves, on the CPU; graphs have not been
            measured yet. Both give the same numbers, to rounding. Several ranks take autograd: an epoch of
            the native engine has no place to add up their gradients.

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
    return _train(Arguments(**locals()), ALONE)  # all that was given, by its name


@dataclasses.dataclass(frozen=True)
class Context:
    """What a fit shares with those beside it under fit_many."""

    stop: Sequence[object] = ()  # not empty once all have to stop, after the step that they are in
    after_epoch: Callable[[Epoch, Run], bool] | None = None
    run_job: RunJob | None = None  # how an epoch in CUDA graphs runs together with those of the others


ALONE = Context()


def fit_beside(
    context: Context, model: nn.Module, x: Data, target: Data, options: Mapping[str, Any]
) -> History:
    """`fit(model, x, target, **options)` as one of several."""
    defaults: dict[str, Any] = fit.__kwdefaults__ or {}
    for name in options:
        if name not in defaults:
            raise TypeError(f"fit() got an unexpected keyword argument {name!r}")
    return _train(Arguments(model, x, target, **{**defaults, **options}), context)


def _train(arguments: Arguments, context: Context) -> History:
    with anywhere(arguments.model, arguments.device) as device:
        arguments.check()
        with contextlib.ExitStack() as cleanup:
            run = _prepare(arguments, context, device, cleanup)
            loss = arguments.loss if isinstance(arguments.loss, str) else None
            TRAINED_WITH[arguments.model] = loss, arguments.classes
            loop(run)
        if run.state.stopping.weights:
            run.state.stopping.restore_best(run.state.weights())
        return run.state.history


def _prepare(
    arguments: Arguments, context: Context, device: torch.device, cleanup: contextlib.ExitStack
) -> Run:
    """All that comes before the first epoch; a resumed run then has the state of its checkpoint."""
    model, loss = arguments.model, arguments.loss
    ranks = Ranks(device)
    is_first = ranks.rank == 0  # the one that writes
    store = Checkpoint(arguments.checkpoint) if arguments.checkpoint is not None and is_first else None
    if store is not None:
        store.lock()
        cleanup.callback(store.release)
    saved = store.load() if store is not None and arguments.resume and store.exists() else None
    saved = ranks.broadcast_object(saved)
    arguments.seed = _seed(arguments.seed, saved, ranks)
    generator = torch.Generator("cpu").manual_seed(arguments.seed)

    if arguments.device is not None:
        model.to(arguments.device)
    samples, held_out = arguments.make_samples(generator)
    held_out_metrics = None if held_out is None else metrics_for(held_out, loss, arguments.metrics)
    optimizer, optimizer_config = arguments.make_optimizer()
    schedule = arguments.make_schedule(optimizer)  # which may change the optimizer at once
    plan = _step_plan(arguments, samples, optimizer, ranks)
    engine = choose(arguments.engine, model, samples, plan, optimizer, run_job=context.run_job)
    history = History(arguments.make_config(samples, held_out, plan, optimizer_config))
    stopping = EarlyStopping(arguments.early_stopping)
    state = State(model, loss, optimizer, generator, history, stopping, schedule)
    run = Run(
        arguments,
        state,
        samples,
        held_out,
        held_out_metrics,
        plan,
        engine,
        store=store,
        stop=context.stop,
        after_epoch=context.after_epoch,
    )

    if ranks.size > 1:
        ranks.broadcast_(state.weights())
    if ranks.size > 1 or plan.chunk < plan.step_size:
        parts = "the ranks" if ranks.size > 1 else f"the chunks of {plan.chunk} samples of batch mode"
        check_parts(model, samples, plan.loss_sum, max(plan.chunk, 64), parts)
    if arguments.checkpoint is not None:
        state.config = {**history.config, "data": samples.fingerprint()}
    if saved is not None:
        _resume(run, saved)
    elif store is not None:
        store.save(state.state_dict())
    if arguments.log_dir is not None and is_first:
        run.log = Log(arguments.log_dir, history)
    return run


def _seed(seed: int | None, saved: dict[str, Any] | None, ranks: Ranks) -> int:
    """The seed that was given, else that of the checkpoint, else one that is drawn."""
    if seed is None and saved is not None:
        seed = saved["config"]["seed"]
    elif seed is None:
        seed = ranks.broadcast_object(torch.Generator("cpu").seed())
    return count("seed", seed, 0, 2**64 - 1)


def _step_plan(arguments: Arguments, samples: Samples, optimizer: Optimizer, ranks: Ranks) -> StepPlan:
    mode = arguments.mode
    if needs_closure(optimizer) and mode != "batch":
        raise ValueError(
            f"optimizer: {type(optimizer).__name__} asks for E of the same samples again within a step, and "
            f"so needs mode='batch', got {mode!r}"
        )
    step_size = {"stochastic": 1, "mini-batch": arguments.batch_size, "batch": len(samples)}[mode]
    if min(step_size, len(samples)) < ranks.size:
        raise ValueError(
            f"mode={mode!r} takes {min(step_size, len(samples))} samples a step here, too few for "
            f"{ranks.size} ranks: each needs a share of a step, so take mini-batches of {ranks.size} or more"
        )
    return StepPlan(
        mode=mode,
        step_size=step_size,
        mean=arguments.reduction == "mean",
        loss_sum=loss_sum_of(arguments.loss),
        metric=metrics_for(samples, arguments.loss, arguments.metrics),
        ranks=ranks,
        l2=arguments.l2,
        clip_grad_norm=arguments.clip_grad_norm or 0.0,
        seed=arguments.seed or 0,
    )


def _resume(run: Run, saved: dict[str, Any]) -> None:
    """Go on from a checkpoint's state, if it is one of this run."""
    where = f"the checkpoint in {run.arguments.checkpoint}"
    resume, before = run.arguments.resume, [weight.clone() for weight in run.state.weights()]
    try:
        epochs, config = len(saved["log"]), {**saved["config"]}
    except DAMAGE as error:
        raise ValueError(f"{where} is damaged: {error!r}") from error
    changed = () if isinstance(resume, bool) else resume
    for name in changed:
        if name not in config and name not in run.state.config:
            raise ValueError(f"resume: {name!r} is no setting of a run; they are {', '.join(config)}")
    check_same_run(config, run.state.config, where, changed)
    if epochs > run.arguments.epochs:
        raise ValueError(f"epochs is {run.arguments.epochs}, but {where} is of epoch {epochs}")
    try:
        run.state.load_state_dict(saved)
    except DAMAGE as error:
        copy_all(before, run.state.weights())
        raise ValueError(f"{where} is damaged: {error!r}") from error
    _apply_settings(run.state.optimizer, changed)
    run.rebuild_engine()  # the optimizer has other buffers now


def _apply_settings(optimizer: Optimizer, names: Sequence[str]) -> None:
    """Give an optimizer of torch's the settings that it was made with instead of the checkpoint's."""
    if isinstance(optimizer, torch.optim.Optimizer):
        for group in optimizer.param_groups:
            group.update({name: optimizer.defaults[name] for name in names if name in optimizer.defaults})
