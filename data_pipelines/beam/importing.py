"""`histokd import` on Beam: every planned shard is one item. The bytes are those of the local import."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

from data_pipelines import planned_writer
from data_pipelines.beam import stage as beam_stage
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
            raise NothingUsable(plan.root, [*plan.rejected, *_rejected(plan, out)])
    return dataclasses.replace(done, already_complete=False, shards_kept=len(kept))


def import_stage(plan: ImportPlan, out: pathlib.Path, work: pathlib.Path, kept: Mapping[int, WrittenShard]) -> Stage:
    """The shards that are still to be written as items of a stage.

    Args:
      plan: the import.
      out: the dataset.
      work: from `planned_writer.work_folder`, which stays open until the pipeline has ended.
      kept: finished shards, from `run.kept_shards`.
    """
    return Stage(
        name="import",
        items=[index for index in range(len(plan.shards)) if index not in kept],
        work=functools.partial(_write, plan, work),
        finish=functools.partial(_complete, plan, out, dict(kept)),
        folder=work,
    )


def _write(plan: ImportPlan, work: pathlib.Path, index: int, resource: None) -> WrittenShard:
    return run.write_planned_shard(plan, work, index, lambda count: None)


def _complete(
    plan: ImportPlan, out: pathlib.Path, kept: Mapping[int, WrittenShard], results: Sequence[WrittenShard]
) -> None:
    written = {**kept, **{shard.index: shard for shard in results}}
    if any(shard.n_records for shard in written.values()):
        run.finish(plan, out, [written[index] for index in range(len(plan.shards))])


def _rejected(plan: ImportPlan, out: pathlib.Path) -> list[planned_writer.Rejected]:
    shards = run.kept_shards(plan, out).values()
    return [item for shard in shards for item in shard.rejected]
