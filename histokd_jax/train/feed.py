"""Where the batches of a run come from: planned steps, put on the devices of the mesh.

The loop and the evaluation ask a `Feeder` and do not know how patches reach the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines import schema
from data_pipelines.pipeline import StepIterator, StepSource, make_eval_dataset
from histokd_jax.train import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Fed:
    """One step, on the device.

    Attributes:
      batch: device arrays, fields as in `histokd_jax.types.Batch`.
      patches: valid patches of the step on this process.
      slide_index: [S] int32 on the host; row of each slot in the manifest, -1 for an empty slot.
    """

    batch: Mapping[str, jax.Array]
    patches: int
    slide_index: np.ndarray


class Feeder(Protocol):
    """Gives the steps of a plan in order."""

    def train(self, source: StepSource, start_step: int = 0) -> Iterator[Fed]:
        """Training steps from a global step to the end of the plan."""

    def evaluate(self, source: StepSource) -> Iterator[Fed]:
        """One exact pass over an evaluation plan."""


class StreamFeeder:
    """Reads every step from the shards.

    Args:
      mesh: the mesh of the run.
      threads: reader threads.
    """

    def __init__(self, mesh: Mesh, threads: int):
        self._mesh = mesh
        # Each process reads only its own rows of every step.
        self._options = {
            "num_threads": threads,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def train(self, source: StepSource, start_step: int = 0) -> Iterator[Fed]:
        """See `Feeder.train`."""
        return map(self._put, StepIterator(source, start_step=start_step, **self._options))

    def evaluate(self, source: StepSource) -> Iterator[Fed]:
        """See `Feeder.evaluate`."""
        return map(self._put, make_eval_dataset(source, **self._options))

    def _put(self, host: Mapping[str, np.ndarray]) -> Fed:
        patches = int(np.count_nonzero(host[schema.SEGMENT_IDS]))
        return Fed(sharding.put_batch(self._mesh, host), patches, host[schema.SLIDE_INDEX])
