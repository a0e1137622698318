"""Samples of several slides: all slides of a patient, read one after the other, as one bag."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.assembler import Reader
from data_pipelines.manifest import Manifest, Slide

SEPARATOR = ";"
"""Between the slide ids of a sample in tables."""


class SampleReader:
    """Shows every sample as one bag: the patches of its slides in the given order, positions continuing over them.

    Planners, assembler and resident cohort see a manifest with one row per sample, so that they need not know about
    slides. Reading a part of a sample (`data.max_patches_train`) takes a run of that order, modulo its end.

    Args:
      reader: reads the slides; its manifest is the data set's.
      slides: manifest rows of each sample, at least one each.

    Attributes:
      manifest: one row per sample; name, width and dtype are the data set's, the fingerprint covers the composition.

    Raises:
      ValueError: a sample without slides.
    """

    def __init__(self, reader: Reader, slides: Sequence[Sequence[int]]):
        if not all(len(rows) for rows in slides):
            raise ValueError(f"sample {[len(rows) for rows in slides].index(0)} has no slide; expected at least one")
        self._reader = reader
        self._slides = tuple(tuple(int(row) for row in rows) for rows in slides)
        sizes = np.asarray(reader.manifest.sizes)
        # First patch of each slide within its sample, and the end.
        self._starts = [np.concatenate([[0], np.cumsum(sizes[list(rows)])]) for rows in self._slides]
        self.manifest = _sample_manifest(reader.manifest, self._slides)

    def read_into(
        self, sample: int, start: int, count: int, out: np.ndarray, coords_out: np.ndarray | None = None
    ) -> None:
        """Fills `out` with patches start, start + 1, ..., start + count - 1 of a sample, modulo its bag size.

        Args:
          sample: number of the sample.
          start: first patch.
          count: number of patches.
          out: [count, D], written in place.
          coords_out: [count, 2] int32 or None, written in place.
        """
        for slide, first, low, high in self.pieces(sample, start, count):
            coords = None if coords_out is None else coords_out[low:high]
            self._reader.read_into(slide, first, high - low, out[low:high], coords)

    def slide_numbers(self, sample: int, positions: np.ndarray) -> np.ndarray:
        """[n] int64 which of its slides, counted from 0, holds each patch of a sample.

        Args:
          sample: number of the sample.
          positions: [n] int, index of each patch within the sample.
        """
        return np.searchsorted(self._starts[sample], positions, side="right") - 1

    def pieces(self, sample: int, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """The slides that a run of patches covers.

        Yields:
          (manifest row, first patch within the slide, first and last + 1 place within the run).
        """
        starts, done = self._starts[sample], 0
        at = start % int(starts[-1])
        while done < count:
            number = int(np.searchsorted(starts, at, side="right")) - 1
            taken = min(count - done, int(starts[number + 1]) - at)
            yield self._slides[sample][number], at - int(starts[number]), done, done + taken
            done, at = done + taken, (at + taken) % int(starts[-1])


def _sample_manifest(manifest: Manifest, slides: Sequence[Sequence[int]]) -> Manifest:
    """The data set's manifest with one row per sample in place of its slides."""
    composition = json.dumps([manifest.slides_sha256, slides]).encode()
    rows = []
    for members in slides:
        found = [manifest.slides[row] for row in members]
        # The place in the shards means nothing for a sample: its reader asks for the slides themselves.
        rows.append(
            Slide(
                slide_id=SEPARATOR.join(slide.slide_id for slide in found),
                case_id=found[0].case_id,
                shard=-1,
                first_record=-1,
                n_records=sum(slide.n_records for slide in found),
                n_patches=sum(slide.n_patches for slide in found),
            )
        )
    return dataclasses.replace(manifest, slides=tuple(rows), slides_sha256=hashlib.sha256(composition).hexdigest())
