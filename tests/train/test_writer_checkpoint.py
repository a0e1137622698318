"""Metrics on disk, and checkpoints: what is kept, what is refused, what an interruption may leave."""

import json
import math
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import StorageError
from histokd_jax.train import cache
from histokd_jax.train.checkpoint import (
    CheckpointMismatchError,
    RunCheckpoints,
    export_groups,
    load_groups,
    params_hash,
)
from histokd_jax.train.stopping import Stopper
from histokd_jax.train.writer import MetricWriter

IDENTITY = {"method": "mkd", "config": "c" * 64, "input": "i" * 64}


def lines(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def write(directory, steps, upto=-1):
    with MetricWriter(directory, upto) as writer:
        for step in steps:
            writer.write(step, {"epoch": step, "split": "train"}, {"loss": 1.0 / (step + 1)})


def test_one_line_per_write_with_facts_and_metrics(tmp_path):
    with MetricWriter(tmp_path / "fold_0") as writer:
        writer.write(4, {"epoch": 0, "split": "val", "stage": "online"}, {"auroc": np.float32(0.75), "loss": math.nan})
    assert lines(tmp_path / "fold_0") == [
        {"step": 4, "epoch": 0, "split": "val", "stage": "online", "auroc": 0.75, "loss": None}
    ]


def test_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path, [0, 1])
    write(tmp_path, [0])
    assert [line["step"] for line in lines(tmp_path)] == [0]


def test_resumed_run_drops_lines_after_its_checkpoint(tmp_path):
    write(tmp_path, [0, 1, 2, 3])
    write(tmp_path, [2], upto=1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_line_cut_short_by_a_killed_run_is_dropped(tmp_path):
    write(tmp_path, [0, 1])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "epo')
    write(tmp_path, [2], upto=1)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]


def test_metrics_below_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writable"):
        MetricWriter(tmp_path / "file" / "fold_0")


def event_payloads(path):
    """The records of a TFRecord file: length (8 bytes), its checksum (4), payload, its checksum (4)."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (size,) = struct.unpack("<Q", content[at : at + 8])
        yield content[at + 12 : at + 12 + size]
        at += 16 + size
    assert at == len(content)


def test_event_files_hold_every_finite_metric_and_need_no_tensorflow(tmp_path):
    code = (
        "import pathlib, sys; from histokd_jax.train.writer import MetricWriter\n"
        f"with MetricWriter(pathlib.Path({str(tmp_path)!r})) as w:\n"
        "  w.write(3, {'split': 'val'}, {'auroc': 0.75, 'loss': float('nan')})\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
    (file,) = (tmp_path / "tensorboard").iterdir()
    payload = b"".join(event_payloads(file))
    assert b"val/auroc" in payload and struct.pack("<f", 0.75) in payload
    assert b"val/loss" not in payload


def state(value):
    return {"w": jnp.full((3, 2), value, jnp.float32), "step": jnp.int32(value), "key": jax.random.key(int(value))}


def test_newest_state_and_progress_come_back(tmp_path):
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        assert saved.progress() is None
        for step in (1, 2):
            saved.save(step, state(step), {"epoch": step, "stopper": {"best": 0.5}})
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        assert saved.progress() == {"epoch": 2, "stopper": {"best": 0.5}}
        restored = saved.restore(state(0))
    want = state(2)
    np.testing.assert_array_equal(restored["w"], want["w"])
    assert restored["w"].dtype == jnp.float32 and int(restored["step"]) == 2
    np.testing.assert_array_equal(jax.random.bits(restored["key"]), jax.random.bits(want["key"]))


def test_only_the_newest_are_kept_and_a_step_can_be_saved_again(tmp_path):
    with RunCheckpoints(tmp_path, IDENTITY, keep=2) as saved:
        for step in (1, 2, 3, 3):
            saved.save(step, state(step), {"epoch": step})
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 3]


def test_what_an_interrupted_save_left_is_ignored(tmp_path):
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        saved.save(1, state(1), {"epoch": 1})
    names = {p.name for p in tmp_path.iterdir()}
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        assert saved.progress() == {"epoch": 1}
        assert float(saved.restore(state(0))["w"][0, 0]) == 1
    assert {p.name for p in tmp_path.iterdir()} == names


@pytest.mark.parametrize("key", IDENTITY)
def test_checkpoint_of_another_run_is_refused_by_name(tmp_path, key):
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        saved.save(1, state(1), {})
    with RunCheckpoints(tmp_path, {**IDENTITY, key: "other"}) as saved:
        with pytest.raises(CheckpointMismatchError, match=f"another {key} .*other now.*--workdir"):
            saved.progress()


def test_checkpoint_with_other_leaves_is_refused(tmp_path):
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        saved.save(1, {"w": jnp.ones(3)}, {})
        with pytest.raises(CheckpointMismatchError, match="does not fit"):
            saved.restore({"v": jnp.ones(3)})


def test_checkpoint_with_another_shape_is_refused(tmp_path):
    """The library would pad or cut the array silently."""
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        saved.save(1, {"w": jnp.ones((3, 2))}, {})
        with pytest.raises(CheckpointMismatchError, match="does not fit"):
            saved.restore({"w": jnp.ones((4, 2))})


def test_checkpoint_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writable"):
        RunCheckpoints(tmp_path / "file" / "checkpoints", IDENTITY)


def params():
    return {"S_P": {"dense": {"w": jnp.arange(6.0).reshape(3, 2)}}, "T_G": {"w": jnp.ones(2)}}


def abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_groups_are_loaded_one_by_one(tmp_path):
    export_groups(tmp_path, params())
    found = load_groups(tmp_path, abstract(params()), ["S_P"])
    assert list(found) == ["S_P"]
    np.testing.assert_array_equal(found["S_P"]["dense"]["w"], params()["S_P"]["dense"]["w"])


def test_exporting_again_replaces_the_model(tmp_path):
    export_groups(tmp_path, params())
    export_groups(tmp_path, jax.tree.map(lambda p: p + 1, params()))
    assert float(load_groups(tmp_path, abstract(params()), ["T_G"])["T_G"]["w"][0]) == 2


def test_absent_group_is_named(tmp_path):
    export_groups(tmp_path, {"S_P": params()["S_P"]})
    with pytest.raises(CheckpointMismatchError, match="no parameters 'T_G'"):
        load_groups(tmp_path, abstract(params()), ["T_G"])


@pytest.mark.parametrize(
    "like", [{"dense": {"w": jnp.zeros((3, 3))}}, {"dense": {"v": jnp.zeros((3, 2))}}, {"w": jnp.zeros((3, 2))}]
)
def test_group_with_other_leaves_or_shapes_is_refused(tmp_path, like):
    export_groups(tmp_path, params())
    with pytest.raises(CheckpointMismatchError, match="other parameters"):
        load_groups(tmp_path, {"S_P": like}, ["S_P"])


def test_hash_sees_names_shapes_types_and_values():
    one = {"w": np.arange(6, dtype=np.float32).reshape(3, 2)}
    others = [{"v": one["w"]}, {"w": one["w"].reshape(2, 3)}, {"w": one["w"].astype(np.float64)}, {"w": one["w"] + 1}]
    hashes = [params_hash(tree) for tree in (one, *others)]
    assert len(set(hashes)) == 5
    assert params_hash({"w": jnp.asarray(one["w"])}) == hashes[0]


def test_stopper_survives_a_checkpoint(tmp_path):
    from histokd_jax.train.loop import Progress

    progress = Progress(stage=1, step=12, epoch=3, stopper=Stopper(0.8, 2, 1))
    with RunCheckpoints(tmp_path, IDENTITY) as saved:
        saved.save(12, state(1), progress.to_json())
        assert Progress.from_json(saved.progress()) == progress


def test_compilation_cache_is_private_and_chosen_by_the_environment(tmp_path, monkeypatch):
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    try:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a"))
        assert cache.enable() == tmp_path / "a"
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
        assert cache.enable() == tmp_path / "b" / "histokd_jax"
        assert (tmp_path / "b" / "histokd_jax").stat().st_mode & 0o077 == 0, "others may not write code into it"
        assert cache.enable(tmp_path / "c") == tmp_path / "c"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
