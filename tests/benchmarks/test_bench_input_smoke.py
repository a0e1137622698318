"""The input and memory benchmarks run in smoke mode and write the common schema; values are checked for sanity only."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_memory, common  # noqa: E402

pytestmark = pytest.mark.bench


def _smoke(name, tmp_path, *extra):
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(out), *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def _assert_schema(record, name):
    common.check_record(record)
    assert record["benchmark"] == name
    assert set(record["host"]) == {"cpu", "cores", "memory_gib"}
    for metric in record["metrics"].values():
        assert 0 < metric["p10"] <= metric["median"] <= metric["p90"] < math.inf


def _assert_no_paths(value):
    if isinstance(value, dict):
        for key, item in value.items():
            _assert_no_paths(key)
            _assert_no_paths(item)
    elif isinstance(value, list):
        for item in value:
            _assert_no_paths(item)
    elif isinstance(value, str):
        assert not value.startswith("/")


def test_bench_input_smoke(tmp_path):
    record = _smoke("bench_input", tmp_path)
    _assert_schema(record, "bench_input")
    _assert_no_paths(record)
    assert {"pipeline_mb_per_s", "raw_mb_per_s", "tfds_mb_per_s", "pipeline_patches_per_s"} <= set(record["metrics"])
    assert "pipeline[8KiB/malloc]" in record["metrics"] and record["derived"]["smoke"]


def test_bench_memory_smoke(tmp_path):
    record = _smoke("bench_memory", tmp_path)
    _assert_schema(record, "bench_memory")
    _assert_no_paths(record)
    assert record["derived"]["growth"] < 2


def test_peak_memory_sees_an_allocation_and_reports_a_failure():
    small = bench_memory.peak_mib([sys.executable, "-c", "pass"])
    # Above what this test process may hold, which a child's record starts from.
    large = bench_memory.peak_mib([sys.executable, "-c", f"b = bytearray({int(small) + 200} * 2**20)"])
    assert large >= small + 190
    with pytest.raises(RuntimeError, match="failed with 3"):
        bench_memory.peak_mib([sys.executable, "-c", "raise SystemExit(3)"])


def test_alternate_interleaves_and_rotates_the_sides():
    calls = []
    sides = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "ab"}
    values = common.alternate(sides, 3)
    assert calls == ["a", "b", "b", "a", "a", "b"] and values == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_metric_refuses_no_or_infinite_values():
    assert common.metric([1.0, 3.0], "s") == {"median": 2.0, "p10": 1.2, "p90": 2.8, "n": 2, "unit": "s"}
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="expected at least one, all finite"):
            common.metric(values, "s")
