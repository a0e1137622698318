"""Folds: sizes, stratification, leakage (check L), files, and the published splits."""

import dataclasses
import types

import numpy as np
import pytest

from data_pipelines import tables
from data_pipelines.cohort import Cohort, build_cohort
from data_pipelines.errors import DataError
from data_pipelines.splits import (
    Split,
    check_leakage,
    check_partition,
    make_folds,
    read_folds,
    split_fingerprint,
    write_folds,
)


def make_cohort(n=100, positives=20, slides_per_case=1, prefix="case"):
    case = tuple(f"{prefix}{i // slides_per_case:03d}" for i in range(n))
    return Cohort(
        case_id=case,
        slide_index=np.arange(n, dtype=np.int32),
        slide_id=tuple(f"{c}-{i:03d}.svs" for i, c in enumerate(case)),
        label=(np.arange(n) < positives).astype(np.int32),
        class_names=("negative", "positive"),
        unit="case" if slides_per_case == 1 else "slide",
        task="ER",
    )


def split_of(train, val, test, **fields):
    return Split(*(np.array(rows, np.int32) for rows in (train, val, test)), **fields)


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("slides_per_case", [1, 3])
def test_check_L_folds_are_disjoint_and_test_parts_partition(stratify, slides_per_case):
    cohort = make_cohort(n=90 * slides_per_case, positives=30, slides_per_case=slides_per_case)
    folds = make_folds(cohort, n_folds=5, val_fraction=0.2, stratify=stratify, seed=3)
    tested = np.concatenate([split.test for split in folds])
    np.testing.assert_array_equal(np.sort(tested), np.arange(len(cohort)))
    for split in folds:
        patients = [{cohort.case_id[row] for row in part} for part in (split.train, split.val, split.test)]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 90
        assert len(split.train) + len(split.val) + len(split.test) == len(cohort)
        assert all(part.dtype == np.int32 for part in (split.train, split.val, split.test))
        assert not split.patient_overlap


def test_sizes_are_64_16_20():
    for split in make_folds(make_cohort(), n_folds=5, val_fraction=0.2, stratify=True, seed=0):
        assert (len(split.train), len(split.val), len(split.test)) == (64, 16, 20)


def test_stratification_keeps_shares_in_every_part():
    cohort = make_cohort(n=103, positives=21)
    for split in make_folds(cohort, n_folds=5, val_fraction=0.2, stratify=True, seed=1):
        for part, share in ((split.train, 0.64), (split.val, 0.16), (split.test, 0.2)):
            assert abs(cohort.label[part].sum() - 21 * share) <= 1.2
    counts = [cohort.label[s.test].sum() for s in make_folds(cohort, n_folds=5, stratify=False, seed=1)]
    assert max(counts) - min(counts) > 1


def test_folds_are_a_function_of_the_seed():
    prints = [[split_fingerprint(s, make_cohort()) for s in make_folds(make_cohort(), seed=seed)] for seed in (7, 7, 8)]
    assert prints[0] == prints[1] and not set(prints[0]) & set(prints[2])


def test_no_validation_part_on_request():
    split = make_folds(make_cohort(), val_fraction=0.0)[0]
    assert (len(split.train), len(split.val)) == (80, 0)


@pytest.mark.parametrize(
    "cohort, options, text",
    [
        (make_cohort(), {"n_folds": 1}, "n_folds=1"),
        (make_cohort(n=4), {"n_folds": 5}, "the cohort has 4"),
        (make_cohort(n=6, slides_per_case=6), {"n_folds": 2}, "the cohort has 1.*allow_patient_overlap"),
        (make_cohort(positives=3), {}, "class 'positive' has 3 patients"),
        (make_cohort(), {"val_fraction": 1.0}, "val_fraction=1.0"),
        (make_cohort(n=6, positives=0), {"n_folds": 3, "val_fraction": 0.2}, "validation part empty"),
        (dataclasses.replace(make_cohort(), class_names=()), {}, "built without labels"),
    ],
)
def test_impossible_folds(cohort, options, text):
    with pytest.raises(DataError, match=text):
        make_folds(cohort, **options)


def test_check_L_sample_in_two_parts_is_refused_always():
    split = split_of([0, 1], [2], [1, 3])
    for allow in (False, True):
        with pytest.raises(DataError, match="'case001' is in train and in test"):
            check_leakage(split, make_cohort(), allow_patient_overlap=allow)


def test_check_L_patient_in_two_parts_is_refused_unless_allowed():
    cohort = make_cohort(n=6, slides_per_case=3)
    split = split_of([0, 1], [3, 4], [2])
    with pytest.raises(DataError, match="patient 'case000' is in train and in test"):
        check_leakage(split, cohort)
    assert check_leakage(split, cohort, allow_patient_overlap=True) is True
    assert check_leakage(split_of([0, 1, 2], [], [3, 4]), cohort) is False


def test_check_L_partition():
    cohort = make_cohort(n=4)
    check_partition([split_of([2, 3], [], [0, 1]), split_of([0, 1], [], [2, 3])], cohort)
    with pytest.raises(DataError, match="'case001' is in 2 of 2"):
        check_partition([split_of([3], [], [0, 1]), split_of([0], [], [1, 2, 3])], cohort)
    with pytest.raises(DataError, match="'case003' is in 0 of 1"):
        check_partition([split_of([], [], [0, 1, 2])], cohort)


def test_fingerprint_depends_on_ids_and_parts_not_on_rows():
    cohort, split = make_cohort(n=5), split_of([0, 1], [2], [3, 4])
    shuffled = cohort.subset(np.array([4, 3, 2, 1, 0]))
    assert split_fingerprint(split, cohort) == split_fingerprint(split_of([3, 4], [2], [1, 0]), shuffled)
    assert split_fingerprint(split, cohort) != split_fingerprint(split_of([0, 2], [1], [3, 4]), cohort)
    assert split_fingerprint(split, cohort) != split_fingerprint(split, make_cohort(n=5, prefix="other"))
    assert len(split_fingerprint(split, cohort)) == 64


def test_write_and_read_give_the_same_folds(tmp_path):
    cohort = make_cohort()
    folds = make_folds(cohort, seed=2)
    write_folds(folds, cohort, tmp_path / "splits")
    assert sorted(p.name for p in (tmp_path / "splits").iterdir()) == [f"splits_{k}.csv" for k in range(5)]
    header = (tmp_path / "splits/splits_0.csv").read_text().splitlines()[0]
    assert header == "train,train_label,val,val_label,test,test_label"
    for written, read in zip(folds, read_folds(tmp_path / "splits", cohort)):
        for part in ("train", "val", "test"):
            np.testing.assert_array_equal(getattr(read, part), getattr(written, part))
        assert not read.not_in_cohort and not read.unassigned and not read.patient_overlap


def test_folds_of_slides_are_written_by_slide_id(tmp_path):
    cohort = make_cohort(n=60, positives=30, slides_per_case=3)
    folds = make_folds(cohort, n_folds=2, seed=2)
    write_folds(folds, cohort, tmp_path)
    again = read_folds(tmp_path, cohort)
    assert [split_fingerprint(s, cohort) for s in again] == [split_fingerprint(s, cohort) for s in folds]


def write_csv(path, text):
    path.write_text(text)
    return path


def test_ids_outside_the_cohort_are_listed_and_logged(tmp_path, caplog):
    path = write_csv(tmp_path / "splits_0.csv", "train,val,test\ncase000,case001,case002\nghost1,,ghost2\n")
    (split,) = read_folds(path, make_cohort(n=5))
    assert split.not_in_cohort == ("ghost1", "ghost2") and split.unassigned == ("case003", "case004")
    assert "2 ids are not in the cohort: ghost1, ghost2" in caplog.text and "2 samples of the cohort" in caplog.text


def test_clam_files_by_slide_id_with_or_without_extension(tmp_path):
    path = write_csv(tmp_path / "splits_0.csv", ",train,val,test\n0,case000-000,case001-001,case002-002.svs\n")
    (split,) = read_folds(path, make_cohort(n=3))
    assert [list(part) for part in (split.train, split.val, split.test)] == [[0], [1], [2]]


def two_column_file(path):
    rows = [f"{i},case{i:03d},{f'case{80 + i:03d}' if i < 20 else ''}" for i in range(80)]
    return write_csv(path, "\n".join([",train,val", *rows]) + "\n")


def test_two_column_layout_reports_val_and_draws_validation_from_train(tmp_path):
    cohort = make_cohort()
    path = two_column_file(tmp_path / "splits_3.csv")
    (split,), (again,), (other,) = (read_folds(path, cohort, val_fraction=0.2, seed=s) for s in (4, 4, 5))
    np.testing.assert_array_equal(split.test, np.arange(80, 100))
    np.testing.assert_array_equal(np.union1d(split.train, split.val), np.arange(80))
    assert len(split.val) == 16 and cohort.label[split.val].sum() == 4
    assert split_fingerprint(split, cohort) == split_fingerprint(again, cohort) != split_fingerprint(other, cohort)


def test_explicit_split_of_one_patient_needs_the_flag_and_is_marked(tmp_path):
    cohort = make_cohort(n=6, slides_per_case=6)
    ids = cohort.slide_id
    text = f"train,val,test\n{ids[0]},{ids[2]},{ids[4]}\n{ids[1]},{ids[3]},{ids[5]}\n"
    path = write_csv(tmp_path / "splits_0.csv", text)
    with pytest.raises(DataError, match="splits_0.csv: patient 'case000'.*allow_patient_overlap"):
        read_folds(path, cohort)
    (split,) = read_folds(path, cohort, allow_patient_overlap=True)
    assert split.patient_overlap is True


@pytest.mark.parametrize(
    "text, message",
    [
        ("train,val,test\ncase000,case001,case000\n", "line 2: 'case000' is in train and again in test"),
        ("train,val,test\nghost,case001,ghost\n", "'ghost' is in train and again in test"),
        ("train,val,test\nx,y,z\n", "no id of the train part"),
        ("train,test\ncase000,case001\n", "expected train, val"),
        ("train,train_label,val,test\ncase000,0,case001,case002\n", "'case000' the label '0', the cohort has 1"),
    ],
)
def test_bad_split_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_folds(write_csv(tmp_path / "splits_0.csv", text), make_cohort())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_split_files_with_other_separators_and_a_mark(tmp_path, separator, encoding):
    made = make_cohort(6)
    ids = [made.case_id[i] for i in range(6)]
    text = f",train,val,test\n0,{ids[0]},{ids[2]},{ids[4]}\n1,{ids[1]},{ids[3]},{ids[5]}\n"
    (tmp_path / "splits_0.csv").write_text(text.replace(",", separator), encoding=encoding)
    (split,) = read_folds(tmp_path, made)
    assert [len(getattr(split, part)) for part in ("train", "val", "test")] == [2, 2, 2]
    (tmp_path / "splits_0.csv").write_text(f"train,val,val\n{ids[0]},{ids[1]},{ids[2]}\n")
    with pytest.raises(DataError, match="'val' occurs 2 times"):
        read_folds(tmp_path, made)


def test_folder_without_splits(tmp_path):
    with pytest.raises(DataError, match="no files splits_K.csv"):
        read_folds(tmp_path, make_cohort())


@pytest.mark.real_data
@pytest.mark.parametrize("study", ["brca", "blca", "gbmlgg"])
def test_check_L_published_splits_partition(real_data, study):
    root = real_data / "tcga_genomics/porpoise"
    cases = tables.read_survival(root / f"datasets_csv_mutsig/tcga_{study}_all_clean.csv.zip").case_id
    slides = [types.SimpleNamespace(slide_id=f"{case}-DX1", case_id=case, n_patches=1) for case in cases]
    cohort = build_cohort(types.SimpleNamespace(slides=slides))
    folds = read_folds(root / f"splits/5foldcv/tcga_{study}", cohort, stratify=False)
    assert len(folds) == 5
    check_partition(folds, cohort)
    assert not any(split.not_in_cohort or split.unassigned for split in folds)


@pytest.mark.real_data
def test_published_splits_with_fewer_labelled_cases(real_data):
    labels = tables.read_labels(real_data / "tcga_brca_ihc/labels.csv", "ER")
    slides = [types.SimpleNamespace(slide_id=f"{case}-DX1", case_id=case, n_patches=1) for case in labels.case_id]
    cohort = build_cohort(
        types.SimpleNamespace(slides=slides), labels_path=real_data / "tcga_brca_ihc/labels.csv", task="ER"
    )
    folds = read_folds(real_data / "tcga_genomics/porpoise/splits/5foldcv/tcga_brca", cohort)
    check_partition(folds, cohort)
    assert {len(split.not_in_cohort) for split in folds} == {956 - 719}
