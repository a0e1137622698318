"""Planned steps of image pairs: which examples share a step, and the host batches they become.

The position of training is one integer, the next global step, as for bags (`data_pipelines.pipeline`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines import sampling, schema
from data_pipelines.assembler import SlideTable
from data_pipelines.buffers import BufferPool
from data_pipelines.pairs.reader import PairPixels, PairReader

NO_PARTNER, IMAGE, VECTOR = "none", "image", "vector"
PARTNERS = (NO_PARTNER, IMAGE, VECTOR)


@dataclasses.dataclass(frozen=True)
class PairStep:
    """One step.

    Attributes:
      slide: [B] int32 index of the example in the arrays given to the planner, -1 for a filler.
    """

    slide: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class PairPlan:
    """All steps of a run. Memory: 4 bytes per example and epoch.

    Attributes:
      slide: [epochs, steps, B] int32, see `PairStep`.
      parameters: what the plan was computed from, for reports and the fingerprint.
    """

    slide: np.ndarray
    parameters: Mapping[str, Any]

    @property
    def epochs(self) -> int:
        """Number of planned epochs."""
        return self.slide.shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch."""
        return self.slide.shape[1]

    @property
    def num_slots(self) -> int:
        """B, examples of a step."""
        return self.slide.shape[2]

    @property
    def rows(self) -> int:
        """B: what processes and devices divide among them."""
        return self.num_slots

    def step(self, epoch: int, index: int) -> PairStep:
        """Step `index` of `epoch`."""
        return PairStep(self.slide[epoch, index])

    def fill(self) -> float:
        """Real examples divided by places."""
        return float((self.slide >= 0).mean())

    def report(self) -> dict[str, Any]:
        """Figures for logs."""
        return {
            "examples_per_step": self.num_slots,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "fill": self.fill(),
        }

    def fingerprint(self) -> str:
        """Sha256 (hex): equal if and only if the steps are equal."""
        digest = hashlib.sha256(json.dumps([dict(self.parameters), self.slide.shape], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(self.slide))
        return digest.hexdigest()


def plan_training(
    n: int,
    labels: np.ndarray | None,
    *,
    batch: int,
    epochs: int,
    seed: int,
    sampler: str = "uniform",
    drop_last: bool = True,
) -> PairPlan:
    """Steps of B examples in an order of every epoch's own.

    Args:
      n: number of examples.
      labels: [n] int classes; only read by the sampler "class_balanced_replacement".
      batch: B.
      epochs: epochs to plan.
      seed: of all draws.
      sampler: one of `sampling.SAMPLERS`.
      drop_last: leave out the last, incomplete step of an epoch (the specification's loader); False fills it with
        examples of weight 0.

    Returns:
      The plan.

    Raises:
      ValueError: an option out of range, or no full step under `drop_last`.
    """
    if batch < 1 or epochs < 1 or n < 1:
        raise ValueError(f"cannot plan {epochs} epochs of steps of {batch} from {n} examples; expected at least 1 each")
    if drop_last and n < batch:
        raise ValueError(
            f"train.b is {batch} but there are only {n} training examples: lower train.b to at most {n}, or set "
            "train.drop_last=False"
        )
    draws = n // batch * batch if drop_last else n
    parameters = {
        "mode": "pairs",
        "epochs": epochs,
        "seed": seed,
        "sampler": sampler,
        "drop_last": drop_last,
    }
    epochs_drawn = [_draw(n, labels, draws, sampler, seed, epoch) for epoch in range(epochs)]
    return PairPlan(np.stack([_steps(drawn, batch) for drawn in epochs_drawn]), parameters)


def plan_evaluation(n: int, batch: int) -> PairPlan:
    """One pass over n examples in their order; the last step is filled with examples of weight 0.

    Raises:
      ValueError: n or batch below 1.
    """
    if batch < 1 or n < 1:
        raise ValueError(f"cannot plan an evaluation of {n} examples in steps of {batch}; expected at least 1 each")
    return PairPlan(_steps(np.arange(n), batch)[None], {"mode": "evaluation"})


def _draw(n: int, labels: np.ndarray | None, draws: int, sampler: str, seed: int, epoch: int) -> np.ndarray:
    rng = sampling.epoch_rng(seed, epoch, sampling.Stream.DRAW)
    return sampling.draw_epoch(np.ones(n, np.int64), labels, draws, sampler=sampler, stratified=False, rng=rng)


def _steps(drawn: np.ndarray, batch: int) -> np.ndarray:
    """[steps, B] int32, filled with -1."""
    steps = -(-len(drawn) // batch)
    table = np.full(steps * batch, -1, np.int32)
    table[: len(drawn)] = drawn
    return table.reshape(steps, batch)


@dataclasses.dataclass(frozen=True, eq=False)
class PairSource:
    """Everything that determines the batches of a run.

    Attributes:
      reader: reads the examples; shared by all threads.
      table: rows of the planned examples in the manifest, and values that become fields [B, ...] (label, has_label).
      plan: the steps.
      partner: what the field `partner` holds: "none" (absent), "image", or "vector".
    """

    reader: PairReader
    table: SlideTable
    plan: PairPlan
    partner: str = NO_PARTNER

    def __post_init__(self):
        manifest = self.reader.manifest
        there = {NO_PARTNER: True, IMAGE: manifest.partner, VECTOR: manifest.vector_size > 0}
        if self.partner not in there:
            raise ValueError(f"partner is {self.partner!r}; expected one of {PARTNERS}")
        if not there[self.partner]:
            raise ValueError(
                f"data set {manifest.name} has no partner {self.partner}s: this method or mode needs them; write the "
                "data set again with them (`histokd pairs`)"
            )
        if self.plan.slide.max() >= len(self.table.slide_index):
            raise ValueError(
                f"the plan names example {self.plan.slide.max()}, the table has {len(self.table.slide_index)}"
            )

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.epochs * self.plan.steps_per_epoch

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Field -> (shape, dtype) of one step over all processes."""
        manifest, places = self.reader.manifest, self.plan.num_slots
        image = ((places, *manifest.image_size, 3), np.dtype(np.uint8))
        vector = ((places, manifest.vector_size), np.dtype(np.float32))
        found = {schema.IMAGE: image}
        if self.partner != NO_PARTNER:
            found[schema.PARTNER] = image if self.partner == IMAGE else vector
            found[schema.HAS_PARTNER] = ((places,), np.dtype(bool))
        return {
            **found,
            schema.EXAMPLE: ((places,), np.dtype(np.int32)),
            schema.WEIGHT: ((places,), np.dtype(np.float32)),
            schema.SLIDE_INDEX: ((places,), np.dtype(np.int32)),
            **{name: ((places, *v.shape[1:]), v.dtype) for name, v in self.table.fields.items()},
        }

    def step_bytes(self, rows: int) -> int:
        """Bytes of `rows` examples of one step."""
        per_step = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.shapes().values())
        return per_step // self.plan.num_slots * rows

    def assembler(self, rows: slice) -> PairAssembler:
        """Makes the host batches of one process."""
        return PairAssembler(self, rows)

    def fingerprint(self) -> str:
        """Sha256 (hex) over data set, plan and values: whether a saved position means the same batches."""
        digest = hashlib.sha256()
        header = [self.reader.manifest.fingerprint(), self.plan.fingerprint(), self.partner]
        digest.update(json.dumps(header).encode())
        for name, values in sorted({schema.SLIDE_INDEX: self.table.slide_index, **self.table.fields}.items()):
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()


class PairAssembler:
    """Turns a step into the host batch of one process; fields as in `histokd_jax.types.Batch`.

    Images are decoded on the calling (reader) thread into recycled buffers. A filler is black, with weight 0.

    Args:
      source: reader, table and plan.
      rows: places of the step that this process holds.
    """

    def __init__(self, source: PairSource, rows: slice):
        self._source, self._rows = source, rows
        count = rows.stop - rows.start
        self._shapes = {name: ((count, *shape[1:]), dtype) for name, (shape, dtype) in source.shapes().items()}
        pooled = {schema.IMAGE, schema.PARTNER} & set(self._shapes)
        self._pools = {name: BufferPool(*self._shapes[name]) for name in sorted(pooled)}

    def __call__(self, step: PairStep) -> dict[str, np.ndarray]:
        """The batch of one step: fields [B_local, ...]."""
        chosen, table = step.slide[self._rows], self._source.table
        real = chosen >= 0
        manifest_row = np.where(real, table.slide_index[chosen], -1).astype(np.int32)
        batch = {name: pool.take() for name, pool in self._pools.items()}
        batch |= {n: np.zeros(*self._shapes[n]) for n in self._shapes if n not in self._pools}
        batch[schema.WEIGHT][:] = real
        batch[schema.SLIDE_INDEX][:] = manifest_row
        batch[schema.EXAMPLE][:] = np.maximum(manifest_row, 0)
        for name, values in table.fields.items():
            batch[name][real] = values[chosen[real]]
        for place, row in enumerate(manifest_row):
            self._fill(batch, place, int(row))
        return batch

    def _fill(self, batch: dict[str, np.ndarray], place: int, row: int) -> None:
        """Pixels of one place; those of a filler, and of a partner that is not there, are zero."""
        kind, found = self._source.partner, PairPixels(None, None, None)
        if row >= 0:
            found = self._source.reader.read(row, partner=kind == IMAGE)
        batch[schema.IMAGE][place] = 0 if found.image is None else found.image
        if kind == NO_PARTNER:
            return
        partner = found.partner if kind == IMAGE else found.vector
        batch[schema.PARTNER][place] = 0 if partner is None else partner
        batch[schema.HAS_PARTNER][place] = partner is not None
