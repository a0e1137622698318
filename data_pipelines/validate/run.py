"""All checks of a dataset, its tables and its splits."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError, ShardReadError
from data_pipelines.manifest import Manifest
from data_pipelines.tables import LabelTable, SurvivalTable
from data_pipelines.validate import features, folds, joins, outcomes
from data_pipelines.validate.findings import ERROR, NOTE, Finding, Report, make_report


def validate(
    directory: str | os.PathLike,
    *,
    tables: Sequence[str | os.PathLike] | None = None,
    splits: str | os.PathLike | None = None,
    tasks: Sequence[str] = (),
    label_map: Mapping[str, int] | None = None,
    quick: bool = False,
    full_checksum: bool = False,
    accept: Sequence[str] = (),
    threads: int = 2,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Checks whether training on a dataset with these tables and splits would be right.

    Args:
      directory: the dataset.
      tables: label, survival and gene tables; default: see `default_tables`.
      splits: directory of splits_K.csv files, or one such file.
      tasks: label columns; the first one is counted per fold.
      label_map: see `tables.read_labels`.
      quick: do not read the features.
      full_checksum: also compare the SHA-256 of the shards.
      accept: codes of errors that are known and accepted.
      threads: that read features.
      progress: called with 1 after every slide whose features were read.

    Returns:
      The report; faults of the tables and splits are findings in it.

    Raises:
      ManifestError: the directory holds no complete dataset.
    """
    manifest = Manifest.load(directory)
    sections: dict[str, Any] = {"dataset": _dataset(manifest)}
    facts, findings = joins.several_slides(manifest)
    sections["dataset"] |= facts
    if tables is None:
        tables = default_tables(pathlib.Path(directory))
    sections["tables"], labels, survival, found = _tables(manifest, tables, tasks, label_map)
    findings += found
    if splits is not None:
        sections["folds"], found = folds.check_folds(splits, manifest, labels, survival)
        findings += found
    try:
        manifest.check_shards(full=full_checksum)
        if not quick:
            sections["features"], found = features.check_features(manifest, threads=threads, progress=progress)
            findings += found
    except ShardReadError as error:
        findings.append(Finding(ERROR, "shard", str(error)))
    return make_report(sections, findings, accept)


def default_tables(directory: pathlib.Path) -> list[pathlib.Path]:
    """The tables that lie in the dataset's own folder `tables`."""
    ends = (".csv", ".csv.zip", ".csv.gz", ".npz", ".tsv")
    return sorted(path for path in (directory / "tables").glob("*") if path.name.endswith(ends))


def _dataset(manifest: Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "patches": int(manifest.sizes.sum()),
        "width": manifest.feat_dim,
        "dtype": manifest.dtype,
        "encoder": manifest.encoder,
        "magnification": manifest.magnification,
        "mpp": manifest.mpp,
        "simulated": manifest.simulated,
        "smallest_bag": int(manifest.sizes.min()),
        "largest_bag": int(manifest.sizes.max()),
    }


def _tables(
    manifest: Manifest, paths: Sequence[str | os.PathLike], tasks: Sequence[str], label_map: Mapping[str, int] | None
) -> tuple[dict[str, Any], LabelTable | None, SurvivalTable | None, list[Finding]]:
    """Facts per table, the labels of the first task and the follow-up (of the first table that has them)."""
    cases = {slide.case_id for slide in manifest.slides}
    sections, findings, first, follow_up, seen = {}, [], None, None, set()
    for path in paths:
        name = os.path.basename(path)
        try:
            sections[name], found = joins.join(name, joins.read_ids(path), manifest)
            findings += found
            if name.endswith(".npz"):
                continue
            for task in tasks or (None,):
                labels, table = outcomes.read_outcomes(path, task, label_map)
                if labels is not None:
                    seen.add(task)
                    sections[name].setdefault("tasks", {})[task], found = outcomes.check_labels(labels, task, cases)
                    findings += found
                    first = labels if task == tasks[0] and first is None else first
            if table is not None:
                sections[name]["survival"], found = outcomes.check_survival(path, table, cases)
                findings += found
                follow_up = follow_up or table
        except (DataError, OSError) as error:
            findings.append(Finding(ERROR, "table", str(error)))
    for task in set(tasks) - seen:
        findings.append(Finding(ERROR, "task", f"no table has the label column {task!r}, or it could not be read"))
    if not paths:
        findings.append(Finding(NOTE, "no_tables", "no tables were given (--tables), and the data set has none"))
    return sections, first, follow_up, findings
