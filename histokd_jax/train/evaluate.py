"""Predictions of every sample of a split, each sample once, joined back to the cohort by the number of its bag."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from data_pipelines.cohort import Cohort
from data_pipelines.pipeline import StepSource
from histokd_jax.tasks import Found, Rows, Table, Targets, Task
from histokd_jax.train import step
from histokd_jax.train.feed import Feeder

PredictFn = Callable[[Mapping[str, jax.Array], int], Mapping[str, Mapping[str, jax.Array]]]
"""(batch, index of the step) -> {mode: {output: [S, ...]}}."""


def predict_source(
    predict: PredictFn,
    source: StepSource,
    feeder: Feeder,
    outputs: Sequence[str],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, dict[str, np.ndarray]]:
    """Predictions of every sample of an evaluation plan.

    Args:
      predict: see `PredictFn`.
      source: planned by `plan_evaluation`.
      feeder: gives its steps.
      outputs: names of the outputs that are kept.
      progress: wraps the iteration, e.g. in a progress bar.

    Returns:
      mode -> output -> [n, ...] float64, in the order of `source.table.slide_index`.

    Raises:
      ValueError: the method predicts no such output.
    """
    found = Collected(source)
    for number, fed in enumerate(progress(feeder.evaluate(source))):
        values = {mode: step.chosen_outputs(value, outputs) for mode, value in predict(fed.batch, number).items()}
        found.add(fed.slide_index, jax.device_get(values))
    return found.values


class Collected:
    """Puts the predictions of slots back into the order of the samples.

    Args:
      source: the evaluation plan that is walked through.

    Attributes:
      values: mode -> output -> [n, ...] float64, in the order of `source.table.slide_index`; NaN where nothing was
        added yet.
    """

    def __init__(self, source: StepSource):
        self._place = {int(bag): row for row, bag in enumerate(source.table.slide_index)}
        self.values: dict[str, dict[str, np.ndarray]] = {}

    def add(self, slide_index: np.ndarray, found: Found) -> None:
        """Adds one step: [S] bags of its slots (-1: empty), and mode -> output -> [S, ...]."""
        slots = np.flatnonzero(slide_index >= 0)
        rows = [self._place[int(slide_index[slot])] for slot in slots]
        for mode, outputs in found.items():
            own = self.values.setdefault(mode, {})
            for name, value in outputs.items():
                empty = np.full((len(self._place), *value.shape[1:]), np.nan)
                own.setdefault(name, empty)[rows] = value[slots]


def as_table(task: Task, found: Found, bags: np.ndarray, cohort: Cohort, targets: Targets, fold: int) -> Table:
    """Predictions of all modes with ids and answers, in the order of `bags`.

    Args:
      task: of the fold.
      found: from `predict_source`.
      bags: [n] `source.table.slide_index`.
      cohort: the samples.
      targets: their answers, aligned to the cohort.
      fold: fold whose model predicted.
    """
    row_of = {int(bag): row for row, bag in enumerate(cohort.bag_index)}
    rows = [row_of[int(bag)] for bag in bags]
    ids = Rows([cohort.case_id[r] for r in rows], [cohort.slide_id[r] for r in rows], fold)
    return task.table(found, {name: values[rows] for name, values in targets.items()}, ids)


def is_finite(found: Found) -> bool:
    """Whether no prediction is NaN or infinite."""
    return all(np.isfinite(value).all() for outputs in found.values() for value in outputs.values())
