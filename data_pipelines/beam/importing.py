"""`histokd import` on Beam: every planned shard is one item. The bytes are those of the local import."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines import planned_writer
from data_pipelines.beam import stage as beam_stage
from data_pipelines.beam.planned import shard_stage
from data_pipelines.beam.stage import Stage
from data_pipelines.importers import run
from data_pipelines.importers.plan import ImportPlan, NothingUsable
from data_pipelines.importers.run import Outcome
from data_pipelines.planned_writer import WrittenShard


def import_on_beam(
    plan: ImportPlan, out: pathlib.Path, *, options: Sequence[str] = (), overwrite: bool = False
) -> Outcome:
    """As `importers.run.run_import`, with the shards spread over the workers of a Beam runner.

    Args:
      plan: from `plan.make_plan`.
      out: the dataset to write; this and the source must be visible to all workers.
      options: pipeline options of Beam.
      overwrite: replace another complete dataset.

    Returns:
      What was done.

    Raises:
      DatasetExistsError, DataError, StorageError: as `run_import`.
    """
    beam_stage.import_beam()
    if (done := run.prepare(plan, out, overwrite=overwrite)) is not None:
        return done
    with planned_writer.work_folder(out) as work:
        kept = run.kept_shards(plan, out)
        beam_stage.run(import_stage(plan, out, work, kept), options)
        done = run.prepare(plan, out, overwrite=True)
        if done is None:
            shards = run.kept_shards(plan, out).values()
            raise NothingUsable(plan.root, [*plan.rejected, *(item for shard in shards for item in shard.rejected)])
    return dataclasses.replace(done, already_complete=False, shards_kept=len(kept))


def import_stage(plan: ImportPlan, out: pathlib.Path, work: pathlib.Path, kept: Mapping[int, WrittenShard]) -> Stage:
    """The shards that are still to be written as items of a stage.

    Args:
      plan: the import.
      out: the dataset.
      work: from `planned_writer.work_folder`, which stays open until the pipeline has ended.
      kept: finished shards, from `run.kept_shards`.
    """
    write, complete = functools.partial(_write, plan, work), functools.partial(run.finish, plan, out)
    return shard_stage("import", len(plan.shards), kept, work, write=write, complete=complete)


def _write(plan: ImportPlan, work: pathlib.Path, index: int, resource: None) -> WrittenShard:
    return run.write_planned_shard(plan, work, index, lambda count: None)
