"""A stage whose items are the shards of a planned dataset: written anywhere, completed once."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.beam.stage import Stage
from data_pipelines.planned_writer import WrittenShard


def shard_stage(
    name: str,
    count: int,
    kept: Mapping[int, WrittenShard],
    work: pathlib.Path,
    *,
    write: Callable[[int, Any], WrittenShard],
    complete: Callable[[Sequence[WrittenShard]], Any],
    setup: Callable[[], Any] | None = None,
) -> Stage:
    """The shards that are still to be written as items of a stage.

    Args:
      name: of the stage.
      count: shards of the plan.
      kept: those that an interrupted attempt had finished, by number.
      work: from `planned_writer.work_folder`, which stays open until the pipeline has ended.
      write: (number, resource of the worker) -> the written shard.
      complete: called with all shards in order; not if none holds a record, since there is nothing to complete.
      setup: see `Stage`.
    """
    items = [index for index in range(count) if index not in kept]
    return Stage(name, items, write, functools.partial(_complete, count, dict(kept), complete), work, setup)


def _complete(
    count: int,
    kept: Mapping[int, WrittenShard],
    complete: Callable[[Sequence[WrittenShard]], Any],
    results: Sequence[WrittenShard],
) -> None:
    written = {**kept, **{shard.index: shard for shard in results}}
    if any(shard.n_records for shard in written.values()):
        complete([written[index] for index in range(count)])
