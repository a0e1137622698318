"""The figures of the report, as data URIs of SVG images (Matplotlib, no global state, no display)."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from histokd_jax.evals.curves import Band, Calibration
from histokd_jax.report.style import BLUE, CONTROL, SERIES

STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#5a6675",
    "axes.grid": True,
    "grid.color": "#e6eaef",
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    # Fixed salt and no date: the same run gives the same report, byte for byte.
    "svg.hashsalt": "histokd",
}
WIDTH = 10.6  # inches of the page's full width


@dataclasses.dataclass(frozen=True)
class Curve:
    """One curve of a panel: band, legend text, and whether it is the lambda = 0 control."""

    band: Band
    label: str
    control: bool = False


@dataclasses.dataclass(frozen=True)
class Effect:
    """One row of the forest plot: paired difference, its interval (NaN if undefined) and the folds' differences."""

    label: str
    difference: float
    low: float
    high: float
    per_fold: Sequence[float]


def require_matplotlib() -> Any:
    """The Matplotlib package.

    Raises:
      ImportError: naming the extra to install.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs Matplotlib: pip install 'histokd_jax[report]'") from error
    return matplotlib


def band_panels(panels: Mapping[str, Sequence[Curve]], *, x: str, y: str, diagonal: bool) -> str:
    """ROC or precision-recall curves, one panel per mode.

    Args:
      panels: title -> curves.
      x: axis title.
      y: axis title.
      diagonal: draw the line of chance.

    Returns:
      Data URI.
    """
    with canvas(len(panels), height=3.7) as (figure, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            if diagonal:
                axis.plot([0, 1], [0, 1], color="#b4bcc6", linewidth=1, linestyle=":")
            for curve in curves:
                _draw_band(axis, curve)
            axis.set(title=title, xlabel=x, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
            axis.legend(loc="lower right" if diagonal else "lower left")
        axes[0].set_ylabel(y)
        return data_uri(figure)


def calibration_panels(panels: Mapping[str, Calibration], *, x: str, y: str) -> str:
    """Reliability curves with Wilson intervals; the area of a marker grows with the rows in its bin."""
    with canvas(len(panels), height=4.1) as (figure, axes):
        for axis, (title, curve) in zip(axes, panels.items(), strict=True):
            axis.plot([0, 1], [0, 1], color="#b4bcc6", linewidth=1, linestyle=":")
            error = np.clip([curve.observed - curve.low, curve.high - curve.observed], 0, None)
            axis.errorbar(
                curve.confidence, curve.observed, yerr=error, color=BLUE, linewidth=1.2, elinewidth=1, capsize=2
            )
            axis.scatter(curve.confidence, curve.observed, s=12 + 160 * curve.count / curve.count.sum(), color=BLUE)
            axis.set(title=title, xlabel=x, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes[0].set_ylabel(y)
        return data_uri(figure)


def confusion_panels(panels: Mapping[str, np.ndarray], classes: Sequence[str]) -> str:
    """Confusion matrices: counts as text, the shade is the share of the true class.

    Args:
      panels: title -> [C, C] counts, rows are true classes.
      classes: C names.

    Returns:
      Data URI.
    """
    ticks = range(len(classes))
    with canvas(len(panels), height=1.4 + 0.55 * len(classes)) as (figure, axes):
        for axis, (title, counts) in zip(axes, panels.items(), strict=True):
            share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
            for (row, column), value in np.ndenumerate(share):
                # White on dark shades, or the numbers cannot be read.
                colour = "white" if value > 0.5 else "#1b2430"
                text = f"{counts[row, column]:.0f}\n{value:.0%}"
                axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
            axis.set_xticks(ticks, classes)
            axis.set_yticks(ticks, classes)
            axis.set(title=title, xlabel="predicted class", ylabel="true class")
            axis.grid(visible=False)
        return data_uri(figure)


FOREST_AXIS = "difference, distilled - control (right of 0: distillation is better)"


def forest(groups: Mapping[str, Sequence[Effect]], x: str = FOREST_AXIS) -> str:
    """Paired differences with intervals, grouped by mode; small dots are the folds."""
    n_rows = len(groups) + sum(len(effects) for effects in groups.values())
    with canvas(1, height=0.8 + 0.27 * n_rows, wide=True) as (figure, axes):
        axis, y = axes[0], 0
        ticks, names = [], []
        for number, (group, effects) in enumerate(groups.items()):
            axis.text(0.0, y, group, transform=axis.get_yaxis_transform(), weight="bold", va="center", ha="left")
            for effect in effects:
                y += 1
                _draw_effect(axis, y, effect, SERIES[number % len(SERIES)])
                ticks.append(y)
                names.append(effect.label)
            y += 1
        axis.axvline(0, color="#1b2430", linewidth=1)
        axis.set_yticks(ticks, names)
        axis.set(ylim=(y - 0.4, -0.6), xlabel=x)
        # The group headings share the row above their effects; a margin on the left keeps them clear of the intervals.
        axis.margins(x=0.12)
        axis.grid(axis="y", visible=False)
        return data_uri(figure)


def line_panels(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], *, x: str) -> str:
    """Small multiples of training curves.

    Args:
      panels: title -> {series name: (x, y)}; a series name keeps its colour in every panel.
      x: title of the abscissa, with its unit.

    Returns:
      Data URI.
    """
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colour = {name: SERIES[i % len(SERIES)] for i, name in enumerate(names)}
    columns = min(3, len(panels))
    with canvas(columns, math.ceil(len(panels) / columns), height=2.35, wide=columns > 1) as (figure, axes):
        for axis, (title, series) in zip(axes, panels.items(), strict=False):
            for name, (at, value) in series.items():
                marker = "o" if len(at) == 1 else ""
                axis.plot(at, value, color=colour[name], linewidth=1.3, marker=marker, markersize=3)
            axis.set(title=title, xlabel=x)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles = [_line(colour[name], name) for name in names]
        figure.legend(handles=handles, loc="outside upper right", ncols=min(len(names), 8))
        return data_uri(figure)


class canvas:  # noqa: N801  a context manager, named like a function
    """A constrained-layout figure with a flat list of axes, drawn in the report's style.

    Args:
      columns: panels side by side.
      rows: rows of panels.
      height: of one row, inches.
      wide: take the width of the page.
      ratios: relative heights of the rows.
    """

    def __init__(
        self, columns: int, rows: int = 1, *, height: float, wide: bool = False, ratios: Sequence[float] | None = None
    ):
        self._grid, self._ratios = (rows, columns), ratios
        self._size = (WIDTH if wide else min(WIDTH, 4.6 * columns), height * rows)

    def __enter__(self):
        self._context = require_matplotlib().rc_context(STYLE)
        self._context.__enter__()
        from matplotlib.figure import Figure

        figure = Figure(figsize=self._size, layout="constrained")
        return figure, list(figure.subplots(*self._grid, squeeze=False, height_ratios=self._ratios).flat)

    def __exit__(self, *exc) -> None:
        self._context.__exit__(*exc)


def _draw_band(axis, curve: Curve) -> None:
    style = {"color": CONTROL, "linestyle": "--", "linewidth": 1.4} if curve.control else {"color": BLUE}
    if not np.isnan(curve.band.low).any() and not curve.control:
        axis.fill_between(curve.band.x, curve.band.low, curve.band.high, color=BLUE, alpha=0.16, linewidth=0)
    axis.plot(curve.band.x, curve.band.mean, label=curve.label, **style)


def _draw_effect(axis, y: float, effect: Effect, colour: str) -> None:
    folds = [value for value in effect.per_fold if math.isfinite(value)]
    axis.scatter(folds, [y + 0.3] * len(folds), s=11, color=colour, alpha=0.5, linewidth=0)
    if math.isfinite(effect.low):
        axis.plot([effect.low, effect.high], [y, y], color=colour, linewidth=2)
    axis.scatter([effect.difference], [y], s=42, color=colour, marker="D", zorder=3)


def _line(colour: str, name: str):
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=name)


def data_uri(figure) -> str:
    """A figure as a data URI of an SVG image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def finite_series(pairs: Iterator[tuple[float, float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """(x, mean of y at that x) over the pairs whose y is a finite number, ascending in x."""
    kept = [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]
    if not kept:
        return np.array([]), np.array([])
    at, value = np.array(kept, dtype=float).T
    unique, index = np.unique(at, return_inverse=True)
    return unique, np.bincount(index, value) / np.bincount(index)
