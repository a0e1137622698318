"""Mutual learning: a tempered KL divergence that trains exactly one side."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, masked_mean


def tempered_kl(trained: jax.Array, target: jax.Array, temperature: float) -> jax.Array:
    """`T^2 KL(softmax(sg[target] / T) || softmax(trained / T))`, per example, not reduced.

    Args:
      trained: [b, C] float logits that receive the gradient.
      target: [b, C] float logits; no gradient flows into them.
      temperature: T > 0.

    Returns:
      [b] float32 (float64 for float64 logits), nats.
    """
    log_q = jax.nn.log_softmax(accumulate(trained) / temperature, axis=-1)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(accumulate(target)) / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def mutual_kl(
    trained: jax.Array, target: jax.Array, temperature: float = 4.0, *, where: jax.Array | None = None
) -> jax.Array:
    """One direction of the CLOD loss of MKD (section 5.4; Zhang et al., CVPR 2018), mean over valid examples.

    Its gradient is `(T / b) (softmax(trained / T) - softmax(target / T))`, exactly zero on `target`.

    Args:
      trained: [b, C] float logits that receive the gradient.
      target: [b, C] float logits, stop-gradiented inside.
      temperature: T > 0.
      where: [b] bool, valid rows; b counts these only.

    Returns:
      [] float32 (float64 for float64 logits), nats.
    """
    return masked_mean(tempered_kl(accumulate(trained, where), accumulate(target, where), temperature), where)
