"""Every `>>>` example in the package's docstrings runs, and prints what stands below it.

Not by pytest's --doctest-modules: with a conftest.py beside the package, pytest would import the mlpext of
this folder, also where a build elsewhere is to be tested (`make coverage`).
"""

import doctest
import importlib
import pkgutil

import pytest
import torch

import mlpext

MODULES = [mlpext.__name__, *(m.name for m in pkgutil.walk_packages(mlpext.__path__, "mlpext."))]
EXAMPLES = [
    example
    for name in MODULES
    if not name.endswith((".__main__", "._C"))
    for example in doctest.DocTestFinder().find(importlib.import_module(name), globs={})
    if example.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    x, weight, bias = torch.randn(2, 5), torch.randn(3, 5), torch.randn(3)
    example.globs = {"torch": torch, "mlpext": mlpext, "x": x, "weight": weight, "bias": bias}
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert not failed, "".join(report)


def test_every_function_and_layer_has_an_example():
    names = {example.name for example in EXAMPLES}
    functions = [
        name
        for name, value in vars(mlpext.functional).items()
        if callable(value) and value.__module__ == "mlpext.functional"
    ]
    public = [f"mlpext.functional.{name}" for name in functions if not name.startswith("_")]
    assert {*public, "mlpext.nn._networks.MLP", "mlpext.fusion.fuse"} <= names
