"""`bench_e2e` in smoke mode: common schema, the three numbers of each method, times that add up."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.bench

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_e2e.json"
    command = [sys.executable, "-m", "benchmarks.bench_e2e", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_bench_e2e_smoke(record):
    assert record["schema"] == 1 and record["benchmark"] == "bench_e2e" and record["derived"]["smoke"]
    names = {"input"} | {f"{method}/{part}" for method in ("student", "mkd") for part in ("compute", "end_to_end")}
    assert names <= set(record["metrics"])
    for metric in record["metrics"].values():
        assert 0 < metric["p10"] <= metric["median"] <= metric["p90"] < math.inf
    for method in ("student", "mkd"):
        facts = record["derived"][method]
        assert 0 < facts["input_bound_fraction"] < 1 and facts["slides_per_s"] > 0


def test_bench_e2e_parts_of_a_step_fit_in_the_step(record):
    for method in ("student", "mkd"):
        parts = [record["metrics"][f"{method}/seconds_{part}"] for part in ("data_wait", "transfer", "compute_wait")]
        assert sum(part["p10"] for part in parts) <= record["metrics"][f"{method}/seconds_step"]["p90"]
