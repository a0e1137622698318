"""The figures of survival runs: Kaplan-Meier curves with numbers at risk, AUC over time, calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from histokd_jax.evals.survival.calibration import SurvivalCalibration
from histokd_jax.evals.survival.kaplan_meier import KaplanMeier, numbers_at_risk
from histokd_jax.report.plots import canvas, data_uri
from histokd_jax.report.style import BLUE, CONTROL, VERMILION

STEPS = (1, 2, 3, 6, 12, 24, 36, 48, 60, 120, 240)
GROUPS = (("low risk", BLUE), ("high risk", VERMILION))


@dataclasses.dataclass(frozen=True, eq=False)
class RiskGroups:
    """Kaplan-Meier curves of the halves of lower and higher risk.

    Attributes:
      curves: low, high.
      times: follow-up of the patients of each.
      note: e.g. the p-value.
    """

    curves: tuple[KaplanMeier, KaplanMeier]
    times: tuple[np.ndarray, np.ndarray]
    note: str


@dataclasses.dataclass(frozen=True, eq=False)
class TimeCurve:
    """A metric over time: mean over folds and the folds themselves.

    Attributes:
      times: [T] months.
      folds: [k, T], NaN where undefined.
      label: legend text.
      control: whether it is the control.
    """

    times: np.ndarray
    folds: np.ndarray
    label: str
    control: bool = False


def month_ticks(last: float) -> np.ndarray:
    """At most seven ticks in months from 0."""
    step = next((s for s in STEPS if last / s <= 6.5), STEPS[-1])
    return np.arange(0, last + 1e-9, step)


def kaplan_meier_panels(panels: Mapping[str, RiskGroups]) -> str:
    """Curves with log-log bands, crosses at censorings, and the numbers at risk below; one panel per mode.

    Args:
      panels: title -> groups.

    Returns:
      Data URI.
    """
    with canvas(len(panels), 2, height=2.55, ratios=(5, 1)) as (figure, axes):
        upper, lower = axes[: len(panels)], axes[len(panels) :]
        for axis, below, (title, groups) in zip(upper, lower, panels.items(), strict=True):
            ticks = month_ticks(max(times.max() for times in groups.times))
            for curve, (name, colour) in zip(groups.curves, GROUPS, strict=True):
                _draw_curve(axis, curve, f"{name} (n = {curve.n})", colour)
            axis.set(title=f"{title}\n{groups.note}", ylim=(0, 1.03), xticks=ticks, xlabel="months")
            axis.set_xlim(0, None)
            axis.legend(loc="lower left")
            _draw_at_risk(below, groups, ticks, axis.get_xlim())
        upper[0].set_ylabel("survival")
        return data_uri(figure)


def _draw_curve(axis, curve: KaplanMeier, label: str, colour: str) -> None:
    time, survival, low, high = (
        np.concatenate([[start], values])
        for start, values in ((0.0, curve.time), (1.0, curve.survival), (1.0, curve.low), (1.0, curve.high))
    )
    axis.fill_between(time, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    axis.step(time, survival, where="post", color=colour, label=label)
    censored = curve.censored > 0
    axis.plot(curve.time[censored], curve.survival[censored], "+", color=colour, markersize=4, markeredgewidth=0.8)


def _draw_at_risk(axis, groups: RiskGroups, ticks: np.ndarray, limits: tuple[float, float]) -> None:
    axis.set(xlim=limits, ylim=(-0.6, 2.4))
    axis.set_axis_off()
    axis.text(limits[0], 2.0, "at risk", fontsize=8, color="#5a6675", va="center", ha="left")
    for row, (times, (_, colour)) in enumerate(zip(groups.times, GROUPS, strict=True)):
        for tick, number in zip(ticks, numbers_at_risk(times, ticks), strict=True):
            axis.text(tick, 1.0 - row, str(number), color=colour, fontsize=8, ha="center", va="center")


def time_panels(panels: Mapping[str, Sequence[TimeCurve]], *, y: str, chance: float) -> str:
    """A metric over time; thin lines are the folds, the control is dashed.

    Args:
      panels: title -> curves.
      y: axis title.
      chance: value of a model that knows nothing.

    Returns:
      Data URI.
    """
    with canvas(len(panels), height=3.2) as (figure, axes):
        for axis, (title, curves) in zip(axes, panels.items(), strict=True):
            axis.axhline(chance, color="#b4bcc6", linewidth=1, linestyle=":")
            for curve in curves:
                colour = CONTROL if curve.control else BLUE
                for fold in curve.folds if not curve.control else ():
                    axis.plot(curve.times, fold, color=colour, linewidth=0.7, alpha=0.35)
                line = {"linestyle": "--", "linewidth": 1.4} if curve.control else {}
                axis.plot(curve.times, _mean(curve.folds), color=colour, label=curve.label, **line)
            axis.set(title=title, xlabel="months", ylim=(-0.02, 1.02))
            axis.legend(loc="lower right")
        axes[0].set_ylabel(y)
        return data_uri(figure)


def _mean(folds: np.ndarray) -> np.ndarray:
    """[T] mean over folds where all are defined."""
    return folds.mean(axis=0)


def calibration_panels(panels: Mapping[str, SurvivalCalibration]) -> str:
    """Predicted against observed survival at one time; bars are confidence limits of the Kaplan-Meier estimate."""
    with canvas(len(panels), height=3.9) as (figure, axes):
        for axis, (title, found) in zip(axes, panels.items(), strict=True):
            axis.plot([0, 1], [0, 1], color="#b4bcc6", linewidth=1, linestyle=":")
            error = np.nan_to_num(np.clip([found.observed - found.low, found.high - found.observed], 0, None))
            axis.errorbar(
                found.predicted, found.observed, yerr=error, color=BLUE, linewidth=1.2, elinewidth=1, capsize=2
            )
            axis.scatter(found.predicted, found.observed, s=12 + 160 * found.n / found.n.sum(), color=BLUE)
            axis.set(title=title, xlabel="predicted survival", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes[0].set_ylabel("observed survival (Kaplan-Meier)")
        return data_uri(figure)
