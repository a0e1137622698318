"""The host side: reader threads decode tiles ahead of the device, within a bounded number of batches."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from histokd_jax.embed.embedder import Embedder
from histokd_jax.embed.tiles import TileSource
from histokd_jax.embed.transform import Stain

GROUP = 8
"""Tiles that a thread decodes before it takes the next task."""
IN_FLIGHT = 2
"""Steps that the device may be behind the reader of results."""

Progress = Callable[[int], None]
"""Called with the number of tiles that were embedded since the last call."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The tiles of one slide that is to be embedded.

    Attributes:
      index: of the slide, given back with its embeddings.
      count: number of tiles, at least 1.
      edge: of a tile in pixels.
      open: opens the tiles.
    """

    index: int
    count: int
    edge: int
    open: Callable[[], TileSource]


@dataclasses.dataclass(frozen=True, eq=False)
class _Batch:
    """A batch that is being decoded; its rows beyond `count` are black."""

    job: Job
    start: int
    count: int
    tiles: np.ndarray
    source: Future
    sample: Future | None
    parts: Sequence[Future]

    @property
    def last(self) -> bool:
        return self.start + self.count == self.job.count


def embed_jobs(
    jobs: Sequence[Job], embedder: Embedder, *, threads: int, ahead: int = 4, progress: Progress | None = None
) -> Iterator[tuple[int, np.ndarray | DataError]]:
    """Embeds slides one after the other, without a pause between them.

    Batches never mix slides, so what a slide gives does not depend on the others.

    Args:
      jobs: the slides.
      embedder: the encoder on its devices.
      threads: that decode.
      ahead: batches that may be decoded or waiting.
      progress: called after every step.

    Yields:
      (index of the job, float32 [count, features], or the error for which its tiles cannot be read), in order.
    """
    running: collections.deque = collections.deque()
    rows: dict[int, np.ndarray] = {}
    failed: set[int] = set()
    stain, parameters = embedder.stain, None
    fitted = stain.tiles if stain is not None else 0
    with contextlib.closing(_decoded(jobs, embedder.batch, threads, ahead, fitted)) as batches:
        for batch, error in batches:
            if error is None and batch.start == 0 and stain is not None:
                parameters, error = _fit(stain, batch.sample.result())
            if error is not None:
                if batch.job.index not in failed:
                    yield from _drain(running, rows, progress)
                    failed.add(batch.job.index)
                    rows.pop(batch.job.index, None)
                    yield batch.job.index, error
                continue
            if batch.job.index in failed:
                continue
            running.append((batch, embedder(batch.tiles, parameters)))
            if len(running) > IN_FLIGHT:
                yield from _collect(running, rows, progress)
        yield from _drain(running, rows, progress)


def _fit(stain: Stain, sample: np.ndarray) -> tuple[Any, DataError | None]:
    try:
        return stain.fit(sample), None
    except DataError as error:
        return None, error


def _drain(running: collections.deque, rows: dict, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
    while running:
        yield from _collect(running, rows, progress)


def _collect(running: collections.deque, rows: dict, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
    """Waits for the oldest step; yields its slide if that is complete."""
    batch, result = running.popleft()
    job = batch.job
    found = np.asarray(result)[: batch.count]
    rows.setdefault(job.index, np.empty((job.count, found.shape[1]), np.float32))
    rows[job.index][batch.start : batch.start + batch.count] = found
    if progress is not None:
        progress(batch.count)
    if batch.last:
        yield job.index, rows.pop(job.index)


def _decoded(
    jobs: Sequence[Job], size: int, threads: int, ahead: int, fitted: int
) -> Iterator[tuple[_Batch, DataError | None]]:
    """Batches in order, each when all its tiles are there; with the error if one could not be read."""
    with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:
        waiting: collections.deque[_Batch] = collections.deque()
        try:
            for batch in _submitted(jobs, size, pool, fitted):
                waiting.append(batch)
                if len(waiting) >= max(1, ahead):
                    yield _ready(waiting.popleft())
            while waiting:
                yield _ready(waiting.popleft())
        finally:
            for batch in waiting:
                for part in batch.parts:
                    part.cancel()
            pool.shutdown(cancel_futures=True)
            for source in {batch.source for batch in waiting}:
                _close(source)


def _submitted(jobs: Sequence[Job], size: int, pool: ThreadPoolExecutor, fitted: int) -> Iterator[_Batch]:
    """Hands out the work; the next slide is opened while the last is being read."""
    following = pool.submit(jobs[0].open) if jobs else None
    try:
        for job, after in zip(jobs, [*jobs[1:], None]):
            source, following = following, pool.submit(after.open) if after is not None else None
            sample = pool.submit(_sample, source, job, fitted) if fitted else None
            for start in range(0, job.count, size):
                count = min(size, job.count - start)
                tiles = np.zeros((size, job.edge, job.edge, 3), np.uint8)
                parts = [
                    pool.submit(_decode, source, start + i, tiles[i : min(i + GROUP, count)])
                    for i in range(0, count, GROUP)
                ]
                yield _Batch(job, start, count, tiles, source, sample, parts)
    finally:  # Broken off: nobody will use the slide that was opened ahead.
        if following is not None:
            _close(following)


def _decode(source: Future, start: int, out: np.ndarray) -> None:
    # The future of the source was submitted before this task, so a thread has taken it and waiting cannot block all.
    tiles = source.result()
    for i in range(len(out)):
        out[i] = tiles.read(start + i)


def _sample(source: Future, job: Job, wanted: int) -> np.ndarray:
    """uint8 [T, h, h, 3]: tiles evenly spread over a slide."""
    tiles = source.result()
    chosen = np.unique(np.linspace(0, job.count - 1, min(wanted, job.count)).round().astype(int))
    return np.stack([tiles.read(int(i)) for i in chosen])


def _ready(batch: _Batch) -> tuple[_Batch, DataError | None]:
    error = None
    for part in [*batch.parts, *([batch.sample] if batch.sample is not None else [])]:
        try:
            part.result()
        except DataError as problem:
            error = error or problem
    if batch.last:
        _close(batch.source)
    return batch, error


def _close(source: Future) -> None:
    if not source.cancel() and source.exception() is None:
        source.result().close()
