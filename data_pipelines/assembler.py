"""Assembles host batches: patches go from chunk records straight into one fixed-shape buffer per step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from data_pipelines import schema
from data_pipelines.buffers import BufferPool
from data_pipelines.neighbours import neighbour_offsets
from data_pipelines.plan import PackPlan, StepPlan

_OWN_FIELDS = (*schema.ROW_FIELDS, schema.WEIGHT, schema.SLIDE_INDEX)


class Reader(Protocol):
    """What the pipeline needs of a `data_pipelines.reader.BagReader`."""

    manifest: Any

    def read_into(
        self, slide: int, start: int, count: int, out: np.ndarray, coords_out: np.ndarray | None = None
    ) -> None:
        """Fills `out` with patches start .. start + count (modulo the bag size) of a slide."""

    def slide_numbers(self, slide: int, positions: np.ndarray) -> np.ndarray | None:
        """[n] which of the slides of a bag each patch lies on; None if every bag is one slide."""


@dataclasses.dataclass(frozen=True)
class SlideTable:
    """Per-slide values in the order that the planner saw.

    Attributes:
      slide_index: [n] row of each slide (or sample, see `samples.SampleReader`) in the reader's manifest.
      fields: name -> [n, ...] values that become slot fields [S, ...], e.g. label, genes, has_genes. Stored as bool,
        int32 or float32; other kinds are rejected. Empty slots hold zeros.
    """

    slide_index: np.ndarray
    fields: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        index = np.asarray(self.slide_index, np.int32)
        fields = {name: _slot_values(name, value, len(index)) for name, value in self.fields.items()}
        object.__setattr__(self, "slide_index", index)
        object.__setattr__(self, "fields", fields)


@dataclasses.dataclass(frozen=True)
class StepSource:
    """Everything that determines the batches of a run.

    Attributes:
      reader: reads patches; shared by all threads.
      table: slot values, one row per planned slide.
      plan: the steps.
      dtype: dtype of the patches in the batch, 'float16' or 'float32'.
      with_coords: whether batches carry the patch coordinates (attention export).
      clusters: row of the reader's manifest -> [n_patches] integers by position; batches then carry the row field
        `clusters`, which is 0 on padding.
      neighbours: neighbours per patch of the spatial graph; batches then carry the row field `neighbours`. 0: no graph.
    """

    reader: Reader
    table: SlideTable
    plan: PackPlan
    dtype: str = "float16"
    with_coords: bool = False
    clusters: Mapping[int, np.ndarray] | None = None
    neighbours: int = 0

    def __post_init__(self):
        _check_clusters(self.clusters, self.table.slide_index, self.reader.manifest.sizes)
        if self.dtype not in schema.FEATURE_DTYPES:
            raise ValueError(f"dtype of the batch is {self.dtype!r}; expected one of {sorted(schema.FEATURE_DTYPES)}")
        if len(self.table.slide_index) != len(self.plan.sizes):
            raise ValueError(f"table has {len(self.table.slide_index)} slides, the plan {len(self.plan.sizes)}")
        found = np.asarray(self.reader.manifest.sizes)[self.table.slide_index]
        if (found != self.plan.sizes).any():
            row = int(np.argmax(found != self.plan.sizes))
            raise ValueError(
                f"slide {self.table.slide_index[row]} has {found[row]} patches in the manifest but the plan was made "
                f"for {self.plan.sizes[row]}: plan from the sizes of this manifest"
            )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.epochs * self.plan.steps_per_epoch

    def step_bytes(self, rows: int) -> int:
        """Bytes of the row fields of `rows` rows of one step."""
        width = self.reader.manifest.feat_dim * np.dtype(schema.FEATURE_DTYPES[self.dtype]).itemsize
        extra = (8 if self.with_coords else 0) + (4 if self.clusters is not None else 0) + 4 * self.neighbours
        return rows * self.plan.row_patches * (width + 8 + extra)

    def assembler(self, rows: slice) -> BatchAssembler:
        """Makes the host batches of one process, which holds some rows of every step."""
        return BatchAssembler(self, rows)

    def fingerprint(self) -> str:
        """Sha256 (hex) over data set, plan and slot values: whether a saved position means the same batches."""
        digest = hashlib.sha256()
        header = [self.reader.manifest.fingerprint(), self.plan.fingerprint(), self.dtype, self.with_coords]
        header += [f"{self.neighbours} neighbours"] if self.neighbours else []
        digest.update(json.dumps(header).encode())
        for name, values in sorted({schema.SLIDE_INDEX: self.table.slide_index, **self.table.fields}.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values))
        for row in self.table.slide_index if self.clusters is not None else ():
            digest.update(np.ascontiguousarray(self.clusters[int(row)], np.int32))
        return digest.hexdigest()


class BatchAssembler:
    """Turns a step plan into the host batch of one process; fields as in `histokd_jax.types.Batch`.

    Patches go from chunk records straight into one recycled buffer; padding is zero. Rows outside `rows` are neither
    read nor allocated; slot fields cover all S slots on every process.

    Args:
      source: reader, table and plan.
      rows: rows of the step that this process holds.
    """

    def __init__(self, source: StepSource, rows: slice):
        if source.neighbours and rows != slice(0, source.plan.rows):
            raise ValueError(
                "neighbour graphs need the coordinates of whole slides, but the rows of a step are divided among "
                "processes: train this method in one process"
            )
        self._source = source
        self._rows = rows
        shape = ((rows.stop - rows.start) * source.plan.row_patches, source.reader.manifest.feat_dim)
        self._pool = BufferPool(shape, schema.FEATURE_DTYPES[source.dtype])

    def __call__(self, step: StepPlan) -> dict[str, np.ndarray]:
        """The batch of one step: row fields [R_local, L, ...] and slot fields [S, ...]."""
        return {**self._row_fields(step), **self._slot_fields(step)}

    def _row_fields(self, step: StepPlan) -> dict[str, np.ndarray]:
        length = self._source.plan.row_patches
        low, high = self._rows.start * length, self._rows.stop * length
        buffers, filled = self._buffers(high - low), 0
        for slot in np.flatnonzero(step.count):
            first, stop = max(step.offset[slot], low), min(step.offset[slot] + step.count[slot], high)
            if first < stop:
                at = step.start[slot] + first - step.offset[slot]
                piece = {name: value[first - low : stop - low] for name, value in buffers.items()}
                self._read_piece(int(step.slide[slot]), int(slot), int(at), piece)
                buffers[schema.PATCHES][filled : first - low] = 0
                filled = stop - low
        buffers[schema.PATCHES][filled:] = 0
        rows = self._rows.stop - self._rows.start
        return {name: value.reshape(rows, length, *value.shape[1:]) for name, value in buffers.items()}

    def _buffers(self, n: int) -> dict[str, np.ndarray]:
        """Patches with stale contents, all other row fields zero."""
        buffers = {
            schema.PATCHES: self._pool.take(),
            schema.SEGMENT_IDS: np.zeros(n, np.int32),
            schema.POSITIONS: np.zeros(n, np.int32),
        }
        if self._source.with_coords:
            buffers[schema.COORDS] = np.zeros((n, 2), np.int32)
        if self._source.clusters is not None:
            buffers[schema.CLUSTERS] = np.zeros(n, np.int32)
        if self._source.neighbours:
            buffers[schema.NEIGHBOURS] = np.zeros((n, self._source.neighbours), np.int32)
        return buffers

    def _read_piece(self, item: int, slot: int, at: int, piece: Mapping[str, np.ndarray]) -> None:
        source, size = self._source, int(self._source.plan.sizes[item])
        n, row = len(piece[schema.SEGMENT_IDS]), int(source.table.slide_index[item])
        coords = piece.get(schema.COORDS)
        if coords is None and source.neighbours:
            coords = np.empty((n, 2), np.int32)
        source.reader.read_into(row, at % size, n, piece[schema.PATCHES], coords)
        piece[schema.SEGMENT_IDS][:] = slot + 1
        piece[schema.POSITIONS][:] = np.arange(at, at + n) % size
        if source.clusters is not None:
            piece[schema.CLUSTERS][:] = source.clusters[row][piece[schema.POSITIONS]]
        if source.neighbours:
            numbers = source.reader.slide_numbers(row, piece[schema.POSITIONS])
            piece[schema.NEIGHBOURS][:] = neighbour_offsets(coords, source.neighbours, numbers)

    def _slot_fields(self, step: StepPlan) -> dict[str, np.ndarray]:
        real, table = step.slide >= 0, self._source.table
        fields = {
            schema.WEIGHT: real.astype(np.float32),
            schema.SLIDE_INDEX: np.where(real, table.slide_index[step.slide], -1).astype(np.int32),
        }
        for name, values in table.fields.items():
            fields[name] = np.zeros((len(real), *values.shape[1:]), values.dtype)
            fields[name][real] = values[step.slide[real]]
        return fields


def _check_clusters(clusters: Mapping[int, np.ndarray] | None, rows: np.ndarray, sizes: np.ndarray) -> None:
    """One id per patch of every planned slide."""
    for row in () if clusters is None else rows.tolist():
        found = len(clusters[row]) if row in clusters else 0
        if found != sizes[row]:
            raise ValueError(f"slide {row} has {sizes[row]} patches but {found} cluster ids: assign its clusters again")


def _slot_values(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """Values as bool, int32 or float32."""
    if name in _OWN_FIELDS:
        raise ValueError(f"field {name!r} is filled by the pipeline itself; expected another name")
    values = np.asarray(values)
    if values.shape[:1] != (n,):
        raise ValueError(f"field {name!r} has shape {values.shape}; expected {n} rows, one per slide")
    dtypes = {"b": np.bool_, "i": np.int32, "u": np.int32, "f": np.float32}
    if values.dtype.kind not in dtypes:
        raise ValueError(f"field {name!r} has dtype {values.dtype}; expected bool, integers or floats")
    return np.ascontiguousarray(values, dtypes[values.dtype.kind])
