"""The accelerator suite: pieces run in processes of their own, are skipped or reported with the reason."""

import argparse
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_experiment, common, gpu_suite, peaks  # noqa: E402
from benchmarks.gpu_suite import Piece, run_piece  # noqa: E402

pytestmark = pytest.mark.bench


def arguments(folder, **changes):
    return argparse.Namespace(**{"out": folder, "only": None, "minutes": 5.0, "smoke": True, **changes})


def fake_process(monkeypatch, code, stderr=""):
    monkeypatch.setattr(
        gpu_suite.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], code, stdout="", stderr=stderr)
    )


def test_suite_smoke_runs_a_real_piece(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--smoke", "--out", str(tmp_path), "--only", "profile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    overview = json.loads((tmp_path / "gpu_suite.json").read_text())
    common.check_record(overview)
    assert overview["derived"]["pieces"]["profile"]["status"] == "done"
    piece = json.loads((tmp_path / "profile.json").read_text())
    common.check_record(piece)
    assert piece["benchmark"] == "bench_profile" and piece["derived"]["student"]["top"]


def test_pieces_that_cannot_run_are_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_suite.PIECES, "absent", Piece("bench_absent"))
    found = run_piece("absent", tmp_path, True, 60)
    assert found["status"] == "skipped" and found["reason"] == "benchmarks/bench_absent.py does not exist"
    found = run_piece("profile", tmp_path, True, 0)
    assert found["status"] == "skipped" and "--minutes" in found["reason"]
    fake_process(monkeypatch, bench_experiment.CANNOT_RUN, "noise\nthe cohort takes 99 GB")
    found = run_piece("experiment", tmp_path, True, 60)
    assert (found["status"], found["reason"]) == ("skipped", "the cohort takes 99 GB")


def test_a_failing_piece_is_reported_and_the_others_still_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "device", lambda: ("cpu", 1))
    monkeypatch.setitem(gpu_suite.PIECES, "absent", Piece("bench_absent"))
    fake_process(monkeypatch, 1, "Traceback\nValueError: no")
    record = gpu_suite.run(arguments(tmp_path, only=["profile", "absent"]))
    pieces = record["derived"]["pieces"]
    assert pieces["profile"]["status"] == "failed" and pieces["profile"]["reason"] == "exit code 1: ValueError: no"
    assert pieces["absent"]["status"] == "skipped"


def test_the_full_suite_refuses_a_cpu_and_an_unknown_device(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "run_piece", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(gpu_suite, "device", lambda: ("cpu", 1))
    with pytest.raises(SystemExit, match="JAX runs on a CPU here"):
        gpu_suite.run(arguments(tmp_path, smoke=False))
    monkeypatch.setattr(gpu_suite, "device", lambda: ("NVIDIA X", 1))
    with pytest.raises(peaks.UnknownDeviceError, match="NVIDIA X"):
        gpu_suite.run(arguments(tmp_path, smoke=False))


def test_every_piece_takes_its_arguments():
    for piece in gpu_suite.PIECES.values():
        if not (ROOT / "benchmarks" / f"{piece.module}.py").exists():
            continue
        options = {word for word in (*piece.arguments, *piece.smoke) if word.startswith("--")}
        text = (ROOT / "benchmarks" / f"{piece.module}.py").read_text()
        assert all(f'"{option}"' in text for option in options), piece.module


def test_the_experiment_knows_when_it_does_not_fit(tmp_path, monkeypatch):
    flat = {"data.resident": "off"}
    monkeypatch.setattr("histokd_jax.utils.config.flatten", lambda _: flat)
    monkeypatch.setattr(bench_experiment, "_device_bytes", lambda: 1e9)
    assert "the device has 1.0 GB: fewer --slides" in bench_experiment.obstacle(
        {**bench_experiment.SMOKE, "slides": 4000, "largest_bag": 10**6, "median_patches": 4000}, tmp_path
    )
    assert bench_experiment.obstacle(bench_experiment.SMOKE, tmp_path) == ""
    assert "GB are free" in bench_experiment.obstacle({**bench_experiment.FULL, "slides": 10**6}, tmp_path)
    flat.clear()
    assert "has no data.resident" in bench_experiment.obstacle(bench_experiment.SMOKE, tmp_path)


def test_the_full_experiment_is_the_stated_cohort():
    size = bench_experiment.expected_bytes(bench_experiment.FULL)
    assert size == pytest.approx(1000 * 10_000 * 1024 * 2, rel=0.03)
