"""`fit_many`: several fits at a time, each in a thread of its own.

A thread trains one model after another. Ctrl-C, and an error in one of them, reach the others through the
list `stop`, at which each looks between two steps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mlpext.training._arguments import count
from mlpext.training._fit import Context, fit_beside
from mlpext.training._modules import device_of
from mlpext.training._ranks import Ranks
from mlpext.training._samples import Array, to_storage
from mlpext.training.engines import native_on
from mlpext.training.engines._graph_group import Group
from mlpext.training.engines.cuda_graphs import CudaGraphsEngine
from mlpext.training.history import History


def fit_many(
    models: Sequence[nn.Module],
    x: Array,
    target: Array,
    *,
    each: Sequence[Mapping[str, Any]] | None = None,
    threads: int | None = None,
    **options: Any,
) -> list[History]:
    """Train several models on the same data, each as `fit` would alone, to the same bits; several at a time.
    On CUDA, engine="native" trains those of one shape as batched products; then it is to rounding.

        nets = [mlpext.nn.MLP([64, 64, 10], "tanh") for _ in range(64)]
        histories = fit_many(nets, x, labels, epochs=5, each=[{"lr": lr} for lr in rates])

    Args:
        models: different modules, of any shapes. Epochs of the native engine run beside one another; the
            PyTorch loop of one model waits for that of another wherever it runs Python.
        x: as for `fit`.
        target: as for `fit`.
        each: the options of each model that are its own, one mapping a model.
        threads: models trained at a time; None takes torch.get_num_threads(). Batched products take all.
        **options: as for `fit`. `checkpoint` and `log_dir` become a folder with one for each model: 0, 1, ...

    Raises what `fit` raises, once the other models under way have stopped after the step that they were in;
    ValueError for a model given twice, a wrong number of `each`, or several ranks (`fit` takes those).
    """
    if (size := Ranks("cpu").size) > 1:
        raise ValueError(f"fit_many takes one process, and this is one of {size} ranks; fit trains on them")
    if len({id(model) for model in models}) != len(models):
        raise ValueError("models: one is given twice; each must be a module of its own")
    if each is not None and len(each) != len(models):
        raise ValueError(f"each has {len(each)} entries, expected one for each of {len(models)} models")
    threads = torch.get_num_threads() if threads is None else count("threads", threads, 1)
    devices = {device_of(model) for model in models}
    if options.get("device") is not None:
        devices = {torch.device(options["device"])}
    group = None
    if options.get("engine") == "native" and {native_on(device) for device in devices} == {CudaGraphsEngine}:
        threads = len(models)
        group = Group(threads)
        dtypes = {weight.dtype for model in models for weight in model.parameters()}
        if len(devices) == len(dtypes) == 1:
            stored = functools.partial(to_storage, device=devices.pop(), dtype=dtypes.pop())
            x, target = stored(x), stored(target)
    histories: list[History | None] = [None] * len(models)
    stop: list[int] = []
    errors: list[BaseException] = []
    todo = iter(range(len(models)))

    def work(finished: threading.Event) -> None:
        try:
            for index in todo:
                own = {"progress": False, **options, **(each[index] if each is not None else {})}
                for folder in ("checkpoint", "log_dir"):
                    if options.get(folder) is not None and own[folder] is options[folder]:
                        own[folder] = os.path.join(options[folder], str(index))
                with contextlib.nullcontext() if group is None else group.member(index) as run_job:
                    if not stop:
                        context = Context(stop, run_job=run_job)
                        histories[index] = fit_beside(context, models[index], x, target, own)
        except BaseException as error:
            errors.append(error)
            stop.append(1)
        finished.set()

    # Events, because a Thread.join that Ctrl-C interrupts takes the thread for dead (Python 3.11).
    ends = [threading.Event() for _ in range(threads)]
    workers = [threading.Thread(target=work, args=(end,), name="mlpext-fit") for end in ends]
    try:
        for worker in workers:
            worker.start()
        for end in ends:
            end.wait()
    except BaseException:  # Ctrl-C
        stop.append(1)
        for worker, end in zip(workers, ends, strict=True):
            if worker.ident is not None:
                end.wait()
        raise
    if errors:
        raise errors[0]
    return [history for history in histories if history is not None]
