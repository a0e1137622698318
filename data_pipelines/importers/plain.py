"""Plain folders: .h5, .npy, .npz or .pt files, one per slide, also in subfolders.

The features are the array that the user names, or that has a known name, or the only one of the file; coordinates
likewise.
torchmil's folders `features/` and `coords/` with equal file names are recognised.
"""

from __future__ import annotations

import pathlib

from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source, Unusable

_FEATURES = ("features", "feats", "patch_embeddings", "embeddings")
_COORDS = ("coords", "coordinates", "locations")


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`."""
    names = sources.files_in(root, sources.SUFFIXES, root, deep=True)
    kinds = sorted({pathlib.PurePosixPath(name).suffix for name in names})
    return [f"{len(names)} files {', '.join(kinds)} of no layout known better"] if names else []


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`."""
    folder, pairs = root, root / "coords"
    if (root / "features").is_dir() and pairs.is_dir():
        folder = root / "features"
    found = []
    for name in sources.files_in(folder, sources.SUFFIXES, root, deep=True):
        side = pairs / pathlib.PurePosixPath(name).name
        paired = folder != root and side.is_file()
        found.append(
            Source(sources.slide_or_folder(root, name), name, side.relative_to(root).as_posix() if paired else "")
        )
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.name.startswith("."))]
    return [*found, *(source for path in folders for source in sources.unfinished(path, root))]


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    name = _named(header, options.features_key, _FEATURES)
    if name is None:
        hint = "name the array with --features-key (and --coords-key)"
        raise Unusable(
            "no features", f"no array {', '.join(_FEATURES)} in the file, which holds {header.listed()}; {hint}"
        )
    n, width, dtype = sources.bag_shape(header, name)
    if side is not None:
        holder, coords = side, "" if "" in side.arrays else _named(side, options.coords_key, _COORDS)
    else:
        holder, coords = header, options.coords_key or next((key for key in _COORDS if key in header.arrays), None)
    found = None if coords is None else sources.coords_of(holder, coords, n)
    if options.coords_key and found is None:
        raise Unusable("bad coords", f"there is no array {options.coords_key!r}; the file holds {header.listed()}")
    unit = None if found is None else sources.LEVEL0
    return SlideFacts(n, width, dtype, name, found, unit, coords_in_side=side is not None)


def _named(header: Header, wanted: str | None, known: tuple[str, ...]) -> str | None:
    """The wanted array, else a known one, else the only one."""
    if wanted:
        return wanted
    only = next(iter(header.arrays)) if len(header.arrays) == 1 else None
    return next((key for key in known if key in header.arrays), only)
