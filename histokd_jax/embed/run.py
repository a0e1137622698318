"""Runs a planned embedding: tiles to features to planned shards; what was finished survives a kill, slide by slide."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import atomic, bag, planned_writer, shards
from data_pipelines.errors import BagError, DataError, DatasetExistsError
from data_pipelines.manifest import MANIFEST_FILE, Manifest
from data_pipelines.planned_writer import Bag, Rejected, WrittenShard
from histokd_jax.embed import slides, stream
from histokd_jax.embed.embedder import Embedder
from histokd_jax.embed.plan import EmbedPlan, NothingUsable, PlannedSlide

QUARANTINE_FILE, SOURCES_FILE = "quarantine.csv", "sources.csv"
COLUMNS = ("slide_id", "case_id", "file", "n_bytes", "content", "coords_file", "coords_sha256", "count", "patch_size")
COLUMNS += ("patch_size_level0", "mpp", "magnification", "level0_mpp", "overlap")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was done.

    Attributes:
      manifest: of the data set.
      rejected: rows of quarantine.csv.
      slides_kept: slides that an interrupted attempt had finished.
      already_complete: the same work had been done before; nothing was written.
    """

    manifest: Manifest
    rejected: tuple[Rejected, ...]
    slides_kept: int = 0
    already_complete: bool = False


def existing(plan: EmbedPlan, out: pathlib.Path) -> Outcome | None:
    """The outcome of the same work done before; None if there is anything to do."""
    try:
        manifest = Manifest.load(out)
        stored = json.loads((out / MANIFEST_FILE).read_bytes()).get("embed", {})
    except ValueError:
        return None
    if stored.get("plan") != plan.fingerprint():
        return None
    with open(out / QUARANTINE_FILE, encoding="utf-8", newline="") as file:
        rejected = tuple(Rejected(*row) for row in list(csv.reader(file))[1:])
    return Outcome(manifest, rejected, already_complete=True)


def run_embedding(
    plan: EmbedPlan,
    out: pathlib.Path,
    embedder: Embedder,
    *,
    threads: int = 2,
    ahead: int = 4,
    overwrite: bool = False,
    progress: stream.Progress | None = None,
) -> Outcome:
    """Embeds a cohort, or continues where an attempt was interrupted.

    Args:
      plan: from `plan.make_plan`.
      out: the data set to write.
      embedder: the encoder on its devices.
      threads: that decode tiles.
      ahead: batches decoded ahead of the device.
      overwrite: replace another complete data set.
      progress: called with numbers of tiles that were embedded, or found finished.

    Returns:
      What was done.

    Raises:
      DatasetExistsError: `out` holds another complete data set.
      NothingUsable: no slide could be read.
      DataError: another process writes to `out`.
      ValueError: the plan was made for another encoder or stain normalisation.
      StorageError: the disk is full or not writable.
    """
    _check_engine(plan, embedder)
    if (done := prepare(plan, out, overwrite=overwrite)) is not None:
        return done
    progress = progress or (lambda count: None)
    with planned_writer.work_folder(out) as work:
        kept = kept_shards(plan, out)
        progress(sum(plan.slides[i].facts.count for index in kept for i in plan.shards[index]))
        missing = [index for index in range(len(plan.shards)) if index not in kept]
        found = sum(slide_file(plan, work, i).exists() for index in missing for i in plan.shards[index])
        written = dict(kept)
        for shard in write_shards(plan, work, missing, embedder, threads=threads, ahead=ahead, progress=progress):
            written[shard.index] = shard
        done = finish(plan, out, [written[index] for index in range(len(plan.shards))])
    return dataclasses.replace(done, slides_kept=found + sum(len(plan.shards[index]) for index in kept))


def prepare(plan: EmbedPlan, out: pathlib.Path, *, overwrite: bool = False) -> Outcome | None:
    """What equal work did before, if it was finished; else None: there is something to do.

    Raises:
      DatasetExistsError: `out` holds another complete data set.
    """
    done = existing(plan, out)
    if done is None and (out / MANIFEST_FILE).exists() and not overwrite:
        raise DatasetExistsError(f"{out} holds another complete dataset; choose another folder or pass --overwrite")
    return done


def kept_shards(plan: EmbedPlan, out: pathlib.Path) -> dict[int, WrittenShard]:
    """The shards that an interrupted attempt at the same plan had finished, by number."""
    found = {i: planned_writer.read_written(out, i, plan.shard_key(i)) for i in range(len(plan.shards))}
    return {index: shard for index, shard in found.items() if shard is not None}


def write_shards(
    plan: EmbedPlan,
    work: pathlib.Path,
    missing: Sequence[int],
    embedder: Embedder,
    *,
    threads: int = 2,
    ahead: int = 4,
    progress: stream.Progress = lambda count: None,
) -> Iterator[WrittenShard]:
    """Embeds the slides of some shards, in order, and writes the shards; slides left by a kill are not done again.

    Args:
      plan: the work.
      work: from `planned_writer.work_folder`.
      missing: numbers of shards.
      embedder, threads, ahead, progress: as `run_embedding`.

    Raises:
      ValueError: the plan was made for another encoder or stain normalisation.
    """
    _check_engine(plan, embedder)
    bags = _Bags(plan, work, missing, embedder, threads, ahead, progress)
    for index in missing:
        found = (bags.next(i) for i in plan.shards[index])
        yield planned_writer.write_shard(work, index, plan.shard_key(index), plan.facts, found)
        bags.forget(plan.shards[index])


def finish(plan: EmbedPlan, out: pathlib.Path, written: Sequence[WrittenShard]) -> Outcome:
    """Completes the data set out of all shards of a plan, in their order.

    Raises:
      NothingUsable: no slide could be read.
    """
    rejected = tuple(sorted([*plan.rejected, *(item for shard in written for item in shard.rejected)]))
    if not any(shard.n_records for shard in written):
        raise NothingUsable(plan.root, rejected)
    _complete(plan, out, written, rejected)
    return Outcome(Manifest.load(out), rejected)


def slide_file(plan: EmbedPlan, work: pathlib.Path, index: int) -> pathlib.Path:
    """Where the embeddings of a slide wait until its shard is written."""
    return work / f"slide-{index:06d}-{plan.slide_key(index)[:32]}.npy"


def _check_engine(plan: EmbedPlan, embedder: Embedder) -> None:
    """What is computed must be what the manifest says."""
    recorded = plan.facts["encoder"]
    stain = dict(embedder.stain.facts) if embedder.stain is not None else None
    if (recorded["weights_sha256"], recorded["stain"]) != (embedder.sha256, stain):
        raise ValueError("the plan was made for another encoder or stain normalisation: make it anew")


class _Bags:
    """The bags of the missing shards, in order: those that an interrupted attempt left finished, and new ones."""

    def __init__(
        self,
        plan: EmbedPlan,
        work: pathlib.Path,
        missing: Sequence[int],
        embedder: Embedder,
        threads: int,
        ahead: int,
        progress: stream.Progress,
    ):
        self._plan, self._work, self._progress = plan, work, progress
        wanted = [i for index in missing for i in plan.shards[index]]
        self._finished = {i for i in wanted if self._file(i).exists()}
        jobs = [_job(plan, i) for i in wanted if i not in self._finished]
        self._new = stream.embed_jobs(jobs, embedder, threads=threads, ahead=ahead, progress=progress)

    def next(self, index: int) -> Bag | Rejected:
        """The bag of a slide; slides must be asked for in order."""
        slide = self._plan.slides[index]
        if index in self._finished:
            self._progress(slide.facts.count)
            return _bag(self._plan, slide, np.load(self._file(index)))
        found, features = next(self._new)
        if found != index:
            raise RuntimeError(f"slide {index} was asked for, slide {found} came: bags must be taken in order")
        if isinstance(features, DataError):
            return _rejected(slide, features)
        result = _bag(self._plan, slide, features)
        if isinstance(result, Bag):
            self._save(index, features.astype(shards.stored_dtype(self._plan.facts)))
        return result

    def forget(self, indices: Sequence[int]) -> None:
        """Removes what was kept of slides that are in a finished shard."""
        for index in indices:
            self._file(index).unlink(missing_ok=True)

    def _file(self, index: int) -> pathlib.Path:
        return slide_file(self._plan, self._work, index)

    def _save(self, index: int, features: np.ndarray) -> None:
        content = io.BytesIO()
        np.save(content, features)
        path = self._file(index)
        with atomic.storage_errors(self._work):
            os.replace(atomic.write_temporary(self._work, path.name, content.getvalue()), path)


def _job(plan: EmbedPlan, index: int) -> stream.Job:
    slide = plan.slides[index]
    return stream.Job(
        index, slide.facts.count, slide.facts.patch_size, lambda: slides.open_tiles(plan.root, slide.source)
    )


def _rejected(slide: PlannedSlide, error: DataError) -> Rejected:
    if isinstance(error, slides.Unusable):
        return Rejected(slide.source.file, slide.slide_id, error.reason, error.detail)
    return Rejected(slide.source.file, slide.slide_id, "unreadable tile", str(error))


def _bag(plan: EmbedPlan, slide: PlannedSlide, features: np.ndarray) -> Bag | Rejected:
    """Features as a bag, after the checks of every data set."""
    dtype, block = shards.stored_dtype(plan.facts), plan.facts["chunk_patches"]
    file = slide.source.file
    try:
        bag.check_features(slide.slide_id, features, plan.facts["feat_dim"], dtype, block)
        coords = bag.check_coords(slide.slide_id, slides.coordinates(plan.root, slide.source), len(features))
    except BagError as error:
        return Rejected(file, slide.slide_id, "not finite", str(error))
    except DataError as error:
        return Rejected(file, slide.slide_id, "bad coordinates", str(error))
    recorded = slide.recorded()
    return Bag(slide.slide_id, slide.case_id, features, coords, file, {name: recorded[name] for name in COLUMNS})


def write_quarantine(out: pathlib.Path, rejected: Sequence[Rejected]) -> None:
    """Writes quarantine.csv where no data set can be written."""
    with atomic.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        os.replace(atomic.write_temporary(out, QUARANTINE_FILE, _quarantine(rejected)), out / QUARANTINE_FILE)


def _complete(
    plan: EmbedPlan, out: pathlib.Path, written: Sequence[WrittenShard], rejected: Sequence[Rejected]
) -> None:
    table = _csv(COLUMNS, _rows(shard.facts for shard in written))
    record = {
        "plan": plan.fingerprint(),
        "n_quarantined": len(rejected),
        "sources_sha256": hashlib.sha256(table).hexdigest(),
    }
    files = {SOURCES_FILE: table, QUARANTINE_FILE: _quarantine(rejected)}
    planned_writer.complete(out, {**plan.facts, "embed": record}, written, files=files)


def _rows(groups: Iterator[Sequence[Mapping[str, Any]]]) -> Iterator[list[Any]]:
    for facts in groups:
        for row in facts:
            yield [row[name] for name in COLUMNS]


def _quarantine(rejected: Sequence[Rejected]) -> bytes:
    return _csv(Rejected._fields, rejected)


def _csv(header: Sequence[str], rows: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return text.getvalue().encode()
