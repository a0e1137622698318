"""Adam as Keras has it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def scale_by_keras_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected second moment: `sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)` (C6).

    It equals the usual form with eps / sqrt(1 - b2^t), which is larger in the first steps.

    Args:
      b1, b2: decay rates of the moments.
      eps: added to the root.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), m, v)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        m = jax.tree.map(lambda a, g: b1 * a + (1.0 - b1) * g, state.mu, grads)
        v = jax.tree.map(lambda a, g: b2 * a + (1.0 - b2) * jnp.square(g), state.nu, grads)
        steps = count.astype(jnp.float32)
        rate = jnp.sqrt(1.0 - b2**steps) / (1.0 - b1**steps)
        updates = jax.tree.map(lambda a, b: (rate * a / (jnp.sqrt(b) + eps)).astype(a.dtype), m, v)
        return updates, optax.ScaleByAdamState(count, m, v)

    return optax.GradientTransformation(init, update)
