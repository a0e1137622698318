"""Whole runs: resume, identity checks, control arm, exported models, bad states."""

import json
import os
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from data_pipelines.simulate import SimulationSpec, simulate_cohort
from histokd_jax import inference
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.train import loop, run, signals
from histokd_jax.train.checkpoint import CheckpointMismatchError, load_groups
from histokd_jax.train.loop import DivergedError
from histokd_jax.train.signals import Interrupted

class StopAfter(signals.StopRequest):
    """A request that arrives after a number of steps, without any signal."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def files(workdir):
    return {
        p.relative_to(workdir).as_posix(): p.read_bytes()
        for p in sorted(workdir.rglob("predictions_*.csv"))
    }


def model_leaves(workdir, fold=0):
    from histokd_jax.train import model_dir

    model = model_dir.load(workdir / f"fold_{fold}" / "model", "both")
    student = model_dir.load(workdir / f"fold_{fold}" / "model", "pathology")
    return jax.tree.leaves((model.params, student.params))


def curve(workdir):
    keep = ("step", "split", "loss", "monitor", "auroc_pathology")
    lines = (workdir / "fold_0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


@pytest.mark.parametrize("steps", [2, 4, 7])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tiny_config, tmp_path, monkeypatch, steps):
    cfg = tiny_config()
    run.train(cfg, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(steps))
        with pytest.raises(Interrupted, match="run the same command again"):
            run.train(cfg, tmp_path / "broken")
    assert not (tmp_path / "broken" / "fold_0" / "fold.json").exists()
    run.train(cfg, tmp_path / "broken")
    assert files(tmp_path / "straight") == files(tmp_path / "broken")
    for a, b in zip(model_leaves(tmp_path / "straight"), model_leaves(tmp_path / "broken")):
        np.testing.assert_array_equal(a, b)
    assert curve(tmp_path / "straight") == curve(tmp_path / "broken")


def test_two_runs_are_equal_and_the_step_is_traced_once(tiny_config, tmp_path):
    cfg = tiny_config(fold="all")
    for name in ("a", "b"):
        run.train(cfg, tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    traces = json.loads((tmp_path / "a" / "fold_1" / "fold.json").read_text())["traces"]
    assert traces == 1, "all folds share one compiled step"


def test_finished_folds_are_not_trained_again(tiny_config, tmp_path, monkeypatch):
    cfg = tiny_config()
    run.train(cfg, tmp_path)
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("trained a finished fold"))
    run.train(cfg, tmp_path)


def test_run_directory_is_complete_and_control_has_all_weights_at_zero(tiny_config, tmp_path):
    summary = run.train(tiny_config(compare__control=True, fold="all"), tmp_path, ["histokd", "train"])
    for arm in (tmp_path, tmp_path / "control"):
        for name in ("config.json", "run_manifest.json", "summary.json", "predictions_val.csv", "predictions_test.csv"):
            assert (arm / name).is_file(), name
    control = json.loads((tmp_path / "control" / "config.json").read_text())
    assert set(control["loss"].values()) == {0.0}
    assert set(summary["modes"]) == {"pathology", "both", "genomics"}
    manifest = json.loads((tmp_path / "run_manifest.json").read_text())
    assert manifest["simulated"] is True and manifest["seed"] == 0 and len(manifest["data_fingerprint"]) == 64
    assert manifest["versions"]["jax"] == jax.__version__
    table = read_predictions(tmp_path / "predictions_test.csv")
    assert len(set(table.case_id)) == 40 and len(table) == 3 * 40


def test_resume_with_another_config_is_refused(tiny_config, tmp_path):
    run.train(tiny_config(), tmp_path)
    with pytest.raises(CheckpointMismatchError, match="train.lr"):
        run.train(tiny_config(train__lr=1e-3), tmp_path)


def interrupt(cfg, workdir, monkeypatch, steps=2):
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(steps))
        with pytest.raises(Interrupted):
            run.train(cfg, workdir)


def test_resume_with_a_changed_data_set_is_refused(tiny_config, tmp_path, monkeypatch):
    spec = SimulationSpec(n_cases=40, feat_dim=12, n_genes=64, bag_median=24.0, bag_min=4, signal_genes=16, seed=1)
    simulate_cohort(tmp_path / "data", spec)
    cfg = tiny_config(data__dir=tmp_path / "data")
    interrupt(cfg, tmp_path / "run", monkeypatch)
    import shutil

    shutil.rmtree(tmp_path / "data")
    simulate_cohort(tmp_path / "data", SimulationSpec(**{**spec.__dict__, "seed": 2}))
    with pytest.raises(CheckpointMismatchError, match="input"):
        run.train(cfg, tmp_path / "run")


def test_checkpoint_of_another_method_is_refused(tiny_config, tmp_path, monkeypatch):
    cfg = tiny_config()
    interrupt(cfg, tmp_path, monkeypatch)
    original = run._identity
    monkeypatch.setattr(run, "_identity", lambda cfg, data: {**original(cfg, data), "method": "abmil"})
    with pytest.raises(CheckpointMismatchError, match="method"):
        run.train(cfg, tmp_path)


def test_nan_loss_stops_with_a_named_metric(tiny_config, tmp_path):
    with pytest.raises(DivergedError, match="ce_p|loss"):
        run.train(tiny_config(train__lr=1e38), tmp_path)


def test_two_stage_schedule_leaves_teachers_untouched_in_stage_two(tiny_config, tmp_path):
    cfg = tiny_config(distill__schedule="two_stage")
    run.train(cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"teachers", "student"}
    both = [line["auroc_both"] for line in lines if line["split"] == "val"]
    epochs = cfg.train.max_epochs
    assert len(set(both[epochs - 1 :])) == 1, "teachers move in the student stage"


@pytest.mark.parametrize("changes", [{"early_stop__enabled": True, "ckpt__teachers": "last_epoch"},
                                     {"eval__teacher_dropout": True}, {"train__batching": "grad_cache"},
                                     {"teachers": "G"}, {"train__compute_dtype": "bfloat16"}])
def test_switches_run(tiny_config, tmp_path, changes):
    summary = run.train(tiny_config(**changes), tmp_path)
    assert np.isfinite(summary["modes"]["pathology"]["metrics"]["auroc"]["mean"])


def test_check_K1_pathology_prediction_without_genes_and_teachers(tiny_config, cohort_dir, tmp_path):
    import shutil

    run.train(tiny_config(), tmp_path / "run")
    model = tmp_path / "run" / "fold_0" / "model"
    with_all = inference.predict([model], cohort_dir, "pathology")
    shutil.copytree(cohort_dir, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tables")
    for teacher in ("T_M", "T_G"):
        shutil.rmtree(model / teacher)
    alone = inference.predict([model], tmp_path / "bare", "pathology")
    np.testing.assert_array_equal(with_all.probs, alone.probs)
    assert (alone.label == -1).all()
    with pytest.raises(CheckpointMismatchError, match="T_M"):
        inference.predict([model], cohort_dir, "both")


def test_check_K2_K3_evaluation_is_deterministic_and_independent_of_its_batch(tiny_config, cohort_dir, tmp_path):
    run.train(tiny_config(), tmp_path)
    model = tmp_path / "fold_0" / "model"
    first, second = (inference.predict([model], cohort_dir, "both") for _ in range(2))
    np.testing.assert_array_equal(first.probs, second.probs)
    facts = json.loads((model / "model.json").read_text())
    facts["config"]["eval"]["slots"] = 1
    (model / "model.json").write_text(json.dumps(facts))
    one_by_one = inference.predict([model], cohort_dir, "both")
    np.testing.assert_allclose(first.probs, one_by_one.probs, atol=2e-6)


def test_predict_refuses_another_patch_width(tiny_config, tmp_path):
    run.train(tiny_config(), tmp_path / "run")
    simulate_cohort(tmp_path / "wide", SimulationSpec(n_cases=4, feat_dim=13, n_genes=64, bag_median=8.0, bag_min=4))
    with pytest.raises(ValueError, match="13-d patches.*expects 12"):
        inference.predict([tmp_path / "run" / "fold_0" / "model"], tmp_path / "wide", "pathology")


def test_changed_parameters_are_noticed(tiny_config, tmp_path):
    run.train(tiny_config(), tmp_path)
    model = tmp_path / "fold_0" / "model"
    facts = json.loads((model / "model.json").read_text())
    facts["params_sha256"]["S_P"] = "0" * 64
    (model / "model.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointMismatchError, match="hash"):
        inference.predict([model], tmp_path, "pathology")


def test_parameters_of_another_shape_are_refused(tmp_path):
    from histokd_jax.train.checkpoint import export_groups

    export_groups(tmp_path, {"S_P": {"w": np.zeros((3, 2), np.float32)}})
    like = {"S_P": {"w": jax.ShapeDtypeStruct((4, 2), np.float32)}}
    with pytest.raises(CheckpointMismatchError, match="w is"):
        load_groups(tmp_path, like, ["S_P"])


def test_attention_export_sums_to_one(tiny_config, cohort_dir, tmp_path):
    run.train(tiny_config(), tmp_path / "run")
    found = inference.export_attention(tmp_path / "run" / "fold_0" / "model", cohort_dir, "pathology", tmp_path / "a")
    assert len(found) == 40
    rows = np.loadtxt(found[0], delimiter=",", skiprows=1, ndmin=2)
    assert rows[:, 2].sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint_and_the_same_command_continues(tiny_command, tmp_path, number):
    arguments = tiny_command(tmp_path / "run", train__max_epochs=400)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    child = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "fold_0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.1)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "checkpoint" in errors
    assert any((tmp_path / "run" / "fold_0" / "checkpoints").iterdir())
