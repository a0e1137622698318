"""Tiles the slides of a cohort: in parallel, resumable, with a table of what was kept and one of what was not."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines import atomic, table_files
from data_pipelines.errors import DataError, DatasetExistsError, StorageError
from data_pipelines.importers.header import import_h5py
from data_pipelines.wsi import tiling
from data_pipelines.wsi.slide import import_openslide
from data_pipelines.wsi.sources import SlideSource
from data_pipelines.wsi.tiling import TilingOptions
from data_pipelines.wsi.tissue import NoTissue

TILES_FILE, QUARANTINE_FILE, OPTIONS_FILE, WORK_FOLDER = "tiles.csv", "quarantine.csv", "tiling.json", ".tiling"
_QUARANTINE_COLUMNS = ("file", "slide_id", "reason", "detail")
Progress = Callable[[int], None]
"""Called with the number of slides that were finished since the last call."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run did.

    Attributes:
      folder: with patches/, contours_geojson/, previews/ and the tables.
      rows: of tiles.csv.
      rejected: rows of quarantine.csv.
      kept: slides that were done before.
      done: slides that this run worked on.
    """

    folder: pathlib.Path
    rows: tuple[Mapping[str, Any], ...]
    rejected: tuple[Mapping[str, str], ...]
    kept: int
    done: int


def run_tiling(
    root: pathlib.Path,
    sources: Sequence[SlideSource],
    job: pathlib.Path,
    options: TilingOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Tiles slides, or continues a run that was interrupted.

    The result does not depend on `workers` or on interruptions. Slides that were tiled with the same options before and
    have not changed are kept, so that a cohort may grow.

    Args:
      root: folder of the slides.
      sources: from `sources.find_slides`.
      job: folder of the results, see `coords.coords_file`.
      options: see there.
      workers: processes; 1 works in this one.
      overwrite: remove what was made with other options.
      progress: called after every slide.

    Returns:
      What was found; slides that cannot be tiled are in `rejected`.

    Raises:
      DatasetExistsError: the folder holds tiles made with other options.
      DataError: another process writes there, or a library is missing.
      StorageError: the disk is full or not writable, or a worker died.
    """
    progress = progress or (lambda count: None)
    with open_job(job, options, overwrite=overwrite):
        missing = unfinished(root, sources, job, options)
        progress(len(sources) - len(missing))
        for source, record in _records(root, missing, job, options, workers):
            _store(root, source, job, options, record)
            progress(1)
        return write_tables(job, options, sources, len(missing))


@contextlib.contextmanager
def open_job(job: pathlib.Path, options: TilingOptions, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """The folder of records of a job, locked against a second writer, for tiles made with these options.

    Args:
      job: folder of the results.
      options: of the tiles.
      overwrite: remove what was made with other options.

    Raises:
      DatasetExistsError, DataError, StorageError: as `run_tiling`.
    """
    import_openslide()
    import_h5py()
    folder = options.folder(job)
    with _locked(folder) as work:
        _check_options(folder, work, options, overwrite)
        yield work


def unfinished(
    root: pathlib.Path, sources: Sequence[SlideSource], job: pathlib.Path, options: TilingOptions
) -> list[SlideSource]:
    """The slides that were not tiled with these options before, or have changed since."""
    folder = options.folder(job)
    return [source for source in sources if _read_record(folder, source, _key(root, source, options)) is None]


def tile_and_store(root: pathlib.Path, source: SlideSource, job: pathlib.Path, options: TilingOptions) -> None:
    """Tiles a slide, writes its files and last the record of it; a function of its arguments, wherever it runs.

    Raises:
      StorageError: the disk is full or not writable.
    """
    _store(root, source, job, options, tile_one(root, source, job, options))


def tile_one(
    root: pathlib.Path, source: SlideSource, job: pathlib.Path, options: TilingOptions, threads: int = 1
) -> dict[str, Any]:
    """Tiles a slide and writes its files.

    Returns:
      {"row": of tiles.csv}, or {"rejected": of quarantine.csv}.

    Raises:
      StorageError: the disk is full or not writable.
    """
    try:
        found = tiling.tile_slide(root, source, options, threads=threads)
    except NoTissue as error:
        return {"rejected": dict(zip(_QUARANTINE_COLUMNS, (source.file, source.slide_id, error.reason, error.detail)))}
    tiling.write_outputs(job, found)
    return {"row": dict(found.row)}


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder of records, locked against a second writer; temporaries of killed workers are removed."""
    work = folder / WORK_FOLDER
    with atomic.storage_errors(folder):
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{folder}: another process is tiling into it; wait for it, or choose another --out"
            ) from error
        with atomic.storage_errors(folder):
            for place in (work, folder, *(path for path in folder.iterdir() if path.is_dir())):
                atomic.remove_temporaries(place)
        yield work


def _check_options(folder: pathlib.Path, work: pathlib.Path, options: TilingOptions, overwrite: bool) -> None:
    """Records the options; refuses a folder made with others, or clears it."""
    path, wanted = folder / OPTIONS_FILE, _facts(options)
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        stored = None
    if stored == wanted:
        return
    if stored is not None and not overwrite:
        changed = ", ".join(f"{name} {old!r}, now {new!r}" for name, old, new in _changed(stored, wanted))
        raise DatasetExistsError(
            f"{folder} holds tiles made with other options ({changed}); choose another --out or pass --overwrite"
        )
    with atomic.storage_errors(folder):
        for record in work.glob("*.json"):
            _remove_outputs(folder, json.loads(record.read_bytes()).get("slide_id", ""))
            record.unlink()
    table_files.write_json(path, wanted)


def _facts(options: TilingOptions) -> dict[str, Any]:
    """The options that decide the result of every slide; the default mpp is part of the key of a slide instead."""
    facts = {"tiles": dataclasses.asdict(options.tiles), "tissue": dataclasses.asdict(options.tissue)}
    return {group: {name: _plain(value) for name, value in values.items()} for group, values in facts.items()}


def _plain(value: Any) -> Any:
    """Equal numbers are written alike: 5000 as 5000.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _changed(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for group, values in wanted.items():
        old = stored.get(group, {})
        yield from ((f"{group}.{name}", old.get(name), new) for name, new in values.items() if old.get(name) != new)


def _key(root: pathlib.Path, source: SlideSource, options: TilingOptions) -> str:
    """Identifies what a record was made from: options, file name, size and time of change."""
    status = os.stat(root / source.file)
    content = [_facts(options), options.mpp, dataclasses.astuple(source), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record_path(work: pathlib.Path, slide_id: str) -> pathlib.Path:
    return work / f"{slide_id}.json"


def _read_record(folder: pathlib.Path, source: SlideSource, key: str) -> dict[str, Any] | None:
    try:
        record = json.loads(_record_path(folder / WORK_FOLDER, source.slide_id).read_bytes())
    except (OSError, ValueError):
        return None
    complete = "row" not in record or all(path.is_file() for path in _outputs(folder, source.slide_id))
    return record if record.get("key") == key and complete else None


def _store(
    root: pathlib.Path, source: SlideSource, job: pathlib.Path, options: TilingOptions, record: Mapping[str, Any]
) -> None:
    """The record is written last: without it the slide counts as not done."""
    folder, key = options.folder(job), _key(root, source, options)
    if "row" not in record:
        _remove_outputs(folder, source.slide_id)  # of a run in which the slide could still be read
    path = _record_path(folder / WORK_FOLDER, source.slide_id)
    table_files.write_json(path, {"key": key, "slide_id": source.slide_id, **record})


def _remove_outputs(folder: pathlib.Path, slide_id: str) -> None:
    with atomic.storage_errors(folder):
        for path in _outputs(folder, slide_id):
            path.unlink(missing_ok=True)


def _outputs(folder: pathlib.Path, slide_id: str) -> list[pathlib.Path]:
    return list(tiling.output_files(folder, slide_id).values())


def write_tables(job: pathlib.Path, options: TilingOptions, sources: Sequence[SlideSource], done: int) -> Outcome:
    """Tables of all slides that were tiled here, and of the slides of this run that could not be.

    Args:
      job, options: of the run.
      sources: the slides of the run.
      done: how many of them it worked on.
    """
    folder = options.folder(job)
    work = folder / WORK_FOLDER
    present = {source.slide_id for source in sources}
    records = [json.loads(path.read_bytes()) for path in sorted(work.glob("*.json"))]
    rows = sorted((record["row"] for record in records if "row" in record), key=lambda row: row["slide_id"])
    rejected = [record["rejected"] for record in records if "rejected" in record and record["slide_id"] in present]
    rejected = sorted(rejected, key=lambda row: row["file"])
    _write_if_new(folder / TILES_FILE, tiling.COLUMNS, rows)
    _write_if_new(folder / QUARANTINE_FILE, _QUARANTINE_COLUMNS, rejected)
    return Outcome(folder, tuple(rows), tuple(rejected), len(sources) - done, done)


def _write_if_new(path: pathlib.Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A repetition that finds the same leaves the file as it is."""
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if list(csv.reader(file)) == [list(columns), *cells]:
                return
    except OSError:
        pass
    table_files.write_csv(path, columns, cells)


# --- slides, here or in processes


def _records(
    root: pathlib.Path, sources: Sequence[SlideSource], job: pathlib.Path, options: TilingOptions, workers: int
) -> Iterator[tuple[SlideSource, dict[str, Any]]]:
    if workers <= 1 or len(sources) <= 1:
        for source in sources:
            yield source, tile_one(root, source, job, options, max(1, workers))
        return
    # Fresh processes: forking one that has threads or open slides is unsafe.
    context = multiprocessing.get_context("spawn")
    count = min(workers, len(sources))
    with ProcessPoolExecutor(count, context, initializer=_watch, initargs=(os.getpid(),)) as pool:
        futures = {pool.submit(tile_one, root, source, job, options): source for source in sources}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            reason = "a worker died, perhaps for want of memory or over a damaged slide"
            fix = "use fewer --workers, a repetition continues; with --workers 1 the last slide shown is the cause"
            raise StorageError(errno.EIO, f"{reason}: {fix}") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _watch(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed, so that it does not work on unseen."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
