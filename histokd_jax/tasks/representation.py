"""Representations: no labels; validation is the joint-embedding loss, and what is deployed is an encoder."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.cohort import Cohort
from data_pipelines.manifest import Manifest
from data_pipelines.splits import Split
from histokd_jax.evals import ablation, collapse
from histokd_jax.evals import representation_predictions as tables_of
from histokd_jax.evals import representation_summary as summaries
from histokd_jax.evals.representation_predictions import RepresentationRows
from histokd_jax.tasks.base import Found, Rows, Tables, Targets
from histokd_jax.tasks.classification import SUMMARY_FACTS
from histokd_jax.types import REPRESENTATION

LOSS, TOGETHER = "loss", "together"


@dataclasses.dataclass(frozen=True)
class RepresentationTask:
    """See `Task`."""

    kind: str = REPRESENTATION
    outputs: tuple[str, ...] = (LOSS, TOGETHER)
    monitor_name: str = "minus_val_loss"
    answers: str = "labels"
    summary_facts: tuple[str, ...] = (*SUMMARY_FACTS, "task_kind")

    @classmethod
    def from_config(cls, cfg: ConfigDict) -> RepresentationTask:
        """The task of a configuration.

        Raises:
          ValueError: a monitor other than the loss.
        """
        if cfg.early_stop.monitor != LOSS:
            raise ValueError(
                f"early_stop.monitor={cfg.early_stop.monitor!r}: without labels only {LOSS!r} can be watched"
            )
        return cls()

    def open_cohort(self, manifest: Manifest, cfg: ConfigDict, tables: Tables, **options: Any) -> Cohort:
        """Not possible: bags of embeddings come from an encoder that is finished.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"task_kind={REPRESENTATION} trains encoders of images: set data.kind=pairs")

    def strata(self, cohort: Cohort) -> np.ndarray:
        """One stratum: there are no labels."""
        return np.zeros(len(cohort), np.int32)

    def fit(self, cohort: Cohort, train_rows: np.ndarray) -> RepresentationTask:
        """Nothing to fit."""
        return self

    def facts(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def restore(self, facts: Mapping[str, Any]) -> RepresentationTask:
        """Nothing to restore."""
        return self

    def targets(self, cohort: Cohort) -> Targets:
        """The labels, if the data set has any; nothing here reads them."""
        return {schema.LABEL: cohort.label}

    def sampling_classes(self, targets: Targets) -> np.ndarray:
        """One class."""
        return np.zeros(len(targets[schema.LABEL]), np.int32)

    def check_split(self, cohort: Cohort, split: Split, fold: int) -> None:
        """The loss couples the examples of a step: every part needs two."""
        for part in ("train", "val", "test"):
            rows = getattr(split, part)
            if len(rows) < 2 and (len(rows) or part != "val"):
                raise ValueError(
                    f"fold {fold}: the {part} part has {len(rows)} examples; a joint-embedding loss needs at least 2: "
                    "use fewer folds, or another split.val_fraction"
                )

    def val_metrics(self, found: Found, targets: Targets) -> dict[str, float]:
        """loss_<mode>: mean over the examples of full steps."""
        del targets
        return {
            f"{LOSS}_{mode}": float(outputs[LOSS][tables_of.is_full(outputs[TOGETHER])].mean())
            for mode, outputs in found.items()
        }

    def monitor(self, metrics: Mapping[str, float], modes: Iterable[str]) -> float:
        """Minus the mean loss over modes."""
        return -float(np.mean([metrics[f"{LOSS}_{mode}"] for mode in modes]))

    def watch(self, means: Mapping[str, float]) -> dict[str, str]:
        """Collapsed embeddings and constant views."""
        return collapse.signs(means)

    def table(self, found: Found, targets: Targets, rows: Rows) -> RepresentationRows:
        """See `Task.table`."""
        del targets
        return tables_of.concatenate(
            [
                tables_of.make_rows(rows.case_id, rows.slide_id, rows.fold, mode, outputs[LOSS], outputs[TOGETHER])
                for mode, outputs in found.items()
            ]
        )

    def read_table(self, path: pathlib.Path) -> RepresentationRows:
        """See `Task.read_table`."""
        return tables_of.read_rows(path)

    def write_table(self, path: pathlib.Path, table: RepresentationRows) -> pathlib.Path:
        """See `Task.write_table`."""
        return tables_of.write_rows(path, table)

    def concatenate(self, parts: Sequence[RepresentationRows]) -> RepresentationRows:
        """See `Task.concatenate`."""
        return tables_of.concatenate(parts)

    def write_reference(self, directory: pathlib.Path, cohort: Cohort, train_rows: np.ndarray) -> None:
        """The loss needs no training part."""

    def read_reference(self, workdir: pathlib.Path, folds: Iterable[int]) -> None:
        """The loss needs no training part."""

    def run_facts(self, cfg: ConfigDict, cohort: Cohort, folds: Sequence[Split]) -> dict[str, Any]:
        """The kind of task."""
        return {"task_kind": self.kind}

    def summarise(
        self, table: RepresentationRows, reference: Any, facts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Task.summarise`."""
        return summaries.summarise(table, facts=facts, **options)

    def print_table(self, summary: Mapping[str, Any]) -> str:
        """See `Task.print_table`."""
        return summaries.print_table(summary)

    def measure(self) -> ablation.Measure:
        """The loss."""
        return summaries.MEASURE
