"""The gather of a step against the streaming assembler, bit for bit; under vmap and lax.map; dealt out; in int8."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import indexing
from data_pipelines.packing import PlanOptions, plan_coupled, plan_evaluation, plan_free
from data_pipelines.pipeline import BatchAssembler, SlideTable, StepSource
from histokd_jax.ops import gather, quantize

SIZES = np.random.default_rng(0).integers(1, 40, 30)
INDEX = np.random.default_rng(1).permutation(30)[:21]
FEAT_DIM = 5
OPTIONS = PlanOptions(2, 0, "uniform", rows=2, multiple_of=8, chunk_patches=4)


class Reader:
    """Bags of noise in memory."""

    def __init__(self, dtype):
        rng = np.random.default_rng(2)
        self.manifest = types.SimpleNamespace(sizes=SIZES, feat_dim=FEAT_DIM, dtype=dtype)
        self.bags = [rng.standard_normal((n, FEAT_DIM)).astype(dtype) for n in SIZES]

    def read_into(self, slide, start, count, out, coords_out=None):
        out[:] = self.bags[slide][(start + np.arange(count)) % SIZES[slide]]


PLANS = {
    "packed": lambda n: plan_coupled(n, None, OPTIONS, slides_per_step=4),
    "padded": lambda n: plan_coupled(n, None, OPTIONS, slides_per_step=4, batching="padded"),
    "part of each bag": lambda n: plan_coupled(
        n, None, dataclasses.replace(OPTIONS, max_patches=10), slides_per_step=4
    ),
    "free": lambda n: plan_free(n, None, dataclasses.replace(OPTIONS, max_patches=15), capacity=64),
    "evaluation": lambda n: plan_evaluation(n, target_capacity=100, rows=2, multiple_of=8, num_slots=16),
}


def make_source(name, dtype="float16"):
    fields = {"label": INDEX % 3, "genes": np.stack([INDEX, -INDEX], 1) + 0.5, "has_genes": INDEX % 2 == 0}
    return StepSource(Reader(dtype), SlideTable(INDEX, fields), PLANS[name](SIZES[INDEX]), dtype)


def make_cohort(source, shards=1):
    """(layout, share of every device)."""
    layout = indexing.CohortLayout.of_sources([source], shards)
    rows = np.empty((shards, layout.rows, FEAT_DIM), source.dtype)
    layout.read_rows(source.reader, 0, range(shards), rows)
    return layout, [gather.Cohort(jnp.asarray(share), None) for share in rows]


def slide_rows(layout, source):
    return gather.SlideRows(*map(jnp.asarray, layout.locate(source.table)))


def step_shape(source, shards=1):
    plan = source.plan
    length = indexing.needed_row_patches(plan, shards)
    return gather.StepShape(plan.rows // shards, length, plan.batching == "padded", source.dtype, shards)


def steps(source):
    plan = source.plan
    return [plan.step(e, i) for e in range(plan.epochs) for i in range(plan.steps_per_epoch)]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", PLANS)
def test_rows_and_slots_equal_those_of_streaming(name, dtype):
    source = make_source(name, dtype)
    layout, (cohort,) = make_cohort(source)
    shape, slides = step_shape(source), slide_rows(layout, source)
    run = jax.jit(lambda index: gather.row_fields(cohort, slides, index, shape))
    tables = {name: jnp.asarray(values) for name, values in source.table.fields.items()}
    slots = jax.jit(lambda index: gather.slot_fields(tables, index))
    assemble = BatchAssembler(source, slice(0, source.plan.rows))
    assert any((step.count == 0).any() for step in steps(source)) == (name in ("free", "evaluation"))
    for step in steps(source):
        expected, index = assemble(step), indexing.step_index(step)
        for field, got in zip(("patches", "segment_ids", "positions"), run(index), strict=True):
            assert got.dtype == expected[field].dtype
            np.testing.assert_array_equal(got, expected[field], err_msg=field)
        for field, got in slots(index).items():
            assert got.dtype == expected[field].dtype
            np.testing.assert_array_equal(got, expected[field], err_msg=field)


def test_sub_sampled_runs_wrap_around_the_end_of_a_bag():
    source = make_source("part of each bag")
    wraps = [(step.start + step.count > source.plan.sizes[step.slide]).any() for step in steps(source)]
    assert any(wraps), "otherwise the plan of these tests does not test wrapping"


@pytest.mark.parametrize("name", ["packed", "part of each bag", "free", "evaluation"])
def test_devices_together_hold_the_patches_of_the_step(name):
    source = make_source(name)
    layout, shares = make_cohort(source, 2)
    shape, slides = step_shape(source, 2), slide_rows(layout, source)
    run = jax.jit(lambda cohort, index, d: gather.row_fields(cohort, slides, index, shape, d))
    assemble = BatchAssembler(source, slice(0, source.plan.rows))
    for step in steps(source):
        parts = [run(share, indexing.step_index(step), d) for d, share in enumerate(shares)]
        # (slot, position) names a patch; sorted by it, the two layouts must agree.
        got = [
            np.concatenate([np.asarray(part[i]).reshape(-1, *part[i].shape[2:]) for part in parts]) for i in range(3)
        ]
        batch = assemble(step)
        expected = [batch[f].reshape(-1, *batch[f].shape[2:]) for f in ("patches", "segment_ids", "positions")]
        for fields in (got, expected):
            real = np.flatnonzero(fields[1])
            real = real[np.lexsort((fields[2][real], fields[1][real]))]
            assert not np.delete(fields[0], real, axis=0).any(), "padding is zero"
            fields[:] = [field[real] for field in fields]
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        held = [np.bincount(np.asarray(part[1]).ravel(), minlength=len(step.slide) + 1)[1:] for part in parts]
        assert np.abs(held[0] - held[1]).max() <= 2, "every slide loads the devices alike"


@pytest.mark.parametrize("loop", ["vmap", "map"])
def test_replicas_gather_their_own_steps_from_one_cohort(loop):
    source = make_source("packed")
    layout, (cohort,) = make_cohort(source)
    shape, slides = step_shape(source), slide_rows(layout, source)
    indices = jnp.stack([indexing.step_index(step) for step in steps(source)[:3]])

    def one(index):
        return gather.row_fields(cohort, slides, index, shape)

    together = jax.vmap(one)(indices) if loop == "vmap" else jax.lax.map(one, indices)
    for k, index in enumerate(indices):
        for all_of_them, alone in zip(together, one(index), strict=True):
            np.testing.assert_array_equal(all_of_them[k], alone)


def test_int8_patches_are_those_of_the_quantised_cohort():
    source = make_source("part of each bag", "float32")
    layout, (cohort,) = make_cohort(source)
    shape, slides = step_shape(source), slide_rows(layout, source)
    values, scale = quantize.quantize(cohort.patches)
    rounded = gather.Cohort(quantize.dequantize(values, scale, jnp.float32), None)
    for step in steps(source)[:3]:
        index = indexing.step_index(step)
        got = gather.row_fields(gather.Cohort(values, scale), slides, index, shape)
        expected = gather.row_fields(rounded, slides, index, shape)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
