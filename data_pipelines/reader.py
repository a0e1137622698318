"""Random access to bags: any run of patches, read chunk by chunk straight into the caller's buffer."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines import codec
from data_pipelines.errors import DataError, ShardReadError
from data_pipelines.manifest import Manifest, Slide, open_shard
from data_pipelines.schema import FEATURE_DTYPES


class BagReader:
    """Reads patches of any bag of a dataset. Thread-safe; pickles as its manifest and opens shards lazily.

    Every record is checked against the manifest (slide, chunk number, patch count) on every read. ArrayRecord checks
    its own block hash; the framing and, with `verify`, the CRC-32 of the content are checked as well, on the first read
    of a record by this reader only, so that later epochs do not pay for it.

    Args:
      dataset: directory or manifest.
      verify: whether to check the CRC-32.

    Attributes:
      manifest: the manifest of the dataset.

    Raises:
      ManifestError: if the dataset is incomplete or inconsistent.
      ShardReadError: if a shard is missing, cut short, or holds another number of records than the manifest says.
    """

    def __init__(self, dataset: str | os.PathLike[str] | Manifest, *, verify: bool = True):
        self.manifest = dataset if isinstance(dataset, Manifest) else Manifest.load(dataset)
        self.manifest.check_shards()
        self._verify = verify
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[int, ArrayRecordReader] = {}
        # One flag per record, set after its first check. Threads may both check a record; neither can skip one.
        self._checked = [np.zeros(shard.n_records, bool) for shard in self.manifest.shards]
        self._stored = np.dtype(FEATURE_DTYPES[self.manifest.dtype]).newbyteorder("<")
        self._keys: dict[str, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "_verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read_into(
        self, slide: int, start: int, count: int, out: np.ndarray, coords_out: np.ndarray | None = None
    ) -> None:
        """Fills `out` with stored patches start, start + 1, ..., start + count - 1, modulo the bag size.

        Patches are stored in random order, so any run is a uniform sample without replacement (up to the bag size).
        Reads only the records it needs.

        Args:
          slide: row of the slide in the manifest.
          start: first stored patch; taken modulo the bag size.
          count: number of patches, may exceed the bag size.
          out: [count, D], written in place and cast to its dtype.
          coords_out: [count, 2] int32 or None, written in place.

        Raises:
          DataError: if the slide does not exist or a buffer has the wrong shape.
          ShardReadError: if a record cannot be read or is not the one the manifest promises.
        """
        self._check_request(slide, count, out, coords_out)
        entry = self.manifest.slides[slide]
        size, chunk_patches = entry.n_patches, self.manifest.chunk_patches
        at, done, distinct = start % size, 0, min(count, size)
        while done < distinct:
            chunk, skip = divmod(at, chunk_patches)
            patches, coords = self._read_chunk(entry, chunk)
            take = min(len(patches) - skip, distinct - done)
            out[done : done + take] = patches[skip : skip + take]
            if coords_out is not None:
                coords_out[done : done + take] = coords[skip : skip + take]
            done, at = done + take, (at + take) % size
        for buffer in (out, coords_out):
            if buffer is not None:
                _repeat_rows(buffer, size, count)

    def slide_numbers(self, slide: int, positions: np.ndarray) -> None:
        """Every bag is one slide (see `samples.SampleReader.slide_numbers`)."""

    def read_bag(self, slide: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a whole bag in stored order.

        Args:
          slide: row of the slide in the manifest.

        Returns:
          features [n, D] in the stored dtype and coords [n, 2] int32.

        Raises:
          DataError: if the slide does not exist.
          ShardReadError: if a record cannot be read or is not the one the manifest promises.
        """
        self._check_slide(slide)
        n = self.manifest.slides[slide].n_patches
        features, coords = np.empty((n, self.manifest.feat_dim), self.manifest.dtype), np.empty((n, 2), np.int32)
        self.read_into(slide, 0, n, features, coords)
        return features, coords

    def _check_slide(self, slide: int) -> None:
        if not 0 <= slide < len(self.manifest.slides):
            n = len(self.manifest.slides)
            raise DataError(f"dataset {self.manifest.directory}: slide {slide} does not exist, it has {n} slides")

    def _check_request(self, slide: int, count: int, out: np.ndarray, coords_out: np.ndarray | None) -> None:
        self._check_slide(slide)
        if count < 0 or out.shape != (count, self.manifest.feat_dim):
            raise DataError(
                f"out has shape {out.shape}, expected [{count}, {self.manifest.feat_dim}] "
                f"(the embedding width of dataset {self.manifest.directory})"
            )
        if coords_out is not None and coords_out.shape != (count, 2):
            raise DataError(f"coords_out has shape {coords_out.shape}, expected [{count}, 2]")

    def _shard(self, index: int) -> ArrayRecordReader:
        reader = self._readers.get(index)
        if reader is None:
            with self._lock:
                reader = self._readers.get(index) or open_shard(self.manifest, index)
                self._readers[index] = reader
        return reader

    def _read_chunk(self, entry: Slide, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        manifest, index = self.manifest, entry.first_record + chunk
        checked = self._checked[entry.shard]
        try:
            (data,) = self._shard(entry.shard).read([index])
            if checked[index]:
                n, key = min(manifest.chunk_patches, entry.n_patches - chunk * manifest.chunk_patches), self._key(entry)
                found = codec.decode_known(data, n, manifest.feat_dim, self._stored, key, chunk)
                if found is not None:
                    return found
            record = codec.decode(data, manifest.feat_dim, manifest.dtype, verify=self._verify)
            _check_identity(record, entry, chunk, manifest.chunk_patches)
        except ShardReadError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ShardReadError(manifest.directory, manifest.shards[entry.shard].file, index, str(error)) from error
        checked[index] = True
        return record.patches, record.coords

    def _key(self, entry: Slide) -> bytes:
        key = self._keys.get(entry.slide_id)
        if key is None:
            key = self._keys[entry.slide_id] = entry.slide_id.encode()
        return key


def _check_identity(record: codec.ChunkRecord, entry: Slide, chunk: int, chunk_patches: int) -> None:
    n = min(chunk_patches, entry.n_patches - chunk * chunk_patches)
    found, expected = (record.slide_id, record.chunk, len(record.patches)), (entry.slide_id, chunk, n)
    if found != expected:
        raise ValueError(
            f"manifest and shard disagree: the record holds (slide, chunk, patches) = {found}, the manifest "
            f"says {expected}"
        )


def _repeat_rows(buffer: np.ndarray, size: int, count: int) -> None:
    """Rows size, size + 1, ... become copies of rows 0, 1, ... so that a bag is read from disk at most once."""
    for at in range(size, count, size):
        buffer[at : at + size] = buffer[: min(size, count - at)]
