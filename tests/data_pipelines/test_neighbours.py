"""Neighbour lists against brute force, and the batch field that carries them."""

import dataclasses

import numpy as np
import pytest
from neighbour_bags import MemoryReader

from data_pipelines import packing, schema
from data_pipelines.errors import DataError
from data_pipelines.neighbours import neighbour_lists, neighbour_offsets
from data_pipelines.pipeline import SlideTable, StepSource, make_eval_dataset, make_train_dataset
from data_pipelines.samples import SampleReader


def brute_force(coords, k):
    """By distance, then y, then x, then row."""
    out = []
    for c, (x, y) in enumerate(coords.tolist()):
        others = [((u - x) ** 2 + (v - y) ** 2, v, u, j) for j, (u, v) in enumerate(coords.tolist()) if j != c]
        out.append([j for *_, j in sorted(others)[:k]])
    return np.array(out)


def grid(width, height, step=512):
    x, y = np.meshgrid(np.arange(width) * step, np.arange(height) * step)
    return np.stack([x.ravel(), y.ravel()], axis=1)


@pytest.mark.parametrize(
    "coords", [grid(7, 5), np.random.default_rng(0).integers(0, 40, (60, 2)), np.zeros((30, 2), int)]
)
@pytest.mark.parametrize("k", [1, 4, 8])
def test_lists_equal_brute_force_with_ties_and_duplicates(coords, k):
    coords = np.random.default_rng(1).permutation(coords)
    np.testing.assert_array_equal(neighbour_lists(coords, k), brute_force(coords, k))


def test_lists_of_a_grid_do_not_depend_on_the_order_of_patches():
    coords = grid(6, 6)
    order = np.random.default_rng(0).permutation(len(coords))
    turned = neighbour_lists(coords[order], 8)
    np.testing.assert_array_equal(order[turned], neighbour_lists(coords, 8)[order])


def test_at_most_k_patches_have_no_graph():
    assert (neighbour_lists(grid(4, 2), 8) == -1).all() and not neighbour_offsets(grid(4, 2), 8).any()
    assert (neighbour_lists(grid(3, 3), 8) >= 0).all()


def test_bad_input_is_named():
    with pytest.raises(DataError, match="9 patches has no coordinates"):
        neighbour_lists(np.full((9, 2), -1), 8)
    with pytest.raises(DataError, match="k >= 1"):
        neighbour_lists(grid(3, 3), 0)
    with pytest.raises(DataError, match=r"coords \[n, 2\]"):
        neighbour_lists(np.zeros((4, 3)), 2)


SIZES = (12, 5, 20, 9, 3)


def source(reader, plan, **options):
    table = SlideTable(np.arange(len(plan.sizes)), {schema.LABEL: np.zeros(len(plan.sizes), int)})
    return StepSource(reader, table, plan, dtype="float32", neighbours=4, with_coords=True, **options)


def listed_coordinates(batch):
    """(slot, own coordinates, sorted coordinates of the neighbours) of every patch, from the batch alone."""
    segments = batch[schema.SEGMENT_IDS].reshape(-1)
    coords, offsets = batch[schema.COORDS].reshape(-1, 2), batch[schema.NEIGHBOURS].reshape(len(segments), -1)
    assert not offsets[segments == 0].any()
    for at in np.flatnonzero(segments):
        others = at + offsets[at][offsets[at] != 0]
        assert (segments[others] == segments[at]).all()
        yield segments[at] - 1, tuple(coords[at]), sorted(map(tuple, coords[others]))


@pytest.mark.parametrize("rows", [1, 2])
def test_batches_hold_the_neighbours_of_every_patch_wherever_it_is_packed(rows):
    reader = MemoryReader(SIZES)
    plan = packing.plan_evaluation(np.array(SIZES), target_capacity=32, rows=rows, multiple_of=4)
    seen = 0
    for batch in make_eval_dataset(source(reader, plan), num_threads=0):
        assert batch[schema.NEIGHBOURS].dtype == np.int32 and batch[schema.NEIGHBOURS].shape[-1] == 4
        for slot, own, others in listed_coordinates(batch):
            coords = reader.coords[batch[schema.SLIDE_INDEX][slot]]
            lists = neighbour_lists(coords, 4)[np.flatnonzero((coords == own).all(axis=1))[0]]
            assert others == sorted(map(tuple, coords[lists[lists >= 0]]))
            seen += 1
    assert seen == sum(SIZES)


def test_a_part_of_a_bag_has_the_graph_of_its_patches():
    reader = MemoryReader(SIZES)
    options = packing.PlanOptions(
        epochs=2, seed=1, rows=1, multiple_of=4, sampler="uniform", max_patches=8, chunk_patches=4
    )
    plan = packing.plan_coupled(np.array(SIZES), None, options, slides_per_step=2)
    found = source(reader, plan)
    for batch in make_train_dataset(found, num_threads=0):
        for slot in np.flatnonzero(batch[schema.WEIGHT]):
            mine = batch[schema.SEGMENT_IDS].reshape(-1) == slot + 1
            expected = neighbour_offsets(batch[schema.COORDS].reshape(-1, 2)[mine], 4)
            np.testing.assert_array_equal(batch[schema.NEIGHBOURS].reshape(-1, 4)[mine], expected)
    assert found.step_bytes(1) == plan.row_patches * (4 * 3 + 8 + 8 + 16)


def test_neighbours_of_a_sample_of_several_slides_lie_on_the_same_slide():
    reader = SampleReader(MemoryReader(SIZES), [(0, 2), (3,), (1, 4)])
    plan = packing.plan_evaluation(reader.manifest.sizes, target_capacity=64, multiple_of=4)
    table = SlideTable(np.arange(3), {})
    found = StepSource(reader, table, plan, dtype="float32", neighbours=4)
    for batch in make_eval_dataset(found, num_threads=0):
        # The first feature is the number of the slide.
        segments, slide = batch[schema.SEGMENT_IDS].reshape(-1), batch[schema.PATCHES].reshape(-1, 3)[:, 0]
        offsets = batch[schema.NEIGHBOURS].reshape(-1, 4)
        for at in np.flatnonzero(segments):
            assert (slide[at + offsets[at][offsets[at] != 0]] == slide[at]).all()
            assert (offsets[at] != 0).sum() == (4 if SIZES[int(slide[at])] > 4 else 0)


def test_the_graph_is_part_of_the_fingerprint_and_needs_whole_slides():
    plan = packing.plan_evaluation(np.array(SIZES), target_capacity=32, rows=2, multiple_of=4)
    found = source(MemoryReader(SIZES), plan)
    assert found.fingerprint() != dataclasses.replace(found, neighbours=3).fingerprint()
    assert found.fingerprint() != dataclasses.replace(found, neighbours=0).fingerprint()
    with pytest.raises(ValueError, match="one process"):
        found.assembler(slice(0, 1))
