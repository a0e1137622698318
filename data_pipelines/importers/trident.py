"""TRIDENT: `{job}/{mag}x_{px}px_{ov}px_overlap/features_{encoder}/{slide}.h5` with `features`, `coords` and attributes.

Lock files beside unfinished outputs, a leading axis of length one in older files, float16 or float32, empty slides.
"""

from __future__ import annotations

import os
import pathlib
import re

from data_pipelines.errors import DataError
from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source

_JOB = re.compile(r"([\d.]+)x_(\d+)px_(\d+)px_overlap")
_PREFIX = "features_"


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`."""
    found = [f"folder {folder.relative_to(root).as_posix()}/" for folder in _folders(root) if folder != root]
    if root.name.startswith((_PREFIX, f"slide_{_PREFIX}")):
        found.append(f"the folder is called {root.name}")
    for name, header in sources.first_headers(root, sources.files_in(root, (".h5",), root), 3):
        marks = [key for key in ("patch_size_level0", "target_magnification") if key in header.of("coords")]
        if "features" in header.arrays and marks:
            found.append(f"{name}: coords has the attributes {', '.join(marks)}")
    return found


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    """Folders of patch features at or below the root."""
    inside = [root, *(p for p in root.glob("*") if p.is_dir() and _JOB.fullmatch(p.name))]
    below = [p for folder in inside for p in folder.glob(f"{_PREFIX}*") if p.is_dir()]
    return sorted(below) if below or not list(root.glob("*.h5")) else [root]


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`; of several feature folders the one of `options.encoder` is taken.

    Raises:
      DataError: slide-level features, or several folders and no choice among them.
    """
    if root.name.startswith(f"slide_{_PREFIX}"):
        raise DataError(f"{root}: holds one vector per slide; point at the folder {_PREFIX}* of patch features")
    folders = _folders(root)
    if len(folders) > 1 and options.encoder:
        folders = [folder for folder in folders if folder.name == _PREFIX + options.encoder]
    if len(folders) != 1:
        names = ", ".join(folder.relative_to(root).as_posix() for folder in _folders(root)) or "none"
        raise DataError(
            f"{root}: a dataset has one encoder and one magnification, and the folders of patch features are: {names}; "
            f"point at one of them"
        )
    return _slides(folders[0], root, options)


def _slides(folder: pathlib.Path, root: pathlib.Path, options: Options) -> list[Source]:
    notes = {}
    if folder.name.startswith(_PREFIX):
        notes["encoder"] = folder.name.removeprefix(_PREFIX)
    if job := _JOB.fullmatch(folder.parent.name):
        notes |= {"magnification": float(job[1]), "patch_size": int(job[2]), "overlap": int(job[3])}
    found = {}
    for name in sources.files_in(folder, (".pt", ".h5"), root):  # .h5 sorts before .pt
        slide = sources.slide_id_of(pathlib.PurePosixPath(name).name)
        patches = folder.parent / "patches" / f"{slide}_patches.h5"
        side = os.path.relpath(patches, root)
        found.setdefault(slide, Source(slide, name, side if name.endswith(".pt") and patches.exists() else "", notes))
    return [*found.values(), *sources.unfinished(folder, root)]


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    name = "" if "" in header.arrays else "features"
    n, width, dtype = sources.bag_shape(header, name)
    holder = side or header
    attributes = {**source.notes, **{k: v for k, v in holder.of("coords").items() if v not in ("None", None)}}
    coords = sources.coords_of(holder, "coords", n)
    return SlideFacts(
        n,
        width,
        dtype,
        name,
        coords,
        sources.LEVEL0 if coords else None,
        encoder=sources.text(header.of(name), "encoder") or sources.text(source.notes, "encoder"),
        magnification=sources.number(attributes, "target_magnification", "magnification"),
        patch_size=sources.number(attributes, "patch_size"),
        patch_size_level0=sources.number(attributes, "patch_size_level0") or _legacy_size(attributes),
        level0_magnification=sources.number(attributes, "level0_magnification"),
        overlap=0 if attributes.get("overlap") == 0 else sources.number(attributes, "overlap"),
        coords_in_side=side is not None,
    )


def _legacy_size(attributes: dict) -> float | None:
    """Files made from CLAM patches record the level of the patches instead of their size at level 0."""
    size = sources.number(attributes, "patch_size")
    if size is None or attributes.get("patch_level") != 0:
        return None
    return size * (sources.number(attributes, "custom_downsample") or 1)
