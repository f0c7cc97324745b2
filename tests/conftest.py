import os
import signal
from collections import Counter

import hypothesis
import pytest
import torch

# A job that a script starts in the background ignores Ctrl-C, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests are of the package's own loops, wherever torch's are faster: before mlpext is imported.
os.environ.setdefault("MLPEXT_TUNE", "0")

import mlpext  # noqa: E402

# Without the compiled library torch's operators are in its place: numbers, bits and memory are torch's (gelu
# is 0 below -5.5, sigmoid below -88), and there is neither torch.ops.mlpext nor the native engine. Tests of
# what the library alone promises have the mark `native`.
compiled = mlpext._extension.missing is None
collect_ignore = [] if compiled else ["cpu", "cuda"]

hypothesis.settings.register_profile(
    "mlpext", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("mlpext")


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="of more than ten cases, every Nth")


def pytest_collection_modifyitems(config, items):
    """`make quick` takes every fifth case of the long tables. Without the library, what needs it is skipped:
    the mark `native`, or the parameter engine="native"."""
    if not compiled:
        for item in items:
            engine = item.callspec.params.get("engine") if hasattr(item, "callspec") else None
            if item.get_closest_marker("native") or engine == "native":
                item.add_marker(pytest.mark.skip(reason=f"no compiled library: {mlpext._extension.missing}"))
    every = config.getoption("every")
    functions = [item.nodeid.partition("[")[0] for item in items]
    cases, seen = Counter(functions), Counter()
    left = []
    for item, function in zip(items, functions, strict=True):
        if cases[function] <= 10 or seen[function] % every == 0:
            left.append(item)
        seen[function] += 1
    config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
    items[:] = left


@pytest.fixture(autouse=True)
def _same_start():
    """One thread (or MLPEXT_TEST_THREADS) and one seed for every test; what a test changes, the next does not
    see."""
    threads = int(os.environ.get("MLPEXT_TEST_THREADS", "1"))
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_loops():
    """For what is promised of the package's own loops alone: torch's run nowhere, whatever table is used."""
    from mlpext import _choices

    before = _choices.in_use
    _choices.use(_choices.Choice({}, "own_loops"))
    yield
    _choices.use(before)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
