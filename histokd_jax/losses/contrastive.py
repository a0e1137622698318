"""In-batch contrastive distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, masked_mean, matmul, require_batch, unit, valid_rows


def infonce_loss(a: jax.Array, b: jax.Array, *, temperature: float = 0.07, where: jax.Array | None = None) -> jax.Array:
    """Symmetric InfoNCE with in-batch negatives (arXiv 1807.03748): the memory-free relative of CRD.

    Mean of the two cross entropies over `unit(a) unit(b)^T / temperature` whose positives lie on the diagonal. Equals
    `log b` when all embeddings coincide. No stop-gradient inside.

    Args:
      a: [b, d] float.
      b: [b, d] float embeddings of the same examples.
      temperature: > 0.
      where: [b] bool, valid rows; masked rows are neither positives nor negatives.

    Returns:
      [] float32 (float64 for float64 input), nats, coupling the whole batch.

    Raises:
      ValueError: if b < 2 or the shapes disagree.
    """
    require_batch("infonce_loss", a, b, same_width=True)
    valid = valid_rows(a, where)
    logits = matmul(unit(accumulate(a, where)), unit(accumulate(b, where)).T) / temperature
    pairs = (valid[:, None] & valid[None, :]) | jnp.eye(a.shape[0], dtype=bool)
    logits = jnp.where(pairs, logits, jnp.finfo(logits.dtype).min)
    forward = -jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
    backward = -jnp.diagonal(jax.nn.log_softmax(logits, axis=0))
    return 0.5 * (masked_mean(forward, where) + masked_mean(backward, where))
