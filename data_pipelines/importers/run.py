"""Runs a planned import: shards in parallel, slides read ahead of the one being written, faults to quarantine.csv."""

from __future__ import annotations

import collections
import csv
import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import atomic, bag, planned_writer, shards
from data_pipelines.errors import BagError, DatasetExistsError, StorageError
from data_pipelines.importers import reading
from data_pipelines.importers.plan import ImportPlan, NothingUsable, PlannedSlide, Progress
from data_pipelines.importers.sources import Unusable
from data_pipelines.manifest import MANIFEST_FILE, Manifest, sha256_file
from data_pipelines.planned_writer import Bag, Rejected, WrittenShard

QUARANTINE_FILE, SOURCES_FILE = "quarantine.csv", "sources.csv"
_COLUMNS = ("slide_id", "case_id", "file", "n_bytes", "sha256", "n_patches", "dtype", "encoder", "magnification", "mpp")
_COLUMNS += ("patch_size", "patch_size_level0", "level0_magnification", "overlap", "level0_mpp", "coords_unit")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an import did.

    Attributes:
      manifest: of the dataset.
      rejected: rows of quarantine.csv.
      shards_kept: shards that an interrupted attempt had finished.
      already_complete: the same import had been done before; nothing was written.
    """

    manifest: Manifest
    rejected: tuple[Rejected, ...]
    shards_kept: int = 0
    already_complete: bool = False


def run_import(
    plan: ImportPlan, out: pathlib.Path, *, workers: int = 1, overwrite: bool = False, progress: Progress | None = None
) -> Outcome:
    """Imports a folder, or continues an import that was interrupted.

    The result does not depend on `workers` or on interruptions.

    Args:
      plan: from `plan.make_plan`.
      out: the dataset to write.
      workers: processes; 1 works in this one.
      overwrite: replace another complete dataset.
      progress: called after every slide.

    Returns:
      What was done.

    Raises:
      DatasetExistsError: `out` holds another complete dataset.
      DataError: no slide could be read, or another process writes to `out`.
      StorageError: the disk is full or not writable.
    """
    if (done := prepare(plan, out, overwrite=overwrite)) is not None:
        return done
    progress = progress or (lambda count: None)
    with planned_writer.work_folder(out) as work:
        kept = kept_shards(plan, out)
        for index in kept:
            progress(len(plan.shards[index]))
        missing = [index for index in range(len(plan.shards)) if index not in kept]
        written = kept | {shard.index: shard for shard in _write(plan, work, missing, workers, progress)}
        return finish(plan, out, [written[index] for index in range(len(plan.shards))], len(kept))


def prepare(plan: ImportPlan, out: pathlib.Path, *, overwrite: bool = False) -> Outcome | None:
    """What an earlier, equal import did, if it was finished; else None: there is something to do.

    Raises:
      DatasetExistsError: `out` holds another complete dataset.
    """
    done = _existing(plan, out)
    if done is None and (out / MANIFEST_FILE).exists() and not overwrite:
        raise DatasetExistsError(f"{out} holds another complete dataset; choose another folder or pass --overwrite")
    return done


def kept_shards(plan: ImportPlan, out: pathlib.Path) -> dict[int, WrittenShard]:
    """The shards that an interrupted attempt at the same plan had finished, by number."""
    found = {index: planned_writer.read_written(out, index, plan.key(index)) for index in range(len(plan.shards))}
    return {index: shard for index, shard in found.items() if shard is not None}


def write_planned_shard(plan: ImportPlan, work: pathlib.Path, index: int, progress: Progress) -> WrittenShard:
    """Reads the slides of one shard and writes it; a function of plan and number, wherever it runs.

    Args:
      plan: the import.
      work: from `planned_writer.work_folder`.
      index: number of the shard.
      progress: called with 1 after every slide.
    """
    return planned_writer.write_shard(work, index, plan.key(index), plan.facts, _bags(plan, index, progress))


def finish(plan: ImportPlan, out: pathlib.Path, written: Sequence[WrittenShard], kept: int = 0) -> Outcome:
    """Completes the dataset out of all shards of a plan, in their order.

    Raises:
      NothingUsable: no slide could be read.
    """
    rejected = tuple(sorted([*plan.rejected, *(item for shard in written for item in shard.rejected)]))
    if not any(shard.n_records for shard in written):
        raise NothingUsable(plan.root, rejected)
    _complete(plan, out, written, rejected)
    return Outcome(Manifest.load(out), rejected, kept)


def write_quarantine(out: pathlib.Path, rejected: Sequence[Rejected]) -> None:
    """Writes quarantine.csv where no dataset can be written."""
    with atomic.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        os.replace(atomic.write_temporary(out, QUARANTINE_FILE, _quarantine(rejected)), out / QUARANTINE_FILE)


def _existing(plan: ImportPlan, out: pathlib.Path) -> Outcome | None:
    try:
        manifest = Manifest.load(out)
        stored = json.loads((out / MANIFEST_FILE).read_bytes()).get("import", {})
    except ValueError:
        return None
    if stored.get("plan") != plan.fingerprint():
        return None
    with open(out / QUARANTINE_FILE, encoding="utf-8", newline="") as file:
        rejected = tuple(Rejected(*row) for row in list(csv.reader(file))[1:])
    return Outcome(manifest, rejected, already_complete=True)


def _complete(
    plan: ImportPlan, out: pathlib.Path, written: Sequence[WrittenShard], rejected: Sequence[Rejected]
) -> None:
    table = _csv(_COLUMNS, ([facts[name] for name in _COLUMNS] for shard in written for facts in shard.facts))
    units = collections.Counter(facts["coords_unit"] for shard in written for facts in shard.facts)
    record = {
        "layout": plan.layout,
        "plan": plan.fingerprint(),
        "coords": plan.options.coords,
        "coords_units": {str(unit): count for unit, count in units.items()},
        "n_quarantined": len(rejected),
        "sources_sha256": hashlib.sha256(table).hexdigest(),
    }
    files = {SOURCES_FILE: table, QUARANTINE_FILE: _quarantine(rejected)}
    planned_writer.complete(out, {**plan.facts, "import": record}, written, files=files)


def _quarantine(rejected: Sequence[Rejected]) -> bytes:
    return _csv(Rejected._fields, rejected)


def _csv(header: Sequence[str], rows: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return text.getvalue().encode()


# --- shards, here or in processes


def _write(
    plan: ImportPlan, work: pathlib.Path, missing: Sequence[int], workers: int, progress: Progress
) -> Iterator[WrittenShard]:
    if workers <= 1 or len(missing) <= 1:
        for index in missing:
            yield write_planned_shard(plan, work, index, progress)
        return
    yield from _write_in_processes(plan, work, missing, min(workers, len(missing)), progress)


def _write_in_processes(
    plan: ImportPlan, work: pathlib.Path, missing: Sequence[int], workers: int, progress: Progress
) -> Iterator[WrittenShard]:
    # Fresh processes: h5py reads one file at a time within a process, and forking one with threads is unsafe.
    context = multiprocessing.get_context("spawn")
    tasks, results = context.SimpleQueue(), context.Queue()
    arguments = (plan, work, tasks, results, os.getpid())
    processes = [context.Process(target=_worker, args=arguments, daemon=True) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        for index in [*missing, *[None] * workers]:
            tasks.put(index)
        for _ in missing:
            yield _next_shard(results, processes, progress)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _next_shard(results: Any, processes: Sequence[Any], progress: Progress) -> WrittenShard:
    while True:
        try:
            item = results.get(timeout=1)
        except queue.Empty:
            dead = [process.exitcode for process in processes if process.exitcode]
            if dead:
                reason = "perhaps for want of memory: use fewer --workers; a repetition continues"
                raise StorageError(errno.EIO, f"a worker ended with exit code {dead[0]}, {reason}") from None
            continue
        if isinstance(item, WrittenShard):
            return item
        if isinstance(item, BaseException):
            raise item
        progress(item)


def _worker(plan: ImportPlan, work: pathlib.Path, tasks: Any, results: Any, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while (index := tasks.get()) is not None:
        try:
            results.put(write_planned_shard(plan, work, index, results.put))
        except Exception as error:
            results.put(error if isinstance(error, (OSError, ValueError)) else RuntimeError(repr(error)))
            return


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent was killed, so that it does not work on unseen."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _bags(plan: ImportPlan, index: int, progress: Progress) -> Iterator[Bag | Rejected]:
    """The slides of a shard; the next one is read in a thread while the last one is being written."""
    with ThreadPoolExecutor(1) as reader:
        waiting = collections.deque()
        for i in plan.shards[index]:
            waiting.append(reader.submit(_load, plan, plan.slides[i]))
            if len(waiting) > 1:
                yield waiting.popleft().result()
                progress(1)
        while waiting:
            yield waiting.popleft().result()
            progress(1)


def _load(plan: ImportPlan, slide: PlannedSlide) -> Bag | Rejected:
    source, facts = slide.source, slide.facts
    try:
        digest = sha256_file(plan.root / source.file)
        features, coords = reading.read(plan.root, source, facts, plan.options.coords, slide.level0_mpp)
        stored = _checked(plan, slide, features, coords)
    except Unusable as error:
        return Rejected(source.file, slide.slide_id, error.reason, error.detail)
    except OSError as error:
        return Rejected(source.file, slide.slide_id, "unreadable", error.strerror or type(error).__name__)
    recorded = plan.slide_facts(slide) | {"n_bytes": slide.n_bytes, "sha256": digest}
    recorded["coords_unit"] = _stored_unit(plan, facts.coords_unit)
    return Bag(slide.slide_id, slide.case_id, features, stored, source.file, {key: recorded[key] for key in _COLUMNS})


def _checked(plan: ImportPlan, slide: PlannedSlide, features: np.ndarray, coords: np.ndarray | None) -> np.ndarray:
    """The coordinates as stored, after the checks of every dataset."""
    dtype, block = shards.stored_dtype(plan.facts), plan.facts["chunk_patches"]
    try:
        bag.check_features(slide.slide_id, features, plan.facts["feat_dim"], dtype, block)
    except BagError as error:
        raise Unusable("not finite", str(error)) from error
    try:
        return bag.check_coords(slide.slide_id, coords, len(features))
    except BagError as error:
        raise Unusable("bad coords", str(error)) from error


def _stored_unit(plan: ImportPlan, unit: str | None) -> str | None:
    if unit is None or plan.options.coords == "drop":
        return None
    return unit if plan.options.coords == "as-recorded" else "level0_px"
