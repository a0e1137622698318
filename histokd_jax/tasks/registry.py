"""Tasks by the name that configurations give (`task_kind`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from histokd_jax.tasks.base import Task
from histokd_jax.tasks.classification import ClassificationTask
from histokd_jax.tasks.representation import RepresentationTask
from histokd_jax.tasks.survival import SurvivalTask
from histokd_jax.types import CLASSIFICATION, REPRESENTATION, SURVIVAL

KINDS = (CLASSIFICATION, SURVIVAL, REPRESENTATION)


def kind_of(facts: Mapping[str, Any] | ConfigDict) -> str:
    """`task_kind` of a configuration or of a run manifest; those of earlier versions are classification."""
    return facts.get("task_kind", CLASSIFICATION)


def get_task(cfg: ConfigDict) -> Task:
    """The task of a configuration, not fitted to a fold.

    Raises:
      ValueError: unknown kind, or contradictory settings.
    """
    kind = kind_of(cfg)
    if kind == CLASSIFICATION:
        return ClassificationTask.from_config(cfg)
    if kind == SURVIVAL:
        return SurvivalTask.from_config(cfg.survival)
    if kind == REPRESENTATION:
        return RepresentationTask.from_config(cfg)
    raise ValueError(f"task_kind={kind!r} is unknown; choose one of {KINDS}")
