"""The vocabulary of the importers: where a slide lies, what its file says about it, why it cannot be used."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from data_pipelines.errors import DataError
from data_pipelines.importers.header import Header, read_header

LEVEL0, MICROMETRES, GRID224 = "level0_px", "um", "px of 224 = 256 um"
"""Units of coordinates: level-0 pixels; micrometres; a grid in which 224 px are 256 um (marugoto, STAMP 1)."""
UNDECIDED = "not recorded"
"""Coordinates without a unit; `reading.decide_unit` judges their values."""
COORD_POLICIES = ("level0", "as-recorded", "drop")
_GENERIC = ("features", "feats", "embeddings", "patch_embeddings")
LOCK, SUFFIXES = ".lock", (".h5", ".hdf5", ".pt", ".npy", ".npz")


class Unusable(DataError):
    """A file that goes to quarantine.

    Attributes:
      reason: few words, the same for all files with this fault.
      detail: what was found and what to do.
    """

    def __init__(self, reason: str, detail: str):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says about a folder.

    Attributes:
      encoder, mpp, magnification, patch_size_level0: facts the files do not record; must not contradict them.
      encoder_licence: licence of the encoder's weights, for the manifest.
      level0_mpp: micrometres per level-0 pixel of all slides, to convert coordinates in micrometres.
      coords: "level0" (convert, refuse what cannot be), "as-recorded" (round what is there), "drop".
      features_key, coords_key: names of arrays in files of no known layout.
      patches: folder of CLAM's patches/*.h5 if it is not beside the features.
      exclude: glob patterns of relative file names to leave out.
    """

    encoder: str | None = None
    mpp: float | None = None
    magnification: float | None = None
    patch_size_level0: float | None = None
    encoder_licence: str | None = None
    level0_mpp: float | None = None
    coords: str = "level0"
    features_key: str | None = None
    coords_key: str | None = None
    patches: str | None = None
    exclude: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """One slide in a folder.

    Attributes:
      slide_id: from the file name.
      file: features file, relative to the folder, with forward slashes.
      side: file with coordinates and attributes if those are not in `file`; relative, or absolute if outside; or "".
      notes: what is known from the folder rather than from the file.
    """

    slide_id: str
    file: str
    side: str = ""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SlideFacts:
    """What the header of a file says.

    Attributes:
      n_patches, feat_dim: shape of the bag.
      dtype: of the features in the file.
      features: name of the array; "" for a bare one.
      coords: name of the array, or None.
      coords_unit: one of the units above, or None without coordinates.
      encoder: name, or None.
      magnification, mpp: at which patches were read, or None.
      patch_size: edge in pixels as read, or None.
      patch_size_level0: edge in level-0 pixels, or None.
      level0_magnification, overlap: as recorded, or None.
      coords_in_side: whether the coordinates lie in the side file.
    """

    n_patches: int
    feat_dim: int
    dtype: str
    features: str
    coords: str | None = None
    coords_unit: str | None = None
    encoder: str | None = None
    magnification: float | None = None
    mpp: float | None = None
    patch_size: float | None = None
    patch_size_level0: float | None = None
    level0_magnification: float | None = None
    overlap: float | None = None
    coords_in_side: bool = False


class Layout(Protocol):
    """The functions of a layout module."""

    def evidence(self, root: pathlib.Path) -> list[str]:
        """Why the folder is of this layout, one line each; empty if it is not."""

    def find(self, root: pathlib.Path, options: Options) -> list[Source]:
        """The slides of the folder, in any order."""

    def facts(self, source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
        """What the headers say; pure. Raises Unusable."""


def slide_id_of(name: str) -> str:
    """File name without the suffix of a feature file (a suffix, never characters); other dots stay."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def slide_or_folder(root: pathlib.Path, name: str) -> str:
    """The slide id of a relative file name; a file called `features` and the like is named after its folder."""
    path = pathlib.PurePosixPath(name)
    slide = slide_id_of(path.name)
    return (root / path).parent.name if slide.casefold() in _GENERIC else slide


def files_in(folder: pathlib.Path, suffixes: Sequence[str], root: pathlib.Path, *, deep: bool = False) -> list[str]:
    """Files with one of the suffixes, relative to `root`, sorted; hidden files and folders are left out."""
    found = folder.rglob("*") if deep else folder.glob("*")
    names = [path.relative_to(root) for path in found if path.suffix.lower() in suffixes and path.is_file()]
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def unfinished(folder: pathlib.Path, root: pathlib.Path) -> list[Source]:
    """One source per lock file whose output does not exist yet; inspecting it says "locked"."""
    locks = [path for path in folder.glob(f"*{LOCK}") if not path.with_name(path.name.removesuffix(LOCK)).exists()]
    bare = [path for path in locks if not any(path.with_suffix(end).exists() for end in SUFFIXES)]
    return [
        Source(slide_id_of(path.name.removesuffix(LOCK)), path.relative_to(root).as_posix()) for path in sorted(bare)
    ]


def bag_shape(header: Header, name: str) -> tuple[int, int, str]:
    """(patches, width, dtype) of an array of features; a leading axis of length one is ignored.

    Raises:
      Unusable: there is no such array, it holds no patch, or one vector for the whole slide.
    """
    if name not in header.arrays:
        raise Unusable("no features", f"there is no array {name!r}; the file holds {header.listed()}")
    shape, dtype = header.arrays[name]
    if math.prod(shape) == 0:
        raise Unusable("no patches", f"{name or 'the array'} has shape {list(shape)}: no tissue was found in the slide")
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 1:
        raise Unusable("slide-level", f"{name or 'the array'} has shape {list(shape)}: one vector for a whole slide")
    if len(shape) != 2:
        raise Unusable("no features", f"{name or 'the array'} has shape {list(shape)}, expected [patches, width]")
    if not dtype.startswith(("float", "bfloat")):
        raise Unusable("no features", f"{name or 'the array'} is {dtype}, expected floating point")
    return shape[0], shape[1], dtype


def coords_of(header: Header | None, name: str, n_patches: int) -> str | None:
    """`name` if the header holds coordinates of that name, None if it does not.

    Raises:
      Unusable: the array has another number of rows than there are patches.
    """
    if header is None or name not in header.arrays:
        return None
    shape, _ = header.arrays[name]
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if tuple(shape) != (n_patches, 2):
        raise Unusable("bad coords", f"{name} has shape {list(shape)}, expected [{n_patches}, 2], one row per patch")
    return name


def number(attributes: Mapping[str, Any], *names: str) -> float | None:
    """The first of the named attributes that is a finite positive number; None if there is none."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            return value
    return None


def text(attributes: Mapping[str, Any], *names: str) -> str | None:
    """The first of the named attributes that is a text other than 'None'; None if there is none."""
    for name in names:
        value = attributes.get(name)
        if isinstance(value, str) and value.strip() not in ("", "None"):
            return value.strip()
    return None


def first_headers(root: pathlib.Path, names: Iterable[str], count: int = 20) -> list[tuple[str, Header]]:
    """Headers of the first files that can be read, to recognise a layout."""
    found = []
    for name in names:
        if len(found) == count:
            break
        try:
            found.append((name, read_header(root / name)))
        except (OSError, ValueError):
            continue
    return found
