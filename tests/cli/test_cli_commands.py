"""Every command on a tiny data set: what it writes, and that the pieces fit together."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from data_pipelines.manifest import Manifest
from data_pipelines.simulate import simulate_cohort
from histokd_jax.evals.predictions import read_predictions


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    """Another data set with labels and genes."""
    path = tmp_path_factory.mktemp("external") / "data"
    simulate_cohort(path, dataclasses.replace(tiny.SPEC, n_cases=16, seed=7))
    return path


def test_train_writes_a_run_directory_and_says_so(finished_run):
    for name in ("config.json", "run_manifest.json", "summary.json", "report.html", "predictions_val.csv"):
        assert (finished_run / name).is_file(), name
    for name in ("metrics.jsonl", "fold.json", "model/model.json", "predictions_test.csv"):
        assert (finished_run / "fold_1" / name).is_file(), name
    assert any((finished_run / "fold_0" / "tensorboard").iterdir())
    manifest = read_json(finished_run / "run_manifest.json")
    assert manifest["command"].startswith("histokd train --config configs/mkd.py:er,fold=0")
    with (finished_run / "predictions_test.csv").open() as stream:
        assert next(csv.reader(stream))[:5] == ["case_id", "slide_id", "fold", "mode", "label"]


def test_everything_a_reader_sees_says_simulated(finished_run, histokd, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    assert read_json(finished_run / "summary.json")["simulated"] is True
    assert "simulated bags" in (finished_run / "report.html").read_text()
    assert "simulated bags" in histokd("evaluate", "--workdir", workdir, "--bootstrap", 5).out


def test_print_config_trains_nothing(histokd, tmp_path):
    shown = histokd("train", "--config", "configs/mkd.py:her2", "--config.train.b=8", "--print-config")
    assert shown.code == 0
    printed = json.loads(shown.out)
    assert printed["task"] == "HER2" and printed["train"]["b"] == 8


def test_evaluate_reproduces_the_summary_of_the_run(histokd, finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    stored = (workdir / "summary.json").read_bytes()
    (workdir / "summary.json").unlink()
    shown = histokd("evaluate", "--workdir", workdir)
    assert shown.code == 0 and "AUROC" in shown.out
    assert (workdir / "summary.json").read_bytes() == stored


def test_evaluate_takes_more_resamples(histokd, finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    assert histokd("evaluate", "--workdir", workdir, "--bootstrap", 20).code == 0
    summary, stored = read_json(workdir / "summary.json"), read_json(finished_run / "summary.json")
    assert summary["bootstrap"]["resamples"] == 20
    for mode, entry in stored["modes"].items():
        assert summary["modes"][mode]["metrics"]["auroc"]["mean"] == entry["metrics"]["auroc"]["mean"]


def test_evaluate_on_another_data_set(histokd, finished_run, external, tmp_path):
    shown = histokd("evaluate", "--workdir", finished_run, "--data", external, "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["external"] is True and summary["simulated"] is True and summary["task"] == "ER"
    assert summary["data_fingerprint"] == Manifest.load(external).fingerprint()
    assert list(summary["modes"]) == ["pathology"] and summary["folds"] == [0, 1]
    table = read_predictions(tmp_path / "out" / "predictions_test.csv")
    assert len(table) == 2 * 16, "every model predicts the whole set"
    assert (table.label >= 0).all()
    assert not (finished_run / "external").exists()


def test_evaluate_on_another_data_set_with_genes(histokd, finished_run, external, tmp_path):
    shown = histokd(
        *("evaluate", "--workdir", finished_run, "--data", external, "--mode", "both"),
        *("--genes", external / "tables" / "genes.npz", "--out", tmp_path),
    )
    assert shown.code == 0, shown.err
    assert list(read_json(tmp_path / "summary.json")["modes"]) == ["both"]


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_folder_that_is_no_run_is_refused(histokd, tmp_path, command):
    arguments = ["--workdir", tmp_path] if command == "evaluate" else [tmp_path]
    shown = histokd(command, *arguments)
    assert shown.code == 1 and tmp_path.name in shown.err


def test_evaluate_refuses_a_label_table_with_other_classes(histokd, finished_run, external, tmp_path):
    labels = tmp_path / "labels.csv"
    cases = [slide.case_id for slide in Manifest.load(external).slides]
    labels.write_text("case_id,ER\n" + "".join(f"{case},{i % 3}\n" for i, case in enumerate(cases)))
    shown = histokd(
        "evaluate", "--workdir", finished_run, "--data", external, "--labels", labels, "--out", tmp_path / "o"
    )
    assert shown.code == 1 and "classes" in shown.err and "labels.csv" in shown.err


def test_predict_from_slides_alone(histokd, finished_run, external, tmp_path):
    bare = shutil.copytree(external, tmp_path / "bare")
    shutil.rmtree(bare / "tables")
    run = shutil.copytree(finished_run, tmp_path / "run")
    for teacher in run.glob("fold_*/model/T_*"):
        shutil.rmtree(teacher)
    out = tmp_path / "p.csv"
    shown = histokd("predict", "--model", run, "--data", bare, "--out", out, "--attention", tmp_path / "attention")
    assert shown.code == 0, shown.err
    table = read_predictions(out)
    assert len(table) == 32 and set(table.mode) == {"pathology"} and set(table.fold) == {0, 1}
    np.testing.assert_allclose(table.probs.sum(axis=1), 1, atol=1e-5)
    slides = {slide.slide_id: slide for slide in Manifest.load(bare).slides}
    files = {path.stem: path for path in (tmp_path / "attention").glob("*.csv")}
    assert set(files) == set(slides)
    for name, path in files.items():
        rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        assert len(rows) == slides[name].n_patches
        assert rows[:, 2].sum() == pytest.approx(1, abs=1e-4)
        assert len(np.unique(rows[:, :2], axis=0)) == len(rows), "every patch has its own place"


def test_model_trained_on_many_devices_predicts_on_a_machine_with_one(histokd, cohort_dir, external, tmp_path):
    trained = histokd(
        *tiny.train_arguments(cohort_dir, tmp_path / "run", "--no-report", mesh__data=2, train__max_epochs=1)
    )
    assert trained.code == 0, trained.err
    model, outs = tmp_path / "run" / "fold_0", [tmp_path / "here.csv", tmp_path / "there.csv"]
    assert histokd("predict", "--model", model, "--data", external, "--out", outs[0]).code == 0
    command = [sys.executable, "-m", "histokd_jax.cli.main", "predict"]
    done = subprocess.run(
        [*command, "--model", model, "--data", external, "--out", outs[1]],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    np.testing.assert_allclose(*(read_predictions(out).probs for out in outs), atol=1e-6)


@pytest.mark.parametrize("part", ["fold_1", "fold_1/model"])
def test_predict_with_one_fold(histokd, finished_run, external, tmp_path, part):
    out = tmp_path / "p.csv"
    assert histokd("predict", "--model", finished_run / part, "--data", external, "--out", out).code == 0
    assert set(read_predictions(out).fold) == {1}


@pytest.mark.parametrize("mode", ["both", "genomics"])
def test_predict_with_genes(histokd, finished_run, external, tmp_path, mode):
    out = tmp_path / "p.csv"
    shown = histokd("predict", "--model", finished_run, "--data", external, "--out", out, "--mode", mode)
    assert shown.code == 0, shown.err
    assert set(read_predictions(out).mode) == {mode}


def test_predict_names_what_is_missing(histokd, finished_run, external, tmp_path):
    bare = shutil.copytree(external, tmp_path / "bare")
    shutil.rmtree(bare / "tables")
    out = tmp_path / "p.csv"

    def message(model=finished_run, data=external, **options):
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        shown = histokd("predict", "--model", model, "--data", data, "--out", out, *flags)
        assert shown.code == 1 and not out.exists()
        return shown.err

    assert "--genes FILE" in message(data=bare, mode="both")
    assert "no trained model" in message(model=tmp_path)
    assert "has no mode 'slides'" in message(mode="slides")
    assert "manifest" in message(data=tmp_path)


def test_predict_into_a_folder_that_is_a_file_is_refused(histokd, finished_run, external, tmp_path):
    (tmp_path / "file").write_text("")
    shown = histokd("predict", "--model", finished_run, "--data", external, "--out", tmp_path / "file" / "p.csv")
    assert shown.code == 1 and "p.csv" in shown.err


def test_attention_of_genes_alone_is_refused(histokd, finished_run, external, tmp_path):
    shown = histokd(
        *("predict", "--model", finished_run, "--data", external, "--out", tmp_path / "p.csv"),
        *("--mode", "genomics", "--attention", tmp_path / "a"),
    )
    assert shown.code == 1 and "genomics" in shown.err


def test_report_can_be_written_again(histokd, finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    (workdir / "report.html").unlink()
    shown = histokd("report", workdir)
    assert shown.code == 0 and "report.html" in shown.out
    assert (workdir / "report.html").stat().st_size > 10_000


def test_simulate_with_changed_fields(histokd, tmp_path):
    fields = ("n_cases=6", "feat_dim=8", "n_genes=20", "signal_genes=4", "bag_median=10", "bag_min=4", "task=PR")
    shown = histokd("simulate", "--out", tmp_path / "sim", *(w for f in fields for w in ("--set", f)), "--seed", 5)
    assert shown.code == 0, shown.err
    assert "6 simulated bags" in shown.out and "width 8" in shown.out
    manifest = Manifest.load(tmp_path / "sim")
    assert manifest.simulated and manifest.simulation["spec"]["seed"] == 5
    assert (tmp_path / "sim" / "tables" / "labels.csv").read_text().startswith("case_id,PR")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--set", "n_case=6"), "n_cases"),
        (("--set", "n_cases"), "FIELD=VALUE"),
        (("--set", "n_cases=many"), "expected int"),
        (("--set", "prevalence=2"), "prevalence"),
        (("--labels", "labels.csv"), "--genes go together"),
    ],
)
def test_simulate_refuses_bad_fields(histokd, tmp_path, flags, named):
    shown = histokd("simulate", "--out", tmp_path / "sim", *flags)
    assert shown.code == 1 and named in shown.err
    assert not (tmp_path / "sim" / "manifest.json").exists()


def test_simulate_does_not_overwrite_a_data_set(histokd, cohort_dir):
    before = (cohort_dir / "manifest.json").read_bytes()
    shown = histokd("simulate", "--out", cohort_dir, "--set", "n_cases=4")
    assert shown.code == 1 and cohort_dir.name in shown.err
    assert (cohort_dir / "manifest.json").read_bytes() == before


def test_simulate_bags_for_given_tables(histokd, tmp_path):
    """Labels and genes as a user brings them; only the bags are made up."""
    cases = [f"C{i:02d}" for i in range(12)]
    (tmp_path / "labels.csv").write_text(
        "case_id,ER,PR\n" + "".join(f"{case},{i % 2},{'' if i == 3 else i // 6}\n" for i, case in enumerate(cases))
    )
    rng = np.random.default_rng(0)
    header = "case_id," + ",".join(f"G{g}_rnaseq" for g in range(16))
    lines = [f"{case}," + ",".join(f"{v:.3f}" for v in rng.standard_normal(16)) for case in cases]
    (tmp_path / "genes.csv").write_text("\n".join([header, *lines]) + "\n")
    shown = histokd(
        *(
            "simulate",
            "--out",
            tmp_path / "sim",
            "--labels",
            tmp_path / "labels.csv",
            "--genes",
            tmp_path / "genes.csv",
        ),
        *("--tasks", "ER,PR", "--set", "feat_dim=8", "--set", "bag_median=10", "--set", "bag_min=4"),
    )
    assert shown.code == 0, shown.err
    manifest = Manifest.load(tmp_path / "sim")
    assert [slide.case_id for slide in manifest.slides] == cases
    assert "simulated_bags" in manifest.name and manifest.simulation["what"] == "simulated bags, real genes and labels"
    assert all(slide.slide_id.endswith("-SIMBAG") for slide in manifest.slides)
    assert (tmp_path / "sim" / "tables" / "labels.csv").read_bytes() == (tmp_path / "labels.csv").read_bytes()


@pytest.mark.real_data
def test_simulated_bags_for_real_tables_can_be_trained_on(histokd, real_data, tmp_path):
    labels = (real_data / "tcga_brca_ihc" / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(labels[:200]) + "\n")
    genes = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip"
    shown = histokd(
        *("simulate", "--out", tmp_path / "sim", "--labels", tmp_path / "labels.csv", "--genes", genes),
        *("--set", "feat_dim=12", "--set", "bag_median=10", "--set", "bag_min=4"),
    )
    assert shown.code == 0, shown.err
    shown = histokd(
        *tiny.train_arguments(tmp_path / "sim", tmp_path / "run", train__max_epochs=1, genes__ranking="anova")
    )
    assert shown.code == 0, shown.err
    assert "simulated bags" in shown.out
    assert read_json(tmp_path / "run" / "summary.json")["simulated"] is True


def test_demo_runs_end_to_end_and_can_be_repeated(histokd, tmp_path, monkeypatch):
    from data_pipelines import simulate

    small = dataclasses.replace(simulate.DEMO, n_cases=48, feat_dim=16, n_genes=512, bag_median=30.0, bag_min=8)
    monkeypatch.setattr(simulate, "DEMO", small)
    shown = histokd("demo", "--smoke", "--workdir", tmp_path / "demo")
    assert shown.code == 0, shown.err
    assert "simulated bags" in shown.out and "AUROC" in shown.out and "report.html" in shown.out
    run = tmp_path / "demo" / "run"
    assert (run / "report.html").is_file() and (run / "control" / "summary.json").is_file()
    again = histokd("demo", "--smoke", "--workdir", tmp_path / "demo")
    assert again.code == 0 and "simulating" not in again.out
