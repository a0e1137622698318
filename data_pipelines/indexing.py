"""Steps as indices into a cohort that already lies in memory, without reading a patch.

The patches of every slide are dealt out in turn: patch p lies on device p mod n, in row base + p // n of that device.
Any run of patches of any slide then loads all devices alike (to within one patch, two where the run wraps), so that a
plan need not know how many devices there are, and every row is gathered from the memory of its own device. With one
device the rows are the bags as stored, and the steps are those of the streaming assembler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from data_pipelines.assembler import Reader, SlideTable, StepSource
from data_pipelines.plan import PackPlan, StepPlan

MAX_ROWS = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class CohortLayout:
    """Where the patches of a set of slides lie; equal on all devices.

    Attributes:
      slides: [m] int64 rows of the slides in the manifest, increasing.
      sizes: [m] int64 patches per slide.
      base: [m] int64 first row of each slide.
      shards: n, devices that the patches are dealt out to.
    """

    slides: np.ndarray
    sizes: np.ndarray
    base: np.ndarray
    shards: int

    @classmethod
    def of_sources(cls, sources: Iterable[StepSource], shards: int = 1) -> CohortLayout:
        """Layout of all slides that the plans may read.

        Args:
          sources: training and evaluation plans on one data set.
          shards: n.

        Returns:
          The layout.

        Raises:
          ValueError: if a device would hold more rows than a 32-bit index can name.
        """
        sources = list(sources)
        slides = np.unique(np.concatenate([source.table.slide_index for source in sources])).astype(np.int64)
        sizes = np.asarray(sources[0].reader.manifest.sizes, np.int64)[slides]
        per_device = -(-sizes // shards)
        base = np.cumsum(per_device) - per_device
        if per_device.sum() > MAX_ROWS:
            raise ValueError(
                f"the cohort has {sizes.sum()} patches, more than {MAX_ROWS} per device: raise mesh.data, or read it "
                "from disk with data.resident=off"
            )
        return cls(slides, sizes, base, shards)

    @property
    def rows(self) -> int:
        """Rows of one device."""
        return int(self.base[-1] + -(-self.sizes[-1] // self.shards))

    @property
    def patches(self) -> int:
        """Patches of all slides."""
        return int(self.sizes.sum())

    def locate(self, table: SlideTable) -> tuple[np.ndarray, np.ndarray]:
        """(base [n] int32, size [n] int32) of the slides of a table, in its order."""
        at = np.searchsorted(self.slides, table.slide_index)
        return self.base[at].astype(np.int32), self.sizes[at].astype(np.int32)

    def read_rows(self, reader: Reader, start: int, devices: Sequence[int], out: np.ndarray) -> None:
        """Reads the rows start, start + 1, ... of some devices; rows that hold no patch become zero.

        Args:
          reader: reads the bags.
          start: first row.
          devices: which devices, by their place on the data axis.
          out: [len(devices), rows, D], written in place.
        """
        stop, n = start + out.shape[1], self.shards
        first = int(np.searchsorted(self.base, start, side="right")) - 1
        filled = start
        for i in range(first, len(self.slides)):
            base, size = int(self.base[i]), int(self.sizes[i])
            low, high = max(start, base), min(stop, base - (-size // n))
            if base >= stop:
                break
            if low < high:
                piece = out[:, low - start : high - start]
                self._read_piece(
                    reader, int(self.slides[i]), (low - base) * n, min((high - base) * n, size), devices, piece
                )
                filled = high
        out[:, filled - start :] = 0

    def _read_piece(
        self, reader: Reader, slide: int, low: int, high: int, devices: Sequence[int], out: np.ndarray
    ) -> None:
        """Patches low to high of a slide (low is a multiple of n), dealt out."""
        if self.shards == 1:
            reader.read_into(slide, low, high - low, out[0])
            return
        patches = np.empty((high - low, out.shape[-1]), out.dtype)
        reader.read_into(slide, low, high - low, patches)
        for row, device in zip(out, devices, strict=True):
            part = patches[device :: self.shards]
            row[: len(part)], row[len(part) :] = part, 0


def step_index(step: StepPlan) -> np.ndarray:
    """All that a step must send: [3, S] int32 slide (-1 in empty slots), first patch and number of patches per slot."""
    return np.stack([step.slide, step.start, step.count]).astype(np.int32)


def shard_counts(start: np.ndarray, count: np.ndarray, size: np.ndarray, shards: int, shard: int) -> np.ndarray:
    """How many patches of the runs start, ..., start + count - 1 (modulo size) lie on one device.

    Args:
      start: [...] int, 0 <= start < size.
      count: [...] int, count <= size.
      size: [...] int.
      shards: n.
      shard: the device.

    Returns:
      [...] int64.
    """

    def below(p):
        # Patches before p on this device.
        return (p - shard + shards - 1) // shards

    stop = np.asarray(start, np.int64) + count
    return below(np.minimum(stop, size)) - below(start) + below(np.maximum(stop - size, 0))


def needed_row_patches(plan: PackPlan, shards: int, multiple_of: int = 1) -> int:
    """L of the rows when the patches of every step are dealt out: that of the plan, or a little more.

    Args:
      plan: the steps.
      shards: n; divides the rows of a step.
      multiple_of: L is a multiple of this.

    Returns:
      The plan's own L for one device; otherwise at least that.

    Raises:
      ValueError: if the rows cannot be divided, or the plan puts one slide into each row.
    """
    if shards == 1:
        return plan.row_patches
    if plan.rows % shards:
        raise ValueError(f"{plan.rows} packed rows cannot be divided over {shards} devices: set data.rows accordingly")
    if plan.batching != "packed":
        raise ValueError(
            f"train.batching puts one slide into each row, but a resident cohort deals the patches of a slide out to "
            f"{shards} devices: use train.batching=packed, mesh.data=1 or data.resident=off"
        )
    size = np.where(plan.slide >= 0, plan.sizes[plan.slide], 1)
    loads = (shard_counts(plan.start, plan.count, size, shards, d).sum(axis=-1).max() for d in range(shards))
    rows = plan.rows // shards
    return max(plan.row_patches, -(-int(max(loads)) // (rows * multiple_of)) * multiple_of)
