"""Simulated bags for real genes and real labels: only the images are made up.

For every case of a real gene table that has at least one of the wanted labels, one bag is simulated. A real label is
taken as the sign of an unobserved severity v = +-|N(0, 1)|, drawn per task (v = N(0, 1) where the label is not
available). Tumour patches carry signal_patches * s along one planted direction per task, where the tissue score s has
unit variance and correlation r = tissue_fidelity / sqrt(1 + label_noise^2) with v, as in the wholly simulated cohort.
Along further directions they carry EXPRESSION_SHIFT * the case's standardised leading expression components, so that
tissue also shows a little of what drives the genes. Case ids stay real; slide ids end in "-SIMBAG", and name, notes
and encoder of the data set say that the bags are simulated. Labels, genes and survival are the real ones.

Correlated tasks make bags more telling than in the wholly simulated cohort, since tissue that shows PR also shows ER:
tissue_fidelity 0.7 (instead of 0.85) gives TCGA-BRCA bags that stay clearly below the genes for ER, PR and HER2.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.manifest import Manifest
from data_pipelines.simulate_bags import (
    SimulationSpec,
    bag_sizes,
    draw_bag,
    draw_geometry,
    label_fidelity,
    mix,
    simulated_writer,
    stream,
)
from data_pipelines.table_files import write_bytes, write_csv
from data_pipelines.tables import (
    LabelTable,
    SurvivalTable,
    read_gene_table,
    read_labels,
    read_survival,
    write_gene_table,
)

EXPRESSION_COMPONENTS = 2
EXPRESSION_SHIFT = 0.1
"""Shift of a tumour patch per standard deviation of a leading expression component, in units of the patch noise."""
_CLIP, _IQR_OF_NORMAL = 5.0, 1.349
_UNUSED_FIELDS = (
    *("n_cases", "n_genes", "signal_genes", "gene_loading", "prevalence", "n_programmes"),
    *("hazard_log_ratio", "median_months", "censored", "task"),
)


def simulate_bags_for_table(
    directory: str | os.PathLike,
    spec: SimulationSpec,
    *,
    labels_path: str | os.PathLike,
    genes_path: str | os.PathLike,
    tasks: Sequence[str],
) -> Manifest:
    """Writes a data set of simulated bags tied to real labels and genes, with the real tables beside them.

    Args:
      directory: data set folder to create.
      spec: sizes and strengths of the bags; fields that describe cases, genes, labels or survival are not used.
      labels_path: CSV with case_id and one column of 0, 1 or blank per task; copied unchanged.
      genes_path: gene table of `tables.read_gene_table`. Survival is taken from it where it has survival columns.
      tasks: label columns that shape the bags.

    Returns:
      The manifest; `simulated` is True, the name contains "simulated_bags".

    Raises:
      DataError: if a table is bad, a task is not binary, or no labelled case has genes.
    """
    directory, labels_path = pathlib.Path(directory), pathlib.Path(labels_path)
    labels = {task: read_labels(labels_path, task) for task in _distinct(tasks)}
    genes, survival = read_gene_table(genes_path), read_follow_up(genes_path)
    cases, signs, left_out = join_cases(labels, genes)
    shifts = case_shifts(spec, signs, expression_components(genes.align(cases).values))
    geometry, sizes = draw_geometry(spec, shifts.shape[1]), bag_sizes(spec, len(cases))
    simulation = {
        "what": "simulated bags, real genes and labels",
        "tasks": list(labels),
        "cases_without_bag": left_out,
        "expression_components": EXPRESSION_COMPONENTS,
        "expression_shift": EXPRESSION_SHIFT,
        "spec": {k: v for k, v in dataclasses.asdict(spec).items() if k not in _UNUSED_FIELDS},
    }
    with simulated_writer(directory, spec, "simulated_bags_real_genes_and_labels", simulation) as writer:
        for row, case in enumerate(cases):
            bag = draw_bag(spec, geometry, row, int(sizes[row]), shifts[row] @ geometry.planted)
            writer.add(f"{case}-SIMBAG", case, bag.features, bag.coords, source="simulated")
        tables = directory / "tables"
        write_bytes(tables / "labels.csv", labels_path.read_bytes())
        write_gene_table(genes, tables / "genes.npz")
        if survival is not None:
            _write_survival(tables / "survival.csv", survival)
    return Manifest.load(directory)


def join_cases(
    labels: dict[str, LabelTable], genes: GeneTable
) -> tuple[tuple[str, ...], np.ndarray, dict[str, list[str]]]:
    """Cases that have genes and at least one label.

    Args:
      labels: task -> its labels, all binary.
      genes: the gene table.

    Returns:
      (sorted cases, [n, T] float64 with +1, -1 or 0 = label not available, reason -> cases left out).

    Raises:
      DataError: if a task has other classes than 0 and 1, or no case is left.
    """
    for task, table in labels.items():
        if len(table.class_names) != 2:
            raise DataError(f"task {task!r} has classes {table.class_names}; simulated bags need two classes, 0 and 1")
    labelled = {case for table in labels.values() for case, value in zip(table.case_id, table.value) if value >= 0}
    measured = {case for case, has in zip(genes.case_id, genes.has_genes) if has}
    cases = tuple(sorted(labelled & measured))
    if not cases:
        raise DataError(f"none of {len(labelled)} labelled cases is among {len(measured)} cases with genes")
    # Class 0, 1 or -1 (not available) becomes -1, +1 or 0.
    value_of = [dict(zip(t.case_id, np.where(t.value < 0, 0.0, 2.0 * t.value - 1.0))) for t in labels.values()]
    signs = np.array([[values.get(case, 0.0) for values in value_of] for case in cases])
    left_out = {"no genes": sorted(labelled - measured), "no label": sorted(measured - labelled)}
    return cases, signs, left_out


def expression_components(values: np.ndarray) -> np.ndarray:
    """Standardised scores of the leading principal components of robustly standardised, clipped expression.

    This is part of the made-up world, not of a model, and reads no labels; hence it may look at all cases.

    Args:
      values: [n, G] float32; NaN counts as the gene's mean.

    Returns:
      [n, min(EXPRESSION_COMPONENTS, n, G)] float64 of unit variance.
    """
    x = values.astype(np.float64)
    x = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    # Robust scale and clip: single values in the thousands would otherwise be all that a component sees.
    low, middle, high = np.quantile(x, (0.25, 0.5, 0.75), axis=0)
    spread = (high - low) / _IQR_OF_NORMAL
    x = np.clip((x - middle) / np.where(spread > 0, spread, 1.0), -_CLIP, _CLIP)
    x -= x.mean(axis=0)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    count = min(EXPRESSION_COMPONENTS, u.shape[1])
    # The sign of a singular vector is arbitrary; fix it so that equal tables give equal bags on every LAPACK.
    top = np.argmax(np.abs(vt[:count]), axis=1)
    return u[:, :count] * np.sign(vt[np.arange(count), top]) * np.sqrt(len(x))


def case_shifts(spec: SimulationSpec, signs: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Shift of a case's tumour patches along every planted direction.

    Args:
      spec: strengths.
      signs: [n, T] +1, -1 or 0 by label.
      components: [n, J] standardised expression components.

    Returns:
      [n, T + J] float32, tasks first.
    """
    severity = stream(spec, "label").standard_normal(signs.shape)
    severity = np.where(signs != 0.0, signs * np.abs(severity), severity)
    noise = stream(spec, "tissue").standard_normal(signs.shape)
    scores = mix(severity, noise, label_fidelity(spec))
    return np.hstack([spec.signal_patches * scores, EXPRESSION_SHIFT * components]).astype(np.float32)


def read_follow_up(genes_path: str | os.PathLike) -> SurvivalTable | None:
    """Survival that comes with a gene table, or None where the file has no survival columns."""
    if str(genes_path).endswith(".npz"):
        beside = pathlib.Path(genes_path).with_name("survival.csv")
        return read_survival(beside) if beside.exists() else None
    columns = set(pd.read_csv(genes_path, nrows=0).columns)
    has_survival = {"survival_months", "censorship"} <= columns or {"time_months", "event"} <= columns
    return read_survival(genes_path) if has_survival else None


def _distinct(tasks: Sequence[str]) -> tuple[str, ...]:
    if not tasks or len(set(tasks)) != len(tasks):
        raise DataError(f"tasks={list(tasks)}: expected one or more distinct label columns")
    return tuple(tasks)


def _write_survival(path: pathlib.Path, table: SurvivalTable) -> None:
    months = ("" if np.isnan(t) else repr(float(t)) for t in table.survival.time_months)
    events = ("" if np.isnan(t) else int(e) for t, e in zip(*table.survival))
    write_csv(path, ("case_id", "time_months", "event"), zip(table.case_id, months, events))
