"""`bench_replicas` in smoke mode: common schema, both sides, ratios and totals that follow from them."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.bench

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("loop", ["map", "vmap"])
def test_bench_replicas_smoke(tmp_path, loop):
    out = tmp_path / "bench_replicas.json"
    command = [sys.executable, "-m", "benchmarks.bench_replicas", "--smoke", "--loop", loop, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["schema"] == 1 and record["benchmark"] == "bench_replicas"
    metrics, derived = record["metrics"], record["derived"]
    assert derived["replicas"] == 4 and derived["loop"] == loop and derived["smoke"]
    one, many = (metrics[name]["median"] for name in ("one_program", "sequential"))
    assert derived["ratio_of_medians"] == pytest.approx(one / many) and one > 0
    for name in ("one_program", "sequential"):
        total = derived["total_with_compilation_seconds"][name]
        assert total == pytest.approx(metrics[name]["median"] + derived["compile_and_first_step_seconds"][name])
    assert derived["patches_per_s"]["one_program"] == pytest.approx(derived["patches_per_s"]["sequential"] * many / one)
