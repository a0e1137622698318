"""Data that a trained model is applied to, of whichever kind."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.cohort import Cohort
from data_pipelines.pipeline import Source
from histokd_jax.train.feed import Feeder


@dataclasses.dataclass(frozen=True, eq=False)
class NewData:
    """The input of a model.

    Attributes:
      source: one exact pass over all samples.
      cohort: the samples.
      feeder: gives the steps of `source`.
      manifest: of the data set.
    """

    source: Source
    cohort: Cohort
    feeder: Feeder
    manifest: Any
