"""The Grain pipeline: exact batches, determinism, resume, process sharding, and refusals."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.packing import PlanOptions, plan_coupled, plan_evaluation
from data_pipelines.pipeline import (
    BatchAssembler,
    SlideTable,
    StepIterator,
    StepSource,
    check_fingerprint,
    make_eval_dataset,
    make_train_dataset,
    read_options,
    rows_of_process,
)
from data_pipelines.reader import BagReader
from data_pipelines.writer import DatasetWriter

ROOT = pathlib.Path(__file__).parents[2]
FEAT_DIM, CHUNK = 6, 8


@dataclasses.dataclass(frozen=True)
class FakeManifest:
    sizes: np.ndarray
    feat_dim: int = FEAT_DIM
    name: str = "a"

    def fingerprint(self):
        return self.name


class FakeReader:
    """Patch p of slide s has the feature s + p / 1024 (exact in float16) in every column, coordinates (s, p)."""

    def __init__(self, sizes):
        self.manifest = FakeManifest(np.asarray(sizes))
        self.requests = []

    def read_into(self, slide, start, count, out, coords_out=None):
        self.requests.append((slide, start, count))
        assert out.shape == (count, FEAT_DIM) and 0 <= start < self.manifest.sizes[slide]
        patch = (start + np.arange(count)) % self.manifest.sizes[slide]
        out[:] = (slide + patch / 1024)[:, None]
        if coords_out is not None:
            coords_out[:] = np.stack([np.full(count, slide), patch], axis=1)


def _source(
    batching="packed", rows=4, max_patches=None, with_coords=False, epochs=3, dtype="float16", evaluation=False
):
    """23 of 30 manifest slides in shuffled order, so that planner index, manifest row and label all differ."""
    rng = np.random.default_rng(0)
    manifest_sizes = rng.integers(3, 60, 30)
    index = rng.permutation(30)[:23]
    sizes = manifest_sizes[index]
    fields = {
        "label": index % 2,
        "genes": np.stack([index, -index], axis=1) + 0.5,
        "has_genes": index % 3 != 0,
    }
    if evaluation:
        plan = plan_evaluation(sizes, target_capacity=160, rows=rows, multiple_of=8)
    else:
        options = PlanOptions(epochs, seed=1, rows=rows, multiple_of=8, max_patches=max_patches, chunk_patches=CHUNK)
        plan = plan_coupled(sizes, index % 2, options, slides_per_step=4, batching=batching)
    return StepSource(FakeReader(manifest_sizes), SlideTable(index, fields), plan, dtype, with_coords)


def _reference_batch(source, step):
    """The batch written from the contract, one patch at a time."""
    plan, table = source.plan, source.table
    flat = {
        "patches": np.zeros((plan.capacity, FEAT_DIM), source.dtype),
        "segment_ids": np.zeros(plan.capacity, np.int32),
        "positions": np.zeros(plan.capacity, np.int32),
    }
    cursor = 0
    for slot, item in enumerate(step.slide):
        if plan.batching == "padded":
            cursor = slot * plan.row_patches
        for i in range(step.count[slot]):
            patch = (step.start[slot] + i) % plan.sizes[item]
            flat["patches"][cursor] = table.slide_index[item] + patch / 1024
            flat["segment_ids"][cursor], flat["positions"][cursor] = slot + 1, patch
            cursor += 1
    return {name: value.reshape(plan.rows, plan.row_patches, *value.shape[1:]) for name, value in flat.items()}


def _assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("max_patches", [None, 20])
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_batches_match_a_patch_by_patch_reference(batching, max_patches, dtype):
    source = _source(batching, max_patches=max_patches, dtype=dtype)
    batches = list(make_train_dataset(source, num_threads=2))
    assert len(batches) == source.num_steps == 15
    spans_rows = False
    for i, batch in enumerate(batches):
        step = source.plan.step(*divmod(i, source.plan.steps_per_epoch))
        for name, value in _reference_batch(source, step).items():
            assert batch[name].dtype == value.dtype
            np.testing.assert_array_equal(batch[name], value)
        spans_rows |= batch["segment_ids"][0, -1] == batch["segment_ids"][1, 0] != 0
    assert spans_rows == (batching == "packed")


def test_slot_fields_follow_the_manifest_row_and_have_contract_dtypes():
    batch = next(iter(make_train_dataset(_source())))
    index = batch["slide_index"]
    np.testing.assert_array_equal(batch["label"], index % 2)
    np.testing.assert_array_equal(batch["genes"], np.stack([index + 0.5, 0.5 - index], axis=1))
    np.testing.assert_array_equal(batch["has_genes"], index % 3 != 0)
    np.testing.assert_array_equal(batch["weight"], np.ones(4))
    dtypes = {k: str(v.dtype) for k, v in batch.items()}
    assert dtypes == {
        "patches": "float16", "segment_ids": "int32", "positions": "int32", "weight": "float32",
        "slide_index": "int32", "label": "int32", "genes": "float32", "has_genes": "bool",
    }  # fmt: skip


def test_evaluation_reads_each_patch_once_and_leaves_empty_slots_zero():
    source = _source(evaluation=True, with_coords=True)
    seen, empty = [], 0
    for batch in make_eval_dataset(source, num_threads=2):
        segment = batch["segment_ids"]
        valid = segment > 0
        slide = batch["slide_index"][segment[valid] - 1]
        np.testing.assert_array_equal(batch["coords"][valid], np.stack([slide, batch["positions"][valid]], axis=1))
        assert not batch["patches"][~valid].any() and not batch["coords"][~valid].any()
        seen += list(zip(slide.tolist(), batch["positions"][valid].tolist()))
        off = batch["weight"] == 0
        empty += off.sum()
        assert (batch["slide_index"][off] == -1).all() and not batch["genes"][off].any()
        assert not batch["has_genes"][off].any() and not batch["label"][off].any()
    expected = [(int(s), p) for s in source.table.slide_index for p in range(source.reader.manifest.sizes[s])]
    assert sorted(seen) == sorted(expected) and empty > 0


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_batches_do_not_depend_on_the_number_of_threads(num_threads):
    for a, b in zip(
        make_train_dataset(_source(), num_threads=3), make_train_dataset(_source(), num_threads=num_threads)
    ):
        _assert_equal(a, b)


@pytest.mark.parametrize("stop", [0, 4, 7, 14, 15])
def test_resume_at_any_step_equals_the_uninterrupted_run(stop):
    whole = list(StepIterator(_source(), num_threads=2))
    first = StepIterator(_source(), num_threads=2)
    for _ in range(stop):
        next(first)
    state = first.get_state()
    assert state["next_step"] == stop
    second = StepIterator(_source(), num_threads=1)
    second.set_state(state)
    rest = list(second)
    assert len(rest) == len(whole) - stop and second.next_step == 15
    for a, b in zip(whole[stop:], rest):
        _assert_equal(a, b)


def test_grain_state_resumes_too():
    dataset = make_train_dataset(_source(), num_threads=2, start_step=2)
    first = iter(dataset)
    next(first)
    state = first.get_state()
    expected = next(first)
    second = iter(dataset)
    second.set_state(state)
    _assert_equal(next(second), expected)


@pytest.mark.parametrize("change", ["plan", "manifest", "table", "dtype"])
def test_resume_with_other_data_or_plan_is_refused(change):
    saved = StepIterator(_source()).get_state()
    source = _source()
    if change == "plan":
        source = _source(max_patches=16)
    elif change == "manifest":
        source.reader.manifest = dataclasses.replace(source.reader.manifest, name="b")
    elif change == "table":
        fields = {**source.table.fields, "genes": source.table.fields["genes"] + 1}
        source = dataclasses.replace(source, table=SlideTable(source.table.slide_index, fields))
    else:
        source = dataclasses.replace(source, dtype="float32")
    with pytest.raises(ValueError, match="cannot resume"):
        StepIterator(source).set_state(saved)
    check_fingerprint(saved["fingerprint"], _source().fingerprint())


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_processes_hold_contiguous_rows_and_equal_slot_fields(batching):
    whole = list(make_train_dataset(_source(batching)))
    parts = [list(make_train_dataset(_source(batching), process_index=p, process_count=2)) for p in range(2)]
    for batch, a, b in zip(whole, *parts, strict=True):
        for name in ("patches", "segment_ids", "positions"):
            np.testing.assert_array_equal(batch[name], np.concatenate([a[name], b[name]]))
        for name in ("weight", "slide_index", "label", "genes", "has_genes"):
            np.testing.assert_array_equal(a[name], batch[name])
            np.testing.assert_array_equal(b[name], batch[name])


def test_a_process_reads_only_the_patches_of_its_rows():
    source = _source("padded")
    step = source.plan.step(0, 0)
    BatchAssembler(source, slice(1, 3))(step)
    expected = [(source.table.slide_index[step.slide[s]], 0, step.count[s]) for s in (1, 2)]
    assert source.reader.requests == expected


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_recycled_buffers_have_zero_padding_and_kept_batches_never_change(batching):
    source = _source(batching)
    assembler = BatchAssembler(source, slice(0, source.plan.rows))
    steps = [source.plan.step(0, i) for i in range(source.plan.steps_per_epoch)]
    kept = [assembler(step)["patches"][:, :3] for step in steps]
    before = [view.copy() for view in kept]
    addresses = set()
    for _ in range(3):
        for step in steps:
            patches = assembler(step)["patches"]
            addresses.add(patches.ctypes.data)
            np.testing.assert_array_equal(patches, _reference_batch(source, step)["patches"])
    assert len(addresses) <= 2, "a released buffer was not reused"
    for view, copy in zip(kept, before):
        np.testing.assert_array_equal(view, copy)


def test_a_jax_array_that_shares_a_recycled_buffer_keeps_its_contents():
    import jax

    source = _source()
    assembler = BatchAssembler(source, slice(0, source.plan.rows))
    steps = [source.plan.step(0, i) for i in range(source.plan.steps_per_epoch)]
    arrays = [jax.device_put(assembler(step)["patches"]) for step in steps]
    for _ in range(3):
        for step in steps:
            assembler(step)
    for step, array in zip(steps, arrays):
        np.testing.assert_array_equal(np.asarray(array), _reference_batch(source, step)["patches"])


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="4 rows for 3 processes"):
        make_train_dataset(_source(), process_index=0, process_count=3)
    with pytest.raises(ValueError, match="process_index is 2"):
        rows_of_process(4, 2, 2)
    assert rows_of_process(6, 2, 3) == slice(4, 6)


def test_bad_sources_are_refused():
    source = _source()
    with pytest.raises(ValueError, match="use plan_evaluation"):
        make_eval_dataset(source)
    with pytest.raises(ValueError, match="start_step is 16"):
        make_train_dataset(source, start_step=16)
    with pytest.raises(ValueError, match="dtype of the batch is 'bfloat16'"):
        dataclasses.replace(source, dtype="bfloat16")
    with pytest.raises(ValueError, match="table has 2 slides, the plan 23"):
        dataclasses.replace(source, table=SlideTable(np.array([0, 1])))
    shifted = SlideTable((source.table.slide_index + 1) % 30)
    with pytest.raises(ValueError, match="plan from the sizes of this manifest"):
        dataclasses.replace(source, table=shifted)


@pytest.mark.parametrize(
    "fields,match",
    [
        ({"case": np.array(["a", "b"])}, "expected bool, integers or floats"),
        ({"label": np.zeros(3, int)}, "expected 2 rows"),
        ({"weight": np.zeros(2)}, "filled by the pipeline itself"),
    ],
)
def test_bad_slot_fields_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        SlideTable(np.array([0, 1]), fields)


@pytest.mark.parametrize(
    "step_mib,threads,buffer_mib,expected",
    [(1, 8, 16, (8, 16)), (1, 8, 256, (8, 32)), (39, 4, 256, (4, 4)), (39, 8, 256, (6, 6)), (1024, 8, 256, (2, 2))],
)
def test_prefetch_is_bounded_in_bytes(step_mib, threads, buffer_mib, expected):
    options = read_options(step_mib * 2**20, threads, buffer_mib * 2**20)
    assert (options.num_threads, options.prefetch_buffer_size) == expected


def test_a_read_error_reaches_the_consumer():
    source = _source()

    def fail(*args):
        raise OSError("shard 3, record 7")

    source.reader.read_into = fail
    with pytest.raises(OSError, match="shard 3, record 7"):
        list(make_train_dataset(source, num_threads=2))


@pytest.mark.parametrize("max_patches", [None, 12])
def test_real_shards_through_the_pipeline(tmp_path, max_patches):
    """Each batch row holds the stored patch that its slide and position name."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, 12)
    with DatasetWriter(tmp_path / "d", name="toy", feat_dim=FEAT_DIM, chunk_patches=CHUNK) as writer:
        for i, n in enumerate(sizes):
            writer.add(f"s{i}", f"c{i}", rng.normal(size=(n, FEAT_DIM)).astype(np.float16), None)
    reader = BagReader(tmp_path / "d")
    bags = [reader.read_bag(i)[0] for i in range(12)]
    options = PlanOptions(
        2, seed=0, rows=2, multiple_of=8, max_patches=max_patches, chunk_patches=CHUNK, sampler="uniform"
    )
    plan = plan_coupled(reader.manifest.sizes, None, options, slides_per_step=4)
    for batch in make_train_dataset(StepSource(reader, SlideTable(np.arange(12)), plan), num_threads=2):
        segment = batch["segment_ids"]
        for r, l in np.argwhere(segment > 0):
            bag = bags[batch["slide_index"][segment[r, l] - 1]]
            np.testing.assert_array_equal(batch["patches"][r, l], bag[batch["positions"][r, l]])
        counts = np.bincount(segment.ravel(), minlength=5)[1:]
        limit = max_patches or 10**6
        np.testing.assert_array_equal(counts, np.minimum(reader.manifest.sizes[batch["slide_index"]], limit))


def test_iterating_initialises_no_jax_backend():
    code = """
import sys
sys.path.insert(0, "tests/data_pipelines")
from absl import flags
flags.FLAGS.mark_as_parsed()
import test_pipeline as t
next(t.StepIterator(t._source(), num_threads=2))
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
