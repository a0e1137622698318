"""The manifest of a dataset: manifest.json (dataset-level facts, shards) and slides.csv (one row per slide).

manifest.json is written last, so a directory without it is no dataset.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines.errors import ManifestError, ShardReadError
from data_pipelines.schema import FEATURE_DTYPES, FORMAT_VERSION

MANIFEST_FILE = "manifest.json"
SLIDES_FILE = "slides.csv"
BAGS = "bags"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_REWRITE = "write the dataset again or restore it from a copy"


@dataclasses.dataclass(frozen=True)
class Slide:
    """One row of slides.csv; the chunk records of a slide are consecutive in one shard.

    Attributes:
      slide_id: unique key.
      case_id: patient the slide belongs to.
      shard: index into `Manifest.shards`.
      first_record: index of its first record within the shard.
      n_records: number of chunk records.
      n_patches: bag size.
      source: where the slide came from (free text).
    """

    slide_id: str
    case_id: str
    shard: int
    first_record: int
    n_records: int
    n_patches: int
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: name, record count, size in bytes, SHA-256 (hex)."""

    file: str
    n_records: int
    n_bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything known about a dataset without opening its shards.

    Attributes:
      directory: where it lies.
      name: dataset name.
      feat_dim: embedding width D.
      dtype: stored dtype, "float16" or "float32".
      chunk_patches: patches per record (the last record of a slide may hold fewer).
      seed: seed of the permutation of patches within each slide.
      encoder: facts about the patch encoder (name, licence, ...), or None.
      mpp: micrometres per pixel at which patches were read, or None.
      magnification: objective magnification, or None.
      patch_size_level0: patch edge in level-0 pixels, or None.
      simulated: whether the bags are simulated.
      simulation: parameters of the simulation, or None.
      notes: free text.
      slides: rows of slides.csv in manifest order.
      shards: the ArrayRecord files.
      slides_sha256: SHA-256 (hex) of slides.csv.
    """

    directory: pathlib.Path
    name: str
    feat_dim: int
    dtype: str
    chunk_patches: int
    seed: int
    encoder: Mapping[str, Any] | None
    mpp: float | None
    magnification: float | None
    patch_size_level0: float | None
    simulated: bool
    simulation: Mapping[str, Any] | None
    notes: str
    slides: tuple[Slide, ...]
    shards: tuple[Shard, ...]
    slides_sha256: str

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Bag sizes [n_slides] int64, read-only."""
        sizes = np.array([slide.n_patches for slide in self.slides], np.int64)
        sizes.flags.writeable = False
        return sizes

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Manifest:
        """Reads and validates a manifest: format version, checksum of slides.csv, existence and size of each shard.

        Args:
          directory: folder of the dataset.

        Returns:
          The manifest.

        Raises:
          ManifestError: if the dataset is incomplete, of another format version, or inconsistent.
          ShardReadError: if a shard is missing or has another size.
        """
        directory = pathlib.Path(directory)
        facts = read_facts(directory)
        _check_bags(facts, directory)
        raw = read_table(directory, SLIDES_FILE, facts.get("slides_sha256"))
        try:
            shards = tuple(Shard(**shard) for shard in facts["shards"])
            fields = {f.name: facts[f.name] for f in dataclasses.fields(cls) if f.name in facts} | {"shards": shards}
            manifest = cls(directory=directory, slides=_parse_slides(raw, directory / SLIDES_FILE), **fields)
        except (KeyError, TypeError) as error:
            raise ManifestError(
                f"{directory / MANIFEST_FILE}: missing or unknown field ({error}); {_REWRITE}"
            ) from error
        _check_totals(manifest, facts)
        _check_slides(manifest)
        for shard in shards:
            check_size(directory, shard)
        return manifest

    def check_shards(self, *, full: bool = False) -> None:
        """Compares the shards with the manifest before anything is read.

        Args:
          full: also compare the SHA-256 of each file (reads everything), not only the record counts.

        Raises:
          ShardReadError: naming the shard that differs.
        """
        for index, shard in enumerate(self.shards):
            open_shard(self, index).close()
            if full and (found := sha256_file(self.directory / shard.file)) != shard.sha256:
                reason = f"SHA-256 is {found}, the manifest says {shard.sha256}"
                raise ShardReadError(self.directory, shard.file, None, reason)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over what a reader can see: slide table, shard contents, width, dtype, chunking, seed.

        Names, notes and the directory do not count, so a copied or renamed dataset keeps its fingerprint.
        """
        facts = [FORMAT_VERSION, self.feat_dim, self.dtype, self.chunk_patches, self.seed, self.slides_sha256]
        content = json.dumps([facts, [[s.file, s.n_records, s.sha256] for s in self.shards]])
        return hashlib.sha256(content.encode()).hexdigest()


def read_facts(directory: pathlib.Path) -> dict[str, Any]:
    """manifest.json of a dataset of any kind.

    Raises:
      ManifestError: there is none, it is no JSON, or of another format version.
    """
    path = directory / MANIFEST_FILE
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        reason = "the directory is not a dataset, or its writer was interrupted; check the path or write it again"
        raise ManifestError(f"{path} does not exist: {reason}") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read as JSON ({error}); {_REWRITE}") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version != FORMAT_VERSION:
        reason = f"format_version is {version!r}, this library reads {FORMAT_VERSION}"
        raise ManifestError(f"{path}: {reason}; write the dataset again with this version")
    return facts


def kind_of(facts: Mapping[str, Any]) -> str:
    """What a dataset holds, by its manifest.json: `BAGS`, or another kind."""
    return facts.get("kind", BAGS)


def read_table(directory: pathlib.Path, name: str, expected: str | None) -> bytes:
    """The table of a dataset, compared with the SHA-256 (hex) that manifest.json gives.

    Raises:
      ManifestError: it cannot be read, or differs.
    """
    path = directory / name
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error}); {_REWRITE}") from error
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise ManifestError(f"{path}: SHA-256 is {found}, {MANIFEST_FILE} says {expected}; {_REWRITE}")
    return raw


def open_shard(manifest: Any, index: int) -> ArrayRecordReader:
    """Opens a shard for random access and checks its size and record count.

    ArrayRecord opens a missing file, or one that was cut short, as 0 records without an error.

    Args:
      manifest: anything with `directory` and `shards`.
      index: which shard.

    Raises:
      ShardReadError: if it cannot be opened, or has another size or record count than the manifest says.
    """
    shard = manifest.shards[index]
    check_size(manifest.directory, shard)
    try:
        reader = ArrayRecordReader(str(manifest.directory / shard.file), options=READER_OPTIONS)
        found = reader.num_records()
    except RuntimeError as error:
        raise ShardReadError(manifest.directory, shard.file, None, f"cannot be opened ({error})") from error
    if found != shard.n_records:  # The reader is dropped unclosed: closing a damaged file raises an error of its own.
        reason = f"holds {found} records, the manifest says {shard.n_records}"
        raise ShardReadError(manifest.directory, shard.file, None, reason)
    return reader


def manifest_bytes(facts: Mapping[str, Any]) -> bytes:
    """manifest.json for the given facts; equal facts give equal bytes."""
    return (
        json.dumps({"format_version": FORMAT_VERSION, **facts}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    ).encode()


def slides_bytes(slides: Sequence[Slide]) -> bytes:
    """slides.csv for the given rows."""
    return table_bytes(_COLUMNS, map(dataclasses.astuple, slides))


def table_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV table of a dataset; equal rows give equal bytes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def sha256_file(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_COLUMNS = tuple(field.name for field in dataclasses.fields(Slide))
_INTEGERS = ("shard", "first_record", "n_records", "n_patches")


def _check_bags(facts: Mapping[str, Any], directory: pathlib.Path) -> None:
    path = directory / MANIFEST_FILE
    if kind_of(facts) != BAGS:
        raise ManifestError(
            f"{path}: the dataset holds {kind_of(facts)}, not bags of patches; use a configuration for such data "
            f"(data.kind={kind_of(facts)})"
        )
    if facts.get("dtype") not in FEATURE_DTYPES:
        raise ManifestError(
            f"{path}: dtype is {facts.get('dtype')!r}, expected one of {sorted(FEATURE_DTYPES)}; {_REWRITE}"
        )


def _parse_slides(raw: bytes, path: pathlib.Path) -> tuple[Slide, ...]:
    return parse_table(raw, path, Slide, _INTEGERS)


def parse_table(raw: bytes, path: pathlib.Path, row_type: type, integers: Collection[str]) -> tuple[Any, ...]:
    """Rows of a table that `table_bytes` wrote from instances of a dataclass.

    Args:
      raw: the content.
      path: for messages.
      row_type: a dataclass of strings and integers.
      integers: the fields that are integers.

    Raises:
      ManifestError: other columns, or a row that is none.
    """
    columns = tuple(field.name for field in dataclasses.fields(row_type))
    rows = csv.reader(io.StringIO(raw.decode(), newline=""))
    header = tuple(next(rows, ()))
    if header != columns:
        raise ManifestError(f"{path}: the columns are {header}, expected {columns}; {_REWRITE}")
    found = []
    for number, row in enumerate(rows, 2):
        try:
            named = dict(zip(columns, row, strict=True))
            found.append(row_type(**{k: int(v) if k in integers else v for k, v in named.items()}))
        except ValueError as error:
            kind = row_type.__name__.lower()
            raise ManifestError(f"{path}, row {number}: {row} is not a {kind} ({error}); {_REWRITE}") from error
    return tuple(found)


def _check_totals(manifest: Manifest, facts: Mapping[str, Any]) -> None:
    found = {"n_slides": len(manifest.slides), "n_patches": int(manifest.sizes.sum())}
    for field, value in found.items():
        if facts.get(field) != value:
            where = manifest.directory / MANIFEST_FILE
            raise ManifestError(f"{where}: {field} is {facts.get(field)!r}, {SLIDES_FILE} gives {value}; {_REWRITE}")


def _check_slides(manifest: Manifest) -> None:
    """Slide keys are unique, and the slides of each shard cover its records without gap or overlap."""
    path, filled, seen = manifest.directory / SLIDES_FILE, [0] * len(manifest.shards), set()
    for number, slide in enumerate(manifest.slides, 2):
        n_records = -(-slide.n_patches // manifest.chunk_patches)
        inside = 0 <= slide.shard < len(filled)
        if slide.slide_id in seen or slide.n_patches < 1 or slide.n_records != n_records or not inside:
            reason = f"duplicate key, empty bag, wrong n_records (expected {n_records}) or no such shard"
            raise ManifestError(f"{path}, row {number}: {slide}: {reason}; {_REWRITE}")
        if slide.first_record != filled[slide.shard]:
            reason = f"first_record should be {filled[slide.shard]}"
            raise ManifestError(f"{path}, row {number}: {slide}: {reason}; {_REWRITE}")
        seen.add(slide.slide_id)
        filled[slide.shard] += slide.n_records
    for shard, count in zip(manifest.shards, filled):
        if shard.n_records != count:
            reason = f"the slides use {count} records, the manifest says {shard.n_records}"
            raise ShardReadError(manifest.directory, shard.file, None, reason)


def check_size(directory: pathlib.Path, shard: Shard) -> None:
    """Refuses a shard that is absent or has another size than the manifest says.

    Raises:
      ShardReadError: naming the shard.
    """
    try:
        found = (directory / shard.file).stat().st_size
    except OSError as error:
        raise ShardReadError(directory, shard.file, None, f"cannot be opened ({error})") from error
    if found != shard.n_bytes:
        reason = f"has {found} bytes, the manifest says {shard.n_bytes}"
        raise ShardReadError(directory, shard.file, None, reason)
