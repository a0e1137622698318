"""bench_paired at smoke size, and its PyTorch peer against the library's student."""

import json

import numpy as np
import paired_setup as setup
import pytest

from benchmarks import bench_paired, common


def arguments(*given):
    parser = common.parser("bench_paired", "")
    for flag in ("--memory", "--execute"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(["--smoke", *given])


@pytest.mark.bench
def test_smoke_measures_every_side_and_task(tmp_path):
    record = bench_paired.run(bench_paired.SMOKE, arguments("--out", str(tmp_path / "x.json")))
    common.check_record(json.loads((tmp_path / "x.json").read_text()))
    names = set(record["metrics"])
    sides = [side for side in bench_paired.SMOKE["sides"] if side not in record["derived"].get("not_measured", {})]
    assert names == {f"{side}[{task}, 16 px, batch 2]" for side in sides for task in bench_paired.TASKS}
    assert all(found["median"] > 0 for found in record["metrics"].values())


@pytest.mark.bench
def test_memory_of_a_step_is_reported_and_one_is_executed(tmp_path):
    config = {**bench_paired.SMOKE, "batches": [2]}
    record = bench_paired.run(config, arguments("--memory", "--execute", "--out", str(tmp_path / "x.json")))
    facts = record["derived"]["first stage, 16 px, batch 2"]
    assert facts["executed"] and facts["temporaries_gib"] > 0


def test_one_image_cannot_be_trained_on():
    assert bench_paired.measure_cell(bench_paired.SMOKE, bench_paired.TRAIN, 16, 1) == ({}, {})


def test_the_student_is_compared_with_the_better_peer():
    values = {"student": [4.0, 6.0], "torch_eager": [1.0, 1.0], "torch_compiled": [2.0, 2.0]}
    found = bench_paired.compare(values, 1024, 16)
    assert found == {"better_peer": "torch_compiled", "student_over_peer": 2.5, "meets_target": True}
    assert "meets_target" not in bench_paired.compare(values, 256, 16)
    assert bench_paired.compare({"teacher": [1.0]}, 1024, 16) == {}


@pytest.mark.torch
@pytest.mark.parametrize("train", [False, True])
def test_the_peer_is_the_same_network(train):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_paired

    state, tile = setup.tiny_state("student"), setup.tile(21, 3)
    net = torch_paired.StudentPeer(setup.TINY).double().train(train)
    net.load(state)
    logits, maps, f3 = net(torch.tensor(tile))
    variables = setup.variables(state, "student", dtype=np.float32)
    network, x = setup.NETWORKS["student"](setup.TINY), setup.last(tile).astype(np.float32)
    found = setup.training(network, variables, x)[0] if train else setup.once(network.apply, variables, x)
    tolerance = 5e-3 if train else 1e-4
    np.testing.assert_allclose(found["logits"], logits.detach(), atol=tolerance)
    np.testing.assert_allclose(found["f3"], f3.detach(), atol=10 * tolerance)
    for i, theirs in enumerate(maps):
        np.testing.assert_allclose(found[f"map_a{i}"], theirs.detach()[:, 0], atol=10 * tolerance)
