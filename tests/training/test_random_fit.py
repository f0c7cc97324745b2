"""Random training runs against NumPy's: every way into `fit`, drawn and compared as random_fits.py has it.

`make fuzz` goes on where these stop. A case that fails is printed as it can be put here, as an example.
"""

import dataclasses
import os
import random
import sys

import hypothesis
import pytest
import torch

import mlpext
import reference
from common import drawn, examples
from random_fits import Case, Place, check, draw
from test_ranks import torchrun

pytestmark = pytest.mark.native


@pytest.mark.thorough
@pytest.mark.isa
@drawn(300)
def test_a_random_fit_is_the_references(r):
    """Losses and metrics of every epoch, and the movement of every weight."""
    case = draw(r)
    hypothesis.note(case)
    check(case)


def test_the_reference_knows_every_activation():
    """The names come from the package: one that reference.py lacks would never be drawn."""
    assert set(mlpext.activations()) <= set(reference.ACTIVATIONS)


EIGHT = (Place(8), Place(4, "identity"))


@pytest.mark.isa
@examples(
    *(
        Case(5, (Place(width, *hidden), Place(width, "identity")), 33, dtype=dtype, mode=mode)
        for dtype, width in (("float32", 16), ("float32", 17), ("float64", 8), ("float64", 9))
        for hidden in (("tanh",), ("maxout", (), 3), ("silu", (), 0, True))
        for mode in ("stochastic", "mini-batch", "batch")
    ),
    Case(5, (Place(16, "identity"),), 40, dtype="float32", target="classes", loss="cross_entropy"),
    Case(5, (Place(8, "identity"),), 40, target="classes", loss="cross_entropy"),
)
def test_as_many_outputs_as_a_register_of_avx512_has_lanes(case):
    """With 16 float32 or 8 float64 outputs, or more, the native engine trained other weights on AVX-512."""
    assert check(case) is not None


@examples(
    *(
        Case(3, EIGHT, rows, mode=mode, **layout, batch_size=batch_size, **target)
        for rows, mode, batch_size in (
            *((rows, "batch", 8) for rows in (100, 1000, 1023, 1024, 1025, 2049)),
            *((2049, "mini-batch", batch_size) for batch_size in (48, 1000, 1500, 2049)),
        )
        for layout in ({"x_layout": "memmap"}, {"x_layout": "transposed"}, {"d_layout": "rows apart"})
        for target in ({}, {"target": "classes", "loss": "cross_entropy"})
    )
)
def test_rows_that_come_in_blocks(case):
    """A memory map, or what is not contiguous, is read a block at a time. Batch mode of fewer than 1024 rows
    was refused then, "block_size", unless they divide 1024; of more, some counted twice in the metric."""
    assert check(case) is not None


SQUARE = Place(6)


@examples(
    *(
        Case(6, places, 40, engine=engine, container=container)
        for engine in ("native", "auto", "autograd")
        for places in (
            (SQUARE, Place(6, again=0), Place(6, "identity")),
            (SQUARE, Place(6, "identity"), Place(6, again=0)),
            (SQUARE, Place(6, "identity", weight_of=0)),
        )
        for container in ("MLP", "Sequential")
    ),
    Case(4, (Place(4, "identity"), Place(4, "identity", again=0)), 40, container="Sequential"),
)
def test_a_module_that_stands_twice(case):
    """`Sequential(l, l, m)`, `net[1] = net[0]` and `MLP([4, 4]) * 2` were trained without the second one."""
    assert check(case) is not None


@examples(
    *(
        Case(5, EIGHT, 40, engine=engine, optimizer=optimizer, halved_by=way)
        for engine in ("native", "auto", "autograd")
        for optimizer in ("SGD", "Adam", "AdamW")
        for way in ("a step of its own", "step hook", "global hook", "gradient hooks")
    )
)
def test_what_stands_between_gradient_and_step(case):
    """A `step` wrapped on the optimizer itself, and torch's global hooks, were passed by."""
    assert check(case) is not None


@examples(
    *(
        Case(5, EIGHT, 40, engine=engine, epochs=4, optimizer=optimizer, momentum=momentum, callback=callback)
        for engine in ("native", "auto", "autograd")
        for optimizer, momentum in (("", 0.0), ("", 0.9), ("SGD", 0.9), ("Adam", 0.0))
        for callback in ("look", "clamp", "freeze", "alternate", "double", "prune", "append", "halve lr")
        if optimizer or callback != "halve lr"
        if not optimizer or callback != "append"
    )
)
def test_callbacks_that_touch_the_model(case):
    """Layers that a callback froze, freed, hooked, pruned or added were trained as they had been before; of
    Adam's, a layer that was frozen and freed again had counted the steps that it did not make."""
    assert check(case) is not None


@examples(
    *(
        Case(1, (Place(1, "identity"),), rows, 0, "bfloat16", values="zero", mode="batch", epochs=1, lr=1.0)
        for rows in (1, 2**12, 2**19)
    )
)
def test_batch_mode_adds_up_in_more_than_16_bits(case):
    """From zero to b = 1 in one step. Of 512 chunks whose gradients met in bfloat16, half were lost."""
    assert check(case) is not None


@examples(
    *(
        Case(5, EIGHT, 40, engine=engine, epochs=4, resumed_after=2, callback="clamp", **rule)
        for engine in ("native", "autograd")
        for rule in ({}, {"momentum": 0.9}, {"optimizer": "Adam"}, {"validation": 0.25})
    )
)
def test_a_resumed_run_has_what_callbacks_left(case):
    """The checkpoint was written before the callbacks clamped: two epochs and two more were not four."""
    assert check(case) is not None


def as_rank(folder):
    """What each of two gloo ranks does: random cases until 60 of them have been told right from wrong."""
    torch.set_num_threads(1)
    r, told = random.Random(1), 0
    while told < 60:
        case = draw(r)
        if case.resumed_after or case.together > 1 or case.dtype == "bfloat16" or case.rows < 4:
            continue
        mode = "mini-batch" if case.mode == "stochastic" else case.mode
        case = dataclasses.replace(case, mode=mode, batch_size=max(case.batch_size, 2), threads=1)
        try:
            told += check(case, ranks=2) is not None
        except Exception:
            print(case)
            raise
    torch.save(told, f"{folder}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.launch
def test_random_fits_on_two_ranks(tmp_path):
    """Both have the weights of the reference, which knows of no ranks."""
    assert torchrun(as_rank, tmp_path) == [60, 60]


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
