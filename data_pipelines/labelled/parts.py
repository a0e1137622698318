"""Which patches train and which are tested: official parts, groups, blocks of the published order, or single patches.

Whatever leakage a split cannot exclude is said in its marks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.cohort import Cohort
from data_pipelines.errors import DataError
from data_pipelines.labelled.patches import SHOWN, LabelledPatches
from data_pipelines.splits import make_folds

OFFICIAL, GROUPS, BLOCKS, PATCHES = "official parts", "groups", "blocks of the published order", "single patches"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How patches are split.

    Attributes:
      folds: of the cross-validation where there are no official parts.
      seed: of the folds.
      official: take the official parts where there are some.
      allow_overlap: accept a group in both official parts; marked.
      block: neighbouring patches of a class that are resampled together where only their order is known.
    """

    folds: int = 5
    seed: int = 0
    official: bool = True
    allow_overlap: bool = False
    block: int = 20

    def __post_init__(self):
        if self.folds < 2 or self.block < 1:
            raise DataError(f"--folds {self.folds} and --block {self.block}: expected at least 2 and 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """Sorted int rows that train and that are tested."""

    train: np.ndarray
    test: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The split of a set.

    Attributes:
      kind: "official parts", "groups", "blocks of the published order" or "single patches".
      folds: at least one.
      unit: what each patch is resampled with: its group, its block, or its own id.
      unit_name: in words, plural.
      marks: what must be said beside every number.
      notes: further remarks.
    """

    kind: str
    folds: tuple[Fold, ...]
    unit: tuple[str, ...]
    unit_name: str
    marks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def split(patches: LabelledPatches, protocol: Protocol) -> Parts:
    """Splits labelled patches.

    Args:
      patches: the set.
      protocol: how.

    Returns:
      Official parts if there are any; otherwise folds that keep groups together; without groups contiguous blocks of
      the published order within each class; without that stratified folds of single patches.

    Raises:
      DataError: no training or test part, a group in both, fewer groups than folds, or a training part of one class.
    """
    if protocol.official and any(patches.part):
        parts = _official(patches, protocol)
    elif any(patches.group):
        parts = _grouped(patches, protocol)
    elif patches.order is not None:
        parts = _blocks(patches, protocol)
    else:
        parts = _single(patches, protocol)
    _check_classes(patches, parts)
    shared = shared_contents(patches, parts)
    if shared:
        mark = f"{shared} tested patches are identical to a training patch"
        parts = dataclasses.replace(parts, marks=(*parts.marks, mark))
    return parts


def shared_contents(patches: LabelledPatches, parts: Parts) -> int:
    """How many tested patches have exactly the content of a training patch of their fold."""
    digest = np.array(patches.digest)
    return int(sum(np.isin(digest[fold.test], digest[fold.train]).sum() for fold in parts.folds))


def label_subsets(
    label: np.ndarray, rows: np.ndarray, fractions: Sequence[float], seed: Sequence[int]
) -> dict[float, np.ndarray]:
    """Nested, stratified subsets of the training rows.

    Args:
      label: [n] int class of every patch.
      rows: training rows.
      fractions: shares of the labels in (0, 1].
      seed: of the draw.

    Returns:
      fraction -> sorted rows: of every class its share, rounded, at least one; each subset contains the smaller ones.
    """
    rng = np.random.default_rng(list(seed))
    by_class = [rng.permutation(rows[label[rows] == c]) for c in np.unique(label[rows])]
    found = {}
    for fraction in fractions:
        taken = [own[: max(1, int(np.floor(fraction * len(own) + 0.5)))] for own in by_class]
        found[fraction] = np.sort(np.concatenate(taken))
    return found


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The label fractions, largest first.

    Raises:
      DataError: none, one outside (0, 1], or one twice.
    """
    if not fractions or len(set(fractions)) < len(fractions) or not all(0 < f <= 1 for f in fractions):
        raise DataError(f"--fractions {list(fractions)}: expected different shares of the labels in (0, 1], e.g. 1,0.1")
    return tuple(sorted(fractions, reverse=True))


def _official(patches: LabelledPatches, protocol: Protocol) -> Parts:
    part = np.array(patches.part)
    train, test = np.flatnonzero(part == "train"), np.flatnonzero(part == "test")
    if not len(train) or not len(test):
        found = {str(name or "none"): int((part == name).sum()) for name in np.unique(part)}
        raise DataError(
            f"{patches.name}: the official parts are {found}; a probe needs train and test: draw folds instead with "
            "--no-official-parts"
        )
    unit, unit_name, notes = _units(patches)
    marks = [] if any(patches.group) else [_NO_GROUPS]
    own = np.array(patches.group)
    shared = sorted((set(own[train]) & set(own[test])) - {""})
    if shared and not protocol.allow_overlap:
        raise DataError(
            f"{patches.name}: {len(shared)} groups lie in the training and in the test part, first {shared[:SHOWN]}: "
            "accept it, marked, with --allow-overlap, or draw folds by group with --no-official-parts"
        )
    marks += [f"{len(shared)} groups lie in both parts: no estimate for new patients"] if shared else []
    unused = len(part) - len(train) - len(test)
    notes += [f"{unused} patches of no part, or of val, are not used: nothing is selected on them"] if unused else []
    return Parts(OFFICIAL, (Fold(train, test),), unit, unit_name, tuple(marks), tuple(notes))


_NO_GROUPS = "no slide or patient ids: patches of one slide may train and be tested, leakage cannot be excluded"


def _units(patches: LabelledPatches) -> tuple[tuple[str, ...], str, list[str]]:
    """What is resampled: groups, and patches without a group on their own."""
    if not any(patches.group):
        return patches.ids, "patches", []
    # Prefixes keep a group and a patch of the same name apart.
    unit = tuple(f"group {g}" if g else f"patch {i}" for g, i in zip(patches.group, patches.ids))
    alone = patches.group.count("")
    return unit, "groups", [f"{alone} patches without a group are groups of their own"] if alone else []


def _grouped(patches: LabelledPatches, protocol: Protocol) -> Parts:
    unit, unit_name, notes = _units(patches)
    return Parts(GROUPS, _drawn(patches, unit, protocol, "groups"), unit, unit_name, notes=tuple(notes))


def _single(patches: LabelledPatches, protocol: Protocol) -> Parts:
    return Parts(PATCHES, _drawn(patches, patches.ids, protocol, "patches"), patches.ids, "patches", (_NO_GROUPS,))


def _drawn(patches: LabelledPatches, unit: Sequence[str], protocol: Protocol, what: str) -> tuple[Fold, ...]:
    first = np.unique(np.array(unit), return_index=True)[1]
    sizes = np.bincount(patches.label[first], minlength=len(patches.class_names))
    small = {patches.class_names[c]: int(size) for c, size in enumerate(sizes) if 0 < size < protocol.folds}
    if small:
        raise DataError(
            f"{patches.name}: too few {what} for --folds {protocol.folds}: {small} (class: {what}); at most "
            f"--folds {min(small.values())} is possible"
            + ("" if min(small.values()) > 1 else ", so give official parts or more data")
        )
    n = len(patches)
    cohort = Cohort(tuple(unit), np.arange(n, dtype=np.int32), patches.ids, patches.label,
                    class_names=patches.class_names, unit="slide")  # fmt: skip
    drawn = make_folds(cohort, n_folds=protocol.folds, val_fraction=0.0, seed=protocol.seed)
    return tuple(Fold(fold.train, fold.test) for fold in drawn)


def _blocks(patches: LabelledPatches, protocol: Protocol) -> Parts:
    fold, unit = np.empty(len(patches), int), np.empty(len(patches), object)
    for c, name in enumerate(patches.class_names):
        rows = np.flatnonzero(patches.label == c)
        rows = rows[np.argsort(patches.order[rows], kind="stable")]
        if 0 < len(rows) < protocol.folds:
            raise DataError(
                f"{patches.name}: class {name!r} has {len(rows)} patches, fewer than --folds {protocol.folds}"
            )
        for k, own in enumerate(np.array_split(rows, protocol.folds)):
            fold[own] = k
            for start in range(0, len(own), protocol.block):
                unit[own[start : start + protocol.block]] = f"{name}, fold {k}, block {start // protocol.block}"
    folds = [Fold(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(protocol.folds)]
    mark = (
        "no slide ids: folds are contiguous blocks of the published order within each class, leakage cannot be excluded"
    )
    return Parts(BLOCKS, tuple(folds), tuple(unit), f"blocks of {protocol.block} neighbours", (mark,))


def _check_classes(patches: LabelledPatches, parts: Parts) -> None:
    for k, fold in enumerate(parts.folds):
        present = set(patches.label[fold.train])
        if len(present) < 2:
            names = [patches.class_names[c] for c in present]
            raise DataError(
                f"{patches.name}: the training part of fold {k} holds {names} only; a probe needs two classes"
            )
        unseen = sorted(set(patches.label[fold.test]) - present)
        if unseen:
            names = [patches.class_names[c] for c in unseen]
            raise DataError(
                f"{patches.name}: fold {k} tests the classes {names}, which its training part does not hold; use fewer "
                "--folds, another --split-seed, or leave these classes out"
            )
