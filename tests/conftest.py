import os
import signal

import hypothesis
import pytest
import torch

# A job that a script starts in the background ignores Ctrl-C, and so would what the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "mlpext", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("mlpext")


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
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
