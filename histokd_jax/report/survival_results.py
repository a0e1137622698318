"""The sections of the report of a survival run: C-index, Kaplan-Meier curves, AUC over time, calibration, folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals.survival.calibration import SurvivalCalibration, calibration_at
from histokd_jax.evals.survival.dynamic_auc import dynamic_auc
from histokd_jax.evals.survival.groups import HIGH, LOW
from histokd_jax.evals.survival.kaplan_meier import kaplan_meier
from histokd_jax.evals.survival_measures import (
    LABELS,
    Reference,
    evaluation_times,
    logrank_of,
    predicted_survival,
)
from histokd_jax.evals.survival_predictions import SurvivalPredictions
from histokd_jax.evals.survival_summary import LOWER_IS_BETTER, compare, remark
from histokd_jax.report import plots, survival_plots
from histokd_jax.report.html import Body, Cell, Html, Part, element, figure, join, table
from histokd_jax.report.results import count, interval, notes_of, number, tile
from histokd_jax.report.run_dir import Run, lambdas, read_references
from histokd_jax.report.training import training_figures

MODE_TITLES = {"pathology": "Slides alone", "both": "Slides and genes", "genomics": "Genes alone"}
VALIDATION = {
    "Validation C-index": (
        lambda name: name.startswith("c_index"),
        "Harrell's C-index on the validation part of each fold, by inference mode.",
    ),
    "Validation likelihood": (
        lambda name: name.startswith("nll"),
        "Mean negative log-likelihood of the time bins on the validation part; lower is better.",
    ),
}
CALIBRATION_GROUPS = 4


def mode_title(mode: str) -> str:
    """Name of an inference mode for readers."""
    return MODE_TITLES.get(mode, mode)


def body(run: Run) -> Body:
    """Everything that a survival run shows beside what every run shows."""
    references = read_references(run)
    comparison = _comparison(run, references)
    parts = [
        Part("results", "Results", "Results on the test folds", results_table(run)),
        Part("risk-groups", "Kaplan-Meier", "Survival by predicted risk", kaplan_meier_figure(run)),
        Part("comparison", "Comparison", "Against the control", comparison_section(run, comparison)),
        Part("over-time", "AUC over time", "Discrimination over time", auc_figure(run, references)),
    ]
    if run.test.num_bins:
        parts.append(Part("calibration", "Calibration", "Calibration", calibration_figure(run, references)))
    parts += [
        Part("training", "Training", "Training", training_figures(run, VALIDATION)),
        Part("folds", "Folds", "C-index by fold", fold_table(run)),
    ]
    settings = run.config.get("survival") or {}
    early = (run.config.get("early_stop") or {}).get("enabled")
    facts = {
        "Time bins": f"{run.test.num_bins} (edges from: {settings.get('bins_from')})" if run.test.num_bins else "none",
        "Split protocol": run.manifest.get("split_protocol"),
        "Left out": ", ".join(f"{n} ({why})" for why, n in (run.manifest.get("left_out") or {}).items()) or "nobody",
        "monitor": settings.get("monitor") if early else "fixed number of epochs",
        "control": _control_words(run),
    }
    return Body(tiles(run, comparison), tuple(parts), facts)


def tiles(run: Run, comparison: Mapping[str, Any] | None) -> Html:
    """The key numbers: C-index of every mode, the log-rank test of the deployed one, what was bought."""
    shown = []
    for mode, entry in run.summary["modes"].items():
        row = entry["metrics"]["c_index"]
        small = f"95 % CI {interval(row['ci'])}; {count(entry['n_patients'], 'patient')}"
        shown.append(tile(f"C-index, {mode_title(mode)}", number(row["mean"]), small, run))
    test = run.summary["modes"][run.headline_mode]["pooled"]["logrank"]["pooled"]
    small = f"high against low risk, {test['deaths'][1]} and {test['deaths'][0]} deaths; folds pooled"
    shown.append(tile("Log-rank p", p_value(test["p"]), test["reason"] or small, run))
    if comparison and run.headline_mode in comparison["modes"]:
        row = comparison["modes"][run.headline_mode]["metrics"]["c_index"]
        small = f"95 % CI {interval(row['ci'], signed=True)}; {row['verdict']}"
        shown.append(tile("Over the control, C-index", number(row["difference"], signed=True), small, run))
    return element("div", *shown, class_="tiles")


def p_value(p: float | None) -> str:
    """ "0.012", "2.1e-05", or "undefined"."""
    if p is None or math.isnan(p):
        return "undefined"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def results_table(run: Run) -> Html:
    """Metrics by mode: mean and population std over folds, interval; pooled figures below."""
    modes, rows, notes = run.summary["modes"], [], []
    for name, label in LABELS.items():
        cells = []
        for mode, entry in modes.items():
            row = entry["metrics"].get(name)
            if row is None:
                cells.append(Cell("not predicted"))
                continue
            spread = f" ± {number(row['std'])}" if row["n_folds"] > 1 else ""
            cells.append(Cell(number(row["mean"]) + spread, interval(row["ci"])))
            notes += [f"{label}, {mode_title(mode)}: {remark(row)}."] if remark(row) else []
        rows.append([label, *cells])
    pooled = [entry["pooled"] for entry in modes.values()]
    rows.append(["C-index, folds pooled", *(Cell(number(p["c_index"]), interval(p["ci"])) for p in pooled)])
    for scope, words in (("pooled", "pooled risks"), ("per_fold_rank", "ranks within folds")):
        rows.append([f"Log-rank p, {words}", *(Cell(p_value(p["logrank"][scope]["p"])) for p in pooled)])
    folds = len(run.summary["folds"])
    what = f"mean ± population standard deviation over {folds} folds" if folds > 1 else "one fold"
    resampling = run.summary["bootstrap"]
    caption = (
        f"Performance on the reported part: {what}; below each metric its 95 % bootstrap interval "
        f"({resampling['resamples']} resamples; {resampling['how']}). Weights of censoring come from the training "
        "patients of each fold; Brier score and AUC are averaged over 15 times between the 20th and 81st percentile of "
        "follow-up; neither is resampled. Pooled figures rank risks of different networks against each other."
    )
    header = ["Metric", *(mode_title(mode) for mode in modes)]
    return join([table(header, rows, caption=caption, marks=run.marks), notes_of(notes)])


def kaplan_meier_figure(run: Run) -> Html:
    """Kaplan-Meier curves of the halves of lower and higher predicted risk."""
    panels, words = {}, []
    for mode in run.test.modes:
        facts, patients, group = logrank_of(run.test.of_mode(mode), "pooled")
        if not all(facts["n"]):
            words.append(f"{mode_title(mode)}: {facts['reason']}.")
            continue
        note = f"log-rank p = {p_value(facts['p'])}"
        rows = [group == side for side in (LOW, HIGH)]
        curves = tuple(kaplan_meier(patients.time[r], patients.event[r]) for r in rows)
        panels[mode_title(mode)] = survival_plots.RiskGroups(curves, tuple(patients.time[r] for r in rows), note)
    caption = (
        "Patients of all folds, cut at the median of their predicted risks; shaded: 95 % pointwise log-log confidence "
        "band, crosses: censored patients. Risks of different networks are pooled without calibration, as published; "
        "the table above also gives the test on ranks within folds."
    )
    parts = [element("p", text) for text in words]
    if panels:
        alt = "Kaplan-Meier curves: " + "; ".join(f"{title}, {groups.note}" for title, groups in panels.items())
        uri = survival_plots.kaplan_meier_panels(panels)
        parts.append(figure(uri, alt=alt, caption=caption, marks=run.marks))
    return join(parts)


def auc_figure(run: Run, references: Mapping[int, Reference]) -> Html:
    """Cumulative/dynamic AUC over time, mean over folds."""
    panels = {}
    for mode in run.test.modes:
        rows = run.test.of_mode(mode)
        times = common_times(rows, references)
        if not len(times):
            continue
        mean = run.summary["modes"][mode]["metrics"]["iauc"]["mean"]
        curves = [survival_plots.TimeCurve(times, _auc_of_folds(rows, references, times), f"integrated {number(mean)}")]
        if run.control is not None and mode in run.control.test.modes:
            folds = _auc_of_folds(run.control.test.of_mode(mode), references, times)
            curves.append(survival_plots.TimeCurve(times, folds, "control", control=True))
        panels[mode_title(mode)] = curves
    if not panels:
        return element("p", "No time lies within the follow-up of every fold.", class_="soft")
    caption = (
        "How well the risk separates patients who die until a time from those who live beyond it (cumulative/dynamic "
        "AUC with weights of censoring from the training patients). Thick: mean over folds where all are defined; "
        "thin: the folds." + (" Dashed: the control." if run.control else "")
    )
    uri = survival_plots.time_panels(panels, y="AUC", chance=0.5)
    alt = "AUC over time: " + "; ".join(f"{title}, {curves[0].label}" for title, curves in panels.items())
    return figure(uri, alt=alt, caption=caption, marks=run.marks)


def common_times(rows: SurvivalPredictions, references: Mapping[int, Reference]) -> np.ndarray:
    """Times within the follow-up of every fold."""
    grids = [evaluation_times(rows.where(rows.fold == k), references[k]) for k in rows.folds]
    if not all(len(grid) for grid in grids):
        return np.zeros(0)
    low, high = max(grid[0] for grid in grids), min(grid[-1] for grid in grids)
    return np.linspace(low, high, 25) if low < high else np.zeros(0)


def _auc_of_folds(rows: SurvivalPredictions, references: Mapping[int, Reference], times: np.ndarray) -> np.ndarray:
    found = []
    for k in rows.folds:
        part = rows.where(rows.fold == k)
        censoring = references[k].censoring
        found.append(dynamic_auc(part.risk, part.time_months, part.event == 1, times, censoring).auc)
    return np.array(found)


def calibration_figure(run: Run, references: Mapping[int, Reference]) -> Html:
    """Predicted against observed survival at the middle of follow-up."""
    panels, words = {}, []
    for mode in run.test.modes:
        found = calibration_of(run.test.of_mode(mode), references)
        title = f"{mode_title(mode)}, {found.at:.0f} months"
        panels[f"{title}\nmean error {number(found.error)}"] = found
        words.append(f"{title}, mean error {number(found.error)}")
    caption = (
        f"Predicted probability to live beyond the median death time, against the Kaplan-Meier estimate in "
        f"{CALIBRATION_GROUPS} groups of patients by prediction, folds pooled; bars are 95 % limits, the area of a "
        "marker grows with its patients. Balanced sampling in training shifts hazards; recalibrate before reading them "
        "as probabilities."
    )
    uri = survival_plots.calibration_panels(panels)
    return figure(uri, alt="Calibration: " + "; ".join(words), caption=caption, marks=run.marks)


def calibration_of(rows: SurvivalPredictions, references: Mapping[int, Reference]) -> SurvivalCalibration:
    """Calibration of one mode at the median time of the observed deaths, folds pooled."""
    at = float(np.median(rows.time_months[rows.event == 1]))
    survival = np.empty(len(rows))
    for k in rows.folds:
        own = rows.fold == k
        survival[own] = predicted_survival(rows.where(own), references[k].edges, np.array([at]))[:, 0]
    return calibration_at(survival, rows.time_months, rows.event == 1, at, groups=CALIBRATION_GROUPS)


def fold_table(run: Run) -> Html:
    """C-index of every fold, mode and arm, with the means and the paired difference."""
    modes = list(run.summary["modes"])
    arms = [("", run)] + ([(", control", run.control)] if run.control else [])
    columns = [(mode, words, arm) for mode in modes for words, arm in arms if mode in arm.summary["modes"]]
    rows = []
    for i, size in enumerate(run.summary["modes"][run.headline_mode]["per_fold_counts"]):
        values = [arm.summary["modes"][mode]["metrics"]["c_index"]["per_fold"][i] for mode, _, arm in columns]
        rows.append([str(size["fold"]), Cell(f"{size['n']} / {size['events']}"), *(Cell(number(v)) for v in values)])
    means = [arm.summary["modes"][mode]["metrics"]["c_index"] for mode, _, arm in columns]
    rows.append(["Mean", Cell(""), *(Cell(number(m["mean"]), interval(m["ci"])) for m in means)])
    header = ["Fold", "Patients / deaths", *(f"{mode_title(mode)}{words}" for mode, words, _ in columns)]
    caption = "Harrell's C-index on the reported part of every fold; below the means their 95 % bootstrap intervals."
    return table(header, rows, caption=caption, marks=run.marks)


def comparison_section(run: Run, comparison: Mapping[str, Any] | None) -> Html:
    """Paired differences of all metrics, or why nothing can be said."""
    if comparison is None:
        text = (
            "This run has no control arm on the same folds, so nothing can be said about what its extra terms bought."
        )
        return element("p", text, class_="verdict")
    found = [
        (mode_title(mode), name, row)
        for mode, entry in comparison["modes"].items()
        for name, row in entry["metrics"].items()
    ]
    rows = [_compared(f"{LABELS[name]}, {title}", row) for title, name, row in found]
    groups: dict[str, list[plots.Effect]] = {}
    for title, name, row in found:
        # An error would point the other way.
        if name not in LOWER_IS_BETTER:
            groups.setdefault(title, []).append(_effect(LABELS[name], row))
    caption = (
        f"This run against its control ({_control_words(run)}), paired on the same patients "
        f"({comparison['bootstrap']['resamples']} resamples). The interval covers the choice of patients, not the "
        "randomness of training; training sets of folds overlap, so the t-test over folds is too optimistic. The Brier "
        "score is an error: a difference below 0 is a gain."
    )
    header = ["Metric", "This run", "Control", "Difference", "Bootstrap p", "Folds: t-test p", "Reading"]
    alt = "Forest plot of the paired differences of the C-index and the AUC"
    uri = plots.forest(groups, x="difference, this run - control (right of 0: this run is better)")
    words = "Bars are 95 % bootstrap intervals of the paired difference; small dots are the folds."
    return join(
        [table(header, rows, caption=caption, marks=run.marks), figure(uri, alt=alt, caption=words, marks=run.marks)]
    )


def _compared(label: str, row: Mapping[str, Any]) -> list[str | Cell]:
    t = row["folds_t"]
    return [
        label,
        Cell(number(row["distilled"])),
        Cell(number(row["control"])),
        Cell(number(row["difference"], signed=True), interval(row["ci"], signed=True)),
        Cell(p_value(row["p"])),
        Cell(p_value(t["p"]), f"n = {t['n']}"),
        Cell(row["verdict"], remark(row), css=""),
    ]


def _effect(label: str, row: Mapping[str, Any]) -> plots.Effect:
    ends = [math.nan if x is None else x for x in (row["difference"], *row["ci"])]
    return plots.Effect(label, *ends, [math.nan if x is None else x for x in row["per_fold"]])


def _comparison(run: Run, references: Mapping[int, Reference]) -> dict[str, Any] | None:
    if run.control is None:
        return None
    facts = run.summary["bootstrap"]
    options = {"bootstrap": facts["resamples"], "seed": facts["seed"]}
    return compare(run.test, run.control.test, reference=references, **options)


def _control_words(run: Run) -> str:
    if run.control is None:
        return "none"
    ours, theirs = _weights(run.config), _weights(run.control.config)
    changed = [f"{key} = {value}" for key, value in theirs.items() if ours.get(key) != value]
    return "the same network with " + ", ".join(changed) if changed else "the same settings"


def _weights(config: Mapping[str, Any]) -> dict[str, Any]:
    own: Sequence[tuple[str, Any]] = [(f"loss.{key}", value) for key, value in (config.get("loss") or {}).items()]
    return dict(own) | lambdas(config)
