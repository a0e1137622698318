"""A stage of work for Beam: independent items (shards, slides), and one step with all results in their order.

The functions are those of the local path; Beam only decides where they run. Items may run twice (a runner repeats what
it lost), so that they must write atomically and give equal bytes, as planned shards do. All workers need the folders of
source and target under the same paths: a shared file system.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data_pipelines import atomic
from data_pipelines.errors import DataError, StorageError

_FAILURES = "beam-failures"


class Failed(NamedTuple):
    """An item whose work raised an expected error: which one, and the message."""

    item: str
    message: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is to be done; everything must be picklable (functions of modules, or `functools.partial` of them).

    Attributes:
      name: for the labels of the pipeline.
      items: independent pieces of work, small.
      work: (item, resource of the worker) -> result, small; data go to files.
      finish: (results in the order of the items) -> None, called once, where the pipeline runs; not if an item failed.
      folder: where failures are noted for the caller; exists, and is visible to all workers.
      setup: makes what a worker needs for many items, e.g. an encoder on its device; None: nothing.
    """

    name: str
    items: Sequence[Any]
    work: Callable[[Any, Any], Any]
    finish: Callable[[Sequence[Any]], None]
    folder: pathlib.Path
    setup: Callable[[], Any] | None = None


def import_beam() -> Any:
    """The module apache_beam.

    Raises:
      DataError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise DataError("Apache Beam is not installed: pip install 'histokd_jax[beam]'") from error
    return apache_beam


def transform(stage: Stage) -> Any:
    """The stage as a PTransform from the start of a pipeline to one element, None, once everything is finished."""
    beam = import_beam()

    class Work(beam.DoFn):
        """Works on items by number, with what the worker has set up."""

        def setup(self) -> None:
            self.resource = stage.setup() if stage.setup else None

        def process(self, index: int) -> Any:
            yield index, _work(stage, index, self.resource)

    name = stage.name
    return (
        f"{name}: items" >> beam.Create(list(range(len(stage.items))))
        # Without it a runner may fuse all items into one bundle, on one worker.
        | f"{name}: spread" >> beam.Reshuffle()
        | f"{name}: work" >> beam.ParDo(Work())
        | f"{name}: gather" >> beam.combiners.ToList()
        | f"{name}: finish" >> beam.Map(functools.partial(_finish, stage))
    )


def run(stage: Stage, options: Sequence[str] = ()) -> None:
    """Runs a pipeline of one stage and waits for its end.

    Args:
      stage: the work.
      options: pipeline options of Beam, e.g. `--runner=FlinkRunner`; default: its local runner.

    Raises:
      DataError: Beam is not installed.
      StorageError: items failed, which are named; or the pipeline ended with an error of its own.
    """
    beam = import_beam()
    from apache_beam.options.pipeline_options import PipelineOptions

    (stage.folder / _FAILURES).unlink(missing_ok=True)
    try:
        with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
            pipeline | transform(stage)
    except (RuntimeError, OSError, ValueError) as error:
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise StorageError(errno.EIO, f"the Beam pipeline ended with an error: {last[0]}") from error
    _raise_failures(stage)


def _work(stage: Stage, index: int, resource: Any) -> Any:
    """The result of an item, or its failure as a value: Beam would wrap the exception beyond recognition."""
    try:
        return stage.work(stage.items[index], resource)
    except (OSError, ValueError) as error:
        return Failed(str(stage.items[index]), str(error))


def _finish(stage: Stage, results: Sequence[tuple[int, Any]]) -> None:
    ordered = [result for _, result in sorted(results, key=lambda item: item[0])]
    failures = [result._asdict() for result in ordered if isinstance(result, Failed)]
    if not failures:
        stage.finish(ordered)
        return
    content = json.dumps(failures).encode()
    os.replace(atomic.write_temporary(stage.folder, _FAILURES, content), stage.folder / _FAILURES)


def _raise_failures(stage: Stage) -> None:
    path = stage.folder / _FAILURES
    if not path.exists():
        return
    failures = json.loads(path.read_bytes())
    path.unlink()
    raise StorageError(
        errno.EIO,
        f"{stage.name}: {len(failures)} of {len(stage.items)} items failed, first {failures[0]['item']}: "
        f"{failures[0]['message']}; the same command continues",
    )
