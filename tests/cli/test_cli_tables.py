"""`histokd tables`: what it prints, its exit codes, and that validation and training take what it wrote."""

import json

import foreign_tables as foreign
import numpy as np
import pytest
from foreign_tables import A, B, C

from data_pipelines.table_sources import detect
from data_pipelines.writer import DatasetWriter
from histokd_jax.cli import tables as command


def test_formats_of_the_command_line_are_those_of_the_readers():
    assert command.FORMATS == ("auto", *detect.SOURCES)


def test_account_of_a_published_table(histokd, tmp_path):
    source = foreign.mcat(tmp_path / "tcga_toy_all_clean.csv.zip")
    shown = histokd("tables", source, "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert "tcga_toy_all_clean.csv.zip: mcat (columns case_id, slide_id, survival_months, censorship" in shown.out
    for text in (
        "cases     3; 4 slides, 1 cases with several",
        "label     oncotree_code: IDC 2, ILC 1; 0 not available",
        "survival  os: 3 cases, 1 events, 0 without follow-up",
        "genes     3 cases: 2 rnaseq, 1 cnv, 1 mut; 0 values missing",
        "left out  1 column (site): tables lose its leading zero",
        "warning   1 z-scores of 1 genes lie beyond 50",
        "account-mcat.json (6 written)",
    ):
        assert text in shown.out, text
    assert "(nothing changed)" in histokd("tables", source, "--out", tmp_path / "out").out


def test_tables_beside_a_data_set_pass_validation(histokd, tmp_path):
    rng = np.random.default_rng(0)
    with DatasetWriter(tmp_path / "data", name="toy", feat_dim=4) as writer:
        for case, slide in foreign.SLIDES:
            writer.add(slide, case, rng.normal(size=(5, 4)).astype(np.float32))
    source = foreign.mcat(tmp_path / "tcga_toy_all_clean.csv.zip")
    shown = histokd("tables", source, "--out", tmp_path / "data", "--outliers", "rank")
    assert shown.code == 0 and "data set  3 of its 3 cases are in the tables; 0 cases" in shown.out
    options = ("--task", "oncotree_code", "--label-map", "IDC=0,ILC=1", "--json", tmp_path / "report.json")
    shown = histokd("validate", tmp_path / "data", *options)
    assert shown.code == 0, shown.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["tables"]) == {
        *("labels.csv", "survival.csv", "genes.npz", "genes_exact.npz", "slides.csv", "availability.csv"),
    }
    assert report["tables"]["slides.csv"]["slides_without_features"] == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--format", "stamp"), "no column 'PATIENT'"),
        (("--endpoint", "dss"), "--endpoint dss"),
        (("--only", "x"), "--only x"),
        (("--outliers", "clip", "--clip", "0"), "--clip 0.0"),
    ],
)
def test_bad_requests_are_one_clear_line(histokd, tmp_path, arguments, named):
    shown = histokd("tables", foreign.mcat(tmp_path / "t.csv.zip"), "--out", tmp_path / "out", *arguments)
    assert shown.code == 1 and named in shown.err and shown.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_label_columns_and_cases(histokd, tmp_path):
    path = foreign.put(tmp_path / "c.csv", f"case_id,slide_id,x,y\n{A},a,1,2\n{B},b,1,2\n{C},c,0,2\n")
    shown = histokd("tables", path, "--out", tmp_path / "out", "--label-columns", "x")
    assert shown.code == 0 and "label     x: 0 1, 1 2" in shown.out
    assert (tmp_path / "out" / "labels.csv").read_text() == f"case_id,x\n{B},1\n{A},1\n{C},0\n"
