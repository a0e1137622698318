"""What a source of image pairs lists: one entry per example, before any file is opened."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.planned_writer import Rejected

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
SPLITS = ("train", "val", "test")
MISSING_PARTNER, ORPHAN = "missing partner", "partner without its H&E image"
Box = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Listed:
    """One example.

    Attributes:
      example_id: its key, unique.
      image: file of the H&E image, relative to the root of the listing.
      partner: file of the partner image, or "".
      label: text of its label, or "".
      group: slide or patient, or "".
      split: official part, one of `SPLITS`, or "".
      image_box: (left, top, right, bottom) of the part of the file that is meant; None: all of it.
      partner_box: the same for the partner.
    """

    example_id: str
    image: str
    partner: str = ""
    label: str = ""
    group: str = ""
    split: str = ""
    image_box: Box | None = None
    partner_box: Box | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """Everything that an adapter found.

    Attributes:
      layout: name of the adapter.
      root: folder that the files are relative to.
      examples: sorted by split and id, independent of the order of the file system (deviation D10).
      rejected: what cannot be an example, with reasons.
      has_partners: whether the source has partner images at all.
      evidence: why the layout was recognised, or remarks.
    """

    layout: str
    root: pathlib.Path
    examples: tuple[Listed, ...]
    rejected: tuple[Rejected, ...]
    has_partners: bool
    evidence: tuple[str, ...] = ()


def images_in(folder: pathlib.Path, *, deep: bool = False) -> list[str]:
    """Names of the image files of a folder (or, relative to it, of all folders below), sorted."""
    found = folder.rglob("*") if deep else folder.iterdir()
    return sorted(
        path.relative_to(folder).as_posix()
        for path in found
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def match_partners(images: Sequence[str], partners: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Pairs files by name, and where that fails by name without extension.

    Args:
      images: names.
      partners: names in the partner's folder.

    Returns:
      (image -> partner, partners that no image has).

    Raises:
      DataError: several files fit one name.
    """
    by_name, by_stem = set(partners), {}
    for name in partners:
        by_stem.setdefault(stem(name), []).append(name)
    found = {}
    for name in images:
        candidates = [name] if name in by_name else by_stem.get(stem(name), [])
        if len(candidates) > 1:
            raise DataError(f"{name} has several possible partners: {', '.join(candidates)}; keep one of them")
        if candidates:
            found[name] = candidates[0]
    return found, sorted(by_name - set(found.values()))


def stem(name: str) -> str:
    """A file name without its last extension."""
    return name.rpartition(".")[0] or name


def with_ids(examples: Sequence[Listed]) -> tuple[Listed, ...]:
    """Examples whose ids are their stems, with the split in front where a stem occurs in several splits; sorted.

    Raises:
      DataError: an id occurs twice within a split.
    """
    same: dict[str, list[Listed]] = {}
    for example in examples:
        same.setdefault(example.example_id, []).append(example)
    clash = [key for key, found in same.items() if len({e.split for e in found}) < len(found)]
    if clash:
        files = ", ".join(example.image for example in same[clash[0]])
        raise DataError(f"{len(clash)} example ids occur twice, first {clash[0]!r} ({files}): rename the files")
    if any(len(found) > 1 for found in same.values()):
        examples = [dataclasses.replace(e, example_id=f"{e.split}/{e.example_id}") for e in examples]
    return tuple(sorted(examples, key=lambda e: (SPLITS.index(e.split) if e.split else -1, e.example_id)))


def grouped(examples: Sequence[Listed], pattern: str) -> list[Listed]:
    """The examples with groups by a regular expression on the file name: its group 1, or all that it finds.

    Raises:
      DataError: it does not match some names.
    """
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise DataError(f"--group-regex {pattern}: no regular expression: {error}") from error
    found = [rule.search(pathlib.PurePosixPath(example.image).name) for example in examples]
    missed = [example.image for example, match in zip(examples, found) if match is None]
    if missed:
        raise DataError(
            f"--group-regex {pattern} does not match {len(missed)} of {len(examples)} file names, first "
            f"{', '.join(missed[:5])}: an example without a group could lie in training and in test"
        )
    return [
        dataclasses.replace(example, group=match.group(1 if rule.groups else 0))
        for example, match in zip(examples, found)
    ]


def check_splits(splits: Sequence[str], where: str) -> None:
    """Refuses unknown names of parts, and parts for some examples only.

    Raises:
      DataError: naming them.
    """
    unknown = sorted({name for name in splits if name and name not in SPLITS})
    if unknown:
        raise DataError(f"{where}: split {unknown[0]!r} is unknown; expected one of {SPLITS}, or empty everywhere")
    if "" in splits and set(splits) != {""}:
        raise DataError(f"{where}: some examples have no split; give one to all of them, or to none")
