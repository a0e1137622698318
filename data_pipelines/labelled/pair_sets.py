"""Pair data sets (`histokd pairs`) as labelled patches: their images, or the partners of these, and their vectors."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.patches import REFUSE, LabelledPatches, Row, columns, digest_of, kept_rows
from data_pipelines.pairs.reader import PairReader

IMAGE, PARTNER = "image", "partner"
INPUTS = (IMAGE, PARTNER)
VECTOR = "vector"


def read_pair_set(directory: pathlib.Path, *, which: str = IMAGE, unlabelled: str = REFUSE) -> LabelledPatches:
    """Opens a pair data set.

    Args:
      directory: the data set.
      which: "image" (H&E), or "partner": the privileged view, as an upper reference.
      unlabelled: see `patches.kept_rows`.

    Returns:
      The patches; vectors of the examples are its array "vector".

    Raises:
      DataError: no labels, partners missing, or see `patches`.
    """
    if which not in INPUTS:
        raise DataError(f"--input {which}: choose one of {INPUTS}")
    reader = PairReader(directory)
    manifest = reader.manifest
    names = manifest.class_names
    rows = [Row(e.example_id, names[e.label] if e.label >= 0 else "", e.group, e.split) for e in manifest.examples]
    kept, note = kept_rows(rows, f"data set {manifest.name}", unlabelled)
    chosen = [manifest.examples[row] for row in kept]
    if which == PARTNER and not all(example.has_partner for example in chosen):
        first = next(example.example_id for example in chosen if not example.has_partner)
        raise DataError(f"data set {manifest.name}: example {first!r} has no partner image; probe --input {IMAGE}")
    digest, vectors = [], []
    for row in kept:  # One by one: the encoded images of a large set need not fit in memory.
        record = reader.read_record(int(row))
        digest.append(digest_of(record.image if which == IMAGE else record.partner))
        vectors.append(record.vector)
    complete = manifest.vector_size > 0 and all(example.has_vector for example in chosen)
    return LabelledPatches(
        name=manifest.name,
        **columns([rows[row] for row in kept], f"data set {manifest.name}", names),
        digest=tuple(digest),
        arrays={VECTOR: np.stack(vectors).astype(np.float32)} if complete else {},
        read=_reader(reader, kept, which),
        simulated=manifest.simulated,
        notes=note,
    )


def _reader(reader: PairReader, kept: np.ndarray, which: str) -> Callable[[int], np.ndarray]:
    def read(row: int) -> np.ndarray:
        found = reader.read(int(kept[row]), partner=which == PARTNER)
        return found.image if which == IMAGE else found.partner

    return read
