"""`histokd sweep` from the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny

LIST = "configs/ablations/mkd.py:er,terms,fold=0"


def arguments(data, workdir, *flags, **changes):
    texts = tiny.overrides(data, **{"train__max_epochs": 2, **changes})
    return ["sweep", "--config", LIST, "--workdir", str(workdir), *flags, *(f"--config.{text}" for text in texts)]


def test_dry_run_prints_the_groups_and_writes_nothing(histokd, cohort_dir, tmp_path):
    shown = histokd(*arguments(cohort_dir, tmp_path / "x", "--seeds", "0,1,2", "--dry-run"))
    assert shown.code == 0
    assert "7 settings x 3 seeds x 1 folds = 21 trainings in 2 groups" in shown.out
    assert "group 0: 18 replicas of full, without_mkd" in shown.out and "group 1: 3 replicas of no_distill" in shown.out
    assert not (tmp_path / "x").exists()


def test_sweep_writes_runs_and_a_table(histokd, cohort_dir, tmp_path):
    shown = histokd(*arguments(cohort_dir, tmp_path, "--only", "no_distillation", "--max-replicas", "1"))
    assert shown.code == 0, shown.err
    assert "| full | 1 |" in shown.out and "| no_distillation | 1 |" in shown.out and "simulated bags" in shown.out
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["setting"] for row in table["rows"]} == {"full", "no_distillation"} and not table["failed"]
    report = histokd("report", tmp_path / "full" / "seed_0")
    assert report.code == 0, report.err
    out = tmp_path / "new.csv"
    predict = histokd("predict", "--model", tmp_path / "full" / "seed_0", "--data", cohort_dir, "--out", out)
    assert predict.code == 0, predict.err


def test_a_diverging_training_is_named_and_the_exit_code_is_1(histokd, cohort_dir, tmp_path):
    shown = histokd(*arguments(cohort_dir, tmp_path, "--only", "without_skd", loss__lambda_skd=1e38))
    assert shown.code == 1
    assert "no training of the reference setting full succeeded" in shown.err and "full, seed 0, fold 0" in shown.err
    assert (tmp_path / "without_skd" / "seed_0" / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "changes", "named"),
    [
        (("--only", "without_sdk"), {}, "no setting without_sdk; it has full, without_mkd"),
        (("--seeds", "a,1"), {}, "--seeds a,1"),
        (("--seeds", "1,1"), {}, "each once"),
        (("--max-replicas", "-1"), {}, "--max-replicas -1"),
        ((), {"loss__lambda_skd": 0.0}, "full and without_skd of configs/ablations/mkd.py have the same values"),
        (("--only", "without_skd"), {"mesh__data": 2}, "mesh.replica"),
    ],
)
def test_bad_sweeps_are_one_clear_line(histokd, cohort_dir, tmp_path, flags, changes, named):
    shown = histokd(*arguments(cohort_dir, tmp_path, *flags, "--dry-run", **changes))
    assert shown.code == 1 and named in shown.err and shown.err.count("\n") == 1


def test_a_list_of_settings_and_a_configuration_are_not_confused(histokd, tmp_path):
    shown = histokd("sweep", "--config", "configs/mkd.py:er", "--workdir", tmp_path)
    assert shown.code == 1 and "no function get_sweep(arg); it holds one configuration" in shown.err
    shown = histokd("train", "--config", "configs/ablations/mkd.py", "--workdir", tmp_path)
    assert shown.code == 1 and "no function get_config(arg); it holds a sweep" in shown.err


@pytest.mark.multiprocess
def test_signal_writes_a_checkpoint_and_exits(cohort_dir, tmp_path):
    given = arguments(cohort_dir, tmp_path, "--only", "without_skd", train__max_epochs=2000, ckpt__every_epochs=1000)
    code = f"import sys\nfrom histokd_jax.cli.main import main\nsys.exit(main({given!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "full" / "seed_0" / "fold_0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no epoch was finished"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "2 replicas" in errors and "run the same command again" in errors
    assert any((tmp_path / "groups" / "0000" / "checkpoints").iterdir())
