"""Our tables as bytes: labels, survival, genes, slides, availability, gene groups and splits. Pure, no files."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import tables, tcga
from data_pipelines.errors import DataError
from data_pipelines.follow_up import SurvivalTable
from data_pipelines.genes import GeneTable
from data_pipelines.table_sources.contents import OVERALL, Contents

LABELS, SURVIVAL, GENES, EXACT_GENES = "labels.csv", "survival.csv", "genes.npz", "genes_exact.npz"
SLIDES, AVAILABILITY, GROUPS = "slides.csv", "availability.csv", "groups/signatures.csv"
KINDS = ("labels", "survival", "genes", "slides", "availability", "groups", "splits")
"""What can be asked for by `--only`."""
_PARTS = ("train", "val", "test")


def label_table(labels: Mapping[str, Mapping[str, str]]) -> bytes:
    """case_id and one column per label; blank = not available."""
    keys = sorted({key for values in labels.values() for key in values})
    return _csv(("case_id", *labels), ([key, *(values.get(key, "") for values in labels.values())] for key in keys))


def survival_table(follow_up: Mapping[str, SurvivalTable], endpoint: str) -> bytes:
    """case_id, time_months, event of one endpoint, and the others as time_months_X, event_X; blank = unknown.

    Raises:
      DataError: there is no such endpoint.
    """
    if endpoint not in follow_up:
        raise DataError(f"there is no follow-up for --endpoint {endpoint}; the files have {sorted(follow_up)}")
    others = [name for name in follow_up if name != endpoint]
    cells = [dict(zip(table.case_id, zip(*table.survival))) for table in (follow_up[n] for n in (endpoint, *others))]
    header = ["case_id", "time_months", "event"]
    header += itertools.chain.from_iterable((f"time_months_{name}", f"event_{name}") for name in others)
    cases = sorted({case for known in cells for case in known})
    return _csv(header, ([case, *itertools.chain(*(_follow_up(known.get(case)) for known in cells))] for case in cases))


def _follow_up(entry: tuple[float, bool] | None) -> tuple[str, str]:
    if entry is None or np.isnan(entry[0]):
        return "", ""
    return repr(float(entry[0])), str(int(entry[1]))


def measured(table: GeneTable) -> tuple[GeneTable, list[str]]:
    """The cases with at least one value, sorted, and those without any."""
    known = ~np.isnan(table.values).all(axis=1)
    rows = sorted(np.flatnonzero(known), key=lambda row: table.case_id[row])
    kept = GeneTable(tuple(table.case_id[row] for row in rows), table.names, table.values[rows])
    return kept, [case for case, has in zip(table.case_id, known) if not has]


def slide_table(slides: Mapping[str, str]) -> bytes:
    """slide_id, case_id: the table that `histokd import --cases` reads."""
    return _csv(("slide_id", "case_id"), sorted(slides.items()))


def availability(contents: Contents, in_dataset: Iterable[str] | None = None) -> dict[str, dict[str, bool]]:
    """Which case has what: slides, each kind of molecular column, follow-up, stains.

    Args:
      contents: of a cohort.
      in_dataset: cases of a data set; None: slides are those that the tables list.

    Returns:
      Modality -> case -> whether it exists; every case of the cohort is listed in every modality.
    """
    cases = contents.cases()
    found: dict[str, set[str]] = {}
    if in_dataset is not None or contents.slides:
        found["slide"] = set(contents.slides.values() if in_dataset is None else in_dataset)
    if contents.genes is not None:
        for kind in kinds_of(contents.genes):
            found[kind] = _cases_with(contents.genes, kind)
    for endpoint, table in contents.follow_up.items():
        name = "survival" if endpoint == OVERALL else f"survival_{endpoint}"
        found[name] = {case for case, month in zip(table.case_id, table.survival.time_months) if not np.isnan(month)}
    for stain, values in contents.stains.items():
        found[stain] = {case for case, has in values.items() if has}
    return {name: {case: case in have for case in cases} for name, have in found.items()}


def kinds_of(table: GeneTable) -> list[str]:
    """The kinds of columns: "rnaseq", "cnv", "mut", in this order."""
    return [end[1:] for end in tables.KINDS if any(name.endswith(end) for name in table.names)]


def _cases_with(table: GeneTable, kind: str) -> set[str]:
    columns = [column for column, name in enumerate(table.names) if name.endswith(f"_{kind}")]
    known = ~np.isnan(table.values[:, columns]).all(axis=1)
    return {case for case, has in zip(table.case_id, known) if has}


def availability_table(modalities: Mapping[str, Mapping[str, bool]]) -> bytes:
    """case_id and a 0/1 column per modality."""
    cases = sorted({case for values in modalities.values() for case in values})
    return _csv(("case_id", *modalities), ([c, *(int(v[c]) for v in modalities.values())] for c in cases))


def group_table(groups: Mapping[str, Sequence[str]]) -> bytes:
    """One column of symbols per group, padded with empty cells."""
    return _csv(tuple(groups), itertools.zip_longest(*groups.values(), fillvalue=""))


def split_table(parts: Mapping[str, Sequence[str]]) -> bytes:
    """One column of ids per part. Without a validation part, `val` is the reported part, as MCAT's files have it."""
    if "val" not in parts:
        parts = {"train": parts["train"], "val": parts["test"]}
    names = [part for part in _PARTS if part in parts]
    return _csv(names, itertools.zip_longest(*(parts[name] for name in names), fillvalue=""))


def check_fold(number: int, parts: Mapping[str, Sequence[str]], slides: Mapping[str, str]) -> None:
    """Checks that a fold has parts to train and to report on, which share no id and no patient.

    Raises:
      DataError: names the id or patient and the parts.
    """
    if not parts.get("train") or not any(parts.get(part) for part in ("val", "test")):
        raise DataError(f"fold {number}: has the parts {sorted(parts)}; expected train and val or test, not empty")
    part_of: dict[str, str] = {}
    for part, ids in parts.items():
        for patient in {slides.get(item) or tcga.patient_of(item) or item for item in ids}:
            if part_of.setdefault(patient, part) != part:
                raise DataError(
                    f"fold {number}: patient {patient!r} is in {part_of[patient]} and in {part}; the parts "
                    "of a split must not share patients"
                )


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(header)
    out.writerows(rows)
    return text.getvalue().encode()
