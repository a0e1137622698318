"""What happens to gradients before the optimizer sees them, and to steps that are not finite."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

RAISE, SKIP, FILL = "raise", "skip", "fill"
NONFINITE = (RAISE, SKIP, FILL)
"""What happens to a step whose loss or gradients are not finite (train.nonfinite): the run ends with its epoch; the
step changes nothing and is counted; or NaN entries of gradients become train.nan_fill (More From Less, A5)."""


def nonfinite(train: ConfigDict) -> str:
    """train.nonfinite.

    Raises:
      ValueError: it is not one of `NONFINITE`.
    """
    found = train.get("nonfinite", RAISE)
    if found not in NONFINITE:
        raise ValueError(f"train.nonfinite={found!r}: expected one of {', '.join(NONFINITE)}")
    return found


def filled(grads: optax.Updates, value: float) -> optax.Updates:
    """Gradients with `value` in the place of every NaN entry."""
    return jax.tree.map(lambda g: jnp.where(jnp.isnan(g), jnp.asarray(value, g.dtype), g), grads)


def clipped(grads: optax.Updates, limit: float) -> optax.Updates:
    """`g min(1, limit / |g|)` for every array on its own (More From Less, C6): no clipping by the global norm."""

    def clip(g: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32))))
        return g * jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)).astype(g.dtype)

    return jax.tree.map(clip, grads)


def transformations(
    nan_fill: float | None, clip_per_tensor: float, clip_norm: float
) -> tuple[optax.GradientTransformation, ...]:
    """The steps that are wanted, in the order in which they are done; see `optim.make_optimizer`.

    Raises:
      ValueError: for a negative norm.
    """
    for name, limit in (("clip_per_tensor", clip_per_tensor), ("clip_norm", clip_norm)):
        if limit < 0.0:
            raise ValueError(f"train.{name}={limit!r}: expected a norm > 0, or 0 for no clipping")
    found = []
    if nan_fill is not None:
        found.append(optax.stateless(lambda grads, _: filled(grads, nan_fill)))
    if clip_per_tensor:
        found.append(optax.stateless(lambda grads, _: clipped(grads, clip_per_tensor)))
    if clip_norm:
        found.append(optax.clip_by_global_norm(clip_norm))
    return tuple(found)
