"""Classes: one label per sample, probabilities, AUROC as monitor."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.cohort import Cohort, build_cohort
from data_pipelines.manifest import Manifest
from data_pipelines.splits import Split
from histokd_jax.evals import ablation, classification
from histokd_jax.evals import predictions as tables_of
from histokd_jax.evals import summary as summaries
from histokd_jax.evals.predictions import Predictions
from histokd_jax.tasks.base import Found, Rows, Tables, Targets
from histokd_jax.types import CLASSIFICATION

AUC_MONITORS = ("mean_auc3", "student_auc")
"""Monitors that mean AUROC; over which modes, the stages of a method say."""
SUMMARY_FACTS = ("task", "method", "simulated", "patient_overlap", "dataset", "seed")


@dataclasses.dataclass(frozen=True)
class ClassificationTask:
    """See `Task`.

    Attributes:
      select_by: the metric that validation selects by.
    """

    select_by: str = "auroc"

    kind: str = CLASSIFICATION
    outputs: tuple[str, ...] = ("prob",)
    answers: str = "labels"
    summary_facts: tuple[str, ...] = SUMMARY_FACTS

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> ClassificationTask:
        """The task of a configuration; early_stop.monitor names the selecting metric.

        Raises:
          ValueError: unknown monitor.
        """
        name = cfg.early_stop.monitor
        known = [metric for metric in classification.metric_names(3) if metric not in classification.LOWER_IS_BETTER]
        if name in AUC_MONITORS:
            return cls()
        if name not in known:
            expected = ", ".join((*AUC_MONITORS, *known))
            raise ValueError(f"early_stop.monitor={name!r} is unknown; choose one of {expected}")
        return cls(name)

    @property
    def monitor_name(self) -> str:
        """Name of the monitor on the progress bar."""
        return "val_auc" if self.select_by == "auroc" else f"val_{self.select_by}"

    def open_cohort(self, manifest: Manifest, cfg: ConfigDict, tables: Tables, **options: Any) -> Cohort:
        """See `Task.open_cohort`."""
        given = {
            "labels_path": tables.labels,
            "task": cfg.task if tables.labels else None,
            "genes_path": tables.genes,
            "survival_path": tables.survival,
            "slide_choice": cfg.data.slide_choice,
            "unit": cfg.data.unit,
            "missing_slides": cfg.data.get("missing_slides", "exclude"),
            **options,
        }
        return build_cohort(manifest, **given)

    def strata(self, cohort: Cohort) -> None:
        """The labels."""

    def fit(self, cohort: Cohort, train_rows: np.ndarray) -> ClassificationTask:
        """Nothing to fit."""
        return self

    def facts(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def restore(self, facts: Mapping[str, Any]) -> ClassificationTask:
        """Nothing to restore."""
        return self

    def targets(self, cohort: Cohort) -> Targets:
        """The class of every sample."""
        return {schema.LABEL: cohort.label}

    def sampling_classes(self, targets: Targets) -> np.ndarray:
        """The classes themselves."""
        return targets[schema.LABEL]

    def check_split(self, cohort: Cohort, split: Split, fold: int) -> None:
        """Every part needs every class."""
        num_classes = len(cohort.class_names)
        for part in ("train", "val", "test") if len(split.val) else ("train", "test"):
            rows = getattr(split, part)
            present = set(cohort.label[rows].tolist())
            absent = [name for c, name in enumerate(cohort.class_names) if c not in present]
            if not len(rows) or (absent and num_classes == 2) or len(present) < 2:
                raise ValueError(
                    f"fold {fold}: the {part} part has {len(rows)} samples and lacks class {absent}: AUC is undefined; "
                    "use fewer folds, split.stratify=True, or other splits"
                )

    def val_metrics(self, found: Found, targets: Targets) -> dict[str, float]:
        """auroc, average_precision, accuracy, ... per mode."""
        out: dict[str, Any] = {}
        for mode, outputs in found.items():
            values = classification.classification_metrics(targets[schema.LABEL], outputs["prob"])
            out |= {f"{name}_{mode}": float(value) for name, value in values.items()}
        return out

    def monitor(self, metrics: Mapping[str, float], modes: Iterable[str]) -> float:
        """Mean of the selecting metric (AUC) over modes."""
        names = [f"{self.select_by}_{mode}" for mode in modes]
        if any(name not in metrics for name in names):
            raise ValueError(
                f"early_stop.monitor={self.select_by} does not exist for two classes; use auroc or accuracy"
            )
        return float(np.mean([metrics[name] for name in names]))

    def watch(self, means: Mapping[str, float]) -> dict[str, str]:
        """Nothing beyond the metrics."""
        return {}

    def table(self, found: Found, targets: Targets, rows: Rows) -> Predictions:
        """See `Task.table`."""
        return tables_of.concatenate(
            [
                tables_of.make_predictions(
                    rows.case_id, rows.slide_id, rows.fold, mode, targets[schema.LABEL], outputs["prob"]
                )
                for mode, outputs in found.items()
            ]
        )

    def read_table(self, path: pathlib.Path) -> Predictions:
        """See `Task.read_table`."""
        return tables_of.read_predictions(path)

    def write_table(self, path: pathlib.Path, table: Predictions) -> pathlib.Path:
        """See `Task.write_table`."""
        return tables_of.write_predictions(path, table)

    def concatenate(self, parts: Sequence[Predictions]) -> Predictions:
        """See `Task.concatenate`."""
        return tables_of.concatenate(parts)

    def write_reference(self, directory: pathlib.Path, cohort: Cohort, train_rows: np.ndarray) -> None:
        """Metrics of classes need no training part."""

    def read_reference(self, workdir: pathlib.Path, folds: Iterable[int]) -> None:
        """Metrics of classes need no training part."""

    def run_facts(self, cfg: ConfigDict, cohort: Cohort, folds: Sequence[Split]) -> dict[str, Any]:
        """Nothing more to say."""
        return {}

    def summarise(
        self, table: Predictions, reference: Any, facts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Task.summarise`."""
        return summaries.summarise(table, num_classes=table.num_classes, facts=facts, **options)

    def print_table(self, summary: Mapping[str, Any]) -> str:
        """See `Task.print_table`."""
        return summaries.print_table(summary)

    def measure(self) -> ablation.Measure:
        """AUROC, average precision, balanced accuracy; in front of them the selecting metric and accuracy, if other."""
        first = () if self.select_by == "auroc" else (self.select_by, "accuracy")
        names = tuple(dict.fromkeys((*first, *ablation.CLASSIFICATION.names)))
        return dataclasses.replace(ablation.CLASSIFICATION, names=names)
