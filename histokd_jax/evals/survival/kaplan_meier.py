"""Kaplan-Meier curves with Greenwood's variance, log-log confidence bands, medians and numbers at risk."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import stats

from histokd_jax.evals.survival._arrays import checked


@dataclasses.dataclass(frozen=True, eq=False)
class KaplanMeier:
    """An estimated survival curve, constant between its times.

    Attributes:
      time: [m] distinct follow-up times, increasing.
      survival: [m] probability to live beyond them.
      low: [m] lower confidence limit; NaN where the band is undefined (nobody left).
      high: [m] upper confidence limit.
      std_error: [m] Greenwood's standard error of `survival`; NaN where nobody is left.
      at_risk: [m] patients under observation just before each time.
      events: [m] deaths at each time.
      censored: [m] censorings at each time.
      level: confidence level of the band.
    """

    time: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    std_error: np.ndarray
    at_risk: np.ndarray
    events: np.ndarray
    censored: np.ndarray
    level: float

    @property
    def n(self) -> int:
        """Number of patients."""
        return int(self.at_risk[0])

    @property
    def median(self) -> float:
        """First time at which survival is at most 1/2; NaN if the curve never falls that far."""
        reached = self.survival <= 0.5
        return float(self.time[np.argmax(reached)]) if reached.any() else np.nan

    def at(self, time: np.ndarray) -> np.ndarray:
        """Survival at given times; NaN behind the last follow-up unless everybody has died.

        Args:
          time: [...] float.

        Returns:
          [...] float64.
        """
        return self._step(self.survival, time, 1.0)

    def band_at(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper confidence limits at given times, as in `at`."""
        return self._step(self.low, time, 1.0), self._step(self.high, time, 1.0)

    def _step(self, values: np.ndarray, time: np.ndarray, start: float) -> np.ndarray:
        time = np.asarray(time, np.float64)
        value = np.concatenate([[start], values])[np.searchsorted(self.time, time, side="right")]
        if self.survival[-1] > 0:
            value = np.where(time > self.time[-1], np.nan, value)
        return value


def kaplan_meier(time: np.ndarray, event: np.ndarray, *, level: float = 0.95) -> KaplanMeier:
    """Estimates a survival curve; at equal times deaths come before censorings.

    The band is `S^exp(+-z se / (S log S))`, the log-log transform of Greenwood's interval, which stays within [0, 1].

    Args:
      time: [n] float.
      event: [n] bool.
      level: confidence level.

    Returns:
      The curve.

    Raises:
      ValueError: bad arrays, or no patients.
    """
    time, event = checked(time, event)
    if not len(time):
        raise ValueError("kaplan_meier needs at least one patient; the group is empty")
    distinct, events, censored, at_risk = event_table(time, event)
    survival = np.cumprod(1.0 - events / at_risk)
    left = at_risk - events
    hazard_variance = np.divide(events, at_risk * left, out=np.full(len(left), np.nan), where=left > 0)
    spread = np.sqrt(np.cumsum(hazard_variance))
    low, high = _log_log_band(survival, spread, level)
    return KaplanMeier(distinct, survival, low, high, survival * spread, at_risk, events, censored, level)


def event_table(time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct times with deaths, censorings and numbers at risk.

    Args:
      time: [n] float.
      event: [n] bool.

    Returns:
      time [m], deaths [m], censorings [m] and patients at risk just before [m], the counts as float64.
    """
    distinct, position = np.unique(time, return_inverse=True)
    events = np.bincount(position, weights=event, minlength=len(distinct))
    censored = np.bincount(position, weights=~event, minlength=len(distinct))
    at_risk = len(time) - np.concatenate([[0.0], np.cumsum(events + censored)[:-1]])
    return distinct, events, censored, at_risk


def numbers_at_risk(time: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """How many patients are still under observation just before each grid time.

    Args:
      time: [n] float.
      grid: [T] float.

    Returns:
      [T] int64.
    """
    return len(time) - np.searchsorted(np.sort(np.asarray(time, np.float64)), np.asarray(grid), side="left")


def _log_log_band(survival: np.ndarray, spread: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    z = stats.norm.ppf((1 + level) / 2)
    inside = (survival > 0) & (survival < 1)
    log_s = np.log(np.where(inside, survival, 0.5))
    shift = z * np.where(inside, spread, 0.0) / log_s
    edge = np.where(survival == 1, 1.0, np.nan)
    low, high = (np.where(inside, np.exp(log_s * np.exp(sign * shift)), edge) for sign in (-1, 1))
    return low, high
