"""What `write_tables` puts beside a data set: contents, availability, the outlier policies, and the account."""

import csv
import json

import foreign_tables as foreign
import numpy as np
import pytest
from foreign_tables import A, B, C
from scipy import stats

from data_pipelines import tables
from data_pipelines.errors import DataError
from data_pipelines.gene_groups import read_groups, read_molecular_table
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources import detect, layout, outliers, write
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.writer import DatasetWriter


def put(out, *paths, options=None, **request):
    options = options or Options()
    return write.write_tables(detect.read_all(paths, options), out, options, write.Request(**request))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_read_by_the_readers_of_training(tmp_path):
    done = put(tmp_path / "out", foreign.mcat(tmp_path / "tcga_toy_all_clean.csv.zip"))
    assert done.files == done.changed and done.folder == tmp_path / "out"
    labels = tables.read_labels(tmp_path / "out" / "labels.csv", "oncotree_code", label_map={"IDC": 0, "ILC": 1})
    assert dict(zip(labels.case_id, labels.value)) == {A: 0, B: 1, C: 0}
    survival = tables.read_survival(tmp_path / "out" / "survival.csv")
    assert survival.case_id == (B, A, C) and survival.survival.event.tolist() == [False, True, False]
    genes = tmp_path / "out" / "genes.npz"
    assert tables.read_gene_table(genes).names == ("TP53", "FGF4"), "rankings read expression"
    assert tables.read_gene_table(genes, suffix="_cnv").names == ("MYC",)
    whole = read_molecular_table(genes)
    assert whole.names == ("TP53_rnaseq", "FGF4_rnaseq", "MYC_cnv", "KRAS_mut")
    direct = read_molecular_table(tmp_path / "tcga_toy_all_clean.csv.zip").align(whole.case_id)
    np.testing.assert_array_equal(whole.values, direct.values, strict=True)
    assert rows_of(tmp_path / "out" / "slides.csv")[1] == {"slide_id": f"{A}-01Z-00-DX1.aa", "case_id": A}


def test_endpoints_and_missing_modalities_are_explicit(tmp_path):
    source = foreign.survpath(tmp_path / "datasets_csv")
    put(tmp_path / "out", source, endpoint="dss")
    survival = {row["case_id"]: row for row in rows_of(tmp_path / "out" / "survival.csv")}
    assert survival[A]["event"] == "0" and survival[A]["event_os"] == "1" and survival[A]["time_months_pfi"] == "4.0"
    assert survival[C]["time_months"] == survival[C]["event"] == "" and survival[C]["time_months_os"] == "3.25"
    available = {row.pop("case_id"): row for row in rows_of(tmp_path / "out" / "availability.csv")}
    assert set(available) == {A, B, C, "P-0000674"}
    assert available[B] == {"slide": "1", "rnaseq": "0", "survival": "1", "survival_dss": "1", "survival_pfi": "1"}
    assert set(available["P-0000674"].values()) == {"0"}
    assert tables.read_gene_table(tmp_path / "out" / "genes.npz").case_id == (A, C), "no row of zeros for B"
    assert read_groups(tmp_path / "out" / "groups" / "signatures.csv") == {"PATH_A": ("G0", "G1"), "PATH_B": ("G1",)}
    with pytest.raises(DataError, match=r"no follow-up for --endpoint dfi; the files have \['dss', 'os', 'pfi'\]"):
        put(tmp_path / "other", source, endpoint="dfi")


def test_stains_are_available_or_not(tmp_path):
    text = ",slide_id,HE,HER2,KI67\n0,s1,1,1,0\n1,s2,1,0,0\n"
    put(tmp_path / "out", foreign.put(tmp_path / "acrobat.csv", text))
    assert rows_of(tmp_path / "out" / "availability.csv") == [
        {"case_id": "s1", "slide": "1", "HE": "1", "HER2": "1", "KI67": "0"},
        {"case_id": "s2", "slide": "1", "HE": "1", "HER2": "0", "KI67": "0"},
    ]


def test_case_without_any_molecular_value_is_left_out_and_counted():
    values = np.array([[1, np.nan], [np.nan, np.nan]], np.float32)
    kept, without = layout.measured(GeneTable(("b", "a"), ("X_rnaseq", "Y_cnv"), values))
    assert kept.case_id == ("b",) and without == ["a"] and np.isnan(kept.values[0, 1])
    found = layout.availability(Contents(genes=GeneTable(("b", "a"), ("X_rnaseq", "Y_cnv"), values)))
    assert found == {"rnaseq": {"a": False, "b": True}, "cnv": {"a": False, "b": False}}


def toy(seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(9, 4)).astype(np.float32)
    values[3, 0], values[4, 1], values[5, 1] = 36893.0, np.nan, values[6, 1]
    names = ("A_rnaseq", "B_rnaseq", "C_cnv", "D_mut")
    return GeneTable(tuple(f"p{i}" for i in range(9)), names, values)


def test_outliers_exact_and_clip_touch_expression_only():
    table = toy()
    assert outliers.apply(table, "exact", scale="log") is table
    clipped = outliers.apply(table, "clip", scale="z-score", limit=1.5).values
    np.testing.assert_array_equal(clipped[:, 2:], table.values[:, 2:])
    np.testing.assert_array_equal(clipped[:, :2], np.clip(table.values[:, :2], -1.5, 1.5))
    assert np.isnan(clipped[4, 1]), "a missing value stays missing"
    facts = outliers.account(table)
    assert (facts["largest_gene"], facts["largest_case"], facts["genes_beyond"]) == ("A_rnaseq", "p3", 1)


def test_outliers_rank_gives_normal_scores_of_scipy():
    table = toy()
    ranked = outliers.apply(table, "rank", scale="not recorded").values
    for column in range(2):
        known = ~np.isnan(table.values[:, column])
        ranks = stats.rankdata(table.values[known, column].astype(np.float64))
        expected = stats.norm.ppf((ranks - 0.5) / known.sum())
        np.testing.assert_allclose(ranked[known, column], expected, rtol=1e-6)
        assert np.isnan(ranked[~known, column]).all()
    assert ranked[3, 0] == np.nanmax(ranked[:, 0]) < 2 and ranked[5, 1] == ranked[6, 1]
    np.testing.assert_array_equal(ranked[:, 2:], table.values[:, 2:])


@pytest.mark.parametrize(
    "policy, scale, limit, message",
    [("tame", "z-score", 1, "'tame' is unknown"), ("clip", "log", 1, "scale of this expression is log")]
    + [("clip", "z-score", -1, "positive bound")],
)
def test_bad_outlier_policies(policy, scale, limit, message):
    with pytest.raises(DataError, match=message):
        outliers.apply(toy(), policy, scale=scale, limit=limit)


def test_exact_values_are_kept_beside_tamed_ones(tmp_path):
    source = foreign.mcat(tmp_path / "t.csv.zip")
    done = put(tmp_path / "out", source, outliers="clip", clip=3.0)
    assert tables.read_gene_table(tmp_path / "out" / "genes.npz").values.max() == 3
    exact = tables.read_gene_table(tmp_path / "out" / "genes_exact.npz")
    assert exact.values.max() == np.float32(36893.2) and not done.account["warnings"]
    done = put(tmp_path / "exact", source)
    assert "genes_exact.npz" not in done.files
    assert "1 z-scores of 1 genes lie beyond 50, up to 36893 (FGF4_rnaseq)" in done.account["warnings"][0]


def test_account_says_what_was_kept_and_left_out_and_holds_no_path(tmp_path):
    done = put(tmp_path / "out", foreign.mcat(tmp_path / "t.csv.zip"))
    text = (tmp_path / "out" / "account-mcat.json").read_text()
    account = json.loads(text)
    assert account == done.account and str(tmp_path) not in text
    assert account["sources"][0]["file"] == "t.csv.zip" and len(account["sources"][0]["sha256"]) == 64
    assert account["cases"] == {"n": 3, "slides": 4, "with_several_slides": 1, "most_slides": 2, "not_tcga": []}
    assert account["tables"]["survival.csv"]["os"]["events"] == 1
    assert account["tables"]["genes.npz"]["columns"] == {"rnaseq": 2, "cnv": 1, "mut": 1}
    assert account["tables"]["labels.csv"]["columns"]["age"]["not_available"] == 1
    assert {item["reason"] for item in account["left_out"]} >= {
        "a mark of the authors that their own splits do not use"
    }


def test_repetition_changes_nothing_and_other_content_needs_overwrite(tmp_path):
    one, two = tmp_path / "one.csv.zip", foreign.put(tmp_path / "l.csv", f"case_id,ER\n{A},1\n{B},0\n")
    put(tmp_path / "out", foreign.mcat(one))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert put(tmp_path / "out", one).changed == ()
    with pytest.raises(DataError, match="labels.csv.*exist with other content.*--overwrite"):
        put(tmp_path / "out", two)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    done = put(tmp_path / "out", two, overwrite=True)
    assert "labels.csv" in done.changed and (tmp_path / "out" / "account-labels.json").exists()
    put(tmp_path / "some", one, only=("survival", "genes"))
    assert {path.name for path in (tmp_path / "some").iterdir()} == {"survival.csv", "genes.npz", "account-mcat.json"}
    put(tmp_path / "some", two, only=("labels",))
    with pytest.raises(DataError, match="--only pictures: choose from labels"):
        put(tmp_path / "other", one, only=("pictures",))
    with pytest.raises(DataError, match="nothing to write: the files hold no splits"):
        put(tmp_path / "other", one, only=("splits",))


def dataset(path, slides):
    with DatasetWriter(path, name="toy", feat_dim=2) as writer:
        for slide, case in slides:
            writer.add(slide, case, np.ones((1, 2), np.float32))
    return path


def test_tables_of_a_data_set_lie_in_its_folder_and_are_joined(tmp_path):
    source = foreign.mcat(tmp_path / "t.csv.zip")
    target = dataset(tmp_path / "data", [(f"{A}-01Z-00-DX1.aa", A), ("TCGA-ZZ-0009-DX1", "TCGA-ZZ-0009")])
    done = put(target, source)
    assert done.folder == target / "tables"
    joined = done.account["dataset"]
    assert (joined["cases"], joined["cases_matched"], joined["cases_without_a_row"]) == (2, 1, ["TCGA-ZZ-0009"])
    assert [row["slide"] for row in rows_of(target / "tables" / "availability.csv")] == ["0", "1", "0"]
    other = dataset(tmp_path / "other", [("s1", A.casefold())])
    with pytest.raises(DataError, match="none of the 3 cases.*would match if upper and lower case agreed"):
        put(other, source)


def test_splits_are_written_for_read_folds_and_leaks_are_refused(tmp_path):
    put(tmp_path / "mmp", foreign.mmp(tmp_path / "source"))
    assert rows_of(tmp_path / "mmp" / "splits" / "splits_0.csv")[0] == {"train": B, "val": A}
    put(tmp_path / "pb", foreign.patho_bench(tmp_path / "k=all.tsv"), only=("splits",))
    assert rows_of(tmp_path / "pb" / "splits" / "splits_0.csv") == [{"train": A, "val": B, "test": C}]
    leaking = f"slide_id,HE,HER2,split\n{A}-01Z-00-DX1,1,0,train\n{A}-01Z-00-DX2,1,0,test\n"
    with pytest.raises(DataError, match=f"fold 0: patient '{A}' is in train and in test"):
        put(tmp_path / "bad", foreign.put(tmp_path / "leak.csv", leaking))
    by_slide = f"train,val\n{A}-01Z-00-DX1,{A}-01Z-00-DX2\n"
    with pytest.raises(DataError, match="must not share patients"):
        put(tmp_path / "bad", foreign.put(tmp_path / "splits_0.csv", by_slide))
    with pytest.raises(DataError, match="expected train and val or test, not empty"):
        put(tmp_path / "bad", foreign.put(tmp_path / "splits_0.csv", f"train,val\n{A},\n"))
    assert not (tmp_path / "bad").exists()


def test_flipped_censoring_is_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    months = rng.exponential(30, 60)
    lines = [f"p{i},{m:.2f},{int(m > np.quantile(months, 0.3))}" for i, m in enumerate(months)]
    path = foreign.put(tmp_path / "l.csv", "case_id,time_months,event\n" + "\n".join(lines) + "\n")
    done = put(tmp_path / "out", path)
    assert "events and censorings are probably swapped" in done.account["warnings"][0]
