"""Training curves of a run: validation AUC, total loss, each loss term, embedding norms."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from histokd_jax.report import plots
from histokd_jax.report.html import Cell, Html, element, figure, join, table
from histokd_jax.report.run_dir import Run

COORDINATES = frozenset({"step", "epoch", "split", "stage", "fold"})
# What a train record holds beside loss terms: accuracies, norms, learning rate, gradient sizes, speed, memory.
NOT_A_TERM = re.compile(
    r"^(loss$|norm|acc|lr|learning_rate|grad|param|update|skipped|time|sec|wall|fill|mem|n_|input_)|per_s|auc"
)
Series = dict[str, tuple[np.ndarray, np.ndarray]]


def is_auc(name: str) -> bool:
    """Is this the name of a validation AUC?"""
    return re.search(r"au(ro)?c", name) is not None


def is_norm(name: str) -> bool:
    """Is this the name of an embedding norm (not of a gradient norm)?"""
    return re.match(r"norm", name) is not None


def is_loss_term(name: str) -> bool:
    """Is this the name of one term of the loss?"""
    return NOT_A_TERM.search(name) is None


def panels(run: Run, split: str, chosen: Callable[[str], bool]) -> dict[str, Series]:
    """Curves per metric and fold.

    Args:
      run: the run.
      split: "train" or "val".
      chosen: which metric names.

    Returns:
      metric -> {"fold k": (epoch, value)}; metrics that no record holds as a finite number are left out.
    """
    found: dict[str, Series] = {}
    for fold, records in run.curves.items():
        records = [record for record in records if record.get("split") == split]
        for name in dict.fromkeys(key for record in records for key in record if key not in COORDINATES):
            series = plots.finite_series((_abscissa(record), record.get(name)) for record in records)
            if chosen(name) and len(series[0]):
                found.setdefault(name, {})[f"fold {fold}"] = series
    return found


VALIDATION_AUC = {"Validation AUC": (is_auc, "AUC on the validation part of each fold, by inference mode.")}


def training_figures(run: Run, validation: Mapping[str, tuple[Callable[[str], bool], str]] = VALIDATION_AUC) -> Html:
    """All training figures with captions; says so when the run directory holds no curves.

    Args:
      run: the run.
      validation: title -> (which metrics of the validation part, caption).
    """
    groups: Mapping[str, tuple[dict[str, Series], str]] = {
        **{title: (panels(run, "val", chosen), caption) for title, (chosen, caption) in validation.items()},
        "Loss": (
            _total_loss(run),
            "Total loss (sum of weighted terms), mean per epoch; not comparable between runs with other lambdas.",
        ),
        "Loss terms": (panels(run, "train", is_loss_term), "Each unweighted term of the loss, mean per epoch."),
        "Embedding norms": (
            panels(run, "train", is_norm),
            "Mean Euclidean norm of the embeddings. Falling norms can lower the orthogonality loss without "
            "disentangling anything.",
        ),
    }
    drawn = [captioned(run, title, *group) for title, group in groups.items() if group[0]]
    drawn += [input_table(run)] if timed_epochs(run) else []
    return join(drawn or [element("p", "No metrics.jsonl was found in this run directory.", class_="soft")])


def timed_epochs(run: Run) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """(fold, stage) -> its training records that hold times; without the first epoch, which compiles, unless alone."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for fold, records in run.curves.items():
        for record in records:
            if record.get("split") == "train" and record.get("time_epoch") and "time_data_wait" in record:
                found.setdefault((fold, str(record.get("stage", ""))), []).append(record)
    return {key: records[1:] or records for key, records in found.items()}


def input_table(run: Run) -> Html:
    """How fast every fold was trained, and which share of the time its steps waited for input.

    Args:
      run: with at least one timed epoch.
    """
    rows = []
    for (fold, stage), records in timed_epochs(run).items():
        seconds, waited = (sum(record[name] for record in records) for name in ("time_epoch", "time_data_wait"))
        rate = next((name for name in records[0] if name.endswith("_per_second")), None)
        items = sum(record[rate] * record["time_epoch"] for record in records) / seconds if rate else None
        speed = f"{items:,.0f} {rate.removesuffix('_per_second')}/s" if rate else "not recorded"
        cells = (speed, f"{100 * waited / seconds:.1f} %", str(len(records)))
        rows.append([f"fold {fold}, {stage}", *(Cell(text) for text in cells)])
    caption = "Speed of the training steps, and the share of their time spent waiting for input (input-bound fraction)."
    header = ["Training", "Speed", "Waiting for input", "Epochs"]
    return join([element("h3", "Input"), table(header, rows, caption=caption, marks=run.marks)])


def _total_loss(run: Run) -> dict[str, Series]:
    return {
        f"loss, {split}": series
        for split in ("train", "val")
        for series in panels(run, split, lambda name: name == "loss").values()
    }


def captioned(run: Run, title: str, series: dict[str, Series], caption: str) -> Html:
    """A figure of one group of curves, one panel per metric, under its title."""
    uri = plots.line_panels(series, x=_abscissa_title(run))
    alt = f"{title} per fold: {', '.join(series)}"
    return join([element("h3", title), figure(uri, alt=alt, caption=caption, marks=run.marks)])


def _abscissa(record: Mapping[str, Any]) -> float:
    return record.get("epoch", record["step"])


def _abscissa_title(run: Run) -> str:
    has_epochs = all("epoch" in record for records in run.curves.values() for record in records)
    return "epoch" if has_epochs else "step"
