"""What the pictures of networks, data and predictions hold: data of their artists, labels; and errors."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from torch.nn.utils import parameters_to_vector

import mlpext
from mlpext import plots
from mlpext.nn import MLP, GatedLinear, LinearActivation, Maxout
from mlpext.plots._figures import short

XOR = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


def texts(axis):
    return [text.get_text() for text in axis.texts]


def scatters(axis):
    return [artist for artist in axis.collections if isinstance(artist, PathCollection)]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_confusion_matrix_has_counts_shares_and_names(tmp_path):
    figure = plots.plot_confusion_matrix([[6, 2], [0, 5]], ["no", "yes"], tmp_path / "confusion.png")
    axis, bar = figure.axes
    assert texts(axis) == ["6", "2", "0", "5"]
    assert np.allclose(axis.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["no", "yes"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert bar.get_ylabel() == "share of the samples of the true class"
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("classes", [1, 20, 21, 50, 51, 100])
def test_a_confusion_matrix_of_any_size_has_names_that_find_place(classes):
    counts = np.arange(classes**2).reshape(classes, classes)
    figure = plots.plot_confusion_matrix(counts, [f"kind {k}" for k in range(classes)])
    axis = figure.axes[0]
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert len(texts(axis)) == (classes**2 if classes <= 20 else 0)
    assert len(names) == (classes if classes <= 50 else -(-classes // 2)) and names[0] == "kind 0"
    assert max(figure.get_size_inches()) < 13
    height = axis.get_window_extent().height / figure.dpi * 72  # points
    assert axis.get_yticklabels()[0].get_fontsize() * len(names) <= height


def test_a_class_without_samples_has_no_share():
    figure = plots.plot_confusion_matrix([[0, 0], [1, 1]], ["a", "b"])
    assert np.allclose(figure.axes[0].images[0].get_array(), [[0, 0], [0.5, 0.5]])


def test_long_names_keep_what_they_differ_in():
    assert short(["a" * 24, 7]) == ["a" * 24, "7"]
    (cut,) = short(["product group of the catalogue, number 17"])
    assert len(cut) == 24 and cut.startswith("product gro") and cut.endswith("number 17")
    assert short([f"product group {k:02} of the catalogue" for k in (7, 42)]) == ["…07…", "…42…"]
    assert short(["a" * 30, "a" * 31]) == ["…", "…a"]


@pytest.mark.parametrize("counts", [[[1, 2]], [[1]], [1, 2], np.zeros((3, 3))])
def test_counts_of_another_shape(counts):
    with pytest.raises(ValueError, match=r"counts: shape \(.*\), expected .* with 2 names"):
        plots.plot_confusion_matrix(counts, ["a", "b"])


def test_negative_counts_and_no_classes():
    with pytest.raises(ValueError, match="counts: -1, expected 0 or more"):
        plots.plot_confusion_matrix([[1, -1], [0, 1]], ["a", "b"])
    with pytest.raises(ValueError, match="counts: shape"):
        plots.plot_confusion_matrix(np.zeros((0, 0)), [])


@pytest.mark.parametrize("labels", [1, 2, 20, 21, 60])
def test_labels_have_a_row_each_of_what_was_said(labels):
    random = np.random.default_rng(labels)
    true, predicted = random.random((2, 50, labels)) < 0.4
    figure = plots.plot_labels(true.astype(int), predicted, [f"label {k}" for k in range(labels)])
    axis = figure.axes[0]
    shares = axis.images[0].get_array()
    assert shares.shape == (labels, 4)
    for k in range(labels):
        said = [(t, p) for t, p in zip(true[:, k], predicted[:, k], strict=True)]
        wanted = [said.count(pair) / 50 for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]
        np.testing.assert_allclose(shares[k], wanted)
    assert len(axis.texts) == (4 * labels if labels <= 20 else 0)
    assert axis.get_xlabel() and axis.get_ylabel() == "label"
    figure.canvas.draw()
    assert figure.get_size_inches().max() < 13


@pytest.mark.parametrize("true, predicted", [(np.ones((3, 2)), np.ones((3, 3))), (np.ones(3), np.ones(3))])
def test_labels_that_do_not_go_together(true, predicted):
    with pytest.raises(ValueError, match="a column a name"):
        plots.plot_labels(true, predicted, ["hot", "wet"])


def test_predictions_are_points_with_the_same_range_both_ways():
    true, predicted = np.array([[1.0, -5], [2, 5]]), np.array([[1.5, 0], [2, 9]])
    figure = plots.plot_predictions(true, predicted, ["price (EUR)", "area (m²)"])
    assert [axis.get_xlabel() for axis in figure.axes] == ["true price (EUR)", "true area (m²)"]
    assert figure.axes[1].get_ylabel() == "predicted area (m²)"
    for k, axis in enumerate(figure.axes):
        (points,) = scatters(axis)
        assert np.array_equal(points.get_offsets(), np.stack([true[:, k], predicted[:, k]], 1))
        assert axis.get_xlim() == axis.get_ylim() and axis.get_aspect() == 1


def test_many_predictions_are_counted(tmp_path):
    true = np.random.default_rng(0).normal(size=100_000)
    figure = plots.plot_predictions(true, true + 0.1, ["y"], tmp_path / "many.png")
    axis, bar = figure.axes
    (cells,) = (artist for artist in axis.collections if isinstance(artist, PolyCollection))
    assert cells.get_array().sum() == 100_000 and bar.get_ylabel() == "samples in a cell"
    assert (tmp_path / "many.png").stat().st_size < 400_000


def test_one_prediction_and_tensors():
    figure = plots.plot_predictions(torch.tensor([3.0]), torch.tensor([[3.0]]), ["y"])
    assert figure.axes[0].get_xlim() == (2.5, 3.5)


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        ([1.0, 2.0], [[1.0, 2.0]], r"predicted: shape \(1, 2\), expected \(n, targets\) with 1 names"),
        ([], [], r"true: shape \(0, 1\)"),
        ([1.0, 2.0], [1.0], r"predicted: 1 samples, expected 2, as true has"),
        ([1.0, float("nan")], [1.0, 2.0], "true: holds numbers that are not finite"),
        ([1.0], [float("inf")], "predicted: holds numbers that are not finite"),
    ],
)
def test_predictions_that_do_not_go_together(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_predictions(true, predicted, ["y"])


def test_learning_rates_have_a_panel_a_network_and_a_line_an_activation():
    rows = [
        ("hidden 16", "tanh", 0.3, 0.7),
        ("hidden 16", "tanh", 0.1, 0.8),
        ("hidden 16", "relu", 0.1, 0.6),
        ("hidden 8", "relu", 0.1, 0.5),
        ("hidden 8", "relu", 0.3, float("nan")),
    ]
    figure = plots.plot_learning_rates(rows, "r2")
    small, large = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["hidden 8", "hidden 16"]
    assert small.get_ylabel() == "R²" and large.get_xlabel() == "learning rate"
    drawn = [tuple(map(list, line.get_data())) for line in large.get_lines() if len(line.get_xdata())]
    assert drawn == [([0.1], [0.6]), ([0.1, 0.3], [0.8, 0.7])]
    crosses = [line for line in small.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[0.3]]
    assert legend(figure) == ["relu", "tanh", "not finite"]
    assert [tick.get_text() for tick in large.get_xticklabels()] == ["0.1", "0.3"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "rows: there is none to plot"), ([("", "relu", 0.0, 1.0)], "rows: a learning rate of 0.0")],
)
def test_learning_rates_that_cannot_be_drawn(rows, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_learning_rates(rows)


def half_plane(x):
    """One output: above 1/2 where x1 > 0.25."""
    return x[:, :1] + 0.25


def test_the_boundary_of_one_output_is_where_it_is_the_threshold():
    figure = plots.plot_decision_boundary(
        {"first": half_plane, "second": lambda x: half_plane(x) + 0.25},
        XOR,
        [0, 1, 1, 0],
        names=["even", "odd"],
    )
    first, second, bar = figure.axes
    for axis, place in ((first, 0.25), (second, 0.0)):
        (border,) = (a for a in axis.collections if not isinstance(a, PathCollection))
        vertices = np.concatenate([path.vertices for path in border.get_paths()])
        assert np.allclose(vertices[:, 0], place, atol=1e-6)
    assert [axis.get_title() for axis in (first, second)] == ["first", "second"]
    assert legend(figure) == ["even", "odd"] and bar.get_ylabel() == "output o"
    drawn = [np.asarray(points.get_offsets()).tolist() for points in scatters(first)]
    assert drawn == [[[0, 0], [1, 1]], [[0, 1], [1, 0]]]


@pytest.mark.parametrize("classes", [3, 100])
def test_regions_of_several_classes_have_the_colour_of_the_largest_output(classes):
    torch.manual_seed(0)
    net = MLP([2, 8, classes], "tanh", dropout=0.5)
    labels = torch.arange(200) % classes
    figure = plots.plot_decision_boundary(
        net, torch.randn(200, 2), labels, features=("height (m)", "mass (kg)")
    )
    assert net.training
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("height (m)", "mass (kg)")
    assert len(scatters(axis)) == classes and len(legend(figure)) == min(classes, 21)
    colours = axis.images[0].get_array()
    low, high, bottom, top = axis.images[0].get_extent()
    plane = np.stack(np.meshgrid(np.linspace(low, high, 200), np.linspace(bottom, top, 200)), -1)
    with torch.no_grad():
        taken = net.eval()(torch.tensor(plane.reshape(-1, 2)).float()).argmax(1).reshape(200, 200).numpy()
    of_class = {k: {tuple(colour) for colour in colours[taken == k]} for k in range(classes)}
    seen = [own for own in of_class.values() if own]
    assert all(len(own) == 1 for own in seen) and len(set.union(*seen)) == len(seen) >= 2


def test_labels_are_text_and_100_000_samples_are_small(tmp_path):
    x = torch.randn(100_000, 2)
    labels = np.where(x[:, 0] > 0.25, "right", "left")
    figure = plots.plot_decision_boundary(half_plane, x, labels, tmp_path / "boundary.png")
    assert legend(figure) == ["left", "right"]
    assert sum(len(points.get_offsets()) for points in scatters(figure.axes[0])) == 100_000
    assert scatters(figure.axes[0])[0].get_sizes() == [2]


@pytest.mark.parametrize(
    ("model", "x", "target", "message"),
    [
        (half_plane, torch.zeros(3, 5), [0, 1, 0], r"x: shape \(3, 5\), expected \(n, 2\)"),
        (half_plane, XOR, [0, 1], r"target: shape \(2,\), expected \(4,\)"),
        (half_plane, XOR, [0, 1, 2, 0], "target: classes 0 to 2, 2 names; the model has 2"),
        (half_plane, XOR, [0, -1, 1, 0], "target: classes -1 to 1"),
        (half_plane, XOR, ["a", "b", "c", "a"], "target: classes 0 to 2, 3 names; the model has 2"),
        (
            lambda x: x[:, 0],
            XOR,
            [0, 1, 1, 0],
            r"model: outputs of shape \(40000,\), expected \(40000, classes\)",
        ),
        ({}, XOR, [0, 1, 1, 0], "model: an empty mapping, expected at least one model"),
    ],
)
def test_decisions_that_cannot_be_drawn(model, x, target, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_decision_boundary(model, x, target)


def bowl():
    """A neuron o = w1 x1 + w2 x2 whose E is 1/4 ((w1 - 1)^2 + (w2 + 2)^2): of two samples."""
    net = MLP([2, 1], bias=False, dtype=torch.float64)
    return net, torch.eye(2).double(), torch.tensor([[1.0], [-2.0]]).double()


def test_a_contour_is_e_of_the_weights_and_paths_lie_on_it():
    net, x, d = bowl()
    before = parameters_to_vector(net.parameters()).clone()
    walk = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [1.0, -2.0]])
    figure = plots.plot_contour(net, x, d, {"batch": walk, "there": [walk[0], walk[2]]}, weights=(0, 1))
    assert torch.equal(parameters_to_vector(net.parameters()), before)
    batch, there, bar = figure.axes
    assert (batch.get_title(), there.get_title()) == ("batch, 2 steps", "there, 1 steps")
    assert (batch.get_xlabel(), batch.get_ylabel()) == ("0.weight[0, 0]", "0.weight[0, 1]")
    assert bar.get_ylabel() == "E, mean over the samples"
    (line,) = batch.get_lines()
    assert np.array_equal(line.get_xydata(), walk)
    start, end = scatters(batch)
    assert start.get_offsets().tolist() == [[-1, 0]] and end.get_offsets().tolist() == [[1, -2]]
    (contour,) = (a for a in batch.collections if not isinstance(a, PathCollection))
    for level, path in zip(contour.levels[1:-1], contour.get_paths()[1:], strict=False):
        if len(path.vertices):
            w1, w2 = path.vertices.T
            lowest = (0.25 * ((w1 - 1) ** 2 + (w2 + 2) ** 2)).min()
            assert lowest == pytest.approx(level, rel=0.15, abs=0.02)


def test_the_plane_of_the_paths_is_that_of_their_spread():
    torch.manual_seed(0)
    net = MLP([2, 3, 1], "tanh")
    start = parameters_to_vector(net.parameters()).detach()
    first, second = torch.linalg.qr(torch.randn(len(start), 2)).Q.T
    walk = torch.stack([start + 3 * first * k + second * (k % 2) for k in range(6)])
    figure = plots.plot_contour(net, XOR, torch.tensor([0, 1, 1, 0]).float(), {"walk": walk})
    (line,) = figure.axes[0].get_lines()
    drawn = torch.tensor(np.asarray(line.get_xydata())).float()
    # Nothing of the walk lies outside of its plane, so that distances are those of the weights.
    assert torch.allclose(torch.cdist(drawn, drawn), torch.cdist(walk, walk), atol=1e-4)
    assert drawn[:, 0].std() > drawn[:, 1].std()


@pytest.mark.parametrize(
    ("paths", "weights", "message"),
    [
        ({}, None, "paths: 0 steps of 2 parameters, expected 2 or more of both"),
        ({"a": torch.zeros(1, 2)}, None, "paths: 1 steps of 2"),
        ({"a": torch.zeros(3, 5)}, None, r"paths\['a'\]: shape \(3, 5\), expected \(steps, 2\)"),
        ({"a": []}, None, r"paths\['a'\]: shape \(0,\)"),
        ({"a": torch.zeros(3, 2)}, (0, 2), r"weights: \(0, 2\), expected two different places in 0 ... 1"),
        ({"a": torch.zeros(3, 2)}, (1, 1), r"weights: \(1, 1\)"),
    ],
)
def test_paths_that_cannot_be_drawn(paths, weights, message):
    net, x, d = bowl()
    with pytest.raises(ValueError, match=message):
        plots.plot_contour(net, x, d, paths, weights=weights)


def test_a_network_has_its_neurons_edges_sizes_and_activations():
    figure = plots.plot_network(MLP([4, 3, 2], "elu", "sigmoid", alpha=0.5))
    (axis,) = figure.axes
    assert [len(points.get_offsets()) for points in scatters(axis)] == [4, 3, 2]
    edges = [len(a.get_segments()) for a in axis.collections if isinstance(a, LineCollection)]
    assert edges == [12, 6]
    assert texts(axis) == [
        "x",
        "n0 = 4\ninputs",
        "o1\nelu\nalpha 0.5",
        "n1 = 3\nW1: 3 × 4\nb1: 3",
        "o2\nsigmoid",
        "n2 = 2\nW2: 2 × 3\nb2: 2",
    ]


def test_wide_layers_maxout_and_other_layers():
    row = torch.nn.Sequential(
        Maxout(1000, 11, pieces=3), torch.nn.Linear(11, 10, bias=False), LinearActivation(10, 1, "tanh")
    )
    (axis,) = plots.plot_network(row).axes
    assert [len(points.get_offsets()) for points in scatters(axis)] == [8, 8, 10, 1]
    assert texts(axis).count("⋮") == 2
    assert {"o1\nmaxout\npieces 3", "n1 = 11\nW1: 3 × 11 × 1000\nb1: 3 × 11", "o2\nidentity"} <= {
        *texts(axis)
    }
    assert "n2 = 10\nW2: 10 × 11" in texts(axis)


def test_a_gated_layer():
    (axis,) = plots.plot_network(MLP([4, 3]).append(GatedLinear(3, 2, "elu"))).axes
    assert {"o2\nelu gate\nalpha 1", "n2 = 2\nW2: 2 × 2 × 3\nb2: 2 × 2"} <= {*texts(axis)}


@pytest.mark.parametrize("name", mlpext.activations())
def test_a_layer_alone_with_every_activation(name):
    (axis,) = plots.plot_network(LinearActivation(2, 1, name)).axes
    assert f"o1\n{name}" in {text[: len(f"o1\n{name}")] for text in texts(axis)}


@pytest.mark.parametrize("model", [torch.nn.Conv2d(1, 1, 1), torch.nn.Sequential(torch.nn.ReLU()), 7])
def test_what_is_no_mlp(model):
    with pytest.raises(TypeError, match=r"model: (Conv2d|ReLU|int), expected LinearActivation, Maxout, G"):
        plots.plot_network(model)
    with pytest.raises(TypeError, match="model: an empty Sequential"):
        plots.plot_network(torch.nn.Sequential())


def test_every_axis_with_a_scale_has_a_name():
    net, x, d = bowl()
    figures = [
        plots.plot_predictions([1.0, 2.0], [1.0, 2.0], ["y"]),
        plots.plot_confusion_matrix([[1]], ["a"]),
        plots.plot_learning_rates([("", "relu", 0.1, 0.5)]),
        plots.plot_decision_boundary(half_plane, XOR, [0, 1, 1, 0]),
        plots.plot_contour(net, x, d, {"a": torch.zeros(3, 2)}, weights=(0, 1)),
    ]
    for axis in itertools.chain.from_iterable(figure.axes for figure in figures):
        assert axis.get_ylabel() and (axis.get_xlabel() or axis.get_label() == "<colorbar>")


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = plots.plot_network(MLP([1, 1]))
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("function", plots.__all__)
def test_every_picture_has_an_example_and_says_what_it_raises(function):
    documented = getattr(plots, function).__doc__
    assert ">>>" in documented and "Raises:" in documented and "`path`" in documented
