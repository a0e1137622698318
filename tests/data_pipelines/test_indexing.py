"""Steps as indices: where patches lie when they are dealt out to devices, counted against brute force."""

import dataclasses
import types

import numpy as np
import pytest

from data_pipelines import indexing
from data_pipelines.packing import PlanOptions, plan_coupled, plan_evaluation, plan_free
from data_pipelines.pipeline import SlideTable, StepSource

SIZES = np.array([7, 1, 12, 5, 9, 30, 2, 4])
FEAT_DIM = 3


class Reader:
    """Patch p of slide s is (s, p, 1)."""

    def __init__(self, sizes=SIZES):
        self.manifest = types.SimpleNamespace(sizes=sizes, feat_dim=FEAT_DIM, dtype="float32")

    def read_into(self, slide, start, count, out, coords_out=None):
        assert out.shape == (count, FEAT_DIM) and 0 <= start and start + count <= self.manifest.sizes[slide]
        out[:, 0], out[:, 1], out[:, 2] = slide, start + np.arange(count), 1


def evaluation_source(index, reader=None):
    return StepSource(reader or Reader(), SlideTable(index), plan_evaluation(SIZES[index], multiple_of=8), "float32")


@pytest.mark.parametrize("shards", [1, 3, 4])
@pytest.mark.parametrize("block", [1, 4, 1000])
def test_every_patch_lies_where_the_layout_says(shards, block):
    sources = [evaluation_source(np.array([5, 0, 3])), evaluation_source(np.array([1, 5, 7]))]
    layout = indexing.CohortLayout.of_sources(sources, shards)
    np.testing.assert_array_equal(layout.slides, [0, 1, 3, 5, 7])
    assert layout.patches == 7 + 1 + 5 + 30 + 4
    assert layout.rows == sum(-(-SIZES[s] // shards) for s in layout.slides)
    blocks = -(-layout.rows // block)
    rows = np.full((shards, blocks * block, FEAT_DIM), np.nan, np.float32)
    for number in range(blocks):
        part = rows[:, number * block : (number + 1) * block]
        layout.read_rows(Reader(), number * block, range(shards), part)
    assert np.isfinite(rows).all() and rows[..., 2].sum() == layout.patches, "each patch lies there exactly once"
    for source in sources:
        for slide, base, size in zip(source.table.slide_index, *layout.locate(source.table)):
            for p in range(size):
                np.testing.assert_array_equal(rows[p % shards, base + p // shards], [slide, p, 1])


def test_a_process_reads_the_rows_of_its_own_devices():
    layout = indexing.CohortLayout.of_sources([evaluation_source(np.arange(8))], 4)
    everything, own = (np.empty((n, layout.rows, FEAT_DIM), np.float32) for n in (4, 2))
    layout.read_rows(Reader(), 0, range(4), everything)
    layout.read_rows(Reader(), 0, [2, 3], own)
    np.testing.assert_array_equal(own, everything[2:])


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_counts_per_device_are_those_of_brute_force(shards):
    rng = np.random.default_rng(0)
    size = rng.integers(1, 40, 200)
    start, count = (rng.random(200) * size).astype(int), (rng.random(200) * (size + 1)).astype(int)
    for d in range(shards):
        expected = [
            sum((s + i) % n % shards == d for i in range(c)) for s, c, n in zip(start, count, size, strict=True)
        ]
        np.testing.assert_array_equal(indexing.shard_counts(start, count, size, shards, d), expected)


def plans():
    options = PlanOptions(3, 0, "uniform", rows=4, multiple_of=4, chunk_patches=2)
    partial = dataclasses.replace(options, max_patches=6)
    yield plan_coupled(SIZES, None, options, slides_per_step=2)
    yield plan_coupled(SIZES, None, partial, slides_per_step=4)
    yield plan_free(SIZES, None, partial, capacity=48)
    yield plan_evaluation(SIZES, rows=4, multiple_of=4)


@pytest.mark.parametrize("plan", list(plans()), ids=lambda plan: plan.parameters["mode"])
def test_rows_are_long_enough_for_the_fullest_device_and_hardly_longer(plan):
    assert indexing.needed_row_patches(plan, 1) == plan.row_patches
    for shards in (2, 4):
        length, rows = indexing.needed_row_patches(plan, shards, 4), plan.rows // shards
        assert length % 4 == 0 and length >= plan.row_patches
        slots = plan.slide.shape[-1]
        # Each slot may put one patch, or two where its run wraps, more on one device than on another.
        assert (length - plan.row_patches) * rows < 2 * slots + 4 * rows
        for epoch in range(plan.epochs):
            for number in range(plan.steps_per_epoch):
                step = plan.step(epoch, number)
                size = np.where(step.slide >= 0, plan.sizes[step.slide], 1)
                for d in range(shards):
                    held = indexing.shard_counts(step.start, step.count, size, shards, d).sum()
                    assert held <= rows * length


def test_rows_that_no_devices_can_share_are_refused():
    plan = next(plans())
    with pytest.raises(ValueError, match="4 packed rows cannot be divided over 3 devices.*data.rows"):
        indexing.needed_row_patches(plan, 3)
    options = PlanOptions(1, 0, "uniform", multiple_of=4)
    padded = plan_coupled(SIZES, None, options, slides_per_step=2, batching="padded")
    with pytest.raises(ValueError, match="train.batching=packed"):
        indexing.needed_row_patches(padded, 2)


def test_a_cohort_beyond_the_index_range_is_refused():
    sizes = np.full(2, 2**30 + 1)
    source = types.SimpleNamespace(reader=Reader(sizes), table=SlideTable(np.arange(2)))
    with pytest.raises(ValueError, match=r"2147483650 patches.*mesh\.data"):
        indexing.CohortLayout.of_sources([source], 1)
    assert indexing.CohortLayout.of_sources([source], 2).shards == 2


def test_the_index_of_a_step_is_three_numbers_per_slot():
    plan = plan_evaluation(SIZES, multiple_of=8, num_slots=6)
    step = plan.step(0, 0)
    index = indexing.step_index(step)
    assert index.dtype == np.int32 and index.nbytes == 12 * plan.num_slots
    np.testing.assert_array_equal(index, [step.slide, step.start, step.count])
