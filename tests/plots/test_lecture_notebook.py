"""The lecture's notebook runs from top to bottom, here without Jupyter, and its asserts can fail."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib import pyplot

NOTEBOOK = json.loads((Path(__file__).parents[2] / "examples" / "lecture.ipynb").read_text())
ROWS = [
    "1. Objects",
    "2. Neuron",
    "3. Activation functions",
    "4. Layer and multilayer perceptron",
    "5. Training by gradient descent",
]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The notebook sets defaults for its reader, which other tests must not see."""
    dtype, seed = torch.get_default_dtype(), torch.get_rng_state()
    pyplot.switch_backend("agg")
    yield
    torch.set_default_dtype(dtype)
    torch.set_rng_state(seed)
    torch.set_printoptions(profile="default")
    pyplot.close("all")


def run(change=lambda source: source):
    """Run the code cells, each changed; the names that they leave."""
    names = {"__name__": "__main__"}
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for number, source in enumerate(map(change, code), 1):
        exec(compile(source, f"<cell {number}>", "exec"), names)
    return names


def test_every_cell_runs(capsys):
    names = run()
    printed = capsys.readouterr().out
    for factor in ("dE/de   (1 x 2)", "de/do2   (2 x 2)", "do2/dnet2   (2 x 2)", "dnet2/dW2   (1 x 3)"):
        assert f"\n{factor}\n" in printed or printed.startswith(factor)
    for factor in ("dnet2/do1   (3 x 2)", "do1/dnet1   (3 x 3)", "dnet1/dW1   (1 x 2)", "dE/dW1   (2 x 3)"):
        assert f"\n{factor}\n" in printed
    assert {*names["paths"]} == {"stochastic", "mini-batch", "batch"}
    assert [len(path) for path in names["paths"].values()] == [81, 41, 41]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("dE_do1 = dE_dnet2 @ dnet2_do1.T", "dE_do1 = dE_dnet2 @ dnet2_do1.T * 1.001"),
        ("torch.diag(-torch.ones(2))", "torch.diag(torch.ones(2))"),
        ("return [W - eta * dE_dW for", "return [W + eta * dE_dW for"),
        ('"tanh": lambda x: 1 - torch.tanh(x) ** 2', '"tanh": lambda x: 1 - torch.tanh(x)'),
    ],
)
def test_a_wrong_formula_is_noticed(right, wrong):
    assert any(right in "".join(cell["source"]) for cell in NOTEBOOK["cells"])
    with pytest.raises(AssertionError):
        run(lambda source: source.replace(right, wrong))


def test_sections_have_the_titles_of_the_lecture_and_no_output_is_committed():
    lines = [line for cell in NOTEBOOK["cells"] for line in "".join(cell["source"]).split("\n")]
    assert [line[3:] for line in lines if line.startswith("## ")] == [*ROWS, "What next"]
    rows = (Path(__file__).parents[2] / "docs" / "lecture.md").read_text()
    for number, title in (row.split(". ") for row in ROWS):
        assert f"| {number} | {title} |" in rows
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
