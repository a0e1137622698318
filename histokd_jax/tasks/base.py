"""The contract between the trainer and a kind of answer (classification, survival, representation)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.cohort import Cohort
from data_pipelines.manifest import Manifest
from data_pipelines.splits import Split
from histokd_jax.evals.ablation import Measure

Found = Mapping[str, Mapping[str, np.ndarray]]
"""Mode -> name of an output of `Method.predict` -> [n, ...], for n samples."""
Targets = Mapping[str, np.ndarray]
"""Name of a batch field -> [n, ...] values of all samples of a cohort: the answers that are known."""


class Table(Protocol):
    """A table of predictions: one row per (sample, fold, mode)."""

    case_id: np.ndarray
    slide_id: np.ndarray
    fold: np.ndarray
    mode: np.ndarray

    def __len__(self) -> int: ...

    @property
    def modes(self) -> tuple[str, ...]:
        """Inference modes, in order of first appearance."""

    @property
    def folds(self) -> tuple[int, ...]:
        """Fold numbers, ascending."""

    def of_mode(self, mode: str) -> Table:
        """The rows of one inference mode."""


@dataclasses.dataclass(frozen=True)
class Tables:
    """Files that a cohort is joined from; None: not read.

    Attributes:
      labels: class labels.
      genes: gene expression.
      survival: follow-up.
    """

    labels: pathlib.Path | None = None
    genes: pathlib.Path | None = None
    survival: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which samples a table is about: ids [n] each, and the fold whose model predicted."""

    case_id: Sequence[str]
    slide_id: Sequence[str]
    fold: int


class Task(Protocol):
    """A kind of answer. Values are immutable; `fit` returns a task that knows its fold.

    Attributes:
      kind: one of `KINDS`.
      outputs: what is collected of `Method.predict`.
      monitor_name: the stopping monitor on the progress bar.
      answers: file of `Tables` that holds the known answers: "labels" or "survival".
      summary_facts: entries of run_manifest.json that the summary repeats.
    """

    kind: str
    outputs: tuple[str, ...]
    monitor_name: str
    answers: str
    summary_facts: tuple[str, ...]

    def open_cohort(self, manifest: Manifest, cfg: ConfigDict, tables: Tables, **options: Any) -> Cohort:
        """The samples of a data set joined with its tables; without answers every sample is kept.

        Args:
          manifest: the slides.
          cfg: a run's configuration.
          tables: what to join.
          **options: replace arguments of `data_pipelines.cohort.build_cohort`.
        """

    def strata(self, cohort: Cohort) -> np.ndarray | None:
        """[n] int groups that folds are stratified by; None: the labels."""

    def fit(self, cohort: Cohort, train_rows: np.ndarray) -> Task:
        """The task of a fold, e.g. with time bins; `train_rows` are the training samples."""

    def facts(self) -> dict[str, Any]:
        """What a fitted task must remember with a model (JSON types)."""

    def restore(self, facts: Mapping[str, Any]) -> Task:
        """The fitted task from `facts`."""

    def targets(self, cohort: Cohort) -> Targets:
        """The answers of all samples, as batch fields."""

    def sampling_classes(self, targets: Targets) -> np.ndarray:
        """[n] int classes that the balanced sampler draws equally."""

    def check_split(self, cohort: Cohort, split: Split, fold: int) -> None:
        """Refuses a fold whose metrics would be undefined.

        Raises:
          ValueError: naming fold, part and what is lacking.
        """

    def val_metrics(self, found: Found, targets: Targets) -> dict[str, float]:
        """Metrics of every mode on the validation part, as `<metric>_<mode>`."""

    def monitor(self, metrics: Mapping[str, float], modes: Iterable[str]) -> float:
        """The stopping monitor, higher is better: mean over modes."""

    def watch(self, means: Mapping[str, float]) -> Mapping[str, str]:
        """What must be said about an epoch of training, once: kind of the finding -> text with the evidence.

        Args:
          means: metric of training -> mean over the epoch.
        """

    def table(self, found: Found, targets: Targets, rows: Rows) -> Table:
        """Predictions of all modes with ids and answers."""

    def read_table(self, path: pathlib.Path) -> Table:
        """Reads and validates a prediction table."""

    def write_table(self, path: pathlib.Path, table: Table) -> pathlib.Path:
        """Writes a prediction table atomically."""

    def concatenate(self, parts: Sequence[Table]) -> Table:
        """The rows of several tables."""

    def write_reference(self, directory: pathlib.Path, cohort: Cohort, train_rows: np.ndarray) -> None:
        """Writes, into the folder of a fold, what its summary needs to know of the training part."""

    def read_reference(self, workdir: pathlib.Path, folds: Iterable[int]) -> Any:
        """Reads what `write_reference` wrote, of all folds of a run."""

    def run_facts(self, cfg: ConfigDict, cohort: Cohort, folds: Sequence[Split]) -> dict[str, Any]:
        """What run_manifest.json says beyond what every task says."""

    def summarise(
        self, table: Table, reference: Any, facts: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The summary of a test table (summary.json).

        Args:
          table: predictions with answers.
          reference: from `read_reference`.
          facts: further top-level entries.
          options: "bootstrap", "seed" and "unit" of the intervals.
        """

    def print_table(self, summary: Mapping[str, Any]) -> str:
        """A summary as text for the terminal."""

    def measure(self) -> Measure:
        """The metrics of a sweep's table."""
