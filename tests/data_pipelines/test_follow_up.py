"""Follow-up tables of other endpoints, and columns that contradict each other."""

import pytest

from data_pipelines.errors import DataError
from data_pipelines.follow_up import FollowUpColumns, read_survival
from data_pipelines.genes import GeneTable

DSS = """case_id,slide_id,survival_months,censorship,dss_months,dss_censorship
A,A1,10,1,9,0
A,A2,10,1,9,0
B,B1,4,0,4,0
"""


def test_columns_of_another_endpoint(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(DSS)
    overall = read_survival(path)
    assert overall.survival.event.tolist() == [False, True] and overall.slides == {"A": ("A1", "A2"), "B": ("B1",)}
    disease = read_survival(path, FollowUpColumns("dss_months", censorship="dss_censorship"))
    assert disease.survival.time_months.tolist() == [9, 4] and disease.survival.event.tolist() == [True, True]


@pytest.mark.parametrize("columns", [{"time": "t"}, {"event": "e"}, {"time": "t", "event": "e", "censorship": "c"}])
def test_incomplete_columns_are_refused(columns):
    with pytest.raises(DataError, match=r"survival\.time_column needs exactly one"):
        FollowUpColumns(**columns)


@pytest.mark.parametrize("columns", [{"event": "censorship_dss"}, {"censorship": "event"}])
def test_a_status_column_named_after_the_other_is_refused(columns):
    with pytest.raises(DataError, match="its name says"):
        FollowUpColumns(time="t", **columns)


def test_contradicting_status_columns_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("case_id,time_months,event,censorship\nA,1,1,0\nB,2,1,1\n")
    with pytest.raises(DataError, match="line 3: event is 1 and censorship 1.*flipped"):
        read_survival(path)


def test_check_B13_answers_are_never_features():
    import numpy as np

    from data_pipelines.tabular import ColumnSelection, select_columns

    values = np.array([[1, 5, 0], [3, 5, 1], [1000, 5, 1]], np.float32)
    genes = GeneTable(tuple("ABC"), ("TP53_rnaseq", "X_cnv", "Y_mut"), values)
    chosen = select_columns(genes, np.array([0, 1]), clip=4.0)
    np.testing.assert_allclose(chosen.apply_table(genes), [[-1, 0, -1], [1, 0, 1], [4, 0, 1]])
    other = ColumnSelection.from_json(chosen.to_json())
    np.testing.assert_array_equal(other.apply_table(genes), chosen.apply_table(genes))
    leaking = GeneTable(tuple("ABC"), ("TP53_rnaseq", "censorship", "Y_mut"), values)
    with pytest.raises(DataError, match=r"\['censorship'\]"):
        select_columns(leaking, np.array([0, 1]))
    values[1, 0] = np.nan
    with pytest.raises(DataError, match="TP53_rnaseq.*case 'B'"):
        select_columns(genes, np.array([0, 1]))
    filled = select_columns(genes, np.array([0, 1, 2]), nan_policy="zero").apply_table(genes)
    assert filled[1, 0] == 0
