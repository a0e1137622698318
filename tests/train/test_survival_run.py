"""Whole survival runs through the shared trainer: bags of several slides, resume, devices, protocols, bad data."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import survival_tiny
import tiny
from survival_tiny import survival_config, survival_config_file, survival_dir

from data_pipelines.tables import read_survival
from histokd_jax import inference
from histokd_jax.cli.main import main
from histokd_jax.evals.survival.concordance import harrell_c
from histokd_jax.evals.survival_predictions import read_survival_predictions
from histokd_jax.methods.supervised import method as supervised
from histokd_jax.report.build import build_report
from histokd_jax.train import model_dir, run, signals, sweep
from histokd_jax.train.signals import Interrupted
from histokd_jax.utils import config

__all__ = ["survival_config", "survival_config_file", "survival_dir"]


@pytest.fixture(scope="module")
def trained(survival_dir, survival_config_file, tmp_path_factory):
    """A finished run of one fold; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run.train(config.load(str(survival_config_file), survival_tiny.overrides(survival_dir)), path)
    return path


class StopAfter(signals.StopRequest):
    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def with_follow_up(source, target, change):
    """A copy of a data set whose follow-up rows went through `change`."""
    shutil.copytree(source, target)
    path = target / "tables" / "survival.csv"
    rows = [found for row in survival_tiny.read_csv(path) if (found := change(row)) is not None]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return target


def test_run_directory_holds_risks_of_every_patient_once_with_all_slides(trained, survival_dir):
    table = read_survival_predictions(trained / "predictions_test.csv")
    follow_up = read_survival(survival_dir / "tables" / "survival.csv")
    known = dict(zip(follow_up.case_id, zip(*follow_up.survival)))
    assert len(set(table.case_id)) == len(table) == 24 and table.num_bins == 3
    for case, slides, time, event in zip(table.case_id, table.slide_id, table.time_months, table.event):
        assert (time, bool(event)) == known[case]
        number = int(case[-4:]) - 1
        assert slides == (f"{case}-0;{case}-1" if number % 3 == 0 else f"{case}-0")
    survival = np.cumprod(1 - table.hazards, axis=1)
    np.testing.assert_allclose(table.risk, -survival.sum(axis=1), rtol=1e-5)


def test_summary_holds_the_published_metrics_of_the_stored_predictions(trained):
    summary = json.loads((trained / "summary.json").read_text())
    table = read_survival_predictions(trained / "predictions_test.csv")
    metrics = summary["modes"]["pathology"]["metrics"]
    expected = harrell_c(table.risk, table.time_months, table.event == 1).value
    assert metrics["c_index"]["mean"] == pytest.approx(expected) and metrics["c_index"]["ci"][0] < expected
    assert set(metrics) == {"c_index", "c_ipcw", "iauc", "ibs"}
    assert 0 < metrics["ibs"]["mean"] < 1
    test = summary["modes"]["pathology"]["pooled"]["logrank"]["pooled"]
    assert sum(test["n"]) == len(table) and 0 <= test["p"] <= 1
    assert summary["task_kind"] == "survival" and summary["split_protocol"] == "corrected" and summary["simulated"]


def test_validation_logs_c_index_and_likelihood(trained):
    lines = [json.loads(line) for line in (trained / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    val = [line for line in lines if line["split"] == "val"]
    table = read_survival_predictions(trained / "predictions_val.csv")
    # Fixed epochs: the exported parameters are those of the last epoch.
    last = harrell_c(table.risk, table.time_months, table.event == 1).value
    assert val[-1]["c_index_pathology"] == val[-1]["monitor"] == pytest.approx(last)
    assert np.isfinite(val[-1]["nll_pathology"])


@pytest.mark.parametrize("steps", [1, 5])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    survival_config, trained, tmp_path, monkeypatch, steps
):
    cfg = survival_config()
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(steps))
        with pytest.raises(Interrupted):
            run.train(cfg, tmp_path)
    run.train(cfg, tmp_path)
    for name in ("predictions_val.csv", "predictions_test.csv", "summary.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    models = [model_dir.load(path / "fold_0" / "model", "pathology") for path in (trained, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))


def test_two_devices_equal_one(survival_config, tmp_path):
    changes = {"data__rows": 2, "train__max_epochs": 1}
    run.train(survival_config(**changes), tmp_path / "one")
    run.train(survival_config(**changes, mesh__data=2), tmp_path / "two")
    one, two = (read_survival_predictions(tmp_path / n / "predictions_test.csv") for n in ("one", "two"))
    np.testing.assert_array_equal(one.case_id, two.case_id)
    np.testing.assert_allclose(one.risk, two.risk, atol=1e-5)


def test_resident_cohort_of_patients_equals_streaming(survival_config, trained, tmp_path):
    """A bag of several slides lies in device memory as one; training is bit-equal."""
    run.train(survival_config(data__resident="on", data__resident_gib=0.1), tmp_path)
    name = "predictions_test.csv"
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_exported_model_repeats_the_test_predictions(trained, survival_dir):
    stored = read_survival_predictions(trained / "predictions_test.csv")
    follow_up = str(survival_dir / "tables" / "survival.csv")
    again = inference.predict([trained / "fold_0" / "model"], survival_dir, "pathology", labels=follow_up)
    row = {case: i for i, case in enumerate(again.case_id)}
    found = again.where(np.array([row[case] for case in stored.case_id]))
    np.testing.assert_allclose(found.risk, stored.risk, atol=1e-6)
    np.testing.assert_array_equal(found.bin, stored.bin)


def test_predict_needs_no_tables_and_leaves_follow_up_blank(trained, survival_dir, tmp_path, capsys):
    bare = shutil.copytree(survival_dir, tmp_path / "bare")
    shutil.rmtree(bare / "tables")
    out, maps = tmp_path / "p.csv", tmp_path / "attention"
    assert (
        main(["predict", "--model", str(trained), "--data", str(bare), "--out", str(out), "--attention", str(maps)])
        == 0
    )
    table = read_survival_predictions(out)
    assert len(table) == 48 and not table.known.any()
    assert survival_tiny.read_csv(out)[0]["event"] == ""
    assert len(list(maps.glob("*.csv"))) == 64, "one map per slide"
    both = [np.loadtxt(maps / f"SIM-0001-{k}.csv", delimiter=",", skiprows=1, ndmin=2)[:, 2] for k in (0, 1)]
    assert np.concatenate(both).sum() == pytest.approx(1, abs=1e-4)


def test_evaluate_reproduces_the_summary_and_tests_elsewhere(trained, survival_dir, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "run")
    assert main(["evaluate", "--workdir", str(copy)]) == 0
    assert (copy / "summary.json").read_bytes() == (trained / "summary.json").read_bytes()
    out = tmp_path / "external"
    assert main(["evaluate", "--workdir", str(copy), "--data", str(survival_dir), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["external"] is True and summary["modes"]["pathology"]["n_patients"] == 48
    assert "C-index (Harrell)" in capsys.readouterr().out


def test_published_protocol_reports_the_validation_part_and_says_so(survival_config, tmp_path, capsys):
    folds = tmp_path / "splits"
    folds.mkdir()
    cases = [f"SIM-{i:04d}" for i in range(1, 49)]
    for k in range(2):
        val, train = cases[k::2], [c for c in cases if c not in cases[k::2]]
        rows = [f"{i},{a},{b}" for i, (a, b) in enumerate(zip(train, val))]
        (folds / f"splits_{k}.csv").write_text("\n".join([",train,val", *rows, "99,,SIM-9999"]) + "\n")
    cfg = survival_config(split__dir=folds, split__protocol="published", early_stop__enabled=True)
    summary = run.train(cfg, tmp_path / "run")
    parts = [(tmp_path / "run" / f"predictions_{part}.csv").read_bytes() for part in ("val", "test")]
    assert parts[0] == parts[1]
    assert "reported part = validation part" in summary["marks"][0] and "epoch selected on it" in summary["marks"][0]
    assert summary["left_out"] == {"splits: not in cohort": 1} and summary["split_protocol"] == "published"
    manifest = json.loads((tmp_path / "run" / "run_manifest.json").read_text())
    assert manifest["packing"]["0"]["truncated_fraction"] == 0 and manifest["marks"] == summary["marks"]
    corrected = survival_config(split__dir=folds, split__val_fraction=0.0)
    summary = run.train(corrected, tmp_path / "corrected")
    assert "marks" not in summary and not (tmp_path / "corrected" / "predictions_val.csv").exists()


def test_check_D17_patients_without_features_or_follow_up_are_counted(survival_config, survival_dir, tmp_path):
    def change(row):
        blank = {"time_months": "", "event": ""} if row["case_id"] == "SIM-0002" else {}
        return None if row["case_id"] == "SIM-0003" else {**row, **blank}

    data = with_follow_up(survival_dir, tmp_path / "data", change)
    with (data / "tables" / "survival.csv").open("a") as stream:
        stream.write("SIM-9001,12.5,1\n")
    summary = run.train(survival_config(data__dir=data, train__max_epochs=1), tmp_path / "run")
    assert summary["left_out"] == {"no features": 1, "no follow-up": 2}
    with pytest.raises(ValueError, match="SIM-9001.*missing_slides=exclude"):
        run.train(survival_config(data__dir=data, data__missing_slides="error"), tmp_path / "strict")


def test_all_censored_is_refused(survival_config, survival_dir, tmp_path):
    data = with_follow_up(survival_dir, tmp_path / "data", lambda row: {**row, "event": 0})
    with pytest.raises(ValueError, match="all 48 patients are censored"):
        run.train(survival_config(data__dir=data), tmp_path / "run")


def test_a_fold_without_events_is_refused(survival_config, survival_dir, tmp_path):
    table = read_survival(survival_dir / "tables" / "survival.csv")
    censored = [case for case, event in zip(table.case_id, table.survival.event) if not event]
    (tmp_path / "splits_0.csv").write_text(
        "train,val\n"
        + "\n".join(f"{c}," for c in table.case_id if c not in censored[:5])
        + "\n"
        + "\n".join(f",{c}" for c in censored[:5])
        + "\n"
    )
    with pytest.raises(ValueError, match="fold 0: the test part has 5 patients with 0 deaths"):
        run.train(survival_config(split__dir=tmp_path, split__val_fraction=0.0), tmp_path / "run")


def test_flipped_censorship_is_refused_where_it_contradicts(survival_config, survival_dir, tmp_path):
    data = with_follow_up(survival_dir, tmp_path / "data", lambda row: {**row, "censorship": row["event"]})
    with pytest.raises(ValueError, match="line 2: event is . and censorship .*flipped"):
        run.train(survival_config(data__dir=data), tmp_path / "run")
    with pytest.raises(ValueError, match=r"survival\.censorship_column"):
        run.train(
            survival_config(survival__time_column="time_months", survival__event_column="censorship"), tmp_path / "run"
        )


def test_time_bins_of_the_training_fold_are_stored_with_the_model(survival_config, trained, tmp_path):
    run.train(survival_config(survival__bins_from="train_fold", train__max_epochs=1), tmp_path)
    edges = [
        json.loads((path / "fold_0" / "model" / "model.json").read_text())["task"]["edges"]
        for path in (trained, tmp_path)
    ]
    assert edges[0] != edges[1] and len(edges[1]) == 4


@pytest.mark.parametrize("loss", ["nll", "cox"])
def test_check_B13_genes_alone_and_a_cox_head(survival_config, tmp_path, loss):
    """All gene columns in an SNN; a Cox head predicts no hazards, so there is no Brier score."""
    changes = {"model__name": "snn", "genes__kind": "all", "infer__mode": "genomics", "loss__survival": loss}
    summary = run.train(survival_config(**changes, train__max_epochs=1), tmp_path)
    table = read_survival_predictions(tmp_path / "predictions_test.csv")
    assert table.modes == ("genomics",) and table.num_bins == (3 if loss == "nll" else 0)
    assert ("ibs" in summary["modes"]["genomics"]["metrics"]) == (loss == "nll")
    facts = json.loads((tmp_path / "fold_0" / "model" / "model.json").read_text())
    assert facts["spec"]["num_genes"] == 24 and facts["selections"]["genes"]["source"]["kind"] == "all"


@pytest.mark.slow
def test_ghanet_reads_gene_groups_of_every_fold_and_deploys_without_genes(survival_dir, tmp_path):
    groups = [[f"SIMGENE{4 * g + i + 1:05d}" for i in range(4)] for g in range(6)]
    rows = [",".join(f"group{g}" for g in range(6)), *(",".join(column) for column in zip(*groups))]
    (tmp_path / "signatures.csv").write_text("\n".join(rows) + "\n")
    settings = {
        "data.dir": survival_dir,
        "data.chunk": 32,
        "data.row_multiple": 32,
        "genes.signatures": tmp_path / "signatures.csv",
        "genes.correction": "none",
        "genes.top_n": 1,
        "train.b": 4,
        "train.max_epochs": 1,
        "report.bootstrap": 20,
        "compare.control": False,
        "model.dim": 8,
        "eval.slots": 8,
    }
    cfg = config.load("configs/ghanet.py:smoke", [f"{key}={value}" for key, value in settings.items()])
    with cfg.unlocked():
        cfg.genes.suffixes = ("",)
    summary = run.train(cfg, tmp_path / "run")
    assert summary["folds"] == [0, 1] and summary["modes"]["pathology"]["n_patients"] == 48
    for k in (0, 1):
        folder = tmp_path / "run" / f"fold_{k}" / "model"
        facts = json.loads((folder / "model.json").read_text())
        assert (
            len(facts["spec"]["gene_groups"]) == 6 and sum(facts["spec"]["gene_groups"]) == facts["spec"]["num_genes"]
        )
        assert facts["selections"]["genes"]["sizes"] == facts["spec"]["gene_groups"]
        stored = read_survival_predictions(tmp_path / "run" / f"fold_{k}" / "predictions_test.csv")
        again = inference.predict([folder], survival_dir, "pathology")
        row = {case: i for i, case in enumerate(again.case_id)}
        np.testing.assert_allclose(again.risk[[row[case] for case in stored.case_id]], stored.risk, atol=1e-5)


def test_sweep_trains_survival_settings_as_one_program(survival_config, trained, tmp_path):
    settings = {"full": survival_config(), "half": survival_config(loss__alpha=0.5)}
    plan = sweep.prepare(settings, "full", [0])
    assert len(plan.groups) == 1 and plan.groups[0].varying == ("loss.alpha",)
    found = sweep.train(plan, tmp_path)
    assert not found["failed"] and {row["metric"] for row in found["rows"]} == {"c_index"}
    one = read_survival_predictions(tmp_path / "full" / "seed_0" / "predictions_test.csv")
    np.testing.assert_allclose(one.risk, read_survival_predictions(trained / "predictions_test.csv").risk, atol=1e-5)


def test_control_arm_is_compared_in_the_report(survival_config, tmp_path, monkeypatch):
    """A method names what its control changes; the report pairs both arms."""
    monkeypatch.setattr(supervised, "CONTROL", {"loss.alpha": 1.0}, raising=False)
    run.train(survival_config(compare__control=True, train__max_epochs=1), tmp_path)
    control = json.loads((tmp_path / "control" / "config.json").read_text())
    assert control["loss"]["alpha"] == 1.0 and control["compare"]["control"] is False
    text = build_report(tmp_path).read_text()
    assert "the same network with loss.alpha = 1.0" in text and "Bootstrap p" in text


def test_a_method_that_does_not_know_survival_is_refused(survival_dir, tmp_path):
    changes = tiny.overrides(survival_dir, task_kind="survival", compare__control=False, data__slide_choice="all")
    with pytest.raises(ValueError, match="mkd.*task_kind=survival"):
        run.train(config.load(tiny.CONFIG, changes), tmp_path)
