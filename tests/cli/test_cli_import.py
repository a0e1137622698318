"""`histokd import`: what it prints, its exit codes, and a training on what it wrote."""

import csv

import feature_folders as folders
import numpy as np
import pytest
import tiny

from data_pipelines.manifest import Manifest

CONTENT = folders.bags()


@pytest.fixture
def job(tmp_path):
    folders.trident(tmp_path / "job", CONTENT)
    return tmp_path / "job"


def test_import_of_a_trident_job(histokd, job, tmp_path):
    shown = histokd("import", job, "--out", tmp_path / "brca", "--mpp", 0.5)
    assert shown.code == 0, shown.err
    assert "layout: trident (folder 20x_256px_0px_overlap/features_uni_v1/" in shown.out
    assert "4 slides of width 8; shards: 1; encoder uni_v1, mpp 0.5, mag 20" in shown.out
    assert "TCGA barcode, first 12 characters; 4 slides of 3 cases" in shown.out
    manifest = Manifest.load(tmp_path / "brca")
    assert manifest.name == "brca" and f"{int(manifest.sizes.sum())} patches of width 8 in float16" in shown.out
    again = histokd("import", job, "--out", tmp_path / "brca", "--mpp", 0.5)
    assert again.code == 0 and "complete already" in again.out


def test_import_of_a_clam_folder_with_a_regular_expression(histokd, tmp_path):
    folders.clam(tmp_path / "clam", {"S1_P7": folders.bag(0), "S2_P8": folders.bag(1)})
    shown = histokd("import", tmp_path / "clam", "--out", tmp_path / "out")
    assert shown.code == 1 and "--cases TABLE, --case-regex" in shown.err
    shown = histokd("import", tmp_path / "clam", "--out", tmp_path / "out", "--case-regex", "_(.*)", "--workers", 2)
    assert shown.code == 0 and "layout: clam (folder h5_files/; folder pt_files/)" in shown.out
    assert [slide.case_id for slide in Manifest.load(tmp_path / "out").slides] == ["P7", "P8"]


def test_quarantine_shows_in_exit_code_output_and_file(histokd, job, tmp_path):
    folder = job / "20x_256px_0px_overlap" / "features_uni_v1"
    (folder / "TCGA-A1-0001.h5").touch()
    (folder / "TCGA-A1-0002.h5.lock").touch()
    dry = histokd("import", job, "--out", tmp_path / "out", "--dry-run")
    assert dry.code == 3 and not (tmp_path / "out").exists()
    shown = histokd("import", job, "--out", tmp_path / "out")
    assert shown.code == 3
    assert "quarantine: 2 files: 1 locked, 1 zero bytes" in shown.out
    with open(tmp_path / "out" / "quarantine.csv", newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["zero bytes", "locked"]


def test_nothing_to_import_exits_with_1_and_leaves_the_reasons(histokd, tmp_path):
    (tmp_path / "in" / "h5_files").mkdir(parents=True)
    (tmp_path / "in" / "h5_files" / "a.h5").touch()
    shown = histokd("import", tmp_path / "in", "--out", tmp_path / "out")
    assert shown.code == 1 and "none of 1 files can be imported: 1 zero bytes" in shown.err
    assert "zero bytes" in (tmp_path / "out" / "quarantine.csv").read_text()
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--mpp", "-1"), "--mpp -1.0: expected a positive number"),
        (("--magnification", "40"), "magnification is 20"),
        (("--format", "stamp"), "no features"),
        (("--cases", "nowhere.csv"), "nowhere.csv"),
        (("--exclude", "*"), "4 were excluded"),
    ],
)
def test_bad_requests_are_one_clear_line(histokd, job, tmp_path, arguments, named):
    shown = histokd("import", job, "--out", tmp_path / "out", *arguments)
    assert shown.code == 1 and named in shown.err and shown.err.startswith("histokd import: ")


def test_other_data_set_in_the_target_is_kept(histokd, job, tmp_path, cohort_dir):
    shown = histokd("import", job, "--out", cohort_dir)
    assert shown.code == 1 and "--overwrite" in shown.err
    assert Manifest.load(cohort_dir).simulated


def test_training_on_an_imported_folder(histokd, tmp_path):
    """From a TRIDENT job and two tables to a run, with the commands a user would type."""
    rng = np.random.default_rng(0)
    slides = {f"TCGA-AA-{i:04d}-01Z-00-DX1": folders.bag(i, dim=12) for i in range(24)}
    folders.trident(tmp_path / "job", slides)
    out = tmp_path / "data"
    assert histokd("import", tmp_path / "job", "--out", out).code == 0
    (out / "tables").mkdir()
    labels = "".join(f"{slide[:12]},{i % 2}\n" for i, slide in enumerate(slides))
    (out / "tables" / "labels.csv").write_text("case_id,ER\n" + labels)
    genes = {"case_id": np.array([s[:12] for s in slides]), "gene": np.array([f"G{i}" for i in range(64)])}
    np.savez(out / "tables" / "genes.npz", **genes, values=rng.normal(size=(24, 64)).astype(np.float32))
    shown = histokd(
        *tiny.train_arguments(out, tmp_path / "run", "--no-report", train__max_epochs=1, genes__ranking="anova")
    )
    assert shown.code == 0, shown.err
