"""Kaplan-Meier estimate of the distribution of censoring times, the source of all IPCW weights."""

from __future__ import annotations

import dataclasses

import numpy as np

from histokd_jax.evals.survival._arrays import checked


@dataclasses.dataclass(frozen=True, eq=False)
class CensoringDistribution:
    """G(t), the probability of still being under observation after t.

    Attributes:
      time: [m] distinct times, increasing.
      probability: [m] G at those times.
    """

    time: np.ndarray
    probability: np.ndarray

    @property
    def support(self) -> float:
        """The last time at which G is positive: weights exist up to here."""
        positive = self.time[self.probability > 0]
        return float(positive[-1]) if len(positive) else 0.0

    def at(self, time: np.ndarray) -> np.ndarray:
        """G(t), continuous from the right; NaN behind the last time if G is still positive there, else 0.

        Args:
          time: [...] float.

        Returns:
          [...] float64.
        """
        time = np.asarray(time, np.float64)
        steps = np.concatenate([[1.0], self.probability])
        value = steps[np.searchsorted(self.time, time, side="right")]
        if self.probability[-1] > 0:
            value = np.where(time > self.time[-1], np.nan, value)
        return value

    def weights(self, time: np.ndarray) -> np.ndarray:
        """[...] 1 / G(t); NaN where G is 0 or unknown."""
        probability = self.at(time)
        return np.divide(1.0, probability, out=np.full(probability.shape, np.nan), where=probability > 0)


def censoring_distribution(time: np.ndarray, event: np.ndarray) -> CensoringDistribution:
    """Estimates G from training patients; at equal times deaths leave the risk set before censorings.

    Args:
      time: [n] float.
      event: [n] bool.

    Returns:
      The distribution.

    Raises:
      ValueError: bad arrays, or no patients.
    """
    time, event = checked(time, event)
    if not len(time):
        raise ValueError("censoring_distribution needs at least one training patient")
    distinct, position = np.unique(time, return_inverse=True)
    deaths = np.bincount(position, weights=event)
    censored = np.bincount(position, weights=~event)
    at_risk = len(time) - np.concatenate([[0.0], np.cumsum(deaths + censored)[:-1]]) - deaths
    share = np.divide(censored, at_risk, out=np.zeros_like(censored), where=at_risk > 0)
    return CensoringDistribution(distinct, np.cumprod(1.0 - share))
