"""Writes a dataset: chunk records in ArrayRecord shards, slides.csv, TFDS metadata and, last of all, manifest.json.

Everything goes to temporary names first, is flushed to disk and then renamed. A writer that fails or is killed leaves
nothing that `Manifest.load` accepts, and an existing dataset stays readable until its replacement is complete on disk.
Equal input gives equal bytes: no file holds a time, a host or a path. One writer per directory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines import atomic, bag, codec, schema, tfds_face
from data_pipelines.errors import BagError, DataError, DatasetExistsError
from data_pipelines.manifest import MANIFEST_FILE, SLIDES_FILE, Shard, Slide, manifest_bytes, sha256_file, slides_bytes

SHARD_BYTES = 1 << 30
_WRITER_OPTIONS = "group_size:1,uncompressed"


class DatasetWriter:
    """Context manager that writes one dataset; leaving it without an exception makes the dataset complete.

    Args:
      directory: target folder; created if missing. Other files in it (such as `tables/`) are left alone.
      name: dataset name.
      feat_dim: embedding width D.
      dtype: stored dtype, "float16" or "float32".
      seed: seed of the permutation of patches within each slide.
      encoder: facts about the patch encoder (name, licence, ...), JSON-serialisable.
      mpp: micrometres per pixel at which patches were read.
      magnification: objective magnification.
      patch_size_level0: patch edge in level-0 pixels.
      simulated: whether the bags are simulated.
      simulation: parameters of the simulation, JSON-serialisable.
      notes: free text.
      shard_bytes: a shard is closed before a slide would take it beyond this; a slide never spans shards.
      chunk_patches: patches per record; by default about 256 KiB of payload.
      overwrite: replace a complete dataset in `directory`.

    Raises:
      DatasetExistsError: if the directory holds a complete dataset and `overwrite` is False.
      DataError: if an argument is out of range.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        name: str,
        feat_dim: int,
        dtype: str = "float16",
        seed: int = 0,
        encoder: Mapping[str, Any] | None = None,
        mpp: float | None = None,
        magnification: float | None = None,
        patch_size_level0: float | None = None,
        simulated: bool = False,
        simulation: Mapping[str, Any] | None = None,
        notes: str = "",
        shard_bytes: int = SHARD_BYTES,
        chunk_patches: int | None = None,
        overwrite: bool = False,
    ):
        self._facts = {
            "name": name,
            "feat_dim": feat_dim,
            "dtype": dtype,
            "chunk_patches": _chunk_patches(feat_dim, dtype, chunk_patches),
            "seed": int(seed),
            "encoder": encoder,
            "mpp": mpp,
            "magnification": magnification,
            "patch_size_level0": patch_size_level0,
            "simulated": bool(simulated),
            "simulation": simulation,
            "notes": notes,
        }
        _check_json(self._facts)
        self._directory = pathlib.Path(directory)
        if (self._directory / MANIFEST_FILE).exists() and not overwrite:
            fix = "choose another directory or pass overwrite=True"
            raise DatasetExistsError(f"{self._directory} holds a complete dataset; {fix}")
        self._dtype, self._chunk = np.dtype(schema.FEATURE_DTYPES[dtype]), self._facts["chunk_patches"]
        self._shard_bytes = shard_bytes
        self._slides: list[Slide] = []
        self._keys: set[str] = set()
        self._counts: list[int] = []
        self._shard: ArrayRecordWriter | None = None
        self._filled = 0

    def __enter__(self) -> Self:
        with atomic.storage_errors(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            atomic.remove_temporaries(self._directory)
        return self

    def add(
        self, slide_id: str, case_id: str, features: np.ndarray, coords: np.ndarray | None = None, source: str = ""
    ) -> None:
        """Stores one bag. A bag that is refused leaves the dataset as it was.

        Args:
          slide_id: unique key; no path separators or control characters.
          case_id: patient the slide belongs to; same rules, need not be unique.
          features: [n, D] floating point; cast to the stored dtype.
          coords: [n, 2] integers that fit int32 (level-0 pixels), or None; then -1 is stored.
          source: where the slide came from (free text).

        Raises:
          BagError: if the bag is empty, has another width, holds NaN, Inf or values beyond the stored dtype, or a key
            is malformed or already taken.
          StorageError: if the disk is full or not writable.
        """
        bag.check_key(slide_id, "slide_id", slide_id)
        bag.check_key(case_id, "case_id", slide_id)
        if slide_id in self._keys:
            raise BagError(f"slide {slide_id!r} was added before; slide ids must be unique within a dataset")
        features = np.asarray(features)
        bag.check_features(slide_id, features, self._facts["feat_dim"], self._dtype, self._chunk)
        coords = bag.check_coords(slide_id, coords, len(features))
        with atomic.storage_errors(self._directory):
            self._start_shard_if_full(features.size * self._dtype.itemsize)
            n_records = self._write_bag(slide_id, features, coords)
        shard = len(self._counts) - 1
        self._slides.append(Slide(slide_id, case_id, shard, self._counts[-1], n_records, len(features), source))
        self._keys.add(slide_id)
        self._counts[-1] += n_records

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with atomic.storage_errors(self._directory):
                self._finish()
        except BaseException:
            self._abandon()
            raise

    def _write_bag(self, slide_id: str, features: np.ndarray, coords: np.ndarray) -> int:
        order = bag.permutation(self._facts["seed"], slide_id, len(features))
        starts = range(0, len(order), self._chunk)
        for chunk, start in enumerate(starts):
            rows = order[start : start + self._chunk]
            record = codec.encode(features[rows].astype(self._dtype, copy=False), coords[rows], slide_id, chunk)
            self._shard.write(record)
            self._filled += len(record)
        return len(starts)

    def _shard_file(self, index: int) -> pathlib.Path:
        return atomic.temporary(self._directory, f"shard-{index:05d}")

    def _start_shard_if_full(self, n_bytes: int) -> None:
        if self._shard is not None and self._filled + n_bytes <= self._shard_bytes:
            return
        self._close_shard()
        path = self._shard_file(len(self._counts))
        path.touch()  # Fails with a precise OSError where ArrayRecord would raise a bare RuntimeError.
        self._shard = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._counts.append(0)
        self._filled = 0

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        shard.close()
        path = self._shard_file(len(self._counts) - 1)
        reader = ArrayRecordReader(str(path))
        written = reader.num_records()
        reader.close()
        if written != self._counts[-1]:
            reason = f"a closed shard holds {written} records, {self._counts[-1]} belong to complete slides"
            raise OSError(errno.EIO, reason)
        atomic.sync(path)

    def _finish(self) -> None:
        self._close_shard()
        if not self._slides:
            raise DataError(f"{self._directory}: no slide was added; a dataset needs at least one")
        stale = set(self._directory.glob(tfds_face.SHARD_GLOB))
        names = [tfds_face.shard_name(i, len(self._counts)) for i in range(len(self._counts))]
        moves = {self._shard_file(i): self._directory / name for i, name in enumerate(names)}
        shards = [
            Shard(target.name, n_records, path.stat().st_size, sha256_file(path))
            for (path, target), n_records in zip(moves.items(), self._counts)
        ]
        slides = slides_bytes(self._slides)
        files = tfds_face.metadata(self._facts["name"], self._facts["feat_dim"], self._dtype.name, shards)
        for name, content in {**files, SLIDES_FILE: slides}.items():
            moves[atomic.write_temporary(self._directory, name, content)] = self._directory / name
        manifest = atomic.write_temporary(self._directory, MANIFEST_FILE, self._manifest(shards, slides))
        atomic.publish(moves, (manifest, self._directory / MANIFEST_FILE), stale)

    def _manifest(self, shards: list[Shard], slides: bytes) -> bytes:
        totals = {
            "shards": [dataclasses.asdict(shard) for shard in shards],
            "n_slides": len(self._slides),
            "n_patches": sum(slide.n_patches for slide in self._slides),
            "slides_sha256": hashlib.sha256(slides).hexdigest(),
        }
        return manifest_bytes(self._facts | totals)

    def _abandon(self) -> None:
        """Drops what was written; errors are ignored because the one that led here matters more."""
        shard, self._shard = self._shard, None
        with contextlib.suppress(RuntimeError):
            if shard is not None:
                shard.close()
        with contextlib.suppress(OSError):
            atomic.remove_temporaries(self._directory)


def _chunk_patches(feat_dim: int, dtype: str, wanted: int | None) -> int:
    if feat_dim < 1 or dtype not in schema.FEATURE_DTYPES:
        known = sorted(schema.FEATURE_DTYPES)
        raise DataError(f"feat_dim is {feat_dim} and dtype is {dtype!r}, expected at least 1 and one of {known}")
    chunk = schema.chunk_patches(feat_dim, dtype) if wanted is None else int(wanted)
    n_bytes = chunk * feat_dim * np.dtype(schema.FEATURE_DTYPES[dtype]).itemsize
    if chunk < 1 or n_bytes > codec.MAX_BYTES:
        limit = codec.MAX_BYTES
        raise DataError(f"chunk_patches is {chunk} ({n_bytes} bytes), expected at least 1 and at most {limit} bytes")
    return chunk


def _check_json(facts: Mapping[str, Any]) -> None:
    try:
        manifest_bytes(facts)
    except (TypeError, ValueError) as error:
        reason = "the facts about a dataset (encoder, simulation, mpp, ...) must be JSON-serialisable, without NaN"
        raise DataError(f"{reason}: {error}") from error
