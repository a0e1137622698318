"""GigaPath: a folder of h5 files with `features` and `coords`, without attributes; ids may end in .svs."""

from __future__ import annotations

import pathlib

from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`; files alone do not tell it from others, so the name of the folder must."""
    if "gigapath" not in root.name.casefold():
        return []
    for name, header in sources.first_headers(root, sources.files_in(root, (".h5",), root), 1):
        if {"features", "coords"} <= set(header.arrays):
            return [f"the folder is called {root.name}", f"{name}: arrays features and coords"]
    return []


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`."""
    names = sources.files_in(root, (".h5",), root)
    return [Source(sources.slide_id_of(name), name) for name in names] + sources.unfinished(root, root)


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    n, width, dtype = sources.bag_shape(header, "features")
    coords = sources.coords_of(header, "coords", n)
    return SlideFacts(n, width, dtype, "features", coords, sources.LEVEL0 if coords else None)
