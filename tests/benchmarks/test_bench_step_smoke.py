"""`bench_step` and the report of results: smoke run in the common schema, fair sides, verdicts."""

import json
import math
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_step, common, peaks, report  # noqa: E402

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_step.json"
    command = [sys.executable, "-m", "benchmarks.bench_step", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_bench_step_smoke(record):
    common.check_record(record)
    assert record["benchmark"] == "bench_step"
    for metric in record["metrics"].values():
        assert 0 < metric["p10"] <= metric["median"] <= metric["p90"] < math.inf
    facts = record["derived"]["median 20"]
    assert {"student[median 20]", "mkd[median 20]"} <= set(record["metrics"])
    assert facts["sides"]["student"]["compile_seconds"] > 0 and facts["sides"]["student"]["temp_mib"] > 0
    assert 0 < facts["plan"]["fill"] <= 1
    measured = "torch_eager[median 20]" in record["metrics"]
    assert measured != ("torch_eager" in facts["not_measured"])  # measured, or it says why not
    assert measured == ("comparison_float32" in facts) == ("comparison_bfloat16" in facts)
    assert measured == ("student_over_peer_bfloat16[median 20]" in record["metrics"])


def test_arithmetic_rates_are_reported_and_mfu_is_left_out_on_cpu_with_the_reason(record):
    rate, tflops = (record["metrics"][f"{name}[median 20]"] for name in ("student", "student_tflops"))
    facts = record["derived"]["median 20"]
    used, per_step = facts["utilisation"]["student"], facts["valid_patches_per_step"]
    expected = rate["median"] / per_step * used["flops_per_step"] / 1e12
    assert tflops["median"] == pytest.approx(expected) and tflops["unit"] == "TFLOP/s"
    assert used["mfu"] == peaks.CPU_REASON
    assert not any("mfu" in name or "hbm" in name for name in record["metrics"])


def _fake(kind):
    return types.SimpleNamespace(platform="gpu", device_kind=kind)


def test_mfu_and_memory_rate_follow_from_the_peaks_of_a_known_device():
    config = {**bench_step.SMOKE, "sides": ["student_bfloat16_input"]}
    work = bench_step.make_workload(config, 20)
    rates = [1e9, 2e9, 4e9]
    metrics, facts = bench_step.utilisation("student_bfloat16_input", rates, work, config, _fake("NVIDIA H200"))
    steps_per_s = 2e9 / np.mean(work.patches)
    assert metrics["mfu"]["median"] == pytest.approx(steps_per_s * facts["flops_per_step"] / 989.4e12)
    assert metrics["hbm"]["median"] == pytest.approx(steps_per_s * facts["least_bytes_per_step"] / 1e9)
    assert facts["meets_mfu_target"] is False and facts["peak_hbm_gb_s"] == 4800
    with pytest.raises(peaks.UnknownDeviceError, match="NVIDIA B999"):
        bench_step.utilisation("student_bfloat16_input", rates, work, config, _fake("NVIDIA B999"))


def test_an_unknown_accelerator_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(bench_step.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(bench_step.jax, "devices", lambda: [_fake("NVIDIA B999")])
    monkeypatch.setattr(bench_step, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(peaks.UnknownDeviceError, match="NVIDIA B999"):
        bench_step.run(bench_step.SMOKE, common.parser("bench_step", "").parse_args(["--smoke"]))


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
    config = {**bench_step.SMOKE, "sides": ["student", "student_float16_input", "mkd_bfloat16_input"]}
    work = bench_step.make_workload(config, 20)
    assert set(work.batches) == {"float32", "float16", "bfloat16"}
    for i, patches in enumerate(work.patches):
        a, b = (work.batches[dtype][i] for dtype in ("float32", "float16"))
        np.testing.assert_array_equal(a["segment_ids"], b["segment_ids"])
        np.testing.assert_array_equal(a["patches"].astype(np.float16), b["patches"])
        low = work.batches["bfloat16"][i]["patches"]
        np.testing.assert_array_equal(a["patches"].astype(low.dtype), low)
        assert (a["segment_ids"] > 0).sum() == patches == work.plan.step(0, i).count.sum()


def test_window_counts_valid_patches_of_the_steps_inside_the_clock(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(bench_step.time, "perf_counter", lambda: next(clock))
    seen = []
    rate = bench_step.window(seen.append, ["a", "b"], [100, 50], steps=3)
    assert seen == ["b", "a", "b", "a"] and rate == (100 + 50 + 100) / 2


def test_resident_steps_stay_within_the_given_memory():
    config = {**bench_step.FULL, "sides": ["student", "student_bfloat16", "torch_eager_bfloat16"]}
    assert bench_step.bytes_per_patch(config) == 1024 * (8 + 4 + 2)
    slots = {}
    for median in (100, 1000, 10_000, 50_000):
        plan, count = bench_step.fitting_plan(config, median)
        assert count >= 1 and count * plan.capacity * bench_step.bytes_per_patch(config) <= 6e9
        assert plan.sizes.max() <= 120_000
        slots[median] = plan.num_slots
    assert slots[100] == slots[1000] == 16 and 2 <= slots[50_000] < 16
    with pytest.raises(ValueError, match="a step of 2 slides .* raise --resident-gb"):
        bench_step.fitting_plan({**config, "resident_gb": 0.1}, 50_000)


def test_windows_are_long_enough_but_bounded():
    config = {"window_steps": 20, "window_seconds": 3.0, "window_seconds_max": 12.0}
    found = [bench_step.window_steps(config, seconds) for seconds in (0.001, 0.01, 0.3, 2.0, 60.0)]
    assert found == [3000, 300, 20, 6, 1]


def test_student_is_compared_with_the_better_peer():
    values = {"student": [30.0, 40.0, 50.0], "torch_eager": [10.0, 10.0, 10.0], "torch_compiled": [20.0, 20.0, 20.0]}
    targets = bench_step.TARGETS
    found = bench_step.compare(values, 100, True, "float32", targets)
    assert found["better_peer"] == "torch_compiled" and found["ratios"] == [1.5, 2.0, 2.5]
    assert found["ratio"] == 2.0 and found["meets_target"] and found["target"] == 2.0
    slower = {**values, "torch_eager": [25.0] * 3}
    assert not bench_step.compare(slower, 100, True, "float32", targets)["meets_target"]
    assert "meets_target" not in bench_step.compare(values, 10_000, True, "float32", targets)
    assert bench_step.compare({"student": [1.0]}, 100, True, "float32", targets) == {}


def test_bfloat16_is_compared_with_bfloat16_only():
    values = {"student": [90.0], "student_bfloat16": [10.0], "student_bfloat16_input": [60.0]}
    values |= {"torch_eager": [1.0], "torch_eager_bfloat16": [2.0], "torch_compiled_bfloat16": [1.5]}
    found = bench_step.compare(values, 1000, True, "bfloat16", bench_step.GPU_TARGETS)
    assert (found["student"], found["better_peer"]) == ("student_bfloat16_input", "torch_eager_bfloat16")
    assert found["ratio"] == 30.0 and found["target"] == 50.0 and not found["meets_target"]


def test_a_busy_machine_never_meets_a_target():
    values = {"student": [90.0], "torch_eager": [10.0]}
    found = bench_step.compare(values, 100, False, "float32", bench_step.TARGETS)
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
    assert set(metrics) == {"student[median 20]", "student_tflops[median 20]"}
    assert derived["not_measured"] == {"torch_eager": "PyTorch is not installed"}
    assert "comparison_float32" not in derived


def test_smoke_results_stay_out_of_the_results_folder():
    args = common.parser("bench_step", "").parse_args(["--smoke"])
    assert common.RESULTS not in bench_step.result_path(args, "bench_step").parents
    args = common.parser("bench_step", "").parse_args([])
    assert bench_step.result_path(args, "bench_step") is None
