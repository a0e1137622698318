"""Published survival cohorts and splits: patients, slides, folds and sampling classes as the specification counts."""

import types

import numpy as np
import pytest

from data_pipelines.cohort import build_cohort
from data_pipelines.follow_up import read_survival
from data_pipelines.splits import read_folds
from data_pipelines.survival import fit_time_bins, sampling_class

pytestmark = pytest.mark.real_data

# G-HANet specification, sections 3.1, 3.6, 3.7.
PUBLISHED = {
    "blca": (373, 437, 169, 348, [299, 298], [41, 22, 43, 32, 42, 53, 43, 97]),
    "ucec": (480, 539, 75, 441, [384], [19, 42, 18, 104, 19, 61, 19, 198]),
}


@pytest.fixture(params=PUBLISHED)
def found(request, real_data):
    """(name, table path, splits folder, manifest with one slide per row of the table)."""
    root = real_data / "tcga_genomics" / "mcat"
    path = root / "datasets_csv_sig" / f"tcga_{request.param}_all_clean.csv.zip"
    slides = [
        types.SimpleNamespace(slide_id=name.removesuffix(".svs"), case_id=case, n_patches=1)
        for case, names in read_survival(path).slides.items()
        for name in names
    ]
    return request.param, path, root / "splits" / "5foldcv" / f"tcga_{request.param}", slides


def cohort_of(path, slides):
    manifest = types.SimpleNamespace(slides=tuple(slides))
    return build_cohort(manifest, survival_path=path, slide_choice="all", require_follow_up=True, task="OS")


def test_check_C17_patients_slides_and_sampling_classes(found):
    name, path, _, slides = found
    patients, n_slides, deaths, single, _, classes = PUBLISHED[name]
    cohort = cohort_of(path, slides)
    assert len(cohort) == patients and sum(map(len, cohort.slides)) == n_slides == len(slides)
    assert int(cohort.survival.event.sum()) == deaths and not cohort.dropped
    assert sum(len(rows) == 1 for rows in cohort.slides) == single
    bins = fit_time_bins(*cohort.survival)
    found_classes = sampling_class(bins.assign(cohort.survival.time_months), cohort.survival.event)
    assert np.bincount(found_classes, minlength=8).tolist() == classes


def test_official_splits_under_both_protocols(found):
    name, path, folder, slides = found
    cohort = cohort_of(path, slides)
    published = read_folds(folder, cohort, stratify=False, protocol="published")
    assert {len(split.train) for split in published} == set(PUBLISHED[name][4])
    assert all(split.val_is_test and not split.not_in_cohort and not split.unassigned for split in published)
    tested = np.concatenate([split.test for split in published])
    np.testing.assert_array_equal(np.sort(tested), np.arange(len(cohort)))
    corrected = read_folds(folder, cohort, stratify=False, val_fraction=0.2)
    for a, b in zip(published, corrected, strict=True):
        np.testing.assert_array_equal(a.test, b.test)
        np.testing.assert_array_equal(np.sort(np.concatenate([b.train, b.val])), a.train)
        assert len(b.val) == len(a.train) // 5 and not b.val_is_test


def test_check_D17_a_patient_without_features_is_counted_in_cohort_and_splits(found):
    _, path, folder, slides = found
    lost = slides[0].case_id
    cohort = cohort_of(path, [slide for slide in slides if slide.case_id != lost])
    assert [(drop.case_id, drop.reason) for drop in cohort.dropped] == [(lost, "no features")]
    splits = read_folds(folder, cohort, stratify=False, val_fraction=0.0)
    assert all(split.not_in_cohort == (lost,) for split in splits)
