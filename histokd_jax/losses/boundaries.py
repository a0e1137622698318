"""Losses on pre-activations: activation boundaries (AB) and overhaul distillation (OFD), one example at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, keep, per_example_sum, require_maps, require_same_shape
from histokd_jax.losses.maps import flat, matched

_AB_SCALE = 3.0 / 1000.0
_RARE = 1e-3


def ab_loss(
    student: jax.Array, teacher: jax.Array, *, margin: float = 1.0, where: jax.Array | None = None
) -> jax.Array:
    """Activation boundaries of one layer (Heo et al., arXiv 1811.03233), per example.

    `(s + m)^2 [s > -m, t <= 0] + (s - m)^2 [s <= m, t > 0]`, summed over elements, times 3/1000. Depends on the
    teacher through the signs of its pre-activations only.

    Args:
      student: [b, ...] float pre-activations behind the connector.
      teacher: [b, ...] float pre-activations of the same shape.
      margin: m > 0.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.
    """
    require_same_shape("ab_loss", student, teacher)
    s, t = accumulate(student, where), accumulate(teacher, where)
    below = jnp.where((s > -margin) & (t <= 0.0), (s + margin) ** 2, 0.0)
    above = jnp.where((s <= margin) & (t > 0.0), (s - margin) ** 2, 0.0)
    return keep(_AB_SCALE * per_example_sum(below + above), where)


def doubling_weights(layers: int) -> tuple[float, ...]:
    """Weights `2^(i - L + 1)` of the layers of AB and of OFD: the last counts 1, each before it half."""
    return tuple(2.0 ** (i - layers + 1) for i in range(layers))


def ofd_margin(scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Expected negative part of a normalised channel: the margin of the teacher in `ofd_loss`.

    Args:
      scale: [C] float scale g of the batch norm before the teacher's ReLU; its sign does not matter.
      offset: [C] float offset m.

    Returns:
      [C] `-g phi(m / g) / Phi(-m / g) + m`, or `-3 g` where a negative value is rarer than 0.001.
    """
    g, m = jnp.abs(accumulate(scale)), accumulate(offset)
    ratio = m / jnp.maximum(g, 1e-12)
    rare = jax.scipy.stats.norm.cdf(-ratio)
    negative = -g * jnp.exp(jax.scipy.stats.norm.logpdf(ratio)) / jnp.maximum(rare, _RARE) + m
    return jnp.where(rare > _RARE, negative, -3.0 * g)


def ofd_loss(student: jax.Array, teacher: jax.Array, margin: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Overhaul of feature distillation of one layer (Heo et al., arXiv 1904.01866), per example, summed over elements.

    `(s - mg)^2 [s > mg, t <= mg] + (s - t)^2 [s > t, mg < t <= 0] + (s - t)^2 [t > 0]`: no gradient where the teacher
    is below its margin and the student already is.

    Args:
      student: [b, C, ...] float pre-activations behind the connector.
      teacher: [b, C, ...] float pre-activations.
      margin: [C] float, see `ofd_margin`.
      where: [b] bool, valid rows; others return exactly 0.

    Returns:
      [b] float32 (float64 for float64 input).

    Raises:
      ValueError: if the channels or the axes differ.
    """
    require_maps("ofd_loss", student, teacher, same_channels=True)
    s, t = (flat(x) for x in matched(accumulate(student, where), accumulate(teacher, where)))
    mg = jnp.broadcast_to(accumulate(margin)[None, :, None], s.shape)
    target = jnp.maximum(t, mg)
    counted = jnp.where(t > 0.0, True, s > target)
    return keep(per_example_sum(jnp.where(counted, (s - target) ** 2, 0.0)), where)
