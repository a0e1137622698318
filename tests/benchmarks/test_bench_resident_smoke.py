"""`bench_resident` in smoke mode: common schema, both sides, host bytes, memory; verdicts."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_resident  # noqa: E402

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_resident.json"
    command = [sys.executable, "-m", "benchmarks.bench_resident", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_bench_resident_smoke(record):
    assert record["schema"] == 1 and record["benchmark"] == "bench_resident" and record["derived"]["smoke"]
    assert len(record["metrics"]) == 2 * 3 * 4
    for metric in record["metrics"].values():
        assert 0 < metric["p10"] <= metric["median"] <= metric["p90"] < math.inf
    for method in ("student", "mkd"):
        facts = record["derived"][method]
        for side in ("stream", "resident", "resident_int8"):
            assert 0 < facts[f"{side}/input_bound_fraction"] < 1
            assert record["metrics"][f"{method}/{side}/data_wait"]["p10"] > 0
        assert facts["stream/memory_mib"] < facts["resident_int8/memory_mib"] < facts["resident/memory_mib"]
        assert len(facts["resident"]["ratios"]) == 2 and "meets_speed_target" in facts["resident"]


def test_host_bytes_are_counted_exactly_and_stay_below_one_percent(record):
    plan = record["derived"]["plan"]
    config = record["config"]
    patches = plan["rows"] * plan["row_patches"] * (2 * config["feat_dim"] + 8)
    slots = plan["slots"] * (4 + 4 + 4 + 4 * config["genes"] + 1)
    for method in ("student", "mkd"):
        sent = {side: record["metrics"][f"{method}/{side}/host_bytes"]["median"] for side in ("stream", "resident")}
        assert sent == {"stream": patches + slots, "resident": 12 * plan["slots"]}
        assert record["derived"][method]["resident"]["meets_host_bytes_target"]


def test_the_target_depends_on_the_backend_and_on_what_bounds_streaming():
    assert bench_resident.verdict(0.99, 0.1, "cpu")["meets_speed_target"]
    assert not bench_resident.verdict(0.97, 0.9, "cpu")["meets_speed_target"]
    assert bench_resident.verdict(5.1, 0.85, "gpu")["meets_speed_target"]
    assert not bench_resident.verdict(4.9, 0.85, "gpu")["meets_speed_target"]
    assert bench_resident.verdict(1.5, 0.3, "gpu") == {}
