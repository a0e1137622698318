"""How alive the embeddings and the inputs of a step are: what `histokd_jax.evals.collapse` looks at."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from histokd_jax.types import Batch, Metrics

_DEAD = 0.01
"""A dimension is dead if its deviation is at most this share of the root mean square of all values."""


def embedding_health(z: jax.Array, where: jax.Array) -> dict[str, jax.Array]:
    """Evidence of collapse of one branch, scale-invariant.

    Args:
      z: [B, D] float32 embedding.
      where: [B] bool, rows that count.

    Returns:
      std_unit: mean over dimensions of the deviation of `z / |z|` over the batch, times sqrt(D): 1 if directions are
      spread evenly, 0 if all are one. effective_rank: participation ratio `(sum of eigenvalues)^2 / sum of their
      squares` of the covariance, 1 to min(B - 1, D). dead_dims: share of dimensions that (almost) do not vary.
    """
    z, n = jnp.where(where[:, None], z, 0.0), jnp.maximum(jnp.sum(where), 1).astype(jnp.float32)
    square = jnp.sum(z * z, axis=1, keepdims=True)
    unit = z * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
    y = _centred(z, where, n)
    deviation = jnp.sqrt(jnp.sum(y * y, axis=0) / n)
    gram = jnp.matmul(y, y.T, precision=jax.lax.Precision.HIGHEST)
    rms = jnp.sqrt(jnp.sum(square) / (n * z.shape[1]))
    spread = jnp.sqrt(jnp.sum(jnp.square(_centred(unit, where, n)), axis=0) / n)
    return {
        "std_unit": jnp.mean(spread) * z.shape[1] ** 0.5,
        "effective_rank": jnp.trace(gram) ** 2 / jnp.maximum(jnp.sum(gram * gram), 1e-30),
        "dead_dims": jnp.mean((deviation <= _DEAD * rms).astype(jnp.float32)),
    }


def _centred(z: jax.Array, where: jax.Array, n: jax.Array) -> jax.Array:
    return jnp.where(where[:, None], z - (jnp.sum(z, axis=0) / n)[None], 0.0)


def view_spread(view: jax.Array, where: jax.Array) -> jax.Array:
    """[] mean over the values of a view of their range (largest minus smallest) over the examples: 0 if it is constant.

    Args:
      view: [B, ...] as stored; exact for images.
      where: [B] bool, examples that have it.
    """
    keep = where.reshape(-1, *(1,) * (view.ndim - 1))
    x = view.astype(jnp.float32)
    high = jnp.max(jnp.where(keep, x, -jnp.inf), axis=0)
    low = jnp.min(jnp.where(keep, x, jnp.inf), axis=0)
    return jnp.mean(jnp.maximum(high - low, 0.0))


def health_metrics(z: Sequence[jax.Array], valid: Sequence[jax.Array], batch: Batch, fields: Sequence[str]) -> Metrics:
    """All of them for a step; steps with fewer than two examples of a branch do not count.

    Args:
      z: embedding of every branch [B, D].
      valid: rows that count, of every branch [B].
      batch: the step.
      fields: the views that the branches read: "image", "partner".
    """
    metrics = {}
    for k, (embedding, where) in enumerate(zip(z, valid)):
        counts = (jnp.sum(where) >= 2).astype(jnp.float32)
        found = embedding_health(jax.lax.stop_gradient(embedding), where)
        metrics |= {f"{name}_{k}": (counts * value, counts) for name, value in found.items()}
    real = batch["weight"] > 0
    for field in dict.fromkeys(fields):
        has = real & batch["has_partner"] if field == "partner" else real
        counts = (jnp.sum(has) >= 2).astype(jnp.float32)
        spread = jnp.where(counts > 0, view_spread(batch[field], has), 0.0)
        metrics[f"spread_{field}"] = spread, counts
    return metrics
