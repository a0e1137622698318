"""Where the batches of a run come from: read from disk step by step, or gathered from a cohort in device memory.

The loop and the evaluation ask a `Feeder` and do not know how patches reach the device.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines import indexing, schema
from data_pipelines.pipeline import (
    PlanSource,
    StepIterator,
    StepSource,
    check_evaluation,
    check_start,
    make_eval_dataset,
)
from histokd_jax.train import distributed, resident, sharding

MODES = ("off", "auto", "on")
# Training, validation and test tables of the fold at hand.
LIVE_TABLES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Fed:
    """One step, on the device.

    Attributes:
      batch: device arrays, fields as in `histokd_jax.types.Batch`. They hold until the second next step of the same
        iterator is asked for, which may reuse their memory.
      patches: valid patches of the step on this process (of image pairs: real examples).
      slide_index: [S] int32 on the host; bag (or example) of each slot for the reader, -1 for an empty slot.
      host_bytes: bytes that this process sent to its devices for this step.
    """

    batch: Mapping[str, jax.Array]
    patches: int
    slide_index: np.ndarray
    host_bytes: int


class Feeder(Protocol):
    """Gives the steps of a plan in order.

    Attributes:
      unit: what `Fed.patches` counts: "patches" or "images".
    """

    unit: str

    @property
    def identity(self) -> Mapping[str, str]:
        """What must stay equal to continue a run: empty if the batches are those of streaming, bit for bit."""

    def report(self) -> dict[str, Any]:
        """How batches reach the devices and why, for the run manifest."""

    def shapes(self, source: StepSource) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of the batches, without reading any."""

    def train(self, source: StepSource, start_step: int = 0) -> Iterator[Fed]:
        """Training steps from a global step to the end of the plan."""

    def evaluate(self, source: StepSource) -> Iterator[Fed]:
        """One exact pass over an evaluation plan."""


class StreamFeeder:
    """Reads every step from the shards.

    Args:
      mesh: the mesh of the run.
      threads: reader threads.
      facts: more facts for `report`.
    """

    identity: Mapping[str, str] = {}
    unit = "patches"

    def __init__(self, mesh: Mesh, threads: int, facts: Mapping[str, Any] | None = None):
        self._mesh, self._facts = mesh, dict(facts or {})
        # Each process reads only its own rows of every step.
        self._options = {
            "num_threads": threads,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def report(self) -> dict[str, Any]:
        """See `Feeder.report`."""
        return {"resident": False, **self._facts}

    def shapes(self, source: StepSource) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feeder.shapes`."""
        return _shapes(self._mesh, source, source.plan.row_patches)

    def train(self, source: StepSource, start_step: int = 0) -> Iterator[Fed]:
        """See `Feeder.train`."""
        return map(self._put, StepIterator(source, start_step=start_step, **self._options))

    def evaluate(self, source: StepSource) -> Iterator[Fed]:
        """See `Feeder.evaluate`."""
        return map(self._put, make_eval_dataset(source, **self._options))

    def _put(self, host: Mapping[str, np.ndarray]) -> Fed:
        patches = int(np.count_nonzero(host[schema.SEGMENT_IDS]))
        sent = sum(value.nbytes for value in host.values())
        return Fed(sharding.put_batch(self._mesh, host), patches, host[schema.SLIDE_INDEX], sent)


class ResidentFeeder:
    """Gathers every step on the devices from a cohort that lies there; a step sends 12 bytes per slot.

    The cohort is loaded when the first step is asked for, so that a finished run loads nothing.

    Args:
      plan: what lies where.
      threads: reader threads of the loading.
      cache: holds the cohort, also for other feeders of the same data.
      facts: more facts for `report`.
    """

    unit = "patches"

    def __init__(
        self,
        plan: resident.ResidentPlan,
        threads: int,
        cache: resident.CohortCache | None = None,
        facts: Mapping[str, Any] | None = None,
    ):
        self._plan, self._threads, self._cache = plan, threads, cache or resident.CohortCache()
        self._facts = dict(facts or {})
        self._programs: dict[Any, Any] = {}
        self._tables: collections.OrderedDict[int, tuple[StepSource, Any]] = collections.OrderedDict()

    @property
    def identity(self) -> Mapping[str, str]:
        """See `Feeder.identity`."""
        out = {}
        if self._plan.dtype != resident.STORED:
            out["precision of the patches (data.resident_dtype)"] = self._plan.dtype
        if self._plan.shards > 1:
            out["order of the patches in memory (data.resident)"] = f"dealt out to {self._plan.shards} devices"
        return out

    def report(self) -> dict[str, Any]:
        """See `Feeder.report`."""
        return {"resident": True, "dtype": self._plan.dtype, **self._facts}

    def shapes(self, source: StepSource) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Feeder.shapes`."""
        return _shapes(self._plan.mesh, source, self._plan.shape(source).row_patches)

    def train(self, source: StepSource, start_step: int = 0) -> Iterator[Fed]:
        """See `Feeder.train`."""
        check_start(source, start_step)
        return self._steps(source, start_step)

    def evaluate(self, source: StepSource) -> Iterator[Fed]:
        """See `Feeder.evaluate`."""
        check_evaluation(source)
        return self._steps(source, 0)

    def _steps(self, source: StepSource, first: int) -> Iterator[Fed]:
        # Loaded here, not in the iteration: the loop's clock for data waits should not see it.
        cohort, tables = self._cache.get(self._plan, self._threads), self._table(source)
        return self._iterate(source, first, cohort, tables)

    def _iterate(self, source: StepSource, first: int, cohort: Any, tables: Any) -> Iterator[Fed]:
        steps, program, mesh = PlanSource(source.plan), self._program(source), self._plan.mesh
        spare = collections.deque(self._buffers(source))
        for number in range(first, len(steps)):
            step = steps[number]
            index = indexing.step_index(step)
            batch = program(spare.popleft(), cohort, tables, sharding.put_replicated(mesh, index))
            spare.append(batch[schema.PATCHES])
            slides = np.where(step.slide >= 0, source.table.slide_index[step.slide], -1).astype(np.int32)
            yield Fed(batch, self._local_patches(source, step), slides, index.nbytes)

    def _buffers(self, source: StepSource) -> list[jax.Array]:
        """Memory of the batches that live at one time."""
        like = self.shapes(source)[schema.PATCHES]
        with jax.transfer_guard("allow"):
            return [jnp.zeros(like.shape, like.dtype, device=like.sharding) for _ in range(resident.LIVE_BATCHES)]

    def _local_patches(self, source: StepSource, step: Any) -> int:
        shards = self._plan.shards
        size = np.where(step.slide >= 0, source.plan.sizes[step.slide], 1)
        local = set(resident.local_shards(self._plan.mesh).values())
        return sum(int(indexing.shard_counts(step.start, step.count, size, shards, d).sum()) for d in local)

    def _program(self, source: StepSource):
        shape = self._plan.shape(source)
        if shape not in self._programs:
            self._programs[shape] = resident.make_gather(self._plan.mesh, shape)
        return self._programs[shape]

    def _table(self, source: StepSource) -> Any:
        """Slot values of a source on the devices; those used last are kept."""
        key = id(source)
        if key not in self._tables:
            while len(self._tables) >= LIVE_TABLES:
                self._tables.popitem(last=False)
            # The source is kept as well, so that its id stays its own.
            self._tables[key] = source, resident.slot_tables(self._plan.mesh, self._plan.layout, source)
        self._tables.move_to_end(key)
        return self._tables[key][1]


def make_feeder(
    cfg: ConfigDict,
    mesh: Mesh,
    sources: Sequence[StepSource],
    cache: resident.CohortCache | None = None,
) -> Feeder:
    """The feeder that the configuration asks for (data.resident); logs the estimate and the decision.

    Args:
      cfg: resolved configuration.
      mesh: the mesh of the run.
      sources: every plan of the run, all folds, training and evaluation.
      cache: holds the loaded cohort between the arms of a run.

    Returns:
      A feeder.

    Raises:
      ValueError: unknown setting; or data.resident=on and the batches cannot be gathered.
      CohortMemoryError: data.resident=on and the cohort does not fit; holds the estimate.
    """
    wanted, threads = cfg.data.resident, cfg.data.threads
    if wanted not in MODES:
        raise ValueError(f"data.resident={wanted!r}: expected one of {', '.join(MODES)}")
    if wanted == "off":
        return StreamFeeder(mesh, threads, {"reason": "data.resident=off"})
    plan, facts, obstacle = None, {}, ""
    try:
        plan = resident.ResidentPlan(mesh, sources, cfg.data.resident_dtype, LIVE_TABLES)
        estimate = plan.estimate(resident.budget(mesh, cfg.data.resident_gib))
    except ValueError as error:
        if wanted == "on" or cfg.data.resident_dtype not in resident.DTYPES or cfg.data.resident_gib < 0:
            raise
        obstacle = str(error)
    else:
        obstacle = estimate.obstacle
        facts = {"estimate": {**dataclasses.asdict(estimate), "total_bytes": estimate.total_bytes}}
        distributed.tell(f"resident cohort, estimate: {estimate}")
        if obstacle and wanted == "on":
            raise resident.CohortMemoryError(f"data.resident=on, but the cohort does not fit ({estimate}): {obstacle}")
    if obstacle:
        distributed.tell(f"the cohort is read from disk at every step (data.resident={wanted}): {obstacle}")
        return StreamFeeder(mesh, threads, {"reason": obstacle, **facts})
    if plan.dtype == resident.INT8:
        error = facts["quantisation_error"] = resident.quantisation_error(plan.reader, plan.layout)
        mean, most = 100 * error["mean_relative_error"], 100 * error["max_relative_error"]
        distributed.tell(
            f"int8 patches: relative error {mean:.3f} % on average, {most:.3f} % at most ({error['patches']} patches)"
        )
    distributed.tell(f"the cohort stays in device memory (data.resident={wanted}, {plan.dtype})")
    return ResidentFeeder(plan, threads, cache, {"reason": "it fits", **facts})


def _shapes(mesh: Mesh, source: StepSource, row_patches: int) -> dict[str, jax.ShapeDtypeStruct]:
    plan = source.plan
    lead, slots = (plan.rows, row_patches), plan.num_slots
    dim, dtype = source.reader.manifest.feat_dim, schema.FEATURE_DTYPES[source.dtype]
    shapes = {
        schema.PATCHES: ((*lead, dim), dtype),
        schema.SEGMENT_IDS: (lead, np.int32),
        schema.POSITIONS: (lead, np.int32),
        schema.WEIGHT: ((slots,), np.float32),
        schema.SLIDE_INDEX: ((slots,), np.int32),
        **{name: ((slots, *values.shape[1:]), values.dtype) for name, values in source.table.fields.items()},
    }
    if source.with_coords:
        shapes[schema.COORDS] = ((*lead, 2), np.int32)
    if source.clusters is not None:
        shapes[schema.CLUSTERS] = (lead, np.int32)
    if source.neighbours:
        shapes[schema.NEIGHBOURS] = ((*lead, source.neighbours), np.int32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.field_sharding(mesh, name))
        for name, (shape, dtype) in shapes.items()
    }
