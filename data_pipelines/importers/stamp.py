"""STAMP (and marugoto before it): h5 files with `feats`, `coords` in micrometres and attributes of the file.

Old files have no unit; `reading.decide_unit` then judges the values.
"""

from __future__ import annotations

import pathlib

from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source, Unusable

_NAMES = ("feats", "patch_embeddings")


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`."""
    for name, header in sources.first_headers(root, sources.files_in(root, (".h5",), root, deep=True)):
        if "stamp_version" in header.of(""):
            return [f"{name}: the file has the attribute stamp_version"]
        if held := [key for key in _NAMES if key in header.arrays]:
            return [f"{name}: array {held[0]}"]
    return []


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`; a file called features.h5 is named after its folder."""
    names = sources.files_in(root, (".h5",), root, deep=True)
    return [Source(sources.slide_or_folder(root, name), name) for name in names]


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    attributes = header.of("")
    kind = attributes.get("feat_type", "tile")
    if kind != "tile":
        raise Unusable("slide-level", f"feat_type is {kind!r}; patch features (tile) are needed")
    name = next((key for key in _NAMES if key in header.arrays), _NAMES[0])
    n, width, dtype = sources.bag_shape(header, name)
    coords = sources.coords_of(header, "coords", n)
    edge, pixels = sources.number(attributes, "tile_size_um", "tile_size"), sources.number(attributes, "tile_size_px")
    return SlideFacts(
        n,
        width,
        dtype,
        name,
        coords,
        _unit(attributes) if coords else None,
        encoder=sources.text(attributes, "extractor", "encoder"),
        mpp=round(edge / pixels, 6) if edge and pixels else None,
        patch_size=pixels,
    )


def _unit(attributes: dict) -> str:
    unit = attributes.get("unit")
    if unit in ("um", "µm", "μm"):
        return sources.MICROMETRES
    if unit == "px":
        return sources.LEVEL0
    if unit is None:
        return sources.UNDECIDED
    raise Unusable("bad coords", f"the unit of the coordinates is {unit!r}; expected um or px")
