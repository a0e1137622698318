"""Inspects and reads one source; every fault of a file becomes `Unusable` with a reason."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from types import ModuleType

import numpy as np

from data_pipelines import bag
from data_pipelines.errors import BagError
from data_pipelines.importers import sources
from data_pipelines.importers.header import read_arrays, read_header
from data_pipelines.importers.sources import Options, SlideFacts, Source, Unusable
from data_pipelines.safe_pickle import UnsafePickleError

_LOCKED = ("unable to lock file", "already open for write", "file is already open")
_UM_PER_GRID_PX = 256 / 224


def inspect(root: pathlib.Path, layout: ModuleType, source: Source, options: Options) -> SlideFacts:
    """What the file says about itself; reads headers only, and coordinates where their unit is not recorded.

    Args:
      root: the folder.
      layout: its layout module.
      source: one of its slides.
      options: of the user.

    Raises:
      Unusable: locked, empty, unreadable, or without patch features.
    """
    path = root / source.file
    _check_file(path)
    try:
        bag.check_key(source.slide_id, "slide_id", source.slide_id)
    except BagError as error:
        raise Unusable("bad id", str(error)) from error
    try:
        header = read_header(path)
        side = read_header(root / source.side) if source.side else None
        facts = layout.facts(source, header, side, options)
        return decide_unit(facts, _coords(root, source, facts)) if _undecided(facts) else facts
    except Unusable:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise _unreadable(error, root) from error


def read(
    root: pathlib.Path, source: Source, facts: SlideFacts, policy: str, level0_mpp: float | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads a bag.

    Args:
      root: the folder.
      source: one of its slides.
      facts: from `inspect`.
      policy: see `Options.coords`.
      level0_mpp: micrometres per level-0 pixel, where the unit of the coordinates needs it.

    Returns:
      features [n, D] as stored in the file, and coords [n, 2] of integers or None.

    Raises:
      Unusable: the file cannot be read any more, or is not what its header said.
    """
    try:
        _check_file(root / source.file)
        (features,) = read_arrays(root / source.file, [facts.features])
        coords = None if facts.coords is None or policy == "drop" else _coords(root, source, facts)
    except Unusable:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
        raise _unreadable(error, root) from error
    features = _rows(features, 2)
    if features.shape != (facts.n_patches, facts.feat_dim):
        raise Unusable("unreadable", f"features have shape {list(features.shape)}; the file changed during the import")
    return features, None if coords is None else place(_rows(coords, 2), facts.coords_unit, policy, level0_mpp)


def place(coords: np.ndarray, unit: str, policy: str, level0_mpp: float | None) -> np.ndarray:
    """Coordinates as integers: level-0 pixels, or the rounded recorded values.

    Args:
      coords: [n, 2] as recorded.
      unit: their unit.
      policy: "level0" converts, "as-recorded" only rounds.
      level0_mpp: micrometres per level-0 pixel; needed to convert from micrometres.

    Returns:
      int64 [n, 2].

    Raises:
      Unusable: not finite, or pixels that are no whole numbers.
    """
    values = np.asarray(coords)
    if values.dtype.kind in "iu" and unit == sources.LEVEL0:
        return values
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise Unusable("bad coords", "a coordinate is NaN or infinite")
    if unit == sources.LEVEL0 and (values % 1 != 0).any():
        raise Unusable("bad coords", "pixel coordinates that are no whole numbers")
    if unit != sources.LEVEL0 and policy == "level0":
        values = values * (_UM_PER_GRID_PX if unit == sources.GRID224 else 1) / level0_mpp
    return np.rint(values).astype(np.int64)


def decide_unit(facts: SlideFacts, coords: np.ndarray) -> SlideFacts:
    """The facts with a unit for coordinates [n, 2] that record none.

    Whole numbers that are all multiples of 224 lie on the grid of older software, in which 224 px are 256 um; other
    whole numbers are level-0 pixels.

    Raises:
      Unusable: the values are no whole numbers.
    """
    if not (np.isfinite(coords) & (coords % 1 == 0)).all():
        raise Unusable("bad coords", "no unit is recorded and the values are no whole numbers; use --coords drop")
    unit = sources.GRID224 if (coords % 224 == 0).all() and coords.any() else sources.LEVEL0
    return dataclasses.replace(facts, coords_unit=unit)


def _undecided(facts: SlideFacts) -> bool:
    return facts.coords_unit == sources.UNDECIDED


def _coords(root: pathlib.Path, source: Source, facts: SlideFacts) -> np.ndarray:
    return read_arrays(root / (source.side if facts.coords_in_side else source.file), [facts.coords])[0]


def _check_file(path: pathlib.Path) -> None:
    if path.suffix == sources.LOCK:
        raise Unusable("locked", "a writer is at work on this slide and has not written a file yet")
    lock = next(
        (p for p in (path.with_name(path.name + sources.LOCK), path.with_suffix(sources.LOCK)) if p.exists()), None
    )
    if lock is not None:
        raise Unusable(
            "locked", f"{lock.name} lies beside it: a writer is at work, or was killed (then remove the lock)"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise Unusable("zero bytes", "the file is empty")


def _rows(array: np.ndarray, ndim: int) -> np.ndarray:
    """Without a leading axis of length one."""
    return array[0] if array.ndim == ndim + 1 and array.shape[0] == 1 else array


def _unreadable(error: Exception, root: pathlib.Path) -> Unusable:
    detail = " ".join(str(error).split()).replace(f"{root}{os.sep}", "") or type(error).__name__
    if any(words in detail for words in _LOCKED):
        return Unusable("locked", f"another program has the file open for writing ({detail})")
    if isinstance(error, UnsafePickleError):
        return Unusable("unsafe pickle", f"{detail}; nothing was run")
    return Unusable("unreadable", detail)
