"""The cohort in device memory: the batches and the runs of streaming, bit for bit; budgets; several devices."""

import json
import re
import shutil
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_run import assert_same_run, curve, interrupt

from data_pipelines import schema
from histokd_jax.methods import registry
from histokd_jax.ops import gather
from histokd_jax.train import experiment, feed, loop, resident, run, sharding, step
from histokd_jax.train.checkpoint import CheckpointMismatchError

COLLECTIVES = re.compile(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast")


def build(tiny_config, **changes):
    cfg = experiment.resolve_width(tiny_config(**changes))
    exp = experiment.load_experiment(cfg)
    method = registry.get_method("mkd")(cfg, exp.data_spec(("genes",)))
    return method, experiment.fold_data(exp, 0, method)


def sources(data):
    return [data.train, *data.evaluation.values()]


def resident_feeder(data, devices=1, dtype="stored", cache=None):
    plan = resident.ResidentPlan(sharding.make_mesh(devices), sources(data), dtype)
    return feed.ResidentFeeder(plan, threads=2, cache=cache)


def host(fed):
    """A step as NumPy; copied, because the memory of a batch is used again."""
    return {name: np.array(value) for name, value in fed.batch.items()}, fed.patches, fed.slide_index


def assert_same_steps(first, second, compare=np.testing.assert_array_equal):
    seen = 0
    for a, b in zip(map(host, first), map(host, second), strict=True):
        assert a[0].keys() == b[0].keys() and a[1] == b[1]
        np.testing.assert_array_equal(a[2], b[2])
        for name, value in a[0].items():
            assert value.dtype == b[0][name].dtype and value.shape == b[0][name].shape
            compare(value, b[0][name])
        seen += 1
    assert seen


@pytest.mark.parametrize(
    "changes",
    [{}, {"data__max_patches_train": 10}, {"train__batching": "grad_cache"}, {"data__grouping": "random"}],
    ids=lambda changes: next(iter(changes), "default"),
)
def test_steps_are_those_of_streaming_bit_for_bit(tiny_config, changes):
    _, data = build(tiny_config, **changes)
    stream, memory = feed.StreamFeeder(sharding.make_mesh(1), 2), resident_feeder(data)
    assert memory.identity == {} == stream.identity
    assert_same_steps(stream.train(data.train), memory.train(data.train))
    assert_same_steps(stream.train(data.train, 5), memory.train(data.train, 5))
    for source in data.evaluation.values():
        assert_same_steps(stream.evaluate(source), memory.evaluate(source))


def test_shapes_are_known_without_reading_and_true(tiny_config, monkeypatch):
    _, data = build(tiny_config, mesh__data=2)
    feeders = [feed.StreamFeeder(sharding.make_mesh(2), 0), resident_feeder(data, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(type(data.train.reader), "read_into", lambda *_: pytest.fail("read a patch"))
        shapes = [feeder.shapes(data.train) for feeder in feeders]
    for feeder, expected in zip(feeders, shapes):
        batch = next(feeder.train(data.train)).batch
        assert batch.keys() == expected.keys()
        for name, value in batch.items():
            like = expected[name]
            assert (value.shape, value.dtype) == (like.shape, like.dtype)
            assert value.sharding.is_equivalent_to(like.sharding, value.ndim), name


@pytest.fixture(scope="module")
def runs(cohort_dir, tmp_path_factory):
    """One fold, trained from disk and from memory; read only."""
    out = {}
    for mode in ("off", "on"):
        out[mode] = tmp_path_factory.mktemp("runs") / mode
        run.train(tiny.config.load(tiny.CONFIG, tiny.overrides(cohort_dir, data__resident=mode)), out[mode])
    return out


def test_whole_runs_are_equal_bit_for_bit(runs):
    assert_same_run(runs["off"], runs["on"])


def test_a_step_sends_indices_only_and_the_bytes_are_recorded(runs, tiny_config):
    sent = {}
    for mode, path in runs.items():
        lines = [json.loads(line) for line in (path / "fold_0" / "metrics.jsonl").read_text().splitlines()]
        sent[mode] = {line["host_bytes_per_step"] for line in lines if line["split"] == "train"}
    _, data = build(tiny_config)
    plan, fields = data.train.plan, data.train.table.fields.values()
    slot_bytes = 8 + sum(values.nbytes // len(values) for values in fields)
    assert sent["off"] == {data.train.step_bytes(plan.rows) + plan.num_slots * slot_bytes}
    assert sent["on"] == {12 * plan.num_slots}


def test_the_run_manifest_tells_where_batches_came_from(runs):
    off, on = (json.loads((runs[mode] / "run_manifest.json").read_text())["input"] for mode in ("off", "on"))
    assert off == {"resident": False, "reason": "data.resident=off"}
    assert on["resident"] is True and on["dtype"] == "stored"
    assert 0 < on["estimate"]["cohort_bytes"] < on["estimate"]["total_bytes"] <= on["estimate"]["budget_bytes"]


@pytest.mark.parametrize("modes", [("off", "on"), ("on", "off")], ids=["to memory", "to disk"])
def test_a_run_may_be_continued_in_the_other_mode(runs, tiny_config, tmp_path, monkeypatch, modes):
    interrupt(tiny_config(data__resident=modes[0]), tmp_path, monkeypatch, steps=7)
    run.train(tiny_config(data__resident=modes[1], data__resident_gib=1.0), tmp_path)
    assert_same_run(runs["off"], tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["resident"] == modes[1]


def test_a_finished_run_loads_nothing(runs, tiny_config, tmp_path, monkeypatch):
    path = shutil.copytree(runs["off"], tmp_path / "run")
    monkeypatch.setattr(resident, "load", lambda *_: pytest.fail("loaded the cohort"))
    run.train(tiny_config(data__resident="on"), path)


def test_int8_reports_its_error_and_is_another_run(tiny_config, tmp_path, monkeypatch, capsys):
    cfg = tiny_config(data__resident="on", data__resident_dtype="int8", train__max_epochs=1)
    interrupt(cfg, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "run_manifest.json").read_text())["input"]
    error = facts["quantisation_error"]
    assert 0 < error["mean_relative_error"] < error["max_relative_error"] < 0.02 and error["patches"] > 500
    assert f"{100 * error['mean_relative_error']:.3f} % on average" in said
    with pytest.raises(CheckpointMismatchError, match="precision of the patches"):
        run.train(tiny_config(data__resident="off", train__max_epochs=1), tmp_path)
    summary = run.train(cfg, tmp_path)
    assert np.isfinite(summary["modes"]["pathology"]["metrics"]["auroc"]["mean"])


def test_int8_batches_are_near_and_take_half_the_memory(tiny_config):
    _, data = build(tiny_config)
    mesh = sharding.make_mesh(1)
    small, whole = (resident.ResidentPlan(mesh, sources(data), d).estimate(None) for d in ("int8", "stored"))
    assert small.cohort_bytes / whole.cohort_bytes == (12 + 4) / 24, "12 values of 1 byte and a scale, against 2 bytes"

    def near(a, b):
        if a.dtype == np.float16:
            length = np.linalg.norm(a.astype(np.float32), axis=-1)
            lost = np.linalg.norm(a.astype(np.float32) - b.astype(np.float32), axis=-1)
            assert (lost <= 0.02 * length).all() and lost.max() > 0
        else:
            np.testing.assert_array_equal(a, b)

    stream = feed.StreamFeeder(mesh, 2)
    assert_same_steps(stream.train(data.train), resident_feeder(data, dtype="int8").train(data.train), near)


def test_auto_falls_back_with_the_reason_told_and_recorded(tiny_config, tmp_path, capsys, monkeypatch):
    class TrainingBegins(Exception):
        pass

    monkeypatch.setattr(loop, "fit", mock.Mock(side_effect=TrainingBegins))
    with pytest.raises(TrainingBegins):
        run.train(tiny_config(data__resident="auto", data__resident_gib=1e-6), tmp_path)
    said = capsys.readouterr().out
    facts = json.loads((tmp_path / "run_manifest.json").read_text())["input"]
    assert facts["resident"] is False and "on each device, 0.000 GiB are allowed" in facts["reason"]
    assert facts["estimate"]["total_bytes"] > facts["estimate"]["budget_bytes"] == 1073
    assert "resident cohort, estimate: 40 slides with" in said and facts["reason"] in said


def test_on_that_does_not_fit_is_refused_with_the_estimate(tiny_config, tmp_path):
    with pytest.raises(resident.CohortMemoryError, match=r"40 slides with \d+ patches.*cohort.*resident_dtype=int8"):
        run.train(tiny_config(data__resident="on", data__resident_gib=1e-6), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__resident": "yes"}, "data.resident='yes': expected one of off, auto, on"),
        ({"data__resident": "auto", "data__resident_dtype": "fp8"}, "resident_dtype='fp8': expected one of stored"),
        ({"data__resident": "auto", "data__resident_gib": -1.0}, "resident_gib=-1.0: expected GiB"),
        ({"data__resident": "on", "mesh__data": 2, "train__batching": "grad_cache"}, "train.batching=packed"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
def test_bad_settings_are_refused(tiny_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run.train(tiny_config(**changes), tmp_path)


def test_auto_reads_from_disk_where_rows_cannot_be_dealt_out(tiny_config):
    cfg = tiny_config(data__resident="auto", mesh__data=2, train__batching="grad_cache")
    _, data = build(tiny_config, mesh__data=2, train__batching="grad_cache")
    feeder = feed.make_feeder(cfg, sharding.make_mesh(2), sources(data))
    assert isinstance(feeder, feed.StreamFeeder) and "train.batching=packed" in feeder.report()["reason"]


def test_memory_that_runs_out_while_loading_names_the_estimate(tiny_config, monkeypatch):
    _, data = build(tiny_config)

    def no_room(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(resident, "_load_shares", no_room)
    with pytest.raises(resident.CohortMemoryError, match=r"ran out of memory.*40 slides.*data\.resident_gib"):
        resident_feeder(data).train(data.train)


def fake_mesh(stats, platform="gpu"):
    devices = [types.SimpleNamespace(platform=platform, process_index=0, memory_stats=lambda s=s: s) for s in stats]
    return types.SimpleNamespace(devices=np.array(devices))


def test_budget_comes_from_the_fullest_device_the_ram_or_the_setting(tmp_path, monkeypatch):
    stats = [{"bytes_limit": 100, "bytes_in_use": used} for used in (10, 50)]
    assert resident.budget(fake_mesh(stats), 0.0) == 40
    assert resident.budget(fake_mesh(stats), 2.0) == 2 * 2**30
    assert resident.budget(fake_mesh([None, stats[0]]), 0.0) is None
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  900 kB\nMemAvailable:  500 kB\n")
    monkeypatch.setattr(resident.free_ram, "__defaults__", (meminfo,))
    assert resident.budget(fake_mesh([None] * 2, "cpu"), 0.0) == int(0.8 * 500 * 1024 / 2), "devices share the RAM"
    meminfo.write_text("")
    with pytest.raises(resident.CohortMemoryError, match="data.resident_gib"):
        resident.free_ram()


def test_a_device_without_statistics_needs_a_budget(tiny_config):
    _, data = build(tiny_config)
    estimate = resident.ResidentPlan(sharding.make_mesh(1), sources(data)).estimate(None)
    assert "set data.resident_gib" in estimate.obstacle and "budget unknown" in str(estimate)


def test_loading_in_many_blocks_is_exact_and_reuses_its_buffers(tiny_config, monkeypatch):
    _, data = build(tiny_config)
    pools = []

    class Pool(resident.BufferPool):
        def __init__(self, *args):
            super().__init__(*args)
            pools.append(self)

    monkeypatch.setattr(resident, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(resident, "BufferPool", Pool)
    feeder = resident_feeder(data)
    number, rows = feeder._plan.blocks
    assert number > 20 and rows * 24 <= 1024 + 24
    assert_same_steps(feed.StreamFeeder(sharding.make_mesh(1), 2).train(data.train), feeder.train(data.train))
    assert len(pools) == 1 and len(pools[0]._free) <= 4, "two threads, one block under way and one waiting"


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8])
def test_filling_makes_no_second_copy_of_the_cohort(dtype):
    rows, dim, block = 4096, 64, 128
    scale = jax.ShapeDtypeStruct((rows,), jnp.float32) if dtype == jnp.int8 else None
    share = gather.Cohort(jax.ShapeDtypeStruct((rows, dim), dtype), scale)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(share))
    part, at = jax.ShapeDtypeStruct((block, dim), jnp.float16), jax.ShapeDtypeStruct((), jnp.int32)
    memory = resident._fill.lower(share, part, at).compile().memory_analysis()
    assert memory.alias_size_in_bytes == nbytes and memory.temp_size_in_bytes <= 8 * block * dim


def test_the_loop_makes_no_implicit_transfer(tiny_config, tmp_path, monkeypatch):
    """Steps of a real run under a guard that forbids every transfer that nobody asked for by name."""
    original, steps, load, loads = loop._StageRunner._epoch_steps, [], resident.load, []

    def guarded(self, state, progress, batches, bar):
        with jax.transfer_guard("disallow"):
            out = original(self, state, progress, batches, bar)
        steps.append(out[1].step)
        return out

    monkeypatch.setattr(loop._StageRunner, "_epoch_steps", guarded)
    monkeypatch.setattr(resident, "load", lambda *args: loads.append(1) or load(*args))
    run.train(tiny_config(data__resident="on", train__max_epochs=1, compare__control=True), tmp_path)
    assert len(steps) == 2, "one epoch of each arm"
    assert len(loads) == 1, "both arms share one cohort"
    with pytest.raises(Exception, match="transfer"), jax.transfer_guard("disallow"):
        jnp.sin(np.ones(3))


def gather_program(data, devices):
    """(compiled gather of a training step, bytes of the patches of a step)."""
    feeder = resident_feeder(data, devices)
    plan = feeder._plan
    cohort, tables = resident.load(plan, 1), resident.slot_tables(plan.mesh, plan.layout, data.train)
    index = sharding.put_replicated(plan.mesh, np.zeros((3, data.train.plan.num_slots), np.int32))
    like = feeder.shapes(data.train)[schema.PATCHES]
    lowered = feeder._program(data.train).lower(like, cohort, tables, index)
    return lowered.compile(), int(np.prod(like.shape)) * like.dtype.itemsize


@pytest.mark.parametrize("devices", [1, 4])
def test_rows_are_gathered_in_place_without_a_collective(tiny_config, devices):
    _, data = build(tiny_config, mesh__data=devices)
    compiled, patches = gather_program(data, devices)
    assert not COLLECTIVES.search(compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= patches // devices, "the new rows take the memory of the old ones"


def test_several_devices_hold_a_share_each_and_give_the_same_gradient(tiny_config):
    devices = 4
    method, data = build(tiny_config, mesh__data=devices, data__max_patches_train=10)
    feeder = resident_feeder(data, devices)
    assert "dealt out" in "".join(feeder.identity.values())
    params, _ = jax.jit(method.init)(jax.random.key(0))
    key, number = jax.random.key(1), jnp.zeros((), jnp.int32)
    compute = jax.jit(lambda p, b: step.loss_and_gradients(method, "online", p, {}, b, key, number))

    def gradients(mesh, fed):
        with jax.set_mesh(mesh):
            out = compute(jax.device_put(params, sharding.replicated(mesh)), fed.batch)
        return jax.device_get((out[0], out[3]))

    one = sharding.make_mesh(1)
    stream, memory = feed.StreamFeeder(one, 2).train(data.train), feeder.train(data.train)
    for _ in range(2):
        whole, shared = next(stream), next(memory)
        assert whole.patches == shared.patches
        (loss, grads), (other_loss, other) = gradients(one, whole), gradients(feeder._plan.mesh, shared)
        np.testing.assert_allclose(loss, other_loss, rtol=1e-5)
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6 * scale)
    cohort = feeder._cache.get(feeder._plan, 1).patches
    shares = {shard.device: shard.data.nbytes for shard in cohort.addressable_shards}
    assert len(shares) == devices and set(shares.values()) == {cohort.nbytes // devices}
    assert cohort.nbytes < 1.1 * feeder._plan.layout.patches * 24 + devices * 40 * 24


def test_a_run_on_several_devices_reaches_the_metrics_of_one(runs, tiny_config, tmp_path):
    run.train(tiny_config(data__resident="on", mesh__data=4), tmp_path)
    for a, b in zip(curve(runs["off"]), curve(tmp_path), strict=True):
        assert a["step"] == b["step"]
        if "loss" in a:
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


def test_training_plans_are_no_evaluation_and_positions_must_be_planned(tiny_config):
    _, data = build(tiny_config)
    feeder = resident_feeder(data)
    with pytest.raises(ValueError, match="plan_evaluation"):
        feeder.evaluate(data.train)
    with pytest.raises(ValueError, match="max_epochs"):
        feeder.train(data.train, data.train.num_steps + 1)
