"""Accumulation windows (check C22 of the G-HANet specification)."""

import numpy as np
import pytest

from data_pipelines import packing
from data_pipelines.errors import DataError
from data_pipelines.windows import accumulation_windows


def test_C22_remainder_is_carried_into_the_first_update_of_the_next_epoch():
    epochs = accumulation_windows(298, 32, 3, "carry")
    assert [len(e) for e in epochs] == [9, 9, 9]
    first = epochs[1][0]
    assert len(first.samples) == 42 and first.divisor == 32
    assert first.samples[:10] == tuple((0, i) for i in range(288, 298)) and first.samples[10] == (1, 0)
    assert all(len(w.samples) == 32 for e in epochs for w in e[1:])


def test_C22_remainder_can_be_dropped_or_flushed():
    dropped = accumulation_windows(298, 32, 2, "drop")
    assert [len(w.samples) for w in dropped[1]] == [32] * 9
    flushed = accumulation_windows(298, 32, 2, "flush_scaled")
    assert [(len(w.samples), w.divisor) for w in flushed[0]] == [(32, 32)] * 9 + [(10, 10)]
    drawn = sorted(s for w in flushed[1] for s in w.samples)
    assert drawn == [(1, i) for i in range(298)]


def test_every_draw_is_used_once_when_carried():
    used = [s for e in accumulation_windows(10, 4, 5, "carry") for w in e for s in w.samples]
    assert len(set(used)) == len(used) == 48, "the last two draws of the last epoch are lost"


@pytest.mark.parametrize("draws,window,remainder", [(10, 4, "keep"), (3, 4, "carry"), (3, 0, "drop")])
def test_impossible_windows_are_refused(draws, window, remainder):
    with pytest.raises(DataError, match="train"):
        accumulation_windows(draws, window, 1, remainder)


def plan(remainder, batching="packed", grouping="random", n=298, b=32):
    options = packing.PlanOptions(epochs=3, seed=5, sampler="uniform", rows=2, multiple_of=8)
    sizes = np.random.default_rng(0).integers(3, 20, n)
    return packing.plan_coupled(
        sizes, None, options, slides_per_step=b, grouping=grouping, batching=batching, remainder=remainder
    )


@pytest.mark.parametrize("batching", packing.BATCHINGS)
def test_C22_planned_steps_carry_or_flush_the_remainder(batching):
    carried, flushed, dropped = (plan(r, batching) for r in ("carry", "flush_scaled", "drop"))
    held = {r: (p.slide >= 0).sum(axis=2).tolist() for r, p in (("c", carried), ("f", flushed), ("d", dropped))}
    assert held["c"] == [[32] * 9, [42] + [32] * 8, [42] + [32] * 8]
    assert held["f"] == [[32] * 9 + [10]] * 3 and held["d"] == [[32] * 9] * 3
    for epoch in flushed.slide:
        assert sorted(epoch[epoch >= 0]) == list(range(298))
    seen = np.bincount(carried.slide[carried.slide >= 0], minlength=298)
    assert seen.sum() == 3 * 298 - 10 and seen.max() <= 3, "without replacement every patient comes once an epoch"
    assert len({p.fingerprint() for p in (carried, flushed, dropped)}) == 3


def test_a_remainder_needs_drawn_order():
    with pytest.raises(ValueError, match="data.grouping=random"):
        plan("carry", grouping="size_balanced")
