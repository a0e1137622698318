"""Writes a planned pair dataset: in parallel, resumable after a kill, faults to quarantine.csv."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import planned_writer, shards, tfds_face
from data_pipelines.errors import DatasetExistsError
from data_pipelines.importers.plan import NothingUsable
from data_pipelines.importers.run import QUARANTINE_FILE, SOURCES_FILE, Outcome
from data_pipelines.manifest import MANIFEST_FILE, table_bytes
from data_pipelines.pairs import codec, pixels
from data_pipelines.pairs.listing import Listed
from data_pipelines.pairs.manifest import (
    EXAMPLES_FILE,
    TFDS_NAME,
    Example,
    PairManifest,
    examples_bytes,
    pair_manifest_bytes,
)
from data_pipelines.pairs.pixels import Encoded, UnusableImageError
from data_pipelines.pairs.plan import PairPlan
from data_pipelines.planned_writer import Entry, Rejected, WrittenShard
from data_pipelines.text_table import read_text_table

_SIDE = ("file", "n_bytes", "sha256", "size", "stored")
_COLUMNS = ("example_id", *(f"image_{name}" for name in _SIDE), *(f"partner_{name}" for name in _SIDE))
Progress = Callable[[int], None]


def run_import(
    plan: PairPlan, out: pathlib.Path, *, workers: int = 1, overwrite: bool = False, progress: Progress | None = None
) -> Outcome:
    """Imports image pairs, or continues an import that was interrupted; the result does not depend on either.

    Args:
      plan: from `plan.make_plan`.
      out: the dataset to write.
      workers: threads that decode, each a shard of its own.
      overwrite: replace another complete dataset.
      progress: called after every example.

    Returns:
      What was done; `manifest` is a `PairManifest`.

    Raises:
      DatasetExistsError: `out` holds another complete dataset.
      NothingUsable: no example could be read.
      StorageError: the disk is full or not writable.
    """
    done = _existing(plan, out)
    if done is not None:
        return done
    if (out / MANIFEST_FILE).exists() and not overwrite:
        raise DatasetExistsError(f"{out} holds another complete dataset; choose another folder or pass --overwrite")
    progress = progress or (lambda count: None)
    with planned_writer.work_folder(out) as work:
        kept = {}
        for index in range(len(plan.shards)):
            shard = planned_writer.read_written(out, index, plan.key(index), Example, TFDS_NAME)
            if shard is not None:
                kept[index] = shard
                progress(len(plan.shards[index]))
        missing = [index for index in range(len(plan.shards)) if index not in kept]

        def write(index: int) -> WrittenShard:
            return planned_writer.write_entries(work, index, plan.key(index), _entries(plan, index, progress))

        with ThreadPoolExecutor(max(1, workers)) as pool:
            written = kept | dict(zip(missing, pool.map(write, missing)))
        ready = [written[index] for index in range(len(plan.shards))]
        rejected = tuple(sorted([*plan.listing.rejected, *(item for shard in ready for item in shard.rejected)]))
        if not any(shard.n_records for shard in ready):
            raise NothingUsable(plan.listing.root, rejected)
        _complete(plan, out, ready, rejected)
    return Outcome(PairManifest.load(out), rejected, len(kept))


def _existing(plan: PairPlan, out: pathlib.Path) -> Outcome | None:
    try:
        manifest = PairManifest.load(out)
        stored = json.loads((out / MANIFEST_FILE).read_bytes()).get("import", {})
    except ValueError:
        return None
    if stored.get("plan") != plan.fingerprint():
        return None
    table = read_text_table(out / QUARANTINE_FILE)
    return Outcome(manifest, tuple(Rejected(*row) for row in table.itertuples(index=False)), already_complete=True)


def _entries(plan: PairPlan, index: int, progress: Progress) -> Iterator[Entry | Rejected]:
    """The examples of a shard; the next one is read in a thread while the last one is being written."""
    with ThreadPoolExecutor(1) as reader:
        waiting: collections.deque = collections.deque()
        for i in plan.shards[index]:
            waiting.append(reader.submit(_load, plan, plan.listing.examples[i]))
            if len(waiting) > 1:
                yield waiting.popleft().result()
                progress(1)
        while waiting:
            yield waiting.popleft().result()
            progress(1)


def _load(plan: PairPlan, example: Listed) -> Entry | Rejected:
    root, resize, file = plan.listing.root, plan.options.resize, example.image
    try:
        image, facts = _encode(root, file, resize, example.image_box)
        _check_size(image, plan)
        partner, other = None, dict.fromkeys(_SIDE, "")
        if example.partner:
            file = example.partner
            partner, other = _encode(root, file, resize, example.partner_box)
            if partner.original != image.original:
                found = " and ".join(f"{size[0]}x{size[1]}" for size in (image.original, partner.original))
                raise UnusableImageError("sizes of the pair differ", f"{found} pixels; register the pair first")
    except UnusableImageError as error:
        return Rejected(file, example.example_id, error.reason, error.detail)
    except OSError as error:
        return Rejected(file, example.example_id, "unreadable", error.strerror or type(error).__name__)
    return _entry(plan, example, image, partner, _provenance(example, facts, other))


def _encode(
    root: pathlib.Path, file: str, resize: tuple[int, int] | None, box: tuple[int, int, int, int] | None
) -> tuple[Encoded, dict[str, Any]]:
    data = (root / file).read_bytes()
    image = pixels.encode(data, resize=resize, box=box)
    facts = {
        "file": file,
        "n_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": f"{image.original[0]}x{image.original[1]}",
        "stored": image.stored,
    }
    return image, facts


def _check_size(image: Encoded, plan: PairPlan) -> None:
    expected = plan.original_size
    if expected is not None and image.original != expected:
        found = "x".join(map(str, image.original))
        raise UnusableImageError("other size", f"{found} pixels, expected {expected[0]}x{expected[1]}")


def _provenance(example: Listed, image: Mapping[str, Any], partner: Mapping[str, Any]) -> dict[str, Any]:
    sides = {f"image_{name}": value for name, value in image.items()}
    return {"example_id": example.example_id, **sides, **{f"partner_{name}": v for name, v in partner.items()}}


def _entry(plan: PairPlan, example: Listed, image: Encoded, partner: Encoded | None, facts: Mapping[str, Any]) -> Entry:
    contents = codec.Contents(plan.listing.has_partners, 0 if plan.vectors is None else plan.vectors.size)
    classes = plan.facts["class_names"]
    label = classes.index(example.label) if example.label else -1
    vector = None if plan.vectors is None else plan.vectors.of(example.example_id)
    stored = vector
    if plan.vectors is not None and vector is None:
        stored = np.full(plan.vectors.size, np.nan, np.float32)
    record = codec.PairRecord(
        example.example_id, example.group, label, image.data, None if partner is None else partner.data, stored
    )

    def row(shard: int, first: int, count: int) -> Example:
        has = int(partner is not None), int(vector is not None)
        return Example(example.example_id, example.group, example.split, label, *has, shard, first, example.image)

    return Entry(row, facts, [codec.encode(record, contents)])


def _complete(plan: PairPlan, out: pathlib.Path, written: Sequence[WrittenShard], rejected: Sequence[Rejected]) -> None:
    splits: dict[str, list[WrittenShard]] = {}
    for shard in written:
        if shard.n_records:
            splits.setdefault(plan.split_of(shard.index), []).append(shard)
    staged, examples, by_split = [], [], {}
    for split, members in splits.items():
        for number, shard in enumerate(members):
            name = tfds_face.shard_name(number, len(members), TFDS_NAME, split)
            staged.append(planned_writer.stage(out, shard, name))
            by_split.setdefault(split, []).append(staged[-1][1])
            examples += [dataclasses.replace(row, shard=len(staged) - 1) for row in shard.slides]
    sources = table_bytes(_COLUMNS, ([f[name] for name in _COLUMNS] for shard in written for f in shard.facts))
    table = examples_bytes(examples)
    contents = {
        **tfds_face.write_metadata(TFDS_NAME, by_split, lambda tfds: _features(tfds, plan), _description(plan)),
        SOURCES_FILE: sources,
        QUARANTINE_FILE: table_bytes(Rejected._fields, rejected),
        EXAMPLES_FILE: table,
    }
    facts = {**plan.facts, "import": _record(plan, written, rejected, sources)}
    manifest = pair_manifest_bytes(facts, [entry for _, entry in staged], examples, table)
    with planned_writer.finishing(out):
        shards.publish(out, staged, contents, manifest, tfds_name=TFDS_NAME)


def _record(
    plan: PairPlan, written: Sequence[WrittenShard], rejected: Sequence[Rejected], sources: bytes
) -> dict[str, Any]:
    stored = collections.Counter(f["image_stored"] for shard in written for f in shard.facts)
    return {
        "layout": plan.listing.layout,
        "plan": plan.fingerprint(),
        "stored": dict(sorted(stored.items())),
        "n_quarantined": len(rejected),
        "sources_sha256": hashlib.sha256(sources).hexdigest(),
    }


def _description(plan: PairPlan) -> str:
    return f"Image pairs of the dataset {plan.facts['name']!r}; examples.csv lists them."


def _features(tfds: Any, plan: PairPlan) -> Any:
    height, width = plan.facts["image_size"]
    features = {"image": tfds.features.Image(shape=(height, width, 3))}
    if plan.listing.has_partners:
        # Not (height, width): one black pixel stands for a partner that an example does not have.
        features["partner"] = tfds.features.Image(shape=(None, None, 3))
    if plan.vectors is not None:
        features["vector"] = tfds.features.Tensor(shape=(plan.vectors.size,), dtype=np.float32, encoding="bytes")
    return tfds.features.FeaturesDict(
        {
            **features,
            "example_id": tfds.features.Text(),
            "group": tfds.features.Text(),
            "label": tfds.features.Scalar(dtype=np.int64),
            "has_partner": tfds.features.Scalar(dtype=np.int64),
            "crc": tfds.features.Scalar(dtype=np.int64),
        }
    )
