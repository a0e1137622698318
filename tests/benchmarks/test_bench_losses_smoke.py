"""bench_losses runs in smoke mode, writes the common schema, and covers every entry of the catalogue."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import common  # noqa: E402
from histokd_jax.losses.catalogue import CATALOGUE  # noqa: E402

pytestmark = pytest.mark.bench


def test_bench_losses_smoke(tmp_path):
    out = tmp_path / "bench_losses.json"
    command = [sys.executable, "-m", "benchmarks.bench_losses", "--smoke", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    common.check_record(record)
    assert set(CATALOGUE) <= set(record["metrics"])
    derived = record["derived"]
    assert derived["smoke"] and set(derived["naive_over_gram"]) == {"8x64"}
    assert derived["temporary_mib"]["covariance gram 8x64"] < derived["temporary_mib"]["covariance direct 8x64"]
