"""Gene tables, and the selection of the genes that a model reads (sections 3.2 and 16 of the MKD specification)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.gene_ranking import RANKINGS, Ranking, rank_genes

FILTERS = ("top", "bottom", "random")
GLOBAL_80PCT = "global_80pct"
SCOPES = ("per_fold_train", "global", GLOBAL_80PCT)
NORMALISATIONS = ("precomputed_zscore", "log2p1_then_zscore_train_fold")
NAN_POLICIES = ("error", "zero")


@dataclasses.dataclass(frozen=True, eq=False)
class GeneTable:
    """Expression of n cases over G genes.

    Attributes:
      case_id: n case ids (slide ids for a table keyed by slide), unique.
      names: G gene names, unique.
      values: [n, G] float32, may hold NaN for missing measurements, never Inf.
      has_genes: [n] bool, False for a case without any measurement (its values are 0); all True when not given.
      n_duplicate_rows: later rows of an already seen case that a reader left out (the first row counts).
      n_conflicting_rows: those of them that differ from the first.
    """

    case_id: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray
    has_genes: np.ndarray | None = None
    n_duplicate_rows: int = 0
    n_conflicting_rows: int = 0

    def __post_init__(self):
        expected = (len(self.case_id), len(self.names))
        if self.values.shape != expected or self.values.dtype != np.float32:
            raise DataError(f"gene values must be float32 {expected}; got {self.values.dtype} {self.values.shape}")
        for kind, ids in (("case", self.case_id), ("gene", self.names)):
            if len(set(ids)) != len(ids):
                raise DataError(f"gene table: {kind} {_first_duplicate(ids)!r} occurs twice; ids must be unique")
        if np.isinf(self.values).any():
            row, column = np.argwhere(np.isinf(self.values))[0]
            raise DataError(f"gene table: case {self.case_id[row]!r}, gene {self.names[column]!r} is infinite")
        if self.has_genes is None:
            object.__setattr__(self, "has_genes", np.ones(len(self.case_id), bool))

    def align(self, case_id: Sequence[str]) -> GeneTable:
        """The table in the order of `case_id`; unknown cases get zeros and has_genes False."""
        row_of = {case: row for row, case in enumerate(self.case_id)}
        rows = np.array([row_of.get(case, -1) for case in case_id], np.int64)
        present = rows >= 0
        values = np.zeros((len(rows), len(self.names)), np.float32)
        values[present] = self.values[rows[present]]
        present[present] = self.has_genes[rows[present]]
        return dataclasses.replace(self, case_id=tuple(case_id), values=values, has_genes=present)


@dataclasses.dataclass(frozen=True, eq=False)
class GeneSelection:
    """K genes in rank order and how their values are prepared; stored beside a checkpoint, resolved by name.

    Attributes:
      names: K gene names in rank order (rank r becomes token r // token_size, position r % token_size).
      columns: [K] int64, their columns in the table the selection was made on.
      mean: [K] float64 of training patients after log2(x + 1), or None if values are used as given.
      std: [K] float64 likewise (1 for a gene that is constant in training).
      clip: values are clipped to [-clip, clip] last, or None.
      nan_policy: "error", or "zero": a missing measurement is read as 0 before any normalisation.
      source: JSON-able facts on how the genes were chosen.
    """

    names: tuple[str, ...]
    columns: np.ndarray
    mean: np.ndarray | None
    std: np.ndarray | None
    clip: float | None
    nan_policy: str
    source: Mapping[str, Any]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Selects and prepares genes of the table the selection was made on.

        Args:
          values: [n, G], columns as in that table.

        Returns:
          [n, K] float32 in rank order.

        Raises:
          DataError: NaN under nan_policy "error", or negative values where a logarithm is due.
        """
        picked = np.asarray(values)[:, self.columns]
        picked = _fill_missing(picked, self.names, range(len(picked)), self.nan_policy)
        return self._finish(_base(picked, self.names, range(len(picked)), log2p1=self.mean is not None))

    def apply_table(self, table: GeneTable) -> np.ndarray:
        """As `apply`, but finds the genes by name in any table.

        Returns:
          [n, K] float32; rows of cases without genes are 0.

        Raises:
          DataError: the table lacks selected genes (named), or as `apply`.
        """
        column_of = {name: column for column, name in enumerate(table.names)}
        missing = [name for name in self.names if name not in column_of]
        if missing:
            raise DataError(
                f"gene table lacks {len(missing)} of the {len(self.names)} genes the model was trained on: "
                f"{missing[:8]}; supply a table that has them"
            )
        columns = np.array([column_of[name] for name in self.names], np.int64)
        rows = np.flatnonzero(table.has_genes)
        out = np.zeros((len(table.case_id), len(self.names)), np.float32)
        out[rows] = self._finish(_readable(table, rows, columns, self.nan_policy, self.mean is not None))
        return out

    def _finish(self, base: np.ndarray) -> np.ndarray:
        return _standardise(base, self.mean, self.std, self.clip).astype(np.float32)

    def to_json(self) -> str:
        """A JSON text from which `from_json` restores the same selection exactly."""
        facts = {name: getattr(self, name) for name in ("names", "clip", "nan_policy", "source")}
        arrays = {name: getattr(self, name) for name in ("columns", "mean", "std")}
        return json.dumps(facts | {name: None if a is None else a.tolist() for name, a in arrays.items()})

    @classmethod
    def from_json(cls, text: str) -> GeneSelection:
        """Restores what `to_json` wrote."""
        facts = json.loads(text)
        for name, dtype in (("columns", np.int64), ("mean", np.float64), ("std", np.float64)):
            facts[name] = None if facts[name] is None else np.array(facts[name], dtype)
        return cls(**facts | {"names": tuple(facts["names"])})


def select_genes(
    table: GeneTable,
    train_rows: np.ndarray,
    *,
    top_k: int,
    token_size: int,
    survival: tuple[np.ndarray, np.ndarray] | None = None,
    label: np.ndarray | None = None,
    filter: str = "top",
    ranking: str = "cox",
    ranking_scope: str = "per_fold_train",
    normalisation: str = "precomputed_zscore",
    exclude: Sequence[str] = (),
    nan_policy: str = "error",
    clip: float | None = None,
    seed: int = 0,
    ranking_table: Mapping[str, float] | None = None,
) -> GeneSelection:
    """Chooses and orders the K genes of a fold (MKD section 3.2).

    Cox and ANOVA see the values the network will see (normalised and clipped); variance sees them before
    standardisation, where it still differs between genes. Statistics come from training patients; only the ranking may
    see everyone (`ranking_scope="global"`, the faithful and leaking choice of MKD). With "global_80pct" (that of MoMKD)
    statistics and ranking come from a random 80 % of every class, whatever the fold.

    Args:
      table: all patients of the cohort; rows without genes are ignored.
      train_rows: rows of the training patients.
      top_k: K, a multiple of token_size.
      token_size: genes per token.
      survival: (time [n] in any unit, NaN = unknown; event [n]), aligned to the table.
      label: [n] class, -1 = unknown, aligned to the table.
      filter: "top" K, "bottom" K (both in rank order), or K "random" genes in drawn order (nothing is ranked).
      ranking: see `rank_genes`.
      ranking_scope: "per_fold_train", "global" or "global_80pct".
      normalisation: "precomputed_zscore" (as given) or "log2p1_then_zscore_train_fold".
      exclude: gene names never selected (absent names are noted in `source`).
      nan_policy: "error", or "zero" (missing raw values are read as 0).
      clip: bound on prepared values, or None.
      seed: of filter "random" and of the 80 %.
      ranking_table: gene -> p, of ranking "table".

    Returns:
      The selection.

    Raises:
      DataError: an option is unknown or contradicts the table; the message names the fix.
    """
    _check_options(filter, ranking, ranking_scope, normalisation, nan_policy, top_k, token_size, clip)
    log2p1 = normalisation == "log2p1_then_zscore_train_fold"
    candidates = np.array([c for c, name in enumerate(table.names) if name not in set(exclude)], np.int64)
    names = [table.names[column] for column in candidates]
    rows = np.flatnonzero(table.has_genes)
    training = np.isin(rows, train_rows)
    if ranking_scope == GLOBAL_80PCT:
        training = _random_part(None if label is None else np.asarray(label)[rows], len(rows), seed)
    if not training.any():
        raise DataError("gene selection: no training patient has genes; check the join of genes and split")
    base = _readable(table, rows, candidates, nan_policy, log2p1)
    mean, std = _moments(base[training]) if log2p1 else (None, None)
    if filter == "random":
        ranked = Ranking(np.random.default_rng(seed).permutation(len(names)), 0)
    else:
        seen = np.ones(len(rows), bool) if ranking_scope == "global" else training
        shown = base if ranking == "variance" and log2p1 else _standardise(base, mean, std, clip)
        targets = {
            "survival": None if survival is None else tuple(np.asarray(part)[rows[seen]] for part in survival),
            "label": None if label is None else np.asarray(label)[rows[seen]],
            "ranking_table": ranking_table,
        }
        ranked = rank_genes(shown[seen], names, ranking=ranking, **targets)
    chosen = _cut(ranked.order, filter, top_k, token_size, len(table.names))
    how = {"filter": filter, "normalisation": normalisation, "top_k": top_k, "token_size": token_size}
    how |= _criterion(filter, ranking, ranking_scope, seed)
    return GeneSelection(
        names=tuple(names[c] for c in chosen),
        columns=candidates[chosen],
        mean=None if mean is None else mean[chosen],
        std=None if std is None else std[chosen],
        clip=clip,
        nan_policy=nan_policy,
        source=how | _facts(table, ranked, exclude),
    )


def _readable(table: GeneTable, rows: np.ndarray, columns: np.ndarray, nan_policy: str, log2p1: bool) -> np.ndarray:
    """[len(rows), len(columns)] float64 without NaN, after the logarithm if one is due; errors name gene and case."""
    names, cases = [table.names[column] for column in columns], [table.case_id[row] for row in rows]
    values = _fill_missing(table.values[np.ix_(rows, columns)], names, cases, nan_policy)
    return _base(values, names, cases, log2p1=log2p1)


def _random_part(label: np.ndarray | None, n: int, seed: int) -> np.ndarray:
    """[n] bool: a random 80 % of every class (of all, without labels)."""
    groups = np.zeros(n, int) if label is None else label
    rng, chosen = np.random.default_rng(seed), np.zeros(n, bool)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        chosen[members[: round(0.8 * len(members))]] = True
    return chosen


def _criterion(filter: str, ranking: str, scope: str, seed: int) -> dict[str, Any]:
    if filter == "random":
        return {"seed": seed}
    return {"ranking": ranking, "ranking_scope": "external" if ranking == "table" else scope}


def _facts(table: GeneTable, ranked: Ranking, exclude: Sequence[str]) -> dict[str, Any]:
    return {
        "n_table_genes": len(table.names),
        "n_ranked_genes": len(ranked.order),
        "n_ranking_cases": ranked.n_cases,
        "n_undefined": ranked.n_undefined,
        "excluded": sorted(set(exclude) & set(table.names)),
        "excluded_but_absent": sorted(set(exclude) - set(table.names)),
    }


def _check_options(
    filter: str,
    ranking: str,
    scope: str,
    normalisation: str,
    nan_policy: str,
    top_k: int,
    token_size: int,
    clip: float | None,
) -> None:
    choices = {
        "genes.filter": (filter, FILTERS),
        "genes.ranking": (ranking, RANKINGS),
        "genes.ranking_scope": (scope, SCOPES),
        "genes.normalisation": (normalisation, NORMALISATIONS),
        "genes.nan_policy": (nan_policy, NAN_POLICIES),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise DataError(f"{key}={value!r} is unknown; choose one of {allowed}")
    if token_size < 1 or top_k < 1 or top_k % token_size:
        lower = max(1, top_k // max(1, token_size)) * token_size
        raise DataError(
            f"genes.top_k={top_k} is not a positive multiple of genes.token_size={token_size}; set for example "
            f"genes.top_k={lower}"
        )
    if clip is not None and not clip > 0:
        raise DataError(f"genes.clip={clip} must be positive or None")


def _cut(order: np.ndarray, filter: str, top_k: int, token_size: int, in_table: int) -> np.ndarray:
    if top_k > len(order):
        largest = len(order) // token_size * token_size
        fix = f"set genes.top_k to at most {largest}" if largest else f"set genes.token_size to at most {len(order)}"
        raise DataError(
            f"genes.top_k={top_k}, but only {len(order)} genes are available (table {in_table}, less excluded or "
            f"unranked ones); {fix}"
        )
    return order[-top_k:] if filter == "bottom" else order[:top_k]


def _fill_missing(values: np.ndarray, names: Sequence[str], cases: Sequence, nan_policy: str) -> np.ndarray:
    """Float64 copy with NaN read as 0, or an error that names the first missing entries."""
    missing = np.isnan(values)
    if missing.any() and nan_policy == "error":
        listed = [f"(gene {names[c]!r}, case {cases[r]!r})" for r, c in np.argwhere(missing)[:5]]
        raise DataError(
            f"{int(missing.sum())} gene values are missing, first {', '.join(listed)}; set genes.nan_policy='zero' or "
            f"name the genes in genes.exclude"
        )
    return np.where(missing, 0.0, values.astype(np.float64))


def _base(values: np.ndarray, names: Sequence[str], cases: Sequence, *, log2p1: bool) -> np.ndarray:
    if not log2p1:
        return values
    if (values < 0).any():
        row, column = np.argwhere(values < 0)[0]
        raise DataError(
            f"gene {names[column]!r}, case {cases[row]!r} is {values[row, column]:g}: log2(x + 1) needs non-negative "
            f"expression; for z-scores set genes.normalisation='precomputed_zscore'"
        )
    return np.log2(values + 1)


def _moments(base: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    std = base.std(axis=0)
    return base.mean(axis=0), np.where(std > 0, std, 1.0)


def _standardise(base: np.ndarray, mean: np.ndarray | None, std: np.ndarray | None, clip: float | None) -> np.ndarray:
    out = base if mean is None else (base - mean) / std
    return out if clip is None else np.clip(out, -clip, clip)


def _first_duplicate(ids: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(item for item in ids if item in seen or seen.add(item))
