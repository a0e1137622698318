"""Writes a dataset: chunk records in ArrayRecord shards, slides.csv, TFDS metadata and, last of all, manifest.json.

Everything goes to temporary names first, is flushed to disk and then renamed. A writer that fails or is killed leaves
nothing that `Manifest.load` accepts, and an existing dataset stays readable until its replacement is complete on disk.
Equal input gives equal bytes: no file holds a time, a host or a path. One writer per directory at a time.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines import atomic, bag, shards, tfds_face
from data_pipelines.errors import BagError, DataError, DatasetExistsError
from data_pipelines.manifest import MANIFEST_FILE, Slide

SHARD_BYTES = 1 << 30


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
        self._facts = shards.dataset_facts(
            name=name,
            feat_dim=feat_dim,
            dtype=dtype,
            seed=seed,
            encoder=encoder,
            mpp=mpp,
            magnification=magnification,
            patch_size_level0=patch_size_level0,
            simulated=simulated,
            simulation=simulation,
            notes=notes,
            chunk_patches=chunk_patches,
        )
        self._directory = pathlib.Path(directory)
        if (self._directory / MANIFEST_FILE).exists() and not overwrite:
            fix = "choose another directory or pass overwrite=True"
            raise DatasetExistsError(f"{self._directory} holds a complete dataset; {fix}")
        self._dtype, self._chunk = shards.stored_dtype(self._facts), self._facts["chunk_patches"]
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
        n_records = 0
        for record in shards.bag_records(self._facts, slide_id, features, coords):
            self._shard.write(record)
            self._filled += len(record)
            n_records += 1
        return n_records

    def _shard_file(self, index: int) -> pathlib.Path:
        return atomic.temporary(self._directory, f"shard-{index:05d}")

    def _start_shard_if_full(self, n_bytes: int) -> None:
        if self._shard is not None and self._filled + n_bytes <= self._shard_bytes:
            return
        self._close_shard()
        self._shard = shards.open_shard(self._shard_file(len(self._counts)))
        self._counts.append(0)
        self._filled = 0

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        shard, self._shard = self._shard, None
        shards.close_shard(shard, self._shard_file(len(self._counts) - 1), self._counts[-1])

    def _finish(self) -> None:
        self._close_shard()
        if not self._slides:
            raise DataError(f"{self._directory}: no slide was added; a dataset needs at least one")
        names = [tfds_face.shard_name(i, len(self._counts)) for i in range(len(self._counts))]
        files = [self._shard_file(i) for i in range(len(self._counts))]
        staged = [(file, shards.describe_shard(file, *entry)) for file, *entry in zip(files, names, self._counts)]
        shards.complete(self._directory, self._facts, staged, self._slides)

    def _abandon(self) -> None:
        """Drops what was written; errors are ignored because the one that led here matters more."""
        shard, self._shard = self._shard, None
        with contextlib.suppress(RuntimeError):
            if shard is not None:
                shard.close()
        with contextlib.suppress(OSError):
            atomic.remove_temporaries(self._directory)
