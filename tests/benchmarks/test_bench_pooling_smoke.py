"""bench_pooling runs in smoke mode, writes the common schema, and its memory check can fail."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_pooling, common  # noqa: E402

pytestmark = pytest.mark.bench


def test_bench_pooling_smoke(tmp_path):
    out = tmp_path / "bench_pooling.json"
    command = [sys.executable, "-m", "benchmarks.bench_pooling", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["schema"] == common.SCHEMA and record["benchmark"] == "bench_pooling"
    assert len(record["metrics"]) == 2 * 2 * 2 * 2, "network x length x implementation x direction"
    for metric in record["metrics"].values():
        assert 0 < metric["median"] < math.inf and metric["unit"] == "patches/s"
    derived = record["derived"]
    assert set(derived["temporary_mib"]) == set(record["metrics"])
    assert "attention D=32 float16 n=400 chunked/64 forward+backward" in record["metrics"]
    assert derived["chunked_temporary_below_limit"] and derived["smoke"] and derived["not_run"] == {}
    assert derived["peak_of_one_step"]["coattention float16"]["holds"]


def test_cells_that_do_not_fit_are_named_and_not_run():
    config = {**bench_pooling.SMOKE, "max_gib": 1e-6}
    found, temporary, skipped = bench_pooling.measure("attention", 32, 100, "float32", config)
    assert found == {} and set(skipped) == set(temporary) and "max_gib" in skipped["segment forward"]


def test_growth_compares_the_ends():
    assert bench_pooling.growth({1000: 5.0, 100: 4.0, 10: 2.0}) == 2.5
