"""Epoch draws: purity, expected counts, and what stratification buys."""

import numpy as np
import pytest

from data_pipelines import sampling
from data_pipelines.sampling import Stream, draw_epoch, epoch_rng


def _cohort(n=90, seed=0):
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, rng.lognormal(6.0, 0.8, n)).astype(np.int64)
    labels = np.array([0] * (2 * n // 3) + [1] * (n - 2 * n // 3))
    return sizes, labels


def _draw(epoch, sampler, stratified, num_draws=96, seed=3):
    sizes, labels = _cohort()
    rng = epoch_rng(seed, epoch, Stream.DRAW)
    return draw_epoch(sizes, labels, num_draws, sampler=sampler, stratified=stratified, rng=rng)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("sampler,num_draws", [("class_balanced_replacement", 96), ("uniform", 80)])
def test_draws_are_a_pure_function_of_seed_and_epoch(sampler, num_draws, stratified):
    first = _draw(5, sampler, stratified, num_draws)
    np.testing.assert_array_equal(first, _draw(5, sampler, stratified, num_draws))
    assert not np.array_equal(first, _draw(6, sampler, stratified, num_draws))
    assert not np.array_equal(first, _draw(5, sampler, stratified, num_draws, seed=4))


def test_streams_of_an_epoch_are_independent_sequences():
    values = [epoch_rng(0, 0, stream).random(4) for stream in Stream]
    assert len({tuple(v) for v in values}) == len(Stream)


@pytest.mark.parametrize("stratified", [False, True])
def test_class_balanced_draws_have_weight_n_over_n_class(stratified):
    """mkd.md section 7: weight n / n_class, so slide i is expected num_draws / (C * n_class) times per epoch."""
    _, labels = _cohort()
    epochs = 400
    counts = sum(
        np.bincount(_draw(e, "class_balanced_replacement", stratified), minlength=len(labels)) for e in range(epochs)
    )
    expected = epochs * 96 / (2 * np.bincount(labels)[labels])
    # Poisson bounds the variance of a count; five standard errors over 90 slides.
    np.testing.assert_array_less(np.abs(counts - expected), 5 * np.sqrt(expected))


def test_stratified_draws_have_exact_class_counts_and_iid_draws_do_not():
    _, labels = _cohort()
    exact = {tuple(np.bincount(labels[_draw(e, "class_balanced_replacement", True)])) for e in range(20)}
    iid = {tuple(np.bincount(labels[_draw(e, "class_balanced_replacement", False)])) for e in range(20)}
    assert exact == {(48, 48)} and len(iid) > 3


def test_remainder_of_stratified_draws_goes_to_random_classes():
    _, labels = _cohort()
    counts = {tuple(np.bincount(labels[_draw(e, "class_balanced_replacement", True, 95)])) for e in range(20)}
    assert counts == {(47, 48), (48, 47)}


def test_stratified_draws_lower_the_variance_of_the_total_size():
    sizes, _ = _cohort()
    totals = {s: [sizes[_draw(e, "class_balanced_replacement", s)].sum() for e in range(100)] for s in (True, False)}
    assert np.std(totals[True]) < 0.4 * np.std(totals[False])
    assert abs(np.mean(totals[True]) / np.mean(totals[False]) - 1) < 0.05


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("num_draws", [90, 89, 80])
def test_uniform_draws_take_each_slide_at_most_once(num_draws, stratified):
    drawn = _draw(0, "uniform", stratified, num_draws)
    assert len(drawn) == num_draws == len(np.unique(drawn))


def test_stratified_uniform_draws_leave_out_every_slide_equally_often():
    epochs = 900
    counts = sum(np.bincount(_draw(e, "uniform", True, 80), minlength=90) for e in range(epochs))
    expected = epochs * 80 / 90
    np.testing.assert_array_less(np.abs(counts - expected), 5 * np.sqrt(epochs * (80 / 90) * (10 / 90)))


@pytest.mark.parametrize(
    "labels,match",
    [
        (None, "needs one label per slide"),
        (np.array([0, 1]), "one per slide"),
        (np.array([0.0, 1.0, 0.0]), "expected integers"),
        (np.array([0, -1, 1]), "label of slide 1 is -1"),
    ],
)
def test_bad_labels_are_refused(labels, match):
    rng = epoch_rng(0, 0, Stream.DRAW)
    with pytest.raises(ValueError, match=match):
        draw_epoch(np.array([5, 6, 7]), labels, 3, sampler="class_balanced_replacement", stratified=False, rng=rng)


def test_unknown_sampler_and_too_many_draws_are_refused():
    rng = epoch_rng(0, 0, Stream.DRAW)
    with pytest.raises(ValueError, match="train.sampler is 'other'"):
        draw_epoch(np.array([5]), None, 1, sampler="other", stratified=False, rng=rng)
    with pytest.raises(ValueError, match="without replacement"):
        draw_epoch(np.array([5]), None, 2, sampler="uniform", stratified=False, rng=rng)
    assert set(sampling.SAMPLERS) == {"class_balanced_replacement", "uniform"}
