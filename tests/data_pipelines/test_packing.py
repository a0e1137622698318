"""Plans: exact cardinality, exact coverage, fill, one shape for the whole run, and refusals."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import binpacking
from data_pipelines.packing import PlanOptions, plan_coupled, plan_evaluation, plan_free


def _bags(n, sigma, seed, median=1000):
    """Log-normal sizes and unbalanced labels (1 in 4 positive)."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, median * np.exp(sigma * rng.standard_normal(n))).astype(np.int64)
    return sizes, (rng.random(n) < 0.25).astype(np.int32)


def _steps(plan):
    return [plan.step(e, i) for e in range(plan.epochs) for i in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("sampler", ["class_balanced_replacement", "uniform"])
@pytest.mark.parametrize("n,sigma,seed", [(200, 0.5, 0), (200, 1.0, 1), (460, 0.8, 2), (460, 1.0, 0), (1000, 1.0, 2)])
def test_size_balanced_fill_is_at_least_090_over_100_epochs(n, sigma, seed, sampler):
    sizes, labels = _bags(n, sigma, seed)
    plan = plan_coupled(sizes, labels, PlanOptions(epochs=100, seed=1, sampler=sampler), slides_per_step=16)
    assert plan.steps_per_epoch == n // 16 and plan.num_slots == 16
    assert plan.fill() >= 0.90
    assert plan.fill() == pytest.approx(np.mean([plan.fill(e) for e in range(100)]))
    assert plan.row_patches % 1024 == 0


def test_size_balanced_fills_better_than_random_groups():
    sizes, labels = _bags(300, 0.8, 3)
    fills = {
        g: plan_coupled(sizes, labels, PlanOptions(epochs=20, seed=0), slides_per_step=16, grouping=g).fill()
        for g in ("size_balanced", "random")
    }
    assert fills["random"] < 0.75 < 0.90 <= fills["size_balanced"]


def test_one_bag_beyond_the_mean_step_bounds_the_fill_and_is_reported():
    sizes = np.full(64, 100)
    sizes[7] = 3200
    options = PlanOptions(epochs=2, seed=0, sampler="uniform", multiple_of=1)
    plan = plan_coupled(sizes, None, options, slides_per_step=16)
    assert plan.report()["largest_bag_share"] > 1 and plan.fill() < 0.6
    capped = plan_coupled(sizes, None, dataclasses.replace(options, max_patches=200), slides_per_step=16)
    assert capped.fill() > 0.9 and capped.report()["truncated_fraction"] == pytest.approx(1 / 64)


@pytest.mark.parametrize("grouping", ["size_balanced", "random"])
def test_coupled_steps_hold_exactly_b_slides_and_fit(grouping):
    sizes, labels = _bags(53, 1.0, 4, median=50)
    options = PlanOptions(epochs=5, seed=9, multiple_of=8, rows=3)
    plan = plan_coupled(sizes, labels, options, slides_per_step=4, grouping=grouping)
    assert plan.steps_per_epoch == 13 and plan.rows == 3
    totals = []
    for step in _steps(plan):
        assert (step.slide >= 0).all() and len(step.slide) == 4
        np.testing.assert_array_equal(step.count, sizes[step.slide])
        np.testing.assert_array_equal(step.offset, np.concatenate([[0], np.cumsum(step.count)[:-1]]))
        totals.append(step.count.sum())
    assert plan.capacity - 3 * 8 < max(totals) <= plan.capacity
    assert plan.fill() == pytest.approx(np.mean(totals) / plan.capacity)


def test_uniform_coupled_epoch_takes_each_slide_once_and_drops_the_remainder():
    sizes, _ = _bags(50, 0.5, 1, median=20)
    plan = plan_coupled(sizes, None, PlanOptions(epochs=3, seed=0, sampler="uniform", multiple_of=1), slides_per_step=8)
    for epoch in range(3):
        taken = plan.slide[epoch].ravel()
        assert len(np.unique(taken)) == len(taken) == 48


def test_random_grouping_is_the_plain_draw_in_order():
    from data_pipelines import sampling

    sizes, labels = _bags(40, 0.5, 1, median=20)
    plan = plan_coupled(sizes, labels, PlanOptions(epochs=2, seed=6), slides_per_step=4, grouping="random")
    rng = sampling.epoch_rng(6, 1, sampling.Stream.DRAW)
    drawn = sampling.draw_epoch(sizes, labels, 40, sampler="class_balanced_replacement", stratified=False, rng=rng)
    np.testing.assert_array_equal(plan.slide[1].ravel(), drawn)


def test_groups_change_with_epoch_and_seed_but_not_between_calls():
    sizes, labels = _bags(64, 0.8, 0, median=30)
    options = PlanOptions(epochs=3, seed=0)
    a, b = (plan_coupled(sizes, labels, options, slides_per_step=8) for _ in range(2))
    c = plan_coupled(sizes, labels, dataclasses.replace(options, seed=1), slides_per_step=8)
    np.testing.assert_array_equal(a.slide, b.slide)
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert not np.array_equal(a.slide[0], a.slide[1])


def test_a_longer_run_replays_the_same_epochs():
    """An epoch is a function of (seed, epoch) alone; only the capacity may depend on the number of epochs."""
    sizes, labels = _bags(64, 0.8, 0, median=30)
    short, long = (
        plan_coupled(sizes, labels, PlanOptions(epochs=e, seed=2, max_patches=20), slides_per_step=8) for e in (2, 5)
    )
    np.testing.assert_array_equal(short.slide, long.slide[:2])
    np.testing.assert_array_equal(short.start, long.start[:2])


def test_padded_plan_reads_the_same_patches_as_packed():
    sizes, labels = _bags(40, 0.8, 2, median=60)
    options = PlanOptions(epochs=2, seed=5, max_patches=64, chunk_patches=16, multiple_of=32, rows=2)
    packed, padded = (plan_coupled(sizes, labels, options, slides_per_step=4, batching=b) for b in ("packed", "padded"))
    for name in ("slide", "start", "count"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(padded, name))
    assert (padded.rows, padded.row_patches) == (4, 64) and packed.rows == 2
    np.testing.assert_array_equal(padded.step(1, 3).offset, [0, 64, 128, 192])
    assert packed.fingerprint() != padded.fingerprint()


def test_subsampling_starts_at_random_chunks_and_keeps_small_bags_whole():
    sizes = np.array([10, 500, 129, 128] * 4)
    options = PlanOptions(epochs=30, seed=0, sampler="uniform", max_patches=128, chunk_patches=32, multiple_of=1)
    plan = plan_coupled(sizes, None, options, slides_per_step=4)
    np.testing.assert_array_equal(plan.count, np.minimum(sizes, 128)[plan.slide])
    assert (plan.start[sizes[plan.slide] <= 128] == 0).all()
    assert set(plan.start[sizes[plan.slide] == 500]) == set(range(0, 512, 32))
    assert set(plan.start[sizes[plan.slide] == 129]) == {0, 32, 64, 96, 128}


@pytest.mark.parametrize("n,sigma,seed,mean_bags", [(1000, 0.5, 0, 8), (1000, 1.0, 1, 8), (1000, 1.0, 2, 20)])
def test_free_packing_fill_is_at_least_097(n, sigma, seed, mean_bags):
    sizes, _ = _bags(n, sigma, seed)
    capacity = max(int(sizes.max()), mean_bags * int(sizes.mean()))
    options = PlanOptions(epochs=5, seed=0, sampler="uniform", multiple_of=128)
    plan = plan_free(sizes, None, options, capacity=capacity)
    assert plan.fill() >= 0.97
    for epoch in range(5):
        taken = plan.slide[epoch][plan.slide[epoch] >= 0]
        np.testing.assert_array_equal(np.sort(taken), np.arange(n))
        assert ((plan.slide[epoch] >= 0).sum(axis=1) >= 1).all()
    assert not np.array_equal(np.sort(plan.slide[0], axis=1), np.sort(plan.slide[1], axis=1))


@pytest.mark.parametrize("n,sigma,mean_bags", [(60, 0.8, 9), (300, 1.0, 32), (1000, 1.0, 6)])
def test_evaluation_covers_every_patch_once_with_fill_097(n, sigma, mean_bags):
    sizes, _ = _bags(n, sigma, 0)
    plan = plan_evaluation(sizes, target_capacity=mean_bags * int(sizes.mean()), multiple_of=16)
    real = plan.slide >= 0
    np.testing.assert_array_equal(np.sort(plan.slide[real]), np.arange(n))
    np.testing.assert_array_equal(plan.count[real], sizes[plan.slide[real]])
    assert (plan.start == 0).all() and (plan.count[~real] == 0).all()
    assert plan.capacity >= sizes.max() and plan.epochs == 1
    assert plan.fill() >= 0.97


def test_evaluation_respects_slots_and_needs_no_more_steps_than_the_target():
    sizes, _ = _bags(100, 0.5, 0, median=20)
    plan = plan_evaluation(sizes, target_capacity=10_000, num_slots=8, multiple_of=16)
    assert plan.num_slots == 8 and plan.steps_per_epoch == 13
    assert ((plan.slide >= 0).sum(axis=2) <= 8).all()
    one = plan_evaluation(np.array([7]), rows=4, multiple_of=2)
    assert (one.rows, one.row_patches, one.steps_per_epoch, one.num_slots) == (4, 2, 1, 1)


def test_more_slides_than_slots_are_rejected_at_plan_time():
    from data_pipelines import packing

    with pytest.raises(ValueError, match="a step holds 3 slides but only 2 slots"):
        packing._slot_table([[np.arange(3)]], 2)
    with pytest.raises(ValueError, match="at least one slot"):
        plan_evaluation(np.array([3, 4]), num_slots=0)


def test_free_plan_with_class_balanced_draws_has_equal_steps_per_epoch():
    sizes, labels = _bags(80, 1.0, 5, median=30)
    plan = plan_free(sizes, labels, PlanOptions(epochs=12, seed=0, multiple_of=8), capacity=int(sizes.max()))
    assert ((plan.slide >= 0).any(axis=2)).all()
    np.testing.assert_array_equal((plan.slide >= 0).sum(axis=(1, 2)), 80)


def test_balanced_groups_match_brute_force_on_a_small_case():
    sizes = np.array([10, 1, 9, 2, 8, 3, 7, 4])
    groups = binpacking.balanced_groups(sizes, 2, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(groups.ravel()), np.arange(8))
    np.testing.assert_array_equal(sizes[groups].sum(axis=1), [11, 11, 11, 11])


def test_first_fit_decreasing_matches_a_plain_reference():
    sizes = np.random.default_rng(0).integers(1, 60, 200)
    bins = []
    for item in np.argsort(-sizes, kind="stable"):
        for members in bins:
            if sum(sizes[m] for m in members) + sizes[item] <= 100 and len(members) < 4:
                members.append(item)
                break
        else:
            bins.append([item])
    found = binpacking.first_fit_groups(sizes, 100, 4)
    assert [list(map(int, b)) for b in bins] == [list(map(int, b)) for b in found]


def test_split_to_keeps_all_items_and_refuses_the_impossible():
    groups = binpacking.split_to([np.arange(5), np.array([9])], 4)
    assert len(groups) == 4 and min(map(len, groups)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(groups)), [0, 1, 2, 3, 4, 9])
    with pytest.raises(ValueError, match="cannot make 3"):
        binpacking.split_to([np.array([1]), np.array([2])], 3)


@pytest.mark.parametrize(
    "sizes,kwargs,match",
    [
        ([5, 6, 7], {"slides_per_step": 0}, "train.b is 0; a step needs at least 1 slide"),
        ([5, 6, 7], {"slides_per_step": 4}, "only 3 training slides"),
        ([5, 0, 7], {"slides_per_step": 2}, "slide 1 has 0 patches"),
        ([5.0, 6.0], {"slides_per_step": 2}, "expected integers"),
        ([5, 6, 7], {"slides_per_step": 2, "grouping": "sorted"}, "data.grouping is 'sorted'"),
        ([5, 6, 7], {"slides_per_step": 2, "batching": "ragged"}, "'ragged'"),
    ],
)
def test_bad_coupled_requests_are_refused(sizes, kwargs, match):
    with pytest.raises(ValueError, match=match):
        plan_coupled(np.array(sizes), None, PlanOptions(epochs=1, seed=0, sampler="uniform"), **kwargs)


@pytest.mark.parametrize(
    "change,match",
    [
        ({"epochs": 0}, "epochs of a plan is 0"),
        ({"rows": 0}, "rows of a plan is 0"),
        ({"max_patches": 0}, "data.max_patches_train is 0"),
        ({"sampler": "best"}, "train.sampler is 'best'"),
    ],
)
def test_bad_options_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        PlanOptions(**{"epochs": 1, "seed": 0, **change})


def test_a_slide_larger_than_a_free_step_is_refused():
    with pytest.raises(ValueError, match="slide 1 has 300 patches but a step holds 128"):
        plan_free(
            np.array([3, 300]), None, PlanOptions(epochs=1, seed=0, sampler="uniform", multiple_of=128), capacity=100
        )


def test_steps_outside_the_plan_and_inconsistent_plans_are_refused():
    plan = plan_evaluation(np.array([3, 4]), multiple_of=4)
    with pytest.raises(IndexError, match="step 0 of epoch 1 is not planned"):
        plan.step(1, 0)
    with pytest.raises(ValueError, match="raise the capacity"):
        dataclasses.replace(plan, row_patches=1)
    with pytest.raises(ValueError, match="counts must not exceed the bag size"):
        dataclasses.replace(plan, sizes=np.array([3, 3]), row_patches=64)
