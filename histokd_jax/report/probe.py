"""Writes report.html of an evaluation of patch encoders (`histokd probe`): self-contained, no script."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.evals.summary import LABELS
from histokd_jax.report import plots
from histokd_jax.report.html import Cell, Html, Part, element, figure, join, page, section, table
from histokd_jax.report.results import interval, number
from histokd_jax.report.run_dir import flatten
from histokd_jax.report.style import SERIES

TABLE, MANIFEST, POINTS, REPORT = "table.json", "probe_manifest.json", "points.npz", "report.html"
METRICS = ("accuracy", "balanced_accuracy", "auroc", "macro_f1")
SHOWN = "balanced_accuracy"
_DOTS, _MARKERS = 2000, "o^sDvPX"


def build_probe_report(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes DIRECTORY/report.html.

    Args:
      directory: results of `histokd probe`.

    Returns:
      Path of the report.

    Raises:
      ImportError: without Matplotlib; names the extra `report`.
      DataError: the evaluation is not finished.
    """
    plots.require_matplotlib()
    directory = pathlib.Path(directory)
    try:
        found, manifest = (json.loads((directory / name).read_text()) for name in (TABLE, MANIFEST))
        with np.load(directory / POINTS, allow_pickle=False) as stored:
            points = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no finished evaluation: {error.filename} is missing") from error
    with atomic_writer(directory / REPORT) as stream:
        stream.write(render(found, manifest, points))
    return directory / REPORT


def render(found: Mapping[str, Any], manifest: Mapping[str, Any], points: Mapping[str, np.ndarray]) -> str:
    """The whole page as a string."""
    parts = [
        Part("probed", "What was probed", "What was probed", _what(found)),
        Part("results", "Results", "Results on the tested patches", _results(found)),
        *_optional(found),
        Part("structure", "Embeddings", "Embeddings without labels", _structure(found, points)),
        Part("provenance", "Provenance", "Provenance", _provenance(manifest)),
    ]
    nav = element("nav", *(element("a", part.link, href=f"#{part.anchor}") for part in parts))
    header = element("header", element("h1", found["title"]), element("p", _subtitle(found)), nav)
    banners = [element("div", mark[0].upper() + mark[1:] + ".", class_="banner") for mark in found["marks"]]
    sections = [section(part.anchor, part.title, part.content) for part in parts]
    footer = element("footer", "Written by histokd_jax. Research software: not a medical device.")
    return page(found["title"], header, *banners, _tiles(found), *sections, footer)


def _subtitle(found: Mapping[str, Any]) -> str:
    folds, data = len(found["split"]["folds"]), found["data"]
    return (
        f"{data['patches']} patches, {len(data['classes'])} classes; split: {found['split']['kind']}, "
        f"{folds} fold{'s' * (folds != 1)}; {len(found['encoders'])} encoders; intervals: {found['unit']} resampled"
    )


def _optional(found: Mapping[str, Any]) -> Iterator[Part]:
    if len(found["encoders"]) > 1:
        yield Part("compared", "Compared", f"Compared with {found['reference']}", _compared(found))
    if len(found["settings"]["fractions"]) > 1:
        yield Part("labels", "Few labels", "With few labels", _label_curves(found))


def _tiles(found: Mapping[str, Any]) -> Html:
    mode = found["rows"][0]["mode"]
    shown = []
    for row in found["rows"]:
        if row["mode"] == mode and row["metric"] == SHOWN:
            what = element("span", f"{row['setting']}: {found['titles'][mode]}", class_="what")
            small = element("span", f"balanced accuracy {interval(row['ci'])}", class_="soft")
            shown.append(
                element("div", what, element("div", number(row["mean"]), class_="value"), small, class_="tile")
            )
    return element("div", *shown, class_="tiles")


def _what(found: Mapping[str, Any]) -> Html:
    encoders = []
    for label, facts in found["encoders"].items():
        kind = facts.get("architecture", {}).get("kind", "feature array")
        encoders.append(
            [label, facts["name"], kind, str(facts.get("weights", "")), Cell(facts["sha256"][:16], css="mono")]
        )
    classes = [[name, Cell(str(count))] for name, count in found["data"]["classes"].items()]
    folds = [[f"fold {k}", Cell(str(f["train"])), Cell(str(f["test"]))] for k, f in enumerate(found["split"]["folds"])]
    parts = [
        table(
            ["Name", "Encoder", "Kind", "Weights", "SHA-256"], encoders, caption="Encoders, frozen unless fine-tuned."
        ),
        table(["Class", "Patches"], classes, caption=f"{found['data']['name']}: {found['data']['groups']} groups."),
        table(["Fold", "Training", "Tested"], folds, caption=f"Split: {found['split']['kind']}."),
        *(element("p", note, class_="note") for note in found["notes"]),
    ]
    return join(parts)


def _results(found: Mapping[str, Any]) -> Html:
    rows, index = [], _indexed(found)
    for mode in found["titles"]:
        rows.append([found["titles"][mode]])
        for setting in found["encoders"]:
            if (mode, setting, METRICS[0]) in index:
                rows.append([setting, *(_cell(index[mode, setting, metric]) for metric in METRICS)])
    caption = (
        f"Mean over folds and seeds with 95 % bootstrap interval ({found['unit']} resampled within folds); ± is the "
        "standard deviation over seeds."
    )
    parts = [table(["Encoder", *(LABELS[metric] for metric in METRICS)], rows, caption=caption)]
    parts += [element("p", f"Not finished: {name}: {why}", class_="loss") for name, why in found["failed"].items()]
    return join(parts)


def _indexed(found: Mapping[str, Any]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["mode"], row["setting"], row["metric"]): row for row in found["rows"]}


def _cell(row: Mapping[str, Any]) -> Cell:
    spread = "" if row["seed_std"] is None else f" ± {row['seed_std']:.3f}"
    return Cell(number(row["mean"]) + spread, interval(row["ci"]))


def _compared(found: Mapping[str, Any]) -> Html:
    index, groups, rows = _indexed(found), {}, []
    for mode, title in found["titles"].items():
        own = [index[mode, s, SHOWN] for s in found["encoders"] if index.get((mode, s, SHOWN), {}).get("seeds_t")]
        if own:
            groups[title] = [_effect(row) for row in own]
            rows += [[title], *([row["setting"], *_difference_cells(row)] for row in own)]
    if not rows:
        return element("p", "No probe of another encoder shares its folds with the reference.")
    x = f"difference of balanced accuracy to {found['reference']} (right of 0: better)"
    picture = figure(
        plots.forest(groups, x),
        alt="Paired differences of balanced accuracy with intervals",
        caption="Paired differences on the same patches; 95 % bootstrap interval.",
    )
    header = ["Encoder", "Difference of balanced accuracy", "t interval over seeds", "Reading"]
    note = "The bootstrap covers the choice of patches, the t interval the draw of labels and the training."
    return join([picture, table(header, rows, caption=note)])


def _effect(row: Mapping[str, Any]) -> plots.Effect:
    low, high = (math.nan if end is None else end for end in row["difference_ci"])
    return plots.Effect(row["setting"], row["difference"], low, high, ())


def _difference_cells(row: Mapping[str, Any]) -> list[Cell | str]:
    t = row["seeds_t"]
    over_seeds = t["reason"] or interval(t["ci"], signed=True)
    value = Cell(number(row["difference"], signed=True), interval(row["difference_ci"], signed=True))
    return [value, Cell(over_seeds, css=""), Cell(row["verdict"], css="")]


def _label_curves(found: Mapping[str, Any]) -> Html:
    """Balanced accuracy against the share of labels, one panel per probe."""
    index, by_probe = _indexed(found), {}
    for mode in found["titles"]:
        probe, _, fraction = mode.partition("@")
        by_probe.setdefault(probe, []).append((float(fraction), mode))
    with plots.canvas(len(by_probe), height=3.4, wide=len(by_probe) > 1) as (drawing, axes):
        for axis, (probe, modes) in zip(axes, by_probe.items(), strict=True):
            for place, setting in enumerate(found["encoders"]):
                rows = [(f, index.get((mode, setting, SHOWN))) for f, mode in sorted(modes)]
                _draw_curve(axis, [(f, row) for f, row in rows if row and row["mean"] is not None], setting, place)
            axis.set(title=probe, xlabel="share of the training labels", xscale="log")
            axis.legend(loc="lower right")
        axes[0].set_ylabel("balanced accuracy")
        uri = plots.data_uri(drawing)
    caption = "Balanced accuracy against the share of labels; subsets are stratified and nested. Bars: 95 % bootstrap."
    return figure(uri, alt="Balanced accuracy against the share of labels", caption=caption)


def _draw_curve(axis, rows: Sequence[tuple[float, Mapping[str, Any]]], setting: str, place: int) -> None:
    if not rows:
        return
    at, mean = [f for f, _ in rows], np.array([row["mean"] for _, row in rows])
    ends = np.array([[math.nan if end is None else end for end in row["ci"]] for _, row in rows])
    error = np.nan_to_num(np.clip([mean - ends[:, 0], ends[:, 1] - mean], 0, None))
    colour = SERIES[place % len(SERIES)]
    axis.errorbar(at, mean, yerr=error, color=colour, marker="o", markersize=4, capsize=2, label=setting)


def _structure(found: Mapping[str, Any], points: Mapping[str, np.ndarray]) -> Html:
    names = list(found["data"]["classes"])
    parts = [_scatter(points, "pca", "principal components", names, found["structure"])]
    if any(name.startswith("umap/") for name in points):
        parts += [_scatter(points, "umap", "UMAP", names, {}), _cluster_table(found)]
    return join(parts)


def _cluster_table(found: Mapping[str, Any]) -> Html:
    rows = []
    for label, facts in found["structure"].items():
        own = facts["clusters"]
        agreement = "undefined" if own["adjusted_rand"] is None else f"{own['adjusted_rand']:.3f}"
        cells = [str(own["n_labels"]), str(own["n_clusters"]), f"{own['share_assigned']:.3f}", agreement]
        rows.append([label, *map(Cell, cells)])
    header = ["Encoder", "Labels (noise counts as one)", "Clusters", "Share assigned", "Adjusted Rand index"]
    return table(header, rows, caption="HDBSCAN on the UMAP points; the index compares assigned patches with classes.")


def _scatter(
    points: Mapping[str, np.ndarray], kind: str, title: str, names: Sequence[str], facts: Mapping[str, Any]
) -> Html:
    chosen = {name.partition("/")[2]: values for name, values in points.items() if name.startswith(f"{kind}/")}
    shown = np.linspace(0, len(points["label"]) - 1, min(_DOTS, len(points["label"]))).astype(int)
    label, columns = points["label"][shown], min(3, len(chosen))
    with plots.canvas(columns, math.ceil(len(chosen) / columns), height=3.5, wide=columns > 1) as (drawing, axes):
        for axis, (encoder, values) in zip(axes, chosen.items(), strict=False):
            for c in range(len(names)):
                own = values[shown][label == c]
                marker = _MARKERS[c // len(SERIES) % len(_MARKERS)]
                axis.scatter(
                    own[:, 0], own[:, 1], s=9, alpha=0.7, linewidth=0, color=SERIES[c % len(SERIES)], marker=marker
                )
            shares = facts.get(encoder, {}).get("pca_shares")
            extra = f" ({100 * shares[0]:.0f} % + {100 * shares[1]:.0f} % of the variance)" if shares else ""
            axis.set(title=encoder + extra, xticks=[], yticks=[])
        for axis in axes[len(chosen) :]:
            axis.set_axis_off()
        drawing.legend(handles=_handles(names), loc="outside lower center", ncols=min(len(names), 6))
        uri = plots.data_uri(drawing)
    caption = f"Embeddings by {title}, coloured by class; {len(shown)} of {len(points['label'])} patches."
    return figure(uri, alt=f"Scatter of embeddings by {title}", caption=caption)


def _handles(names: Sequence[str]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=SERIES[c % len(SERIES)], marker=_MARKERS[c // len(SERIES) % len(_MARKERS)], linestyle="",
               markersize=5, label=name)
        for c, name in enumerate(names)
    ]  # fmt: skip


def _provenance(manifest: Mapping[str, Any]) -> Html:
    rows = [[key, Cell("" if value is None else str(value), css="mono")] for key, value in flatten(manifest)]
    return table(["Item", "Value"], rows, caption="Software, seeds, fingerprints and command.")
