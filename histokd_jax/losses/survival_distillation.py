"""Distillation between survival models: hazards, event distributions, and the order of risks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, require_batch, valid_rows
from histokd_jax.losses.survival import log_survival


def at_risk_mask(bin_index: jax.Array, num_bins: int) -> jax.Array:
    """Bins in which a patient was under observation: 0..Y, where Y is the bin of death or censoring.

    Args:
      bin_index: [b] int32 in [0, K).
      num_bins: K.

    Returns:
      [b, K] bool.
    """
    return jnp.arange(num_bins)[None, :] <= bin_index[:, None]


def _bernoulli_kl(trained: jax.Array, target: jax.Array) -> jax.Array:
    """KL(Bern(sigmoid(target)) || Bern(sigmoid(trained))), elementwise, from logits."""
    softplus, p = jax.nn.softplus, jax.nn.sigmoid(target)
    return p * (softplus(-trained) - softplus(-target)) + (1.0 - p) * (softplus(trained) - softplus(target))


def hazard_kl(
    trained: jax.Array,
    target: jax.Array,
    *,
    at_risk: jax.Array | None = None,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Distils hazards bin by bin: Bernoulli KL(target || trained), mean over bins, per example, not reduced.

    Args:
      trained: [b, K] hazard logits that receive the gradient.
      target: [b, K] hazard logits; stop-gradiented inside.
      at_risk: [b, K] bool, bins that count (`at_risk_mask`): behind the end of follow-up neither model was ever
        corrected. None: all bins. A row without a bin gives 0.
      temperature: T > 0; logits are divided by it and the loss multiplied by T^2.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    trained, target = accumulate(trained, where), jax.lax.stop_gradient(accumulate(target, where))
    kl = temperature**2 * _bernoulli_kl(trained / temperature, target / temperature)
    bins = jnp.ones(kl.shape, bool) if at_risk is None else at_risk
    mean = jnp.sum(jnp.where(bins, kl, 0.0), axis=-1) / jnp.maximum(jnp.sum(bins, axis=-1), 1).astype(kl.dtype)
    return mean if where is None else jnp.where(where, mean, 0.0)


def event_distribution_kl(trained: jax.Array, target: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """KL(target || trained) between distributions of the time of death, per example, not reduced.

    The distribution has K + 1 outcomes: death in bin k with probability `S_{k-1} h_k`, or survival of all bins. By the
    chain rule this is `sum_k S_{k-1} KL(Bern(h_k) || Bern(h'_k))` with the target's S: hazards weigh as much as the
    target believes that the patient lives to meet them.

    Args:
      trained: [b, K] hazard logits that receive the gradient.
      target: [b, K] hazard logits; stop-gradiented inside.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    trained, target = accumulate(trained, where), jax.lax.stop_gradient(accumulate(target, where))
    curve = jnp.exp(log_survival(target))
    alive = jnp.concatenate([jnp.ones_like(curve[:, :1]), curve[:, :-1]], axis=-1)
    kl = jnp.sum(alive * _bernoulli_kl(trained, target), axis=-1)
    return kl if where is None else jnp.where(where, kl, 0.0)


def risk_order_loss(
    trained_risk: jax.Array,
    target_risk: jax.Array,
    *,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Distils the order of risks: pairwise logistic loss, each pair weighted by how far the target sets it apart.

    `sum over pairs of |d_t| log(1 + exp(-sign(d_t) d_s / T)) / sum of |d_t|`, with d_t and d_s the differences of
    target and trained risk of a pair. Invariant to shifts of either side and to positive scaling of the target; 0 with
    zero gradient if the target ranks nobody (equal risks, fewer than two valid patients). Couples the batch; cost b^2.

    Args:
      trained_risk: [b] float that receives the gradient.
      target_risk: [b] float; stop-gradiented inside.
      temperature: T > 0, in units of the trained risk.
      where: [b] bool, valid rows.

    Returns:
      [] float32 (float64 for float64 input), nats.

    Raises:
      ValueError: b < 2, or the batch sizes differ.
    """
    require_batch("risk_order_loss", trained_risk[:, None], target_risk[:, None])
    valid = valid_rows(trained_risk, where)
    trained, target = accumulate(trained_risk, where), jax.lax.stop_gradient(accumulate(target_risk, where))
    pairs = jnp.triu(valid[:, None] & valid[None, :], 1)
    d_s, d_t = trained[:, None] - trained[None, :], target[:, None] - target[None, :]
    weight = jnp.where(pairs, jnp.abs(d_t), 0.0)
    total = jnp.sum(weight)
    loss = jnp.sum(weight * jax.nn.softplus(-jnp.sign(d_t) * d_s / temperature))
    return jnp.where(total > 0.0, loss / jnp.where(total > 0.0, total, 1.0), 0.0)
