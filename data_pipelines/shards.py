"""What both dataset writers share: facts of a dataset, records of a bag, closing a shard, completing a folder."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines import atomic, bag, codec, schema, tfds_face
from data_pipelines.errors import DataError
from data_pipelines.manifest import MANIFEST_FILE, SLIDES_FILE, Shard, Slide, manifest_bytes, sha256_file, slides_bytes

_WRITER_OPTIONS = "group_size:1,uncompressed"


def dataset_facts(
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
    chunk_patches: int | None = None,
) -> dict[str, Any]:
    """The dataset-level fields of manifest.json that are known before anything is written.

    Args:
      name, feat_dim, dtype, seed, encoder, mpp, magnification, patch_size_level0, simulated, simulation, notes,
        chunk_patches: see `data_pipelines.writer.DatasetWriter`.

    Returns:
      JSON-serialisable facts.

    Raises:
      DataError: if one is out of range or not JSON-serialisable.
    """
    facts = {
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
    check_json(facts)
    return facts


def stored_dtype(facts: Mapping[str, Any]) -> np.dtype:
    """The NumPy dtype in which a dataset with these facts stores its patches."""
    return np.dtype(schema.FEATURE_DTYPES[facts["dtype"]])


def bag_records(facts: Mapping[str, Any], slide_id: str, features: np.ndarray, coords: np.ndarray) -> Iterator[bytes]:
    """The chunk records of one bag, patches in the seeded order of `bag.permutation`.

    Args:
      facts: from `dataset_facts`.
      slide_id: key of the slide.
      features: [n, D] floating point that passed `bag.check_features`.
      coords: [n, 2] int32.

    Yields:
      One serialised record after the other.
    """
    dtype, size = stored_dtype(facts), facts["chunk_patches"]
    order = bag.permutation(facts["seed"], slide_id, len(features))
    for chunk, start in enumerate(range(0, len(order), size)):
        rows = order[start : start + size]
        yield codec.encode(features[rows].astype(dtype, copy=False), coords[rows], slide_id, chunk)


def open_shard(path: pathlib.Path) -> ArrayRecordWriter:
    """A writer for a new shard; fails with a precise OSError where ArrayRecord would raise a bare RuntimeError."""
    path.touch()
    return ArrayRecordWriter(str(path), _WRITER_OPTIONS)


def close_shard(writer: ArrayRecordWriter, path: pathlib.Path, n_records: int) -> None:
    """Closes a shard, counts its records again and flushes it to disk.

    Raises:
      OSError: if the file does not hold `n_records` records.
    """
    writer.close()
    reader = ArrayRecordReader(str(path))
    written = reader.num_records()
    reader.close()
    if written != n_records:
        reason = f"a closed shard holds {written} records, {n_records} belong to complete slides"
        raise OSError(errno.EIO, reason)
    atomic.sync(path)


def describe_shard(path: pathlib.Path, file: str, n_records: int) -> Shard:
    """The manifest entry of a closed shard at `path` that will be called `file`."""
    return Shard(file, n_records, path.stat().st_size, sha256_file(path))


def complete(
    directory: pathlib.Path,
    facts: Mapping[str, Any],
    staged: Sequence[tuple[pathlib.Path, Shard]],
    slides: Sequence[Slide],
    *,
    files: Mapping[str, bytes] | None = None,
    obsolete: Collection[str] = (),
) -> None:
    """Writes the metadata beside closed shards and gives every file its final name, manifest.json last.

    Args:
      directory: the dataset.
      facts: from `dataset_facts`, possibly with further keys for manifest.json.
      staged: for each shard where it lies now (same file system) and its manifest entry under its final name.
      slides: rows of slides.csv.
      files: further files by name.
      obsolete: names of files of an older version to be removed.
    """
    shards, table = [shard for _, shard in staged], slides_bytes(slides)
    metadata = tfds_face.metadata(facts["name"], facts["feat_dim"], facts["dtype"], shards)
    contents = {**metadata, **(files or {}), SLIDES_FILE: table}
    publish(directory, staged, contents, _manifest(facts, shards, slides, table), obsolete=obsolete)


def publish(
    directory: pathlib.Path,
    staged: Sequence[tuple[pathlib.Path, Shard]],
    contents: Mapping[str, bytes],
    manifest: bytes,
    *,
    tfds_name: str = tfds_face.TFDS_NAME,
    obsolete: Collection[str] = (),
) -> None:
    """Gives closed shards and further files of a dataset of any kind their final names, manifest.json last.

    Args:
      directory: the dataset.
      staged: for each shard where it lies now (same file system) and its manifest entry under its final name.
      contents: further files by name.
      manifest: content of manifest.json.
      tfds_name: what the names of its shards start with; shards of an older version are removed.
      obsolete: names of other files of an older version to be removed.
    """
    old = set(directory.glob(tfds_face.shard_glob(tfds_name)))
    old |= {path for path in map(directory.joinpath, obsolete) if path.exists()}
    moves = {path: directory / shard.file for path, shard in staged}
    for name, content in contents.items():
        moves[atomic.write_temporary(directory, name, content)] = directory / name
    seal = atomic.write_temporary(directory, MANIFEST_FILE, manifest)
    atomic.publish(moves, (seal, directory / MANIFEST_FILE), old)


def _manifest(facts: Mapping[str, Any], shards: Sequence[Shard], slides: Sequence[Slide], table: bytes) -> bytes:
    totals = {
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "n_slides": len(slides),
        "n_patches": sum(slide.n_patches for slide in slides),
        "slides_sha256": hashlib.sha256(table).hexdigest(),
    }
    return manifest_bytes({**facts, **totals})


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


def check_json(facts: Mapping[str, Any]) -> None:
    """Refuses facts that manifest.json cannot hold.

    Raises:
      DataError: naming what is wrong.
    """
    try:
        manifest_bytes(facts)
    except (TypeError, ValueError) as error:
        reason = "the facts about a dataset (encoder, simulation, mpp, ...) must be JSON-serialisable, without NaN"
        raise DataError(f"{reason}: {error}") from error
