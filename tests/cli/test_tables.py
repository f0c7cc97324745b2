"""From a table to a prediction by the command line, and one artefact between them."""

import gzip
import io
import json
import random
import string
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
import torch

import mlpext
from mlpext import _artefact
from mlpext._network import Network
from mlpext.data import load
from mlpext.nn import MLP, GatedLinear
from mlpext.tabular import Columns, preprocessing, read_table
from test_cli import run

N = 240


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(seed=0):
    return np.random.default_rng(seed)


def mixed():
    r = drawn()
    age, town = r.integers(18, 80, N), r.choice(["Rome", "Oslo", "Bonn", None], N)
    return pd.DataFrame(
        {
            "id": range(1000, 1000 + N),
            "age": np.where(r.random(N) < 0.1, np.nan, age),
            "town": town,
            "since": pd.date_range("2020-01-01", periods=N).strftime("%Y-%m-%d"),
            "member": r.random(N) < 0.5,
            "unit": "kg",
            "answer": np.where((age > 45) ^ (town == "Oslo"), "yes", "no"),
        }
    )


def numeric(columns=3, rows=N):
    return pd.DataFrame(drawn().normal(size=(rows, columns)), columns=[f"c{k}" for k in range(columns)])


def with_target(frame, **targets):
    return frame.assign(**targets)


def skewed():
    x = numeric()
    return with_target(x, price=np.exp(x.c0 + x.c1 / 2 + 8).round(2))


TABLES = {
    "mixed types, missing, dates": (mixed, "answer", {}, 0.85),
    "rare class": (
        lambda: with_target(f := numeric(2, 600), rare=(f.c0 > 1.55).astype(int)),
        "rare",
        {},
        0.95,
    ),
    "text target": (
        lambda: with_target(f := numeric(), kind=np.where(f.c0 > 0, "rose", "lily")),
        "kind",
        {},
        0.9,
    ),
    "semicolons, decimal commas": (skewed, "price", {"sep": ";", "decimal": ","}, 0.7),
    "skewed target": (skewed, "price", {}, 0.7),
    "tabs": (lambda: with_target(f := numeric(), y=(f.c0 > 0).astype(int)), "y", {"sep": "\t"}, 0.9),
    "wide": (lambda: with_target(f := numeric(500, 100), y=np.where(f.c0 > 0, "a", "b")), "y", {}, 0.3),
    "labels": (
        lambda: with_target(f := numeric(), hot=(f.c0 > 0).astype(int), wet=(f.c1 > 0).astype(int)),
        "hot wet",
        {},
        0.8,
    ),
    "two numbers": (lambda: with_target(f := numeric(), a=f.c0 * 3 + 7, b=f.c1 - 100), "a b", {}, 0.9),
    "large": (lambda: with_target(f := numeric(20, 20_000), y=(f.c0 > f.c1).astype(int)), "y", {}, 0.95),
}


@pytest.mark.parametrize("name", TABLES)
def test_train_evaluate_predict_with_nothing_but_the_target(capsys, tmp_path, name):
    make, targets, style, least = TABLES[name]
    frame = make()
    frame.to_csv("data.csv", index=False, **style)
    frame.head(7).drop(columns=targets.split()).to_csv("new.csv", index=False, **style)
    chosen = " ".join(f"--target {target}" for target in targets.split())
    code, out, err = run(capsys, f"train data.csv {chosen} --quiet --seed 1")
    assert (code, err) == (0, ""), err
    code, out, err = run(capsys, "evaluate runs/data/model.mlpext data.csv")
    assert (code, err) == (0, ""), err
    measures = dict(line.rsplit(None, 1) for line in out.splitlines()[1:-1])
    first = next(iter(measures.values()))
    assert (float(first.rstrip("%")) / 100 if first.endswith("%") else float(first)) > least, out
    assert (tmp_path / "runs/data/evaluation.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = run(capsys, "predict runs/data new.csv --out answers.csv")
    assert (code, out, err) == (0, "answers.csv: 7 predictions\n", "")
    answers = pd.read_csv("answers.csv")
    assert len(answers) == 7 and [*answers.columns][: len(targets.split())] == targets.split()
    pipeline = mlpext.load("runs/data/model.mlpext")
    wanted = pipeline.predict(read_table("new.csv"))
    got = answers[targets.split()].to_numpy()
    if wanted.dtype.kind == "f":
        np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=1e-9)
    else:
        assert (got.astype(str).reshape(wanted.shape) == wanted.astype(str)).all()


def test_predictions_have_the_targets_unit_to_its_last_digits(capsys):
    """100 different numbers became 4: they had been float32 before they were standardised."""
    x = np.linspace(0, 1, 100)
    pd.DataFrame({"when": 1.7e9 + 60 * np.arange(100), "y": 40.7127837 + x * 1e-5}).to_csv(
        "d.csv", index=False
    )
    options = "--target y --task numbers --quiet --optimizer adam --lr 0.01 --epochs 60 --out runs/d"
    assert run(capsys, f"train d.csv {options}")[0] == 0
    predicted = mlpext.load("runs/d/model.mlpext").predict(read_table("d.csv"))
    assert len(np.unique(predicted)) > 90 and np.abs(predicted - (40.7127837 + x * 1e-5)).max() < 3e-6


def test_what_tells_nothing_is_left_out_and_said(capsys):
    mixed().to_csv("data.csv", index=False)
    _, out, _ = run(capsys, "train data.csv --target answer --quiet --drop since")
    line = next(line for line in out.splitlines() if line.startswith("left out"))
    assert line == "left out: 'id' is an identifier, 'since' as asked, 'unit' is constant"


def test_columns_keep_their_types():
    columns = Columns(categorical=["age"]).fit(mixed().drop(columns="answer"))
    assert columns.numeric_ == [] and columns.texts_ == ["age", "town", "member"]
    other = mixed().assign(age="45", since="2021-05-05")
    assert {*columns.transform(other).age} == {"45"}
    columns = Columns().fit(read_table_of(mixed()))
    assert (columns.numeric_, columns.dates_, columns.texts_) == (
        ["age"],
        ["since"],
        ["town", "member", "answer"],
    )
    with pytest.raises(ValueError, match=r"row 2, column 'age': 'old' is not a number; row 3, .*'young'"):
        columns.transform(
            mixed().astype({"age": object}).assign(age=["1", "old", "young"] + [None] * (N - 3))
        )
    with pytest.raises(ValueError, match="there is no column 'town', 'member'"):
        columns.transform(mixed().drop(columns=["town", "member"]))


def read_table_of(frame, name="t.csv", **style):
    frame.to_csv(name, index=False, **style)
    return read_table(name)


def test_a_value_that_was_not_seen_in_training_is_none_of_those_that_were():
    steps = preprocessing(Columns()).fit(mixed()[["town", "age"]])
    x = steps.transform(pd.DataFrame({"town": ["Paris", "Rome"], "age": [30, 40]}))
    assert x[0, -4:].sum() == 0 and x[1, -4:].sum() == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a,b\n", "no data below the header"),
        ("a,a\n1,2\n", "line 1: there are 2 columns 'a'"),
        ("a,b\n1,2\n3\n4,5,6\n", "line 3: 1 fields, but the header has 2; line 4: 3 fields"),
        ('a,b\n"x\ny",2\n3\n', "line 4: 1 fields"),
        (
            "a,b\n" + "1,2\n" * 30 + "x,3\n1,y\n",
            "line 32, column 'a': 'x' .*; line 33, column 'b': 'y' is not a",
        ),
        ("a,b\n" + "1,2\n" * 300 + "x,3\n" * 30, r"'x' is not a number; and 10 more"),
        ("a,b\n" + "1,2\n" * 30 + "1_000,3\n", "'1_000' is not a number"),
        ("a,b\n" + "1,2\n" * 30 + "٤,3\n", "'٤' is not a number"),
        (b"a,b\n1,\xff\n", "UTF-8|utf-8"),
        (b"\x00\x01\x02", "zero bytes"),
    ],
)
def test_the_faults_of_a_table_are_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_table("t.csv")


def test_compressed_and_other_names(tmp_path):
    frame = skewed()
    content = frame.to_csv(index=False).encode()
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(content))
    pd.testing.assert_frame_equal(read_table("t.csv.gz"), frame)
    (tmp_path / "t.tsv").write_text(frame.to_csv(index=False, sep="\t"))
    pd.testing.assert_frame_equal(read_table("t.tsv"), frame)
    (tmp_path / "half.csv.gz").write_bytes(gzip.compress(content)[:-40])
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        read_table("half.csv.gz")
    with pytest.raises(ValueError, match="a table ends in"):
        read_table("t.doc")


def test_labels_are_what_is_written(capsys):
    """01, 1 and 001 were one class."""
    frame = numeric(2, 300)
    frame["code"] = np.array(["01", "1", "001"])[np.arange(300) % 3]
    frame.to_csv("t.csv", index=False)
    assert run(capsys, "train t.csv --target code --task classes --quiet --epochs 1")[0] == 0
    assert _artefact.load_about("runs/t/model.mlpext")["names"] == ["001", "01", "1"]
    names = {f"{1234567 + k}" for k in range(3)}
    frame["code"] = [*names] * 100
    frame.to_csv("u.csv", index=False)
    assert run(capsys, "train u.csv --target code --quiet --epochs 1")[0] == 0
    assert {*_artefact.load_about("runs/u/model.mlpext")["names"]} == names


def test_runs_are_never_mixed(capsys):
    skewed().to_csv("t.csv", index=False)
    common = "train t.csv --target price --quiet --epochs 2"
    assert run(capsys, common)[0] == 0
    assert run(capsys, f"{common} --hidden 8,4 --lr 0.01")[0] == 0
    assert {path.name for path in Path("runs").iterdir()} == {"t", "t-hidden=8,4-lr=0.01"}
    code, _, err = run(capsys, f"{common} --hidden 8 --out runs/t")
    assert code == 1 and "runs/t holds another run (hidden [64] there, [8] here)" in err
    assert run(capsys, f"{common} --hidden 8 --out runs/t --overwrite")[0] == 0
    assert run(capsys, f"{common} --hidden 8 --out runs/t")[0] == 0


def test_a_diverged_run_is_said_and_the_others_are_drawn(capsys, tmp_path):
    code, _, err = run(capsys, "train iris --mode mini-batch --hidden 8 --lr 1e30 --quiet")
    assert code == 1 and err.count("\n") == 1 and "mini-batch mode, lr=1e+30" in err
    code, _, _ = run(capsys, "train iris --reduction sum --quiet --epochs 5 --out sum")
    assert code == 0 and (tmp_path / "sum/loss.png").exists()


def test_search_trains_the_best_of_what_is_not_given(capsys, tmp_path):
    options = "train iris --mode mini-batch --quiet --epochs 5 --out runs/iris"
    code, out, err = run(capsys, f"{options} --search --hidden 8 --loss cross_entropy")
    assert (code, err) == (0, ""), err
    rows = [line.split() for line in out.splitlines()]
    start = rows.index(["hidden", "activation", "lr", "accuracy", "E"]) + 1
    found = rows[start : start + 9]
    assert {row[0] for row in found} == {"8"} and {row[1] for row in found} == {"relu", "tanh", "gelu"}
    reached = [float(row[3].rstrip("%")) for row in found]
    assert reached == sorted(reached, reverse=True)
    config = json.loads((tmp_path / "runs/iris/config.json").read_text())["found"]
    assert config["activation"] == found[0][1] and f"{config['lr']:.3g}" == found[0][2]
    assert (tmp_path / "runs/iris/search.png").exists()


def test_several_seeds(capsys):
    code, out, _ = run(capsys, "train iris --mode mini-batch --seed 0,1 --quiet --epochs 2")
    assert code == 0 and "mini-batch-seed-0" in out and "mini-batch-seed-1" in out


def test_meant_names(capsys):
    for line, meant in (
        ("train --activation ReLU", "relu"),
        ("train --activation swish", "silu"),
        ("train --loss mse", "squared_error"),
        ("train --mode minibatch", "mini-batch"),
        ("train digit", "digits"),
    ):
        code, _, err = run(capsys, line)
        assert code == 2 and f"did you mean {meant}?" in err


def test_info_as_json_and_version(capsys):
    assert json.loads(run(capsys, "info --json")[1])["activations"] == [*mlpext.activations()]
    assert run(capsys, "--version")[1] == f"mlpext {mlpext.__version__}\n"


@pytest.mark.launch
def test_without_the_packages_of_the_extra(tmp_path):
    """info works, and what needs them says what brings them."""
    code = """
import sys
for name in ("pandas", "sklearn", "skops", "matplotlib"):
    sys.modules[name] = None
from mlpext.cli import main
assert main(["info"]) == 0
sys.exit(main(["train", "iris", "--quiet"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'mlpext[train]' brings it" in done.stderr
    assert done.stderr.count("\n") == 1


class Foreign:
    """What no artefact may hold."""


def test_a_foreign_type_is_neither_saved_nor_loaded(tmp_path):
    with pytest.raises(TypeError, match=r"Foreign cannot be saved"):
        mlpext.save({"a": Foreign()}, "model.mlpext")
    content = io.BytesIO(skops.io.dumps({"a": Foreign()}))
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("mlpext.json", json.dumps({"format": 1, "versions": {}, "about": {}}))
    (tmp_path / "model.mlpext").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match=r"Foreign: types that are not trusted"):
        mlpext.load("model.mlpext")


def test_estimators_are_artefacts_too(tmp_path):
    from mlpext.sklearn import MLPClassifier

    data = load("iris")
    model = MLPClassifier((8,), max_iter=50, random_state=0, tol=1.0).fit(data.x.numpy(), data.target.numpy())
    mlpext.save(model, "model.mlpext")
    assert (mlpext.load("model.mlpext").predict(data.x.numpy()) == model.predict(data.x.numpy())).all()


def test_a_network_of_every_kind_of_layer_is_saved(tmp_path):
    network = MLP([4, 6, 5, 6], ["maxout", "elu"], pieces=3, alpha=0.5)
    network.append(GatedLinear(6, 5, "celu", alpha=0.25)).append(GatedLinear(5, 3, "identity", bias=False))
    mlpext.save(Network.of(network, "numbers"), "model.mlpext")
    module, x = mlpext.load("model.mlpext").module_, torch.randn(7, 4)
    assert list(map(repr, module)) == list(map(repr, network))
    assert torch.equal(module(x), network(x))


def malformed(seed, whole):
    """A file that is not what it says, of the bytes of a whole one: its name and content."""
    r = random.Random(seed)
    name = r.choice(["t.csv", "t.npz", "model.mlpext", "t.parquet", "t.csv.gz", "t.tsv"])
    kind = r.choice(["truncated", "mislabelled", "noise", "flipped", "text", "header", "zip"])
    content = whole[r.choice([*whole])]
    if kind == "truncated":
        return name, whole.get(name, content)[: r.randrange(len(whole.get(name, content)))]
    if kind == "mislabelled":
        return name, whole[r.choice([other for other in whole if other != name])]
    if kind == "noise":
        return name, r.randbytes(r.randrange(1, 300))
    if kind == "flipped":
        content = bytearray(whole.get(name, content))
        for _ in range(20):
            content[r.randrange(len(content))] = r.randrange(256)
        return name, bytes(content)
    if kind == "text":
        return name, "".join(r.choices(string.printable, k=200)).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        if kind == "header":  # an array of 2^60 numbers
            shape = (2 ** r.randrange(40, 60), 4)
            header = (
                f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
            )
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x76\x00" + header)
        else:
            archive.writestr(
                "schema.json", json.dumps({"__loader__": r.choice(["ObjectNode", "X"]), "a": [1]})
            )
            archive.writestr(
                "mlpext.json", json.dumps({"format": r.choice([1, 99, "x"]), "versions": {}, "about": {}})
            )
    return name, file.getvalue()


@pytest.mark.thorough
def test_a_hundred_malformed_files_end_in_one_line(capsys, tmp_path):
    frame = skewed()
    frame.to_csv("whole.csv", index=False)
    assert run(capsys, "train whole.csv --target price --quiet --epochs 1")[0] == 0
    np.savez("whole.npz", x=np.ones((9, 2)), target=np.arange(9.0))
    text = (tmp_path / "whole.csv").read_bytes()
    whole = {"t.csv": text, "t.npz": (tmp_path / "whole.npz").read_bytes(), "t.csv.gz": gzip.compress(text)}
    whole["model.mlpext"] = (tmp_path / "runs/whole/model.mlpext").read_bytes()
    ended = 0
    for seed in range(100):
        name, content = malformed(seed, whole)
        folder = tmp_path / f"case {seed}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        if name.endswith(".mlpext"):
            line = ["predict", str(folder / name), "whole.csv", "--out", str(folder / "out.csv")]
        else:
            target = [] if name.endswith(".npz") else ["--target", "price"]
            line = [
                "train",
                str(folder / name),
                *target,
                "--quiet",
                "--epochs",
                "1",
                "--out",
                str(folder / "run"),
            ]
        code, _, err = run_line(capsys, line)
        assert (folder / name).read_bytes() == content
        if code == 0:  # the change is one that a file may have
            continue
        ended += 1
        assert code in (1, 2) and err.splitlines()[-1].startswith("mlpext"), (seed, err)
        assert code == 2 or err.count("\n") == 1, (seed, err)
        assert [path.name for path in folder.iterdir()] == [name], seed
    assert ended > 80


def run_line(capsys, line):
    from mlpext import cli

    try:
        code = cli.main(line)
    except SystemExit as error:
        code = error.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_table_of_200_000_rows_is_read_in_a_second_or_so():
    frame = numeric(20, 200_000).round(4)
    frame.to_csv("big.csv", index=False)
    started = time.process_time()
    assert read_table("big.csv").shape == (200_000, 20)
    assert time.process_time() - started < 10  # 0.4 s where nobody else is; it took 10.6


@pytest.mark.launch
def test_a_table_takes_no_more_than_three_times_its_size():
    numeric(20, 200_000).round(4).to_csv("big.csv", index=False)
    numeric(20, 100).to_csv("small.csv", index=False)
    code = """if True:
        import resource
        from mlpext.tabular import read_table

        def peak():
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        read_table("small.csv")
        before = peak()
        read_table("big.csv")
        print(peak() - before)
    """
    taken = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    assert taken < 3.2 * Path("big.csv").stat().st_size  # 2.6; 4.6 where pandas reads all in one piece


def test_labels_that_begin_as_numbers_stay_what_they_are():
    """Of a long file pandas reads piece by piece, and "01" would be 1 in the first."""
    column = ["01"] * 200_000 + ["1"] + ["A"] * 100_000
    pd.DataFrame({"code": column, "x": 1.5}).to_csv("long.csv", index=False)
    table = read_table("long.csv")
    assert table.code.tolist() == column
    assert table.x.dtype == float
