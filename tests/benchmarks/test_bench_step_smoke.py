"""`bench_step` and the report of results: smoke run in the common schema, fair sides, verdicts."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_step, common, report  # noqa: E402

FIELDS = {
    "schema", "benchmark", "git", "timestamp", "host", "device_kind", "n_devices", "versions", "config", "metrics",
    "derived", "notes",
}  # fmt: skip


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_step.json"
    command = [sys.executable, "-m", "benchmarks.bench_step", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_bench_step_smoke(record):
    assert set(record) == FIELDS and record["schema"] == common.SCHEMA and record["benchmark"] == "bench_step"
    for metric in record["metrics"].values():
        assert 0 < metric["p10"] <= metric["median"] <= metric["p90"] < math.inf
    facts = record["derived"]["median 20"]
    assert {"student[median 20]", "mkd[median 20]"} <= set(record["metrics"])
    assert facts["sides"]["student"]["compile_seconds"] > 0 and facts["sides"]["student"]["temp_mib"] > 0
    assert 0 < facts["plan"]["fill"] <= 1
    measured = "torch_eager[median 20]" in record["metrics"]
    assert measured != ("torch_eager" in facts["not_measured"])  # measured, or it says why not
    assert measured == ("ratio" in facts)


def test_report_renders_every_metric_and_verdict(record, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(record))
    text = report.render(report.load_results(tmp_path))
    for name in record["metrics"]:
        assert f"| {name} |" in text
    assert "| smoke | yes |" in text and "## bench_step" in text


def test_report_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="no results"):
        report.load_results(tmp_path)
    (tmp_path / "other.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="other.json is not a benchmark result"):
        report.load_results(tmp_path)


def test_report_formats_numbers():
    values = (True, 12345.6, 0.123456, 1234, "x")
    assert [report.number(v) for v in values] == ["yes", "12,346", "0.1235", "1,234", "x"]


def test_workload_holds_the_planned_bags_in_every_dtype():
    config = {**bench_step.SMOKE, "sides": ["student", "student_float16_input"]}
    work = bench_step.make_workload(config, 20)
    assert set(work.batches) == {"float32", "float16"}
    for i, patches in enumerate(work.patches):
        a, b = (work.batches[dtype][i] for dtype in ("float32", "float16"))
        np.testing.assert_array_equal(a["segment_ids"], b["segment_ids"])
        np.testing.assert_array_equal(a["patches"].astype(np.float16), b["patches"])
        assert (a["segment_ids"] > 0).sum() == patches == work.plan.step(0, i).count.sum()


def test_window_counts_valid_patches_of_the_steps_inside_the_clock(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: next(clock))
    seen = []
    rate = bench_step.window(seen.append, ["a", "b"], [100, 50], steps=3)
    assert seen == ["b", "a", "b", "a"] and rate == (100 + 50 + 100) / 2


def test_student_is_compared_with_the_better_peer():
    values = {"student": [30.0, 40.0, 50.0], "torch_eager": [10.0, 10.0, 10.0], "torch_compiled": [20.0, 20.0, 20.0]}
    found = bench_step.compare(values, 100, quiet=True)
    assert found["better_peer"] == "torch_compiled" and found["ratios"] == [1.5, 2.0, 2.5]
    assert found["ratio"] == 2.0 and found["meets_target"] and found["target"] == 2.0
    assert not bench_step.compare({**values, "torch_eager": [25.0] * 3}, 100, quiet=True)["meets_target"]
    assert "meets_target" not in bench_step.compare(values, 10_000, quiet=True)
    assert bench_step.compare({"student": [1.0]}, 100, quiet=True) == {}


def test_a_busy_machine_never_meets_a_target():
    values = {"student": [90.0], "torch_eager": [10.0]}
    found = bench_step.compare(values, 100, quiet=False)
    assert found["ratio"] == 9.0 and found["meets_target"] is False


def test_foreign_work_is_counted_in_cores(monkeypatch):
    monkeypatch.setattr(bench_step, "processor_seconds", lambda: (130.0, 25.0))
    assert bench_step.cores_used_elsewhere((100.0, 5.0), seconds=5.0) == 2.0
    assert bench_step.cores_used_elsewhere((110.0, 5.0), seconds=5.0) == 0.0
    assert bench_step.cores_used_elsewhere(None, seconds=5.0) is None


def test_missing_peer_is_reported_and_the_library_still_measured(monkeypatch):
    monkeypatch.setattr(bench_step, "peer_obstacle", lambda: "PyTorch is not installed")
    config = {**bench_step.SMOKE, "sides": ["student", "torch_eager"]}
    metrics, derived = bench_step.measure(config, 20)
    assert set(metrics) == {"student[median 20]"}
    assert derived["not_measured"] == {"torch_eager": "PyTorch is not installed"} and "ratio" not in derived


def test_smoke_results_stay_out_of_the_results_folder():
    args = common.parser("bench_step", "").parse_args(["--smoke"])
    assert common.RESULTS not in bench_step.result_path(args, "bench_step").parents
    args = common.parser("bench_step", "").parse_args([])
    assert bench_step.result_path(args, "bench_step") is None
