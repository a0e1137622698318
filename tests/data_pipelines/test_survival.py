"""Time bins, sampling classes and checks of follow-up; published bins and class counts on the real tables."""

import numpy as np
import pandas as pd
import pytest

from data_pipelines import survival as sv
from data_pipelines.errors import DataError
from data_pipelines.sampling import Stream, draw_epoch, epoch_rng
from data_pipelines.tables import read_survival

PUBLISHED = {
    "blca": ((7.62, 13.57, 21.85), (63, 75, 95, 140), (41, 43, 42, 43), (41, 22, 43, 32, 42, 53, 43, 97)),
    "ucec": ((12.125, 23.46, 33.855), (61, 122, 80, 217), (19, 18, 19, 19), (19, 42, 18, 104, 19, 61, 19, 198)),
}
"""G-HANet section 3.6: quartiles, patients per bin, deaths per bin, sampling classes."""


def cohort(n=60, seed=0):
    rng = np.random.default_rng(seed)
    event = rng.random(n) < 0.5
    return rng.exponential(20, n).round(2) + 0.01, event


def pandas_bins(time, event, k=4):
    """Quantiles and left-closed intervals by pandas."""
    _, edges = pd.qcut(time[event], q=k, retbins=True, labels=False)
    edges[0], edges[-1] = time.min() - 1e-6, time.max() + 1e-6
    return pd.cut(time, bins=edges, right=False, include_lowest=True, labels=False), edges


@pytest.mark.parametrize("k", [1, 2, 4, 7])
@pytest.mark.parametrize("seed", range(3))
def test_bins_equal_those_of_pandas(k, seed):
    time, event = cohort(seed=seed)
    bins = sv.fit_time_bins(time, event, num_bins=k)
    expected, edges = pandas_bins(time, event, k)
    assert bins.num_bins == k
    np.testing.assert_allclose(bins.edges, edges, rtol=1e-14)
    np.testing.assert_array_equal(bins.assign(time), expected)


def test_an_edge_belongs_to_the_upper_bin_and_times_outside_are_clamped():
    bins = sv.TimeBins((1.0, 2.0, 3.0))
    np.testing.assert_array_equal(bins.assign([1.0, 1.999, 2.0, 3.0, 0.0, 99.0]), [0, 0, 1, 1, 0, 1])
    assert bins.assign(np.zeros(0)).shape == (0,) and bins.assign([1.5]).dtype == np.int32


def test_D3_bins_of_the_training_fold_ignore_the_other_patients():
    time, event = cohort()
    train = np.arange(60) % 5 > 0
    bins = sv.fit_time_bins(time, event, bins_from="train_fold", train=train)
    assert bins == sv.fit_time_bins(time[train], event[train])
    changed = np.where(train, time, time * 100)
    assert bins == sv.fit_time_bins(changed, event, bins_from="train_fold", train=train)
    assert bins != sv.fit_time_bins(time, event)
    assert bins.assign(changed).max() == 3


def test_sampling_class_is_twice_the_bin_plus_censorship():
    np.testing.assert_array_equal(sv.sampling_class([0, 0, 3, 3], [1, 0, True, False]), [0, 1, 6, 7])


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_C17_bins_and_class_counts_of_published_cohorts(real_data, name):
    table = read_survival(real_data / f"tcga_genomics/mcat/datasets_csv_sig/tcga_{name}_all_clean.csv.zip")
    time, event = table.survival
    quartiles, per_bin, deaths, classes = PUBLISHED[name]
    bins = sv.fit_time_bins(time, event)
    np.testing.assert_allclose(bins.edges[1:-1], quartiles, rtol=1e-12)
    np.testing.assert_allclose([bins.edges[0] + 1e-6, bins.edges[-1] - 1e-6], [time.min(), time.max()], atol=1e-12)
    index = bins.assign(time)
    assert tuple(np.bincount(index)) == per_bin
    assert tuple(np.bincount(index[event])) == deaths
    assert tuple(np.bincount(sv.sampling_class(index, event))) == classes
    if name == "blca":
        assert set(index[time == 7.62]) == {1}, "a time on an edge goes to the upper bin"
    assert sv.check_follow_up(time, event) == ()
    assert not sv.censorship_evidence(time, event).suspicious


@pytest.mark.real_data
@pytest.mark.parametrize("name,agreement", [("blca", 1.0), ("brca", 1.0), ("gbmlgg", 0.95), ("ucec", 1.0)])
def test_C17_bins_stored_with_published_predictions(real_data, name, agreement):
    """The GBMLGG quartiles came from a slightly larger table (section 3.6)."""
    path = real_data / f"reference_predictions/mcat_iccv/tcga_{name}_val_risk.csv.gz"
    rows = pd.read_csv(path).query("model.str.startswith('MCAT')")
    time, event = rows["survival"].to_numpy(), rows["censorship"].to_numpy() == 0
    index = sv.fit_time_bins(time, event).assign(time)
    assert np.mean(index == rows["disc_label"]) >= agreement


@pytest.mark.real_data
@pytest.mark.parametrize("name", PUBLISHED)
def test_C21_the_eight_classes_are_drawn_equally_often(real_data, name):
    table = read_survival(real_data / f"tcga_genomics/mcat/datasets_csv_sig/tcga_{name}_all_clean.csv.zip")
    time, event = table.survival
    classes = sv.sampling_class(sv.fit_time_bins(time, event).assign(time), event)
    drawn = draw_epoch(
        np.ones(len(time), int),
        classes,
        100_000,
        sampler="class_balanced_replacement",
        stratified=False,
        rng=epoch_rng(0, 0, Stream.DRAW),
    )
    share = np.bincount(classes[drawn], minlength=8) / 100_000
    np.testing.assert_allclose(share, 1 / 8, atol=0.01)


@pytest.mark.real_data
def test_flipped_censorship_of_every_published_cohort_is_recognised(real_data):
    files = sorted((real_data / "tcga_genomics").glob("*/datasets_csv*/*.csv.zip"))
    files += sorted((real_data / "tcga_genomics/survpath/datasets_csv/metadata").glob("tcga_*.csv.gz"))
    assert len(files) >= 10
    for file in files:
        time, event = read_survival(file).survival
        assert not sv.censorship_evidence(time, event).suspicious, file.name
        evidence = sv.censorship_evidence(time, ~event)
        assert evidence.suspicious, file.name
        assert "followed longest have an event" in evidence.message(file.name)


def test_flipped_censorship_is_reported_with_its_evidence():
    rng = np.random.default_rng(0)
    life, study = rng.exponential(40, 300), rng.uniform(5, 60, 300)
    time, event = np.minimum(life, study), life <= study
    assert sv.censorship_evidence(time, event).message() == ""
    evidence = sv.censorship_evidence(time, ~event, other_event=np.where(np.arange(300) < 250, event, np.nan))
    assert evidence.suspicious and evidence.agreement == 0.0 and evidence.n_compared == 250
    assert evidence.event_fraction == pytest.approx((~event).mean())
    assert evidence.median_event == pytest.approx(np.median(time[~event]))
    message = evidence.message("patients.csv")
    for words in (
        "patients.csv",
        "only 0% of 250",
        "the other column",
        "followed longest",
        "Median follow-up",
        "rename",
    ):
        assert words in message


def test_a_cohort_in_which_nearly_everybody_died_is_questioned_and_a_handful_is_not():
    time = np.arange(40.0)
    assert "98% of all patients" in sv.censorship_evidence(time, time != 3).message()
    assert not sv.censorship_evidence(time[:6], np.ones(6, bool)).suspicious
    assert np.isnan(sv.censorship_evidence(time[:0], np.zeros(0, bool)).event_fraction)


@pytest.mark.parametrize(
    "time,event,words",
    [
        ([1.0, -2.0, 3.0], [1, 0, 1], r"cohort.csv: follow-up is negative for 1 of 3 patients: b \(-2\)"),
        ([1.0, np.nan, np.inf], [1, 0, 1], r"follow-up is not finite for 2 of 3 patients: b \(nan\), c \(inf\)"),
        ([1.0, 2.0, 3.0], [0, 0, 0], "all 3 patients are censored"),
        ([1.0, 2.0, 3.0], [0, 2, 0], "event holds 2"),
        ([], [], "no patients"),
        ([1.0], [1, 0], "vectors of equal length"),
    ],
    ids=["negative", "not_finite", "all_censored", "event_code", "empty", "length"],
)
def test_bad_follow_up_is_refused(time, event, words):
    with pytest.raises(DataError, match=words):
        sv.check_follow_up(time, np.array(event), case_id=["a", "b", "c"], source="cohort.csv")


def test_follow_up_of_zero_is_kept_with_a_warning():
    (warning,) = sv.check_follow_up([0.0, 4.0, 0.0], [True, True, False])
    assert "0 months for 2 of 3 patients: row 0 (0), row 2 (0); kept" in warning
    assert sv.fit_time_bins([0.0, 4.0, 2.0], [True, True, False], num_bins=2).assign([0.0]) == [0]


@pytest.mark.parametrize("time", [[5.0] * 6, [5.0] * 5 + [9.0]], ids=["one_time", "two_times"])
def test_ties_that_leave_a_bin_without_deaths_are_refused(time):
    with pytest.raises(DataError, match="6 deaths at [12] distinct times do not fill 4 time bins"):
        sv.fit_time_bins(time, np.ones(6, bool))


def test_bad_requests_for_bins():
    time, event = cohort()
    with pytest.raises(DataError, match="labels.bins_from='test'"):
        sv.fit_time_bins(time, event, bins_from="test")
    with pytest.raises(DataError, match="train=None"):
        sv.fit_time_bins(time, event, bins_from="train_fold")
    with pytest.raises(DataError, match="all 12 patients are censored"):
        sv.fit_time_bins(time, event & (np.arange(60) >= 12), bins_from="train_fold", train=np.arange(60) < 12)
    with pytest.raises(DataError, match="labels.n_bins=0"):
        sv.fit_time_bins(time, event, num_bins=0)
    with pytest.raises(DataError, match="strictly increasing"):
        sv.TimeBins((1.0, 1.0))
    with pytest.raises(DataError, match="not finite for 1 of 2 patients"):
        sv.TimeBins((1.0, 2.0)).assign([1.0, np.nan])


def test_folds_without_deaths_in_a_part_or_bin():
    bins, event = np.array([0, 0, 1, 1, 2, 2]), np.array([1, 1, 1, 0, 0, 1], bool)
    train = np.array([1, 1, 1, 1, 1, 0], bool)
    assert sv.check_folds(bins, event, np.ones(6, bool), train, num_bins=3) == ()
    bin_warning, val_warning = sv.check_folds(bins, event & train, train, ~train, num_bins=3, fold=2)
    assert "fold 2: time bins [2] have no death among the 5 training patients (deaths per bin [2, 1, 0])" in bin_warning
    assert "none of the 1 validation patients has an observed death" in val_warning
    with pytest.raises(DataError, match="fold 2: none of the 1 training patients"):
        sv.check_folds(bins, event & train, ~train, train, num_bins=3, fold=2)
