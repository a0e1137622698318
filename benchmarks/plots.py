"""Figures of benchmark results: curves where a metric has several sizes, bars elsewhere. Needs Matplotlib."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from histokd_jax.report.style import SERIES

# "student[median 1000]", "step[8 devices]", "peak_rss[200 slides]": a series and where on it the metric lies.
_POINT = re.compile(r"^(?P<series>.+)\[(?P<before>[a-z_ ]*?)\s*(?P<x>\d+)\s*(?P<after>[a-z_]*)\]$")
MAX_BARS = 24


def by_unit(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """unit -> metrics of that unit, in order."""
    units: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, metric in metrics.items():
        units.setdefault(metric["unit"], {})[name] = metric
    return units


def curves(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, list[tuple[int, Mapping[str, Any]]]]]:
    """Metrics that lie on a common axis of sizes.

    Args:
      metrics: of one unit.

    Returns:
      (name of the axis, series -> [(x, metric)] in order of x); no series if they share no axis or it has one point.
    """
    series: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    axes = set()
    for name, metric in metrics.items():
        found = _POINT.match(name)
        if found is None:
            return "", {}
        axes.add(found["before"] or found["after"])
        series.setdefault(found["series"], []).append((int(found["x"]), metric))
    points = {x for seen in series.values() for x, _ in seen}
    if len(axes) != 1 or len(points) < 2:
        return "", {}
    ordered = {name: sorted(seen, key=lambda point: point[0]) for name, seen in series.items()}
    return axes.pop(), ordered


def figure(record: Mapping[str, Any]) -> Figure | None:
    """One panel per unit of the result's metrics; None without metrics."""
    units = by_unit(record["metrics"])
    if not units:
        return None
    heights = [3.2 if curves(m)[1] else 0.8 + 0.26 * min(len(m), MAX_BARS) for m in units.values()]
    drawing = Figure(figsize=(8.0, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.suptitle(f"{record['benchmark']} ({record['device_kind']})", fontsize=11, x=0.01, ha="left")
    panels = drawing.subplots(len(units), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, (unit, metrics) in zip(panels, units.items()):
        axis, lines = curves(metrics)
        if lines:
            _draw_curves(panel, axis, lines, unit)
        else:
            _draw_bars(panel, metrics, unit)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(True, color="#e6eaef")
        panel.set_axisbelow(True)
    return drawing


def _draw_curves(panel: Any, axis: str, lines: Mapping[str, Any], unit: str) -> None:
    for i, (name, points) in enumerate(lines.items()):
        xs = [x for x, _ in points]
        low, middle, high = ([metric[key] for _, metric in points] for key in ("p10", "median", "p90"))
        style = {"color": SERIES[i % len(SERIES)], "linestyle": ("-", "--", ":")[i // len(SERIES) % 3]}
        panel.plot(xs, middle, marker="o", markersize=4, label=name, **style)
        panel.fill_between(xs, low, high, alpha=0.15, color=style["color"], linewidth=0)
    panel.set_xscale("log")
    points = sorted({x for seen in lines.values() for x, _ in seen})
    panel.set_xticks(points, [f"{x:,}" for x in points])
    panel.minorticks_off()
    if _wide([m["median"] for seen in lines.values() for _, m in seen]):
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xlabel("median bag, patches" if axis == "median" else axis)
    panel.set_ylabel(unit)
    panel.legend(fontsize=7.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bars(panel: Any, metrics: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    shown = dict(list(metrics.items())[:MAX_BARS])
    names = list(shown)[::-1]
    middle = [shown[name]["median"] for name in names]
    errors = [
        [shown[name]["median"] - shown[name]["p10"] for name in names],
        [shown[name]["p90"] - shown[name]["median"] for name in names],
    ]
    panel.barh(range(len(names)), middle, xerr=errors, height=0.65, color=SERIES[0], ecolor="#4D4D4D", capsize=2)
    panel.set_yticks(range(len(names)), names, fontsize=7.5)
    if _wide(middle):
        panel.set_xscale("log")
    left_out = len(metrics) - len(shown)
    panel.set_xlabel(unit + (f"  (and {left_out} more in the table)" if left_out else ""))


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 30


def save_all(records: Sequence[Mapping[str, Any]], directory: pathlib.Path) -> dict[str, str]:
    """Writes BENCHMARK.png and BENCHMARK.svg of every result.

    Returns:
      benchmark -> file name of the SVG.
    """
    written = {}
    for record in records:
        drawing = figure(record)
        if drawing is None:
            continue
        for kind in ("png", "svg"):
            # No date: equal results give equal files.
            metadata = {"Date": None} if kind == "svg" else {}
            drawing.savefig(directory / f"{record['benchmark']}.{kind}", dpi=120, metadata=metadata)
        written[record["benchmark"]] = f"{record['benchmark']}.svg"
    return written
