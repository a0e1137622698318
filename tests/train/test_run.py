"""Whole runs: resume, identity checks, control arm, exported models, bad states."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from data_pipelines.simulate import simulate_cohort
from histokd_jax import inference
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.report.build import build_report as report
from histokd_jax.train import experiment, loop, model_dir, run, signals
from histokd_jax.train.checkpoint import CheckpointMismatchError, export_groups, load_groups
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


@pytest.fixture(scope="module")
def trained(cohort_dir, tmp_path_factory):
    """A finished run of one fold; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run.train(tiny.config.load(tiny.CONFIG, tiny.overrides(cohort_dir)), path)
    return path


def interrupt(cfg, workdir, monkeypatch, steps=2):
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(steps))
        with pytest.raises(Interrupted, match="run the same command again"):
            run.train(cfg, workdir)


@pytest.fixture(scope="module")
def interrupted(cohort_dir, tmp_path_factory):
    """A run of the same configuration that stopped after its third step; read only."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(tiny.config_maker(cohort_dir)(), path, patch)
    return path


@pytest.fixture(scope="module")
def interrupted_elsewhere(cohort_dir, tmp_path_factory):
    """(configuration, run stopped after its third step) with a data set and labels of its own, which may change."""
    root = tmp_path_factory.mktemp("elsewhere")
    data, labels = shutil.copytree(cohort_dir, root / "data"), root / "labels.csv"
    shutil.copy(cohort_dir / "tables" / "labels.csv", labels)
    cfg = tiny.config_maker(data)(data__labels=labels)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(cfg, root / "run", patch)
    return cfg, root / "run"


@pytest.fixture
def trained_copy(trained, tmp_path):
    """The same run, free to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def files(workdir):
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(workdir.rglob("predictions_*.csv"))}


def model_leaves(workdir, fold=0):
    model = model_dir.load(workdir / f"fold_{fold}" / "model", "both")
    student = model_dir.load(workdir / f"fold_{fold}" / "model", "pathology")
    return jax.tree.leaves((model.params, student.params))


def assert_same_run(first, second):
    assert files(first) == files(second)
    for a, b in zip(model_leaves(first), model_leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert curve(first) == curve(second)


def curve(workdir):
    keep = ("step", "split", "loss", "monitor", "auroc_pathology")
    lines = (workdir / "fold_0" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in keep} for line in lines]


@pytest.mark.parametrize("steps", [pytest.param(4, marks=pytest.mark.slow), 7])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tiny_config, trained, tmp_path, monkeypatch, steps):
    cfg = tiny_config()
    interrupt(cfg, tmp_path, monkeypatch, steps)
    assert not (tmp_path / "fold_0" / "fold.json").exists()
    run.train(cfg, tmp_path)
    assert_same_run(trained, tmp_path)


def test_interrupted_in_the_first_epoch_and_resumed_equals_uninterrupted(tiny_config, trained, interrupted, tmp_path):
    path = shutil.copytree(interrupted, tmp_path / "run")
    assert not (path / "fold_0" / "fold.json").exists()
    run.train(tiny_config(), path)
    assert_same_run(trained, path)


@pytest.fixture(scope="module")
def with_control(cohort_dir, tmp_path_factory):
    """(summary, folder) of a finished run of both folds with its control arm; read only."""
    path = tmp_path_factory.mktemp("with_control") / "run"
    cfg = tiny.config_maker(cohort_dir)(compare__control=True, fold="all")
    return run.train(cfg, path, ["histokd", "train"]), path


def test_two_runs_are_equal_and_the_step_is_traced_once(tiny_config, with_control, tmp_path):
    """The second has no control arm, which must not matter to the first arm."""
    run.train(tiny_config(fold="all"), tmp_path)
    first = {name: table for name, table in files(with_control[1]).items() if not name.startswith("control")}
    assert first == files(tmp_path)
    traces = json.loads((tmp_path / "fold_1" / "fold.json").read_text())["traces"]
    assert traces == 1, "all folds share one compiled step"


def test_a_run_on_a_mesh_equals_one_device(tiny_config, tmp_path):
    """Two devices for the rows times two for the patches of a row: the same predictions and losses to rounding."""
    changes = {"data__rows": 2, "train__max_epochs": 1}
    run.train(tiny_config(**changes), tmp_path / "one")
    run.train(tiny_config(**changes, mesh__data=2, mesh__sequence=2), tmp_path / "many")
    one, many = (read_predictions(tmp_path / name / "predictions_test.csv") for name in ("one", "many"))
    np.testing.assert_array_equal(one.slide_id, many.slide_id)
    np.testing.assert_allclose(one.probs, many.probs, atol=2e-4)
    losses = [[line["loss"] for line in curve(tmp_path / name) if "loss" in line] for name in ("one", "many")]
    assert losses[0]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_finished_folds_are_not_trained_again(tiny_config, trained_copy, monkeypatch):
    before = files(trained_copy)
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("trained a finished fold"))
    run.train(tiny_config(), trained_copy)
    assert files(trained_copy) == before


def test_a_fold_finished_with_other_data_is_not_reused(tiny_config, trained_copy):
    path = trained_copy / "fold_0" / "fold.json"
    facts = json.loads(path.read_text())
    key = next(k for k in facts["identity"] if k.startswith("input"))
    facts["identity"][key] = "0" * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointMismatchError, match="another input.*--workdir"):
        run.train(tiny_config(), trained_copy)


def test_run_directory_is_complete_and_control_has_all_weights_at_zero(with_control):
    summary, path = with_control
    for arm in (path, path / "control"):
        for name in ("config.json", "run_manifest.json", "summary.json", "predictions_val.csv", "predictions_test.csv"):
            assert (arm / name).is_file(), name
    control = json.loads((path / "control" / "config.json").read_text())
    assert set(control["loss"].values()) == {0.0}
    assert set(summary["modes"]) == {"pathology", "both", "genomics"}
    manifest = json.loads((path / "run_manifest.json").read_text())
    assert manifest["simulated"] is True and manifest["seed"] == 0 and len(manifest["data_fingerprint"]) == 64
    assert manifest["versions"]["jax"] == jax.__version__
    table = read_predictions(path / "predictions_test.csv")
    assert len(set(table.case_id)) == 40 and len(table) == 3 * 40


def test_resume_with_another_config_is_refused(tiny_config, trained_copy):
    with pytest.raises(CheckpointMismatchError, match=r"train\.lr \(0.0002 there, 0.001 now\)"):
        run.train(tiny_config(train__lr=1e-3), trained_copy)


def test_resume_with_a_changed_data_set_is_refused(interrupted_elsewhere, tmp_path):
    cfg, path = interrupted_elsewhere
    data = pathlib.Path(cfg.data.dir)
    shutil.move(data, tmp_path / "kept")
    try:
        simulate_cohort(data, dataclasses.replace(tiny.SPEC, seed=2))
        with pytest.raises(CheckpointMismatchError, match="input"):
            run.train(cfg, shutil.copytree(path, tmp_path / "run"))
    finally:
        shutil.rmtree(data)
        shutil.move(tmp_path / "kept", data)


def test_resume_with_changed_labels_is_refused(interrupted_elsewhere, tmp_path):
    cfg, path = interrupted_elsewhere
    labels = pathlib.Path(cfg.data.labels)
    before = labels.read_text()
    header, *rows = before.splitlines()
    swapped = [row.replace(",", ",1-").replace("1-1", "0").replace("1-0", "1") for row in rows]
    labels.write_text("\n".join([header, *swapped]) + "\n")
    try:
        with pytest.raises(CheckpointMismatchError, match="input"):
            run.train(cfg, shutil.copytree(path, tmp_path / "run"))
    finally:
        labels.write_text(before)


def test_resume_with_another_packing_plan_is_refused(tiny_config, interrupted, tmp_path, monkeypatch):
    """The same configuration under a planner that packs otherwise: the identity covers the plan itself."""
    path = shutil.copytree(interrupted, tmp_path / "run")
    original = experiment.fold_data

    def shifted(*args):
        data = original(*args)
        plan = data.train.plan
        return dataclasses.replace(
            data,
            train=dataclasses.replace(
                data.train,
                plan=dataclasses.replace(
                    plan, slide=plan.slide[::-1].copy(), start=plan.start[::-1].copy(), count=plan.count[::-1].copy()
                ),
            ),
        )

    monkeypatch.setattr(experiment, "fold_data", shifted)
    with pytest.raises(CheckpointMismatchError, match="packing"):
        run.train(tiny_config(), path)


def test_checkpoint_of_another_method_is_refused(tiny_config, interrupted, tmp_path, monkeypatch):
    path = shutil.copytree(interrupted, tmp_path / "run")
    original = run.identity
    monkeypatch.setattr(run, "identity", lambda cfg, data: {**original(cfg, data), "method": "abmil"})
    with pytest.raises(CheckpointMismatchError, match="method"):
        run.train(tiny_config(), path)


def test_fixed_epochs_need_no_validation_part(tiny_config, tmp_path):
    summary = run.train(tiny_config(train__max_epochs=1, split__val_fraction=0.0), tmp_path)
    assert np.isfinite(summary["modes"]["pathology"]["metrics"]["auroc"]["mean"])
    assert not (tmp_path / "predictions_val.csv").exists()
    assert {line["split"] for line in map(json.loads, (tmp_path / "fold_0" / "metrics.jsonl").open())} == {"train"}
    assert report(tmp_path).is_file()


def test_early_stopping_needs_a_validation_part(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"split\.val_fraction"):
        run.train(tiny_config(split__val_fraction=0.0, early_stop__enabled=True), tmp_path)


def test_nan_loss_stops_with_a_named_metric(tiny_config, tmp_path):
    with pytest.raises(DivergedError, match="ce_p|loss"):
        run.train(tiny_config(train__lr=1e38), tmp_path)


def test_two_stage_schedule_leaves_teachers_untouched_in_stage_two(tiny_config, tmp_path):
    cfg = tiny_config(distill__schedule="two_stage", train__max_epochs=2)
    run.train(cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"teachers", "student"}
    both = [line["auroc_both"] for line in lines if line["split"] == "val"]
    epochs = cfg.train.max_epochs
    assert len(set(both[epochs - 1 :])) == 1, "teachers move in the student stage"


@pytest.mark.parametrize(
    "changes",
    [
        {"early_stop__enabled": True, "ckpt__teachers": "last_epoch"},
        {"eval__teacher_dropout": True},
        {"train__batching": "grad_cache"},
        {"teachers": "G"},
        {"train__compute_dtype": "bfloat16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_switches_run(tiny_config, tmp_path, changes):
    summary = run.train(tiny_config(train__max_epochs=2, **changes), tmp_path)
    assert np.isfinite(summary["modes"]["pathology"]["metrics"]["auroc"]["mean"])


def test_check_K1_pathology_prediction_without_genes_and_teachers(trained_copy, cohort_dir, tmp_path):
    model = trained_copy / "fold_0" / "model"
    with_all = inference.predict([model], cohort_dir, "pathology")
    bare = shutil.copytree(cohort_dir, tmp_path / "bare")
    shutil.rmtree(bare / "tables")
    for teacher in ("T_M", "T_G"):
        shutil.rmtree(model / teacher)
    alone = inference.predict([model], bare, "pathology")
    np.testing.assert_array_equal(with_all.probs, alone.probs)
    assert (alone.label == -1).all()
    with pytest.raises(CheckpointMismatchError, match="T_M"):
        inference.predict([model], cohort_dir, "both")


def test_check_K2_K3_evaluation_is_deterministic_and_independent_of_its_batch(trained_copy, cohort_dir):
    model = trained_copy / "fold_0" / "model"
    first, second = (inference.predict([model], cohort_dir, "both") for _ in range(2))
    np.testing.assert_array_equal(first.probs, second.probs)
    facts = json.loads((model / "model.json").read_text())
    facts["config"]["eval"]["slots"] = 1
    (model / "model.json").write_text(json.dumps(facts))
    one_by_one = inference.predict([model], cohort_dir, "both")
    np.testing.assert_allclose(first.probs, one_by_one.probs, atol=2e-6)


@pytest.mark.parametrize("mode", ["pathology", "both", "genomics"])
def test_exported_model_repeats_the_test_predictions_of_the_run(trained, cohort_dir, mode):
    stored = read_predictions(trained / "predictions_test.csv").of_mode(mode)
    again = inference.predict([trained / "fold_0" / "model"], cohort_dir, mode)
    row = {slide: i for i, slide in enumerate(again.slide_id)}
    found = again.probs[[row[slide] for slide in stored.slide_id]]
    np.testing.assert_allclose(found, stored.probs, atol=2e-6)


def test_predict_refuses_another_patch_width(trained, tmp_path):
    simulate_cohort(tmp_path, dataclasses.replace(tiny.SPEC, n_cases=4, feat_dim=13))
    with pytest.raises(ValueError, match="13-d patches.*expects 12"):
        inference.predict([trained / "fold_0" / "model"], tmp_path, "pathology")


def test_changed_parameters_are_noticed(trained_copy, cohort_dir):
    path = trained_copy / "fold_0" / "model" / "model.json"
    facts = json.loads(path.read_text())
    facts["params_sha256"]["S_P"] = "0" * 64
    path.write_text(json.dumps(facts))
    with pytest.raises(CheckpointMismatchError, match="hash"):
        inference.predict([path.parent], cohort_dir, "pathology")


def test_parameters_of_another_shape_are_refused(tmp_path):
    export_groups(tmp_path, {"S_P": {"w": np.zeros((3, 2), np.float32)}})
    like = {"S_P": {"w": jax.ShapeDtypeStruct((4, 2), np.float32)}}
    with pytest.raises(CheckpointMismatchError, match="w is"):
        load_groups(tmp_path, like, ["S_P"])


def test_attention_export_sums_to_one(trained, cohort_dir, tmp_path):
    found = inference.export_attention(trained / "fold_0" / "model", cohort_dir, "pathology", tmp_path)
    assert len(found) == 40
    for path in found[:5]:
        rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
        assert rows[:, 2].sum() == pytest.approx(1, abs=1e-4) and (rows[:, 2] >= 0).all()


def child(arguments, prelude=""):
    """`histokd` in a process of its own, after some lines of Python."""
    code = f"{prelude}\nimport sys\nfrom histokd_jax.cli.main import main\nsys.exit(main({arguments!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_writes_a_checkpoint_and_exits(cohort_dir, tmp_path, number):
    # Far more epochs than the test waits for.
    process = child(tiny.train_arguments(cohort_dir, tmp_path, train__max_epochs=2000, ckpt__every_epochs=1000))
    metrics = tmp_path / "fold_0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no epoch was finished"
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "checkpoint" in errors and "run the same command again" in errors
    assert any((tmp_path / "fold_0" / "checkpoints").iterdir())


BETWEEN_SAVES = """
import os, signal
from histokd_jax.train import writer
write = writer.MetricWriter.write
def killing(self, step, facts, metrics):
    write(self, step, facts, metrics)
    if facts["epoch"] == 1 and facts["split"] == "train":
        os.kill(os.getpid(), signal.SIGKILL)
writer.MetricWriter.write = killing
"""
WHILE_SAVING = """
import os, signal, threading
from histokd_jax.train import checkpoint
save = checkpoint.RunCheckpoints.save
saves = []
def killing(self, *args):
    saves.append(1)
    if len(saves) == 2:
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
    save(self, *args)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.RunCheckpoints.save = killing
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "prelude",
    [pytest.param(BETWEEN_SAVES, marks=pytest.mark.slow), WHILE_SAVING],
    ids=["between saves", "while saving"],
)
def test_killed_run_continues_from_the_last_checkpoint_and_equals_the_uninterrupted_one(
    tiny_config, cohort_dir, trained, tmp_path, prelude
):
    process = child(tiny.train_arguments(cohort_dir, tmp_path), prelude)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, errors
    assert not (tmp_path / "fold_0" / "fold.json").exists()
    run.train(tiny_config(), tmp_path)
    assert_same_run(trained, tmp_path)


@pytest.mark.slow
def test_gmkdn_trains_and_predicts_with_two_gene_streams(tiny_config, cohort_dir, tmp_path):
    """The journal variant end to end; a copy of the expression table stands in for copy numbers."""
    cnv = str(cohort_dir / "tables" / "genes.npz")
    run.train(tiny_config(variant="gmkdn", data__cnv=cnv), tmp_path)
    model = tmp_path / "fold_0" / "model"
    table = inference.predict([model], cohort_dir, "both", cnv=cnv)
    test = read_predictions(tmp_path / "predictions_test.csv").of_mode("both")
    place = {case: row for row, case in enumerate(table.case_id)}
    np.testing.assert_allclose(table.probs[[place[c] for c in test.case_id]], test.probs, atol=2e-6)
    with pytest.raises(ValueError, match="copy-number"):
        inference.predict([model], cohort_dir, "both")
