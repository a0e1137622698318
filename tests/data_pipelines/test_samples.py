"""Bags of several slides: equal to the concatenated bag as one slide, for every plan, and in the joins of a cohort."""

import types

import numpy as np
import pytest

from data_pipelines import cohort as cohorts
from data_pipelines import packing, schema
from data_pipelines.cohort import build_cohort
from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest, Slide
from data_pipelines.pipeline import SlideTable, StepSource, make_eval_dataset, make_train_dataset
from data_pipelines.samples import SampleReader
from data_pipelines.splits import make_folds, read_folds

SIZES = (5, 9, 4, 7, 3, 6)
SAMPLES = ((0, 3), (1,), (5, 2, 4))


def manifest_of(sizes):
    slides = tuple(Slide(f"S-{i}", f"C-{i}", 0, i, 1, n) for i, n in enumerate(sizes))
    facts = dict(name="x", feat_dim=2, dtype="float32", chunk_patches=4, seed=0, encoder=None, mpp=None)
    facts |= dict(magnification=None, patch_size_level0=None, simulated=True, simulation=None, notes="", shards=())
    return Manifest(directory=None, slides=slides, slides_sha256=str(sizes), **facts)


class FakeReader:
    """Bags held in memory; reading wraps modulo the bag size, as the real reader does."""

    def __init__(self, bags):
        self.bags, self.manifest = bags, manifest_of(tuple(map(len, bags)))

    def read_into(self, slide, start, count, out, coords_out=None):
        out[:] = self.bags[slide][(start + np.arange(count)) % len(self.bags[slide])]
        if coords_out is not None:
            coords_out[:] = self.bags[slide][(start + np.arange(count)) % len(self.bags[slide])].astype(np.int32)


def bags():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 2)).astype(np.float32) * 100 for n in SIZES]


def both(plan_of):
    """The same plan over samples, and over slides that hold the concatenated bags."""
    slides = FakeReader(bags())
    whole = FakeReader([np.concatenate([slides.bags[row] for row in rows]) for rows in SAMPLES])
    readers = (SampleReader(slides, SAMPLES), whole)
    table = SlideTable(np.arange(3), {schema.LABEL: np.array([0, 1, 2])})
    np.testing.assert_array_equal(readers[0].manifest.sizes, whole.manifest.sizes)
    return [StepSource(r, table, plan_of(whole.manifest.sizes), dtype="float32", with_coords=True) for r in readers]


@pytest.mark.parametrize("cap", [None, 8])
def test_training_batches_equal_those_of_the_concatenated_bags(cap):
    options = packing.PlanOptions(
        epochs=4, seed=1, rows=2, multiple_of=4, sampler="uniform", max_patches=cap, chunk_patches=4
    )
    ours, whole = both(lambda sizes: packing.plan_coupled(sizes, None, options, slides_per_step=2))
    seen = 0
    for a, b in zip(make_train_dataset(ours, num_threads=0), make_train_dataset(whole, num_threads=0), strict=True):
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        seen += 1
    assert seen == 4


def test_positions_continue_over_slides_and_evaluation_reads_all():
    ours, whole = both(lambda sizes: packing.plan_evaluation(sizes, multiple_of=4))
    for a, b in zip(make_eval_dataset(ours, num_threads=0), make_eval_dataset(whole, num_threads=0), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        for slot in np.flatnonzero(a[schema.SLIDE_INDEX] >= 0):
            mine = a[schema.SEGMENT_IDS] == slot + 1
            size = ours.reader.manifest.sizes[a[schema.SLIDE_INDEX][slot]]
            np.testing.assert_array_equal(a[schema.POSITIONS][mine], np.arange(size))


def test_a_run_covers_slides_modulo_the_end():
    reader = SampleReader(FakeReader(bags()), SAMPLES)
    assert list(reader.pieces(0, 10, 6)) == [(3, 5, 0, 2), (0, 0, 2, 6)]
    assert reader.manifest.slides[2].slide_id == "S-5;S-2;S-4"


def test_fingerprint_follows_the_composition():
    inner = FakeReader(bags())
    prints = {SampleReader(inner, s).manifest.fingerprint() for s in (SAMPLES, SAMPLES[::-1], ((0,), (1,)))}
    assert len(prints) == 3 and inner.manifest.fingerprint() not in prints
    with pytest.raises(ValueError, match="sample 1 has no slide"):
        SampleReader(inner, ((0,), ()))


def table(path, text):
    path.write_text(text)
    return path


MANIFEST = types.SimpleNamespace(
    slides=tuple(
        types.SimpleNamespace(slide_id=s, case_id=c, n_patches=3)
        for s, c in (("A-2", "A"), ("A-1", "A"), ("A-3", "A"), ("B-1", "B"), ("C-1", "C"))
    )
)
LISTED = (
    "case_id,slide_id,survival_months,censorship\nA,A-1.svs,10,1\nA,A-2.svs,10,1\nA,A-9.svs,10,1\nB,B-1.svs,5,0\n"
    "D,D-1.svs,2,0\nC,C-1.svs,,\n"
)


def test_all_slides_of_a_case_become_one_sample_and_mismatches_are_listed(tmp_path):
    path = table(tmp_path / "s.csv", LISTED)
    cohort = build_cohort(MANIFEST, survival_path=path, slide_choice="all", require_follow_up=True, task="OS")
    assert cohort.case_id == ("A", "B") and cohort.slides == ((1, 0), (3,))
    assert cohort.slide_id == ("A-1;A-2", "B-1") and list(cohort.bag_index) == [0, 1]
    np.testing.assert_array_equal(cohort.survival.event, [False, True])
    reasons = {(d.case_id, d.reason, d.slide_id) for d in cohort.dropped}
    assert reasons == {
        ("A", cohorts.SLIDE_WITHOUT_FEATURES, "A-9.svs"),
        ("A", cohorts.UNLISTED_SLIDE, "A-3"),
        ("C", cohorts.NO_FOLLOW_UP, "C-1"),
        ("D", cohorts.NO_FEATURES, ""),
    }
    assert cohort.report()["n_slides"] == 3
    turned = cohort.subset(np.array([1, 0]))
    assert turned.slides == ((3,), (1, 0)) and list(turned.bag_index) == [0, 1]


def test_check_D22_missing_slides_can_be_an_error(tmp_path):
    path = table(tmp_path / "s.csv", LISTED)
    with pytest.raises(DataError, match=r"2 cases or slides.*A-9\.svs"):
        build_cohort(MANIFEST, survival_path=path, slide_choice="all", require_follow_up=True, missing_slides="error")
    with pytest.raises(DataError, match="slide_choice=all.*unit=slide"):
        build_cohort(MANIFEST, slide_choice="all", unit="slide")
    with pytest.raises(DataError, match="needs follow-up"):
        build_cohort(MANIFEST, require_follow_up=True)


def test_split_files_may_name_slides_of_a_pooled_case(tmp_path):
    cohort = build_cohort(MANIFEST, slide_choice="all")
    table(tmp_path / "splits_0.csv", ",train,val\n0,A-1.svs,B\n1,A-2,\n2,C,\n")
    (split,) = read_folds(tmp_path, cohort, val_fraction=0.0, stratify=False)
    assert [list(part) for part in (split.train, split.val, split.test)] == [[0, 2], [], [1]]
    (split,) = read_folds(tmp_path, cohort, stratify=False, protocol="published")
    assert [list(part) for part in (split.train, split.val, split.test)] == [[0, 2], [1], [1]] and split.val_is_test
    with pytest.raises(DataError, match=r"split\.protocol='theirs'"):
        read_folds(tmp_path, cohort, protocol="theirs")


def test_strata_balance_folds_and_may_be_smaller_than_the_folds():
    slides = [types.SimpleNamespace(slide_id=f"S{i}", case_id=f"S{i}", n_patches=1) for i in range(31)]
    cohort = build_cohort(types.SimpleNamespace(slides=slides), slide_choice="all")
    strata = np.arange(31) % 8
    folds = make_folds(cohort, n_folds=5, strata=strata)
    counts = np.array([np.bincount(strata[split.test], minlength=8) for split in folds])
    assert np.ptp(counts, axis=0).max() <= 1
    published = make_folds(cohort, n_folds=5, strata=strata, protocol="published")
    for a, b in zip(folds, published):
        np.testing.assert_array_equal(a.test, b.val)
        np.testing.assert_array_equal(np.sort(np.concatenate([a.train, a.val])), b.train)
