"""CLAM: `h5_files/{slide}.h5` with `features` and `coords`, `pt_files/{slide}.pt` without coordinates.

Neither records magnification or patch size; `patches/{slide}.h5` does, if it lies beside them or is named.
"""

from __future__ import annotations

import os
import pathlib

from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source

_FOLDERS = {"h5_files": ".h5", "pt_files": ".pt"}


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`."""
    if root.name in _FOLDERS:
        return [f"the folder is called {root.name}"]
    return [f"folder {name}/" for name in _FOLDERS if (root / name).is_dir()]


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`; where a slide has both files the one with coordinates is taken."""
    folders = [root] if root.name in _FOLDERS else [root / name for name in _FOLDERS]
    base = root.parent if root.name in _FOLDERS else root
    patches = pathlib.Path(options.patches) if options.patches else base / "patches"
    found = {}
    for folder in filter(pathlib.Path.is_dir, folders):
        for name in sources.files_in(folder, tuple(_FOLDERS.values()), root):
            slide = sources.slide_id_of(pathlib.PurePosixPath(name).name)
            side = patches / f"{slide}.h5"
            found.setdefault(slide, Source(slide, name, os.path.relpath(side, root) if side.is_file() else ""))
    locked = [s for folder in folders for s in sources.unfinished(folder, root) if s.slide_id not in found]
    return [*found.values(), *locked]


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    if "imgs" in header.arrays and "features" not in header.arrays:
        raise sources.Unusable("no features", "the file holds image patches (imgs); extract features from them first")
    name = "" if "" in header.arrays else "features"
    n, width, dtype = sources.bag_shape(header, name)
    own = sources.coords_of(header, "coords", n)
    coords = own or sources.coords_of(side, "coords", n)
    attributes = side.of("coords") if side else {}
    return SlideFacts(
        n,
        width,
        dtype,
        name,
        coords,
        sources.LEVEL0 if coords else None,
        patch_size=sources.number(attributes, "patch_size"),
        patch_size_level0=_level0_size(attributes),
        coords_in_side=own is None,
    )


def _level0_size(attributes: dict) -> float | None:
    size, scale = sources.number(attributes, "patch_size"), attributes.get("downsample")
    scale = scale[0] if isinstance(scale, list) and scale else scale
    return size * scale if size and isinstance(scale, (int, float)) else None
