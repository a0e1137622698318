"""The plan of a run as plain arrays: which patches of which slide sit where in every step.

A step is a stream of R x L patches cut into R rows; slot s holds the patches of one slide at a fixed offset of the
stream, so `packed` (slots back to back) and `padded` (slot s starts row s) differ in offsets only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

BATCHINGS = ("packed", "padded")


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """One step; S slots, empty ones last.

    Attributes:
      slide: [S] int32 index of the slide in the arrays given to the planner, -1 for an empty slot.
      start: [S] int32 first patch of the slide that is read (reading wraps modulo the bag size).
      count: [S] int32 number of patches read, 0 for an empty slot.
      offset: [S] int64 position of the slot's first patch in the step's stream of R * L patches.
    """

    slide: np.ndarray
    start: np.ndarray
    count: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """All steps of a run in one fixed shape. Memory: 12 bytes per slot, step and epoch.

    Attributes:
      sizes: [n] int64 patches per slide.
      slide: [epochs, steps, S] int32, see `StepPlan`.
      start: [epochs, steps, S] int32.
      count: [epochs, steps, S] int32.
      rows: R, rows of a step.
      row_patches: L, patches per row.
      batching: one of `BATCHINGS`.
      parameters: what the plan was computed from, for reports and the fingerprint.
    """

    sizes: np.ndarray
    slide: np.ndarray
    start: np.ndarray
    count: np.ndarray
    rows: int
    row_patches: int
    batching: str
    parameters: Mapping[str, Any]

    def __post_init__(self):
        _check_plan(self)

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
        """S, slots of a step."""
        return self.slide.shape[2]

    @property
    def capacity(self) -> int:
        """R * L, patches that a step can hold."""
        return self.rows * self.row_patches

    def step(self, epoch: int, index: int) -> StepPlan:
        """Step `index` of `epoch`.

        Args:
          epoch: 0 <= epoch < epochs.
          index: 0 <= index < steps_per_epoch.

        Returns:
          The plan of that step.

        Raises:
          IndexError: outside the planned range.
        """
        if not (0 <= epoch < self.epochs and 0 <= index < self.steps_per_epoch):
            raise IndexError(f"step {index} of epoch {epoch} is not planned: {self.epochs} x {self.steps_per_epoch}")
        count = self.count[epoch, index]
        if self.batching == "padded":
            offset = np.arange(self.num_slots, dtype=np.int64) * self.row_patches
        else:
            offset = np.cumsum(count, dtype=np.int64) - count
        return StepPlan(self.slide[epoch, index], self.start[epoch, index], count, offset)

    def fill(self, epoch: int | None = None) -> float:
        """Valid patches divided by capacity, of one epoch or (None) of the whole run."""
        count = self.count if epoch is None else self.count[epoch]
        steps = count.size // self.num_slots
        return float(count.sum(dtype=np.int64) / (steps * self.capacity))

    def report(self) -> dict[str, Any]:
        """Figures for logs: shape, steps, fill, truncation, and the largest bag as a share of the mean step.

        A share near or above 1 means that one slide sets the capacity of every step; only a cap on the patches per
        slide (`data.max_patches_train`) can then raise the fill.
        """
        real = self.slide >= 0
        mean_step = self.count.sum(dtype=np.int64) / (self.epochs * self.steps_per_epoch)
        return {
            "rows": self.rows,
            "row_patches": self.row_patches,
            "slots": self.num_slots,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "fill": self.fill(),
            "truncated_fraction": float((self.count < self.sizes[self.slide])[real].mean()),
            "largest_bag_share": float(self.count.max() / mean_step),
        }

    def fingerprint(self) -> str:
        """Sha256 (hex) over parameters, shape and every planned read: equal if and only if the steps are equal."""
        digest = hashlib.sha256()
        header = [dict(self.parameters), self.rows, self.row_patches, self.batching, self.slide.shape]
        digest.update(json.dumps(header, sort_keys=True).encode())
        for array in (self.sizes, self.slide, self.start, self.count):
            digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()


def _check_plan(plan: PackPlan) -> None:
    """Invariants every consumer relies on; a violation would corrupt segments silently."""
    if plan.batching == "padded":
        if plan.rows != plan.num_slots:
            raise ValueError(f"padded plan has {plan.rows} rows for {plan.num_slots} slots; expected one row per slot")
        largest, limit = int(plan.count.max()), plan.row_patches
    else:
        largest, limit = int(plan.count.sum(axis=2, dtype=np.int64).max()), plan.capacity
    if largest > limit:
        raise ValueError(f"a step needs {largest} patches where {limit} fit: raise the capacity of the plan")
    if (plan.count > plan.sizes[plan.slide]).any():
        raise ValueError("a slot reads more patches than its slide has; counts must not exceed the bag size")
