"""slideflow: `{slide}.pt` (patches, width), `{slide}.index.npz` with locations, `bags_config.json` for the folder.

The files do not say whether a location is the corner or the centre of a tile; it is kept as it is.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.importers import sources
from data_pipelines.importers.header import Header
from data_pipelines.importers.sources import Options, SlideFacts, Source

_CONFIG, _INDEX, _LOCATIONS = "bags_config.json", ".index.npz", "arr_0"


def evidence(root: pathlib.Path) -> list[str]:
    """See `sources.Layout`."""
    found = [f"file {_CONFIG}"] if (root / _CONFIG).is_file() else []
    if index := sorted(root.glob(f"*{_INDEX}"))[:1]:
        found.append(f"index file {index[0].name}")
    return found


def find(root: pathlib.Path, options: Options) -> list[Source]:
    """See `sources.Layout`.

    Raises:
      DataError: bags_config.json is not readable.
    """
    notes, found = _notes(root / _CONFIG), []
    for name in sources.files_in(root, (".pt",), root):
        slide = sources.slide_id_of(name)
        side = f"{slide}{_INDEX}"
        found.append(Source(slide, name, side if (root / side).is_file() else "", notes))
    return found


def _notes(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
        extractor = config.get("extractor") or {}
        name = extractor.get("class") if isinstance(extractor, dict) else str(extractor)
        edge, pixels = config.get("tile_um"), config.get("tile_px")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not readable as a slideflow configuration ({error})") from error
    notes = {"encoder": name, "patch_size": pixels}
    if isinstance(edge, (int, float)) and isinstance(pixels, (int, float)) and pixels > 0:
        notes["mpp"] = round(edge / pixels, 6)
    if isinstance(edge, str) and edge.rstrip("xX").replace(".", "", 1).isdecimal():
        notes["magnification"] = float(
            edge.rstrip("xX")
        )  # slideflow writes "20x" where tiles were cut by magnification
    return notes


def facts(source: Source, header: Header, side: Header | None, options: Options) -> SlideFacts:
    """See `sources.Layout`."""
    n, width, dtype = sources.bag_shape(header, "")
    coords = sources.coords_of(side, _LOCATIONS, n)
    return SlideFacts(
        n,
        width,
        dtype,
        "",
        coords,
        sources.LEVEL0 if coords else None,
        encoder=sources.text(source.notes, "encoder"),
        magnification=sources.number(source.notes, "magnification"),
        mpp=sources.number(source.notes, "mpp"),
        patch_size=sources.number(source.notes, "patch_size"),
        coords_in_side=True,
    )
