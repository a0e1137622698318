"""The cohort in device memory: whether it fits, how it gets there, and the program that gathers a step from it."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from data_pipelines import indexing, schema
from data_pipelines.assembler import Reader, StepSource
from data_pipelines.buffers import BufferPool
from histokd_jax.ops import gather, quantize
from histokd_jax.train import sharding

STORED, INT8 = "stored", "int8"
DTYPES = (STORED, INT8)
# Host bytes of one block on its way to the devices; there are as many blocks as reader threads, and one more.
BLOCK_BYTES = 32 * 2**20
# Share of the free memory that an automatic budget takes; the rest is left to the training step.
FREE_SHARE = 0.8
# Batches that live at one time: the one in flight and the next, in training and in evaluation.
LIVE_BATCHES = 2
SAMPLE_SLIDES, SAMPLE_PATCHES = 64, 128
_SLIDE, _START, _COUNT = range(3)


class CohortMemoryError(ValueError):
    """The cohort does not fit in device memory."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Memory that resident training needs on each device, against what it may take.

    Attributes:
      slides: slides of the run.
      patches: their patches.
      devices: devices that share the patches.
      cohort_bytes: share of the patches (and their scales) on one device.
      table_bytes: slot values (labels, genes, ...) of one fold, on every device.
      batch_bytes: the gathered batches that live at one time.
      budget_bytes: what all this may take; None where the device does not tell.
    """

    slides: int
    patches: int
    devices: int
    cohort_bytes: int
    table_bytes: int
    batch_bytes: int
    budget_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Everything, on one device."""
        return self.cohort_bytes + self.table_bytes + self.batch_bytes

    @property
    def obstacle(self) -> str:
        """Why the cohort cannot be resident; empty if it can."""
        if self.budget_bytes is None:
            return "the device reports no memory statistics; set data.resident_gib to the memory the cohort may take"
        if self.total_bytes > self.budget_bytes:
            return (
                f"it needs {_gib(self.total_bytes)} on each device, {_gib(self.budget_bytes)} are allowed; use more "
                "devices (mesh.data), data.resident_dtype=int8, a larger data.resident_gib, or on a GPU "
                "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
            )
        return ""

    def __str__(self) -> str:
        budget = "unknown" if self.budget_bytes is None else _gib(self.budget_bytes)
        return (
            f"{self.slides} slides with {self.patches} patches over {self.devices} device(s): cohort "
            f"{_gib(self.cohort_bytes)} + tables {_gib(self.table_bytes)} + batches {_gib(self.batch_bytes)} = "
            f"{_gib(self.total_bytes)} on each device, budget {budget}"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3f} GiB"


class ResidentPlan:
    """What a resident cohort will look like, known before anything is read.

    Args:
      mesh: the mesh of the run.
      sources: every plan that the run may read.
      dtype: one of `DTYPES`.
      live_tables: slot tables that are on the devices at one time.

    Raises:
      ValueError: unknown dtype, coordinates, clusters or neighbours wanted, or rows that cannot be divided over the
        devices.
    """

    def __init__(self, mesh: Mesh, sources: Sequence[StepSource], dtype: str = STORED, live_tables: int = 3):
        if dtype not in DTYPES:
            raise ValueError(f"data.resident_dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if any(source.with_coords for source in sources):
            raise ValueError("a resident cohort holds no coordinates: read them from disk (data.resident=off)")
        if any(source.clusters is not None for source in sources):
            raise ValueError("a resident cohort holds no cluster ids: read patches from disk (data.resident=off)")
        if any(source.neighbours for source in sources):
            raise ValueError("a resident cohort holds no neighbour graph: read patches from disk (data.resident=off)")
        self.mesh, self.dtype, self.reader = mesh, dtype, sources[0].reader
        self.shards = mesh.shape[sharding.DATA]
        self.layout = indexing.CohortLayout.of_sources(sources, self.shards)
        self._sources, self._live_tables = sources, live_tables
        self._row_patches: dict[tuple[int, int, int], int] = {}
        for source in sources:
            key, needed = self._shape_key(source), self._needed(source)
            # Folds share one length, and with it one compiled step.
            self._row_patches[key] = max(needed, self._row_patches.get(key, 0))

    @staticmethod
    def _shape_key(source: StepSource) -> tuple[int, int, int]:
        return source.plan.rows, source.plan.row_patches, source.plan.num_slots

    def _needed(self, source: StepSource) -> int:
        return indexing.needed_row_patches(source.plan, self.shards, _multiple_of(source))

    def shape(self, source: StepSource) -> gather.StepShape:
        """Shape of the rows of one device."""
        return gather.StepShape(
            rows=source.plan.rows // self.shards,
            row_patches=self._row_patches[self._shape_key(source)],
            padded=source.plan.batching == "padded",
            dtype=source.dtype,
            shards=self.shards,
        )

    @functools.cached_property
    def blocks(self) -> tuple[int, int]:
        """(number, rows) of the blocks in which the rows of a device are filled."""
        width = self.reader.manifest.feat_dim * np.dtype(self.reader.manifest.dtype).itemsize
        local = len(local_shards(self.mesh))
        number = max(1, -(-self.layout.rows * width * local // BLOCK_BYTES))
        return number, -(-self.layout.rows // number)

    @property
    def rows(self) -> int:
        """Rows of one device, rounded up to whole blocks."""
        return self.blocks[0] * self.blocks[1]

    @property
    def stored(self) -> np.dtype:
        """Dtype of the patches in device memory."""
        return np.dtype(np.int8) if self.dtype == INT8 else np.dtype(self.reader.manifest.dtype)

    def estimate(self, budget_bytes: int | None) -> Estimate:
        """Bytes on each device against a budget."""
        row = self.reader.manifest.feat_dim * self.stored.itemsize + (4 if self.dtype == INT8 else 0)
        tables = sorted((_table_bytes(source) for source in self._sources), reverse=True)
        batches = {_plan_mode(source): 0 for source in self._sources}
        for source in self._sources:
            shape = self.shape(source)
            width = self.reader.manifest.feat_dim * np.dtype(schema.FEATURE_DTYPES[source.dtype]).itemsize + 8
            batches[_plan_mode(source)] = max(
                batches[_plan_mode(source)], LIVE_BATCHES * shape.rows * shape.row_patches * width
            )
        return Estimate(
            slides=len(self.layout.slides),
            patches=self.layout.patches,
            devices=self.shards,
            cohort_bytes=self.rows * row,
            table_bytes=sum(tables[: self._live_tables]),
            batch_bytes=sum(batches.values()),
            budget_bytes=budget_bytes,
        )

    def key(self) -> str:
        """Sha256 (hex) of what would lie where: equal plans share one cohort."""
        devices = [str(device) for device in self.mesh.devices.flat]
        facts = [self.reader.manifest.fingerprint(), self.dtype, self.shards, devices, self.blocks]
        digest = hashlib.sha256(json.dumps(facts).encode())
        digest.update(self.layout.slides)
        return digest.hexdigest()


def _multiple_of(source: StepSource) -> int:
    return int(source.plan.parameters.get("multiple_of", 1))


def _plan_mode(source: StepSource) -> bool:
    return source.plan.parameters.get("mode") == "evaluation"


def _table_bytes(source: StepSource) -> int:
    fields = (source.table.slide_index, *source.table.fields.values())
    return sum(values.nbytes for values in fields) + 8 * len(source.table.slide_index)


def budget(mesh: Mesh, gib: float) -> int | None:
    """Bytes that resident data may take on each device.

    Args:
      mesh: the mesh of the run.
      gib: the wanted budget, or 0 for `FREE_SHARE` of the free memory (of a CPU: of the free RAM, shared by its
        devices).

    Returns:
      Bytes, or None where the device reports no statistics.

    Raises:
      ValueError: negative budget.
    """
    if gib < 0:
        raise ValueError(f"data.resident_gib={gib}: expected GiB per device, or 0 for what is free")
    if gib:
        return int(gib * 2**30)
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if local[0].platform == "cpu":
        return int(FREE_SHARE * free_ram() / len(local))
    stats = [device.memory_stats() for device in local]
    if any(not s or "bytes_limit" not in s for s in stats):
        return None
    return int(FREE_SHARE * min(s["bytes_limit"] - s["bytes_in_use"] for s in stats))


def free_ram(path: pathlib.Path = pathlib.Path("/proc/meminfo")) -> int:
    """Bytes of RAM that can be taken without swapping.

    Raises:
      CohortMemoryError: where the system does not tell.
    """
    try:
        facts = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError) as error:
        raise CohortMemoryError(
            "this system does not tell how much RAM is free: set data.resident_gib to the GiB that the cohort may take"
        ) from error


def quantisation_error(reader: Reader, layout: indexing.CohortLayout) -> dict[str, float]:
    """What int8 storage loses, measured on patches of up to `SAMPLE_SLIDES` slides spread over the cohort.

    Returns:
      {"patches", "mean_relative_error", "max_relative_error"}: length of the difference / length of the patch.
    """
    at = np.unique(np.linspace(0, len(layout.slides) - 1, SAMPLE_SLIDES).astype(int))
    sample = []
    for slide, size in zip(layout.slides[at], layout.sizes[at]):
        n = int(min(size, SAMPLE_PATCHES))
        sample.append(np.empty((n, reader.manifest.feat_dim), reader.manifest.dtype))
        reader.read_into(int(slide), 0, n, sample[-1])
    # Float64 sums: the mean of thousands of errors.
    errors = np.asarray(jax.jit(quantize.relative_error)(np.concatenate(sample)), np.float64)
    return {
        "patches": len(errors),
        "mean_relative_error": float(errors.mean()),
        "max_relative_error": float(errors.max()),
    }


def local_shards(mesh: Mesh) -> dict[jax.Device, int]:
    """Devices of this process -> their place on the "data" axis."""
    places = NamedSharding(mesh, P(sharding.DATA)).addressable_devices_indices_map((mesh.shape[sharding.DATA],))
    return {device: index[0].start or 0 for device, index in places.items()}


def load(plan: ResidentPlan, threads: int) -> gather.Cohort:
    """Reads every patch of the run once, into the memory of the devices.

    Reader threads fill blocks of bounded size; each block is copied to its place, and quantised there, by one donated
    update. No second copy of the cohort exists on the host.

    Args:
      plan: what goes where.
      threads: reader threads.

    Returns:
      Global arrays [n * N, ...], sharded over "data": patches, and scales for int8.

    Raises:
      CohortMemoryError: if the devices run out of memory.
    """
    began = time.perf_counter()
    try:
        # A guard of the training loop would also forbid the constants that fresh arrays are made from.
        with jax.transfer_guard("allow"):
            shares = _load_shares(plan, threads)
            cohort = jax.tree.map(lambda *parts: _assemble(plan.mesh, parts), *shares.values())
            jax.block_until_ready(cohort)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CohortMemoryError(
            f"the devices ran out of memory while the cohort was loaded ({plan.estimate(None)}): lower "
            "data.resident_gib so that it is read from disk, or use data.resident_dtype=int8"
        ) from error
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cohort))
    seconds = time.perf_counter() - began
    logging.info("resident cohort: %s in %.1f s (%.2f GB/s)", _gib(nbytes), seconds, nbytes / seconds / 1e9)
    return cohort


def _load_shares(plan: ResidentPlan, threads: int) -> dict[jax.Device, gather.Cohort]:
    number, rows = plan.blocks
    dim, devices = plan.reader.manifest.feat_dim, local_shards(plan.mesh)
    shares = {}
    for device in devices:
        scale = jnp.zeros(plan.rows, jnp.float32, device=device) if plan.dtype == INT8 else None
        shares[device] = gather.Cohort(jnp.zeros((plan.rows, dim), plan.stored, device=device), scale)
    # disable=None: no bar when the output is not a terminal.
    with tqdm(total=plan.layout.rows, desc="loading the cohort", unit="row", disable=None) as bar:
        for number, block in enumerate(_read_blocks(plan, list(devices.values()), threads)):
            for (device, share), part in zip(shares.items(), block, strict=True):
                at = jax.device_put(np.int32(number * rows), device)
                shares[device] = _fill(share, jax.device_put(part, device), at)
            # The buffer of the block is reused once nothing reads it.
            jax.block_until_ready(list(shares.values()))
            bar.update(min(rows, plan.layout.rows - bar.n))
    return shares


def _read_blocks(plan: ResidentPlan, devices: Sequence[int], threads: int) -> Iterator[np.ndarray]:
    """[local devices, rows, D] host blocks, in order; at most threads + 1 of them exist."""
    number, rows = plan.blocks
    manifest = plan.reader.manifest
    pool = BufferPool((len(devices), rows, manifest.feat_dim), manifest.dtype)

    def read(block: int) -> np.ndarray:
        out = pool.take()
        plan.layout.read_rows(plan.reader, block * rows, devices, out)
        return out

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as executor:
        pending = collections.deque()
        try:
            for block in range(number):
                pending.append(executor.submit(read, block))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@functools.partial(jax.jit, donate_argnums=0)
def _fill(share: gather.Cohort, block: jax.Array, at: jax.Array) -> gather.Cohort:
    if share.scale is None:
        return gather.Cohort(lax.dynamic_update_slice_in_dim(share.patches, block, at, axis=0), None)
    values, scale = quantize.quantize(block)
    return gather.Cohort(
        lax.dynamic_update_slice_in_dim(share.patches, values, at, axis=0),
        lax.dynamic_update_slice_in_dim(share.scale, scale, at, axis=0),
    )


def _assemble(mesh: Mesh, parts: Sequence[jax.Array]) -> jax.Array:
    """The shares of the devices as one array, sharded over "data"."""
    shape = (mesh.shape[sharding.DATA] * parts[0].shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P(sharding.DATA)), list(parts))


class CohortCache:
    """Keeps the cohort that was loaded last, for the next arm or run in this process that needs the same."""

    def __init__(self):
        self._key: str | None = None
        self._cohort: gather.Cohort | None = None

    def get(self, plan: ResidentPlan, threads: int) -> gather.Cohort:
        """The cohort of a plan; loads it if it is not the one at hand, which is given up first."""
        key = plan.key()
        if key != self._key:
            self._key = self._cohort = None
            self._cohort = load(plan, threads)
            self._key = key
        return self._cohort


def slot_tables(mesh: Mesh, layout: indexing.CohortLayout, source: StepSource) -> dict[str, Any]:
    """Values of all slides of a plan, on every device: {"slides": `gather.SlideRows`, "fields": name -> [n, ...]}."""
    base, size = layout.locate(source.table)
    fields = {schema.SLIDE_INDEX: source.table.slide_index, **source.table.fields}
    host = {"slides": gather.SlideRows(base, size), "fields": fields}
    return sharding.put_replicated(mesh, host)


def step_batch(
    cohort: gather.Cohort,
    tables: Mapping[str, Any],
    index: jax.Array,
    shape: gather.StepShape,
    shard: jax.Array | int = 0,
) -> dict[str, jax.Array]:
    """The rows of one device as a batch; pure, so that replicas can map it over their own indices and tables.

    Args:
      cohort: this device's share.
      tables: see `slot_tables`.
      index: [3, S] int32, see `data_pipelines.indexing.step_index`.
      shape: static shape.
      shard: this device's place on the data axis.

    Returns:
      Fields as in `histokd_jax.types.Batch`.
    """
    patches, segment_ids, positions = gather.row_fields(cohort, tables["slides"], index, shape, shard)
    real = index[_SLIDE] >= 0
    slots = gather.slot_fields(tables["fields"], index)
    return {
        schema.PATCHES: patches,
        schema.SEGMENT_IDS: segment_ids,
        schema.POSITIONS: positions,
        schema.WEIGHT: real.astype(jnp.float32),
        **slots,
        schema.SLIDE_INDEX: jnp.where(real, slots[schema.SLIDE_INDEX], -1),
    }


def make_gather(mesh: Mesh, shape: gather.StepShape):
    """The compiled-once program (old patches, cohort, tables, index) -> batch on the whole mesh, without a collective.

    The new patches take the memory of the old ones, which are donated: fresh pages cost several times the copy.

    Args:
      mesh: the mesh of the run.
      shape: of one device.

    Returns:
      A jitted function.
    """

    def local(old, cohort, tables, index):
        del old
        return step_batch(cohort, tables, index, shape, lax.axis_index(sharding.DATA))

    def program(old, cohort, tables, index):
        rows, everywhere = P(sharding.DATA), P()
        fields = (schema.WEIGHT, *tables["fields"])
        specs = dict.fromkeys((schema.PATCHES, schema.SEGMENT_IDS, schema.POSITIONS), rows)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows, everywhere, everywhere),
            out_specs={**specs, **dict.fromkeys(fields, everywhere)},
            # Slot fields are equal on all devices because their inputs are.
            check_vma=False,
        )(old, cohort, tables, index)

    return jax.jit(program, donate_argnums=0, keep_unused=True)
