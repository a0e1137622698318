"""Which layout a foreign file or folder has, with the evidence; and reading it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from data_pipelines.errors import DataError
from data_pipelines.table_sources import (
    cbioportal,
    clam,
    expression,
    folders,
    groups,
    labels,
    madeleine,
    mcat,
    mmp,
    patho_bench,
    split_files,
    stamp,
    survpath,
)
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign, open_foreign


class Source(Protocol):
    """The functions of a module that reads one layout."""

    def evidence(self, file: Foreign) -> list[str]:
        """Why the file is of this layout, one line each; empty if it is not."""

    def read(self, file: Foreign, options: Options) -> Contents:
        """What the file holds. Raises DataError."""


SOURCES: dict[str, Source] = {
    "mcat": mcat,
    "survpath": survpath,
    "patho-bench": patho_bench,
    "mmp": mmp,
    "stamp": stamp,
    "cbioportal": cbioportal,
    "splits": split_files,
    "madeleine": madeleine,
    "clam": clam,
    "expression": expression,
    "labels": labels,
    "groups": groups,
}
"""In the order in which they are tried: the more special ones first."""


class Found(NamedTuple):
    """One file: its layout, the evidence and what was read."""

    path: pathlib.Path
    layout: str
    evidence: tuple[str, ...]
    contents: Contents


def read_all(paths: Iterable[pathlib.Path], options: Options, wanted: str = "auto") -> list[Found]:
    """Recognises and reads files and folders.

    Args:
      paths: files, or a folder of SurvPath, MMP or split files.
      options: of the user.
      wanted: "auto", or the layout of every file, which is then taken without looking.

    Returns:
      One entry per file; a folder of MMP is one.

    Raises:
      DataError: a layout that is not known, or whatever is wrong in a file.
    """
    if wanted not in ("auto", *SOURCES):
        raise DataError(f"layout {wanted!r} is unknown; choose one of auto, {', '.join(SOURCES)}")
    found = []
    for path in paths:
        if path.is_dir() and folders.is_mmp(path):
            evidence = (f"folders {folders.mmp_names(path)}",)
            found.append(Found(path, "mmp", evidence, mmp.read_folder(path, options)))
            continue
        for file in folders.files_of(path, options) if path.is_dir() else [path]:
            foreign = open_foreign(file)
            name, evidence = detect(foreign, wanted)
            found.append(Found(file, name, tuple(evidence), SOURCES[name].read(foreign, options)))
    return found


def detect(file: Foreign, wanted: str = "auto") -> tuple[str, list[str]]:
    """The layout of a file and the evidence, one line each.

    Raises:
      DataError: none fits.
    """
    if wanted != "auto":
        return wanted, ["given by the user"]
    for name, source in SOURCES.items():
        if found := source.evidence(file):
            return name, found
    raise DataError(
        f"{file.path}: no known table; its columns are {list(file.header[:12])}. Known are {', '.join(SOURCES)}; see "
        "histokd tables --help"
    )
