"""The summary of a run directory, and how its intervals are drawn."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from histokd_jax.evals import summary as summaries
from histokd_jax.evals import thresholds
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.tasks import Table, Task
from histokd_jax.train import distributed


def write_summary(
    directory: pathlib.Path, task: Task, test: Table, cfg: ConfigDict, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Computes and writes summary.json of an arm."""
    reference = task.read_reference(directory, test.folds)
    summary = task.summarise(test, reference, summary_facts(task, manifest), resampling(cfg))
    if distributed.is_main():
        summaries.write_summary(directory / "summary.json", summary)
    return summary


def write_thresholded(directory: pathlib.Path, cfg: ConfigDict, tables: Mapping[str, Table]) -> None:
    """Writes thresholded.json of an arm, if eval.threshold asks for it and there are validation parts."""
    if cfg.eval.get("threshold", "") != thresholds.VAL_F1 or "val" not in tables or not distributed.is_main():
        return
    with atomic_writer(directory / "thresholded.json") as stream:
        json.dump(thresholds.report(tables["val"], tables["test"]), stream, indent=2, sort_keys=True)


def summary_facts(task: Task, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of run_manifest.json that the summary repeats."""
    optional = {key: manifest[key] for key in ("marks", "data_kind") if manifest.get(key)}
    return {**{key: manifest[key] for key in task.summary_facts}, **optional}


def resampling(cfg: ConfigDict) -> dict[str, Any]:
    """How the intervals of a run are drawn: options of `Task.summarise`."""
    # With every sample a slide of its own (spots of one patient), patients cannot be resampled.
    unit = "slide" if cfg.data.unit == "slide" else "patient"
    return {"bootstrap": cfg.report.bootstrap, "seed": cfg.seed, "unit": unit}
