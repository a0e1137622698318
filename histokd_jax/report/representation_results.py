"""The sections of the report of a label-free run: loss, health of the embeddings, what the run noticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from histokd_jax.evals.collapse import DEAD, RANK, SPREAD, UNIT_STD
from histokd_jax.report.html import Body, Cell, Html, Part, element, join, table
from histokd_jax.report.results import count, interval, number, tile
from histokd_jax.report.run_dir import Run
from histokd_jax.report.training import captioned, panels

FINDINGS_FILE = "findings.json"
_TERMS = ("invariance", "variance", "covariance", "diagonal", "off_diagonal", "infonce")
_HEALTH = "A collapsed embedding is near 0 in the first, near 1 in the second and near 1 in the third figure."
FIGURES: Mapping[str, tuple[str, Callable[[str], bool], str]] = {
    "Validation loss": (
        "val",
        lambda name: name.startswith("loss"),
        "Loss of the validation part, batch norm in inference.",
    ),
    "Loss": ("train", lambda name: name == "loss", "Mean loss per example of every epoch."),
    "Loss terms": ("train", lambda name: name in _TERMS, "Each unweighted term of the loss, mean per epoch."),
    "Spread of the normalised embeddings": ("train", lambda name: name.startswith(UNIT_STD), "By branch. " + _HEALTH),
    "Effective rank": (
        "train",
        lambda name: name.startswith(RANK),
        "Participation ratio of the covariance, by branch.",
    ),
    "Dead dimensions": (
        "train",
        lambda name: name.startswith(DEAD),
        "Share of dimensions that do not vary, by branch.",
    ),
    "Inputs": (
        "train",
        lambda name: name.startswith(SPREAD) or name == "partners",
        "Mean range of the values of each view over the examples of a step (0: constant view); share of examples with "
        "a partner.",
    ),
}
"""Title -> (part, which metrics, caption)."""


def body(run: Run) -> Body:
    """Everything that a label-free run shows beside what every run shows."""
    parts = (
        Part("results", "Results", "Loss on the test part", results_table(run)),
        Part("findings", "Findings", "What the run noticed", findings(run)),
        Part("training", "Training", "Training", figures(run)),
    )
    early = (run.config.get("early_stop") or {}).get("enabled")
    facts = {
        "Layout": (run.config.get("layout") or {}).get("name"),
        "Privileged view": (run.config.get("privileged") or {}).get("source"),
        "monitor": "validation loss" if early else "fixed number of epochs",
        "control": "none",
    }
    return Body(tiles(run), parts, facts)


def tiles(run: Run) -> Html:
    """The key number: the loss."""
    shown = []
    for entry in run.summary["modes"].values():
        row = entry["metrics"]["loss"]
        small = f"95 % CI {interval(row['ci'])}; {count(entry['n_rows'], 'example')}"
        shown.append(tile("Joint-embedding loss", number(row["mean"]), small, run))
    return element("div", *shown, class_="tiles")


def results_table(run: Run) -> Html:
    """The loss per fold."""
    rows = []
    for entry in run.summary["modes"].values():
        row = entry["metrics"]["loss"]
        for fold, value in zip(entry["per_fold_counts"], row["per_fold"]):
            rows.append([f"fold {fold['fold']}", Cell(str(fold["n"])), Cell(number(value))])
    caption = (
        "Loss on the test part: mean over the examples of full steps, batch norm in inference mode. It depends on the "
        "batch size, the number of branches and the loss, and says nothing about the use of the encoder: probe it."
    )
    return table(["Fold", "Examples", "Loss"], rows, caption=caption, marks=run.marks)


def findings(run: Run) -> Html:
    """Collapsed embeddings and constant views, with the evidence."""
    told = []
    for path in sorted(run.directory.glob(f"fold_*/{FINDINGS_FILE}")):
        told += [f"{path.parent.name}, {text}" for _, text in sorted(json.loads(path.read_text()).items())]
    if not told:
        return element("p", "No collapse of an embedding and no constant view was seen in any epoch.", class_="verdict")
    return join(element("p", element("strong", text), class_="banner") for text in told)


def figures(run: Run) -> Html:
    """Curves of the loss, its terms and the health of the embeddings."""
    groups = {title: (panels(run, part, chosen), caption) for title, (part, chosen, caption) in FIGURES.items()}
    drawn = [captioned(run, title, *group) for title, group in groups.items() if group[0]]
    return join(drawn or [element("p", "No metrics.jsonl was found in this run directory.", class_="soft")])
