"""The command line, `python -m mlpext`: train the reference network, draw pictures, say what is installed.

Exit codes: 0 done; 1 it could not be done, one line on stderr says why; 2 bad arguments; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

import mlpext
from mlpext import _C, _build, _choices, _tune, data
from mlpext._files import sweep, write_atomically
from mlpext.data import Dataset
from mlpext.nn import MLP
from mlpext.training import LOSSES, MODES, History, evaluate, fit
from mlpext.training.checkpoint import Checkpoint

Value = TypeVar("Value")

# What each mode takes where the command line does not say. Chosen on the digits: 95.0 to 98.9 % held-out
# accuracy with seeds 0 to 3, batch mode's E falling at every step, a few seconds in all. A mode with fewer
# updates an epoch needs more epochs; the gradients of single samples scatter, and bear only a small eta.
LEARNING_RATES = {"stochastic": 0.005, "mini-batch": 0.1, "batch": 0.1}
EPOCHS = {"stochastic": 10, "mini-batch": 30, "batch": 600}

# The lecture's leaky ReLU is max(0.1 x, x); torch's default slope, and so our modules', is 0.01.
LECTURE = {"leaky_relu": {"negative_slope": 0.1}}

ROW = "{:<12}{:>8}{:>8}{:>9}{:>10}{:>10}{:>9}{:>11}{:>11}"

# Samples on which the PyTorch loop is timed beside the run: 0.2 s at batch size 1.
TIMED = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (sys.argv's if None), return its exit code. Raises SystemExit(2) for a bad one."""
    options = _options(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt as interrupt:
        print("; ".join(["mlpext: interrupted", *interrupt.args]), file=sys.stderr)
        return 130
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        return _fail(f"{error.filename}: {error.strerror}" if named else str(error))
    except (ValueError, FloatingPointError, ImportError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"mlpext: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def train(options: argparse.Namespace) -> None:
    """Train the reference network in the modes asked for, write their files, and print a table of them."""
    torch.set_num_threads(options.threads)
    dataset = data.load(options.data, options.target, options.task)
    training, held_out = data.split(dataset, options.validation, options.seed)
    if options.standardise:
        training, held_out = data.standardise(training, held_out)
    sizes = [dataset.x.shape[1], *options.hidden, dataset.outputs]
    title = f"{dataset.name}, {'-'.join(map(str, sizes))}, {options.activation}"
    metric = "r2" if dataset.classes is None else "accuracy"
    out = Path("runs", Path(dataset.name).stem) if options.out is None else Path(options.out)
    sweep(out)
    settings = {name: value for name, value in vars(options).items() if name != "run"}
    write_atomically(out / "config.json", json.dumps(settings | {"sizes": sizes}, indent=1) + "\n")

    print(f"{title}: {len(training)} samples to train on, {len(held_out)} held out")
    print("samples/s: of this run; loop/s: of the same steps as a PyTorch loop (engine='autograd')")
    print(
        ROW.format("mode", "lr", "epochs", "updates", "final E", metric, "seconds", "samples/s", "loop/s"),
        flush=True,
    )
    histories: dict[str, History] = {}
    for mode in MODES if options.mode == "all" else [options.mode]:
        torch.manual_seed(options.seed)
        model = MLP(sizes, options.activation, options.output_activation, **options.parameters)
        history = histories[mode] = _train_in(mode, model, training, held_out, options, out / mode)
        final = evaluate(model, training.x, training.target, loss=options.loss)["loss"]
        reached = evaluate(model, held_out.x, held_out.target, loss=options.loss)[metric]
        seconds = sum(history["seconds"])
        print(
            ROW.format(
                mode,
                f"{history.config['lr']:g}",
                len(history),
                len(history.step_losses),
                f"{final:.5f}",
                f"{reached:.1%}" if metric == "accuracy" else f"{reached:.3f}",
                f"{seconds:.2f}",
                f"{len(history) * len(training) / seconds:,.0f}",
                f"{_loop_speed(mode, model, training, options):,.0f}",
            ),
            flush=True,
        )
    from mlpext.plots import plot_histories

    plot_histories(histories, out / "loss.png", title)
    print(f"{out}: loss.png, config.json, and for each mode history.csv, history.json, weights.safetensors")


def _loop_speed(mode: str, model: MLP, training: Dataset, options: argparse.Namespace) -> float:
    """Samples a second that the PyTorch loop makes of the model's steps, on a copy of it; the second epoch's,
    because the first one warms up."""
    history = fit(
        copy.deepcopy(model),
        training.x[:TIMED],
        training.target[:TIMED],
        mode=mode,
        batch_size=options.batch_size,
        lr=0,
        epochs=2,
        loss=options.loss,
        reduction=options.reduction,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        seed=options.seed,
        progress=False,
        engine="autograd",
    )
    return history["samples_per_second"][-1]


def _train_in(
    mode: str,
    model: MLP,
    training: Dataset,
    held_out: Dataset,
    options: argparse.Namespace,
    folder: Path,
) -> History:
    """Train the model in one mode and write what came of it to `folder`."""
    lr = LEARNING_RATES[mode] if options.lr is None else options.lr
    try:
        history = fit(
            model,
            training.x,
            training.target,
            mode=mode,
            batch_size=options.batch_size,
            lr=lr,
            epochs=EPOCHS[mode] if options.epochs is None else options.epochs,
            loss=options.loss,
            reduction=options.reduction,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            validation=(held_out.x, held_out.target),
            seed=options.seed,
            early_stopping=options.early_stopping,
            checkpoint=folder / "checkpoint",
            resume=options.resume,
            progress=not options.quiet,
            device=options.device,
        )
    except KeyboardInterrupt:
        checkpoint = Checkpoint(folder / "checkpoint")
        kept = len(checkpoint.load()["log"]) if checkpoint.exists() else 0
        raise KeyboardInterrupt(
            f"{checkpoint.folder} keeps epoch {kept}, --resume continues from it"
        ) from None
    except FloatingPointError as error:
        raise FloatingPointError(f"{mode} mode, lr={lr:g}: {error}") from error
    history.to_csv(folder / "history.csv")
    history.to_json(folder / "history.json")
    write_atomically(folder / "weights.safetensors", safetensors.torch.save(model.state_dict()))
    return history


def plot_activations(options: argparse.Namespace) -> None:
    """Draw every activation."""
    from mlpext import plots

    plots.plot_activations(options.out)
    print(options.out)


def plot_history(options: argparse.Namespace) -> None:
    """Draw the histories of runs over one another."""
    histories: dict[str, History] = {}
    for run in map(Path, options.runs):
        files = sorted(run.rglob("history.json")) if run.is_dir() else [run]
        if not files:
            raise ValueError(f"{run}: there is no history.json in this folder or below")
        for file in files:
            histories[str(file.parent if file.name == "history.json" else file)] = History.load(file)
    from mlpext import plots

    plots.plot_histories(histories, options.out)
    print(options.out)


def tune(options: argparse.Namespace) -> None:
    """Measure which of torch's operators are faster here, and write the table that decides from now on."""
    file = _choices.user_file() if options.out is None else Path(options.out)
    table = _tune.measure()
    write_atomically(file, _choices.text(table))
    for operation, by_dtype in table["ratios"].items():
        for dtype, ratios in by_dtype.items():
            sizes = _choices.flat(ratios)
            slower = sorted((ratio, size) for size, ratio in sizes.items() if ratio < _choices.SLOWER)
            lowest = f", the lowest {slower[0][0]:.2f}, {slower[0][1]}" if slower else ""
            print(f"{operation:<16}{dtype:<10}torch serves {len(slower)} of {len(sizes)} sizes{lowest}")
    print(file)


def info(_: argparse.Namespace) -> None:
    """Say what is installed and what it uses."""
    built = _build.torch_version
    lines = {
        "mlpext": mlpext.__version__,
        "torch": torch.__version__
        if torch.__version__ == built
        else f"{torch.__version__}, built with {built}",
        "Python": platform.python_version(),
        "instruction sets": f"{', '.join(_C.cpu_isas())}; in use: {_C.cpu_isa()}",
        "torch serves": _choices.in_use.source,
        "threads": str(torch.get_num_threads()),
        "CUDA": "built" if _C.has_cuda() else "not built",
        "activations": " ".join(mlpext.activations()),
    }
    for name, value in lines.items():
        print(f"{name:<18}{value}")
    for variable, setting, meaning in _C.switches():
        print(f"{variable:<20}{'not set' if setting is None else setting}: {meaning}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mlpext", description=mlpext.__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train_parser = _add_train(commands)
    _add_plot(commands)
    about = "measure where torch's operators are faster on this machine, for them to serve there: two minutes"
    tune_parser = commands.add_parser("tune", help=about, description=about)
    tune_parser.add_argument(
        "--out", metavar="FILE", help=f"the table, for MLPEXT_TUNE ({_choices.user_file()})"
    )
    tune_parser.set_defaults(run=tune)
    about = "print versions, instruction sets, run-time variables, and the activations"
    commands.add_parser("info", help=about, description=about).set_defaults(run=info)
    options = parser.parse_args(arguments)
    if options.run is train:
        _check(options, train_parser)
    return options


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    about = "train the reference network, and compare the modes of gradient descent"
    command = commands.add_parser("train", help=about, description=about)
    command.set_defaults(run=train)
    option = command.add_argument
    option(
        "--data",
        default="digits",
        metavar="NAME",
        help=f"{', '.join(data.NAMES)}, FILE.csv or FILE.npz (digits)",
    )
    option("--target", metavar="COLUMN", help="the column, or the array, to predict from the others")
    option(
        "--task",
        choices=data.TASKS,
        default="auto",
        help="what the target of a file holds (auto: by its values)",
    )
    option("--validation", type=_fraction, default=0.2, metavar="FRACTION", help="held out (0.2)")
    option("--no-standardise", dest="standardise", action="store_false", help="take the inputs as they are")
    option("--mode", choices=("all", *MODES), default="all", help="(all)")
    option("--hidden", type=_sizes, default=[64], metavar="N,N", help="sizes of the hidden layers (64)")
    option(
        "--activation",
        choices=(*mlpext.activations(), "maxout"),
        default="relu",
        metavar="NAME",
        help="(relu)",
    )
    option(
        "--parameter",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the activation",
    )
    option("--pieces", type=_count, metavar="K", help="of maxout (2)")
    option(
        "--output-activation",
        choices=mlpext.activations(),
        default="identity",
        metavar="NAME",
        help="(identity)",
    )
    option("--loss", choices=LOSSES, default="squared_error", help="(squared_error, the lecture's E)")
    option("--reduction", choices=("mean", "sum"), default="mean", help="what a step minimises (mean)")
    option("--lr", type=_size, metavar="ETA", help=f"step size ({_by_mode(LEARNING_RATES)})")
    option("--epochs", type=_count, metavar="N", help=f"({_by_mode(EPOCHS)})")
    option("--batch-size", type=_count, default=32, metavar="N", help="of mini-batch mode (32)")
    option("--momentum", type=_size, default=0.0, metavar="MU", help="(0)")
    option("--weight-decay", type=_size, default=0.0, metavar="L", help="(0)")
    option(
        "--early-stopping",
        type=_count,
        metavar="N",
        help="stop after N epochs without a lower validation loss",
    )
    option("--seed", type=_seed, default=0, metavar="N", help="of split, initial weights and order (0)")
    option("--threads", type=_count, default=1, metavar="N", help="(1: more do not pay for small layers)")
    option("--device", type=_device, metavar="NAME", help="(cpu)")
    option("--out", metavar="DIR", help="where the results go (runs/DATA)")
    option("--resume", action="store_true", help="continue from the checkpoints in DIR")
    option("--quiet", action="store_true", help="no progress bar")
    return command


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plot = commands.add_parser("plot", help="draw the activations, or the histories of runs")
    pictures = plot.add_subparsers(required=True, metavar="PICTURE")
    about = "draw every activation with its derivative"
    picture = pictures.add_parser("activations", help=about, description=about)
    picture.add_argument("--out", default="activations.png", metavar="FILE", help="(activations.png)")
    picture.set_defaults(run=plot_activations)
    about = "draw the losses and metrics of runs over one another"
    picture = pictures.add_parser("history", help=about, description=about)
    picture.add_argument("runs", nargs="+", metavar="RUN", help="a folder of train, or a history.json")
    picture.add_argument("--out", default="history.png", metavar="FILE", help="(history.png)")
    picture.set_defaults(run=plot_history)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse options that do not go together; gather the activation's parameters in `options.parameters`."""
    is_file = options.data.endswith((".csv", ".npz"))
    if not is_file and options.data not in data.NAMES:
        parser.error(
            f"argument --data: {options.data!r} is none of {', '.join(data.NAMES)}, FILE.csv and FILE.npz"
        )
    if options.data.endswith(".csv") and options.target is None:
        parser.error("argument --target: a CSV needs it, to know the column to predict")
    if not is_file and options.target is not None:
        parser.error(f"argument --target: {options.data} has its own; this is for files")
    if options.pieces is not None and options.activation != "maxout":
        parser.error("argument --pieces: only maxout has pieces")
    known = _C.activations().get(options.activation, {})
    for name, _ in options.parameter:
        if name not in known:
            parser.error(
                f"argument --parameter: {options.activation} has no parameter {name!r}; "
                f"it has {', '.join(known) if known else 'none'}"
            )
    options.parameters = {**LECTURE.get(options.activation, {}), **dict(options.parameter)}
    if options.activation == "maxout":
        options.parameters["pieces"] = 2 if options.pieces is None else options.pieces


def _argument(
    accepted: str, parse: Callable[[str], Value], valid: Callable[[Value], bool]
) -> Callable[[str], Value]:
    """An argparse type whose message says what is accepted."""

    def convert(text: str) -> Value:
        try:
            value = parse(text)
        except (ValueError, RuntimeError):
            value = None
        if value is None or not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {accepted}")
        return value

    return convert


def _parse_sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")] if text else []


def _parse_assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


_count = _argument("an integer of 1 or more", int, lambda value: value >= 1)
_seed = _argument("an integer from 0 to 2^64 - 1", int, lambda value: 0 <= value < 2**64)
_size = _argument("a finite number of 0 or more", float, lambda value: math.isfinite(value) and value >= 0)
_fraction = _argument("a fraction between 0 and 1", float, lambda value: 0 < value < 1)
_sizes = _argument(
    "sizes of 1 or more, like 64,64", _parse_sizes, lambda sizes: all(size >= 1 for size in sizes)
)
_assignment = _argument("NAME=NUMBER", _parse_assignment, lambda pair: math.isfinite(pair[1]))
_device = _argument("a device like cpu or cuda:0", lambda text: str(torch.device(text)), bool)


def _by_mode(values: dict[str, float] | dict[str, int]) -> str:
    return ", ".join(f"{mode} {value:g}" for mode, value in values.items())
