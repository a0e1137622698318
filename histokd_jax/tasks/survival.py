"""Survival: follow-up per patient, time bins of a fold, risks and hazards, C-index (or likelihood) as monitor."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_pipelines import schema, survival
from data_pipelines.cohort import Cohort, build_cohort
from data_pipelines.errors import DataError
from data_pipelines.follow_up import FollowUpColumns, Survival, read_survival
from data_pipelines.manifest import Manifest
from data_pipelines.splits import Split
from data_pipelines.table_files import write_csv, write_json
from histokd_jax.evals import ablation
from histokd_jax.evals import survival_measures as measures
from histokd_jax.evals import survival_predictions as tables_of
from histokd_jax.evals import survival_summary as summaries
from histokd_jax.evals.survival.concordance import harrell_c
from histokd_jax.evals.survival_predictions import UNKNOWN, SurvivalPredictions
from histokd_jax.tasks.base import Found, Rows, Tables, Targets
from histokd_jax.tasks.classification import SUMMARY_FACTS
from histokd_jax.types import SURVIVAL

C_INDEX, NLL = "c_index", "nll"
MONITORS = (C_INDEX, NLL)
FOLLOW_UP_FILE, BINS_FILE = "follow_up_train.csv", "time_bins.json"


@dataclasses.dataclass(frozen=True)
class SurvivalTask:
    """See `Task`.

    Attributes:
      n_bins: time bins C.
      bins_from: "cohort" or "train_fold", see `data_pipelines.survival.fit_time_bins`.
      select_by: what validation selects by, one of `MONITORS`.
      columns: of the survival table.
      bins: the time bins of a fitted task.
    """

    n_bins: int = 4
    bins_from: str = "cohort"
    select_by: str = C_INDEX
    columns: FollowUpColumns = FollowUpColumns()
    bins: survival.TimeBins | None = None

    kind: str = SURVIVAL
    outputs: tuple[str, ...] = ("risk", "hazards")
    monitor_name: str = "val_c"
    answers: str = "survival"
    summary_facts: tuple[str, ...] = (*SUMMARY_FACTS, "task_kind", "split_protocol", "left_out")

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> SurvivalTask:
        """The task of a configuration's section `survival`.

        Raises:
          ValueError: unknown or contradictory settings.
        """
        if cfg.monitor not in MONITORS:
            raise ValueError(f"survival.monitor={cfg.monitor!r} is unknown; choose one of {MONITORS}")
        if cfg.bins_from not in survival.BINS_FROM:
            raise ValueError(f"survival.bins_from={cfg.bins_from!r} is unknown; choose one of {survival.BINS_FROM}")
        if cfg.n_bins < 2:
            raise ValueError(f"survival.n_bins={cfg.n_bins}: at least 2 time bins are needed")
        columns = FollowUpColumns(cfg.time_column, cfg.event_column, cfg.censorship_column)
        return cls(cfg.n_bins, cfg.bins_from, cfg.monitor, columns)

    def open_cohort(self, manifest: Manifest, cfg: ConfigDict, tables: Tables, **options: Any) -> Cohort:
        """See `Task.open_cohort`; labels are the time bins of the whole cohort."""
        given = {
            "task": cfg.task if tables.survival else None,
            "genes_path": tables.genes,
            "survival_path": tables.survival,
            "slide_choice": cfg.data.slide_choice,
            "unit": cfg.data.unit,
            "require_follow_up": tables.survival is not None,
            "missing_slides": cfg.data.missing_slides,
            "follow_up_columns": self.columns,
            **options,
        }
        cohort = build_cohort(manifest, **given)
        return cohort if tables.survival is None else self._binned(cohort, str(tables.survival))

    def _binned(self, cohort: Cohort, source: str) -> Cohort:
        time, event = cohort.survival
        if len(set(cohort.case_id)) != len(cohort):
            raise DataError("a survival task has one sample per patient: set data.unit=case")
        for warning in survival.check_follow_up(time, event, case_id=cohort.case_id, source=source):
            logging.warning("%s", warning)
        evidence = survival.censorship_evidence(time, event)
        if evidence.suspicious:
            logging.warning("%s", evidence.message(source))
        bins = self.bins or survival.fit_time_bins(time, event, num_bins=self.n_bins)
        return dataclasses.replace(cohort, label=bins.assign(time), class_names=bin_names(bins))

    def strata(self, cohort: Cohort) -> np.ndarray:
        """Time bin and censorship, so that every fold has early and late deaths."""
        return survival.sampling_class(cohort.label, cohort.survival.event)

    def fit(self, cohort: Cohort, train_rows: np.ndarray) -> SurvivalTask:
        """With the time bins of the cohort or of the training part."""
        train = np.isin(np.arange(len(cohort)), train_rows)
        bins = survival.fit_time_bins(*cohort.survival, num_bins=self.n_bins, bins_from=self.bins_from, train=train)
        return dataclasses.replace(self, bins=bins)

    def facts(self) -> dict[str, Any]:
        """Edges of the time bins."""
        return {"edges": list(self.bins.edges)}

    def restore(self, facts: Mapping[str, Any]) -> SurvivalTask:
        """See `Task.restore`."""
        return dataclasses.replace(self, bins=survival.TimeBins(tuple(facts["edges"])))

    def targets(self, cohort: Cohort) -> Targets:
        """Time bin, months, event; unknown follow-up is bin 0, NaN and -1."""
        n = len(cohort)
        follow_up = cohort.survival or Survival(np.full(n, np.nan), np.zeros(n, bool))
        known = np.isfinite(follow_up.time_months)
        label = np.full(n, UNKNOWN, np.int32)
        label[known] = self.bins.assign(follow_up.time_months[known])
        event = np.where(known, follow_up.event, UNKNOWN).astype(np.float32)
        return {schema.LABEL: label, schema.TIME: follow_up.time_months, schema.EVENT: event}

    def sampling_classes(self, targets: Targets) -> np.ndarray:
        """2 * bin + censorship (G-HANet section 3.6)."""
        return survival.sampling_class(targets[schema.LABEL], targets[schema.EVENT] == 1)

    def check_split(self, cohort: Cohort, split: Split, fold: int) -> None:
        """A death to learn from, and a comparable pair in every part that is evaluated."""
        time, event = cohort.survival
        for part in ("train", "val", "test"):
            rows = getattr(split, part)
            if part == "val" and not len(rows):
                continue
            found = harrell_c(np.zeros(len(rows)), time[rows], event[rows])
            if not found.n_comparable:
                raise ValueError(
                    f"fold {fold}: the {part} part has {len(rows)} patients with {int(event[rows].sum())} deaths and "
                    f"no C-index ({found.reason}): use fewer folds, split.stratify=True, or other splits"
                )

    def val_metrics(self, found: Found, targets: Targets) -> dict[str, float]:
        """C-index of every mode; with hazards also the negative log-likelihood (alpha 0, mean)."""
        time, event = targets[schema.TIME], targets[schema.EVENT] == 1
        out = {}
        for mode, outputs in found.items():
            if np.isfinite(outputs["risk"]).all():
                out[f"{C_INDEX}_{mode}"] = harrell_c(outputs["risk"], time, event).value
            else:
                out[f"{C_INDEX}_{mode}"] = float("nan")
            if outputs["hazards"].shape[1]:
                out[f"{NLL}_{mode}"] = measures.mean_nll(outputs["hazards"], targets[schema.LABEL], event)
        return out

    def monitor(self, metrics: Mapping[str, float], modes: Iterable[str]) -> float:
        """Mean C-index over modes, or minus the mean negative log-likelihood."""
        sign = -1.0 if self.select_by == NLL else 1.0
        names = [f"{self.select_by}_{mode}" for mode in modes]
        absent = [name for name in names if name not in metrics]
        if absent:
            raise ValueError(f"survival.monitor={self.select_by}: the method predicts no hazards; use {C_INDEX}")
        return sign * float(np.mean([metrics[name] for name in names]))

    def watch(self, means: Mapping[str, float]) -> dict[str, str]:
        """Nothing beyond the metrics."""
        return {}

    def table(self, found: Found, targets: Targets, rows: Rows) -> SurvivalPredictions:
        """See `Task.table`."""
        answers = (targets[schema.TIME], targets[schema.EVENT], targets[schema.LABEL])
        return tables_of.concatenate(
            [
                tables_of.make_survival_predictions(
                    rows.case_id, rows.slide_id, rows.fold, mode, *answers, outputs["risk"], outputs["hazards"]
                )
                for mode, outputs in found.items()
            ]
        )

    def read_table(self, path: pathlib.Path) -> SurvivalPredictions:
        """See `Task.read_table`."""
        return tables_of.read_survival_predictions(path)

    def write_table(self, path: pathlib.Path, table: SurvivalPredictions) -> pathlib.Path:
        """See `Task.write_table`."""
        return tables_of.write_survival_predictions(path, table)

    def concatenate(self, parts: Sequence[SurvivalPredictions]) -> SurvivalPredictions:
        """See `Task.concatenate`."""
        return tables_of.concatenate(parts)

    def write_reference(self, directory: pathlib.Path, cohort: Cohort, train_rows: np.ndarray) -> None:
        """The follow-up of the training patients, for the weights of censoring, and the time bins."""
        time, event = cohort.survival
        rows = ((cohort.case_id[r], repr(float(time[r])), int(event[r])) for r in train_rows)
        write_csv(directory / FOLLOW_UP_FILE, ("case_id", "time_months", "event"), rows)
        write_json(directory / BINS_FILE, self.facts())

    def read_reference(self, workdir: pathlib.Path, folds: Iterable[int]) -> dict[int, measures.Reference]:
        """Fold -> follow-up of its training patients and its time bins."""
        found = {}
        for k in folds:
            directory = workdir / f"fold_{k}"
            bins = self.restore(json.loads((directory / BINS_FILE).read_text())).bins
            found[k] = measures.Reference(*read_survival(directory / FOLLOW_UP_FILE).survival, bins.edges)
        return found

    def run_facts(self, cfg: ConfigDict, cohort: Cohort, folds: Sequence[Split]) -> dict[str, Any]:
        """Kind, protocol, who was left out, and what must be said about the numbers."""
        dropped = cohort.report()["dropped"]
        left_out = {reason: entry["n"] for reason, entry in dropped.items()}
        for name in ("not_in_cohort", "unassigned"):
            ids = {item for split in folds for item in getattr(split, name)}
            if ids:
                left_out[f"splits: {name.replace('_', ' ')}"] = len(ids)
        return {"task_kind": self.kind, "split_protocol": cfg.split.protocol, "left_out": left_out}

    def summarise(
        self, table: SurvivalPredictions, reference: Any, facts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Task.summarise`."""
        return summaries.summarise(table, reference, facts=facts, **options)

    def print_table(self, summary: Mapping[str, Any]) -> str:
        """See `Task.print_table`."""
        return summaries.print_table(summary)

    def measure(self) -> ablation.Measure:
        """Harrell's C-index."""
        return summaries.MEASURE


def bin_names(bins: survival.TimeBins) -> tuple[str, ...]:
    """Time bins for readers, e.g. "7.6 to 13.6 months"."""
    inner = [f"{edge:.3g}" for edge in bins.edges[1:-1]]
    if not inner:
        return ("all times",)
    middle = [f"{low} to {high} months" for low, high in zip(inner, inner[1:])]
    return (f"below {inner[0]} months", *middle, f"from {inner[-1]} months")
