"""The section of the report about single classes: confusion matrices and the report of every class."""

from __future__ import annotations

from typing import Any

import numpy as np

from histokd_jax.evals.per_class import RATES
from histokd_jax.report import plots
from histokd_jax.report.html import Cell, Html, figure, join, table
from histokd_jax.report.results import interval, mode_title, number
from histokd_jax.report.run_dir import Run

TITLES = {"precision": "Precision", "recall": "Recall", "f1": "F1", "auroc": "AUROC (against the rest)"}


def has_classes(run: Run) -> bool:
    """Whether the summary has a report of every class (more than two classes)."""
    return all("confusion" in entry for entry in run.summary["modes"].values())


def class_section(run: Run) -> Html:
    """Confusion matrices of all modes, and one table per mode."""
    names = _names(run)
    modes = run.summary["modes"]
    panels = {mode_title(mode): np.asarray(entry["confusion"]) for mode, entry in modes.items()}
    pooled = "all test folds pooled" if len(run.summary["folds"]) > 1 else "test part"
    caption = (
        f"Confusion matrices, {pooled}: counts and shares of the true class (shade); class decisions by arg-max. "
        "Classes in their order, so that errors far from the diagonal are the grave ones of a grade."
    )
    alt = "Confusion matrices: " + "; ".join(f"{title}, {_in_words(counts)}" for title, counts in panels.items())
    picture = figure(plots.confusion_panels(panels, names), alt=alt, caption=caption, marks=run.marks)
    return join([picture, *(_table(run, mode, entry, names) for mode, entry in modes.items())])


def _names(run: Run) -> list[str]:
    known = list(run.manifest.get("class_names") or ())
    return known if len(known) == run.test.num_classes else [str(c) for c in range(run.test.num_classes)]


def _in_words(counts: np.ndarray) -> str:
    return f"{int(np.trace(counts))} of {int(counts.sum())} on the diagonal"


def _table(run: Run, mode: str, entry: dict[str, Any], names: list[str]) -> Html:
    report = entry["per_class"]
    rows = []
    for c, name in enumerate(names):
        cells = [Cell(number(report[rate]["value"][c]), interval(report[rate]["ci"][c])) for rate in RATES]
        rows.append([name, Cell(str(report["support"][c])), *cells])
    caption = f"{mode_title(mode)}: every class, with 95 % bootstrap intervals."
    return table(["Class", "Test cases", *(TITLES[rate] for rate in RATES)], rows, caption=caption, marks=run.marks)
