"""Which calls torch's operators serve: by table, shape and dtype, and by nothing else. A call that torch
serves has torch's bits, which differ from the package's in some of many values."""

import itertools
import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import mlpext.functional as MF
from common import FLOATS, assert_same_bits
from mlpext import _C, _choices, _tune

INTEL = _choices.SHIPPED / "GenuineIntel-6-85-avx512.json"


@pytest.fixture
def use():
    """Puts a table in use until the test ends."""
    before = _choices.in_use
    yield lambda cells: _choices.use(_choices.Choice(cells, "a test"))
    _choices.use(before)


@pytest.fixture
def intel(use):
    use(_choices.cells(_choices.read(INTEL)))


def is_torchs(name, n, dtype=torch.float32):
    x = 3 * torch.randn(n, dtype=dtype)
    return torch.equal(getattr(MF, name)(x), getattr(F, name)(x))


def products(rows, n_in, n_out):
    """y, dx and dW of a layer, ours and torch's."""
    x, w, g = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(rows, n_out)
    y = MF.linear_activation(x, w, None, "relu")
    dx, dw, _ = torch.ops.mlpext.linear_activation_backward(g, x, w, y, "relu", (), True, [True, True, False])
    dz = g * (y > 0)
    return [y, dx, dw], [F.relu(F.linear(x, w)), dz @ w, dz.T @ x]


def served_products(*shape):
    return [torch.equal(a, b) for a, b in zip(*products(*shape), strict=True)]


needs_own_product = pytest.mark.skipif(_C.cpu_isa() == "baseline", reason="torch's products anyway")


def test_without_a_table_everything_is_the_packages(use):
    use({})
    assert not is_torchs("tanh", 1 << 20) and not is_torchs("gelu", 1 << 20)
    if _C.cpu_isa() != "baseline":
        assert served_products(512, 640, 384) == [False] * 3


@pytest.mark.parametrize(
    "name, n, dtype, torchs",
    [
        ("tanh", 64, torch.float32, False),
        ("tanh", 1 << 14, torch.float32, True),
        ("tanh", 1 << 20, torch.float32, True),
        ("tanh", 1 << 20, torch.bfloat16, None),  # bits of 16 rarely differ: only that it runs
        ("gelu", 1 << 14, torch.float32, False),
        ("gelu", 1 << 20, torch.float32, True),
        ("sigmoid", 1 << 20, torch.float32, False),
        ("mish", 1 << 20, torch.float32, False),
        ("softplus", 1 << 20, torch.float32, False),
    ],
)
def test_the_intel_table_leaves_large_tanh_and_gelu_to_torch(intel, name, n, dtype, torchs):
    assert is_torchs(name, n, dtype) == torchs or torchs is None


@needs_own_product
def test_the_intel_table_leaves_large_gradients_to_torch(intel):
    assert served_products(2048, 1000, 1000) == [False, True, True]
    assert served_products(500, 300, 300) == [False] * 3


def test_results_repeat_in_any_order_of_calls(intel):
    rng = random.Random(0)
    calls = []
    for _ in range(60):
        dtype = rng.choice([torch.float32, torch.bfloat16])
        if rng.random() < 0.5:
            f = getattr(MF, rng.choice(["tanh", "gelu", "elu"]))
            x = torch.randn(round(4 ** rng.uniform(0, 10)), dtype=dtype, requires_grad=True)
            calls.append((f, (x,)))
        else:
            rows, n_in, n_out = (round(4 ** rng.uniform(0, 4.5)) for _ in range(3))
            inputs = torch.randn(rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
            f = partial(MF.linear_activation, activation=rng.choice(["tanh", "gelu", "elu"]))
            calls.append((f, [t.to(dtype).requires_grad_() for t in inputs]))

    def results(f, inputs):
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    first = [results(*call) for call in calls]
    for i in rng.sample(range(len(calls)), len(calls)):
        for a, b in zip(first[i], results(*calls[i]), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("cell", [3, 5, 8])
def test_a_cell_is_the_nearest_power_of_4(use, cell):
    """From 4^cell / 2 to 2 4^cell - 1; one below and one above are the neighbours'."""
    use({})
    x = torch.linspace(-9, 9, 2 * 4**cell)
    first, last = 4**cell // 2, 2 * 4**cell - 1
    for low, high in ((first, last), (first - 1, last + 1)):
        assert not any(torch.equal(MF.gelu(x[:n]), F.gelu(x[:n])) for n in (low, high))
    use({("forward", "float32", "gelu"): frozenset([cell])})
    for n, torchs in ((first - 1, False), (first, True), (last, True), (last + 1, False)):
        assert torch.equal(MF.gelu(x[:n]), F.gelu(x[:n])) == torchs, n


@needs_own_product
@pytest.mark.parametrize("product", range(3))
def test_products_count_rows_in_and_out_apart(use, product):
    for rows, n_in, n_out in itertools.permutations((100, 400, 1600)):
        cell = _choices._product_cell(tuple(side.bit_length() // 2 for side in (rows, n_in, n_out)))
        use({(_choices.OPERATIONS[2 + product], "float32", ""): frozenset([cell])})
        served = served_products(rows, n_in, n_out)
        for i, terms in enumerate((n_in, n_out, rows)):
            if i == product or terms > 300:  # sums of few terms have the same bits
                assert served[i] == (i == product), (rows, n_in, n_out)


@pytest.mark.parametrize("served", [("linear_dx",), ("linear_dw",), ("linear_dx", "linear_dw")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ["elu", "identity"])
def test_one_gradient_by_torch_and_the_others_not(use, served, dtype, activation):
    everything = frozenset(range(_C.SIDE_CELLS**3))
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((300, 70), (90, 70), (90,))]
    g = torch.randn(300, 90, dtype=dtype)

    def gradients():
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = MF.linear_activation(*leaves, activation)
        return torch.autograd.grad(y, leaves, g)

    use({})
    expected = gradients()
    use({(product, str(dtype)[6:], ""): everything for product in served})
    for own, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(own, other, atol=0.1 if dtype.itemsize == 2 else 1e-3, rtol=2e-2)


def test_the_nearest_size_measured_decides(tmp_path):
    table = {"ratios": {"forward": {"float32": {"elu": {"100": 2.0, "100000": 0.5}}}}}
    served = _choices.cells(table)["forward", "float32", "elu"]
    assert served == set(range(6, _C.VALUE_CELLS))  # 4^5.8 is half way, in logarithms
    table = {"ratios": {"linear_dw": {"float32": {"16x16x16": 1.0, "1024x1024x1024": 0.9}}}}
    served = _choices.cells(table)["linear_dw", "float32", ""]
    cell = _choices._product_cell
    assert {cell((2, 2, 2)), cell((3, 3, 3)), cell((0, 7, 2))}.isdisjoint(served)
    assert {cell((5, 5, 5)), cell((4, 4, 4)), cell((7, 7, 7)), cell((0, 7, 5))} <= served


def test_the_safe_side_leaves_large_products_to_torch(use):
    served = _choices.safe()
    for product in _choices.OPERATIONS[2:]:
        assert _choices._product_cell((5, 5, 5)) in served[product, "float32", ""]
        assert _choices._product_cell((2, 3, 3)) not in served[product, "float32", ""]


@pytest.mark.parametrize("file", sorted(_choices.SHIPPED.glob("*.json")), ids=lambda file: file.name)
def test_shipped_tables_are_tables(file):
    table = _choices.read(file)
    assert table["isa"] in file.name
    _choices.cells(table)


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True
    )


def in_use(**environment):
    program = "import mlpext; print(mlpext._choices.in_use.source)"
    return run("-c", program, **environment)


def write(path, ratios, **changes):
    table = {"cpu": "", "isa": "avx512", "versions": _choices.versions(), "ratios": ratios, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_choices.text(table))


@pytest.mark.launch
def test_which_table_is_used(tmp_path):
    """MLPEXT_TUNE, else the user's own of these versions, else the package's."""
    empty = {"MLPEXT_TUNE": "", "XDG_CACHE_HOME": str(tmp_path)}
    own = tmp_path / "mlpext" / _choices.file_name()
    shipped = in_use(**empty).stdout
    assert "mlpext's" in shipped or "safe side" in shipped
    write(own, {})
    assert in_use(**empty).stdout == f"{own}\n"
    assert "MLPEXT_TUNE=0" in in_use(**{**empty, "MLPEXT_TUNE": "0"}).stdout
    assert str(INTEL) in in_use(**{**empty, "MLPEXT_TUNE": str(INTEL)}).stdout
    write(own, {}, versions={"mlpext": "0", "torch": "1"})
    assert in_use(**empty).stdout.startswith(shipped.strip()) and str(own) in in_use(**empty).stdout
    own.write_text("{")
    broken = in_use(**empty)
    assert broken.stdout == shipped and str(own) in broken.stderr


@pytest.mark.launch
@pytest.mark.parametrize("content", [None, "", "[]", '{"ratios": 1}', '{"ratios": {"sideways": {}}}'])
def test_a_wrong_MLPEXT_TUNE_is_refused(tmp_path, content):
    file = tmp_path / "table.json"
    if content is not None:
        file.write_text(content)
    done = in_use(MLPEXT_TUNE=str(file))
    assert done.returncode == 1 and str(file) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "ratios",
    [
        {"forward": {"float32": {"tanhh": {"4": 1}}}},
        {"forward": {"float31": {}}},
        {"forward": {"float32": {"tanh": {"x": 1}}}},
        {"forward": {"float32": {"tanh": {"4": "much"}}}},
        {"linear_dw": {"float32": {"4x4": 1.0}}},
        {"linear_dw": {"float32": {"4x4x0": 1.0}}},
    ],
)
def test_what_is_no_table_is_refused(tmp_path, ratios):
    write(tmp_path / "table.json", ratios)
    with pytest.raises(ValueError, match="table.json"):
        _choices.read(tmp_path / "table.json")


@pytest.mark.launch
def test_tune_writes_the_table_that_is_used_from_then_on(tmp_path, monkeypatch, capsys):
    """Of a few sizes here: all of them take minutes."""
    from mlpext.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_tune, "SIZES", [64])
    monkeypatch.setattr(_tune, "SIDES", [1, 16])
    monkeypatch.setattr(_tune, "SAMPLE_NS", 1)
    before = _choices.in_use, torch.get_rng_state()
    assert main(["tune"]) == 0
    assert _choices.in_use is before[0] and torch.equal(before[1], torch.get_rng_state())
    assert str(_choices.user_file()) in capsys.readouterr().out
    table = json.loads(_choices.user_file().read_text())
    assert list(table["ratios"]) == list(_choices.OPERATIONS)
    assert set(table["ratios"]["forward"]["float32"]) == set(_C.activations()) - {"identity"}
    assert len(table["ratios"]["linear_dw"]["bfloat16"]) == 8
    assert in_use(MLPEXT_TUNE="").stdout == f"{_choices.user_file()}\n"
    assert main(["tune", "--out", str(tmp_path / "here.json")]) == 0
    assert in_use(MLPEXT_TUNE=str(tmp_path / "here.json")).returncode == 0
