"""The manifest of a pair dataset: manifest.json (facts, shards) and examples.csv (one row per example).

manifest.json is written last, so a directory without it is no dataset.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import ManifestError, ShardReadError
from data_pipelines.manifest import (
    MANIFEST_FILE,
    Shard,
    check_size,
    kind_of,
    manifest_bytes,
    open_shard,
    parse_table,
    read_facts,
    read_table,
    sha256_file,
    table_bytes,
)
from data_pipelines.pairs.codec import Contents
from data_pipelines.schema import FORMAT_VERSION

PAIRS = "pairs"
EXAMPLES_FILE = "examples.csv"
TFDS_NAME = "pairs"
_REWRITE = "write the dataset again or restore it from a copy"


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of examples.csv; an example is one record.

    Attributes:
      example_id: unique key.
      group: slide or patient; empty if unknown.
      split: official part ("train", "val", "test"), or empty.
      label: class index, -1 where there is none.
      has_partner: 1, or 0 for an example without its partner image.
      has_vector: 1, or 0 for an example without a vector.
      shard: index into `PairManifest.shards`.
      record: index within the shard.
      source: file of the H&E image.
    """

    example_id: str
    group: str
    split: str
    label: int
    has_partner: int
    has_vector: int
    shard: int
    record: int
    source: str = ""


_INTEGERS = ("label", "has_partner", "has_vector", "shard", "record")
_COLUMNS = tuple(field.name for field in dataclasses.fields(Example))


@dataclasses.dataclass(frozen=True)
class PairManifest:
    """Everything known about a pair dataset without opening its shards.

    Attributes:
      directory: where it lies.
      name: dataset name.
      image_size: (height, width) of all images.
      partner: whether the records have partner images.
      vector_size: P, length of the privileged vectors; 0: none.
      class_names: one per class; empty without labels.
      simulated: whether the images are simulated.
      simulation: parameters of the simulation, or None.
      resized: facts about a change of size at import, or None.
      notes: free text.
      examples: rows of examples.csv in their order.
      shards: the ArrayRecord files.
      examples_sha256: SHA-256 (hex) of examples.csv.
      encoder: None (bags of embeddings name theirs here).
      mpp: None, unless stated at import.
    """

    directory: pathlib.Path
    name: str
    image_size: tuple[int, int]
    partner: bool
    vector_size: int
    class_names: tuple[str, ...]
    simulated: bool
    simulation: Mapping[str, Any] | None
    resized: Mapping[str, Any] | None
    notes: str
    examples: tuple[Example, ...]
    shards: tuple[Shard, ...]
    examples_sha256: str
    mpp: float | None = None
    encoder: None = None

    @property
    def contents(self) -> Contents:
        """The fields of its records."""
        return Contents(self.partner, self.vector_size)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """[n] int32 class of every example, -1 where there is none."""
        return np.array([example.label for example in self.examples], np.int32)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> PairManifest:
        """Reads and validates a manifest: format version, checksum of examples.csv, size of each shard.

        Args:
          directory: folder of the dataset.

        Raises:
          ManifestError: incomplete, of another kind or version, or inconsistent.
          ShardReadError: a shard is missing or has another size.
        """
        directory = pathlib.Path(directory)
        facts = read_facts(directory)
        if kind_of(facts) != PAIRS:
            raise ManifestError(
                f"{directory / MANIFEST_FILE}: the dataset holds {kind_of(facts)}, not image pairs; write those with "
                f"`histokd pairs`, or use a configuration with data.kind={kind_of(facts)}"
            )
        raw = read_table(directory, EXAMPLES_FILE, facts.get("examples_sha256"))
        try:
            names = {f.name for f in dataclasses.fields(cls)} & set(facts)
            fields = {name: facts[name] for name in names}
            fields["shards"] = tuple(Shard(**shard) for shard in facts["shards"])
            fields |= {name: tuple(facts[name]) for name in ("image_size", "class_names")}
            examples = parse_table(raw, directory / EXAMPLES_FILE, Example, _INTEGERS)
            manifest = cls(directory=directory, examples=examples, **fields)
        except (KeyError, TypeError) as error:
            raise ManifestError(
                f"{directory / MANIFEST_FILE}: missing or unknown field ({error}); {_REWRITE}"
            ) from error
        _check(manifest, facts)
        return manifest

    def check_shards(self, *, full: bool = False) -> None:
        """Compares the shards with the manifest before anything is read.

        Args:
          full: also compare the SHA-256 of each file.

        Raises:
          ShardReadError: naming the shard that differs.
        """
        for index, shard in enumerate(self.shards):
            open_shard(self, index).close()
            if full and (found := sha256_file(self.directory / shard.file)) != shard.sha256:
                reason = f"SHA-256 is {found}, the manifest says {shard.sha256}"
                raise ShardReadError(self.directory, shard.file, None, reason)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over what a reader can see: table, shard contents, sizes, classes; not names or notes."""
        facts = [FORMAT_VERSION, PAIRS, list(self.image_size), self.partner, self.vector_size, list(self.class_names)]
        shards = [[shard.file, shard.n_records, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([facts, self.examples_sha256, shards]).encode()).hexdigest()


def examples_bytes(examples: Sequence[Example]) -> bytes:
    """examples.csv for the given rows."""
    return table_bytes(_COLUMNS, map(dataclasses.astuple, examples))


def pair_manifest_bytes(
    facts: Mapping[str, Any], shards: Sequence[Shard], examples: Sequence[Example], table: bytes
) -> bytes:
    """manifest.json of a pair dataset.

    Args:
      facts: name, image_size, partner, vector_size, class_names, simulated, simulation, resized, notes and more.
      shards: the shards in order.
      examples: rows of examples.csv.
      table: its content.
    """
    totals = {
        "kind": PAIRS,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "n_examples": len(examples),
        "examples_sha256": hashlib.sha256(table).hexdigest(),
    }
    return manifest_bytes({**facts, **totals})


def _check(manifest: PairManifest, facts: Mapping[str, Any]) -> None:
    """Keys are unique, labels are classes, and the examples of each shard cover its records."""
    path, seen, filled = manifest.directory / EXAMPLES_FILE, set(), [0] * len(manifest.shards)
    if facts.get("n_examples") != len(manifest.examples):
        where = manifest.directory / MANIFEST_FILE
        found = len(manifest.examples)
        raise ManifestError(
            f"{where}: n_examples is {facts.get('n_examples')!r}, {EXAMPLES_FILE} has {found}; {_REWRITE}"
        )
    for number, example in enumerate(manifest.examples, 2):
        inside = 0 <= example.shard < len(filled)
        if example.example_id in seen or not inside or example.record != filled[example.shard]:
            raise ManifestError(f"{path}, row {number}: {example}: duplicate key or wrong record; {_REWRITE}")
        if not -1 <= example.label < max(len(manifest.class_names), 1):
            raise ManifestError(f"{path}, row {number}: {example}: no such class; {_REWRITE}")
        seen.add(example.example_id)
        filled[example.shard] += 1
    for shard, count in zip(manifest.shards, filled):
        check_size(manifest.directory, shard)
        if shard.n_records != count:
            reason = f"the examples use {count} records, the manifest says {shard.n_records}"
            raise ShardReadError(manifest.directory, shard.file, None, reason)
