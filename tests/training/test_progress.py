"""The bar of a run, and one bar over several."""

import io

import torch
from tqdm import tqdm

from fit_helpers import classes, network, train
from mlpext.training import _progress

N = 50


def bar_to(text, samples):
    return tqdm(total=samples, file=text, disable=False, mininterval=0, miniters=0)


def test_one_bar_over_several_runs():
    text = io.StringIO()
    bar = bar_to(text, 3 * 4 * N)
    for run in range(3):
        bar.set_description(f"run {run}")
        train(network(), *classes(N), epochs=4, progress=bar)
        assert bar.n == (run + 1) * 4 * N and not bar.disable
    assert "run 1" in text.getvalue() and "loss=" in text.getvalue()


def test_a_run_that_ends_early_leaves_nothing_to_wait_for(tmp_path):
    bar = bar_to(io.StringIO(), 2 * 9 * N)
    stop_at_2 = [lambda epoch: epoch.epoch == 2]
    assert len(train(network(), *classes(N), epochs=9, progress=bar, callbacks=stop_at_2)) == 2
    assert bar.n == 9 * N
    train(network(), *classes(N), epochs=4, checkpoint=tmp_path, seed=1)
    train(network(), *classes(N), epochs=9, checkpoint=tmp_path, seed=1, resume=True, progress=bar)
    assert bar.n == 2 * 9 * N


def test_the_bar_of_one_run_begins_where_the_run_does(monkeypatch, tmp_path):
    bars = []
    monkeypatch.setattr(_progress, "bar_of", lambda samples, done: bars.append((samples, done)))
    train(network(), *classes(N), epochs=4, checkpoint=tmp_path, progress=True)
    train(network(), *classes(N), epochs=6, checkpoint=tmp_path, progress=True, resume=True)
    train(network(), *classes(N), epochs=6, progress=False)
    assert bars == [(4 * N, 0), (6 * N, 4 * N)]


def test_the_bar_is_told_of_the_same_run():
    losses = [
        train(network(), *classes(N), progress=progress).step_losses
        for progress in (False, bar_to(io.StringIO(), 3 * N))
    ]
    assert torch.equal(*losses)
