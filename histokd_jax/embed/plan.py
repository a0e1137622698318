"""What will be embedded: slides, ids, shards and facts, decided and refused before the first tile is read."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import planned_writer, schema, shards
from data_pipelines.errors import DataError
from data_pipelines.importers import cases
from data_pipelines.planned_writer import Rejected
from histokd_jax.embed import slides
from histokd_jax.embed.slides import Source, TileFacts, Unusable
from histokd_jax.encoders.loading import RANDOM, LoadedEncoder

_SAME = ("patch_size", "magnification")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says.

    Attributes:
      name: of the data set.
      mpp: micrometres per pixel of the tiles where the files do not say.
      any_mpp: also embed tiles of a resolution on which the encoder was not trained; recorded.
      dtype: in which embeddings are stored.
      seed: of the order of patches.
      shard_bytes: limit of a shard.
      stain: facts of the stain normalisation, None without one.
    """

    name: str
    mpp: float | None = None
    any_mpp: bool = False
    dtype: str = "float16"
    seed: int = 0
    shard_bytes: int = planned_writer.SHARD_BYTES
    stain: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class PlannedSlide:
    """One slide that will be embedded."""

    slide_id: str
    case_id: str
    source: Source
    facts: TileFacts

    def recorded(self) -> dict[str, Any]:
        """Its row of sources.csv."""
        return slides.facts_for_table(self.slide_id, self.case_id, self.source, self.facts)


@dataclasses.dataclass(frozen=True)
class EmbedPlan:
    """The whole work.

    Attributes:
      root: folder of slides or images.
      facts: dataset-level facts, see `shards.dataset_facts`.
      compute: what else decides the bytes of an embedding: dtype, batch, device.
      slides: sorted by slide id.
      shards: ranges of `slides`.
      rejected: rows of quarantine.csv that are known before reading tiles.
      notes: lines for people.
    """

    root: pathlib.Path
    facts: Mapping[str, Any]
    compute: Mapping[str, Any]
    slides: tuple[PlannedSlide, ...]
    shards: tuple[range, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...] = ()

    def slide_key(self, index: int) -> str:
        """Identifies the embeddings of a slide: equal keys, equal bytes. Includes the state of its files."""
        slide = self.slides[index]
        return planned_writer.plan_key(
            [dict(self.facts), dict(self.compute), slide.recorded(), list(slide.facts.state)]
        )

    def shard_key(self, index: int) -> str:
        """Identifies the content of a shard."""
        return planned_writer.plan_key([self.slide_key(i) for i in self.shards[index]])

    def fingerprint(self) -> str:
        """Identifies the work for an idempotent repetition: encoder, slides, coordinates; no times, no device."""
        limits = [[r.start, r.stop] for r in self.shards]
        return planned_writer.plan_key([dict(self.facts), [slide.recorded() for slide in self.slides], limits])


class NothingUsable(DataError):
    """No slide can be embedded; `rejected` says why."""

    def __init__(self, root: pathlib.Path, rejected: Sequence[Rejected]):
        self.rejected = tuple(sorted(rejected))
        counts = collections.Counter(item.reason for item in rejected)
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "there are none"
        first = f"; {self.rejected[0].file}: {self.rejected[0].detail}" if rejected else ""
        super().__init__(f"{root}: none of {len(rejected)} slides can be embedded: {told}{first}")


def make_plan(
    root: pathlib.Path,
    found: Sequence[Source],
    rejected: Sequence[Rejected],
    loaded: LoadedEncoder,
    *,
    options: Options,
    rule: cases.CaseRule,
    compute: Mapping[str, Any],
    threads: int = 8,
) -> EmbedPlan:
    """Inspects all slides and plans the work.

    Args:
      root: folder of slides or images.
      found, rejected: from `slides.find_slides` or `slides.find_images`.
      loaded: the encoder.
      options: of the user.
      rule: how case ids are found.
      compute: see `EmbedPlan`.
      threads: that inspect slides.

    Returns:
      The plan; equal files and arguments give equal plans.

    Raises:
      NothingUsable: no slide is left.
      DataError: unknown cases, tiles of several sizes or resolutions, or a resolution that is not the encoder's.
    """
    usable, refused = _inspect(root, found, options, threads)
    refused = [*rejected, *refused]
    if not usable:
        raise NothingUsable(root, refused)
    assigned = cases.assign([source.slide_id for source, _ in usable], rule)
    refused += [
        Rejected(source.file, source.slide_id, "not in the table", "the table of cases does not list this slide")
        for source, _ in usable
        if source.slide_id in assigned.not_listed
    ]
    planned = [
        PlannedSlide(source.slide_id, assigned.case_of[source.slide_id], source, facts)
        for source, facts in sorted(usable, key=lambda item: item[0].slide_id)
        if source.slide_id in assigned.case_of
    ]
    if not planned:
        raise NothingUsable(root, refused)
    common = _common(planned)
    check_resolution(loaded, common["mpp"], options.any_mpp)
    facts = _dataset_facts(planned, common, loaded, options, compute)
    itemsize = np.dtype(schema.FEATURE_DTYPES[options.dtype]).itemsize
    sizes = [slide.facts.count * facts["feat_dim"] * itemsize for slide in planned]
    limits = tuple(planned_writer.plan_shards(sizes, options.shard_bytes))
    notes = tuple(_notes(planned, assigned, facts, loaded))
    return EmbedPlan(root, facts, compute, tuple(planned), limits, tuple(sorted(refused)), notes)


def _inspect(
    root: pathlib.Path, found: Sequence[Source], options: Options, threads: int
) -> tuple[list[tuple[Source, TileFacts]], list[Rejected]]:
    def one(source: Source) -> TileFacts | Rejected:
        look = slides.inspect_images if source.coords is None else slides.inspect_slide
        try:
            return look(root, source, options.mpp)
        except Unusable as error:
            return Rejected(source.file, source.slide_id, error.reason, error.detail)

    with ThreadPoolExecutor(threads) as pool:
        results = list(zip(found, pool.map(one, found)))
    usable = [(source, facts) for source, facts in results if isinstance(facts, TileFacts)]
    return usable, [item for _, item in results if isinstance(item, Rejected)]


def _common(planned: Sequence[PlannedSlide]) -> dict[str, Any]:
    """The values that all slides share; refuses mixtures."""
    common = {}
    for field in _SAME:
        groups = collections.defaultdict(list)
        for slide in planned:
            groups[getattr(slide.facts, field)].append(slide.slide_id)
        known = {value: ids for value, ids in groups.items() if value is not None}
        if len(known) > 1:
            told = [f"{v:g}: {len(ids)} slides ({', '.join(ids[:3])})" for v, ids in sorted(known.items())]
            raise DataError(f"tiles of one data set have one {field}, and there are several: {'; '.join(told[:8])}")
        common[field] = next(iter(known), None)
    common["mpp"] = _common_mpp(planned)
    level0 = {slide.facts.patch_size_level0 for slide in planned}
    return {**common, "patch_size_level0": level0.pop() if len(level0) == 1 else None}


def _common_mpp(planned: Sequence[PlannedSlide]) -> float | None:
    """The resolution of all tiles: the median of values that differ no more than scanners of one magnification do."""
    known = sorted((s.facts.mpp, s.slide_id) for s in planned if s.facts.mpp is not None)
    if not known:
        return None
    (low, first), (high, last) = known[0], known[-1]
    if not slides.same_mpp(low, high):
        raise DataError(
            f"tiles of one data set have one resolution, and there are several: {low:g} um per pixel ({first}) to "
            f"{high:g} ({last}); tile all slides with the same --mpp, or embed them apart"
        )
    return known[len(known) // 2][0]


def check_resolution(loaded: LoadedEncoder, mpp: float | None, any_mpp: bool) -> None:
    """Refuses tiles of a resolution on which the encoder was not trained.

    Args:
      loaded: the encoder.
      mpp: micrometres per pixel of the tiles, or None.
      any_mpp: the user wants it all the same.

    Raises:
      DataError: saying both resolutions and what to do.
    """
    trained = loaded.encoder.mpp
    if not trained or any_mpp or loaded.weights.startswith(RANDOM):
        return
    told = f"the encoder {loaded.encoder.name} was trained at {' or '.join(f'{v:g}' for v in trained)} um per pixel"
    if mpp is None:
        raise DataError(f"{told}, and the resolution of the tiles is not recorded: give --mpp, or --any-mpp")
    if not any(slides.same_mpp(mpp, value) for value in trained):
        raise DataError(
            f"{told}, the tiles have {mpp:g}: tile the slides again with --mpp {trained[0]:g}, or pass --any-mpp, "
            f"which is recorded"
        )


def _dataset_facts(
    planned: Sequence[PlannedSlide],
    common: Mapping[str, Any],
    loaded: LoadedEncoder,
    options: Options,
    compute: Mapping[str, Any],
) -> dict[str, Any]:
    random = loaded.weights.startswith(RANDOM)
    encoder = loaded.facts() | {"patch_size": common["patch_size"], "compute_dtype": compute["dtype"]}
    encoder["stain"] = dict(options.stain) if options.stain is not None else None
    if random:
        encoder["name"] += " (random weights)"
    notes = f"Embeddings of an UNTRAINED encoder: {loaded.weights}. They serve to try the machinery." if random else ""
    if options.any_mpp:
        encoder["mpp_not_checked"] = True
    return shards.dataset_facts(
        name=options.name,
        feat_dim=loaded.encoder.features,
        dtype=options.dtype,
        seed=options.seed,
        encoder=encoder,
        mpp=common["mpp"],
        magnification=common["magnification"],
        patch_size_level0=common["patch_size_level0"],
        notes=notes,
    )


def _notes(
    planned: Sequence[PlannedSlide], assigned: cases.Assigned, facts: Mapping[str, Any], loaded: LoadedEncoder
) -> Iterable[str]:
    yield f"cases: {assigned.rule}; {len(planned)} slides of {len({s.case_id for s in planned})} cases"
    if facts["notes"]:
        yield f"WARNING: {facts['notes']}"
    if loaded.unused:
        yield f"tensors of the checkpoint that the embedding does not need: {len(loaded.unused)}"
    transform, size = loaded.encoder.transform, facts["encoder"]["patch_size"]
    if size != transform.size:
        yield (
            f"tiles of {size} px are resized to {transform.resize} px ({transform.method}) and cropped to "
            f"{transform.size}"
        )
    if facts["encoder"]["stain"]:
        yield f"stains: {facts['encoder']['stain'].get('method', 'normalised')}, fitted to each slide"
    if facts["mpp"] is None:
        yield "the resolution of the tiles is not recorded; --mpp stores it in the manifest"
