"""MMP / PANTHER: `TCGA_X_overall_survival_k={0..4}/{train,test}.csv`, one row per slide; days, 1 = censored.

A folder stands for one fold; its number is in the name. The reported part is `test`; there is no validation part.
"""

from __future__ import annotations

import pathlib
import re

from data_pipelines.errors import DataError
from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, LeftOut, Options, merge
from data_pipelines.table_sources.foreign import Foreign, open_foreign

FOLDER = re.compile(r"(?P<study>.+)_k=(?P<fold>\d+)")
_TIME, _CENSORSHIP = re.compile(r"(os|dss|dfi|pfi)_survival_days"), "{}_censorship"
_PARTS = {"train": "train", "val": "val", "test": "test"}


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    times = [name for name in file.header if _TIME.fullmatch(name)]
    return [f"columns slide_id, {', '.join(times)}"] if times and "slide_id" in file.header else []


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`; reads one part of one fold."""
    found = FOLDER.fullmatch(file.path.parent.name)
    part = _PARTS.get(file.path.name.split(".")[0])
    if found is None or part is None:
        raise DataError(
            f"{file.path}: expected .../STUDY_k=FOLD/{{train,test}}.csv, where the names say which part of which fold "
            "a file is"
        )
    endpoints = [match[1] for name in file.header if (match := _TIME.fullmatch(name))]
    pairs = {name: (f"{name}_survival_days", _CENSORSHIP.format(name)) for name in endpoints}
    named = ["case_id", "slide_id", *options.label_columns, *(n for pair in pairs.values() for n in pair)]
    table = rows.keyed(file, {name: name for name in named})
    rest = [name for name in file.header if name and name not in named and not name.startswith("Unnamed:")]
    labels, dropped = rows.labels_of(table, options.label_columns, file, options)
    return Contents(
        labels=labels,
        follow_up={n: rows.follow_up_of(table, file, *pair, censored=True, unit="days") for n, pair in pairs.items()},
        slides=rows.slides_of(table, file),
        folds={int(found["fold"]): {part: tuple(dict.fromkeys(table["case_id"]))}},
        left_out=(*dropped, *(LeftOut("column", name, rows.NOT_NAMED) for name in rest)),
    )


def read_folder(root: pathlib.Path, options: Options) -> Contents:
    """All folds below a folder.

    Raises:
      DataError: several studies and no choice, or a fold without a part.
    """
    folders = {path: match for path in sorted(root.iterdir()) if (match := FOLDER.fullmatch(path.name))}
    studies = sorted({match["study"] for match in folders.values()})
    chosen = [study for study in studies if options.study in ("", study)]
    if len(chosen) != 1:
        raise DataError(f"{root}: holds the studies {studies}; name one with --study")
    folds = {int(match["fold"]): path for path, match in folders.items() if match["study"] == chosen[0]}
    parts, sets = [], {}
    for number, folder in sorted(folds.items()):
        files = sorted(folder.glob("*.csv"))
        read_parts = [read(open_foreign(path), options) for path in files]
        parts += read_parts
        sets[number] = {part: ids for item in read_parts for part, ids in item.folds[number].items()}
        if not {"train", "test"} <= set(sets[number]):
            raise DataError(f"{folder}: holds {[path.name for path in files]}; expected train.csv and test.csv")
    return _whole_cohort(parts, sets)


def _whole_cohort(parts: list[Contents], folds: dict[int, dict[str, tuple[str, ...]]]) -> Contents:
    """Every patient once: a fold repeats the cohort, split in another way."""
    alone = [Contents(labels=p.labels, slides=p.slides, follow_up={}) for p in parts]
    whole = merge(alone)
    names = dict.fromkeys(name for part in parts for name in part.follow_up)
    follow_up = {
        name: rows.joined([part.follow_up[name] for part in parts if name in part.follow_up]) for name in names
    }
    left_out = tuple(dict.fromkeys(item for part in parts for item in part.left_out))
    return Contents(labels=whole.labels, slides=whole.slides, follow_up=follow_up, folds=folds, left_out=left_out)
