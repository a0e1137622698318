"""Batches of image pairs: read and decoded on reader threads, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines import schema
from data_pipelines.pairs.steps import PairSource
from data_pipelines.pipeline import BUFFER_BYTES, PlanSource, StepIterator, make_eval_dataset
from histokd_jax.train import sharding
from histokd_jax.train.feed import Fed


class PairFeeder:
    """Gives the steps of a plan of image pairs, see `feed.Feeder`.

    Args:
      mesh: the mesh of the run.
      threads: reader threads; each decodes whole steps.
      buffer_bytes: bound on the bytes of prefetched steps.
    """

    identity: Mapping[str, str] = {}
    unit = "images"

    def __init__(self, mesh: Mesh, threads: int, buffer_bytes: int = BUFFER_BYTES):
        self._mesh = mesh
        # Each process reads only its own examples of every step.
        self._options = {
            "num_threads": threads,
            "buffer_bytes": buffer_bytes,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }

    def report(self) -> dict[str, Any]:
        """See `feed.Feeder.report`."""
        return {"resident": False, "reason": "image pairs are decoded from the shards at every step"}

    def shapes(self, source: PairSource) -> dict[str, jax.ShapeDtypeStruct]:
        """See `feed.Feeder.shapes`."""
        by_example = sharding.by_example(self._mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_example)
            for name, (shape, dtype) in source.shapes().items()
        }

    def train(self, source: PairSource, start_step: int = 0) -> Iterator[Fed]:
        """See `feed.Feeder.train`."""
        return self._steps(source, StepIterator(source, start_step=start_step, **self._options), start_step)

    def evaluate(self, source: PairSource) -> Iterator[Fed]:
        """See `feed.Feeder.evaluate`."""
        return self._steps(source, make_eval_dataset(source, **self._options), 0)

    def _steps(self, source: PairSource, batches: Iterable[Mapping[str, np.ndarray]], first: int) -> Iterator[Fed]:
        steps = PlanSource(source.plan)
        for number, host in enumerate(batches, first):
            chosen = steps[number].slide
            # Of all processes: predictions come back whole.
            rows = np.where(chosen >= 0, source.table.slide_index[chosen], -1).astype(np.int32)
            images = int(np.count_nonzero(host[schema.WEIGHT]))
            sent = sum(value.nbytes for value in host.values())
            yield Fed(sharding.put_examples(self._mesh, host), images, rows, sent)
