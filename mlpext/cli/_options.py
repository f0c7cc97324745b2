"""The arguments of the command line, and what is wrong with them."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

import mlpext
from mlpext import _C, _choices, data
from mlpext._names import MODES, did_you_mean
from mlpext._tasks import TASKS
from mlpext.cli import _other
from mlpext.cli._defaults import ADAM, EPOCHS, LEARNING_RATES
from mlpext.training import LOSSES
from mlpext.training._schedule import BY_NAME as SCHEDULES

Value = TypeVar("Value")

# The lecture's leaky ReLU is max(0.1 x, x); torch's default slope, and so our modules', is 0.01.
LECTURE = {"leaky_relu": {"negative_slope": 0.1}}


# What the usual name of a run says of it, where it is not the default.
VARIED = (
    *("hidden", "activation", "parameter", "pieces", "output_activation", "dropout", "loss", "reduction"),
    *(
        "optimizer",
        "lr",
        "schedule",
        "l2",
        "momentum",
        "weight_decay",
        "batch_size",
        "class_weight",
        "search",
    ),
)


class Parser(argparse.ArgumentParser):
    """One that knows what a wrong name was meant to be."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, and "did you mean" where a choice is near."""
        if "invalid choice: '" in message:
            given = message.split("invalid choice: '")[1].split("'")[0].lower()
            listed = message.partition("choose from ")[2].rstrip(")").split(",")
            choices = [choice.strip(" '") for choice in listed]
            message += did_you_mean(given, choices)
        super().error(message)


class Given(argparse.Action):
    """Stores a value, and notes that it was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = [*namespace.given, self.dest]


def _later(module: str, name: str) -> Callable[[argparse.Namespace], None]:
    """A function of the command line whose imports wait until it is called: pandas and scikit-learn take a
    second, and `info` needs neither."""

    def run(options: argparse.Namespace) -> None:
        getattr(importlib.import_module(f"mlpext.cli.{module}"), name)(options)

    return run


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line, with `run`, the function of its command. Raises SystemExit(2)."""
    parser = Parser(prog="mlpext", description=mlpext.__doc__)
    parser.add_argument("--version", action="version", version=f"mlpext {mlpext.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train_parser = _add_train(commands)
    _add_runs(commands)
    _add_plot(commands)
    about = "measure where torch's operators are faster on this machine, for them to serve there: two minutes"
    tune_parser = commands.add_parser("tune", help=about, description=about)
    tune_parser.add_argument(
        "--out", metavar="FILE", help=f"the table, for MLPEXT_TUNE ({_choices.user_file()})"
    )
    tune_parser.set_defaults(run=_other.tune)
    about = "print versions, instruction sets, run-time variables, and the activations"
    info_parser = commands.add_parser("info", help=about, description=about)
    info_parser.add_argument("--json", action="store_true", help="as JSON")
    info_parser.set_defaults(run=_other.info)
    options = parser.parse_args(arguments)
    if "table" in options:
        _check(options, train_parser)
        options.out = options.out or _usual_folder(options, train_parser)
    return options


def _add_train(commands: argparse._SubParsersAction[Parser]) -> Parser:
    about = "train a network on a table, or the reference network, and compare the modes of gradient descent"
    command = commands.add_parser("train", help=about, description=about)
    command.set_defaults(run=_later("_train", "train"), given=[])
    option = command.add_argument
    option("table", nargs="?", metavar="DATA", help="as --data")
    option(
        "--data",
        metavar="NAME",
        help=f"{', '.join(data.NAMES)}, or a table: .csv, .tsv, .csv.gz, .parquet, .npz (digits)",
    )
    option(
        "--target",
        metavar="COLUMN",
        action="append",
        help="the column, or the array, to predict from the others; several times for several",
    )
    option("--test", metavar="FILE", help="what is held out, instead of a part of DATA")
    option("--drop", type=_names, default=[], metavar="A,B", help="columns to leave out")
    option("--categorical", type=_names, default=[], metavar="A,B", help="columns whose numbers are labels")
    option("--separator", default="auto", metavar="CHAR", help="of fields: , ; | or a tab (auto)")
    option(
        "--task",
        choices=TASKS,
        default="auto",
        help="what the target of a file holds (auto: by its values)",
    )
    option("--validation", type=_fraction, default=0.2, metavar="FRACTION", help="held out (0.2)")
    option("--no-standardise", dest="standardise", action="store_false", help="take the inputs as they are")
    option("--mode", choices=("all", *MODES), help="(all for the built-in data sets, mini-batch for a file)")
    option(
        "--search",
        action="store_true",
        help="first try widths, activations and step sizes, but those that are given, and train the best",
    )
    option(
        "--hidden",
        type=_sizes,
        action=Given,
        default=[64],
        metavar="N,N",
        help="sizes of the hidden layers (64)",
    )
    option(
        "--activation",
        action=Given,
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
    option("--dropout", type=_share, default=0.0, metavar="P", help="of the hidden units (0)")
    option(
        "--loss",
        choices=LOSSES,
        help="(squared_error, the lecture's E; for classes of a table cross_entropy)",
    )
    option("--reduction", choices=("mean", "sum"), default="mean", help="what a step minimises (mean)")
    option("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="(sgd)")
    option(
        "--lr",
        type=_size,
        action=Given,
        metavar="ETA",
        help=f"step size ({_by_mode(LEARNING_RATES)}; of the mean; adam's {ADAM})",
    )
    option("--schedule", choices=SCHEDULES, help="of the step size, over the epochs")
    option("--l2", type=_size, default=0.0, metavar="L", help="penalty on the sum of squared weights (0)")
    option("--class-weight", choices=("balanced",), help="rare classes count more")
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
    option(
        "--seed",
        type=_seeds,
        default=[0],
        metavar="N,N",
        help="of split, initial weights and order; several train several networks (0)",
    )
    option("--threads", type=_count, default=1, metavar="N", help="(1: more do not pay for small layers)")
    option("--device", type=_device, metavar="NAME", help="(cpu)")
    option("--out", metavar="DIR", help="where the results go (runs/DATA, with what is not the default)")
    option("--overwrite", action="store_true", help="replace another run in DIR")
    option("--resume", action="store_true", help="continue from the checkpoints in DIR")
    option("--quiet", action="store_true", help="no progress bar")
    return command


def _add_runs(commands: argparse._SubParsersAction[Parser]) -> None:
    for name, about, out in (
        ("predict", "predict every row of a table", "a CSV of them (standard output)"),
        ("evaluate", "measure a model on a table with the answers", "the picture (in RUN)"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=_later("_runs", name))
        command.add_argument("model", metavar="RUN", help="a folder of train, or a file of mlpext.save")
        command.add_argument("data", metavar="DATA", help="a table, as train takes it")
        command.add_argument("--out", metavar="FILE", help=out)
        command.add_argument("--separator", default="auto", metavar="CHAR", help="of fields (auto)")


def _add_plot(commands: argparse._SubParsersAction[Parser]) -> None:
    plot = commands.add_parser("plot", help="draw the activations, or the histories of runs")
    pictures = plot.add_subparsers(required=True, metavar="PICTURE")
    about = "draw every activation with its derivative"
    picture = pictures.add_parser("activations", help=about, description=about)
    picture.add_argument("--out", default="activations.png", metavar="FILE", help="(activations.png)")
    picture.set_defaults(run=_other.plot_activations)
    about = "draw the losses and metrics of runs over one another"
    picture = pictures.add_parser("history", help=about, description=about)
    picture.add_argument("runs", nargs="+", metavar="RUN", help="a folder of train, or a history.json")
    picture.add_argument("--out", default="history.png", metavar="FILE", help="(history.png)")
    picture.set_defaults(run=_other.plot_history)


def _check(options: argparse.Namespace, parser: Parser) -> None:
    """Refuse options that do not go together; gather the activation's parameters in `options.parameters`."""
    if options.table is not None and options.data is not None:
        parser.error("argument --data: the data are given twice")
    options.data = options.table or options.data or "digits"
    del options.table
    built_in = options.data in data.NAMES
    if not built_in and "." not in options.data:
        parser.error(
            f"argument --data: {options.data!r} is none of {', '.join(data.NAMES)}, and no file's name"
            + did_you_mean(options.data, data.NAMES)
        )
    is_table = not built_in and not options.data.endswith(".npz")
    if is_table and options.target is None:
        parser.error("argument --target: a table needs it, to know the column to predict")
    if built_in and options.target is not None:
        parser.error(f"argument --target: {options.data} has its own; this is for files")
    if not is_table and options.test is not None:
        parser.error("argument --test: it goes with a table")
    options.mode = options.mode or ("mini-batch" if is_table else "all")
    on_gpu = options.device is not None and torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error(f"argument --device: {options.device} is not here: torch sees no GPU")
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


def _usual_folder(options: argparse.Namespace, parser: Parser) -> str:
    """runs/DATA, with what the network and its steps have that is not usual, so that runs do not meet."""
    name = options.data.replace("\\", "/").rpartition("/")[2].partition(".")[0]
    for varied in VARIED:
        value = getattr(options, varied)
        if value != parser.get_default(varied):
            parts = value if isinstance(value, list) else [value]
            text = ",".join(
                "=".join(map(str, part)) if isinstance(part, tuple) else str(part) for part in parts
            )
            name += f"-{varied}={text}"
    return f"runs/{name}"


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


def _parse_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parse_seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


_names = _argument("names of columns, like a,b", _parse_names, all)
_seeds = _argument(
    "an integer from 0 to 2^64 - 1, or several like 0,1",
    _parse_seeds,
    lambda seeds: all(0 <= seed < 2**64 for seed in seeds) and len({*seeds}) == len(seeds),
)
_share = _argument("a share of at least 0 and below 1", float, lambda value: 0 <= value < 1)
_count = _argument("an integer of 1 or more", int, lambda value: value >= 1)
_size = _argument("a finite number of 0 or more", float, lambda value: math.isfinite(value) and value >= 0)
_fraction = _argument("a fraction between 0 and 1", float, lambda value: 0 < value < 1)
_sizes = _argument(
    "sizes of 1 or more, like 64,64", _parse_sizes, lambda sizes: all(size >= 1 for size in sizes)
)
_assignment = _argument("NAME=NUMBER", _parse_assignment, lambda pair: math.isfinite(pair[1]))
_device = _argument("a device like cpu or cuda:0", lambda text: str(torch.device(text)), bool)


def _by_mode(values: dict[str, float] | dict[str, int]) -> str:
    return ", ".join(f"{mode} {value:g}" for mode, value in values.items())
