"""Survival distillation through the shared trainer: control arm, two stages, and a teacher that is a table."""

import json

import jax
import numpy as np
import pytest
from survival_tiny import survival_dir

from data_pipelines.errors import DataError
from histokd_jax import inference
from histokd_jax.evals.survival_predictions import read_survival_predictions, write_survival_predictions
from histokd_jax.train import loop, model_dir, run
from histokd_jax.train.experiment import fold_data, load_experiment
from histokd_jax.utils import config

__all__ = ["survival_dir"]

SMALL = {
    "fold": "all",
    "data.chunk": "32",
    "data.row_multiple": "32",
    "data.slide_choice": "all",
    "student.abmil.width": "8",
    "student.abmil.attn": "4",
    "student.abmil.rho": "8",
    "train.b": "4",
    "train.max_epochs": "1",
    "report.bootstrap": "20",
    "eval.slots": "8",
    "survival.n_bins": "3",
}
LAMBDAS = {"loss.lambda_hazard": "1", "loss.lambda_event": "0.5", "loss.lambda_order": "0.5"}


def load(data, words="snn", **changes):
    values = {**SMALL, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return config.load(f"configs/survival_kd.py:{words},smoke", [f"{key}={value}" for key, value in values.items()])


def predictions(folder, mode="pathology"):
    return read_survival_predictions(folder / "predictions_test.csv").of_mode(mode)


@pytest.fixture(scope="module")
def online(survival_dir, tmp_path_factory):
    """A finished online run of both folds with its control; read only."""
    path = tmp_path_factory.mktemp("online") / "run"
    summary = run.train(load(survival_dir, **{k.replace(".", "__"): v for k, v in LAMBDAS.items()}), path)
    return path, summary


def test_run_and_control_hold_both_networks_and_both_modes(online):
    path, summary = online
    assert set(summary["modes"]) == {"pathology", "genomics"} and summary["modes"]["pathology"]["n_patients"] == 48
    weights = json.loads((path / "control" / "config.json").read_text())["loss"]
    assert all(weights[key.removeprefix("loss.")] == 0 for key in LAMBDAS)
    assert (path / "control" / "summary.json").is_file()
    lines = [json.loads(line) for line in (path / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["split"] == "train")
    assert {"student_bag", "teacher_bag", "hazard", "event", "order", "taught"} <= set(train) and train["taught"] == 1


def test_the_teacher_learns_the_same_in_both_arms_and_the_student_does_not(online):
    path, _ = online
    np.testing.assert_allclose(
        predictions(path, "genomics").risk, predictions(path / "control", "genomics").risk, atol=1e-6
    )
    assert np.abs(predictions(path).risk - predictions(path / "control").risk).max() > 1e-5


def test_the_control_is_the_supervised_student(online, survival_dir, tmp_path):
    """Same seed, same split, same steps: the numbers of configs/supervised.py."""
    path, _ = online
    changes = {**SMALL, "data.dir": str(survival_dir)}
    changes = {k.replace("student.", "model."): v for k, v in changes.items()} | {"survival.bins_from": "cohort"}
    cfg = config.load("configs/supervised.py:abmil,smoke", [f"{key}={value}" for key, value in changes.items()])
    run.train(cfg, tmp_path)
    control = predictions(path / "control")
    np.testing.assert_array_equal(predictions(tmp_path).case_id, control.case_id)
    np.testing.assert_allclose(predictions(tmp_path).risk, control.risk, atol=1e-5)


def test_the_student_is_deployed_without_teacher_and_genes(online, survival_dir):
    path, _ = online
    folder = path / "fold_0" / "model"
    assert list(model_dir.load(folder, "pathology").params) == ["student"]
    stored = read_survival_predictions(path / "fold_0" / "predictions_test.csv").of_mode("pathology")
    again = inference.predict([folder], survival_dir, "pathology")
    row = {case: i for i, case in enumerate(again.case_id)}
    np.testing.assert_allclose(again.risk[[row[case] for case in stored.case_id]], stored.risk, atol=1e-5)


# A weight decay that would move a teacher at rest, and the term on the order of risks.
SETTINGS = {"fold": "0", "compare__control": False, "student__abmil__dropout": 0.0}
SETTINGS |= {"train__wd": 0.1, "loss__lambda_order": 3.0}


@pytest.fixture(scope="module")
def ended():
    """Stage -> parameters that it ended with; filled by `two_stage`."""
    return {}


@pytest.fixture(scope="module")
def two_stage(survival_dir, tmp_path_factory, ended):
    """Two stages on fold 0 without dropout in the student, and with no control; read only."""
    path, selected = tmp_path_factory.mktemp("two_stage") / "run", loop.selected_params

    def spy(cfg, stage, state, progress):
        params = selected(cfg, stage, state, progress)
        ended[stage.name] = jax.tree.map(lambda x: np.array(x, copy=True), params)
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "selected_params", spy)
        run.train(load(survival_dir, "snn,two_stage", **SETTINGS), path)
    return path


def test_the_teacher_is_bit_identical_in_the_second_stage(two_stage, ended):
    """Weight decay included: the exported teacher is the one that the first stage ended with."""
    assert list(ended) == ["teacher", "student"]
    jax.tree.map(np.testing.assert_array_equal, ended["teacher"]["teacher"], ended["student"]["teacher"])
    exported = model_dir.load(two_stage / "fold_0" / "model", "genomics").params["teacher"]
    jax.tree.map(np.testing.assert_array_equal, exported, ended["teacher"]["teacher"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *(ended[s]["student"] for s in ended))
    assert max(jax.tree.leaves(moved)) > 0
    lines = [json.loads(line) for line in (two_stage / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if line["split"] == "train"] == ["teacher", "student"]


@pytest.fixture(scope="module")
def table(two_stage, survival_dir, tmp_path_factory):
    """Predictions of the two-stage run's teacher on every patient."""
    path = tmp_path_factory.mktemp("table") / "teacher_0.csv"
    found = inference.predict([two_stage / "fold_0" / "model"], survival_dir, "genomics")
    return write_survival_predictions(path, found)


def cached(survival_dir, two_stage, table, **changes):
    options = {**SETTINGS, "distill__table": table, "distill__teacher_run": two_stage}
    return load(survival_dir, "cached", **{**options, **changes})


def test_a_cached_teacher_equals_the_second_stage(two_stage, table, survival_dir, tmp_path):
    """Given the same hazards, and no dropout, the student becomes the same; its run reads no genes."""
    run.train(cached(survival_dir, two_stage, table.parent / "teacher_{fold}.csv"), tmp_path)
    found, expected = predictions(tmp_path), predictions(two_stage)
    np.testing.assert_array_equal(found.case_id, expected.case_id)
    np.testing.assert_allclose(found.risk, expected.risk, atol=1e-5)
    manifest = json.loads((tmp_path / "run_manifest.json").read_text())
    assert "marks" not in manifest and not any(manifest["genes"].values())


def test_a_table_that_lacks_training_patients_is_refused(two_stage, table, survival_dir, tmp_path):
    found = read_survival_predictions(table)
    train = (two_stage / "fold_0" / "follow_up_train.csv").read_text().split("\n")[1].split(",")[0]
    short = write_survival_predictions(tmp_path / "short.csv", found.where(found.case_id != train))
    with pytest.raises(DataError, match=f"no same_fold prediction of 1 of the 24 training patients of fold 0: {train}"):
        run.train(cached(survival_dir, two_stage, short), tmp_path / "run")
    cfg = cached(survival_dir, two_stage, short, distill__allow_missing=True)
    experiment = load_experiment(cfg)
    data = fold_data(experiment, 0, run.make_method(experiment))
    fields = data.train.table.fields
    assert fields["has_teacher"].sum() == len(fields["has_teacher"]) - 1 == 23
    row = {case: i for i, case in enumerate(found.case_id)}
    taught = [i for i in range(24) if fields["has_teacher"][i]]
    cases = np.asarray(experiment.cohort.case_id)[data.split.train]
    expected = np.float32(found.hazards[[row[cases[i]] for i in taught]])
    np.testing.assert_array_equal(fields["teacher_hazards"][taught], expected)
    assert not data.evaluation["test"].table.fields["teacher_hazards"].any(), "test patients have no teacher"


def test_a_teacher_that_trained_on_test_patients_is_refused_or_marked(online, survival_dir, tmp_path):
    """The cross-validated predictions of the other fold's model: it trained on this fold's test patients."""
    path, _ = online
    options = {"distill__rows": "out_of_sample", "distill__table_mode": "genomics"}
    test = path / "predictions_test.csv"
    with pytest.raises(DataError, match=r"fold 0 is tested on: teacher of fold 1: 24 of 24"):
        run.train(cached(survival_dir, path, test, **options), tmp_path / "refused")
    summary = run.train(cached(survival_dir, path, test, distill__leakage="mark", **options), tmp_path / "marked")
    assert summary["marks"] == ["teacher trained on patients that the student is tested on"]


def test_tables_that_do_not_fit_are_named(online, two_stage, table, survival_dir, tmp_path):
    path, _ = online
    with pytest.raises(DataError, match=r"table_mode='', the table holds the modes \['pathology', 'genomics'\]"):
        run.train(cached(survival_dir, path, path / "predictions_test.csv"), tmp_path / "a")
    with pytest.raises(DataError, match="follow_up_train.csv is missing.*distill.teacher_run"):
        run.train(cached(survival_dir, tmp_path, table), tmp_path / "b")
    with pytest.raises(DataError, match=r"time_bins.json.*same survival.n_bins"):
        run.train(cached(survival_dir, two_stage, table, survival__n_bins=4), tmp_path / "c")
    with pytest.raises(DataError, match="no same_fold prediction of 24 of the 24"):
        run.train(cached(survival_dir, two_stage, table, fold="1"), tmp_path / "d")


def test_a_cached_schedule_without_a_table_is_refused(survival_dir, tmp_path):
    with pytest.raises(ValueError, match="distill.table = FILE"):
        run.train(load(survival_dir, "cached"), tmp_path)
