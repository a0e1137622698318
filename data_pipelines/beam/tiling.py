"""`histokd tile` on Beam: every slide is one item. The files are those of the local run."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

from data_pipelines.beam import stage as beam_stage
from data_pipelines.beam.stage import Stage
from data_pipelines.wsi import run
from data_pipelines.wsi.run import Outcome
from data_pipelines.wsi.sources import SlideSource
from data_pipelines.wsi.tiling import TilingOptions


def tile_on_beam(
    root: pathlib.Path,
    sources: Sequence[SlideSource],
    job: pathlib.Path,
    options: TilingOptions,
    *,
    pipeline: Sequence[str] = (),
    overwrite: bool = False,
) -> Outcome:
    """As `wsi.run.run_tiling`, with the slides spread over the workers of a Beam runner.

    Args:
      root: folder of the slides; it and `job` must be visible to all workers.
      sources: from `sources.find_slides`.
      job: folder of the results.
      options: see there.
      pipeline: pipeline options of Beam.
      overwrite: remove what was made with other options.

    Returns:
      What was found.

    Raises:
      DatasetExistsError, DataError, StorageError: as `run_tiling`.
    """
    beam_stage.import_beam()
    with run.open_job(job, options, overwrite=overwrite) as work:
        missing = run.unfinished(root, sources, job, options)
        beam_stage.run(tile_stage(root, missing, job, options, work), pipeline)
        return run.write_tables(job, options, sources, len(missing))


def tile_stage(
    root: pathlib.Path, sources: Sequence[SlideSource], job: pathlib.Path, options: TilingOptions, work: pathlib.Path
) -> Stage:
    """Slides as items of a stage; the tables are written by the caller, who sees all records.

    Args:
      root, job, options: see `tile_on_beam`.
      sources: the slides to work on.
      work: from `wsi.run.open_job`, which stays open until the pipeline has ended.
    """
    return Stage(
        name="tile",
        items=tuple(sources),
        work=functools.partial(_tile, root, job, options),
        finish=_nothing,
        folder=work,
    )


def _tile(root: pathlib.Path, job: pathlib.Path, options: TilingOptions, source: SlideSource, resource: None) -> None:
    run.tile_and_store(root, source, job, options)


def _nothing(results: Sequence[None]) -> None:
    """Every slide has written its own files."""
