"""Univariate gene rankings, vectorised over genes in float64: Cox proportional hazards, one-way ANOVA, variance."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from data_pipelines.errors import DataError

_LOG = logging.getLogger(__name__)
RANKINGS = ("cox", "anova", "variance", "table", "boosted_trees")
_NEEDED = {
    "cox": "survival times and events (tables/survival.csv or a table with survival_months and censorship)",
    "anova": "labels",
    "boosted_trees": "labels",
    "table": "a ranking table (CSV with columns gene,p)",
}
_GENES_PER_CHUNK = 256
_MAX_STEPS = 60


@dataclasses.dataclass(frozen=True, eq=False)
class CoxFit:
    """Result of one univariate Cox model per gene.

    Attributes:
      coef: [G] float64, log hazard ratio per unit of the gene; NaN where undefined.
      z: [G] float64, Wald statistic; 0 where undefined.
      p: [G] float64, two-sided Wald p-value; 1 where undefined.
      converged: [G] bool; False for constant genes and for genes without a finite maximum-likelihood estimate.
    """

    coef: np.ndarray
    z: np.ndarray
    p: np.ndarray
    converged: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _RiskSets:
    """Index structure of m distinct event times and e deaths over patients sorted by time.

    Attributes:
      first_at_risk: [m] row from which on patients are at risk at this event time.
      death_rows: [e] rows of the deaths, ordered by time.
      first_death: [m] position in death_rows of the first death of this event time.
      group: [e] event time of each death.
      fraction: [e] Efron's l / d for the l-th of d tied deaths.
    """

    first_at_risk: np.ndarray
    death_rows: np.ndarray
    first_death: np.ndarray
    group: np.ndarray
    fraction: np.ndarray


def _risk_sets(time: np.ndarray, event: np.ndarray) -> _RiskSets:
    death_rows = np.flatnonzero(event)
    event_times, first_death, tied = np.unique(time[death_rows], return_index=True, return_counts=True)
    group = np.repeat(np.arange(len(event_times)), tied)
    fraction = (np.arange(len(death_rows)) - first_death[group]) / tied[group]
    return _RiskSets(np.searchsorted(time, event_times, side="left"), death_rows, first_death, group, fraction)


def _efron_sums(weighted: np.ndarray, risk: _RiskSets) -> np.ndarray:
    """[e, g]: sum over the risk set less Efron's share of the tied deaths, per death."""
    between = np.add.reduceat(weighted, risk.first_at_risk, axis=0)
    at_risk = np.cumsum(between[::-1], axis=0)[::-1]
    deaths = np.add.reduceat(weighted[risk.death_rows], risk.first_death, axis=0)
    return at_risk[risk.group] - risk.fraction[:, None] * deaths[risk.group]


def _likelihood(x: np.ndarray, coef: np.ndarray, risk: _RiskSets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Efron partial log-likelihood, its slope and its information, each [g]; non-finite where exp underflows."""
    eta = x * coef
    eta -= eta.max(axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        weight = np.exp(eta)
        s0 = _efron_sums(weight, risk)
        weight *= x
        mean = _efron_sums(weight, risk) / s0
        weight *= x
        square = _efron_sums(weight, risk) / s0
        loglik = eta[risk.death_rows].sum(axis=0) - np.log(s0).sum(axis=0)
        slope = x[risk.death_rows].sum(axis=0) - mean.sum(axis=0)
        information = (square - mean**2).sum(axis=0)
    return loglik, slope, information


def _newton(x: np.ndarray, risk: _RiskSets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's method with step halving on every column of standardised `x`.

    Returns:
      (coef, information, converged), each [g]. The likelihood is concave, so halving makes every accepted step an
      ascent; a gene that separates the deaths keeps moving outwards and never counts as converged.
    """
    genes = x.shape[1]
    coef, step, converged = np.zeros(genes), np.zeros(genes), np.zeros(genes, bool)
    best, information = np.full(genes, -np.inf), np.zeros(genes)
    active = np.arange(genes)
    for _ in range(_MAX_STEPS):
        trial = coef[active] + step[active]
        loglik, slope, info = _likelihood(x[:, active], trial, risk)
        usable = np.isfinite(loglik) & np.isfinite(slope) & (info > 0)
        accepted = usable & (loglik >= best[active] - 1e-10 * (1 + np.abs(loglik)))
        rows = active[accepted]
        coef[rows], best[rows], information[rows] = trial[accepted], loglik[accepted], info[accepted]
        step[active[~accepted]] /= 2
        step[rows] = slope[accepted] / info[accepted]
        small = np.abs(step[rows]) <= 1e-6 * np.maximum(1, np.abs(coef[rows]))
        converged[rows] = small & (np.abs(step[rows]) * np.sqrt(information[rows]) <= 1e-8)
        active = np.flatnonzero(~converged)
        if not active.size:
            break
    return coef, information, converged


def _check_survival(x: np.ndarray, time: np.ndarray, event: np.ndarray) -> None:
    if x.ndim != 2 or time.shape != (len(x),) or event.shape != (len(x),):
        raise DataError(f"expected x [n, G], time [n], event [n]; got {x.shape}, {time.shape}, {event.shape}")
    for name, values in (("x", x), ("time", time)):
        if not np.isfinite(values).all():
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise DataError(f"Cox ranking: {name} is not finite at index {first}; drop or fill these entries first")
    if not event.any():
        raise DataError(f"Cox ranking: none of the {len(x)} patients has an event, so no hazard can be fitted")


def cox_fit(x: np.ndarray, time: np.ndarray, event: np.ndarray) -> CoxFit:
    """One univariate Cox proportional-hazards model per gene, ties by Efron's method (the default of lifelines).

    Genes are standardised before fitting, which leaves Wald statistics unchanged, and steps that lower the likelihood
    are halved. On genes with extreme outliers plain Newton iterations (lifelines) can stop far from the maximum; there
    the two differ and this estimate has the higher likelihood.

    Args:
      x: [n, G] expression, finite.
      time: [n] follow-up time, any unit.
      event: [n] bool, True = death observed.

    Returns:
      The fits; genes without a finite estimate have p = 1, z = 0 and converged = False.

    Raises:
      DataError: shapes disagree, a value is not finite, or nobody has an event.
    """
    x, time, event = np.asarray(x), np.asarray(time, np.float64), np.asarray(event, bool)
    _check_survival(x, time, event)
    order = np.argsort(time, kind="stable")
    risk = _risk_sets(time[order], event[order])
    genes = x.shape[1]
    coef, z, converged = np.full(genes, np.nan), np.zeros(genes), np.zeros(genes, bool)
    for start in range(0, genes, _GENES_PER_CHUNK):
        part = x[order, start : start + _GENES_PER_CHUNK].astype(np.float64)
        varies = (part != part[:1]).any(axis=0)
        columns = start + np.flatnonzero(varies)
        part = part[:, varies]
        scale = part.std(axis=0)
        fitted, information, done = _newton((part - part.mean(axis=0)) / scale, risk)
        converged[columns] = done
        coef[columns] = np.where(done, fitted / scale, np.nan)
        z[columns] = np.where(done, fitted * np.sqrt(information), 0.0)
    return CoxFit(coef, z, 2 * stats.norm.sf(np.abs(z)), converged)


def cox_pvalues(x: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Two-sided Wald p-value of a univariate Cox model per gene (Efron ties), as in section 3.2 of the MKD spec.

    Args:
      x: [n, G] expression, finite.
      time: [n] follow-up time.
      event: [n] bool, True = death observed.

    Returns:
      [G] float64; 1 for genes without a finite estimate, whose number is logged as a warning.

    Raises:
      DataError: as `cox_fit`.
    """
    fit = cox_fit(x, time, event)
    undefined = int((~fit.converged).sum())
    if undefined:
        _LOG.warning("Cox ranking: %d of %d genes have no finite estimate and get p = 1", undefined, len(fit.p))
    return fit.p


def anova_f(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One-way analysis of variance per gene: F = (SS_between / (C - 1)) / (SS_within / (n - C)).

    Args:
      x: [n, G] expression, finite.
      label: [n] class of each patient, at least two classes.

    Returns:
      (F [G], p [G]) float64; a constant gene has F = 0 and p = 1, a gene without spread within classes F = inf, p = 0.

    Raises:
      DataError: shapes disagree, a value is not finite, fewer than two classes, or no residual degree of freedom.
    """
    x, label = np.asarray(x, np.float64), np.asarray(label)
    if x.ndim != 2 or label.shape != (len(x),):
        raise DataError(f"expected x [n, G] and label [n]; got {x.shape} and {label.shape}")
    if not np.isfinite(x).all():
        raise DataError(f"ANOVA ranking: {int((~np.isfinite(x)).sum())} values are not finite; fill or drop them first")
    classes, group, size = np.unique(label, return_inverse=True, return_counts=True)
    if len(classes) < 2 or len(x) <= len(classes):
        raise DataError(f"ANOVA ranking needs two classes and more patients than classes; got {classes} over {len(x)}")
    centred = x - x.mean(axis=0)
    means = np.stack([centred[group == k].mean(axis=0) for k in range(len(classes))])
    between = (size[:, None] * means**2).sum(axis=0) / (len(classes) - 1)
    within = ((centred - means[group]) ** 2).sum(axis=0) / (len(x) - len(classes))
    constant = (x == x[:1]).all(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.where(constant, 0.0, between / within)
    return f, stats.f.sf(f, len(classes) - 1, len(x) - len(classes))


def anova_pvalues(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The p-values [G] of `anova_f`."""
    return anova_f(x, label)[1]


def tree_importance(x: np.ndarray, label: np.ndarray, names: Sequence[str], seed: int = 0) -> np.ndarray:
    """Importance of every gene in gradient-boosted trees of the label (MoMKD specification, section 2).

    100 trees of depth 3, rate 0.01, logistic loss. At most 700 genes can have an importance above 0. The trees see the
    genes in the order of their names, so that the result does not depend on the columns.

    Args:
      x: [n, G] expression, finite.
      label: [n] class of each patient, at least two classes.
      names: G gene names.
      seed: which of equally good splits is taken.

    Returns:
      [G] float64, sums to 1 (all 0 if no gene separates anything).

    Raises:
      DataError: fewer than two classes, or a value is not finite.
    """
    from sklearn.ensemble import GradientBoostingClassifier  # slow to import, and only needed here

    if len(np.unique(label)) < 2 or not np.isfinite(x).all():
        raise DataError(f"boosted trees need finite values and two classes; got the classes {np.unique(label)}")
    order = np.argsort(np.asarray(names))
    model = GradientBoostingClassifier(n_estimators=100, max_depth=3, learning_rate=0.01, random_state=seed)
    out = np.empty(x.shape[1])
    out[order] = model.fit(np.asarray(x, np.float64)[:, order], label).feature_importances_
    return out


def rank_by(score: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Order of genes by falling score; equal scores by name, so that the result never depends on column order.

    Args:
      score: [G] float, no NaN.
      names: G gene names.

    Returns:
      [G] int64 column indices, best first.

    Raises:
      DataError: a score is NaN.
    """
    score = np.asarray(score, np.float64)
    if np.isnan(score).any():
        raise DataError(f"rank score of gene {names[int(np.argmax(np.isnan(score)))]!r} is NaN")
    return np.lexsort((np.asarray(names), -score))


def variance_rank(x: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Order of genes by falling population variance over the rows of `x` [n, G]; ties by name."""
    return rank_by(np.asarray(x, np.float64).var(axis=0), names)


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """Genes ordered by a criterion.

    Attributes:
      order: column indices, best first.
      n_cases: patients the criterion was computed on (0 for an external table).
      n_undefined: genes for which the criterion has no value (constant, or Cox without finite estimate); ranked last.
    """

    order: np.ndarray
    n_cases: int
    n_undefined: int = 0


def rank_genes(
    x: np.ndarray,
    names: Sequence[str],
    *,
    ranking: str,
    survival: tuple[np.ndarray, np.ndarray] | None = None,
    label: np.ndarray | None = None,
    ranking_table: Mapping[str, float] | None = None,
) -> Ranking:
    """Ranks the columns of `x` by one criterion; equal scores by gene name.

    Args:
      x: [n, G] finite values of the patients the ranking may see.
      names: G gene names.
      ranking: "cox" (rising Wald p against survival), "anova" (rising p against the label), "variance" (falling), or
        "table" (rising p of `ranking_table`; genes absent there are not ranked), or "boosted_trees" (falling
        `tree_importance`; genes that no tree uses follow by name).
      survival: (time [n] with NaN = unknown, event [n]); patients without a time are left out. Needed by "cox".
      label: [n] int, -1 = unknown; unlabelled patients are left out. Needed by "anova".
      ranking_table: gene -> p. Needed by "table".

    Returns:
      The ranking.

    Raises:
      DataError: unknown criterion, or the data it needs is missing.
    """
    needs = {"cox": survival, "anova": label, "table": ranking_table, "boosted_trees": label}
    if ranking not in RANKINGS:
        raise DataError(f"genes.ranking={ranking!r} is unknown; choose one of {RANKINGS}")
    if ranking in needs and needs[ranking] is None:
        raise DataError(f"genes.ranking={ranking!r} needs {_NEEDED[ranking]}, which was not given")
    if ranking == "cox":
        time, event = (np.asarray(part) for part in survival)
        known = np.isfinite(time)
        fit = cox_fit(x[known], time[known], event[known])
        order = rank_by(np.abs(fit.z), names)
        return Ranking(order, int(known.sum()), int((~fit.converged).sum()))
    if ranking == "anova":
        known = np.asarray(label) >= 0
        f, _ = anova_f(x[known], np.asarray(label)[known])
        return Ranking(rank_by(f, names), int(known.sum()), int((f == 0).sum()))
    if ranking == "boosted_trees":
        known = np.asarray(label) >= 0
        importance = tree_importance(x[known], np.asarray(label)[known], names)
        return Ranking(rank_by(importance, names), int(known.sum()), int((importance == 0).sum()))
    if ranking == "variance":
        return Ranking(variance_rank(x, names), len(x))
    listed = np.array([column for column, name in enumerate(names) if name in ranking_table], np.int64)
    order = rank_by([-ranking_table[names[c]] for c in listed], [names[c] for c in listed])
    return Ranking(listed[order], 0, len(names) - len(listed))
