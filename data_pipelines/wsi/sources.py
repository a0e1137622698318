"""Finds the slides of a folder, gives them ids, and joins a table of the user's."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from data_pipelines import bag, text_table
from data_pipelines.errors import DataError
from data_pipelines.wsi.slide import MissingLibrary, open_slide

SUFFIXES = (".ome.tiff", ".ome.tif", ".svs", ".svslide", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".bif", ".vms")
SUFFIXES += (".vmu", ".dcm", ".czi")
_DICOM = ".dcm"
_FILE_COLUMNS = ("file", "wsi", "filename", "FILENAME")


@dataclasses.dataclass(frozen=True, order=True)
class SlideSource:
    """A slide that is to be tiled.

    Attributes:
      slide_id: composed Unicode, usable as a file name.
      file: relative to the folder of slides, with forward slashes.
      mpp: micrometres per level-0 pixel by the user's table, which overrule the file; or None.
    """

    slide_id: str
    file: str
    mpp: float | None = None


def find_slides(root: pathlib.Path, *, exclude: Sequence[str] = (), table: str | None = None) -> list[SlideSource]:
    """The slides of a folder and its subfolders, or of a table, sorted by id.

    Files of a DICOM series in one folder are one slide. Hidden files are left out.

    Args:
      root: a folder, or one slide file.
      exclude: glob patterns of relative file names to leave out.
      table: CSV with a column `file` (or `wsi`), relative to `root`; optional columns `slide_id` and `mpp`.

    Raises:
      DataError: no slide, ids that occur twice or cannot be file names, or a bad table; names the files.
    """
    base = root.parent if root.is_file() else root
    if not root.exists():
        raise DataError(f"{root} does not exist; point at a folder of slides or at a slide")
    if table is not None:
        found = _from_table(base, pathlib.Path(table))
    else:
        names = [root.name] if root.is_file() else _names(base)
        found = [SlideSource(slide_id_of(name), name) for name in _one_per_series(base, names)]
    kept = [s for s in found if not any(pathlib.PurePosixPath(s.file).match(glob) for glob in exclude)]
    if not kept:
        known = ", ".join(SUFFIXES)
        raise DataError(f"{root}: no slide ({known}) was found ({len(found)} were excluded)")
    _check_ids(kept)
    return sorted(kept)


def slide_id_of(name: str) -> str:
    """File name without folder and slide suffix (other dots stay), in composed Unicode."""
    name = unicodedata.normalize("NFC", pathlib.PurePosixPath(name).name)
    suffix = next((end for end in SUFFIXES if name.casefold().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def _names(root: pathlib.Path) -> list[str]:
    paths = [path.relative_to(root) for path in root.rglob("*") if path.name.casefold().endswith(SUFFIXES)]
    shown = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(path.as_posix() for path in shown if (root / path).is_file())


def _one_per_series(root: pathlib.Path, names: Iterable[str]) -> list[str]:
    """Of the files of one DICOM series in one folder, each of which opens the whole slide, only the first."""
    kept, seen = [], set()
    folders = collections.Counter(str(pathlib.PurePosixPath(name).parent) for name in names if _is_dicom(name))
    for name in names:
        folder = str(pathlib.PurePosixPath(name).parent)
        if _is_dicom(name) and folders[folder] > 1:
            series = series_of(root / name)
            if series is not None and (folder, series) in seen:
                continue
            seen.add((folder, series))
        kept.append(name)
    return kept


def _is_dicom(name: str) -> bool:
    return name.casefold().endswith(_DICOM)


def series_of(path: pathlib.Path) -> str | None:
    """What identifies the series of a DICOM file; None if OpenSlide cannot open it."""
    try:
        with open_slide(path) as slide:
            return slide.properties.get("openslide.quickhash-1")
    except MissingLibrary:
        raise
    except DataError:
        return None


def _check_ids(found: Sequence[SlideSource]) -> None:
    files = collections.defaultdict(list)
    for source in found:
        bag.check_key(source.slide_id, "slide_id", source.file)
        # Some file systems take ids that differ in case for the same file.
        files[source.slide_id.casefold()].append(source)
    twice = [sources for _, sources in sorted(files.items()) if len(sources) > 1]
    if twice:
        shown = "; ".join(f"{group[0].slide_id!r}: {', '.join(s.file for s in group)}" for group in twice[:10])
        raise DataError(
            f"{len(twice)} slide ids occur in several files; keep one of each, leave some out with --exclude, or give "
            f"ids in a table with --slides: {shown}{'; ...' if len(twice) > 10 else ''}"
        )


def _from_table(root: pathlib.Path, path: pathlib.Path) -> list[SlideSource]:
    if not path.is_file():
        raise DataError(f"{path}: there is no such table of slides")
    table = text_table.read_text_table(path)
    column = next((name for name in _FILE_COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(f"{path}: no column 'file'; the file has {text_table.listed(table.columns)}")
    ids, mpps = (_column(table, name) for name in ("slide_id", "mpp"))
    return [
        _row(root, f"{path}, line {line}", file, slide, mpp)
        for line, (file, slide, mpp) in enumerate(zip(table[column], ids, mpps), 2)
    ]


def _column(table, name: str) -> Sequence[str]:
    return table[name] if name in table.columns else [""] * len(table)


def _row(root: pathlib.Path, where: str, file: str, slide: str, mpp: str) -> SlideSource:
    parts = re.split(r"[/\\]", file)
    if not file or ".." in parts or pathlib.PurePath(file).is_absolute():
        raise DataError(f"{where}: the file {file!r} is no relative name within {root}; '..' and '/...' are refused")
    if not (root / file).is_file():
        raise DataError(f"{where}: {root} has no file {file!r}")
    slide = unicodedata.normalize("NFC", slide) or slide_id_of(file)
    source = SlideSource(slide, file, _number(mpp, where) if mpp else None)
    try:
        bag.check_key(source.slide_id, "slide_id", file)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return source


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.01 <= value <= 50:
        raise DataError(f"{where}, column 'mpp': {text!r} is no size of a pixel in micrometres")
    return value
