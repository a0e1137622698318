"""Random access to the examples of a pair dataset, decoded on the calling thread."""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines.errors import DataError, ShardReadError
from data_pipelines.manifest import open_shard
from data_pipelines.pairs import codec, pixels
from data_pipelines.pairs.manifest import PairManifest


class PairPixels(NamedTuple):
    """One example.

    Attributes:
      image: [H, W, 3] uint8.
      partner: [H, W, 3] uint8, or None.
      vector: [P] float32, or None.
    """

    image: np.ndarray
    partner: np.ndarray | None
    vector: np.ndarray | None


class PairReader:
    """Reads examples of a pair dataset. Thread-safe; pickles as its manifest and opens shards lazily.

    Every record is checked against the manifest on every read, its CRC-32 on the first read by this reader.

    Args:
      dataset: directory or manifest.
      verify: whether to check the CRC-32.

    Attributes:
      manifest: the manifest of the dataset.

    Raises:
      ManifestError: the dataset is incomplete or inconsistent.
      ShardReadError: a shard is missing, cut short, or holds another number of records than the manifest says.
    """

    def __init__(self, dataset: str | os.PathLike[str] | PairManifest, *, verify: bool = True):
        self.manifest = dataset if isinstance(dataset, PairManifest) else PairManifest.load(dataset)
        self.manifest.check_shards()
        self._verify = verify
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[int, ArrayRecordReader] = {}
        self._checked = np.zeros(len(self.manifest.examples), bool)

    def __getstate__(self) -> dict[str, Any]:
        return {"manifest": self.manifest, "_verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, row: int, *, partner: bool = True) -> PairPixels:
        """One example.

        Args:
          row: of the example in the manifest.
          partner: False does not decode the partner image.

        Raises:
          DataError: there is no such row.
          ShardReadError: the record cannot be read, or is not the one that the manifest promises.
        """
        record = self.read_record(row)
        entry = self.manifest.examples[row]
        try:
            image = self._decode(record.image)
            other = self._decode(record.partner) if partner and record.partner is not None else None
        except ValueError as error:
            raise self._error(entry, error) from error
        return PairPixels(image, other, record.vector if entry.has_vector else None)

    def read_record(self, row: int) -> codec.PairRecord:
        """The record of an example, images still encoded; see `read`."""
        if not 0 <= row < len(self.manifest.examples):
            n = len(self.manifest.examples)
            raise DataError(f"dataset {self.manifest.directory}: example {row} does not exist, it has {n} examples")
        entry = self.manifest.examples[row]
        try:
            (data,) = self._shard(entry.shard).read([entry.record])
            verify = self._verify and not self._checked[row]
            record = codec.decode(data, self.manifest.contents, verify=verify)
            found = (record.example_id, record.group, record.label, int(record.partner is not None))
            expected = (entry.example_id, entry.group, entry.label, entry.has_partner)
            if found != expected:
                raise ValueError(
                    f"manifest and shard disagree: the record holds (example, group, label, partner) = {found}, the "
                    f"manifest says {expected}"
                )
        except ShardReadError:
            raise
        except (RuntimeError, ValueError) as error:
            raise self._error(entry, error) from error
        self._checked[row] = True
        return record

    def _decode(self, data: bytes) -> np.ndarray:
        image = pixels.decode(data)
        if image.shape[:2] != self.manifest.image_size:
            raise ValueError(f"an image has {image.shape[:2]} pixels, the manifest says {self.manifest.image_size}")
        return image

    def _error(self, entry: Any, error: Exception) -> ShardReadError:
        manifest = self.manifest
        return ShardReadError(manifest.directory, manifest.shards[entry.shard].file, entry.record, str(error))

    def _shard(self, index: int) -> ArrayRecordReader:
        reader = self._readers.get(index)
        if reader is None:
            with self._lock:
                reader = self._readers.get(index) or open_shard(self.manifest, index)
                self._readers[index] = reader
        return reader
