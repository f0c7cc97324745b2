import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

import mlpext
from mlpext import plots
from mlpext.plots._activations import _with_gaps
from mlpext.plots._histories import _colours
from mlpext.training.history import Epoch, History


def history(epochs=5, steps=4, metric="accuracy", validation=True, seconds=0.5):
    made = History({"mode": "mini-batch"})
    for k in range(1, epochs + 1):
        metrics = {} if metric is None else {metric: 1 - 1 / k}
        metrics |= {"val_loss": 2 / k, **({f"val_{metric}": 0.5} if metric else {})} if validation else {}
        made.append(Epoch(k, k * steps, 1 / k, metrics, seconds, 100.0), torch.full((steps,), 1 / k))
    return made


def lines(axis):
    return [line for line in axis.get_lines() if len(line.get_xdata()) > 2]


@pytest.mark.thorough
def test_every_activation_is_drawn_with_its_derivative(tmp_path):
    figure = plots.plot_activations(tmp_path / "activations.png")
    panels = figure.axes
    names = [axis.get_title(loc="left") for axis in panels]
    assert names == [*mlpext.activations(), "maxout"]
    for axis in panels:
        curve, slope = (line.get_ydata() for line in lines(axis))
        x = np.asarray(lines(axis)[1].get_xdata())
        assert np.isfinite(curve).mean() > 0.99
        # Away from kinks the curve rises as its derivative says.
        rise = np.diff(curve) / np.diff(x)
        difference = np.abs(rise - (slope[1:] + slope[:-1]) / 2)
        assert np.nanquantile(difference, 0.98) < 1e-3, axis.get_title(loc="left")
    assert panels[names.index("leaky_relu")].get_title(loc="right") == "negative_slope=0.1"
    assert (tmp_path / "activations.png").read_bytes().startswith(b"\x89PNG")


def test_some_activations_are_drawn_in_the_order_asked_for():
    figure = plots.plot_activations(names=["maxout", "elu"])
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["maxout", "elu"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["x", "x"]
    maxout = figure.axes[0]
    x, y = lines(maxout)[0].get_data()
    pieces = [line for line in maxout.get_lines() if line.get_linestyle() == ":"]
    tallest = np.max([line.get_xy1()[1] + line.get_slope() * x for line in pieces], 0)
    assert len(pieces) == 3 and np.allclose(y, tallest)


@pytest.mark.parametrize("names", [[], ["swish"], ["relu", "Maxout"]])
def test_an_unknown_activation(names):
    with pytest.raises(ValueError, match=r"names: .*expected some of identity, .*, maxout"):
        plots.plot_activations(names=names)


def test_a_jump_is_a_gap():
    values = torch.tensor([0.0, 0.01, 0.02, 1.0, 1.01, 1.02]).double()
    assert _with_gaps(values).isnan().tolist() == [False, False, False, True, False, False]
    assert not _with_gaps(torch.linspace(0, 40, 500).sin()).isnan().any()


def test_one_run_over_its_epochs(tmp_path):
    figure = history().plot(tmp_path / "run.svg")
    loss, metric = figure.axes
    steps, training, validation = lines(loss)
    assert len(steps.get_xdata()) == 20 and steps.get_xdata()[-1] == 5
    assert list(training.get_xdata()) == [1, 2, 3, 4, 5] and training.get_ydata()[4] == 0.2
    assert validation.get_linestyle() == "--" and list(validation.get_ydata()) == [2, 1, 2 / 3, 0.5, 0.4]
    assert metric.get_ylabel() == "accuracy" and loss.get_yscale() == "log"
    assert b"<svg" in (tmp_path / "run.svg").read_bytes()


def test_several_runs_over_epochs_and_seconds():
    runs = {
        "first": history(),
        "second": history(epochs=50, metric="r2", validation=False),
        "none": history(epochs=0),
    }
    figure = plots.plot_histories(runs, title="runs")
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "epoch",
        *["seconds of training"] * 3,
    ]
    assert [len(lines(axis)) for axis in figure.axes[:2]] == [3, 3]
    assert lines(figure.axes[1])[0].get_xdata()[-1] == pytest.approx(2.5)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["first", "second", "training (each sample as its step met it)", "validation"]


def test_a_run_without_metric_and_one_of_a_single_epoch():
    assert len(history(metric=None).plot().axes) == 1
    (loss, *_) = history(epochs=1, steps=1).plot().axes
    assert loss.get_lines()[0].get_marker() == "o"


def test_losses_of_zero_have_no_logarithm():
    run = history(epochs=0)
    run.append(Epoch(1, 4, 0.0, {"accuracy": 1.0}, 0.5, 100.0), torch.zeros(4))
    assert run.plot().axes[0].get_yscale() == "linear"


def test_single_steps_do_not_squeeze_the_curves():
    """Those of a large table reach 1e-9, and took 20 ticks, one over the other."""
    run = history(epochs=0)
    for epoch in range(1, 6):
        run.append(Epoch(epoch, 100 * epoch, 0.1 / epoch, {}, 0.5, 100.0), torch.logspace(-9, 0, 100))
    axis = run.plot().axes[0]
    low, high = axis.get_ylim()
    assert low == pytest.approx(0.002) and high >= 1
    assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) <= 10


@pytest.mark.parametrize("runs", [{}, {"none": history(epochs=0)}])
def test_nothing_to_plot(runs):
    with pytest.raises(ValueError, match="there is no epoch to plot"):
        plots.plot_histories(runs)


def test_an_unknown_format_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="docx"):
        history().plot(tmp_path / "loss.docx")
    assert list(tmp_path.iterdir()) == []


def test_no_global_figure_is_left_open():
    history().plot()
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert pyplot.get_fignums() == []


def test_a_mode_has_its_colour_alone_and_beside_others():
    alone = _colours(["runs/iris/batch"])
    beside = _colours(["runs/iris/stochastic", "runs/iris/mini-batch", "runs/iris/batch", "other/batch"])
    assert alone == beside[2:3] and len({*beside}) == 4


def test_many_runs_have_colours_of_their_own():
    labels = [f"mini-batch-seed-{seed}" for seed in range(20)]
    assert len({*_colours(labels)}) == 20


def test_a_loss_of_0_does_not_flatten_the_others_and_every_metric_has_a_panel():
    class Run(dict):
        columns = property(list)
        step_losses = torch.zeros(0)

        def __len__(self):
            return 3

    common = {"epoch": [1, 2, 3], "seconds": [0.1] * 3}
    first = Run(common, loss=[1.0, 0.1, 0.0], accuracy=[0.1, 0.2, 0.3])
    second = Run(common, loss=[1.0, 0.5, 0.2], r2=[0.1, 0.2, 0.3])
    figure = plots.plot_histories({"a": first, "b": second})
    assert [axis.get_ylabel() for axis in figure.axes][2:] == ["accuracy", "R²"]
    assert figure.axes[0].get_yscale() == "log"
