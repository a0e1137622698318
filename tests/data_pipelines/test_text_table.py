"""Tables as people save them: byte order marks, semicolons, doubled columns, blanks, other encodings, lost zeros."""

import numpy as np
import pytest

from data_pipelines.cohort import build_cohort
from data_pipelines.errors import DataError
from data_pipelines.ids import near_matches
from data_pipelines.tables import read_gene_table, read_labels, read_survival
from data_pipelines.text_table import read_header, read_text_table
from data_pipelines.writer import DatasetWriter


@pytest.fixture
def write(tmp_path):
    def call(text, encoding="utf-8"):
        (tmp_path / "t.csv").write_bytes(text.encode(encoding))
        return tmp_path / "t.csv"

    return call


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_marks_and_line_ends(write, separator, encoding, end):
    rows = (("case_id", " ER ", "note"), ("P1", "0", "a.b"), (" P2", "", "ö"))
    path = write("".join(separator.join(row) + end for row in rows), encoding)
    table = read_text_table(path)
    assert read_header(path) == list(table.columns) == ["case_id", "ER", "note"]
    assert table.to_numpy().tolist() == [["P1", "0", "a.b"], ["P2", "", "ö"]]
    assert read_labels(path, "ER").value.tolist() == [0, -1]


def test_quoted_cells_keep_separators_and_ids_keep_zeros(write):
    table = read_text_table(write('case_id;note\n007;"a;b"\n1e5;NA\n'), ("note", "case_id"))
    assert table.to_numpy().tolist() == [["a;b", "007"], ["NA", "1e5"]]


def test_doubled_columns_are_refused_only_where_they_are_wanted(write):
    path = write(",case_id,ER,ER,x,x\n0,P1,1,0,5,6\n")
    assert read_text_table(path, ("case_id",)).to_numpy().tolist() == [["P1"]]
    with pytest.raises(DataError, match="t.csv: column 'ER' occurs 2 times"):
        read_labels(path, "ER")
    with pytest.raises(DataError, match="column 'case_id' occurs 2 times"):
        read_survival(write("case_id,case_id,time_months,event\nP1,P2,3,1\n"))
    with pytest.raises(DataError, match="column 'TP53' occurs 2 times"):
        read_gene_table(write("case_id,TP53,TP53\nP1,1,2\n"))


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("", "utf-8", "the file is empty"),
        ("case_id,ER\nMüller,1\n", "latin-1", "not UTF-8"),
        ("case_id,ER\nP1,1,2\n", "utf-8", "rows differ in their number of cells.*line 2"),
        ("case_id,PR\nP1,1\n", "utf-8", "no column 'ER'; the file has .*'PR'"),
        ("case id;ER\nP1;1\n", "utf-8", "no column 'case_id'; the file has .*'case id', 'ER'"),
    ],
)
def test_tables_that_cannot_be_read_are_named(write, text, encoding, message):
    with pytest.raises(DataError, match=f"t.csv.*{message}"):
        read_labels(write(text, encoding), "ER")


def test_genes_with_semicolons_and_decimal_commas(write):
    found = read_gene_table(write("case_id;A;B\nP1;1.5;\n"))
    assert found.values[0, 0] == 1.5 and np.isnan(found.values[0, 1])
    with pytest.raises(DataError, match="line 2, column 'A': '1,5' is no finite number"):
        read_gene_table(write("case_id;A;B\nP1;1,5;2\n"))


def test_blank_ages_and_other_clinical_cells_do_not_matter(write):
    path = write("case_id,age,is_female,survival_months,censorship\nP1,,,10,1\nP2,61.0,,3,0\n")
    found = read_survival(path)
    assert found.survival.event.tolist() == [False, True] and found.survival.time_months.tolist() == [10, 3]


def test_near_matches_name_the_mistake():
    assert near_matches(["7", "12"], ["007", "8"]) == "; 1 would match if leading zeros were kept, e.g. '7' and '007'"
    assert "file extensions" in near_matches(["a.svs"], ["a"]) and "upper and lower" in near_matches(["TCGA"], ["tcga"])
    assert near_matches(["a"], ["b"]) == ""


def test_table_whose_patients_match_no_slide_shows_both_sides(write, tmp_path):
    with DatasetWriter(tmp_path / "d", name="d", feat_dim=2) as writer:
        writer.add("007-a", "007", np.ones((2, 2), np.float16))
    from data_pipelines.manifest import Manifest

    with pytest.raises(
        DataError, match=r"the tables have \['7', '8'\], the manifest \['007'\]; 1 would match if leading"
    ):
        build_cohort(Manifest.load(tmp_path / "d"), labels_path=write("case_id,ER\n7,1\n8,0\n"), task="ER")
