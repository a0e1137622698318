"""Labelled patches, whatever they came from: images, feature arrays, or both, with classes, groups and parts."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.errors import DataError

PARTS = ("train", "val", "test")
REFUSE, LEAVE_OUT = "refuse", "leave_out"
SHOWN = 5


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledPatches:
    """n patches, all with a label.

    Attributes:
      name: of the set.
      ids: unique.
      label: [n] int32 class index.
      class_names: C names.
      group: slide or patient of each patch, empty where unknown.
      part: official part of each patch ("train", "val", "test"), empty where there is none.
      digest: identifies the content of each patch: equal content, equal digest.
      order: [n] int64 place in the published file, or None. Neighbours may come from one slide.
      arrays: name -> [n, D] float32 feature arrays that the set itself holds.
      read: row -> uint8 [H, W, 3], or None if the set holds no images. Thread-safe.
      simulated: whether the patches are simulated.
      notes: what was left out or assumed, for people.
    """

    name: str
    ids: tuple[str, ...]
    label: np.ndarray
    class_names: tuple[str, ...]
    group: tuple[str, ...]
    part: tuple[str, ...]
    digest: tuple[str, ...]
    order: np.ndarray | None = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    read: Callable[[int], np.ndarray] | None = None
    simulated: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """SHA-256 (hex) over ids, contents, labels, groups, parts and order."""
        order = None if self.order is None else self.order.tolist()
        facts = [self.ids, self.digest, self.label.tolist(), self.class_names, self.group, self.part, order]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def counts(self) -> dict[str, int]:
        """Class name -> patches."""
        found = np.bincount(self.label, minlength=len(self.class_names))
        return dict(zip(self.class_names, found.tolist()))


@dataclasses.dataclass(frozen=True)
class Row:
    """One patch as a table lists it.

    Attributes:
      id: its key.
      label: class name, empty without one.
      group: slide or patient, empty if unknown.
      part: official part, empty if there is none.
    """

    id: str
    label: str
    group: str = ""
    part: str = ""


def kept_rows(rows: Sequence[Row], where: str, unlabelled: str = REFUSE) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which rows can be evaluated.

    Args:
      rows: as listed.
      where: file or folder, for messages.
      unlabelled: "refuse" rows without a label, or "leave_out".

    Returns:
      (rows that have a label, a note if others were left out).

    Raises:
      DataError: naming the first rows without a label, or keys that occur twice.
    """
    twice = [key for key, count in collections.Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{where}: {len(twice)} ids occur twice, first {twice[:SHOWN]}; every patch needs its own")
    missing = [row.id for row in rows if not row.label]
    if len(missing) == len(rows):
        raise DataError(f"{where}: none of {len(rows)} patches has a label, so nothing can be probed")
    if missing and unlabelled != LEAVE_OUT:
        raise DataError(
            f"{where}: {len(missing)} of {len(rows)} patches have no label, first {', '.join(missing[:SHOWN])}: fill "
            "the column, or leave them out with --leave-out-unlabelled"
        )
    note = (f"{len(missing)} patches without a label are left out",) if missing else ()
    return np.flatnonzero([bool(row.label) for row in rows]), note


def columns(rows: Sequence[Row], where: str, classes: Sequence[str] = ()) -> dict[str, object]:
    """The fields of `LabelledPatches` that follow from a table.

    Args:
      rows: labelled ones.
      where: for messages.
      classes: the classes in their order; default: those found, sorted.

    Returns:
      ids, label, class_names, group, part.

    Raises:
      DataError: fewer than two classes, a label that is no class, or an unknown part.
    """
    names = tuple(classes) or tuple(sorted({row.label for row in rows}))
    unknown = sorted({row.label for row in rows} - set(names))
    if unknown:
        raise DataError(f"{where}: labels {unknown[:SHOWN]} are none of the classes {list(names)}")
    found = {row.label for row in rows}
    if len(found) < 2:
        raise DataError(f"{where}: all {len(rows)} patches have the class {sorted(found)[0]!r}; a probe needs two")
    wrong = next((row for row in rows if row.part and row.part not in PARTS), None)
    if wrong is not None:
        raise DataError(f"{where}: patch {wrong.id!r} has the part {wrong.part!r}; expected one of {PARTS} or nothing")
    index = {name: i for i, name in enumerate(names)}
    return {
        "ids": tuple(row.id for row in rows),
        "label": np.array([index[row.label] for row in rows], np.int32),
        "class_names": names,
        "group": tuple(row.group for row in rows),
        "part": tuple(row.part for row in rows),
    }


def digest_of(*contents: bytes) -> str:
    """SHA-256 (hex) of the content of a patch."""
    found = hashlib.sha256()
    for content in contents:
        found.update(content)
    return found.hexdigest()
