"""Tissue source sites, and folds that keep every site whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines import splits, tcga
from data_pipelines.cohort import Cohort
from data_pipelines.errors import DataError
from data_pipelines.splits import Split

_TRIALS = 200


def tissue_source_site(identifier: str) -> str | None:
    """Characters 5 to 7 of a TCGA barcode, e.g. "A2"; None for any other id.

    Tables lose the leading zero of this code, so it is read from the barcode and not from a column `site`.
    """
    found = tcga.parse(identifier)
    return found and found.site


def sites_of(case_ids: Sequence[str]) -> dict[str, str]:
    """case id -> tissue source site, for the TCGA barcodes among the ids."""
    return {case: site for case in case_ids if (site := tissue_source_site(case)) is not None}


def make_site_folds(
    cohort: Cohort,
    site_of: dict[str, str],
    *,
    n_folds: int = 5,
    val_fraction: float = 0.2,
    stratify: bool = True,
    seed: int = 0,
) -> list[Split]:
    """k-fold cross-validation in which no site lies in the test part and in another part of a fold.

    Whole sites are dealt to folds so that sizes and class counts come out as even as they can: the largest sites first,
    each to the fold that it unbalances least; the best of many orders is kept. The validation part is drawn from the
    remaining patients and shares their sites.

    Args:
      cohort: labelled if `stratify`.
      site_of: case id -> site.
      n_folds: number of folds, at least 2 and at most the number of sites.
      val_fraction: share of a fold's remainder used for validation, in [0, 1).
      stratify: balance classes too, not only sizes.
      seed: of all draws.

    Returns:
      One split per fold; the test parts partition the cohort.

    Raises:
      DataError: a case without a site, or too few sites.
    """
    patients, first = np.unique(np.array(cohort.case_id), return_index=True)
    unknown = [case for case in patients if case not in site_of]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(patients)} cases have no known site, e.g. {unknown[0]!r}; sites are known for "
            f"TCGA barcodes, or from a table with the columns case_id and site"
        )
    sites, site = np.unique([site_of[case] for case in patients], return_inverse=True)
    if not 2 <= n_folds <= len(sites):
        raise DataError(f"n_folds={n_folds} needs 2 <= n_folds <= sites, and the cohort has {len(sites)} sites")
    label = cohort.labels_for(first) if stratify else np.zeros(len(patients), np.int32)
    counts = np.zeros((len(sites), int(label.max()) + 1))
    np.add.at(counts, (site, label), 1)
    fold_of_site = _deal(counts, n_folds, np.random.default_rng([seed, n_folds]))
    tests = [np.flatnonzero(fold_of_site[site] == fold) for fold in range(n_folds)]
    return splits.folds_of_tests(cohort, tests, label, val_fraction, [seed, n_folds])


def _deal(counts: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """[n_sites] fold of each site, from patients per site and class [n_sites, C]."""
    # Every class counts alike however rare it is, and the size of the folds as one class more.
    weights = np.column_stack([counts, counts.sum(1)])
    weights = weights / np.maximum(weights.sum(0), 1)
    best, best_cost = None, np.inf
    for _ in range(_TRIALS):
        order = np.argsort(-(weights.sum(1) * rng.uniform(0.7, 1.3, len(weights))), kind="stable")
        fold_of, filled = np.empty(len(weights), int), np.zeros((n_folds, weights.shape[1]))
        for site in order:
            cost = ((filled + weights[site]) ** 2).sum(1) - (filled**2).sum(1)
            fold_of[site] = int(np.argmin(cost))
            filled[fold_of[site]] += weights[site]
        empty = np.setdiff1d(np.arange(n_folds), fold_of).size
        cost = (filled**2).sum() + empty
        if cost < best_cost:
            best, best_cost = fold_of, cost
    return best
