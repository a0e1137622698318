"""The sections of the report that show results: key numbers, tables, curves, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from histokd_jax.evals import bootstrap as bs
from histokd_jax.evals import curves
from histokd_jax.evals.classification import LOWER_IS_BETTER
from histokd_jax.evals.predictions import Predictions
from histokd_jax.evals.summary import metric_label
from histokd_jax.report import plots
from histokd_jax.report.html import Cell, Html, element, figure, join, table
from histokd_jax.report.run_dir import Run

MODE_TITLES = {
    "pathology": "Student: slide only",
    "both": "Teacher: slide + genes",
    "genomics": "Teacher: genes only",
    "he": "Student: H&E only",
    "he+ihc": "Teacher: H&E + IHC",
}
ROC_RESAMPLES = 400
FOREST_METRICS = ("auroc", "average_precision", "balanced_accuracy", "f1", "macro_f1")


def mode_title(mode: str) -> str:
    """Name of an inference mode for readers."""
    return MODE_TITLES.get(mode, mode)


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals with a true minus sign; "undefined" for null or NaN."""
    if value is None or math.isnan(value):
        return "undefined"
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}") if signed else f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


def count(n: int, what: str) -> str:
    """ "1 fold", "5 folds"."""
    return f"{n} {what}{'s' * (n != 1)}"


def interval(ends: list[float | None], *, signed: bool = False) -> str:
    """ "[low, high]", or "no interval"."""
    if any(end is None for end in ends):
        return "no interval"
    return f"[{number(ends[0], signed=signed)}, {number(ends[1], signed=signed)}]"


def tiles(run: Run, comparison: Mapping[str, Any] | None) -> Html:
    """The key numbers: AUROC of every mode, and what distillation bought in the deployed one."""
    shown = []
    unit = run.summary["bootstrap"]["unit"]
    for mode, entry in run.summary["modes"].items():
        row = entry["metrics"]["auroc"]
        small = f"95 % CI {interval(row['ci'])}; {count(entry['n_patients'], 'patient')}" + _resampled(unit)
        shown.append(tile(f"AUROC, {mode_title(mode)}", number(row["mean"]), small, run))
    if comparison and run.headline_mode in comparison["modes"]:
        row = comparison["modes"][run.headline_mode]["metrics"]["auroc"]
        small = f"95 % CI {interval(row['ci'], signed=True)}; {row['verdict']}"
        shown.append(tile("Bought by distillation, AUROC", number(row["difference"], signed=True), small, run))
    return element("div", *shown, class_="tiles")


def results_table(run: Run) -> Html:
    """Metrics by mode, mean and population std over folds, bootstrap interval; notes on what is undefined."""
    modes = run.summary["modes"]
    names = list(next(iter(modes.values()))["metrics"])
    rows, notes = [], []
    for name in names:
        cells = []
        for mode, entry in modes.items():
            row = entry["metrics"][name]
            spread = f" ± {number(row['std'])}" if row["n_folds"] > 1 else ""
            cells.append(Cell(number(row["mean"]) + spread, interval(row["ci"])))
            if row["reason"]:
                notes.append(f"{metric_label(name, run.test.num_classes)}, {mode_title(mode)}: {row['reason']}.")
        rows.append([metric_label(name, run.test.num_classes), *cells])
    folds = len(run.summary["folds"])
    what = f"mean ± population standard deviation over {folds} test folds" if folds > 1 else "one test fold"
    resampling = run.summary["bootstrap"]
    caption = (
        f"Test performance: {what}; below it the 95 % bootstrap interval of the mean ({resampling['resamples']} "
        f"resamples; {resampling['how']}). Class decisions by arg-max."
    )
    header = ["Metric", *(mode_title(mode) for mode in modes)]
    return join([table(header, rows, caption=caption, marks=run.marks), notes_of(notes)])


def fold_table(run: Run) -> Html:
    """One row per fold: sizes, classes, test and validation AUROC of every mode."""
    modes = list(run.summary["modes"])
    counts = run.summary["modes"][run.headline_mode]["per_fold_counts"]
    validation = _validation_auroc(run)
    rows = []
    for i, size in enumerate(counts):
        cells = [Cell(str(size["n"])), Cell(" / ".join(map(str, size["per_class"])))]
        for mode in modes:
            test = run.summary["modes"][mode]["metrics"]["auroc"]["per_fold"][i]
            cells.append(Cell(number(test), validation.get((mode, size["fold"]), "")))
        rows.append([str(size["fold"]), *cells])
    header = ["Fold", "Test slides", "Per class", *(f"AUROC, {mode_title(mode)}" for mode in modes)]
    caption = "Every fold: test AUROC" + (", and below it the AUROC on its validation part." if validation else ".")
    return table(header, rows, caption=caption, marks=run.marks)


def comparison_section(run: Run, comparison: Mapping[str, Any] | None) -> Html:
    """What distillation bought: plain words, forest plot, table; or why nothing can be said."""
    if comparison is None:
        text = (
            "This run has no control: the same student trained with every lambda at 0 on the same folds. Without it "
            "nothing can be said about what distillation bought."
        )
        return element("p", text, class_="verdict")
    groups = {mode_title(mode): _effects(entry, run) for mode, entry in comparison["modes"].items()}
    caption = (
        f"Paired difference on the same {comparison['bootstrap']['unit']}s, with 95 % bootstrap interval (bar); small "
        "dots are the folds. An interval that crosses the vertical line shows no gain."
    )
    alt = "Forest plot of the paired differences between the distilled models and the control"
    return join(
        [
            element("p", *_plain_words(run, comparison), class_="verdict"),
            figure(plots.forest(groups), alt=alt, caption=caption, marks=run.marks),
            _comparison_tables(run, comparison),
        ]
    )


def curve_figures(run: Run) -> Html:
    """ROC and precision-recall curves with bands, the control dashed."""
    macro = " (macro one-vs-rest)" if run.test.num_classes > 2 else ""
    caption = (
        "{} averaged over folds{}; shaded: pointwise 95 % bootstrap band ("
        f"{ROC_RESAMPLES} resamples of {run.summary['bootstrap']['unit']}s within folds)."
        + (" Dashed: the same network with every lambda at 0." if run.control else "")
    )
    roc, prc = (
        _curve_panels(run, curves.roc_on_grid, "auroc"),
        _curve_panels(run, curves.precision_on_grid, "average_precision"),
    )
    roc_uri = plots.band_panels(roc, x="false-positive rate", y="true-positive rate", diagonal=True)
    prc_uri = plots.band_panels(prc, x="recall", y="precision", diagonal=False)
    roc_alt, prc_alt = (_curve_alt(kind, panels) for kind, panels in (("ROC", roc), ("Precision-recall", prc)))
    return element(
        "div",
        *[
            figure(roc_uri, alt=roc_alt, caption=caption.format("ROC curves", macro), marks=run.marks),
            figure(prc_uri, alt=prc_alt, caption=caption.format("Precision-recall curves", macro), marks=run.marks),
        ],
        class_="columns" if len(roc) == 1 else "",
    )


def calibration_figure(run: Run) -> Html:
    """Reliability curves with ECE and Brier score."""
    binary = run.test.num_classes == 2
    panels, words = {}, []
    for mode in run.test.modes:
        rows = run.test.of_mode(mode)
        curve = curves.calibration(rows.label, rows.probs)
        brier = run.summary["modes"][mode]["metrics"]["brier"]["mean"]
        panels[f"{mode_title(mode)}\nECE {curve.ece:.3f}, Brier {number(brier)}"] = curve
        words.append(f"{mode_title(mode)}: ECE {curve.ece:.3f}, Brier {number(brier)}")
    x, y = (
        ("predicted probability of class 1", "observed frequency of class 1")
        if binary
        else ("probability of the predicted class", "share of correct decisions")
    )
    caption = (
        "Calibration in ten bins of equal width, folds pooled; bars are 95 % Wilson intervals, the area of a marker "
        "grows with the rows in its bin. ECE: expected calibration error, pooled. Brier: mean over folds. "
        "Class-balanced sampling in training shifts probabilities towards rare classes; recalibrate before reading "
        "them as risks."
    )
    alt = "Calibration curves: " + "; ".join(words)
    return figure(plots.calibration_panels(panels, x=x, y=y), alt=alt, caption=caption, marks=run.marks)


def tile(what: str, value: str, small: str, run: Run) -> Html:
    """One key number."""
    return element(
        "div",
        element("span", what, class_="what"),
        element("div", value, class_="value"),
        element("span", small, class_="soft"),
        join([element("span", mark, class_="badge") for mark in run.marks]),
        class_="tile",
    )


def _resampled(unit: str) -> str:
    return "" if unit == "patient" else f", {unit}s resampled"


def notes_of(notes: list[str]) -> Html:
    """Folded remarks on what is undefined."""
    if not notes:
        return Html("")
    return element(
        "details", element("summary", f"{len(notes)} note(s) on undefined values"), *(element("p", n) for n in notes)
    )


def _validation_auroc(run: Run) -> dict[tuple[str, int], str]:
    if run.val is None:
        return {}
    found = {}
    for mode in run.val.modes:
        rows = run.val.of_mode(mode)
        for k in rows.folds:
            part = rows.where(rows.fold == k)
            ones = np.ones((1, len(part)))
            value = bs.bootstrap_fold_means(part.label, part.probs, part.fold, ones)["auroc"][0]
            found[mode, k] = f"validation {number(float(value))}"
    return found


def _effects(entry: Mapping[str, Any], run: Run) -> list[plots.Effect]:
    return [
        plots.Effect(
            metric_label(name, run.test.num_classes),
            *(math.nan if x is None else x for x in (row["difference"], *row["ci"])),
            [math.nan if x is None else x for x in row["per_fold"]],
        )
        for name, row in entry["metrics"].items()
        if name in FOREST_METRICS and (run.test.num_classes > 2 or name != "macro_f1")
    ]


def _plain_words(run: Run, comparison: Mapping[str, Any]) -> list[str]:
    mode = run.headline_mode if run.headline_mode in comparison["modes"] else next(iter(comparison["modes"]))
    row = comparison["modes"][mode]["metrics"]["auroc"]
    simulated = (
        f" These are {run.marks[0]}: the number describes the simulation, not patients."
        if (run.manifest["simulated"])
        else ""
    )
    return [
        f"{mode_title(mode)}: AUROC {number(row['distilled'])} with distillation, {number(row['control'])} for the "
        "same network with every lambda at 0, a paired difference of ",
        element("strong", number(row["difference"], signed=True)),
        f" (95 % CI {interval(row['ci'], signed=True)}): ",
        element("strong", row["verdict"]),
        f".{simulated}",
    ]


def _comparison_tables(run: Run, comparison: Mapping[str, Any]) -> Html:
    """The deployed mode's table in the open, those of the other modes folded away."""
    modes = sorted(comparison["modes"], key=lambda mode: mode != run.headline_mode)
    first, *others = (_comparison_table(run, mode, comparison["modes"][mode]) for mode in modes)
    if not others:
        return first
    names = ", ".join(mode_title(mode) for mode in modes[1:])
    return join([first, element("details", element("summary", f"The same for: {names}"), *others)])


def _comparison_table(run: Run, mode: str, entry: Mapping[str, Any]) -> Html:
    rows = [
        [metric_label(name, run.test.num_classes), *_comparison_cells(name, row)]
        for name, row in entry["metrics"].items()
    ]
    caption = (
        f"{mode_title(mode)}: distilled against the same network with every lambda at 0, paired on the same test rows. "
        "The interval covers the choice of test cases, not the randomness of training. The t-test over folds is shown "
        "for orientation: training sets of folds overlap, so its p-values are too small."
    )
    header = ["Metric", "Distilled", "Every λ = 0", "Difference", "Folds: t-test p", "Reading"]
    return table(header, rows, caption=caption, marks=run.marks)


def _comparison_cells(name: str, row: Mapping[str, Any]) -> list[Cell | str]:
    excludes = all(end is not None for end in row["ci"]) and (row["ci"][0] > 0 or row["ci"][1] < 0)
    gain = (row["difference"] or 0) > 0
    css = ("gain" if gain != (name in LOWER_IS_BETTER) else "loss") if excludes else ""
    t = row["folds_t"]
    return [
        Cell(number(row["distilled"])),
        Cell(number(row["control"])),
        Cell(number(row["difference"], signed=True), interval(row["ci"], signed=True)),
        Cell("n/a" if t["p"] is None else f"{t['p']:.3f}", f"n = {t['n']}"),
        Cell(row["verdict"], row["reason"] or "", css=css),
    ]


def _curve_panels(run: Run, curve, metric: str) -> dict[str, list[plots.Curve]]:
    panels = {}
    for mode in run.test.modes:
        label = f"{number(run.summary['modes'][mode]['metrics'][metric]['mean'])}"
        short = "AUROC" if metric == "auroc" else "AP"
        shown = [plots.Curve(_band(run, run.test.of_mode(mode), curve), f"{short} {label}")]
        if run.control is not None and mode in run.control.test.modes:
            mean = run.control.summary["modes"][mode]["metrics"][metric]["mean"]
            band = _band(run, run.control.test.of_mode(mode), curve, resamples=0)
            shown.append(plots.Curve(band, f"every λ = 0: {number(mean)}", control=True))
        panels[mode_title(mode)] = shown
    return panels


def _band(run: Run, rows: Predictions, curve, *, resamples: int = ROC_RESAMPLES) -> curves.Band:
    facts = run.summary["bootstrap"]
    ids = rows.slide_id if facts["unit"] == "slide" else rows.case_id
    drawn = bs.draw_resamples(
        ids, rows.fold, rows.label, resamples=resamples, seed=facts["seed"], stratified=facts["stratified"]
    )
    weights = drawn.weights[:0] if drawn.reason else drawn.weights
    return curves.curve_band(curve, rows.label, rows.probs, rows.fold, weights)


def _curve_alt(kind: str, panels: Mapping[str, list[plots.Curve]]) -> str:
    return f"{kind} curves: " + "; ".join(
        f"{t}, {', '.join(c.label for c in curves_)}" for t, curves_ in panels.items()
    )
