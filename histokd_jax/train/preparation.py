"""What a method does with the training samples before its first step, e.g. to initialise memories from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import packing
from data_pipelines.pipeline import StepSource
from histokd_jax.train.feed import Feeder
from histokd_jax.types import Method


def prepare(
    method: Method, cfg: ConfigDict, train: StepSource, feeder: Feeder, params: Any, extra: Any
) -> tuple[Any, Any]:
    """Initial parameters and extra state after `Method.prepare`, or as they are if the method has none.

    Args:
      method: of the run.
      cfg: resolved configuration.
      train: the training samples with their answers; each is read once, whatever its plan draws.
      feeder: gives the steps.
      params: from `Method.init`.
      extra: likewise.
    """
    if method.prepare is None:
        return params, extra

    def batches() -> Iterator[Mapping[str, jax.Array]]:
        for fed in feeder.evaluate(exact_pass(train, cfg)):
            yield fed.batch

    return method.prepare(params, extra, batches, cfg.seed)


def exact_pass(source: StepSource, cfg: ConfigDict) -> StepSource:
    """All samples of a training plan once, with all their patches."""
    plan = packing.plan_evaluation(
        source.plan.sizes,
        target_capacity=source.plan.capacity,
        num_slots=cfg.eval.slots,
        rows=source.plan.rows,
        multiple_of=cfg.data.row_multiple,
    )
    return dataclasses.replace(source, plan=plan)
