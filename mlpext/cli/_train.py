"""`train`: networks of one shape in each mode asked for, their files, a table, and a picture."""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from mlpext import _artefact
from mlpext._files import sweep, write_atomically
from mlpext._network import Network
from mlpext.cli._defaults import EPOCHS
from mlpext.cli._search import search
from mlpext.cli._source import Source, like, read_source, rows, split
from mlpext.cli._steps import LOSS, METRICS, Data, learning_rate, steps_of
from mlpext.nn import MLP
from mlpext.tabular import Columns, preprocessing
from mlpext.training import MODES, History, evaluate, fit
from mlpext.training._losses import LossName
from mlpext.training._progress import bar_of
from mlpext.training.checkpoint import Checkpoint

ROW = "{:<12}{:>8}{:>8}{:>9}{:>10}{:>10}{:>9}{:>11}{:>11}"

# Samples on which the PyTorch loop is timed beside the run: 0.06 s at batch size 1.
TIMED = 300
# A run whose E ends at so many times what it began with has diverged, though every number is finite.
DIVERGED = 10
# Options that say where and how fast, and not what is trained.
ELSEWHERE = ("run", "out", "resume", "overwrite", "quiet", "threads", "epochs", "given", "test")
SHOWN = 3  # predictions at the end


def train(options: argparse.Namespace) -> None:
    """Train the reference network in the modes asked for, write their files, and print a table of them."""
    torch.set_num_threads(options.threads)
    data = prepare(options)
    loss = _loss(options, data)
    metric = METRICS[data.kind]
    out = Path(options.out)
    settings = {name: value for name, value in vars(options).items() if name not in ELSEWHERE}
    _check_folder(out, settings, options)
    sweep(out)
    found = search(data, loss, options, out) if options.search else {}
    sizes = [data.training[0].shape[1], *options.hidden, len(data.source.names)]
    title = f"{data.source.name}, {'-'.join(map(str, sizes))}, {options.activation}"
    write_atomically(out / "config.json", json.dumps({**settings, **found, "sizes": sizes}, indent=1) + "\n")

    print(f"{title}: {len(data.source)} samples to train on, {len(data.held_out)} held out")
    _say_what_is_left_out(data)
    print("samples/s: of this run; loop/s: of the same steps as a PyTorch loop (engine='autograd')")
    print(
        ROW.format("mode", "lr", "epochs", "updates", "final E", metric, "seconds", "samples/s", "loop/s"),
        flush=True,
    )
    histories: dict[str, History] = {}
    models: dict[str, MLP] = {}
    reached: dict[str, float] = {}
    faults: list[str] = []
    modes = MODES if options.mode == "all" else [options.mode]
    epochs = {mode: EPOCHS[mode] if options.epochs is None else options.epochs for mode in modes}
    samples = sum(epochs.values()) * len(options.seed) * len(data.source)
    with contextlib.nullcontext(False) if options.quiet else bar_of(samples) as bar:
        for mode, seed in itertools.product(modes, options.seed):
            label = mode if len(options.seed) == 1 else f"{mode}-seed-{seed}"
            if not isinstance(bar, bool):
                bar.set_description(label)
            torch.manual_seed(seed)
            model = MLP(
                sizes,
                options.activation,
                options.output_activation,
                dropout=options.dropout,
                **options.parameters,
            )
            try:
                history = _train_in(mode, model, data, loss, seed, epochs[mode], bar, options, out / label)
            except FloatingPointError as error:
                faults.append(str(error))
                continue
            if history["loss"][-1] > DIVERGED * history["loss"][0]:
                faults.append(
                    f"{label} mode: E grew from {history['loss'][0]:.4g} to {history['loss'][-1]:.4g}; try a "
                    "smaller --lr"
                )
            histories[label], models[label] = history, model
            with tqdm.external_write_mode():
                reached[label] = _print_row(label, mode, model, history, data, loss, metric, options)
    if histories:
        from mlpext.plots import plot_histories

        plot_histories(histories, out / "loss.png", title)
        best = max(reached, key=lambda label: reached[label])
        save_model(out / "model.mlpext", models[best], data, loss, options)
        print(
            f"{out}: model.mlpext ({best} mode's), loss.png, config.json, and for each mode history.csv, "
            "history.json, weights.safetensors"
        )
        _show_predictions(out, data)
    if faults:
        raise FloatingPointError("; ".join(faults))


def prepare(options: argparse.Namespace) -> Data:
    """Read the data, hold some out, and make numbers of the rest."""
    whole = read_source(options, options.data)
    if options.test is not None:
        source, held_out = whole, like(read_source(options, options.test), whole.names, whole.kind)
    else:
        source, held_out = (rows(whole, part) for part in split(whole, options.validation, options.seed[0]))
    columns = Columns(options.drop, options.categorical, keep_all=whole.plain)
    steps = preprocessing(columns, options.standardise)
    x = steps.fit_transform(source.frame)
    mean: Any = 0.0
    scale: Any = 1.0
    if source.kind == "numbers" and options.standardise:
        mean = source.y.mean(0)
        scale = np.where(np.ptp(source.y, axis=0) == 0, 1.0, source.y.std(0))
    inputs = [_float32(part) for part in (x, steps.transform(held_out.frame))]
    targets = [_target(part, mean, scale) for part in (source, held_out)]
    (x_train, x_test), (d_train, d_test) = inputs, targets
    return Data(source, held_out, steps, mean, scale, (x_train, d_train), (x_test, d_test))


def _float32(x: Any) -> Tensor:
    inputs = torch.as_tensor(np.asarray(x)).float()
    if not bool(inputs.isfinite().all()):
        raise ValueError("a column holds numbers that are not finite in float32: standardise or drop it")
    return inputs


def _target(source: Source, mean: Any, scale: Any) -> Tensor:
    if source.kind == "classes":
        return torch.as_tensor(source.y)
    return torch.as_tensor((source.y - mean) / scale).float()


def _loss(options: argparse.Namespace, data: Data) -> LossName:
    """The loss asked for, if it goes with the target; the lecture's for the built-in sets, else the usual."""
    loss: LossName = options.loss or ("squared_error" if data.source.plain else LOSS[data.kind])
    accepted = {"squared_error", LOSS[data.kind]}
    if loss not in accepted:
        there_is = " and ".join(sorted(accepted))
        raise ValueError(f"--loss {loss}: the target holds {data.kind}, for which there is {there_is}")
    return loss


def _check_folder(out: Path, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Refuse to mix this run with another one."""
    try:
        there = json.loads((out / "config.json").read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        if options.overwrite:
            return
        raise ValueError(f"{out}/config.json is damaged: {error}; --overwrite replaces the run") from error
    if options.overwrite or not isinstance(there, dict):
        return
    mine = json.loads(json.dumps(settings))
    on_purpose = ("lr",) if options.resume and "lr" in options.given else ()
    differences = [
        f"{name} {there.get(name)} there, {value} here"
        for name, value in mine.items()
        if name in there and there[name] != value and name not in (*on_purpose, "mode")
    ]
    if differences:
        raise ValueError(
            f"{out} holds another run ({'; '.join(differences)}): --out names another folder, --overwrite "
            "replaces it"
        )


def _say_what_is_left_out(data: Data) -> None:
    left_out = data.steps["columns"].left_out_
    if left_out:
        print("left out: " + ", ".join(f"{name!r} {reason}" for name, reason in left_out.items()))


def _train_in(
    mode: str,
    model: MLP,
    data: Data,
    loss: LossName,
    seed: int,
    epochs: int,
    progress: bool | tqdm,
    options: argparse.Namespace,
    folder: Path,
) -> History:
    """Train the model in one mode and write what came of it to `folder`."""
    lr = learning_rate(mode, data, options)
    try:
        history = fit(
            model,
            *data.training,
            epochs=epochs,
            validation=data.testing,
            early_stopping=options.early_stopping,
            checkpoint=folder / "checkpoint",
            resume=(["lr"] if "lr" in options.given else True) if options.resume else False,
            progress=progress,
            device=options.device,
            **steps_of(mode, lr, loss, seed, options),
        )
    except KeyboardInterrupt:
        checkpoint = Checkpoint(folder / "checkpoint")
        saved = checkpoint.load() if checkpoint.exists() else {"config": {}, "log": []}
        history = History(saved["config"])
        history.load_entries(saved["log"])
        if len(history):
            _write_history(history, folder)
            history.plot(folder / "loss.png")
        raise KeyboardInterrupt(
            f"{checkpoint.folder} keeps epoch {len(history)}, --resume continues from it"
        ) from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{mode} mode, lr={lr:g}: {error}") from error
    _write_history(history, folder)
    write_atomically(folder / "weights.safetensors", safetensors.torch.save(model.state_dict()))
    return history


def _write_history(history: History, folder: Path) -> None:
    history.to_csv(folder / "history.csv")
    history.to_json(folder / "history.json")


def _print_row(
    label: str,
    mode: str,
    model: MLP,
    history: History,
    data: Data,
    loss: LossName,
    metric: str,
    options: argparse.Namespace,
) -> float:
    """A line of the table. Returns the metric of the held-out data."""
    final = evaluate(model, *data.training, loss=loss)["loss"]
    reached = evaluate(model, *data.testing, loss=loss).get(metric, math.nan)
    seconds = sum(history["seconds"])
    print(
        ROW.format(
            label,
            f"{history['lr'][0]:g}" if len(history) else "",
            len(history),
            len(history.step_losses),
            f"{final:.5f}",
            f"{reached:.1%}" if metric == "accuracy" else f"{reached:.3f}",
            f"{seconds:.2f}",
            f"{len(history) * len(data.source) / seconds:,.0f}" if seconds else "",
            f"{_loop_speed(mode, model, data, loss, options):,.0f}",
        ),
        flush=True,
    )
    return reached


def _loop_speed(mode: str, model: MLP, data: Data, loss: LossName, options: argparse.Namespace) -> float:
    """Samples a second that the PyTorch loop makes of the model's steps, on a copy of it; not in the first
    epoch, which warms up."""
    x, d = (part[:TIMED] for part in data.training)
    steps = steps_of(mode, 0.0, loss, 0, options) | {"schedule": None, "class_weight": None}
    epochs = 11 if mode == "batch" else 2  # of batch mode an epoch is one step
    history = fit(copy.deepcopy(model), x, d, epochs=epochs, progress=False, engine="autograd", **steps)
    return statistics.median(history["samples_per_second"][1:])


def save_model(path: Path, model: MLP, data: Data, loss: LossName, options: argparse.Namespace) -> None:
    """One file from a table to a prediction."""
    network = Network.of(
        model,
        data.kind,
        data.source.names,
        data.mean,
        data.scale,
        has_probabilities=loss != "squared_error",
    )
    steps = copy.deepcopy(data.steps)
    steps.steps.append(("network", network))
    about: dict[str, Any] = {
        "data": data.source.name,
        "kind": data.kind,
        "names": data.source.names,
        "loss": loss,
    }
    about |= {"target": options.target or ["target"], "plain": data.source.plain}
    _artefact.save(steps, path, about)


def _show_predictions(out: Path, data: Data) -> None:
    """What the saved model says of the first samples that were held out."""
    pipeline = _artefact.load(out / "model.mlpext")
    frame = data.held_out.frame.iloc[:SHOWN]
    for row, (predicted, true) in enumerate(zip(pipeline.predict(frame), data.held_out.y, strict=False)):
        meant = data.source.names[true] if data.kind == "classes" else true
        print(f"held-out sample {row + 1}: predicted {shown(predicted)}, is {shown(meant)}")
    if not data.source.plain:
        print(f"python -m mlpext predict {out} NEW.csv predicts others", file=sys.stdout)


def shown(value: Any) -> str:
    """A prediction in few digits."""
    if isinstance(value, str):
        return value
    numbers = np.atleast_1d(np.asarray(value))
    if numbers.dtype.kind not in "iuf":
        return ", ".join(map(str, numbers))
    return ", ".join(f"{number:.6g}" for number in numbers)
