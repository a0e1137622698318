"""Folders of labelled images: labels.csv beside them, or one folder per class.

ROOT/labels.csv                 file, label and, if known, group (slide, patient, region) and part (train, val, test)
ROOT/CLASS/FILE                 without a table: the folder is the class
ROOT/{train,val,test}/CLASS/..  the same with official parts
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.patches import PARTS, REFUSE, SHOWN, LabelledPatches, Row, columns, digest_of, kept_rows
from data_pipelines.pairs import pixels
from data_pipelines.pairs.listing import images_in
from data_pipelines.text_table import is_blank, read_text_table

LABELS_FILE = "labels.csv"
_PART_COLUMNS = ("part", "split")


def read_folder(
    root: pathlib.Path, *, unlabelled: str = REFUSE, classes: Sequence[str] = (), threads: int = 4
) -> LabelledPatches:
    """Lists a folder; images are decoded when they are read.

    Args:
      root: the folder.
      unlabelled: see `patches.kept_rows`.
      classes: see `patches.columns`.
      threads: that hash the files.

    Returns:
      The patches, in the order of the table, or sorted by file.

    Raises:
      DataError: no images, a file of the table that does not exist, or see `patches`.
    """
    root = pathlib.Path(root)
    files, notes = images_in(root, deep=True), []
    if (root / LABELS_FILE).is_file():
        rows, notes = _from_table(root, files)
        where = str(root / LABELS_FILE)
    else:
        rows, where = [_from_path(root, file) for file in files], str(root)
    if not rows:
        raise DataError(f"{root}: no images, and no {LABELS_FILE}; expected CLASS/FILE or a table of labels")
    kept, left_out = kept_rows(rows, where, unlabelled)
    rows = [rows[i] for i in kept]
    with ThreadPoolExecutor(threads) as pool:
        digest = tuple(pool.map(lambda row: digest_of((root / row.id).read_bytes()), rows))
    return LabelledPatches(
        name=root.resolve().name,
        **columns(rows, where, classes),
        digest=digest,
        read=functools.partial(_read, root, tuple(row.id for row in rows)),
        notes=(*left_out, *notes),
    )


def _from_table(root: pathlib.Path, files: Sequence[str]) -> tuple[list[Row], list[str]]:
    path = root / LABELS_FILE
    table = read_text_table(path)
    for name in ("file", "label"):
        if name not in table.columns:
            raise DataError(f"{path}: no column {name!r}; the table has {list(table.columns)}")
    missing = [file for file in table["file"] if not (root / file).is_file()]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(table)} files do not exist below {root}, first "
            f"{', '.join(map(repr, missing[:SHOWN]))}: correct the table or restore the files"
        )
    part = next((name for name in _PART_COLUMNS if name in table.columns), None)
    groups = table["group"] if "group" in table.columns else [""] * len(table)
    parts = table[part] if part else [""] * len(table)
    rows = [
        Row(f, _known(l), _known(g), _known(p).lower())
        for f, l, g, p in zip(table["file"], table["label"], groups, parts)
    ]
    others = len(set(files) - set(table["file"]))
    return rows, [f"{others} images that {LABELS_FILE} does not list are left out"] if others else []


def _known(cell: str) -> str:
    return "" if is_blank(cell) else cell


def _from_path(root: pathlib.Path, file: str) -> Row:
    folders = pathlib.PurePosixPath(file).parts[:-1]
    part = folders[0] if folders and folders[0] in PARTS else ""
    folders = folders[bool(part) :]
    if not folders:
        raise DataError(
            f"{root / file}: lies in no class folder, and there is no {LABELS_FILE}: write one with the columns file "
            "and label, or sort the images into CLASS/FILE"
        )
    return Row(file, folders[0], part=part)


def _read(root: pathlib.Path, files: tuple[str, ...], row: int) -> np.ndarray:
    path = root / files[row]
    try:
        return pixels.decode(pixels.encode(path.read_bytes()).data)
    except (pixels.UnusableImageError, OSError) as error:
        raise DataError(f"{path}: {error}; repair the file, or take its row out of {LABELS_FILE}") from error
