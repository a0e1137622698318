"""Folders of tables: which of their files belong to one cohort."""

from __future__ import annotations

import pathlib
import re

from data_pipelines.errors import DataError
from data_pipelines.table_sources import mmp
from data_pipelines.table_sources.contents import Options

_SPLIT = re.compile(r"splits_?\d+\.csv")
_ENDS = ("", ".gz")


def is_mmp(root: pathlib.Path) -> bool:
    """Whether a folder holds folds of MMP."""
    return any(mmp.FOLDER.fullmatch(path.name) and path.is_dir() for path in root.iterdir())


def mmp_names(root: pathlib.Path) -> str:
    """The folds of MMP in a folder, for the evidence."""
    names = sorted(path.name for path in root.iterdir() if mmp.FOLDER.fullmatch(path.name))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def files_of(root: pathlib.Path, options: Options) -> list[pathlib.Path]:
    """Files of a folder of SurvPath (`datasets_csv`) or of split files.

    Raises:
      DataError: another folder, or several studies or collections and no choice among them.
    """
    if found := sorted(path for path in root.iterdir() if _SPLIT.fullmatch(path.name)):
        return found
    if (root / "metadata").is_dir() and (root / "raw_rna_data").is_dir():
        return _survpath(root, options)
    raise DataError(
        f"{root}: no known folder of tables (SurvPath's datasets_csv, MMP's folds, splits_K.csv); name the files"
    )


def _survpath(root: pathlib.Path, options: Options) -> list[pathlib.Path]:
    pattern = re.compile(r"tcga_(\w+)\.csv(?:\.gz)?")
    studies = {match[1]: path for path in (root / "metadata").iterdir() if (match := pattern.fullmatch(path.name))}
    study = options.study.casefold().removeprefix("tcga_")
    if not study and len(studies) == 1:
        study = next(iter(studies))
    if study not in studies:
        raise DataError(f"{root}: holds the studies {sorted(studies)}; name one with --study")
    found = [studies[study]]
    found += _existing(root / "clinical_data" / f"tcga_{study}_clinical.csv")
    collections = {
        path.name: files
        for path in sorted((root / "raw_rna_data").iterdir())
        if (files := _existing(path / study / "rna_clean.csv"))
    }
    name = options.pathways or (next(iter(collections)) if len(collections) == 1 else "")
    if len(collections) > 1 and not name:
        raise DataError(f"{root}: expression of {study} is there for {list(collections)}; choose with --pathways")
    if name and collections and name not in collections:
        raise DataError(f"{root}: no expression of {study} for --pathways {name}; there is {list(collections)}")
    found += collections.get(name, [])
    return found + (_existing(root / "pathway_compositions" / f"{name}_comps.csv") if name else [])


def _existing(path: pathlib.Path) -> list[pathlib.Path]:
    return [file for end in _ENDS if (file := path.with_name(path.name + end)).is_file()][:1]
