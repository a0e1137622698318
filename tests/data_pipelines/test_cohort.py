"""The join of slides, labels, genes and survival: nothing is lost without being listed."""

import json
import types

import numpy as np
import pytest

from data_pipelines import cohort as cohorts
from data_pipelines import tables
from data_pipelines.cohort import Drop, build_cohort
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable


def manifest_of(*slides):
    """A manifest from (slide_id, case_id, n_patches) triples."""
    rows = [types.SimpleNamespace(slide_id=s, case_id=c, n_patches=n) for s, c, n in slides]
    return types.SimpleNamespace(slides=tuple(rows))


MANIFEST = manifest_of(
    ("D-1", "D", 5),
    ("A-2", "A", 9),
    ("A-3", "A", 9),
    ("A-1", "A", 4),
    ("B-1", "B", 7),
    ("C-1", "C", 3),
    ("F-1", "F", 2),
)


@pytest.fixture
def paths(tmp_path):
    """Labels for A-E (D blank), genes for A, B, E, G; survival for A."""
    (tmp_path / "labels.csv").write_text("case_id,ER\nE,1\nC,0\nB,0\nA,1\nD,\n")
    (tmp_path / "survival.csv").write_text("case_id,time_months,event\nA,3,1\n")
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    tables.write_gene_table(GeneTable(tuple("GEBA"), ("X", "Y"), values), tmp_path / "genes.npz")
    return {
        "labels_path": tmp_path / "labels.csv",
        "genes_path": tmp_path / "genes.npz",
        "survival_path": tmp_path / "survival.csv",
        "task": "ER",
    }


def test_join_keeps_and_lists_everything(paths):
    cohort = build_cohort(MANIFEST, **paths)
    assert cohort.case_id == ("A", "B") and cohort.slide_id == ("A-1", "B-1") and len(cohort) == 2
    np.testing.assert_array_equal(cohort.slide_index, [3, 4])
    np.testing.assert_array_equal(cohort.label, [1, 0])
    np.testing.assert_array_equal(cohort.genes.values, [[6, 7], [4, 5]])
    np.testing.assert_array_equal(cohort.survival.time_months, [3, np.nan])
    np.testing.assert_array_equal(cohort.survival.event, [True, False])
    assert cohort.slide_index.dtype == cohort.label.dtype == np.int32
    assert set(cohort.dropped) == {
        Drop("A", cohorts.EXTRA_SLIDE, "A-2"),
        Drop("A", cohorts.EXTRA_SLIDE, "A-3"),
        Drop("C", cohorts.NO_GENES, "C-1"),
        Drop("D", tables.UNAVAILABLE, "D-1"),
        Drop("E", cohorts.NO_FEATURES),
        Drop("F", cohorts.NO_LABEL, "F-1"),
    }
    report = json.loads(json.dumps(cohort.report()))
    assert report["n"] == 2 and report["classes"] == {"0": 1, "1": 1}
    assert report["dropped"][cohorts.EXTRA_SLIDE] == {"n": 2, "ids": ["A-2", "A-3"]}
    assert report["dropped"][cohorts.NO_FEATURES] == {"n": 1, "ids": ["E"]}
    assert report["n_with_survival"] == report["n_events"] == 1


@pytest.mark.parametrize("choice, slide", [("first_sorted", "A-1"), ("largest_bag", "A-2"), ("listing_order", "A-2")])
def test_slide_choice(paths, choice, slide):
    assert build_cohort(MANIFEST, **paths, slide_choice=choice).slide_id[0] == slide


def test_listing_order_follows_the_manifest_and_the_others_do_not(paths):
    reordered = types.SimpleNamespace(slides=MANIFEST.slides[::-1])
    for choice, slide in (("first_sorted", "A-1"), ("largest_bag", "A-2"), ("listing_order", "A-1")):
        cohort = build_cohort(reordered, **paths, slide_choice=choice)
        assert cohort.slide_id[0] == slide and cohort.case_id == ("A", "B")
        assert reordered.slides[cohort.slide_index[0]].slide_id == slide


def test_cases_without_genes_can_be_kept(paths):
    cohort = build_cohort(MANIFEST, **paths, require_genes=False)
    assert cohort.case_id == ("A", "B", "C")
    np.testing.assert_array_equal(cohort.has_genes, [True, True, False])
    np.testing.assert_array_equal(cohort.genes.values[2], 0)
    assert cohorts.NO_GENES not in cohort.report()["dropped"] and cohort.report()["n_without_genes"] == 1


def test_slides_without_any_table():
    cohort = build_cohort(MANIFEST)
    assert cohort.case_id == ("A", "B", "C", "D", "F") and cohort.genes is None and not cohort.has_genes.any()
    np.testing.assert_array_equal(cohort.label, -1)
    with pytest.raises(DataError, match="built without labels"):
        cohort.labels_for(np.array([0]))


def test_unit_slide_makes_every_slide_a_sample(tmp_path):
    (tmp_path / "labels.csv").write_text("case_id,t\nA-1,0\nA-3,1\nB-1,2\nX-1,1\n")
    values = np.arange(3, dtype=np.float32)[:, None]
    tables.write_gene_table(GeneTable(("B-1", "A-3", "A-1"), ("X",), values), tmp_path / "genes.npz")
    files = {"labels_path": tmp_path / "labels.csv", "genes_path": tmp_path / "genes.npz"}
    cohort = build_cohort(MANIFEST, **files, task="t", unit="slide")
    assert cohort.sample_id == ("A-1", "A-3", "B-1") and cohort.case_id == ("A", "A", "B")
    np.testing.assert_array_equal(cohort.label, [0, 1, 2])
    np.testing.assert_array_equal(cohort.genes.values[:, 0], [2, 1, 0])
    assert Drop("X-1", cohorts.NO_FEATURES) in cohort.dropped and Drop("A", cohorts.NO_LABEL, "A-2") in cohort.dropped
    assert cohort.report()["n_cases"] == 2


def test_subset_aligns_every_field(paths):
    cohort = build_cohort(MANIFEST, **paths, require_genes=False).subset(np.array([2, 0]))
    assert cohort.case_id == ("C", "A") and cohort.slide_id == ("C-1", "A-1")
    np.testing.assert_array_equal(cohort.label, [0, 1])
    np.testing.assert_array_equal(cohort.labels_for([1]), [1])
    np.testing.assert_array_equal(cohort.has_genes, [False, True])
    np.testing.assert_array_equal(cohort.genes.values, [[0, 0], [6, 7]])
    np.testing.assert_array_equal(cohort.survival.time_months, [np.nan, 3])


def test_bad_requests(paths, tmp_path):
    with pytest.raises(DataError, match="data.slide_choice='best'"):
        build_cohort(MANIFEST, **paths, slide_choice="best")
    with pytest.raises(DataError, match="unit='spot'"):
        build_cohort(MANIFEST, **paths, unit="spot")
    with pytest.raises(DataError, match="need the name of a task"):
        build_cohort(MANIFEST, labels_path=paths["labels_path"])
    with pytest.raises(DataError, match=r"no sample of the 1 slides joins.*'no label': 1"):
        build_cohort(manifest_of(("Z-1", "Z", 3)), **paths)


@pytest.mark.real_data
@pytest.mark.parametrize("task, positive, negative", [("ER", 554, 165), ("PR", 484, 232), ("HER2", 103, 602)])
def test_real_brca_cohort(real_data, task, positive, negative):
    table = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip"
    cases = tables.read_labels(real_data / "tcga_brca_ihc/labels.csv", task).case_id
    cohort = build_cohort(
        manifest_of(*((f"{case}-DX1", case, 10) for case in cases)),
        labels_path=real_data / "tcga_brca_ihc/labels.csv",
        task=task,
        genes_path=table,
        survival_path=table,
    )
    report = cohort.report()
    assert report["classes"] == {"0": negative, "1": positive}
    assert report["n"] == report["n_with_genes"] == report["n_with_survival"] == positive + negative
    assert report["dropped"] == {tables.UNAVAILABLE: {"n": 750 - len(cohort), "ids": report_ids(cohort)}}
    assert report["n_duplicate_gene_rows"] == 66


def report_ids(cohort):
    return sorted(drop.slide_id for drop in cohort.dropped)
