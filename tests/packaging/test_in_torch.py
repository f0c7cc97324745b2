"""torch's operators in the place of the compiled library: the same names and numbers, and all that is public
works. The whole suite runs so under MLPEXT_EXTENSION=0 (`make test-torch`), some of it here."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlpext
from mlpext import _C, _C_in_torch, _extension, cli
from mlpext.training import fit, fit_many

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

in_torch = pytest.mark.skipif(_extension.missing is None, reason="the compiled library is in use")

# What only the native engine, the package's own loops and their tests ask for.
ABSENT = {
    *("register_fallback", "pool_limit", "set_pool_limit", "pool_bytes"),
    *("has_kernel", "run_epoch", "losses"),
}


def python(*arguments, folder=ROOT, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "MLPEXT_EXTENSION": "0", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_names_and_arguments_are_the_librarys():
    stub = ast.parse((Path(mlpext.__file__).parent / "_C.pyi").read_text()).body
    values = {node.target.id for node in stub if isinstance(node, ast.AnnAssign)}
    functions = {node.name: node.args for node in stub if isinstance(node, ast.FunctionDef)}
    absent = {name for name in values | functions.keys() if not hasattr(_C_in_torch, name)}
    assert absent == ABSENT
    for name, wanted in functions.items():
        if name not in ABSENT:
            own = inspect.signature(getattr(_C_in_torch, name)).parameters.values()
            defaults = [ast.literal_eval(default) for default in wanted.defaults]
            assert [parameter.name for parameter in own] == [argument.arg for argument in wanted.args], name
            assert [p.default for p in own if p.default is not p.empty] == defaults, name


@pytest.mark.native
def test_lists_are_the_librarys():
    assert list(_C_in_torch.activations().items()) == list(_C.activations().items())
    assert _C_in_torch.MODULE_HOOKS == _C.MODULE_HOOKS


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 + 5, 2**63 + 12345])
def test_masks_of_dropout_are_the_librarys_bit_by_bit(seed, dtype):
    for p, epoch, layer in [(0.0, 1, 0), (0.1, 1, 0), (0.5, 2**32 - 1, 3), (0.999, 7, 1)]:
        for first, rows, units in [(0, 7, 1), (3, 5, 33), (2**32 - 2, 4, 64), (10**6, 1, 130), (0, 3, 0)]:
            arguments = p, seed, epoch, layer, first, rows, units, dtype
            actual, expected = _C_in_torch.dropout_mask(*arguments), _C.dropout_mask(*arguments)
            assert actual.dtype == dtype and torch.equal(actual, expected), arguments
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="dropout: expected 0 <= p < 1"):
            _C_in_torch.dropout_mask(wrong, seed, 1, 0, 0, 1, 1, dtype)


@pytest.mark.native
def test_sums_of_an_epoch_are_the_librarys():
    o, rows = torch.randn(50, 4).round(decimals=1), torch.randperm(60)[:50]
    d, labels = torch.randn(60, 4).double(), torch.randint(4, (60,))
    d[:, 1] = 5.0  # constant: its spread is 0
    exact = torch.cat([o[:, :1], d[rows][:, 1:2], o[:, 2:]], 1)
    for target in (d, labels):
        for part, of in ((target, rows), (target[:50], None)):
            assert torch.equal(_C_in_torch.count_correct(o, part, of), _C.count_correct(o, part, of))
    for output in (o, exact):
        errors = [which.squared_errors(output, d, rows) for which in (_C_in_torch, _C)]
        torch.testing.assert_close(*errors)
        spreads = [which.spread(d.split(17)) for which in (_C_in_torch, _C)]
        assert spreads[0] == pytest.approx(spreads[1], rel=1e-12) and spreads[0][1] == 0
        assert _C_in_torch.r2(errors[0], spreads[0]) == pytest.approx(_C.r2(errors[1], spreads[1]), rel=1e-12)
    losses = torch.rand(4, dtype=torch.float64)
    assert _C_in_torch.mean_loss(losses, 16, 50) == pytest.approx(_C.mean_loss(losses, 16, 50), rel=1e-15)
    for value in (1.0, torch.inf, torch.nan):
        tensors = [torch.zeros(3), torch.tensor([[1.0, value]])]
        assert _C_in_torch.all_finite(tensors) == _C.all_finite(tensors) == (value == 1.0)


@pytest.mark.launch
@pytest.mark.native
def test_a_run_has_the_librarys_weights(tmp_path):
    """With dropout, whose masks are the same numbers; the file is read by the other."""
    program = """
import sys, torch, mlpext
torch.manual_seed(3)
x = torch.randn(100, 6, dtype=torch.float64)
d = torch.stack([x.sin().sum(1), x.square().sum(1)], 1)
model = mlpext.nn.MLP([6, 16, 8, 2], ["gelu", "maxout"], dropout=0.3, dtype=torch.float64)
history = mlpext.training.fit(model, x, d, epochs=4, batch_size=7, lr=0.01, progress=False, l2=1e-3, seed=1)
torch.save([history["loss"], model.state_dict()], sys.argv[1])
"""
    runs = []
    for extension in "01":
        file = tmp_path / f"{extension}.pt"
        ran = python("-c", program, file, MLPEXT_EXTENSION=extension)
        assert ran.returncode == 0, ran.stderr
        runs.append(torch.load(file))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.launch
def test_who_asks_for_it_is_not_warned_and_a_wrong_value_is_refused():
    ran = python("-W", "error", "-c", "import mlpext; print(mlpext._C.__name__)")
    assert (ran.stdout, ran.stderr) == ("mlpext._C_in_torch\n", "")
    ran = python("-c", "import mlpext", MLPEXT_EXTENSION="no")
    assert ran.stderr.endswith("ValueError: MLPEXT_EXTENSION: 'no', expected 0 or 1\n")


@pytest.mark.launch
@pytest.mark.skipif(_extension.missing is not None, reason="this is such a run already")
def test_some_of_everything_runs_so():
    """A case or two of each test of the folders below, by torch's operators; `make test-torch` runs all."""
    parts = ["functional", "nn", "fusion/test_fuse.py", "training/test_fit.py", "training/test_options.py"]
    parts += [
        "training/test_losses.py",
        "training/test_fit_many.py",
        "cli/test_cli.py",
        "packaging/test_in_torch.py",
    ]
    marks = "not (slow or cuda or compile or emulator or launch or thorough or native)"
    ran = python("-m", "pytest", "-q", "-m", marks, "--every", 40, *(TESTS / part for part in parts))
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert " passed" in ran.stdout


# What differs, where torch's operators are in use.


@in_torch
@pytest.mark.parametrize("options", [{}, {"mode": "stochastic"}, {"mode": "batch", "momentum": 0.9}], ids=str)
def test_the_native_engine_says_why_not_and_auto_takes_the_loop(options):
    x, d = torch.randn(20, 3), torch.randn(20, 2)
    models = [mlpext.nn.MLP([3, 4, 2], "tanh") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"epochs": 3, "progress": False, **options}
    why = f"engine='native' cannot train this.*{re.escape(_extension.missing)}"
    with pytest.raises(ValueError, match=why):
        fit(models[0], x, d, engine="native", **options)
    with pytest.raises(ValueError, match=why):
        fit_many([models[0]], x, d, engine="native", **options)
    for model, engine in zip(models, ("auto", "autograd"), strict=True):
        fit(model, x, d, engine=engine, seed=1, **options)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@in_torch
def test_the_command_line_says_so(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert _extension.missing in said and "\nMLPEXT_EXTENSION" in said
    assert cli.main(["info", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["environment"]["MLPEXT_EXTENSION"] == os.environ.get("MLPEXT_EXTENSION")
    assert said["torch serves"] == "every operator"
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().err.startswith("mlpext: error: there is nothing to tune: ")
