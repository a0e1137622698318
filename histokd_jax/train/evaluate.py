"""Predictions of every slide of a split, each slide once, joined back to the cohort by manifest row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines.cohort import Cohort
from data_pipelines.pipeline import StepSource
from histokd_jax.evals import classification
from histokd_jax.evals.predictions import Predictions, concatenate, make_predictions
from histokd_jax.train.feed import Feeder

PredictFn = Callable[[Mapping[str, jax.Array], int], Mapping[str, Mapping[str, jax.Array]]]
"""(batch, index of the step) -> {mode: {"prob": [S, C]}}."""


def predict_source(
    predict: PredictFn, source: StepSource, feeder: Feeder, *, progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, np.ndarray]:
    """Class probabilities of every slide of an evaluation plan.

    Args:
      predict: see `PredictFn`.
      source: planned by `plan_evaluation`.
      feeder: gives its steps.
      progress: wraps the iteration, e.g. in a progress bar.

    Returns:
      mode -> [n, C] float64, in the order of `source.table.slide_index`.
    """
    found = Collected(source)
    for number, fed in enumerate(progress(feeder.evaluate(source))):
        found.add(
            fed.slide_index,
            jax.device_get({mode: value["prob"] for mode, value in predict(fed.batch, number).items()}),
        )
    return found.probs


class Collected:
    """Puts the probabilities of slots back into the order of the slides.

    Args:
      source: the evaluation plan that is walked through.

    Attributes:
      probs: mode -> [n, C] float64, in the order of `source.table.slide_index`; NaN where nothing was added yet.
    """

    def __init__(self, source: StepSource):
        self._place = {int(slide): row for row, slide in enumerate(source.table.slide_index)}
        self.probs: dict[str, np.ndarray] = {}

    def add(self, slide_index: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
        """Adds one step: [S] slides of its slots (-1: empty), and mode -> [S, C]."""
        slots = np.flatnonzero(slide_index >= 0)
        rows = [self._place[int(slide_index[slot])] for slot in slots]
        for mode, prob in found.items():
            empty = np.full((len(self._place), prob.shape[1]), np.nan)
            self.probs.setdefault(mode, empty)[rows] = prob[slots]


def as_table(probs: Mapping[str, np.ndarray], slide_index: np.ndarray, cohort: Cohort, fold: int) -> Predictions:
    """Predictions of all modes with case, slide and label, in the order of `slide_index`."""
    row_of = {int(slide): row for row, slide in enumerate(cohort.slide_index)}
    rows = [row_of[int(slide)] for slide in slide_index]
    case_id, slide_id = [cohort.case_id[r] for r in rows], [cohort.slide_id[r] for r in rows]
    return concatenate(
        [make_predictions(case_id, slide_id, fold, mode, cohort.label[rows], prob) for mode, prob in probs.items()]
    )


def val_metrics(probs: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """auroc, average_precision, accuracy, ... per mode, as `<metric>_<mode>`."""
    out: dict[str, Any] = {}
    for mode, prob in probs.items():
        for name, value in classification.classification_metrics(labels, prob).items():
            out[f"{name}_{mode}"] = float(value)
    return out


def mean_auc(metrics: Mapping[str, float], modes: Iterable[str]) -> float:
    """The stopping monitor: mean AUC over modes."""
    return float(np.mean([metrics[f"auroc_{mode}"] for mode in modes]))
