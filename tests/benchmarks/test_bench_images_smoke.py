"""bench_stain and bench_augment run in smoke mode, and NumPy's pictures are those of the library."""

import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_stain, common  # noqa: E402

pytestmark = pytest.mark.bench


def smoke(name, tmp_path):
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    common.check_record(record)
    assert record["benchmark"] == name and record["derived"]["smoke"]
    assert all(0 < metric["median"] < math.inf for metric in record["metrics"].values())
    return record


def test_bench_stain_smoke(tmp_path):
    record = smoke("bench_stain", tmp_path)
    assert len(record["metrics"]) == 3 * 2 * 2, "method x work x side"
    derived = record["derived"]
    assert set(derived["times_faster_than_numpy"]) == set(derived["difference"])
    assert all(v["largest_levels"] <= 1 for v in derived["difference"].values()), "the same pictures, up to rounding"


def test_the_comparison_of_results_can_fail():
    first = np.zeros((2, 2), np.uint8)
    assert bench_stain.difference(first, first + 3) == {"largest_levels": 3, "share_differing": 1.0}


def test_bench_augment_smoke(tmp_path):
    record = smoke("bench_augment", tmp_path)
    names = set(record["metrics"])
    assert {"mfl_faithful 16 px", "step HorizontalFlip 16 px", "standardise 16 px"} <= names
    assert set(record["derived"]["images_per_second"]) == names
    assert record["derived"]["temporary_mib"]["mfl_faithful 16 px"] >= 0
