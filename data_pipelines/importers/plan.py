"""What an import will do: which slides go where under which ids, and what is refused; decided before writing."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines import planned_writer, schema, shards
from data_pipelines.errors import DataError
from data_pipelines.importers import cases, reading, sources
from data_pipelines.importers.detect import LAYOUTS
from data_pipelines.importers.header import HDF5, import_h5py
from data_pipelines.importers.sources import Options, SlideFacts, Source, Unusable
from data_pipelines.planned_writer import Rejected
from data_pipelines.text_table import listed

_SAME = ("feat_dim", "encoder", "magnification", "mpp", "patch_size")
"""Facts that must not differ within a dataset. Patch sizes at level 0 may: scanners have different magnifications."""


@dataclasses.dataclass(frozen=True)
class PlannedSlide:
    """One slide that will be imported."""

    slide_id: str
    case_id: str
    source: Source
    facts: SlideFacts
    n_bytes: int
    level0_mpp: float | None


@dataclasses.dataclass(frozen=True)
class ImportPlan:
    """The whole import.

    Attributes:
      root: the folder.
      layout: name of its layout.
      options: of the user.
      facts: dataset-level facts, see `shards.dataset_facts`.
      slides: sorted by slide id.
      shards: ranges of `slides`.
      rejected: files for quarantine.csv that were found before reading.
      notes: lines for people.
    """

    root: pathlib.Path
    layout: str
    options: Options
    facts: Mapping[str, Any]
    slides: tuple[PlannedSlide, ...]
    shards: tuple[range, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]

    def slide_facts(self, slide: PlannedSlide) -> dict[str, Any]:
        """What is recorded about a slide, JSON-serialisable, without times."""
        source = dataclasses.asdict(slide.source)
        facts = dataclasses.asdict(slide.facts)
        own = {"slide_id": slide.slide_id, "case_id": slide.case_id, "level0_mpp": slide.level0_mpp}
        return {**source, **facts, **own}

    def key(self, index: int) -> str:
        """Identifies the content of a shard: equal keys, equal bytes. Includes the state of the source files."""
        entries = [
            [self.slide_facts(slide), *_state(self.root / slide.source.file)]
            for slide in (self.slides[i] for i in self.shards[index])
        ]
        return planned_writer.plan_key([dict(self.facts), self.options.coords, entries])

    def fingerprint(self) -> str:
        """Identifies the import for an idempotent repetition: facts, slides and sizes of files, but no times."""
        entries = [[self.slide_facts(slide), slide.n_bytes] for slide in self.slides]
        limits = [[r.start, r.stop] for r in self.shards]
        return planned_writer.plan_key([dict(self.facts), self.options.coords, entries, limits])


def make_plan(
    root: pathlib.Path,
    layout: str,
    *,
    name: str,
    options: Options,
    rule: cases.CaseRule,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = planned_writer.SHARD_BYTES,
    threads: int = 8,
) -> ImportPlan:
    """Inspects a folder and plans its import.

    Args:
      root: the folder.
      layout: name of its layout.
      name: name of the dataset.
      options: of the user.
      rule: how case ids are found.
      dtype: stored dtype.
      seed: of the order of patches.
      shard_bytes: limit of a shard.
      threads: that inspect headers.

    Returns:
      The plan; equal folders and arguments give equal plans.

    Raises:
      DataError: nothing usable, slide ids that occur twice, unknown cases, mixed or contradictory facts, or coordinates
        that cannot be converted; names the files.
    """
    found = _find(root, layout, options)
    usable, rejected = _inspect(root, layout, found, options, threads)
    if not usable:
        raise NothingUsable(root, rejected)
    slide_ids = [_slide_id(source) for source, _ in usable]
    assigned = cases.assign(slide_ids, rule)
    rejected += [
        Rejected(source.file, slide, "not in the table", "the table of cases does not list this slide")
        for (source, _), slide in zip(usable, slide_ids)
        if slide in assigned.not_listed
    ]
    kept = [(s, *item) for s, item in zip(slide_ids, usable) if s in assigned.case_of]
    if not kept:
        raise DataError(
            f"{rule.table}: lists none of the {len(slide_ids)} slides; the folder has {listed(slide_ids[:3])}, the "
            f"table {listed(assigned.no_file[:3])}"
        )
    planned = [
        PlannedSlide(
            slide, assigned.case_of[slide], source, facts, (root / source.file).stat().st_size,
            assigned.level0_mpp.get(slide, options.level0_mpp),
        )
        for slide, source, facts in sorted(kept, key=lambda item: item[0])
    ]  # fmt: skip
    _check_coords(planned, options)
    common = _common(planned, options)
    facts = _dataset_facts(planned, common, name, options, dtype, seed)
    sizes = [s.facts.n_patches * s.facts.feat_dim * np.dtype(schema.FEATURE_DTYPES[dtype]).itemsize for s in planned]
    return ImportPlan(
        root,
        layout,
        options,
        facts,
        tuple(planned),
        tuple(planned_writer.plan_shards(sizes, shard_bytes)),
        tuple(sorted(rejected)),
        tuple(_notes(planned, assigned, common)),
    )


class NothingUsable(DataError):
    """No file of the folder can be imported; `rejected` says why."""

    def __init__(self, root: pathlib.Path, rejected: Sequence[Rejected]):
        self.rejected = tuple(sorted(rejected))
        counts = collections.Counter(item.reason for item in rejected)
        first = f"; {self.rejected[0].file}: {self.rejected[0].detail}" if rejected else ""
        super().__init__(f"{root}: none of {len(rejected)} files can be imported: {_counted(counts)}{first}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "there are none"


def _find(root: pathlib.Path, layout: str, options: Options) -> list[Source]:
    found = LAYOUTS[layout].find(root, options)
    matches = [s for s in found if any(pathlib.PurePosixPath(s.file).match(glob) for glob in options.exclude)]
    found = sorted((s for s in found if s not in matches), key=lambda s: (s.slide_id, s.file))
    if not found:
        raise DataError(f"{root}: no feature file of the layout {layout} ({len(matches)} were excluded)")
    if any(s.file.endswith(HDF5) for s in found):
        import_h5py()  # A missing library is no fault of the files.
    _check_unique(found)
    return found


def _slide_id(source: Source) -> str:
    """Slide ids are composed Unicode, as tables have them; some file systems give names decomposed."""
    return unicodedata.normalize("NFC", source.slide_id)


def _check_unique(found: Iterable[Source]) -> None:
    files = collections.defaultdict(list)
    for source in found:
        files[_slide_id(source)].append(source.file)
    twice = [f"{slide!r}: {', '.join(names)}" for slide, names in sorted(files.items()) if len(names) > 1]
    if twice:
        raise DataError(
            f"{len(twice)} slide ids occur in several files; keep one of each, or leave some out with --exclude: "
            f"{'; '.join(twice[:10])}{'; ...' if len(twice) > 10 else ''}"
        )


def _inspect(
    root: pathlib.Path, layout: str, found: Sequence[Source], options: Options, threads: int
) -> tuple[list[tuple[Source, SlideFacts]], list[Rejected]]:
    def one(source: Source) -> SlideFacts | Rejected:
        try:
            return reading.inspect(root, LAYOUTS[layout], source, options)
        except Unusable as error:
            return Rejected(source.file, source.slide_id, error.reason, error.detail)

    with ThreadPoolExecutor(threads) as pool:
        results = list(zip(found, pool.map(one, found)))
    usable = [(source, result) for source, result in results if isinstance(result, SlideFacts)]
    return usable, [result for _, result in results if isinstance(result, Rejected)]


def _check_coords(planned: Sequence[PlannedSlide], options: Options) -> None:
    if options.coords != "level0":
        return
    unknown = [s for s in planned if s.facts.coords_unit in (sources.MICROMETRES, sources.GRID224) and not s.level0_mpp]
    if unknown:
        raise DataError(
            f"{len(unknown)} slides have coordinates in {unknown[0].facts.coords_unit}, and the size of their level-0 "
            f"pixels is not recorded ({listed([s.slide_id for s in unknown[:3]])}): give --level0-mpp, or a column "
            f"level0_mpp in the table of --cases, or choose --coords as-recorded or --coords drop"
        )


def _common(planned: Sequence[PlannedSlide], options: Options) -> dict[str, Any]:
    """The values that all slides share; refuses mixtures, and options that contradict the files."""
    common = {}
    for field in _SAME:
        groups = collections.defaultdict(list)
        for slide in planned:
            groups[getattr(slide.facts, field)].append(slide.source.file)
        known = {value: files for value, files in groups.items() if value is not None}
        if len(known) > 1:
            raise DataError(f"a dataset has one {field}, and the files have several: {_groups(known)}")
        stated = getattr(options, field, None)
        recorded = next(iter(known), None)
        if None not in (stated, recorded) and stated != recorded:
            raise DataError(
                f"{field} is {recorded!r} by {len(known[recorded])} files, e.g. {known[recorded][0]}, and {stated!r} "
                f"by the command line; leave the option out, or check the folder"
            )
        common[field] = recorded if recorded is not None else stated
    return common


def _groups(groups: Mapping[Any, Sequence[str]]) -> str:
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0])))
    shown = [
        f"{value!r}: {len(files)} files ({', '.join(files[:5])}{', ...' * (len(files) > 5)})"
        for value, files in ordered
    ]
    return "; ".join(shown[:8]) + "; import them apart, or leave some out with --exclude"


def _dataset_facts(
    planned: Sequence[PlannedSlide], common: Mapping[str, Any], name: str, options: Options, dtype: str, seed: int
) -> dict[str, Any]:
    level0 = {slide.facts.patch_size_level0 for slide in planned}
    size = level0.pop() if len(level0) == 1 else None
    if None not in (size, options.patch_size_level0) and size != options.patch_size_level0:
        raise DataError(f"patch_size_level0 is {size} by the files and {options.patch_size_level0} by the command line")
    encoder = {"name": common["encoder"], "licence": options.encoder_licence, "patch_size": common["patch_size"]}
    return shards.dataset_facts(
        name=name,
        feat_dim=common["feat_dim"],
        dtype=dtype,
        seed=seed,
        encoder={key: value for key, value in encoder.items() if value is not None} or None,
        mpp=common["mpp"],
        magnification=common["magnification"],
        patch_size_level0=size if size is not None else options.patch_size_level0,
    )


def _notes(planned: Sequence[PlannedSlide], assigned: cases.Assigned, common: Mapping[str, Any]) -> Iterable[str]:
    yield f"cases: {assigned.rule}; {len(planned)} slides of {len({s.case_id for s in planned})} cases"
    if assigned.no_file:
        yield f"{len(assigned.no_file)} slides of the table have no file: {listed(assigned.no_file[:5])}"
    without = sum(slide.facts.coords is None for slide in planned)
    if without:
        yield f"{without} slides have no coordinates (stored as -1)"
    for field in ("encoder", "magnification", "mpp"):
        if common[field] is None:
            yield f"{field} is not recorded in the files; --{field} stores it in the manifest"


def _state(path: pathlib.Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


Progress = Callable[[int], None]
"""Called with the number of slides that were finished since the last call."""
