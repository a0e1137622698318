"""Arithmetic of the scaling model: limits that must hold whatever the parameters are."""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import common, flops, peaks, scaling_model  # noqa: E402
from benchmarks.scaling_model import Assumptions, Traffic  # noqa: E402

W, H200 = flops.Widths(), peaks.lookup("NVIDIA H200")
BASE = dict(slides=16, patches=160_000.0, resident=True)
SILENT = Traffic(0, 0)


def predict(devices, traffic=SILENT, method="student", peak=H200, **changes):
    assume = changes.pop("assume", Assumptions(local_slots=True))
    return scaling_model.predict(W, method, peak, traffic, devices=devices, assume=assume, **{**BASE, **changes})


def test_without_communication_weak_scaling_is_perfect():
    for devices in (8, 64, 1024):
        assert predict(1).total / predict(devices).total == 1.0
        assert predict(devices).communication == 0.0


def test_efficiency_falls_with_traffic_and_devices_but_stays_in_bounds():
    traffic = Traffic(22e6, 3000)
    times = [predict(n, traffic).total for n in (1, 2, 8, 64, 1024)]
    assert times == sorted(times) and times[0] == predict(1).total
    assert all(0 < times[0] / t <= 1 for t in times)
    assert predict(64, Traffic(44e6, 3000)).total > predict(64, traffic).total


def test_step_time_follows_from_peak_and_work():
    step, assume = predict(1), Assumptions()
    # The analytic count holds one slot per patch; the pool compares with all 16.
    products = flops.step_flops(W, "student", 160_000, 16) + 160_000 * 3 * 2 * W.width * 15
    work = products / (989.4e12 * assume.compute_efficiency)
    assert step.compute == pytest.approx(work, rel=1e-9) and step.limit == "compute" and step.total == step.compute
    slow = predict(1, peak=dataclasses.replace(H200, hbm_gb_s=10.0))
    assert slow.limit == "memory" and slow.total == slow.memory > step.total
    moved = flops.step_bytes(W, "student", 160_000, 16, 2)
    assert slow.memory == pytest.approx(moved / (10e9 * assume.memory_efficiency))


def test_streaming_is_bound_by_the_host_link():
    streamed = predict(1, resident=False)
    assert streamed.limit == "feed" and streamed.feed == pytest.approx(160_000 * 2048 / (64e9 * 0.8))
    assert predict(1).feed == 0.0
    unknown = predict(1, resident=False, peak=peaks.lookup("TPU v5p"))
    assert unknown.feed == pytest.approx(160_000 * 2048 / (Assumptions().pcie_gb_s * 1e9 * 0.8))


def test_one_hot_over_all_slots_costs_more_with_every_device():
    everything = Assumptions(local_slots=False)
    assert predict(1, assume=everything).compute == predict(1).compute
    more = predict(64, assume=everything).compute - predict(64).compute
    extra = 160_000 * 3 * 2 * W.width * 16 * 63
    assert more == pytest.approx(extra / (989.4e12 * everything.compute_efficiency))


def test_ring_all_reduce_inside_and_between_link_domains():
    quick = Assumptions(latency_us=0.0, link_efficiency=1.0)
    assert scaling_model.all_reduce_seconds(1e9, 1, H200, quick) == 0.0
    assert scaling_model.all_reduce_seconds(0, 8, H200, quick) == 0.0
    inside = scaling_model.all_reduce_seconds(1e9, 8, H200, quick)
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / 450e9)
    between = scaling_model.all_reduce_seconds(1e9, 64, H200, quick) - inside
    assert between == pytest.approx(2 * 7 / 8 * (1e9 / 8) / 50e9)
    # Bandwidth terms have a limit; only latency grows without end.
    assert scaling_model.all_reduce_seconds(1e9, 10**6, H200, quick) < inside + 2 * (1e9 / 8) / 50e9
    assert scaling_model.all_reduce_seconds(1e9, 8, H200, Assumptions(link_efficiency=1.0)) > inside


def test_traffic_is_the_line_through_two_programs():
    traffic = scaling_model.fit_traffic({16: 1000.0, 32: 1160.0})
    assert traffic == Traffic(840.0, 10.0) and traffic.bytes(64) == 1480.0
    with pytest.raises(ValueError, match="exactly two"):
        scaling_model.fit_traffic({16: 1.0})
    with pytest.raises(ValueError, match="fall from 1160"):
        scaling_model.fit_traffic({16: 1160.0, 32: 1000.0})


def test_cohorts_fit_where_their_bytes_do():
    # 11,000 x 10,000 x 1,024 x 2 bytes = 225 GB: 28 GB on each of 8.
    assert scaling_model.fits(11_000, 10_000, 1024, 8, H200)
    assert not scaling_model.fits(11_000, 10_000, 1024, 1, H200)
    assert not scaling_model.fits(1_000_000, 10_000, 1024, 64, H200)
    assert scaling_model.fits(1_000_000, 10_000, 1024, 1024, H200)


def test_table_marks_unusable_layouts_and_never_claims_a_check():
    rows = scaling_model.table(W, scaling_model.CONFIG, H200, Traffic(22e6, 3000), Assumptions())
    assert {(row["cohort"], row["accelerators"]) for row in rows} == {
        (cohort, n) for cohort in ("TCGA", "million") for n in (8, 64, 1024)
    }
    assert all(row["checked"] == "unchecked" and 0 < row["weak_scaling_efficiency"] <= 1 for row in rows)
    unusable = [row for row in rows if not row["usable"]]
    assert [(row["cohort"], row["slides_per_step"]) for row in unusable] == [("TCGA", 16 * 1024)]
    replicas = [row for row in rows if row["layout"] == "replicas"]
    assert all(row["trainings"] * 8 == row["accelerators"] for row in replicas)
    for row in rows:
        steps = math.ceil(scaling_model.COHORTS[row["cohort"]] / row["slides_per_step"])
        assert row["epoch_s"] == pytest.approx(steps * row["step_ms"] / 1e3)
    text = scaling_model.markdown(rows)
    assert text.count("\n") == len(rows) + 1 and "more slides than the cohort" in text


def test_the_check_compares_with_measured_steps_of_the_same_device_only():
    record = {
        "benchmark": "bench_step",
        "device_kind": "NVIDIA H200",
        "config": {"feat_dim": 1024, "model_d": 256, "model_attn": 128, "genes": 8192, "token_size": 512},
        "metrics": {"student_bfloat16_input[median 1000]": common.metric([5e7], "valid patches/s")},
        "derived": {"median 1000": {"valid_patches_per_step": 20_000.0, "plan": {"slots": 16}}},
    }
    found = scaling_model.check([record], W, H200, Assumptions())
    point = found["patches_per_s"]["student, median 1000"]
    assert point["measured_over_predicted"] == pytest.approx(5e7 / point["predicted"])
    assert found["status"].startswith("one accelerator checked")
    for other in ({"device_kind": "NVIDIA L4"}, {"device_kind": "cpu"}, {"benchmark": "bench_e2e"}):
        assert scaling_model.check([{**record, **other}], W, H200, Assumptions())["status"] == "unchecked"


def test_scaling_model_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_model, "compiled_points", lambda config: {4: 1000.0, 8: 1400.0})
    args = argparse.Namespace(device="NVIDIA H200", out=tmp_path / "scaling_model.json", smoke=True, results=tmp_path)
    scaling_model.run(scaling_model.SMOKE, args)
    record = json.loads((tmp_path / "scaling_model.json").read_text())
    common.check_record(record)
    assert record["derived"]["check"]["status"] == "unchecked" and record["derived"]["traffic"]["per_slot"] == 100.0
    assert "| TCGA | 8 | one training |" in capsys.readouterr().out
    with pytest.raises(peaks.UnknownDeviceError):
        scaling_model.run(scaling_model.SMOKE, argparse.Namespace(**{**vars(args), "device": "NVIDIA X"}))


def test_bytes_come_from_compiled_programs():
    points = scaling_model.compiled_points(scaling_model.SMOKE, devices=2)
    assert set(points) == {4, 8}
    traffic = scaling_model.fit_traffic(points)
    # Gradients of the bag network at least; per slot the softmax state of one network.
    assert traffic.fixed > 4 * 32 * 16 and 4 * 16 <= traffic.per_slot <= 4 * (16 + 4)
