"""Smoke runs of the benchmarks of start-up, checkpoints, collectives, files and profile, and their arithmetic."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import bench_collectives, bench_files, bench_profile, common  # noqa: E402
from histokd_jax.train import sharding  # noqa: E402
from histokd_jax.utils.hlo import collective_bytes  # noqa: E402

pytestmark = pytest.mark.bench


def smoke(name, tmp_path, *extra):
    out = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--out", str(out), *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    common.check_record(record)
    assert record["benchmark"] == name and record["derived"]["smoke"]
    assert all(metric["p10"] > 0 for metric in record["metrics"].values())
    return record


def test_bench_compile_smoke(tmp_path):
    record = smoke("bench_compile", tmp_path)
    phases = {"import", "init", "compile", "first_step", "total"}
    assert set(record["metrics"]) == {f"student/{kind}/{phase}" for kind in ("cold", "warm") for phase in phases}
    hits = record["derived"]["student"]["cache_hits"]
    # A cold start may find in its own cache what it compiled a moment before, but the warm one finds nearly all.
    assert hits["warm"][0] > hits["cold"][0]


def test_bench_checkpoint_smoke(tmp_path):
    record = smoke("bench_checkpoint", tmp_path)
    assert {"save", "restore", "loop", "loop_with_save", "save_rate", "restore_rate"} == set(record["metrics"])
    facts, save = record["derived"], record["metrics"]["save"]
    assert record["metrics"]["save_rate"]["median"] == pytest.approx(facts["state_mb"] / save["median"], rel=0.5)


def test_bench_collectives_smoke(tmp_path):
    record = smoke("bench_collectives", tmp_path)
    one, two = (record["derived"][n] for n in ("1", "2"))
    assert one["total_bytes"] == 0 and set(two["collective_bytes"]) == {"all-reduce"}
    assert 0 < two["total_bytes"] <= record["derived"]["bound_bytes"] and two["within_bound"]
    assert two["independent_of_bag_length"] and record["derived"]["weak_scaling"].startswith("unmeasured")


@pytest.mark.torch
def test_bench_files_smoke(tmp_path):
    pytest.importorskip("torch")
    record = smoke("bench_files", tmp_path)
    rates = {f"{name}[median 40]" for name in ("packed", "files_workers0", "files_workers1")}
    assert rates < set(record["metrics"]) and record["derived"]["median 40"]["ratio"] > 0


def test_bench_files_without_torch_says_so(monkeypatch):
    monkeypatch.setattr(bench_files.bench_step, "peer_obstacle", lambda: "PyTorch is not installed")
    with pytest.raises(SystemExit, match="compares with PyTorch: PyTorch is not installed"):
        bench_files.run(bench_files.SMOKE, None)


@pytest.mark.torch
def test_files_hold_the_planned_bags_and_an_epoch_visits_each_once(tmp_path):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_files, torch_peer

    sizes = np.array([3, 5, 2])
    torch_files.write_files(tmp_path, sizes, 8, "float32")
    data = torch_files.SlideFiles(tmp_path, np.array([0, 1, 1]))
    assert [tuple(x.shape) for x, _ in data] == [(3, 8), (5, 8), (2, 8)] and [y for _, y in data] == [0, 1, 1]
    cpu = torch.device("cpu")
    epoch = torch_files.make_epoch(torch_peer.StudentPeer(8, 4, 2), torch_files.loader(data, 0, cpu), cpu)
    patches, loss = epoch()
    assert patches == 10 and np.isfinite(loss)
    with pytest.raises(ValueError, match="3 slides for 2 labels"):
        torch_files.SlideFiles(tmp_path, np.array([0, 1]))


def test_data_set_of_files_stays_within_the_given_size():
    config = {**bench_files.FULL, "dataset_gb": 0.5}
    sizes = bench_files.bag_sizes(config, 1000)
    assert len(sizes) % 16 == 0 and 32 <= len(sizes) < 320 and sizes.sum() * 1024 * 6 <= 0.5e9
    with pytest.raises(ValueError, match="raise --dataset-gb"):
        bench_files.bag_sizes(config, 100_000)


def test_collective_bytes_of_a_known_program():
    mesh = sharding.make_mesh(4)

    def local(x):
        return jax.lax.psum(x, "data"), jax.lax.all_gather(x, "data")

    specs = dict(in_specs=P("data"), out_specs=(P(), P(None, "data")), check_vma=False)
    compiled = jax.jit(jax.shard_map(local, mesh=mesh, **specs)).lower(np.zeros((8, 3), np.float32)).compile()
    # Each of 4 devices holds [2, 3] float32.
    assert collective_bytes(compiled.as_text()) == {"all-reduce": 24, "all-gather": 96}
    alone = jax.jit(lambda x: x @ x.T).lower(np.zeros((8, 3), np.float32)).compile()
    assert collective_bytes(alone.as_text()) == {}


def test_the_batch_of_equal_bags_is_full_and_in_order():
    config = {**bench_collectives.SMOKE, "slides_per_step": 4}
    batch = bench_collectives.make_batch(config, 2, 16)
    assert batch["segment_ids"].reshape(-1).tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert batch["positions"].reshape(-1).tolist() == [0, 1, 2, 3] * 4
    with pytest.raises(ValueError, match="cannot be divided into 3 rows"):
        bench_collectives.make_batch(config, 3, 16)


def test_bench_profile_smoke(tmp_path):
    record = smoke("bench_profile", tmp_path)
    found = record["derived"]["student"]
    shares = [entry["share"] for entry in found["top"]]
    assert found["where"] == "host" and len(shares) == 5
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert all(entry["ms_per_step"] > 0 and entry["calls_per_step"] >= 0.5 for entry in found["top"])


def test_self_time_leaves_out_what_runs_inside():
    event = bench_profile.Event
    events = [event("loop", 0, 100), event("dot", 10, 30), event("dot", 50, 20), event("copy", 55, 5)]
    events.append(event("loop", 200, 10))
    assert bench_profile.self_times(events) == {"loop": (60, 2), "dot": (45, 2), "copy": (5, 1)}
    assert bench_profile.kernel_name("fusion.12") == "fusion" and bench_profile.kernel_name("a_3") == "a_3"
    top = bench_profile.top_operations({"x": (3e6, 4), "y": (1e6, 2), "z": (0.0, 1)}, steps=2, top=2)
    assert top[0] == {"name": "x", "ms_per_step": 1.5, "calls_per_step": 2.0, "share": 0.75}
    assert [entry["name"] for entry in top] == ["x", "y"]


def test_profile_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="the profiler wrote no trace"):
        bench_profile.read_trace(tmp_path)
