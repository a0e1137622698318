"""Builds RUN/report.html: one self-contained page (no script, no external resource) about a finished run."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.evals.summary import compare
from histokd_jax.report import classes, plots, representation_results, results, survival_results
from histokd_jax.report.html import Body, Cell, Html, Part, element, join, page, section, table
from histokd_jax.report.run_dir import (
    CLASSIFICATION,
    OVERLAP,
    REPRESENTATION,
    SIMULATED,
    SIMULATED_IMAGES,
    SURVIVAL,
    Run,
    flatten,
    lambdas,
    load_run,
)
from histokd_jax.report.training import training_figures

BANNERS = {
    SIMULATED: (
        "Simulated bags. ",
        "The patch embeddings behind every number here were generated, not extracted from slides. The numbers show how "
        "the software behaves; they say nothing about patients.",
    ),
    SIMULATED_IMAGES: (
        "Simulated images. ",
        "The images behind every number here were drawn by a program. The numbers show how the software behaves; they "
        "say nothing about patients.",
    ),
    OVERLAP: (
        "Within one patient, across sections. ",
        "Training and test data come from the same patient, so these numbers do not estimate performance on new "
        "patients.",
    ),
}
PUBLISHED = (
    "The patients that are reported were also the validation part, as in the published protocol. Whatever was selected "
    "on them is reported on the patients it was selected on, so these numbers are optimistic."
)
SHOWN_ELSEWHERE = ("cohort", "simulated", "patient_overlap")


def build_report(run_dir: str | os.PathLike[str]) -> pathlib.Path:
    """Write RUN_DIR/report.html from the files of a finished run (layout: `report.run_dir`).

    Args:
      run_dir: run directory; a subdirectory `control` with the same layout holds the same student with every lambda
        at 0, and is compared in pairs.

    Returns:
      Path of the report.

    Raises:
      ImportError: without Matplotlib; names the extra `report`.
      RunDirError: if a file is missing or inconsistent.
    """
    plots.require_matplotlib()
    run = load_run(pathlib.Path(run_dir))
    target = run.directory / "report.html"
    with atomic_writer(target) as stream:
        stream.write(render(run))
    return target


def render(run: Run) -> str:
    """The whole page as a string."""
    body = BODIES[run.kind](run)
    title = " · ".join([_name(run), *run.marks])
    trained = Part("trained", "What was trained", "What was trained", _what_was_trained(run, body.facts))
    parts = [trained, *body.parts, Part("provenance", "Provenance", "Provenance", _provenance(run))]
    return page(
        title,
        _header(run, parts),
        *(_banner(mark) for mark in run.marks),
        body.tiles,
        *(section(part.anchor, part.title, part.content) for part in parts),
        element("footer", "Written by histokd_jax. Research software: not a medical device."),
    )


def _banner(mark: str) -> Html:
    strong, text = BANNERS.get(mark, (f"{mark[0].upper()}{mark[1:]}. ", PUBLISHED))
    return element("div", element("strong", strong), text, class_="banner")


def _classification(run: Run) -> Body:
    comparison = _comparison(run)
    parts = (
        Part("results", "Results", "Results on the test folds", results.results_table(run)),
        Part(
            "distillation",
            "What distillation bought",
            "What distillation bought",
            results.comparison_section(run, comparison),
        ),
        *([Part("classes", "Classes", "Every class", classes.class_section(run))] if classes.has_classes(run) else []),
        Part("curves", "ROC / PRC", "ROC and precision-recall", results.curve_figures(run)),
        Part("calibration", "Calibration", "Calibration", results.calibration_figure(run)),
        Part("training", "Training", "Training", training_figures(run)),
        Part("folds", "Folds", "Folds", results.fold_table(run)),
    )
    facts = {
        "Classes": run.test.num_classes,
        "monitor": (run.config.get("early_stop") or {}).get("monitor"),
        "control": "same student, every lambda at 0",
    }
    return Body(results.tiles(run, comparison), parts, facts)


BODIES: Mapping[str, Callable[[Run], Body]] = {
    CLASSIFICATION: _classification,
    SURVIVAL: survival_results.body,
    REPRESENTATION: representation_results.body,
}


def _comparison(run: Run) -> dict[str, Any] | None:
    if run.control is None:
        return None
    facts = run.summary["bootstrap"]
    return compare(
        run.test,
        run.control.test,
        bootstrap=facts["resamples"],
        seed=facts["seed"],
        stratified=facts["stratified"],
        unit=facts["unit"],
    )


def _name(run: Run) -> str:
    facts = run.manifest
    parts = [str(facts.get("method", "")).upper(), str(facts.get("task") or ""), str(facts.get("dataset") or "")]
    return " · ".join(part for part in parts if part) or run.directory.name


def _header(run: Run, parts: Sequence[Part]) -> Html:
    patients = run.summary["modes"][run.headline_mode]["n_patients"]
    words = f"{results.count(len(run.test.folds), 'fold')}, {results.count(patients, 'test patient')}"
    return element(
        "header",
        element("h1", _name(run)),
        element("p", *(element("span", mark, class_="badge") for mark in run.marks), words),
        element("nav", *(element("a", part.link, href=f"#{part.anchor}") for part in parts)),
    )


def _what_was_trained(run: Run, own: Mapping[str, Any]) -> Html:
    own = dict(own)
    monitor, control = own.pop("monitor"), own.pop("control")
    weights = {key.split(".")[-1]: value for key, value in lambdas(run.config).items()}
    facts = {
        "Method": run.manifest.get("method"),
        "Task": run.manifest.get("task"),
        "Data set": run.manifest.get("dataset"),
        **own,
        "Folds": len(run.test.folds),
        "Loss weights": ", ".join(f"{key} = {value:g}" for key, value in weights.items()),
        "Epoch chosen by": monitor,
        "Control": control if run.control else "none",
    }
    rows = [[key, Cell(str(value), css="")] for key, value in facts.items() if value not in (None, "")]
    parts = [table(["Item", "Value"], rows, caption="The run.", marks=run.marks)]
    if run.manifest.get("cohort"):
        parts.append(_cohort_table(run))
    return element("div", *parts, class_="columns")


def _cohort_table(run: Run) -> Html:
    cohort = dict(run.manifest["cohort"])
    dropped: Mapping[str, Any] = cohort.pop("dropped", {}) or {}
    rows: list[list[Cell | str]] = [["Kept"]]
    counts = [(key, value) for key, value in flatten(cohort) if isinstance(value, int) and not isinstance(value, bool)]
    rows += [[_words(key), Cell(str(value)), ""] for key, value in counts]
    rows.append(["Dropped, by reason"])
    rows += [[str(reason), Cell(str(_drop_count(entry))), _drop_ids(entry)] for reason, entry in dropped.items()]
    if not dropped:
        rows.append(["nothing", Cell("0"), ""])
    return table(["Cohort", "Count", "Which"], rows, caption="Who entered, and who did not.", marks=run.marks)


def _drop_count(entry: Any) -> int:
    if isinstance(entry, Mapping):
        return entry["n"]
    return len(entry) if isinstance(entry, list) else int(entry)


def _drop_ids(entry: Any) -> str:
    ids = entry.get("ids", []) if isinstance(entry, Mapping) else entry if isinstance(entry, list) else []
    shown = ", ".join(map(str, ids[:8]))
    return f"{shown} and {len(ids) - 8} more" if len(ids) > 8 else shown


def _provenance(run: Run) -> Html:
    caption = "Software, seeds, fingerprints and command of this run."
    parts = [table(["Item", "Value"], _rows(_manifest_facts(run.manifest)), caption=caption, marks=run.marks)]
    if run.control is not None:
        ours = dict(_manifest_facts(run.manifest))
        changed = [(key, value) for key, value in _manifest_facts(run.control.manifest) if ours.get(key) != value]
        if changed:
            caption = "Where the control differs."
            parts.append(table(["Item", "Value"], _rows(changed), caption=caption, marks=run.marks))
    config = element("pre", json.dumps(run.config, indent=1, default=str), class_="scroll soft")
    return join([*parts, element("details", element("summary", "Resolved config"), config)])


def _manifest_facts(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from flatten({key: value for key, value in manifest.items() if key not in SHOWN_ELSEWHERE})


def _rows(facts: Any) -> list[list[Cell | str]]:
    return [[key, Cell(_text(value), css="mono")] for key, value in facts]


def _words(key: str) -> str:
    name = "samples" if key == "n" else key
    return name.replace("_", " ").replace("classes.", "class ").replace(".", ": ").removeprefix("n ")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)
