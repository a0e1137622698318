"""Cross entropy on integer labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate


def cross_entropy(logits: jax.Array, label: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Softmax cross entropy, per example, not reduced.

    Args:
      logits: [b, C] float.
      label: [b] int32 in [0, C); anything in masked rows.
      where: [b] bool, valid rows; others return exactly 0 with zero gradient.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    log_prob = jax.nn.log_softmax(accumulate(logits, where), axis=-1)
    label = label if where is None else jnp.where(where, label, 0)
    loss = -jnp.take_along_axis(log_prob, label[:, None], axis=-1)[:, 0]
    return loss if where is None else jnp.where(where, loss, 0.0)


def correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    """[b] float32, 1 where the arg-max class equals `label`. Args as in `cross_entropy`."""
    return (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
