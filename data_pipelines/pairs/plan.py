"""Plans an import of image pairs: which examples, labels, groups and vectors, of which size, in which shards."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines import planned_writer, tfds_face
from data_pipelines.errors import DataError
from data_pipelines.importers.plan import NothingUsable
from data_pipelines.pairs import adapters, labels, pixels
from data_pipelines.pairs.labels import LabelRule
from data_pipelines.pairs.listing import Listed, Listing, grouped, stem
from data_pipelines.pairs.vectors import VectorTable, read_vectors
from data_pipelines.planned_writer import Rejected
from data_pipelines.shards import check_json
from data_pipelines.text_table import BLANK, read_text_table

Size = tuple[int, int]
ID_COLUMNS = ("example_id", "name", "file")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may say about a source.

    Attributes:
      layout: see `adapters`.
      image_folder, partner_folder, missing_partner: see `adapters.list_pairs`.
      rule: how labels follow from names; None: HER2 grades for folders and BCI, as listed for tables and images, none
        for MIST.
      labels: table of labels by example id, name or file, in place of a rule.
      label_column: its column.
      classes: the classes in their order; empty: those found.
      group_regex: groups by file name; empty: as listed.
      vectors: file of privileged vectors; empty: none.
      resize: (height, width) of the stored images; None: as they are.
      expect_size: (height, width) that images must have (before resizing); None: one size, whichever it is.
      multiple_of: sides of the stored images must be multiples of this.
      mpp: micrometres per pixel of the stored images, or None.
      notes: free text for the manifest.
    """

    layout: str = adapters.AUTO
    image_folder: str = ""
    partner_folder: str = ""
    missing_partner: str = adapters.QUARANTINE
    rule: LabelRule | None = None
    labels: str = ""
    label_column: str = "label"
    classes: tuple[str, ...] = ()
    group_regex: str = ""
    vectors: str = ""
    resize: Size | None = None
    expect_size: Size | None = None
    multiple_of: int = 1
    mpp: float | None = None
    notes: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class PairPlan:
    """Everything that decides the bytes of the dataset.

    Attributes:
      listing: the examples, with labels and groups.
      facts: dataset-level fields of manifest.json.
      shards: consecutive ranges of examples; a shard holds one split.
      original_size: (height, width) of the images before resizing; None: any.
      options: as given.
      vectors: privileged vectors, or None.
      n_bytes: size of every example's files, which identifies them.
    """

    listing: Listing
    facts: Mapping[str, Any]
    shards: tuple[range, ...]
    original_size: Size | None
    options: Options
    vectors: VectorTable | None
    n_bytes: tuple[int, ...]

    def key(self, index: int) -> str:
        """Identity of one shard."""
        entries = [[dataclasses.astuple(self.listing.examples[i]), self.n_bytes[i]] for i in self.shards[index]]
        return planned_writer.plan_key([self._identity(), entries])

    def fingerprint(self) -> str:
        """Identity of the import."""
        return planned_writer.plan_key([self._identity(), [self.key(i) for i in range(len(self.shards))]])

    def _identity(self) -> list[Any]:
        vectors = "" if self.vectors is None else planned_writer.plan_key(self.vectors.values.tolist())
        return [dict(self.facts), vectors, self.original_size]

    def split_of(self, index: int) -> str:
        """The TFDS split of a shard: its official part, "train" if there is none."""
        return self.listing.examples[self.shards[index].start].split or tfds_face.SPLIT


def make_plan(
    source: pathlib.Path, name: str, options: Options, *, shard_bytes: int = planned_writer.SHARD_BYTES
) -> PairPlan:
    """Lists a source, gives its examples labels and groups, and fixes the size of the images.

    Args:
      source: folder or table.
      name: of the dataset.
      options: see `Options`.
      shard_bytes: a shard is closed before an example would take it beyond this.

    Raises:
      DataError: see `adapters`, `labels` and `vectors`; images of several sizes; a size that does not fit.
      NothingUsable: no image can be opened.
    """
    listing = adapters.list_pairs(
        source,
        options.layout,
        image_folder=options.image_folder,
        partner_folder=options.partner_folder,
        missing_partner=options.missing_partner,
    )
    listing = dataclasses.replace(listing, examples=tuple(_described(listing, options)))
    classes = labels.class_names([example.label for example in listing.examples], options.classes)
    vectors = read_vectors(options.vectors, [e.example_id for e in listing.examples]) if options.vectors else None
    sizes = _sizes(listing)
    original = _original_size(listing, sizes, options)
    stored = options.resize or original
    _check_multiple(stored, options.multiple_of)
    changed = {size: n for size, n in collections.Counter(sizes.values()).items() if size != stored}
    facts = {
        "name": name,
        "image_size": list(stored),
        "partner": listing.has_partners,
        "vector_size": 0 if vectors is None else vectors.size,
        "vector_names": [] if vectors is None else list(vectors.names),
        "class_names": list(classes),
        "simulated": False,
        "simulation": None,
        "resized": _resize_facts(changed, options.resize),
        "mpp": options.mpp,
        "notes": options.notes,
        "label_rule": _rule(listing.layout, options).text() if not options.labels else f"table {options.label_column}",
    }
    check_json(facts)
    n_bytes = tuple(_bytes(listing.root, example) for example in listing.examples)
    shards = _plan_shards(listing.examples, n_bytes, shard_bytes)
    return PairPlan(listing, facts, shards, original, options, vectors, n_bytes)


def _rule(layout: str, options: Options) -> LabelRule:
    if options.rule is not None:
        return options.rule
    return LabelRule() if layout in (adapters.BCI, adapters.FOLDER) else LabelRule(labels.NONE)


def _described(listing: Listing, options: Options) -> list[Listed]:
    examples = list(listing.examples)
    if options.labels:
        examples = _labels_from_table(examples, options)
    elif options.rule is not None or listing.layout in (adapters.BCI, adapters.FOLDER):
        names = [pathlib.PurePosixPath(example.image).name for example in examples]
        found = labels.apply(_rule(listing.layout, options), names)
        examples = [dataclasses.replace(example, label=label) for example, label in zip(examples, found)]
    return grouped(examples, options.group_regex) if options.group_regex else examples


def _labels_from_table(examples: list[Listed], options: Options) -> list[Listed]:
    table = read_text_table(options.labels)
    key = next((name for name in ID_COLUMNS if name in table.columns), None)
    if key is None or options.label_column not in table.columns:
        raise DataError(
            f"{options.labels}: expected a column {' or '.join(ID_COLUMNS)} and {options.label_column!r} "
            f"(--label-column); the table has {list(table.columns)}"
        )
    label_of = dict(zip(table[key], table[options.label_column]))
    found = []
    for example in examples:
        name = pathlib.PurePosixPath(example.image).name
        text = next((label_of[k] for k in (example.example_id, example.image, name, stem(name)) if k in label_of), "")
        found.append(dataclasses.replace(example, label="" if text.lower() in BLANK else text))
    if not any(example.label for example in found):
        ids = ", ".join(example.example_id for example in found[:3])
        raise DataError(f"{options.labels}: no {key} is one of the examples (first {ids})")
    return found


def _sizes(listing: Listing) -> dict[str, Size]:
    """Example id -> (height, width) of its H&E image by the file's header; unreadable files are left out."""
    found = {}
    for example in listing.examples:
        if example.image_box is not None:
            left, top, right, bottom = example.image_box
            found[example.example_id] = bottom - top, right - left
            continue
        size = pixels.header_size(listing.root / example.image)
        if size is not None:
            found[example.example_id] = size
    if not found:
        rejected = [Rejected(e.image, e.example_id, "not decodable", "no image header") for e in listing.examples]
        raise NothingUsable(listing.root, [*listing.rejected, *rejected])
    return found


def _original_size(listing: Listing, sizes: Mapping[str, Size], options: Options) -> Size | None:
    counts = collections.Counter(sizes.values())
    if options.expect_size is not None:
        if options.expect_size not in counts:
            raise DataError(
                f"{listing.root}: no image has {_text(options.expect_size)} pixels; found {_counts(counts)}"
            )
        return options.expect_size
    if options.resize is not None:
        return None
    if len(counts) > 1:
        raise DataError(
            f"{listing.root}: the images have several sizes: {_counts(counts)}; bring them to one with --resize, or "
            "leave the others out with --size"
        )
    return next(iter(counts))


def _check_multiple(size: Size, multiple_of: int) -> None:
    if any(side % multiple_of for side in size):
        fit = [max(multiple_of, round(side / multiple_of) * multiple_of) for side in size]
        raise DataError(
            f"images of {_text(size)} pixels do not fit: their sides must be multiples of {multiple_of} (the stem of "
            f"the network would lose the rest); resize them, e.g. --resize {_text(tuple(fit))}, which is recorded"
        )


def _resize_facts(changed: Mapping[Size, int], resize: Size | None) -> dict[str, Any] | None:
    if resize is None or not changed:
        return None
    return {"from": {_text(size): n for size, n in sorted(changed.items())}, "to": list(resize), "filter": "lanczos"}


def _counts(counts: Mapping[Size, int]) -> str:
    return ", ".join(f"{_text(size)} ({n})" for size, n in sorted(counts.items(), key=lambda item: -item[1])[:8])


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _bytes(root: pathlib.Path, example: Listed) -> int:
    return sum((root / file).stat().st_size for file in (example.image, example.partner) if file)


def _plan_shards(examples: tuple[Listed, ...], n_bytes: tuple[int, ...], limit: int) -> tuple[range, ...]:
    """Shards within every split, in the order of the examples, which are sorted by split."""
    starts = [i for i, example in enumerate(examples) if i == 0 or example.split != examples[i - 1].split]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(examples)]):
        ranges = planned_writer.plan_shards(n_bytes[start:stop], limit)
        found += [range(start + part.start, start + part.stop) for part in ranges]
    return tuple(found)
