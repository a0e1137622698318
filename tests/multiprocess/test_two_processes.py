"""`histokd train` as two real processes with four forced CPU devices each: loss, restart, stop, disagreement."""

import json
import shutil
import signal
import time

import group
import numpy as np
import pytest
import tiny

from histokd_jax.evals.predictions import read_predictions
from histokd_jax.train import run, watchdog
from histokd_jax.train.checkpoint import CheckpointMismatchError

pytestmark = pytest.mark.multiprocess

# The worker of the process $DIES dies at the end of its second epoch, between two checkpoints.
DYING = """
import os, signal
if "HISTOKD_WATCHDOG_CHANNEL" in os.environ and os.environ["HISTOKD_PROCESS_ID"] == os.environ["DIES"]:
    from histokd_jax.train import loop
    end_epoch = loop._StageRunner._end_epoch
    def dying(self, state, progress, *rest):
        if progress.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return end_epoch(self, state, progress, *rest)
    loop._StageRunner._end_epoch = dying
"""


@pytest.fixture(scope="module")
def uninterrupted(cohort_dir, tmp_path_factory):
    """A finished run of two processes; read only."""
    path = tmp_path_factory.mktemp("uninterrupted") / "run"
    with group.Group(group.train(tiny.train_arguments(cohort_dir, path))) as processes:
        assert processes.wait() == [0, 0], (processes.said(0), processes.said(1))
    return path


@pytest.fixture(scope="module")
def crippled(cohort_dir, tmp_path_factory):
    """A run whose process 1 was killed after the first checkpoint, as `lose` tells of it; read only."""
    return lose(1, cohort_dir, tmp_path_factory.mktemp("crippled"))


def lose(process, cohort_dir, folder):
    """A run that loses a process: its directory, exit codes, messages, and seconds from the loss to the end."""
    (folder / "sitecustomize.py").write_text(DYING)
    path = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("DIES", str(process))
        with group.Group(group.train(tiny.train_arguments(cohort_dir, path))) as processes:
            processes.until(lambda: (path / "fold_0" / "checkpoints").is_dir())
            dead = processes.worker(process)
            processes.until(lambda: not group.alive(dead), ended_is_fine=True)
            began = time.monotonic()
            codes = processes.wait(60)
            seconds = time.monotonic() - began
            return path, codes, [processes.said(k) for k in (0, 1)], seconds


def curve(workdir, *keys):
    lines = map(json.loads, (workdir / "fold_0" / "metrics.jsonl").read_text().splitlines())
    return [[line.get(key) for key in ("step", "split", *keys)] for line in lines]


def assert_close(first, second):
    a, b = (read_predictions(path / "predictions_test.csv") for path in (first, second))
    assert list(a.slide_id) == list(b.slide_id)
    np.testing.assert_allclose(a.probs, b.probs, atol=1e-4)


def test_a_run_of_two_processes_is_complete_and_written_once(uninterrupted, cohort_dir, tmp_path):
    for name in ("config.json", "run_manifest.json", "predictions_test.csv", "summary.json", "report.html"):
        assert (uninterrupted / name).is_file(), name
    manifest = json.loads((uninterrupted / "run_manifest.json").read_text())
    assert manifest["processes"] == 2 and manifest["devices"].startswith("8 x ")
    # The default of one device became all of them, and the record says so.
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["mesh"]["data"] == config["data"]["rows"] == 8
    assert len(curve(uninterrupted)) == 2 * 3, "one line per epoch and split, from one process"
    events = list((uninterrupted / "fold_0" / "tensorboard").iterdir())
    assert len(events) == 1
    table = read_predictions(uninterrupted / "predictions_test.csv")
    assert len(set(table.slide_id)) * 3 == len(table) and np.isfinite(table.probs).all()


def test_one_process_with_all_devices_gives_the_same_run(uninterrupted, tiny_config, tmp_path):
    run.train(tiny_config(mesh__data=8), tmp_path)
    assert_close(uninterrupted, tmp_path)
    for ours, theirs in zip(curve(tmp_path, "loss"), curve(uninterrupted, "loss"), strict=True):
        assert ours[:2] == theirs[:2]
        if ours[2] is not None:
            assert ours[2] == pytest.approx(theirs[2], rel=1e-4)


def test_survivor_ends_within_a_minute_and_names_the_lost_process(crippled):
    _, codes, messages, seconds = crippled
    assert codes == [watchdog.EXIT_LOST, watchdog.EXIT_LOST]
    assert seconds < 60
    for text in messages:
        assert "process 1 of 2 on " in text and "was killed by SIGKILL" in text
    assert "run the same command on all hosts to continue" in messages[0]


def test_restart_at_the_same_process_count_is_bit_equal(uninterrupted, crippled, cohort_dir, tmp_path):
    path = shutil.copytree(crippled[0], tmp_path / "run")
    assert_continues(path, uninterrupted, cohort_dir)


@pytest.mark.slow
def test_loss_of_the_coordinating_process_is_named_and_the_run_continues_bit_equal(uninterrupted, cohort_dir, tmp_path):
    """Process 0 also holds the service through which the processes found each other."""
    path, codes, messages, seconds = lose(0, cohort_dir, tmp_path)
    assert codes == [watchdog.EXIT_LOST, watchdog.EXIT_LOST]
    assert seconds < 60
    for text in messages:
        assert "process 0 of 2 on " in text and "was killed by SIGKILL" in text
    assert "run the same command on all hosts to continue" in messages[1]
    assert_continues(path, uninterrupted, cohort_dir)


def assert_continues(path, uninterrupted, cohort_dir):
    assert not (path / "fold_0" / "fold.json").exists()
    with group.Group(group.train(tiny.train_arguments(cohort_dir, path))) as processes:
        assert processes.wait() == [0, 0], (processes.said(0), processes.said(1))
    for file in sorted(uninterrupted.rglob("predictions_*.csv")):
        assert file.read_bytes() == (path / file.relative_to(uninterrupted)).read_bytes()
    model, again = (json.loads((p / "fold_0" / "model" / "model.json").read_text()) for p in (uninterrupted, path))
    assert model["params_sha256"] == again["params_sha256"]
    assert curve(uninterrupted, "loss", "monitor") == curve(path, "loss", "monitor")


@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (8, 4)), 1])
def test_another_process_count_and_mesh_continue_from_the_same_step(
    uninterrupted, crippled, tiny_config, tmp_path, devices
):
    """One process instead of two, with the same, fewer, and a single device; also with the state sharded."""
    path = shutil.copytree(crippled[0], tmp_path / "run")
    run.train(tiny_config(mesh__data=devices, data__rows=8, mesh__fsdp=devices == 4), path)
    assert_close(uninterrupted, path)
    assert [line[:2] for line in curve(path)] == [line[:2] for line in curve(uninterrupted)]


def test_another_mesh_without_the_rows_of_the_plan_is_refused_with_the_setting(crippled, tiny_config, tmp_path):
    path = shutil.copytree(crippled[0], tmp_path / "run")
    with pytest.raises(CheckpointMismatchError, match=r"data\.rows \(8 there, 4 now\)"):
        run.train(tiny_config(mesh__data=4), path)


def test_a_signal_to_one_process_stops_both_at_the_same_step(cohort_dir, tmp_path):
    arguments = tiny.train_arguments(cohort_dir, tmp_path / "run", train__max_epochs=2000, ckpt__every_epochs=1000)
    metrics = tmp_path / "run" / "fold_0" / "metrics.jsonl"
    with group.Group(group.train(arguments)) as processes:
        processes.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 4)
        processes.processes[1].send_signal(signal.SIGTERM)
        assert processes.wait(60) == [watchdog.EXIT_INTERRUPTED] * 2
        said = [processes.said(k) for k in (0, 1)]
    steps = [text.split("at step ")[1].split()[0] for text in said]
    assert steps[0] == steps[1] and all("after writing a checkpoint" in text for text in said)
    assert (tmp_path / "run" / "fold_0" / "checkpoints" / steps[0]).is_dir()


def test_different_configurations_are_refused_by_name_before_training(cohort_dir, tmp_path):
    commands = [
        *group.train(tiny.train_arguments(cohort_dir, tmp_path / "run"), 1),
        *group.train(tiny.train_arguments(cohort_dir, tmp_path / "run", train__lr=0.5), 1),
    ]
    with group.Group(commands) as processes:
        codes = processes.wait(60)
        for k in (0, 1):
            assert codes[k] in (1, watchdog.EXIT_LOST)
            assert "disagree about configuration" in processes.said(k)
            assert "config train.lr (0.5 on process 1; 0.0002 on the other 1)" in processes.said(k)
    assert not (tmp_path / "run" / "config.json").exists()
