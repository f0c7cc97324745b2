"""Includes and imports go one way: down the layers of docs/architecture.md, and never in a circle."""

import ast
import fnmatch
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = "torch|ATen|c10|pybind11"
# Files (by fnmatch, whose * takes slashes too), and the beginnings of what they must not include or import.
RULES = [
    ("csrc/formulas/*", rf"({TORCH}|ops|cpu|cuda|python)/"),
    ("csrc/ops/*", r"(cpu|cuda|python)/"),
    ("csrc/cpu/*", r"(cuda|python)/"),
    ("csrc/cuda/*", r"(cpu|python)/"),
    ("csrc/*.cu", rf"({TORCH})/"),
    ("csrc/*.cuh", rf"({TORCH})/"),
    ("mlpext/[!_c]*", r"mlpext\.cli\b"),
    ("mlpext/_choices.py", r"mlpext\.(functional|nn|fusion|training|data|plots|_tune)\b"),
    ("mlpext/functional.py", r"mlpext\.(nn|fusion|training|data|plots)\b"),
    ("mlpext/nn.py", r"mlpext\.(fusion|training|data|plots)\b"),
    ("mlpext/fusion/*", r"mlpext\.(training|data|plots)\b"),
    ("mlpext/training/*", r"mlpext\.fusion\b"),
    ("mlpext/training/engines/*", r"mlpext\.training\.(_fit|_fit_many|_loop)\b|mlpext\.training$"),
]


def includes(file: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"](.+?)[>"]', file.read_text(), re.MULTILINE))


def module_of(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a tree, without what is for type checkers alone."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])
        yield child
        yield from nodes(child)


def imports(file: Path, modules: set[str]) -> set[str]:
    """The modules that a file imports, inside functions too."""
    found = set()
    for node in nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found


def graph(root: Path) -> dict[str, set[str]]:
    """What each file of csrc/ and mlpext/ includes or imports, by its path."""
    sources = [file for file in root.glob("csrc/**/*") if file.suffix in (".h", ".cpp", ".cuh", ".cu")]
    python = list(root.glob("mlpext/**/*.py"))
    modules = {module_of(file, root) for file in python} | {"mlpext._C"}
    edges = {file: includes(file) for file in sources} | {file: imports(file, modules) for file in python}
    return {str(file.relative_to(root)): targets for file, targets in edges.items()}


def upwards(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{file}: {target}"
        for pattern, forbidden in RULES
        for file in fnmatch.filter(edges, pattern)
        for target in edges[file]
        if re.match(forbidden, target)
    ]


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The files of one circle, or none."""
    names = {file.removeprefix("csrc/"): file for file in edges}
    names |= {module_of(Path(file), Path()): file for file in edges if file.endswith(".py")}
    inner = {file: {names[target] for target in found if target in names} for file, found in edges.items()}
    try:
        graphlib.TopologicalSorter(inner).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_nothing_goes_upwards():
    assert upwards(graph(ROOT)) == []


def test_nothing_goes_in_a_circle():
    assert circle(graph(ROOT)) == []


FAULTS = {
    "a formula that knows torch": {"csrc/formulas/f.h": "#include <ATen/Tensor.h>"},
    "cpu that knows cuda": {"csrc/cpu/gemm/g.h": '#include "cuda/kernels.h"'},
    "headers in a circle": {"csrc/ops/a.h": '#include "ops/b.h"', "csrc/ops/b.h": '#include "ops/a.h"'},
    "nn that knows training": {"mlpext/nn.py": "def f():\n    from mlpext.training import fit"},
    "modules in a circle": {"mlpext/a.py": "import mlpext.b", "mlpext/b.py": "def f(): from mlpext import a"},
}


@pytest.mark.parametrize("files", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = graph(tmp_path)
    assert bool(upwards(edges)) + bool(circle(edges)) == 1


def test_what_only_type_checkers_import_does_not_count(tmp_path):
    file = tmp_path / "nn.py"
    file.write_text("if typing.TYPE_CHECKING:\n    from mlpext.training import fit")
    assert imports(file, set()) == set()
