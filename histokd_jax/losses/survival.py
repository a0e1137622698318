"""Survival losses on discrete hazards (G-HANet section 5) and the Cox partial likelihood.

Conventions: `hazard_logits` [b, K] give hazards `h = sigmoid(logits)`; the survival curve is
`S_k = (1 - h_0) ... (1 - h_k)` with `S_{-1} = 1`; `event` is 1 for an observed death and 0 for censoring; the bin of a
censored patient is the one that its follow-up ends in, and it counts as survived.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, count, valid_rows

CLAMPS = ("low", "both")
TIES = ("breslow", "efron")
_CLAMP = 1e-7


def log_survival(hazard_logits: jax.Array) -> jax.Array:
    """Logarithm of the survival curve, exact also where the hazards saturate.

    Args:
      hazard_logits: [b, K] float.

    Returns:
      [b, K] float32 (float64 for float64 logits), non-increasing along K.
    """
    return jnp.cumsum(-jax.nn.softplus(accumulate(hazard_logits)), axis=-1)


def survival_curve(hazard_logits: jax.Array) -> jax.Array:
    """`S_k`, the probability to survive bin k (G-HANet section 4.3, step 14).

    Args:
      hazard_logits: [b, K] float.

    Returns:
      [b, K] float32 (float64 for float64 logits) in [0, 1], non-increasing along K.
    """
    return jnp.exp(log_survival(hazard_logits))


def risk_score(hazard_logits: jax.Array) -> jax.Array:
    """`-(S_0 + ... + S_{K-1})`: higher means earlier death (G-HANet section 4.3, step 14).

    Args:
      hazard_logits: [b, K] float.

    Returns:
      [b] float32 (float64 for float64 logits) in [-K, 0].
    """
    return -jnp.sum(survival_curve(hazard_logits), axis=-1)


def _clamped_log(log_x: jax.Array) -> jax.Array:
    """log max(x, 1e-7); no gradient where the clamp acts."""
    return jnp.maximum(log_x, math.log(_CLAMP))


def _terms(
    hazard_logits: jax.Array, bin_index: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log S_{Y-1}, log h_Y and log S_Y, each [b]; masked rows are computed on zero logits and bin 0."""
    logits = accumulate(hazard_logits, where)
    bin_index = (bin_index if where is None else jnp.where(where, bin_index, 0))[:, None]
    curve = log_survival(logits)
    before = jnp.concatenate([jnp.zeros_like(curve[:, :1]), curve[:, :-1]], axis=-1)
    log_hazard = -jax.nn.softplus(-logits)
    return tuple(jnp.take_along_axis(x, bin_index, axis=-1)[:, 0] for x in (before, log_hazard, curve))


def _select(event: jax.Array, died: jax.Array, censored: jax.Array, where: jax.Array | None) -> jax.Array:
    loss = jnp.where(event.astype(bool), died, censored)
    return loss if where is None else jnp.where(where, loss, 0.0)


def nll_survival(
    hazard_logits: jax.Array,
    bin_index: jax.Array,
    event: jax.Array,
    *,
    alpha: float = 0.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Negative log-likelihood of discrete hazards (`nll_surv` of G-HANet section 5), per example, not reduced.

    Death in bin Y: `-log S_{Y-1} - log h_Y`; censored in bin Y: `-(1 - alpha) log S_Y`; every factor is clamped to
    >= 1e-7, where it passes no gradient.

    Args:
      hazard_logits: [b, K] float.
      bin_index: [b] int32 in [0, K); anything in masked rows.
      event: [b] bool, int or float, 1 = death observed, 0 = censored.
      alpha: in [0, 1], how much less censored patients count.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    before, hazard, after = map(_clamped_log, _terms(hazard_logits, bin_index, where))
    return _select(event, -(before + hazard), -(1.0 - alpha) * after, where)


def ce_survival(
    hazard_logits: jax.Array,
    bin_index: jax.Array,
    event: jax.Array,
    *,
    alpha: float = 0.0,
    clamp: str = "low",
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross entropy of dying by the end of the bin (`ce_surv` of G-HANet section 5), per example, not reduced.

    Death in bin Y: `-(1 - alpha) log(1 - S_Y) - alpha (log(S_{Y-1} + 1e-7) + log h_Y)`; censored:
    `-(1 - alpha) log S_Y`.

    Args:
      hazard_logits: [b, K] float.
      bin_index: [b] int32 in [0, K); anything in masked rows.
      event: [b] bool, int or float, 1 = death observed, 0 = censored.
      alpha: in [0, 1], weight of the likelihood term of deaths.
      clamp: "low" as published: S is clamped from below only, so a death with S_Y = 1 in working precision costs
        infinity (deviation D16); "both" also clamps 1 - S to >= 1e-7, which is finite.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats.

    Raises:
      ValueError: unknown `clamp`.
    """
    if clamp not in CLAMPS:
        raise ValueError(f"ce_survival: clamp={clamp!r} is unknown; choose one of {CLAMPS}")
    before, hazard, after = _terms(hazard_logits, bin_index, where)
    likelihood = -(jnp.log(jnp.exp(before) + _CLAMP) + _clamped_log(hazard))
    # Where a row is censored its death term is not used; a finite stand-in keeps its gradient from becoming 0 * inf.
    after_death = after if where is None else jnp.where(where, after, -1.0)
    after_death = jnp.where(event.astype(bool), after_death, -1.0)
    died = -(1.0 - alpha) * _log_death(after_death, clamp) + alpha * likelihood
    return _select(event, died, -(1.0 - alpha) * _clamped_log(after), where)


def _log_death(log_curve: jax.Array, clamp: str) -> jax.Array:
    """log(1 - S): from S itself for "low", which keeps its infinity, and without cancellation for "both"."""
    if clamp == "low":
        return jnp.log(1.0 - jnp.exp(_clamped_log(log_curve)))
    return jnp.log(jnp.maximum(-jnp.expm1(_clamped_log(log_curve)), _CLAMP))


def cox_loss(
    log_risk: jax.Array,
    time: jax.Array,
    event: jax.Array,
    *,
    ties: str = "breslow",
    where: jax.Array | None = None,
) -> jax.Array:
    """Negative log partial likelihood of Cox (`cox_surv` of G-HANet section 5, deviation D15), coupling the batch.

    `-1/b sum over deaths i of [theta_i - log sum over j with t_j >= t_i of exp(theta_j)]`, mean over *all* b valid
    patients, the censored ones included. A batch with a single patient or without a death holds no information: the
    loss is exactly 0 with zero gradient. The cost grows as b^2. Deaths at one time share the risk set ("breslow"), or
    leave it in equal parts ("efron"). Times are compared in the precision given.

    Args:
      log_risk: [b] float, theta.
      time: [b] float follow-up, any unit.
      event: [b] bool, int or float, 1 = death observed, 0 = censored.
      ties: one of `TIES`.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 input), nats.

    Raises:
      ValueError: unknown `ties`, or `log_risk` is no vector.
    """
    if ties not in TIES:
        raise ValueError(f"cox_loss: ties={ties!r} is unknown; choose one of {TIES}")
    if log_risk.ndim != 1:
        raise ValueError(f"cox_loss needs one log-risk per patient, [b]; got shape {log_risk.shape}")
    valid = valid_rows(log_risk, where)
    theta = accumulate(log_risk, where)
    died = event.astype(bool) & valid
    share = _risk_set(time, died, valid, ties, theta.dtype)
    terms = theta - _log_weighted_sum(theta, share)
    return -jnp.sum(jnp.where(died, terms, 0.0)) / count(valid, theta.dtype)


def _risk_set(time: jax.Array, died: jax.Array, valid: jax.Array, ties: str, dtype: jnp.dtype) -> jax.Array:
    """[b, b] share of patient j in the risk set of patient i: 1 or 0, less for tied deaths under Efron."""
    share = ((time[None, :] >= time[:, None]) & valid[None, :]).astype(dtype)
    if ties == "breslow":
        return share
    tied = (time[None, :] == time[:, None]) & died[None, :] & died[:, None]
    earlier = jnp.sum(jnp.tril(tied, -1), axis=-1) / _per_row(tied, dtype)
    return share - earlier[:, None] * tied


def _per_row(mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[b] number of True entries per row, at least 1."""
    return jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(dtype)


def _log_weighted_sum(theta: jax.Array, share: jax.Array) -> jax.Array:
    """[b] log sum_j share_ij exp(theta_j), stable for any theta; 0 for rows without a share."""
    inside = share > 0.0
    top = jnp.max(jnp.where(inside, theta[None, :], -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(share * jnp.exp(jnp.where(inside, theta[None, :] - top, -jnp.inf)), axis=-1)
    empty = total == 0.0
    return jnp.where(empty, 0.0, jnp.log(jnp.where(empty, 1.0, total)) + top[:, 0])
