"""`histokd embed` on Beam: every planned shard is one item, and a worker sets its encoder up once for all of them.

The bytes are those of the local run on the same kind of device.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence

from data_pipelines import planned_writer
from data_pipelines.beam import stage as beam_stage
from data_pipelines.beam.planned import shard_stage
from data_pipelines.beam.stage import Stage
from data_pipelines.planned_writer import WrittenShard
from histokd_jax.embed import run
from histokd_jax.embed.embedder import Embedder
from histokd_jax.embed.plan import EmbedPlan, NothingUsable
from histokd_jax.embed.run import Outcome


def embed_on_beam(
    plan: EmbedPlan,
    out: pathlib.Path,
    setup: Callable[[], Embedder],
    *,
    threads: int = 2,
    ahead: int = 4,
    options: Sequence[str] = (),
    overwrite: bool = False,
) -> Outcome:
    """As `run.run_embedding`, with the shards spread over the workers of a Beam runner.

    Args:
      plan: from `plan.make_plan`.
      out: the data set to write; it, the slides and the weights must be visible to all workers.
      setup: makes the encoder on the devices of a worker; picklable.
      threads, ahead: of every worker, as `run_embedding`.
      options: pipeline options of Beam.
      overwrite: replace another complete data set.

    Returns:
      What was done.

    Raises:
      DatasetExistsError, NothingUsable, DataError, StorageError: as `run_embedding`.
    """
    beam_stage.import_beam()
    if (done := run.prepare(plan, out, overwrite=overwrite)) is not None:
        return done
    with planned_writer.work_folder(out) as work:
        kept = run.kept_shards(plan, out)
        beam_stage.run(embed_stage(plan, out, work, kept, setup, threads, ahead), options)
        done = run.existing(plan, out)
        if done is None:
            shards = run.kept_shards(plan, out).values()
            raise NothingUsable(plan.root, [*plan.rejected, *(item for shard in shards for item in shard.rejected)])
    return dataclasses.replace(done, already_complete=False, slides_kept=sum(len(plan.shards[i]) for i in kept))


def embed_stage(
    plan: EmbedPlan,
    out: pathlib.Path,
    work: pathlib.Path,
    kept: Mapping[int, WrittenShard],
    setup: Callable[[], Embedder],
    threads: int,
    ahead: int,
) -> Stage:
    """The shards that are still to be written as items of a stage.

    Args:
      plan, out, setup, threads, ahead: see `embed_on_beam`.
      work: from `planned_writer.work_folder`, which stays open until the pipeline has ended.
      kept: finished shards, from `run.kept_shards`.
    """
    write = functools.partial(_write, plan, work, threads, ahead)
    complete = functools.partial(run.finish, plan, out)
    return shard_stage("embed", len(plan.shards), kept, work, write=write, complete=complete, setup=setup)


def _write(
    plan: EmbedPlan, work: pathlib.Path, threads: int, ahead: int, index: int, embedder: Embedder
) -> WrittenShard:
    (shard,) = run.write_shards(plan, work, [index], embedder, threads=threads, ahead=ahead)
    return shard
