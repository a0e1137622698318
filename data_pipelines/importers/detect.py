"""Which layout a folder has, with the evidence."""

from __future__ import annotations

import pathlib
from types import ModuleType

from data_pipelines.errors import DataError
from data_pipelines.importers import clam, gigapath, plain, slideflow, stamp, trident

LAYOUTS: dict[str, ModuleType] = {
    "clam": clam,
    "trident": trident,
    "stamp": stamp,
    "slideflow": slideflow,
    "gigapath": gigapath,
    "plain": plain,
}
"""In the order in which they are tried; `plain` accepts what the others do not know."""


def detect(root: pathlib.Path, wanted: str = "auto") -> tuple[str, list[str]]:
    """The layout of a folder.

    Args:
      root: the folder.
      wanted: "auto", or the name of a layout, which is then taken without looking.

    Returns:
      The name and the evidence, one line each.

    Raises:
      DataError: no folder, an unknown name, or no feature file in it.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; point at the folder of feature files")
    if wanted != "auto":
        if wanted not in LAYOUTS:
            raise DataError(f"layout {wanted!r} is unknown; choose one of auto, {', '.join(LAYOUTS)}")
        return wanted, ["given by the user"]
    for name, layout in LAYOUTS.items():
        if found := layout.evidence(root):
            return name, found
    raise DataError(f"{root}: no feature file ({', '.join(plain.sources.SUFFIXES)}) was found")
