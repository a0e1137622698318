"""Readers of label, gene, survival and ranking tables, on good and on bad files."""

import gzip
import os

import numpy as np
import pytest

from data_pipelines import tables
from data_pipelines.errors import DataError, StorageError
from data_pipelines.genes import GeneTable


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="table.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_read_labels_blank_is_not_available(write):
    path = write("case_id,ER,PR\nA,1,0\nB,,1\nC,0.0,\nA,1,\n")
    er = tables.read_labels(path, "ER")
    assert er.case_id == ("A", "B", "C") and er.class_names == ("0", "1")
    np.testing.assert_array_equal(er.value, [1, -1, 0])
    assert er.value.dtype == np.int32 and er.missing == {"B": tables.UNAVAILABLE}
    # A blank cell does not contradict the value of another row of the case.
    np.testing.assert_array_equal(tables.read_labels(path, "PR").value, [0, 1, -1])


HER2 = (
    "case_id,HER2,HER2_FISH\nA,Positive,\nB,negative,\nC,Equivocal,Positive\nD,Indeterminate,\nE,Equivocal,Negative\n"
)


@pytest.mark.parametrize(
    "policy, expected",
    [("drop", [1, 0, -1, -1, -1]), ("negative", [1, 0, 0, 0, 0]), ("fish_resolved", [1, 0, 1, -1, 0])],
)
def test_her2_equivocal_policies(write, policy, expected):
    labels = tables.read_labels(write(HER2), "HER2", her2_equivocal=policy)
    np.testing.assert_array_equal(labels.value, expected)
    assert labels.class_names == ("negative", "positive")
    assert set(labels.missing) == {case for case, value in zip("ABCDE", expected) if value < 0}


def test_her2_policy_needs_fish_column_and_a_known_name(write):
    path = write("case_id,HER2\nA,Positive\nB,Equivocal\n")
    with pytest.raises(DataError, match="line 3, column 'HER2'.*needs a column 'HER2_FISH'"):
        tables.read_labels(path, "HER2", her2_equivocal="fish_resolved")
    with pytest.raises(DataError, match="labels.her2_equivocal='keep'"):
        tables.read_labels(path, "HER2", her2_equivocal="keep")


def test_equivocal_policy_is_for_her2_only(write):
    labels = tables.read_labels(write("case_id,ER\nA,Positive\nB,Equivocal\n"), "ER", her2_equivocal="negative")
    np.testing.assert_array_equal(labels.value, [1, -1])
    assert labels.missing == {"B": tables.EQUIVOCAL}


def test_multi_class_by_integer_and_by_label_map(write):
    assert tables.read_labels(write("case_id,t\nA,2\nB,0\nC,1\n"), "t").class_names == ("0", "1", "2")
    path = write("case_id,slide_id,label\nA,a1,LumA\nB,b1,Basal\nC,c1,LumB\nD,d1,\n")
    labels = tables.read_labels(path, "label", label_map={"Basal": 0, "LumA": 1, "LumB": 1})
    np.testing.assert_array_equal(labels.value, [1, 0, 1, -1])
    assert labels.class_names == ("Basal", "LumA/LumB")
    with pytest.raises(DataError, match=r"line 2, column 'label': 'LumA' is not in the label map.*Basal"):
        tables.read_labels(path, "label", label_map={"Basal": 0})


@pytest.mark.parametrize(
    "text, message",
    [
        ("case_id,ER\nA,1\nB,maybe\n", "line 3, column 'ER': 'maybe' is no label"),
        ("case_id,ER\nA,1\nB,-1\n", "'-1' is no label"),
        ("case_id,ER\nA,1\nB,0.5\n", "'0.5' is no label"),
        ("case_id,ER\nA,1\nB,0\nA,0\n", "line 4.*case 'A' has class 0 here but 1 in line 2"),
        ("case_id,ER\nA,1\n,0\n", "line 3: case_id is empty"),
        ("case_id,ER\nA,0\nB,2\n", r"classes are \[0, 2\]; expected 0..C-1"),
        ("case_id,PR\nA,0\n", r"no column 'ER'; the file has \['case_id', 'PR'\]"),
        ("patient,ER\nA,0\n", "no column 'case_id'"),
    ],
)
def test_bad_label_tables_name_file_line_and_field(write, text, message):
    with pytest.raises(DataError, match=message) as caught:
        tables.read_labels(write(text), "ER")
    assert "table.csv" in str(caught.value)


def test_gene_npz_round_trip(tmp_path):
    values = np.array([[1.5, np.nan], [-2, 36893.25], [0, 0]], np.float32)
    table = GeneTable(("A", "B", "C"), ("X", "Y"), values, has_genes=np.array([True, True, False]))
    tables.write_gene_table(table, tmp_path / "genes.npz")
    again = tables.read_gene_table(tmp_path / "genes.npz")
    assert again.case_id == ("A", "B") and again.names == ("X", "Y")
    np.testing.assert_array_equal(again.values, values[:2])
    assert os.listdir(tmp_path) == ["genes.npz"]


def test_gene_writer_leaves_no_partial_file(tmp_path, monkeypatch):
    table = GeneTable(("A",), ("X",), np.ones((1, 1), np.float32))

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="genes.npz"):
        tables.write_gene_table(table, tmp_path / "genes.npz")
    assert not (tmp_path / "genes.npz").exists()
    with pytest.raises(DataError, match="written as .npz"):
        tables.write_gene_table(table, tmp_path / "genes.csv")


def test_gene_npz_with_missing_field(tmp_path):
    np.savez(tmp_path / "genes.npz", case_id=np.array(["A"]), values=np.ones((1, 1), np.float32))
    with pytest.raises(DataError, match=r"no field \['gene'\]"):
        tables.read_gene_table(tmp_path / "genes.npz")


def test_plain_gene_csv(write):
    table = tables.read_gene_table(write(",case_id,TP53,ESR1\n0,A,1.5,\n1,B,-2,3\n"))
    assert table.names == ("TP53", "ESR1") and table.case_id == ("A", "B")
    np.testing.assert_array_equal(table.values, np.array([[1.5, np.nan], [-2, 3]], np.float32))


SLIDES = (
    ",case_id,slide_id,survival_months,censorship,TP53_rnaseq,MYC_cnv,ESR1_rnaseq\n"
    "0,A,a2.svs,10.5,0.0,1,2,3\n1,A,a1.svs,10.5,0.0,7,8,9\n2,B,b1.svs,20,1.0,4,-1,5\n3,C,c1.svs,,,6,0,7\n"
)


def test_slide_level_gene_table_reads_by_name_keeps_first_row_and_counts(tmp_path):
    path = tmp_path / "all_clean.csv.gz"
    path.write_bytes(gzip.compress(SLIDES.encode()))
    table = tables.read_gene_table(path)
    assert table.names == ("TP53", "ESR1") and table.case_id == ("A", "B", "C") and table.n_duplicate_rows == 1
    np.testing.assert_array_equal(table.values, [[1, 3], [4, 5], [6, 7]])
    assert tables.read_gene_table(path, suffix="_cnv").names == ("MYC",)
    with pytest.raises(DataError, match=r"'\*_mut'.*'_rnaseq': 2, '_cnv': 1, '_mut': 0"):
        tables.read_gene_table(path, suffix="_mut")


@pytest.mark.parametrize(
    "text, message",
    [
        ("case_id,X\nA,1\nB,high\n", "line 3, column 'X': 'high' is no finite number"),
        ("case_id,X\nA,inf\n", "line 2, column 'X'"),
        ("case_id,slide_id,age\nA,a,3\n", "no gene column"),
        ("patient,X\nA,1\n", "no column 'case_id'"),
        ("case_id,X\nA,1\n,2\n", "line 3: case_id is empty"),
    ],
)
def test_bad_gene_tables(write, text, message):
    with pytest.raises(DataError, match=message):
        tables.read_gene_table(write(text))


def test_survival_of_both_layouts(write):
    ours = tables.read_survival(write("case_id,time_months,event\nA,10.5,1\nB,20,0\nC,,\n"))
    theirs = tables.read_survival(write(SLIDES))
    for table in (ours, theirs):
        assert table.case_id == ("A", "B", "C")
        np.testing.assert_array_equal(table.survival.time_months, [10.5, 20, np.nan])
        # Censorship 1 means censored, so the event is its complement.
        np.testing.assert_array_equal(table.survival.event, [True, False, False])


@pytest.mark.parametrize(
    "text, message",
    [
        ("case_id,time_months,event\nA,-1,1\n", "line 2, column 'time_months': '-1'"),
        ("case_id,time_months,event\nA,soon,1\n", "'soon'"),
        ("case_id,time_months,event\nA,1,2\n", "line 2, column 'event': '2' must be 0 or 1"),
        ("case_id,survival_months,censorship\nA,1,1\nA,2,1\n", "line 3: case 'A'.*earlier"),
        ("case_id,months\nA,1\n", "no column 'survival_months'"),
    ],
)
def test_bad_survival_tables(write, text, message):
    with pytest.raises(DataError, match=message):
        tables.read_survival(write(text))


def test_ranking_table(write):
    assert tables.read_ranking_table(write("gene,p\nX,0.5\nY,1e-9\n")) == {"X": 0.5, "Y": 1e-9}
    for text, message in (
        ("gene,p\nX,2\n", "'2' of gene 'X'"),
        ("gene,p\nX,1\nX,1\n", "twice"),
        ("g,p\nX,1\n", "'gene'"),
    ):
        with pytest.raises(DataError, match=message):
            tables.read_ranking_table(write(text))


@pytest.mark.real_data
def test_real_porpoise_brca_counts(real_data):
    path = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip"
    genes, follow_up = tables.read_gene_table(path), tables.read_survival(path)
    assert genes.values.shape == (956, 1558) and genes.n_duplicate_rows == 1022 - 956
    assert len(follow_up.case_id) == 956 and follow_up.survival.event.sum() == 130
    assert "ERBB2" in genes.names and "ESR1" not in genes.names and np.isfinite(genes.values).all()
    assert 36892 < genes.values.max() < 36894


@pytest.mark.real_data
@pytest.mark.parametrize("task, positive, negative", [("ER", 554, 165), ("PR", 484, 232), ("HER2", 103, 602)])
def test_real_label_counts(real_data, task, positive, negative):
    labels = tables.read_labels(real_data / "tcga_brca_ihc/labels.csv", task)
    assert len(labels.case_id) == 750
    assert ((labels.value == 1).sum(), (labels.value == 0).sum()) == (positive, negative)
    path = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip"
    labelled = {case for case, value in zip(labels.case_id, labels.value) if value >= 0}
    assert labelled <= set(tables.read_gene_table(path).case_id)


@pytest.mark.real_data
@pytest.mark.parametrize(
    "table, genes", [("mcat/datasets_csv_sig/tcga_blca", 2814), ("porpoise/datasets_csv_mutsig/tcga_blca", 1554)]
)
def test_real_blca_tables_of_two_column_orders(real_data, table, genes):
    path = real_data / f"tcga_genomics/{table}_all_clean.csv.zip"
    assert tables.read_gene_table(path).values.shape == (373, genes)
    assert tables.read_survival(path).survival.event.sum() == 169


@pytest.mark.real_data
def test_real_table_without_expression_says_so(real_data):
    path = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_ucec_all_clean.csv.zip"
    with pytest.raises(DataError, match="'_mut': 1406"):
        tables.read_gene_table(path)
