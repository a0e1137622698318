"""Writes a dataset whose shards were planned beforehand: in parallel, in any order, and resumable after a kill.

Each shard is a pure function of its plan and of its bags. It is written under a temporary name in the folder
`.importing`, then described by a small JSON file; a shard that has both is kept by the next attempt if its plan is
still the same. When all shards are there, they are renamed and the dataset is completed as by `DatasetWriter`: the same
format, and the same bytes whether or not the writing was interrupted and whatever the number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines import atomic, shards, tfds_face
from data_pipelines.errors import DataError
from data_pipelines.manifest import MANIFEST_FILE, Shard, Slide, sha256_file

WORK_FOLDER = ".importing"
SHARD_BYTES = 1 << 28
"""Smaller than DatasetWriter's: a shard is the unit of parallel work, and of what a kill can lose."""


class Bag(NamedTuple):
    """One slide on its way to a shard: ids, features [n, D], coords [n, 2] int32, source and facts about it (JSON)."""

    slide_id: str
    case_id: str
    features: np.ndarray
    coords: np.ndarray
    source: str
    facts: Mapping[str, Any]


class Entry(NamedTuple):
    """One row of the table of a dataset of any kind on its way to a shard.

    Attributes:
      row: (number of the shard, first record, number of records) -> the row, a dataclass.
      facts: about it (JSON).
      records: its serialised records.
    """

    row: Callable[[int, int, int], Any]
    facts: Mapping[str, Any]
    records: Iterable[bytes]


class Rejected(NamedTuple):
    """A slide or example that could not be read: its file, its id, a reason of few words, and details."""

    file: str
    slide_id: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """What is known about a finished shard; a shard whose slides were all rejected has no file (0 records).

    Attributes:
      index: number within the plan.
      key: SHA-256 (hex) of its plan.
      n_records, n_bytes, sha256: of the file.
      slides: rows of slides.csv (or of the table of another kind of dataset); `shard` is the number within the plan.
      facts: one mapping per slide.
      rejected: slides of the plan that are not in the file.
    """

    index: int
    key: str
    n_records: int
    n_bytes: int
    sha256: str
    slides: tuple[Any, ...]
    facts: tuple[Mapping[str, Any], ...]
    rejected: tuple[Rejected, ...]


def plan_shards(n_bytes: Sequence[int], limit: int = SHARD_BYTES) -> list[range]:
    """Assigns slides to shards in their order; a shard is closed before a slide would take it beyond the limit.

    Args:
      n_bytes: expected size of each slide in the dataset.
      limit: bytes per shard; a slide that is larger gets a shard of its own.

    Returns:
      Consecutive ranges of slides, one per shard.
    """
    ranges, start, filled = [], 0, 0
    for i, size in enumerate(n_bytes):
        if i > start and filled + size > limit:
            ranges.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*ranges, range(start, len(n_bytes))] if len(n_bytes) else []


def plan_key(content: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable plan."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


@contextlib.contextmanager
def work_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder of unfinished shards, locked against a second writer; temporaries of killed workers are removed.

    Raises:
      DataError: another process is writing this dataset.
      StorageError: the folder cannot be made.
    """
    work = directory / WORK_FOLDER
    with atomic.storage_errors(directory):
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            reason = "another process is writing this dataset"
            raise DataError(f"{directory}: {reason}; wait for it or choose another folder") from error
        with atomic.storage_errors(directory):
            atomic.remove_temporaries(work)
            atomic.remove_temporaries(directory)
        yield work


def write_shard(
    work: pathlib.Path, index: int, key: str, facts: Mapping[str, Any], bags: Iterable[Bag | Rejected]
) -> WrittenShard:
    """Writes one shard of bags and, last, its description.

    Args:
      work: from `work_folder`.
      index: number of the shard within the plan.
      key: `plan_key` of everything that decides the content of the shard.
      facts: from `shards.dataset_facts`.
      bags: the slides in the order of the plan; those rejected are only recorded.

    Returns:
      The description.

    Raises:
      StorageError: if the disk is full or not writable.
    """
    return write_entries(
        work, index, key, (item if isinstance(item, Rejected) else _bag_entry(facts, item) for item in bags)
    )


def _bag_entry(facts: Mapping[str, Any], item: Bag) -> Entry:
    def row(shard: int, first: int, count: int) -> Slide:
        return Slide(item.slide_id, item.case_id, shard, first, count, len(item.features), item.source)

    return Entry(row, item.facts, shards.bag_records(facts, item.slide_id, item.features, item.coords))


def write_entries(work: pathlib.Path, index: int, key: str, entries: Iterable[Entry | Rejected]) -> WrittenShard:
    """Writes one shard of a dataset of any kind and, last, its description.

    Args:
      work: from `work_folder`.
      index: number of the shard within the plan.
      key: `plan_key` of everything that decides the content of the shard.
      entries: in the order of the plan; those rejected are only recorded.

    Returns:
      The description.

    Raises:
      StorageError: if the disk is full or not writable.
    """
    # A name of its own: a worker orphaned by a kill, or a repetition on another host, may be writing the same shard.
    temporary = atomic.temporary(work, f"{_name(index)}-{os.getpid()}-{secrets.token_hex(4)}")
    rows, row_facts, rejected, n_records = [], [], [], 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(atomic.storage_errors(work))
        writer = None
        for item in entries:
            if isinstance(item, Rejected):
                rejected.append(item)
                continue
            if writer is None:
                writer = shards.open_shard(temporary)
            first = n_records
            for record in item.records:
                writer.write(record)
                n_records += 1
            rows.append(item.row(index, first, n_records - first))
            row_facts.append(dict(item.facts))
        n_bytes, sha256 = 0, ""
        if writer is not None:
            shards.close_shard(writer, temporary, n_records)
            n_bytes, sha256 = temporary.stat().st_size, sha256_file(temporary)
            os.replace(temporary, work / _name(index))
        done = WrittenShard(index, key, n_records, n_bytes, sha256, tuple(rows), tuple(row_facts), tuple(rejected))
        _describe(work, done)
    return done


def read_written(
    directory: pathlib.Path, index: int, key: str, row_type: type = Slide, tfds_name: str = tfds_face.TFDS_NAME
) -> WrittenShard | None:
    """The description of a shard that an earlier attempt finished by the same plan; None if it must be written.

    A shard that was already renamed when the attempt ended is brought back.

    Args:
      directory: the dataset.
      index: number of the shard within the plan.
      key: `plan_key` of its plan.
      row_type: dataclass of its rows.
      tfds_name: what the names of finished shards start with.
    """
    work = directory / WORK_FOLDER
    try:
        stored = json.loads((work / f"{_name(index)}.json").read_bytes())
    except (OSError, ValueError):
        return None
    if stored.get("key") != key:
        return None
    stored["slides"] = tuple(row_type(**row) for row in stored["slides"])
    stored["rejected"] = tuple(Rejected(*item) for item in stored["rejected"])
    done = WrittenShard(**{**stored, "facts": tuple(stored["facts"])})
    path = work / _name(index)
    if not done.n_records or (path.exists() and path.stat().st_size == done.n_bytes):
        return done
    if (directory / MANIFEST_FILE).exists():
        return None  # Those shards belong to a complete dataset, which stays readable until it is replaced.
    for moved in sorted(directory.glob(tfds_face.shard_glob(tfds_name))):
        if moved.stat().st_size == done.n_bytes and sha256_file(moved) == done.sha256:
            os.replace(moved, path)
            return done
    return None


def complete(
    directory: pathlib.Path,
    facts: Mapping[str, Any],
    written: Sequence[WrittenShard],
    *,
    files: Mapping[str, bytes] | None = None,
    obsolete: Collection[str] = (),
) -> None:
    """Gives all shards their final names, writes the metadata and removes the folder of unfinished shards.

    Args:
      directory: the dataset.
      facts: from `shards.dataset_facts`, possibly with further keys for manifest.json.
      written: the description of every shard of the plan, in order.
      files: further files by name.
      obsolete: names of files of an older version to be removed.

    Raises:
      DataError: no slide was written.
      StorageError: if the disk is full or not writable.
    """
    full = [shard for shard in written if shard.n_records]
    if not full:
        raise DataError(f"{directory}: no slide was written; a dataset needs at least one")
    staged, slides = [], []
    for number, shard in enumerate(full):
        staged.append(stage(directory, shard, tfds_face.shard_name(number, len(full))))
        slides += [dataclasses.replace(slide, shard=number) for slide in shard.slides]
    with finishing(directory):
        shards.complete(directory, facts, staged, slides, files=files, obsolete=obsolete)


def stage(directory: pathlib.Path, shard: WrittenShard, name: str) -> tuple[pathlib.Path, Shard]:
    """Where a finished shard lies, and its manifest entry under its final name."""
    return directory / WORK_FOLDER / _name(shard.index), Shard(name, shard.n_records, shard.n_bytes, shard.sha256)


@contextlib.contextmanager
def finishing(directory: pathlib.Path) -> Iterator[None]:
    """Wraps the completion of a dataset; afterwards the folder of unfinished shards is removed.

    Raises:
      StorageError: if the disk is full or not writable.
    """
    with atomic.storage_errors(directory):
        yield
        shutil.rmtree(directory / WORK_FOLDER, ignore_errors=True)


def _name(index: int) -> str:
    return f"shard-{index:05d}"


def _describe(work: pathlib.Path, shard: WrittenShard) -> None:
    name = f"{_name(shard.index)}.json"
    content = json.dumps(dataclasses.asdict(shard), allow_nan=False).encode()
    os.replace(atomic.write_temporary(work, f"{name}-{secrets.token_hex(8)}", content), work / name)
    atomic.sync(work)
